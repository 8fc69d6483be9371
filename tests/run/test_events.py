from __future__ import annotations

import time
from pathlib import Path

import pytest

pytest.importorskip("tensorboard")
from tdro_cli.run.events import PATTERN, EventLog


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """{tag: [(step, value)]} as TensorBoard reads it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    return {tag: [(e.step, round(e.value, 4)) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def metrics(step: int, loss: float) -> dict:
    tasks = {"a": {"count": 2, "weight": loss / 4}, "b": {"count": 1, "weight": None}}
    return {"step": step, "loss": loss, "top_task": "a", "gradient_norm": float("nan"), "tasks": tasks}


def test_each_number_of_a_step_has_its_tag_and_what_is_none_is_left_out(tmp_path):
    log = EventLog(tmp_path)
    for step in range(3):
        log.add(metrics(step, 4.0 - step))
    assert read(tmp_path) == {
        "loss": [(0, 4.0), (1, 3.0), (2, 2.0)],
        "count/a": [(0, 2.0), (1, 2.0), (2, 2.0)],
        "weight/a": [(0, 1.0), (1, 0.75), (2, 0.5)],
        "count/b": [(0, 1.0), (1, 1.0), (2, 1.0)],
    }


def test_a_resumed_run_has_every_step_once(tmp_path):
    EventLog(tmp_path).add(metrics(0, 4.0))
    log = EventLog(tmp_path, [metrics(0, 4.0), metrics(1, 3.0)])
    log.add(metrics(2, 1.0))
    assert read(tmp_path)["loss"] == [(0, 4.0), (1, 3.0), (2, 1.0)]
    assert len(list(tmp_path.glob(PATTERN))) == 1


def test_names_of_files_do_not_name_the_machine(tmp_path):
    import socket

    EventLog(tmp_path)
    assert [path for path in tmp_path.iterdir() if socket.gethostname() in path.name] == []


def test_a_step_of_many_tasks_is_written_in_milliseconds(tmp_path):
    columns = ("count", "proxy_loss", "reference_loss", "measurement", "weight", "weight_mean", "weight_ema")
    step = {"step": 0, "tasks": {f"task {i}": dict.fromkeys(columns, 0.5) for i in range(25)}}
    log = EventLog(tmp_path)
    began = time.process_time()
    for number in range(20):
        log.add({**step, "step": number})
    assert (time.process_time() - began) / 20 < 0.02


@pytest.mark.parametrize("stage", ["train-ref", "learn-weights", "finetune"])
def test_the_training_stages_leave_event_files_with_every_step(stage, experiment):
    pytest.importorskip("deepspeed")
    out = experiment.run("transfer.strategy=uniform", "train_ref.optimizer.learning_rate=2e-3", stage=stage)
    assert [step for step, _ in read(out.parent / "log")["loss"]] == list(range(6))
