from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from tdro_cli import artifacts  # noqa: E402
from tdro_cli.data.collation import TokenBatch  # noqa: E402
from tdro_cli.errors import RunFailed, TdroError  # noqa: E402
from tdro_cli.learn import weight_learning  # noqa: E402
from tdro_cli.learn.contrastive import per_query_infonce  # noqa: E402
from tdro_cli.learn.training import read_metrics  # noqa: E402
from tdro_cli.learn.weight_learning import LossLog, micro_batches, part_of, query_losses, task_losses  # noqa: E402

STEPS = "learn_weights.steps=8"


def learned(folder: Path) -> dict[str, float]:
    return {name: task["weight"] for name, task in artifacts.read_json(folder / "weights.json")["tasks"].items()}


def token_batch(queries: list[list[int]], passages: list[list[list[int]]]) -> TokenBatch:
    count_B = np.array([len(own) for own in passages])
    nothing = np.zeros(len(queries), dtype=np.int64)
    return TokenBatch(
        queries=queries,
        passages=[tokens for own in passages for tokens in own],
        task_B=nothing,
        row_B=nothing,
        first_B=np.cumsum(count_B) - count_B,
        count_B=count_B,
        query_id_B=nothing,
        passage_id_M=np.arange(count_B.sum()),
        positive_ids_BP=nothing[:, None],
    )


# ---- the parts ----


def test_micro_batches_hold_every_query_once_within_the_budget():
    # costs: 2+3+3 = 8, 1+2 = 3, 4+4 = 8
    batch = token_batch([[1] * 2, [1], [1] * 4], [[[1] * 3, [1] * 3], [[1] * 2], [[1] * 4]])
    assert [part.tolist() for part in micro_batches(batch, 11)] == [[0], [2, 1]]
    assert [part.tolist() for part in micro_batches(batch, 100)] == [[0, 2, 1]]
    assert [part.tolist() for part in micro_batches(batch, 1)] == [[0], [2], [1]]


def test_a_query_meets_its_own_passages_only_however_many_it_has():
    table = torch.nn.functional.normalize(torch.randn(50, 6, generator=torch.Generator().manual_seed(1)), dim=1)

    def first_token(ids_NT, mask_NT):
        return table[ids_NT[:, 0]]

    batch = token_batch([[1], [2, 0]], [[[3], [4, 0, 0], [5]], [[6]]])
    found = query_losses(
        first_token, batch, np.array([1, 0]), pad_id=0, temperature=0.1, tokens_at_once=2, device=torch.device("cpu")
    )
    alone = per_query_infonce(table[1:2], table[torch.tensor([[3, 4, 5]])], 0.1)
    torch.testing.assert_close(found.loss_B, torch.stack([torch.tensor(0.0), alone[0]]))
    assert found.tokens == 9


def test_a_passage_that_several_queries_share_is_computed_once_and_carries_all_their_gradients():
    class FirstToken(torch.nn.Embedding):
        draws_at_random = False

        def forward(self, ids_NT, mask_NT):
            return torch.nn.functional.normalize(super().forward(ids_NT[:, 0]), dim=-1)

    batch = token_batch([[1], [2, 0], [3]], [[[4], [5, 0]], [[5, 0], [4]], [[4], [4]]])
    at_cpu = {"pad_id": 0, "temperature": 0.1, "tokens_at_once": 4, "device": torch.device("cpu")}
    torch.manual_seed(2)
    model = FirstToken(6, 4)
    together = query_losses(model, batch, np.arange(3), **at_cpu)
    assert together.tokens == 1 + 2 + 1 + 1 + 2
    together.loss_B.sum().backward()
    gradient, model.weight.grad = model.weight.grad, None
    alone = torch.cat([query_losses(model, batch, np.array([row]), **at_cpu).loss_B for row in range(3)])
    alone.sum().backward()
    torch.testing.assert_close(together.loss_B, alone)
    torch.testing.assert_close(gradient, model.weight.grad)


def test_parts_are_equal_and_in_the_order_of_the_batch():
    assert part_of(10, 1) is None
    assert part_of(8, 4).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert np.bincount(part_of(10, 4)).tolist() == [3, 2, 3, 2]


def test_a_step_written_again_takes_its_own_place(tmp_path):
    log = LossLog(tmp_path / "losses.bin", steps=3, queries=2)
    tasks, rows = np.array([0, 1]), np.array([5, 6])
    log.write(2, tasks, rows, torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    log.write(0, tasks, rows, torch.tensor([7.0, 8.0]), None)
    log.write(2, tasks, rows, torch.tensor([0.5, 2.0]), torch.tensor([3.0, 4.0]))
    records = LossLog(tmp_path / "losses.bin", steps=3, queries=2).read()
    assert records["proxy"].tolist() == [[7.0, 8.0], [0.0, 0.0], [0.5, 2.0]]
    assert task_losses(records[0], 2, 1).reference is None
    again = task_losses(records[2], 2, 1)
    assert again.mean_by_task(again.reference).tolist() == [3.0, 4.0]


# ---- the run ----


def test_weights_are_positive_sum_to_one_and_every_step_is_logged_once(experiment):
    out = experiment.run(STEPS, stage="learn-weights")
    weights = artifacts.read_json(out / "weights.json")
    for column in ("weight", "mean", "ema"):
        values = [task[column] for task in weights["tasks"].values()]
        assert min(values) > 0 and sum(values) == pytest.approx(1)
    assert [line["step"] for line in read_metrics(out / "metrics.jsonl")] == list(range(8))
    assert {name: task["queries_seen"] for name, task in weights["tasks"].items()} == {
        name: 24 for name in ("shell", "numbers", "network", "words")
    }


def test_the_weights_are_those_that_the_logged_losses_give(experiment):
    out = experiment.run(STEPS, "learn_weights.loss_measurement=excess", stage="learn-weights")
    import pyarrow.parquet as pq

    table = pq.read_table(out / "losses.parquet").to_pydict()
    names = list(learned(out))
    log_weights = np.log(np.full(4, 0.25))
    task = np.array([names.index(name) for name in table["task"]]).reshape(8, 12)
    excess = np.maximum(np.array(table["proxy"]) - np.array(table["reference"]), 0).reshape(8, 12)
    for step in range(8):
        measured = np.array([excess[step][task[step] == g].mean() for g in range(4)])
        norm = np.linalg.norm(measured)
        log_weights = log_weights + 0.1 * measured * min(1.0, 1.0 / (norm + 1e-6))
    expected = np.exp(log_weights) / np.exp(log_weights).sum()
    np.testing.assert_allclose(list(learned(out).values()), expected, rtol=1e-5)


SPLITS = ("encoder.activation_tokens=200", "encoder.micro_batch_tokens=60")
DESIGNS = {
    "previous": (),
    "current": ("learn_weights.proxy_weights=current",),
    "absent tasks": ("learn_weights.batch.queries=6", "learn_weights.batch.draws=independent"),
    "odm": ("learn_weights.weight_updater=odm", "learn_weights.loss_measurement=absolute"),
    "official in parts": ("learn_weights.loss_measurement=relative_official", "learn_weights.batch.parts=3"),
    "lora": ("lora={r: 2, dropout: 0.0}",),
}


@pytest.mark.parametrize("design", DESIGNS)
def test_any_split_into_micro_batches_gives_the_same_weights(design, another_experiment):
    whole = another_experiment("whole").run(STEPS, *DESIGNS[design], stage="learn-weights")
    split = another_experiment("split").run(STEPS, *DESIGNS[design], *SPLITS, stage="learn-weights")
    assert list(learned(split).values()) == pytest.approx(list(learned(whole).values()), abs=1e-6)
    assert len(set(learned(whole).values())) > 1


def test_batches_of_other_processes_give_the_same_weights_and_losses(another_experiment, monkeypatch):
    by_thread = another_experiment("thread").run(STEPS, stage="learn-weights")
    monkeypatch.setenv("TDRO_DATA_WORKERS", "2")
    by_processes = another_experiment("processes").run(STEPS, stage="learn-weights")
    assert learned(by_processes) == learned(by_thread)
    thread, processes = (read_metrics(out / "metrics.jsonl") for out in (by_thread, by_processes))
    assert [line["loss"] for line in processes] == [line["loss"] for line in thread]
    assert all(0 <= line["waiting_share"] <= 1 for line in thread + processes)
    assert not multiprocessing.active_children()


def test_previous_and_current_weights_train_the_proxy_differently(another_experiment):
    large = "learn_weights.weight_updater={name: exponentiated_gradient, options: {learning_rate: 1.0}}"
    runs = [
        another_experiment(way).run(STEPS, large, f"learn_weights.proxy_weights={way}", stage="learn-weights")
        for way in ("previous", "current")
    ]
    losses = [[line["loss"] for line in read_metrics(run / "metrics.jsonl")] for run in runs]
    # step 0 has the warm-up's learning rate of 0, or the same model: the ways part when the proxy has moved
    assert losses[0][0] == losses[1][0]
    assert losses[0][-1] != losses[1][-1]


def test_a_task_absent_from_a_batch_is_measured_as_it_last_was(experiment):
    out = experiment.run(STEPS, *DESIGNS["absent tasks"], stage="learn-weights")
    lines = read_metrics(out / "metrics.jsonl")
    absent = [(i, name) for i, line in enumerate(lines) for name, t in line["tasks"].items() if t["count"] == 0]
    assert len(absent) >= 4
    for i, name in absent:
        if any(line["tasks"][name]["count"] for line in lines[:i]):
            assert lines[i]["tasks"][name]["measurement"] == lines[i - 1]["tasks"][name]["measurement"]


def test_a_bandit_draws_what_its_weights_say_and_counts_what_it_drew(experiment):
    out = experiment.run(STEPS, *DESIGNS["odm"], stage="learn-weights")
    counts = [[t["count"] for t in line["tasks"].values()] for line in read_metrics(out / "metrics.jsonl")]
    assert [sum(row) for row in counts] == [12] * 8
    assert len({tuple(row) for row in counts}) > 1
    seen = [task["queries_seen"] for task in artifacts.read_json(out / "weights.json")["tasks"].values()]
    assert seen == np.sum(counts, axis=0).tolist()


# ---- ending in noise ----

NOISE = ("learn_weights.steps=40", "learn_weights.stop={window_steps: 10, drift_over_noise: 9.0}")


def test_a_run_ends_where_only_noise_moves_the_weights_and_says_so(experiment):
    import pyarrow.parquet as pq

    out = experiment.run(*NOISE, stage="learn-weights")
    metrics, summary = read_metrics(out / "metrics.jsonl"), artifacts.read_json(out / "summary.json")
    drift = [line["drift_over_noise"] for line in metrics]
    steps = len(metrics)
    assert 10 <= steps < 40 and drift[:9] == [None] * 9
    assert min(drift[9:-1], default=10) >= 9.0 > drift[-1]
    assert artifacts.read_json(out / "weights.json")["steps"] == steps
    assert summary["stopped"].startswith(
        f"ended after {steps} of 40 steps: in the last 10 the weights went {drift[-1]:.2f}"
    )
    assert pq.read_table(out / "losses.parquet").num_rows == steps * 12
    seen = [task["queries_seen"] for task in artifacts.read_json(out / "weights.json")["tasks"].values()]
    assert sum(seen) == steps * 12
    # the same losses under the run's own measurement: a schedule of 40 steps, of which these were done
    own = artifacts.read_json(out / "summary.json")["counterfactual"]["relative, floor 0.2"]
    assert own == pytest.approx(learned(out), abs=1e-6)


def test_a_run_without_the_option_does_all_its_steps(experiment):
    out = experiment.run(STEPS, stage="learn-weights")
    assert artifacts.read_json(out / "summary.json")["stopped"] is None
    assert "drift_over_noise" not in read_metrics(out / "metrics.jsonl")[-1]


# ---- the reference ----


def test_a_measurement_without_reference_runs_none(experiment):
    out = experiment.run(STEPS, "learn_weights.loss_measurement=absolute", stage="learn-weights")
    assert artifacts.read_json(out / "summary.json")["reference"]["forwards"] == 0
    assert artifacts.read_json(out / "summary.json")["reference"]["hits"] == 0
    assert not list(experiment.runs.glob(".cache/reference*"))
    line = read_metrics(out / "metrics.jsonl")[-1]
    assert all(task["standard_error"] > 0 and "reference_loss" not in task for task in line["tasks"].values())


def test_the_second_measurement_finds_every_reference_loss_in_the_cache(experiment):
    first = experiment.run(STEPS, stage="learn-weights")
    forwards = artifacts.read_json(first / "summary.json")["reference"]["forwards"]
    assert forwards > 0
    assert sum(line["reference_forwards"] for line in read_metrics(first / "metrics.jsonl")) == forwards
    second = experiment.run(STEPS, "learn_weights.loss_measurement=excess", stage="learn-weights")
    assert artifacts.read_json(second / "summary.json")["reference"] == {
        "forwards": 0,
        "hits": 96,
        "seconds": pytest.approx(0, abs=120),
    }


@pytest.mark.parametrize("harm", ["deleted", "damaged"])
def test_a_cache_file_deleted_or_damaged_changes_no_weight(harm, another_experiment):
    expected = another_experiment("sound").run(STEPS, stage="learn-weights")
    harmed = another_experiment("harmed")
    harmed.run(STEPS, "learn_weights.loss_measurement=excess", stage="learn-weights")
    (file,) = harmed.runs.glob(".cache/reference*.sqlite")
    if harm == "deleted":
        file.unlink()
    else:
        file.write_bytes(b"\x00" * 10_000)
    found = harmed.run(STEPS, stage="learn-weights")
    assert (found / "weights.json").read_bytes() == (expected / "weights.json").read_bytes()
    assert artifacts.read_json(found / "summary.json")["reference"]["forwards"] > 0


# ---- faults ----


def test_a_loss_that_is_not_finite_ends_the_run_naming_task_and_step(experiment):
    # a learning rate that throws the weights out of float32's range in the second step
    section = "learn_weights.optimizer={learning_rate: 1.0e38, weight_decay: 0.0}"
    overrides = (STEPS, section, "learn_weights.schedule.warmup_steps=0")
    with pytest.raises(RunFailed, match=r"not finite at step [12]") as failed:
        experiment.run(*overrides, stage="learn-weights")
    assert failed.value.exit_code == 1
    assert any(name in failed.value.message for name in ("shell", "the model"))
    folder = Path(
        experiment.plans(STEPS, *overrides, "learn_weights.optimizer.weight_decay=0.0")["learn-weights"].folder
    )
    assert not (folder / "out").exists()


def test_losses_of_the_reference_that_are_not_finite_are_named(tmp_path):
    class Run:
        plan = type("Plan", (), {"folder": str(tmp_path)})
        require_finite = weight_learning.Run.require_finite

    from tdro_cli.protocols import TaskLosses

    losses = TaskLosses(torch.ones(3), torch.tensor([1.0, torch.inf, 1.0]), torch.tensor([0, 1, 1]), 2)
    with pytest.raises(RunFailed, match="the reference's loss of numbers is not finite at step 4"):
        weight_learning._require_finite(Run(), 4, losses, ["shell", "numbers"])


def test_a_batch_smaller_than_the_number_of_processes_is_refused():
    from tdro_cli.learn.training import require_queries
    from tdro_cli.run.distributed import World

    with pytest.raises(TdroError, match="3 queries can't be divided among 4 processes"):
        require_queries(World(0, 4, torch.device("cpu")), 3)


def test_metrics_hold_no_number_that_json_has_not(experiment):
    out = experiment.run(STEPS, "learn_weights.batch.queries=5", stage="learn-weights")
    for line in (out / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in metrics.jsonl"))
