"""Faults from outside: each ends in one clear sentence and in a folder that the same command goes on from."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
import kills  # noqa: E402

from tdro_cli import artifacts  # noqa: E402
from tdro_cli.errors import RunFailed, TdroError  # noqa: E402
from tdro_cli.run.launch import Machines, run_plan  # noqa: E402
from tdro_cli.run.progress import Silent  # noqa: E402


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of so many bytes; skips where that needs more rights."""
    mounted = []

    def mount(size: int) -> Path:
        folder = tmp_path / "small"
        folder.mkdir()
        options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if subprocess.run(["mount", *options], capture_output=True, check=False).returncode:
            pytest.skip("no right to mount a small file system")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def used(folder: Path) -> int:
    told = subprocess.run(["df", "-B1", "--output=used", str(folder)], capture_output=True, text=True, check=True)
    return int(told.stdout.split()[-1])


def remove_stage(runs: Path, stage: str) -> None:
    for left in runs.glob(f"*/{stage}-????????????"):
        shutil.rmtree(left)


STAGES = ("dedup", "train-ref", "learn-weights", "transfer", "finetune", "eval")
WITH_JAVA = [pytest.param("mine", marks=pytest.mark.slow)]


@pytest.fixture
def overrides(tmp_path):
    """All stages on made-up documents; one rank, no Java but to mine."""
    test = tmp_path / "collection"
    (test / "qrels").mkdir(parents=True)
    (test / "corpus.jsonl").write_text("".join(f'{{"_id": "d{n}", "text": "wrap the text {n}"}}\n' for n in range(40)))
    (test / "queries.jsonl").write_text('{"_id": "q", "text": "wrap it"}\n')
    (test / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td1\t1\n")
    measured = f"benchmarks: [{{name: folder, options: {{path: {test}}}}}]"
    return ("dedup={}", f"eval={{{measured}, models: [train_ref], compare_to: null}}", "transfer.strategy=uniform")


def content(out: Path, stage: str) -> dict[str, str]:
    """An output without the facts of an evaluation, which name the folder of the model."""
    return {name: held for name, held in kills.essence(out).items() if stage != "eval" or "facts" not in name}


@pytest.mark.parametrize("stage", [*STAGES, *WITH_JAVA])
def test_a_full_disk_ends_any_stage_in_one_sentence_and_room_lets_it_go_on(
    tiny_recipe, tdro, tmp_path, small_disk, overrides, stage
):
    more = ("mine={keep: 2}",) if stage == "mine" else ()
    arguments = [str(tiny_recipe), *(word for override in (*overrides, *more) for word in ("--set", override))]
    whole = tmp_path / "whole"
    assert tdro(stage, *arguments, "--runs", str(whole))[0] == 0
    (expected,) = whole.glob(f"*/{stage}-????????????/out")
    disk, faults = small_disk(200 << 20), 0
    for room in (0, 1 << 14, 1 << 16, 1 << 18):
        shutil.copytree(whole, disk / "runs", symlinks=True)
        remove_stage(disk / "runs", stage)
        subprocess.run(["mount", "-o", f"remount,size={used(disk) + room}", str(disk)], check=True)
        code, _, err = tdro(stage, *arguments, "--runs", str(disk / "runs"))
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        out = next((disk / "runs").glob(f"*/{stage}-????????????/out"), None)
        if code:
            faults += 1
            assert code == 1 and err.count("error: ") == 1 and "the disk is full" in err and "make room" in err, err
            assert str(disk) in err and out is None, err
            assert not list(disk.rglob("*.partial"))
            code, _, err = tdro(stage, *arguments, "--runs", str(disk / "runs"))
        assert code == 0, err
        (out,) = (disk / "runs").glob(f"*/{stage}-????????????/out")
        assert [content(one, stage) for one in (out, expected)] == [content(expected, stage)] * 2
        shutil.rmtree(disk / "runs")
    assert faults >= 2


@pytest.mark.parametrize("runs", ["/proc/tdro", "/dev/null/runs"])
def test_a_folder_that_cannot_be_written_to_is_told_at_once(experiment, tdro, runs):
    code, _, err = tdro("transfer", str(experiment.recipe), "--set", "transfer.strategy=uniform", "--runs", runs)
    assert code in (1, 2) and err.count("error: ") == 1 and err.count("\n  ") >= 1


def test_what_can_only_be_read_is_reported_and_nothing_is_begun_there(experiment, tdro, tmp_path, small_disk):
    plan = experiment.plans("transfer.strategy=uniform", stage="transfer")["transfer"]
    run_plan(plan, Machines(), Silent())
    disk = small_disk(200 << 20)
    shutil.copytree(experiment.runs, disk / "runs", symlinks=True)
    shutil.rmtree(disk / "runs" / ".cache" / "inspect", ignore_errors=True)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    code, _, err = tdro("report", str(disk / "runs" / "tiny"), "--to", str(tmp_path / "report.html"))
    assert code == 0 and (tmp_path / "report.html").is_file(), err
    for arguments in (
        ("train-ref", str(experiment.recipe), "--runs", str(disk / "other")),
        ("sample", str(disk / "s")),
    ):
        code, _, err = tdro(*arguments)
        assert code == 2 and err.startswith("error: can't use the path: Read-only file system"), err


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_remedy(experiment):
    overrides = ("train_ref.optimizer={learning_rate: 1e30, max_grad_norm: null}", "train_ref.schedule.warmup_steps=0")
    plan = experiment.plans(*overrides, stage="train-ref")["train-ref"]
    with pytest.raises(RunFailed, match=r"is not finite at step \d") as fault:
        run_plan(plan, Machines(), Silent())
    assert "lower the learning rate" in fault.value.remedy and fault.value.exit_code == 1
    assert not plan.out.exists()


@pytest.mark.parametrize("when", [0, 4_000_000_000])
def test_a_clock_that_was_set_changes_nothing(experiment, another_experiment, when):
    overrides = ("transfer.strategy=uniform",)
    whole = another_experiment("whole").run(*overrides)
    for path in experiment.runs.rglob("*"):
        os.utime(path, (when, when), follow_symlinks=False)
    again = experiment.run(*overrides)
    assert artifacts.digest_file(again / "model" / "model.safetensors") == artifacts.digest_file(
        whole / "model" / "model.safetensors"
    )


def test_a_task_without_negatives_is_named_before_anything_is_trained(experiment, tmp_path):
    source = next(task.path for task in experiment.plans(stage="transfer")["transfer"].settings().tasks)
    with gzip.open(source, "rt") as file:
        rows = [{**json.loads(line), "negative_passages": []} for line in file]
    bare = tmp_path / "bare.jsonl"
    bare.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(TdroError, match="'shell' has no hard negatives") as fault:
        experiment.run(f"tasks.shell.path={bare}", stage="learn-weights")
    assert "mine them" in fault.value.remedy


def test_what_a_killed_process_left_is_gone_after_the_next_run(experiment):
    plan = experiment.plans("transfer.strategy=uniform", stage="transfer")["transfer"]
    folder = Path(plan.folder)
    for left in (folder / ".out.1-00000000.partial" / "half", folder / "checkpoints" / ".step-000002.partial" / "half"):
        left.parent.mkdir(parents=True)
        left.write_text("half")
    shared = (
        Path(plan.cache) / "tasks" / "index" / ".digest.json.4194305-00000000.partial"
    )  # no process has that number
    shared.write_text("half")
    kills.pass_an_hour(shared.parent)
    run_plan(plan, Machines(), Silent())
    assert not list(folder.rglob(".*.partial")) and not shared.exists()


# ---- what was changed behind our back ----


@pytest.mark.parametrize("how", ["flipped", "cut", "removed", "empty"])
@pytest.mark.parametrize("file", ["model/model.safetensors", "training.json", "manifest.json"])
def test_nothing_is_built_on_a_finished_output_that_was_changed(experiment, file, how):
    path = experiment.plans(stage="train-ref")["train-ref"].out / file
    data = path.read_bytes()
    if how == "removed" and file == "manifest.json":
        pytest.skip("that is no finished output: the stage is done again")
    path.unlink()  # another inode, as an editor makes one
    changed = {"flipped": data[:50] + bytes([data[50] ^ 1]) + data[51:], "cut": data[:-9], "empty": b""}
    if how != "removed":
        path.write_bytes(changed[how])
    with pytest.raises(RunFailed, match="the finished output of train-ref is damaged") as fault:
        experiment.run(stage="learn-weights")
    assert str(path) in fault.value.where and f"remove {path.parents[file.count('/')]}" in fault.value.remedy
    shutil.rmtree(path.parents[file.count("/")])
    assert artifacts.is_complete(experiment.run(stage="learn-weights"))


def test_weights_that_were_changed_by_hand_are_not_used(experiment):
    weights = experiment.run(stage="learn-weights") / "weights.json"
    told = json.loads(weights.read_text())
    name = next(iter(told["tasks"]))
    told["tasks"][name]["weight"] = 0.9
    weights.write_text(json.dumps(told))
    with pytest.raises(RunFailed, match="learn-weights is damaged"):
        experiment.run(stage="transfer")


@pytest.mark.parametrize("stage", ["train-ref", "learn-weights", "transfer", "finetune"])
def test_a_training_file_that_changes_after_planning_stops_the_stage(experiment, tmp_path, stage):
    source = next(task.path for task in experiment.plans(stage="transfer")["transfer"].settings().tasks)
    path = tmp_path / "changing.jsonl.gz"
    shutil.copyfile(source, path)
    overrides = (f"tasks.shell.path={path}", "transfer.strategy=uniform", "seed=8")
    plans = list(experiment.plans(*overrides, stage=stage).values())
    for plan in plans[:-1]:
        run_plan(plan, Machines(), Silent())
    with gzip.open(source, "rt") as file, gzip.open(path, "wt") as other:
        other.writelines(list(file)[1:])
    with pytest.raises(RunFailed, match="the training file of 'shell' has changed") as fault:
        run_plan(plans[-1], Machines(), Silent())
    assert str(path) in fault.value.where and not plans[-1].out.exists()
    assert artifacts.is_complete(experiment.run(*overrides, stage=stage))
