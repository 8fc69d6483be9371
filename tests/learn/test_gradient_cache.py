"""Gradient caching gives the gradient of one big batch: see gradient_cases.py for the batch and the plain reference."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parent))
import gradient_cases as cases  # noqa: E402
from gradient_cases import Case  # noqa: E402

FURTHER = [family for family in cases.DECODERS + cases.ENCODERS if family not in ("qwen2", "bert")]
MATRIX = {
    "qwen2": Case(),
    "qwen2 at 0.002": Case(temperature=0.002),
    "qwen2, graphs of all chunks kept": Case(budget=cases.CHUNKS_WITH_GRAPHS),
    "qwen2, graphs of some chunks kept": Case(budget=cases.SOME_WITH_GRAPHS),
    "qwen2, graphs of some chunks kept, dropout": Case(budget=cases.SOME_WITH_GRAPHS, dropout=0.3),
    "qwen2, one chunk": Case(temperature=0.002, budget=cases.ONE_CHUNK),
    "qwen2, dropout": Case(dropout=0.3),
    "qwen2, lora with dropout": Case(lora=True, dropout=0.3),
    "qwen2, lora, dropout, checkpointing": Case(lora=True, dropout=0.3, checkpointing=True, temperature=0.002),
    "qwen2, masked by a margin": Case(margin=cases.MARGIN),
    "qwen2, masked by a margin, dropout, lora": Case(margin=cases.MARGIN, dropout=0.2, lora=True),
    "bert": Case("bert"),
    "bert at 0.002": Case("bert", temperature=0.002),
    "bert, lora": Case("bert", lora=True),
    "bert, dropout, checkpointing": Case("bert", dropout=0.3, checkpointing=True),
    "qwen2, one query": Case(passages=(4,)),
    "qwen2, no hard negatives": Case(passages=(1,) * 6, temperature=0.01),
    "qwen2, own passages only": Case(in_batch=False),
    "bert, own passages only, lora": Case("bert", in_batch=False, lora=True),
    **{
        f"{family}, at {temperature}": Case(family, temperature=temperature, budget=cases.SOME_WITH_GRAPHS)
        for family, temperature in zip(FURTHER, (0.002, 0.01, 0.02, 0.05, 0.1) * 2, strict=False)
    },
    **{
        f"{family}, lora, dropout, checkpointing": Case(family, lora=True, dropout=0.2, checkpointing=True)
        for family in FURTHER
    },
}


@pytest.fixture(scope="module")
def alone():
    from tdro_cli.run.distributed import join

    return join()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", MATRIX)
def test_cached_gradient_is_that_of_one_big_batch(name, alone):
    errors = cases.errors_of(MATRIX[name], alone)
    assert errors["gradient"] < 1e-5, errors
    assert errors["loss"] < 1e-5, errors
    assert errors["norm"] < 1e-5, errors


@pytest.mark.parametrize("family", ["qwen2", "bert"])
def test_cached_gradient_in_bfloat16_differs_by_rounding_only(family, alone):
    errors = cases.errors_of(Case(family, autocast="bfloat16"), alone)
    assert errors["gradient"] < 0.02, errors


def test_chunks_are_many_where_they_should_be():
    from tdro_cli.model.packing import token_budget_batches

    part = cases.part_of_rank(0, 1)
    lengths = [len(tokens) for tokens in part.queries + part.passages]
    assert len(token_budget_batches(lengths, cases.SMALL_CHUNKS.micro_batch_tokens)) >= 6


def test_as_many_chunks_keep_their_graphs_as_fit_and_the_others_are_computed_again(alone):
    from tdro_cli.learn.gradient_cache import backward, forward
    from tdro_cli.recipe import Optimizer
    from tdro_cli.run.engine import Engine

    encoder = cases.build_encoder(Case())
    engine = Engine(encoder, Optimizer(), {}, alone)
    engine.train()
    passes = []
    encoder.register_forward_pre_hook(lambda module, args: passes.append(args[0].numel()))
    passed = forward(engine, cases.part_of_rank(0, 1).passages, pad_id=cases.PAD, budget=cases.SOME_WITH_GRAPHS)
    assert [part.requires_grad for part in passed.parts] == [True] * passed.kept + [False] * (
        len(passed.chunks) - passed.kept
    )
    assert 0 < sum(passes[: passed.kept]) <= 72 < sum(passes[: passed.kept + 1])
    first = list(passes)
    backward(engine, passed, torch.ones_like(passed.embedding_ND))
    assert passes == first + first[passed.kept :]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_text_that_comes_again_is_computed_once_and_gets_both_gradients(alone, dropout):
    from tdro_cli.learn.gradient_cache import backward, forward
    from tdro_cli.recipe import Optimizer
    from tdro_cli.run.engine import Engine

    texts = [[7, 8, 9], [5, 6], [7, 8, 9], [5, 6], [7, 8, 9]]
    optimizer = Optimizer(learning_rate=1.0, weight_decay=0.0, eps=cases.EPSILON, max_grad_norm=None)
    norms = []
    for given, gradient_ND in (
        (texts, torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0]])),
        (texts[:2], torch.tensor([[21.0], [10.0]])),
    ):
        engine = Engine(cases.build_encoder(Case(dropout=dropout)), optimizer, {}, alone)
        engine.train()
        passed = forward(engine, given, pad_id=cases.PAD, budget=cases.SMALL_CHUNKS)
        assert passed.tokens == (5 if dropout == 0 or given != texts else 13)
        backward(engine, passed, gradient_ND.expand(-1, 32) * torch.arange(32))
        norms.append(engine.step(1.0))
        if given == texts:
            assert torch.equal(passed.embedding_ND[0], passed.embedding_ND[2]) == (dropout == 0)
    if dropout == 0:
        assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def test_the_errors_known_of_other_trainers_would_be_seen():
    right, _ = cases.plain_gradient(Case())
    without_temperature, _ = cases.plain_gradient(Case(temperature=1.0))
    assert cases.relative_error(without_temperature, right) > 0.5
    divided_again = {name: gradient / 2 for name, gradient in right.items()}
    assert cases.relative_error(divided_again, right) == pytest.approx(0.5)


def test_dropout_of_the_second_pass_is_that_of_the_first(alone):
    # a loss that is the sum of the embeddings' squares: its value at the cached embeddings fits the replayed pass only
    from tdro_cli.learn.gradient_cache import _embed, _set_random_state, forward
    from tdro_cli.recipe import Optimizer
    from tdro_cli.run.engine import Engine

    encoder = cases.build_encoder(Case(dropout=0.5))
    engine = Engine(encoder, Optimizer(), {}, alone)
    engine.train()
    texts = cases.part_of_rank(0, 1).passages
    passed = forward(engine, texts, pad_id=cases.PAD, budget=cases.SMALL_CHUNKS)
    chunk, random_state = passed.chunks[1], passed.random_states[1]
    _set_random_state(random_state, alone.device)
    again = _embed(engine, texts, chunk, cases.PAD).detach()
    assert torch.equal(again, passed.embedding_ND[torch.from_numpy(chunk)])
    other = _embed(engine, texts, chunk, cases.PAD).detach()
    assert not torch.equal(other, again)


def test_random_numbers_after_a_step_do_not_depend_on_the_second_pass(alone):
    from tdro_cli.learn.gradient_cache import backward, forward
    from tdro_cli.recipe import Optimizer
    from tdro_cli.run.engine import Engine

    engine = Engine(cases.build_encoder(Case(dropout=0.5)), Optimizer(), {}, alone)
    engine.train()
    torch.manual_seed(1)
    passed = forward(engine, cases.part_of_rank(0, 1).passages, pad_id=cases.PAD, budget=cases.SMALL_CHUNKS)
    before = torch.get_rng_state()
    backward(engine, passed, torch.ones_like(passed.embedding_ND))
    assert torch.equal(torch.get_rng_state(), before)


def _between_two_ranks(stages: list[int]) -> dict[str, dict[str, float]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-W", "ignore", cases.__file__, *map(str, stages)]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **place, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [rank.communicate(timeout=600) for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), told
    return json.loads(told[0][0].splitlines()[-1])


@pytest.fixture(scope="module")
def between_two_ranks() -> dict[str, dict[str, float]]:
    return _between_two_ranks([0, 1, 2, 3])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_with_zero_give_the_gradient_of_one_process(stage, between_two_ranks):
    found = {name: between_two_ranks[f"ZeRO {stage}, {name}"] for name in cases.cases_between_ranks(stage)}
    assert len(found) == 12
    for name, errors in found.items():
        rounding = 0.02 if "bfloat16" in name else 1e-5
        assert all(error < rounding for error in errors.values()), (name, errors)


def test_the_parts_of_two_ranks_make_up_the_whole_batch():
    whole, parts = cases.part_of_rank(0, 1), [cases.part_of_rank(rank, 2) for rank in range(2)]
    assert [p for part in parts for p in part.passages] == whole.passages
    assert [len(part.passages) for part in parts] == [9, 6]
    assert replace(Case(), temperature=0.002) == MATRIX["qwen2 at 0.002"]
