from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from tdro_cli import artifacts  # noqa: E402
from tdro_cli.builtin.false_negative_masks import Margin  # noqa: E402
from tdro_cli.data.batching import BatchPlan, batch_at  # noqa: E402
from tdro_cli.data.collation import TokenBatch, TrainingTask  # noqa: E402
from tdro_cli.errors import RunFailed  # noqa: E402
from tdro_cli.learn.training import contrast, gather_batch, read_metrics, task_means  # noqa: E402
from tdro_cli.run.distributed import World  # noqa: E402

ALONE = World(0, 1, torch.device("cpu"))
# three queries with 2, 1 and 2 passages; text 7 is the positive of rows 0 and 2's hard negative
BATCH = TokenBatch(
    queries=[[1], [2], [3]],
    passages=[[1]] * 5,
    task_B=np.array([0, 1, 0]),
    row_B=np.arange(3),
    first_B=np.array([0, 2, 3]),
    count_B=np.array([2, 1, 2]),
    query_id_B=np.array([100, 101, 102]),
    passage_id_M=np.array([7, 8, 9, 10, 7]),
    positive_ids_BP=np.array([[7, -1], [9, -1], [10, 8]]),
)


def tasks(*, in_batch: tuple[bool, bool] = (True, True)) -> list[TrainingTask]:
    return [TrainingTask(str(i), None, np.arange(3), "", False, flag) for i, flag in enumerate(in_batch)]


def test_the_row_of_each_passage_and_the_positive_of_each_row_follow_from_the_counts():
    shared = gather_batch(ALONE, BATCH)
    assert shared.first_B.tolist() == [0, 2, 3]
    assert shared.row_M.tolist() == [0, 0, 1, 2, 2]
    assert (shared.own_queries, shared.own_passages) == (slice(0, 3), slice(0, 5))


def test_known_positives_are_no_negatives_wherever_they_stand():
    mask_BM = gather_batch(ALONE, BATCH).mask(tasks(), cross_device=True)
    assert mask_BM.tolist() == [
        [False, True, True, True, False],  # text 7 is its positive, also as row 2's hard negative
        [True, True, False, True, True],
        [True, False, True, False, True],  # text 8 is its second positive, text 10 its first
    ]


def test_a_task_without_in_batch_negatives_meets_its_own_passages_only():
    mask_BM = gather_batch(ALONE, BATCH).mask(tasks(in_batch=(False, True)), cross_device=True)
    assert mask_BM.tolist() == [
        [False, True, False, False, False],
        [True, True, False, True, True],
        [False, False, False, False, True],
    ]


def test_passages_of_other_devices_can_be_left_out():
    shared = gather_batch(ALONE, BATCH)
    shared.rank_B, shared.rank_M = torch.tensor([0, 0, 1]), torch.tensor([0, 0, 0, 1, 1])
    assert shared.mask(tasks(), cross_device=False)[1].tolist() == [True, True, False, False, False]


def test_the_gradient_at_the_embeddings_is_that_of_the_mean_loss_with_task_factors():
    embedding_ND = torch.nn.functional.normalize(torch.randn(8, 4, generator=torch.Generator().manual_seed(2)), dim=1)
    factor_G = torch.tensor([2.0, 0.5])
    found = contrast(ALONE, embedding_ND.clone(), BATCH, tasks(), factor_G, temperature=0.1, cross_device=True)
    free_ND = embedding_ND.double().requires_grad_()
    score_BM = free_ND[:3] @ free_ND[3:].T / 0.1
    refused = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]]).bool()
    loss_B = torch.nn.functional.cross_entropy(
        score_BM.masked_fill(refused, -torch.inf), torch.tensor([0, 2, 3]), reduction="none"
    )
    (loss_B * factor_G[torch.tensor([0, 1, 0])]).mean().backward()
    torch.testing.assert_close(found.loss_B.double(), loss_B.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.gradient_ND.double(), free_ND.grad, rtol=1e-4, atol=1e-6)


# the positives are at 0.6, 0.3 and 0.5
COSINES = torch.tensor([[0.6, 0.9, 1.0, 0.0, 0.59], [0.1, 0.2, 0.3, 0.4, 0.2], [0.6, 0.6, 0.6, 0.5, 0.7]])


def scored(judge) -> torch.Tensor:
    """What a judge masks of BATCH where the cosines are COSINES: rows of an orthonormal basis with a rest."""
    passage_MD = torch.eye(5, 8)
    query_BD = torch.cat([COSINES, torch.zeros(3, 3)], 1)
    query_BD[:, 5:] = torch.diag((4 - COSINES.square().sum(1)).sqrt())  # length 2: a cosine is half of COSINES
    return gather_batch(ALONE, BATCH).doubtful(judge, query_BD, passage_MD)


def test_a_margin_masks_what_other_rows_brought_and_only_on_demand_a_querys_own():
    assert scored(Margin(0.0, "absolute")).tolist() == [
        [False, False, True, False, False],
        [False, False, False, True, False],
        [True, True, True, False, False],
    ]
    assert scored(Margin(0.0, "absolute", among="all"))[0].tolist() == [False, True, True, False, False]
    assert scored(Margin(0.01, "absolute"))[0].tolist() == [False, False, True, False, True]
    assert scored(Margin(0.1, "relative"))[0].tolist() == [False, False, True, False, True]


def test_the_loss_does_without_the_masked_pairs_and_counts_them():
    embedding_ND = torch.nn.functional.normalize(torch.randn(8, 4, generator=torch.Generator().manual_seed(2)), dim=1)
    options = {"temperature": 0.1, "cross_device": True}
    plain = contrast(ALONE, embedding_ND.clone(), BATCH, tasks(), torch.ones(2), **options)
    guide_ND = torch.cat([COSINES, torch.eye(5)])  # a guide of 5 dimensions, not the model's 4
    judge = Margin(0.0, "absolute")
    masked = contrast(
        ALONE, embedding_ND.clone(), BATCH, tasks(), torch.ones(2), judge=judge, guide_ND=guide_ND, **options
    )
    own = contrast(ALONE, embedding_ND.clone(), BATCH, tasks(), torch.ones(2), judge=judge, **options)
    assert plain.masked == 0 and masked.masked == 4 and own.masked != 4
    score_BM = embedding_ND[:3] @ embedding_ND[3:].T / 0.1
    refused = torch.tensor([[0, 0, 1, 0, 1], [0, 0, 0, 1, 0], [1, 1, 1, 0, 0]]).bool()
    expected_B = torch.nn.functional.cross_entropy(
        score_BM.masked_fill(refused, -torch.inf), torch.tensor([0, 2, 3]), reduction="none"
    )
    torch.testing.assert_close(masked.loss_B, expected_B, rtol=1e-5, atol=1e-6)


def test_task_means_of_an_absent_task_are_zero():
    mean_G, count_G = task_means(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([2, 0, 2]), 3)
    assert mean_G.tolist() == [3.0, 0.0, 3.0] and count_G.tolist() == [1, 0, 2]


def test_metrics_end_before_a_line_cut_short(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"st')
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1]


# ---- runs ----

UNIFORM = "transfer.strategy=uniform"


def weights(out) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(out / "model" / "model.safetensors")


def largest_difference(one, two) -> float:
    first, second = weights(one), weights(two)
    return max(float(np.abs(first[name] - second[name]).max()) for name in first)


def test_the_reference_learns_and_says_what_it_saw(experiment):
    steps = "train_ref.steps=40"
    out = experiment.run(steps, stage="train-ref")
    lines = read_metrics(out / "metrics.jsonl")
    assert np.mean([line["loss"] for line in lines[-8:]]) < np.mean([line["loss"] for line in lines[:8]]) - 0.1
    done = artifacts.read_json(out / "training.json")
    assert done["steps"] == 40 and sum(done["queries_seen"].values()) == 320
    assert set(done["queries_seen"].values()) == {80}  # equal shares
    assert lines[0]["learning_rate"] == 0 and max(line["learning_rate"] for line in lines) == pytest.approx(3e-3)
    assert {"tokens_per_second", "padding_share", "gradient_norm", "peak_memory", "masked_pairs"} <= lines[0].keys()
    assert lines[-1]["seconds_left"] == 0 and lines[5]["seconds_left"] > 0
    assert 10**8 < lines[0]["peak_memory"] <= lines[-1]["peak_memory"]  # Python and torch alone take so much
    assert all(line["gradient_norm"] > 0 and 0 <= line["padding_share"] < 0.5 for line in lines)


def test_gradient_caching_trains_the_same_model_as_one_big_batch(another_experiment):
    small = ("encoder.activation_tokens=1", "encoder.micro_batch_tokens=100")
    whole = another_experiment("whole").run(UNIFORM)
    cached = another_experiment("cached").run(UNIFORM, *small)
    assert largest_difference(whole, cached) < 1e-4  # Adam's first steps enlarge rounding
    untrained = another_experiment("untrained").run(UNIFORM, "finetune.optimizer.learning_rate=1e-12")
    assert largest_difference(whole, untrained) > 3e-3


def test_finetune_takes_the_shares_of_the_sampling_plan(experiment):
    out = experiment.run("transfer.strategy={name: top_k, options: {k: 2}}", "finetune.steps=10")
    sampling = artifacts.read_json(next(experiment.runs.glob("tiny/transfer-*/out/sampling.json")))
    seen = artifacts.read_json(out / "training.json")["queries_seen"]
    assert seen.keys() == sampling["tasks"].keys() and len(seen) == 2
    assert list(seen.values()) == [40, 40]


def test_loss_weights_scale_the_loss_of_their_tasks(experiment):
    learned = experiment.runs.parent / "weights.json"
    weight = {"shell": 0.4, "numbers": 0.3, "network": 0.2, "words": 0.1}
    names = {name: {"weight": w, "mean": w, "ema": w, "size": 9, "queries_seen": 9} for name, w in weight.items()}
    artifacts.write_json(learned, {"schema": 1, "steps": 1, "tasks": names})
    first = {}
    for strategy in ("uniform", "loss_reweight"):
        out = experiment.run(f"transfer.strategy={strategy}", f"transfer.weights_from={learned}", "finetune.steps=1")
        first[strategy] = read_metrics(out / "metrics.jsonl")[0]
    (task,) = first["uniform"]["tasks"]
    assert first["loss_reweight"]["tasks"] == first["uniform"]["tasks"]  # the loss told is that without the factor
    factor = 4 * weight[task]  # of mean 1
    assert factor != 1
    ratio = first["loss_reweight"]["gradient_norm"] / first["uniform"]["gradient_norm"]
    assert ratio == pytest.approx(factor, rel=1e-5)


def test_rows_held_out_are_never_trained_on(experiment):
    plan = experiment.plans(stage="train-ref")["train-ref"]
    from tdro_cli.learn.training import training_tasks

    kept, held = training_tasks(plan, "held_in"), training_tasks(plan, "held_out")
    for one, other in zip(kept, held, strict=True):
        assert len(one.rows) + len(other.rows) == len(one.store)
        assert not set(one.rows) & set(other.rows)


def test_a_loss_that_is_not_finite_ends_the_run_and_publishes_nothing(experiment):
    broken = "finetune.optimizer={learning_rate: 1.0e38, weight_decay: 0.0}"
    overrides = (UNIFORM, broken, "finetune.schedule.warmup_steps=0")
    with pytest.raises(RunFailed, match=r"(loss of \w+|gradient of the model) is not finite at step [12]") as failed:
        experiment.run(*overrides)
    assert failed.value.exit_code == 1
    assert not experiment.plans(*overrides)["finetune"].out.exists()


def test_numbers_that_are_not_finite_are_null_in_the_log(experiment):
    out = experiment.run(UNIFORM)
    for line in (out / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in metrics.jsonl"))


def test_a_mixed_batch_has_several_tasks(experiment):
    out = experiment.run(UNIFORM, "finetune.batch.composition=mixed")
    assert {len(line["tasks"]) for line in read_metrics(out / "metrics.jsonl")} == {4}


def test_the_parts_of_the_ranks_make_up_the_batch():
    plan = BatchPlan(seed=1, queries=7, sizes=(5, 9), probabilities=(0.5, 0.5), composition="mixed")
    whole = batch_at(plan, 3)
    for world in (1, 2, 3, 7):
        parts = [whole.row_B[whole.shard(rank, world)] for rank in range(world)]
        assert np.concatenate(parts).tolist() == whole.row_B.tolist()
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_guide_masks_in_both_trainers_and_a_killed_run_would_mask_the_same(experiment, another_experiment):
    from tdro_cli.run.launch import Machines, run_plan
    from tdro_cli.run.progress import Silent

    reference = experiment.runs / "tiny" / "train-ref"
    mask = f"{{name: guide, options: {{source: {reference}, margin: 0.1}}}}"
    out = experiment.run(UNIFORM, f"finetune.false_negative_mask={mask}")
    lines = read_metrics(out / "metrics.jsonl")
    assert any(line["masked_pairs"] > 0 for line in lines)
    assert not list(out.parent.glob("guide-*"))
    moved = another_experiment("moved")
    elsewhere = f"{{name: guide, options: {{source: {moved.runs / 'tiny' / 'train-ref'}, margin: 0.1}}}}"
    plan = moved.plans(UNIFORM, f"finetune.false_negative_mask={elsewhere}")["finetune"]
    assert plan.out.parent.name == out.parent.name  # a guide is its content, not its place
    first = moved.plans(f"train_ref.false_negative_mask={elsewhere}", stage="train-ref")
    for one in first.values():
        run_plan(one, Machines(), Silent())
    assert "masked_pairs" in read_metrics(first["train-ref"].out / "metrics.jsonl")[0]


def test_a_margin_changes_what_is_learned(experiment):
    lines = {}
    for name, mask in (("known", "known"), ("margin", "{name: margin, options: {margin: 0.2, scale: absolute}}")):
        out = experiment.run(UNIFORM, f"finetune.false_negative_mask={mask}")
        lines[name] = read_metrics(out / "metrics.jsonl")
    assert all(line["masked_pairs"] == 0 for line in lines["known"])
    assert any(line["masked_pairs"] > 0 for line in lines["margin"])
    assert lines["margin"][-1]["loss"] < lines["known"][-1]["loss"]


@pytest.mark.parametrize("lora", ["null", "{r: 2, dropout: 0.0}"])
def test_bf16_weights_under_zero_learn_as_float32_ones_and_are_saved_whole(lora, experiment):
    from tdro_cli.model.embedding import load_embedder

    losses, vectors = [], []
    for deepspeed in ("{}", "{zero_stage: 2, bf16: {enabled: true}}"):
        out = experiment.run(UNIFORM, f"deepspeed={deepspeed}", f"lora={lora}", "finetune.steps=8")
        losses.append([line["loss"] for line in read_metrics(out / "metrics.jsonl")])
        vectors.append(load_embedder(out / "model", device="cpu").encode_queries(["how to copy a file", "a mean"]))
    assert losses[1] == pytest.approx(losses[0], rel=0.1, abs=0.1)
    assert (vectors[0] * vectors[1]).sum(1).min() > 0.99


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_an_offloaded_optimizer_trains_the_same_model(zero_stage, another_experiment):
    offload = "{offload_optimizer: {device: cpu}}"
    plain = another_experiment("plain").run(UNIFORM)
    other = another_experiment("offloaded").run(
        UNIFORM, f"deepspeed={{zero_stage: {zero_stage}, zero_optimization: {offload}}}"
    )
    assert largest_difference(plain, other) < 1e-4
