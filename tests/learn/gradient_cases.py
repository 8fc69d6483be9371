"""Gradients through the engine beside plain autograd, as functions and as the program of one rank among several.

`python gradient_cases.py ZERO_STAGE...` with RANK, WORLD_SIZE and the rest of a launcher's environment prints errors.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from tdro_cli.builtin.false_negative_masks import Margin
from tdro_cli.data.collation import NO_TEXT, TokenBatch, TrainingTask
from tdro_cli.learn.gradient_cache import Budget, backward, forward
from tdro_cli.learn.training import contrast
from tdro_cli.model.encoder import TextEncoder, add_lora
from tdro_cli.protocols import LoadedBackbone
from tdro_cli.recipe import Optimizer
from tdro_cli.run.distributed import World
from tdro_cli.run.engine import Engine

PAD = 0
DECODERS = ("qwen2", "qwen3", "llama", "mistral", "gemma", "gemma2", "gemma3_text")
ENCODERS = ("bert", "roberta", "xlm-roberta", "modernbert")
SMALL_CHUNKS = Budget(micro_batch_tokens=24, activation_tokens=0)  # texts of 3 to 12 tokens: about 10 chunks a rank
ONE_CHUNK = Budget(micro_batch_tokens=10**6, activation_tokens=10**6)
SOME_WITH_GRAPHS = Budget(micro_batch_tokens=24, activation_tokens=72)
CHUNKS_WITH_GRAPHS = Budget(micro_batch_tokens=24, activation_tokens=10**6)
# Adam's first step moves a parameter by rate · g / (|g| + epsilon), which tells g whatever ZeRO has done to gradients
EPSILON, RATE = 1e4, 1e8
MARGIN = 0.1  # masks some candidates of some queries
UNEQUAL = (7, 5, 6, 1, 1, 1)  # one rank has three chunks for each of the other's
PASSAGES = (3, 2, 4, 1, 3, 2)  # of each query, the positive first: ranks hold unequal numbers


@dataclass(frozen=True)
class Case:
    family: str = "qwen2"
    temperature: float = 0.05
    lora: bool = False
    dropout: float = 0.0
    checkpointing: bool = False
    autocast: str = "float32"
    zero_stage: int = 0
    budget: Budget = SMALL_CHUNKS
    margin: float | None = None  # of the false-negative mask
    passages: tuple[int, ...] = PASSAGES
    in_batch: bool = True
    cross_device: bool = True


def build_encoder(case: Case) -> TextEncoder:
    """The same tiny model for the same case, every time."""
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(3)
    shape = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"intermediate_size": 48, "max_position_embeddings": 32, "pad_token_id": PAD, "initializer_range": 0.2}
    if case.family in DECODERS:
        shape |= {"num_key_value_heads": 2, "head_dim": 8, "attention_dropout": case.dropout}
        if case.family in ("mistral", "gemma2", "gemma3_text"):
            shape |= {"sliding_window": 6}  # shorter than the texts
        targets = ("q_proj", "v_proj", "down_proj")
    elif case.family == "modernbert":
        shape |= {f"{part}_dropout": case.dropout for part in ("attention", "embedding", "mlp")}
        shape |= {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2, "local_attention": 6}
        targets = ("Wqkv", "Wo")
    else:
        shape |= {"hidden_dropout_prob": case.dropout, "attention_probs_dropout_prob": case.dropout}
        targets = ("query", "value")
    model = AutoModel.from_config(AutoConfig.for_model(case.family, **shape))
    model.pooler = None
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if case.lora:
        model = add_lora(LoadedBackbone(model, None, targets, case.family in DECODERS), r=2, dropout=case.dropout)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at the start, which would hide half of the gradient
                torch.nn.init.normal_(parameter, std=0.2)
    pooling = "last_token" if case.family in DECODERS else "mean"
    return TextEncoder(model, pooling=pooling, autocast=case.autocast).train()


def whole_batch(counts: tuple[int, ...] = PASSAGES) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Queries and the passages of each, as token ids. The last passage of query 0 is query 2's positive: masked."""
    random = np.random.default_rng(5)
    queries = [random.integers(1, 60, random.integers(3, 9)).tolist() for _ in counts]
    passages = [[random.integers(1, 60, random.integers(4, 13)).tolist() for _ in range(n)] for n in counts]
    if len(counts) > 2:
        passages[0][-1 if counts[0] == 1 else 1] = passages[2][0]
    return queries, passages


def queries_of_rank(count: int, rank: int, world: int) -> range:
    return range(count * rank // world, count * (rank + 1) // world)


def part_of_rank(rank: int, world: int, counts: tuple[int, ...] = PASSAGES) -> TokenBatch:
    queries, passages = whole_batch(counts)
    own = queries_of_rank(len(queries), rank, world)
    identity = {tuple(t): i for i, t in enumerate(dict.fromkeys(tuple(t) for group in passages for t in group))}
    count_B = np.array([len(passages[q]) for q in own])
    positive_ids = np.full((len(own), 1 + rank), NO_TEXT)  # unequal widths, too
    positive_ids[:, 0] = [identity[tuple(passages[q][0])] for q in own]
    return TokenBatch(
        queries=[queries[q] for q in own],
        passages=[t for q in own for t in passages[q]],
        task_B=np.zeros(len(own), dtype=np.int64),
        row_B=np.array(own),
        first_B=np.cumsum(count_B) - count_B,
        count_B=count_B,
        query_id_B=np.array(own),
        passage_id_M=np.array([identity[tuple(t)] for q in own for t in passages[q]]),
        positive_ids_BP=positive_ids,
    )


def plain_gradient(case: Case, ranks: int = 1) -> tuple[dict[str, torch.Tensor], float]:
    """Gradient and loss of the whole batch by plain autograd on one process.

    Without dropout in one forward pass; with it in the chunks of each rank, to draw the same random numbers.
    """
    encoder = build_encoder(case)
    queries, passages = whole_batch(case.passages)
    texts = queries + [t for group in passages for t in group]
    embedding_ND = _embed(encoder, texts) if case.dropout == 0 else _embed_like_ranks(encoder, case, ranks)
    query_BD, passage_MD = embedding_ND[: len(queries)], embedding_ND[len(queries) :]
    score_BM = query_BD @ passage_MD.T / case.temperature
    first_B = np.cumsum(case.passages) - case.passages
    if case.margin is not None:
        doubtful_BM = score_BM > (score_BM[range(6), first_B] - case.margin / case.temperature)[:, None]
        score_BM = score_BM.masked_fill(doubtful_BM & ~_own_passages(), -torch.inf)
    score_BM = score_BM.masked_fill(_refused(case, passages, ranks), -torch.inf)
    loss = F.cross_entropy(score_BM, torch.from_numpy(first_B))
    loss.backward()
    return {name: p.grad for name, p in encoder.named_parameters() if p.requires_grad}, loss.item()


def _refused(case: Case, passages: list[list[list[int]]], ranks: int) -> torch.Tensor:
    """Candidates that are no negatives: [B, M], by the texts themselves, one by one."""
    rank_B = [rank for rank in range(ranks) for _ in queries_of_rank(len(passages), rank, ranks)]
    rows = []
    for query, own in enumerate(passages):
        row = []
        for owner, group in enumerate(passages):
            for place, text in enumerate(group):
                known = text == own[0] and (owner, place) != (query, 0)
                foreign = owner != query and not case.in_batch
                far = rank_B[owner] != rank_B[query] and not case.cross_device
                row.append(known or foreign or far)
        rows.append(row)
    return torch.tensor(rows)


def _own_passages() -> torch.Tensor:
    row_M = torch.repeat_interleave(torch.arange(6), torch.tensor(PASSAGES))
    return row_M == torch.arange(6)[:, None]


def _embed(encoder: TextEncoder, texts: list[list[int]]) -> torch.Tensor:
    longest = max(map(len, texts))
    ids_NT = torch.tensor([t + [PAD] * (longest - len(t)) for t in texts])
    mask_NT = torch.tensor([[1] * len(t) + [0] * (longest - len(t)) for t in texts])
    return encoder(ids_NT, mask_NT)


def _embed_like_ranks(encoder: TextEncoder, case: Case, ranks: int) -> torch.Tensor:
    queries, passages = [], []
    for rank in range(ranks):
        torch.manual_seed(100 + rank)
        part = part_of_rank(rank, ranks, case.passages)
        texts = part.queries + part.passages
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        embedded: dict[int, torch.Tensor] = {}
        while order:
            count = max(1, case.budget.micro_batch_tokens // len(texts[order[0]]))
            chunk, order = order[:count], order[count:]
            embedded |= dict(zip(chunk, _embed(encoder, [texts[i] for i in chunk]), strict=True))
        rows = torch.stack([embedded[i] for i in range(len(texts))])
        queries.append(rows[: len(part.queries)])
        passages.append(rows[len(part.queries) :])
    return torch.cat([*queries, *passages])


def engine_gradient(case: Case, world: World) -> tuple[dict[str, torch.Tensor], float, float]:
    """Gradient as the optimizer got it, loss, and gradient norm, by the code that trains."""
    encoder = build_encoder(case)
    names = [name for name, p in encoder.named_parameters() if p.requires_grad]
    optimizer = Optimizer(learning_rate=1.0, weight_decay=0.0, eps=EPSILON, max_grad_norm=None)
    before = {name: p.detach().clone() for name, p in encoder.named_parameters() if p.requires_grad}
    # else ZeRO 3 would leave parameters as small as these whole
    scattered = {"stage3_param_persistence_threshold": 0}
    engine = Engine(encoder, optimizer, {"zero_stage": case.zero_stage, "zero_optimization": scattered}, world)
    engine.train()
    batch = part_of_rank(world.rank, world.size, case.passages)
    tasks = [TrainingTask("only", None, np.arange(6), "", False, case.in_batch)]
    torch.manual_seed(100 + world.rank)
    passed = forward(engine, batch.queries + batch.passages, pad_id=PAD, budget=case.budget)
    found = contrast(
        world,
        passed.embedding_ND,
        batch,
        tasks,
        torch.ones(1),
        temperature=case.temperature,
        cross_device=case.cross_device,
        judge=None if case.margin is None else Margin(case.margin, "absolute"),
    )
    assert (found.masked > 0) == (case.margin is not None)
    backward(engine, passed, found.gradient_ND)
    norm = engine.step(RATE)
    with engine.whole_weights():
        moved = {name: before[name] - p.detach() for name, p in engine.module.named_parameters() if name in names}
    gradient = {name: m.double() * EPSILON / (RATE - m.double().abs()) for name, m in moved.items()}
    return gradient, float(found.loss_B.mean()), norm


def relative_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Of all parameters together: the L2 norm of the difference over that of the expected gradient."""
    assert found.keys() == expected.keys()
    difference = sum(float((found[n].double() - expected[n].double()).square().sum()) for n in expected)
    return (difference / sum(float(g.double().square().sum()) for g in expected.values())) ** 0.5


def errors_of(case: Case, world: World) -> dict[str, float]:
    found, loss, norm = engine_gradient(case, world)
    expected, expected_loss = plain_gradient(case, world.size)
    expected_norm = sum(float(g.double().square().sum()) for g in expected.values()) ** 0.5
    return {
        "gradient": relative_error(found, expected),
        "loss": abs(loss - expected_loss) / expected_loss,
        "norm": abs(norm - expected_norm) / expected_norm,
    }


def cases_between_ranks(zero_stage: int) -> dict[str, Case]:
    return {
        "qwen2": Case(zero_stage=zero_stage),
        "qwen2 at 0.002": Case(zero_stage=zero_stage, temperature=0.002),
        "qwen2, graphs of some chunks kept": Case(zero_stage=zero_stage, budget=SOME_WITH_GRAPHS),
        "qwen2, masked by a margin": Case(zero_stage=zero_stage, margin=MARGIN),
        "qwen2, one chunk": Case(zero_stage=zero_stage, budget=ONE_CHUNK),
        "qwen2, all at once": Case(
            zero_stage=zero_stage, temperature=0.002, lora=True, dropout=0.2, checkpointing=True, margin=MARGIN
        ),
        "qwen2, bfloat16": Case(zero_stage=zero_stage, autocast="bfloat16"),
        "bert, lora, dropout": Case("bert", zero_stage=zero_stage, lora=True, dropout=0.2),
        "qwen2, own passages only": Case(zero_stage=zero_stage, in_batch=False),
        "qwen2, passages of the own rank only": Case(zero_stage=zero_stage, cross_device=False, passages=UNEQUAL),
        "qwen2, a query a rank": Case(zero_stage=zero_stage, passages=(3, 1)),
        "modernbert, graphs of some chunks kept": Case("modernbert", zero_stage=zero_stage, budget=SOME_WITH_GRAPHS),
    }


def main() -> None:
    from tdro_cli.run.distributed import join

    torch.set_num_threads(1)
    world = join()
    told = {}
    for stage in map(int, sys.argv[1:]):
        for name, case in cases_between_ranks(stage).items():
            told[f"ZeRO {stage}, {name}"] = errors_of(case, world)
    if world.leads:
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
