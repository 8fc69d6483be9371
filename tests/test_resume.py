"""Killed at any moment and started again, a run ends in the same bits."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from tdro_cli.errors import RunFailed  # noqa: E402
from tdro_cli.learn.training import Stopped, read_metrics  # noqa: E402
from tdro_cli.run.launch import Machines, run_plan  # noqa: E402
from tdro_cli.run.progress import Silent  # noqa: E402

LORA = ("lora={r: 2, dropout: 0.2}",)  # dropout: the random state must be restored, too
OFTEN = ("learn_weights.steps=16", "finetune.steps=16")


@pytest.fixture(scope="module")
def server():
    """Forks processes that have imported everything: a run starts in a moment."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["deepspeed", "peft", "transformers", "tdro_cli.learn.weight_learning", "tdro_cli.model.export"]
    )
    return context


def start(server, plan):
    process = server.Process(target=run_plan, args=(plan, Machines(), Silent()))
    process.start()
    return process


def finish(server, plan) -> None:
    process = start(server, plan)
    process.join(timeout=120)
    assert process.exitcode == 0


def kill_in(server, plan, steps_done: int, pause: float = 0.0) -> None:
    """Starts the plan and sends SIGKILL when so many steps are logged, or as soon as it is complete."""
    process = start(server, plan)
    log = Path(plan.folder) / "metrics.jsonl"
    while process.is_alive() and not (log.exists() and log.read_bytes().count(b"\n") >= steps_done):
        time.sleep(0.002)
    time.sleep(pause)
    process.kill()
    process.join()


def result(plan) -> bytes:
    name = "weights.json" if plan.stage == "learn-weights" else "model/model.safetensors"
    return (plan.out / name).read_bytes()


def steps_logged(plan) -> list[int]:
    return [line["step"] for line in read_metrics(plan.out / "metrics.jsonl")]


@pytest.mark.parametrize("stage", ["learn-weights", "finetune"])
def test_a_run_killed_three_times_ends_in_the_same_bits(stage, referenced, another_experiment, server):
    expected, killed = another_experiment("whole"), another_experiment("killed")
    overrides = (*OFTEN, *LORA) if stage == "finetune" else OFTEN
    if stage == "finetune":
        overrides += ("transfer.strategy=uniform",)
    for experiment in (expected, killed):
        for plan in list(experiment.plans(*overrides, stage=stage).values())[:-1]:
            finish(server, plan)
    plan = expected.plans(*overrides, stage=stage)[stage]
    finish(server, plan)
    other = killed.plans(*overrides, stage=stage)[stage]
    for steps_done in (1, 5, 12):
        kill_in(server, other, steps_done)
        assert not (other.out / "manifest.json").exists()
    finish(server, other)
    assert result(other) == result(plan)
    assert steps_logged(other) == list(range(16))
    if stage == "learn-weights":
        import pyarrow.parquet as pq

        assert pq.read_table(other.out / "losses.parquet") == pq.read_table(plan.out / "losses.parquet")


def test_a_run_killed_at_its_early_end_ends_at_the_same_step(another_experiment, server):
    stop = "learn_weights.stop={window_steps: 10, drift_over_noise: 9.0}"
    overrides = ("learn_weights.steps=40", stop, "learn_weights.checkpoint.every_steps=1")
    expected, killed = another_experiment("whole"), another_experiment("killed")
    plan = expected.plans(*overrides, stage="learn-weights")["learn-weights"]
    other = killed.plans(*overrides, stage="learn-weights")["learn-weights"]
    finish(server, plan)
    steps = len(steps_logged(plan))
    assert 10 <= steps < 40
    for steps_done in (9, steps):
        kill_in(server, other, steps_done)
    finish(server, other)
    assert result(other) == result(plan)
    assert steps_logged(other) == list(range(steps))


@pytest.mark.slow
def test_twenty_random_kills_change_no_bit_of_the_weights(another_experiment, server):
    overrides = ("learn_weights.steps=60", "learn_weights.checkpoint.every_steps=3")
    expected, killed = another_experiment("whole"), another_experiment("killed")
    plan = expected.plans(*overrides, stage="learn-weights")["learn-weights"]
    other = killed.plans(*overrides, stage="learn-weights")["learn-weights"]
    finish(server, plan)
    draw = random.Random(11)
    kills = 0
    while kills < 20 and not (other.out / "manifest.json").exists():
        before = len(read_metrics(path)) if (path := Path(other.folder) / "metrics.jsonl").exists() else 0
        kill_in(server, other, min(before // 3 * 3 + 1 + draw.randrange(4), 59), pause=draw.random() * 0.05)
        kills += 1
    finish(server, other)
    assert kills >= 15
    assert result(other) == result(plan)
    assert steps_logged(other) == list(range(60))


def interrupted(experiment, server, stage: str = "finetune"):
    """A plan killed after its second checkpoint of two that are kept."""
    overrides = ("transfer.strategy=uniform", "finetune.steps=30", "finetune.checkpoint.keep_last=2")
    plans = experiment.plans(*overrides, stage=stage)
    for plan in list(plans.values())[:-1]:
        run_plan(plan, Machines(), Silent())
    kill_in(server, plans[stage], 7)
    return plans[stage]


def test_a_damaged_checkpoint_is_left_for_the_one_before_it_with_a_warning(experiment, server):
    plan = interrupted(experiment, server)
    checkpoints = sorted((Path(plan.folder) / "checkpoints").glob("step-*"))
    assert len(checkpoints) == 2
    weights = next(path for path in checkpoints[-1].rglob("*model_states.pt"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 255
    weights.write_bytes(content)
    shown = Silent()
    run_plan(plan, Machines(), shown)
    assert [str(checkpoints[-1]) in warning and "is damaged" in warning for warning in shown.warnings] == [True]
    assert steps_logged(plan) == list(range(30))


def test_with_no_whole_checkpoint_left_the_run_begins_anew(experiment, another_experiment, server):
    plan = interrupted(experiment, server)
    for checkpoint in (Path(plan.folder) / "checkpoints").glob("step-*"):
        (checkpoint / "manifest.json").write_text("{")
    shown = Silent()
    run_plan(plan, Machines(), shown)
    assert len(shown.warnings) == 2
    whole = another_experiment("whole")
    overrides = ("transfer.strategy=uniform", "finetune.steps=30", "finetune.checkpoint.keep_last=2")
    assert result(plan) == (whole.run(*overrides) / "model" / "model.safetensors").read_bytes()


def test_another_number_of_processes_is_refused_in_one_sentence(experiment, server):
    plan = interrupted(experiment, server)
    for checkpoint in (Path(plan.folder) / "checkpoints").glob("step-*"):
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        (checkpoint / "manifest.json").write_text(json.dumps({**manifest, "ranks": 2}))
    with pytest.raises(RunFailed, match="was written by 2 processes and can't be continued by 1") as refused:
        run_plan(plan, Machines(), Silent())
    assert "run with 2 processes again" in refused.value.remedy


def test_a_wish_to_stop_is_granted_after_a_step_with_a_checkpoint(experiment):
    class Impatient(Silent):
        """Sends SIGTERM to its own process in the third step."""

        def start(self, what, total, unit):
            bar = super().start(what, total, unit)
            calls = []

            def advance(n=1, **facts):
                calls.append(n)
                if len(calls) == 4:
                    os.kill(os.getpid(), signal.SIGTERM)

            bar.advance = advance
            return bar

    plans = experiment.plans("transfer.strategy=uniform", "finetune.checkpoint.every_steps=100")
    plan = plans.pop("finetune")
    for before in plans.values():
        run_plan(before, Machines(), Silent())
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="stopped after step 3 of 6") as stopped:
        run_plan(plan, Machines(), Impatient())
    assert stopped.value.exit_code == 130
    assert [p.name for p in (Path(plan.folder) / "checkpoints").iterdir()] == ["step-000003"]
    assert signal.getsignal(signal.SIGTERM) is handler
    run_plan(plan, Machines(), Silent())
    assert steps_logged(plan) == list(range(6))


def test_ctrl_c_on_the_command_line_leaves_one_sentence_and_a_run_that_goes_on(experiment, tmp_path):
    overrides = ("transfer.strategy=uniform", "finetune.steps=4000", "finetune.checkpoint.every_steps=100000")
    *earlier, plan = experiment.plans(*overrides).values()
    for before in earlier:
        run_plan(before, Machines(), Silent())
    settings = [word for override in overrides for word in ("--set", override)]
    command = [sys.executable, "-m", "tdro_cli", "finetune", str(experiment.recipe), "--runs", str(experiment.runs)]
    process = subprocess.Popen([*command, *settings], stderr=subprocess.PIPE, text=True)
    log = Path(plan.folder) / "metrics.jsonl"
    while process.poll() is None and not log.exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "stopped after step" in told and "Traceback" not in told
    saved = list((Path(plan.folder) / "checkpoints").glob("step-*"))
    assert len(saved) == 1
    shutil.rmtree(experiment.runs)
