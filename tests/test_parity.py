"""One process and several compute the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from tdro_cli import artifacts  # noqa: E402
from tdro_cli.learn.training import read_metrics  # noqa: E402


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def weights(out: Path) -> list[float]:
    return [task["weight"] for task in artifacts.read_json(out / "weights.json")["tasks"].values()]


def largest_difference(one: Path, two: Path) -> float:
    from safetensors.numpy import load_file

    first, second = (load_file(out / "model" / "model.safetensors") for out in (one, two))
    assert first.keys() == second.keys()
    return max(float(np.abs(first[name] - second[name]).max()) for name in first)


def test_two_processes_meet_the_same_batches_and_learn_the_same_weights(another_experiment):
    import pyarrow.parquet as pq

    steps = "learn_weights.steps=20"
    one = another_experiment("one").run(steps, stage="learn-weights")
    two = another_experiment("two").run(steps, stage="learn-weights", num_gpus=2)
    drawn = [pq.read_table(out / "losses.parquet", columns=["step", "task", "row"]) for out in (one, two)]
    assert drawn[0] == drawn[1]
    assert weights(two) == pytest.approx(weights(one), abs=1e-5)
    assert max(weights(one)) - min(weights(one)) > 0.01
    assert [line["step"] for line in read_metrics(two / "metrics.jsonl")] == list(range(20))
    forwards = [artifacts.read_json(out / "summary.json")["reference"] for out in (one, two)]
    assert forwards[0]["forwards"] + forwards[0]["hits"] >= 240
    assert forwards[1]["forwards"] + forwards[1]["hits"] >= 240


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_two_processes_learn_the_weights_of_one_with_zero(zero_stage, another_experiment):
    """In micro-batches so small that one rank has more of them than the other."""
    options = ("learn_weights.steps=8", "encoder={micro_batch_tokens: 96, activation_tokens: 480}")
    one = another_experiment("one").run(*options, stage="learn-weights")
    # small parameters would stay whole
    scattered = "zero_optimization: {stage3_param_persistence_threshold: 0}"
    sharing = (*options, f"deepspeed={{zero_stage: {zero_stage}, {scattered}}}")
    two = another_experiment("two").run(*sharing, stage="learn-weights", num_gpus=2)
    assert weights(two) == pytest.approx(weights(one), abs=1e-5)
    losses = [[line["loss"] for line in read_metrics(out / "metrics.jsonl")] for out in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["train-ref", "finetune"])
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_two_processes_train_the_model_of_one(stage, zero_stage, another_experiment):
    section = stage.replace("-", "_")
    overrides = ("transfer.strategy=uniform", f"{section}.steps=20", f"deepspeed={{zero_stage: {zero_stage}}}")
    one = another_experiment("one").run(*overrides, stage=stage)
    two = another_experiment("two").run(*overrides, stage=stage, num_gpus=2)
    assert largest_difference(one, two) < 1e-4


@pytest.mark.slow
def test_two_processes_with_zero_3_and_lora_save_adapters_that_were_trained(experiment):
    from safetensors.numpy import load_file

    lora = "lora={r: 2, dropout: 0.0}"
    out = experiment.run("transfer.strategy=uniform", lora, "deepspeed={zero_stage: 3}", num_gpus=2)
    adapter = load_file(out / "model" / "adapter" / "adapter_model.safetensors")
    assert adapter and all(np.abs(value).max() > 0 for value in adapter.values())
