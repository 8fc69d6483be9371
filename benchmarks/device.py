"""Encoding, a learn-weights step and a finetune step on this device, in tokens/s and share of its matrix rate.

    python benchmarks/device.py                                  # a GPU: Qwen2-0.5B's shape, 2,048 queries, bfloat16;
                                                                 # else a tiny model and few queries, to try the script
    python benchmarks/device.py --write-lengths                  # benchmarks/lengths.json from TDRO_REAL_DATA

Random weights and random tokens, in the lengths of real rows (`lengths.json`: 1 + 8 texts a query, at most 128 and 512
tokens, the paper's). Ours are the functions that the stages call, around DeepSpeed's engine; the tokens lie ready, for
processes of their own make them (`TDRO_DATA_WORKERS`). The plain side is that of `learn_weights.py`, on fewer queries:
its cost is in proportion to them. FLOP are counted over real tokens (`tdro_cli.run.bench.ModelShape`), the matrix rate
is measured here. One JSON object a line; the last one has the hours of the paper's 1,000 steps.

Needs torch, transformers, deepspeed and pydantic. Where a machine lacks the last two, without a network: `pip wheel
--no-deps deepspeed hjson pydantic pydantic-core annotated-types typing-inspection` for its Python, and
`pip install --no-index --no-deps --target DIR *.whl` there, with DIR in PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

LENGTHS = Path(__file__).with_name("lengths.json")
SHAPES = {
    "qwen2-0.5b": {
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "minilm": {
        "vocab_size": 30_522,
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
    },
    "small": {
        "vocab_size": 24_000,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
    "tiny": {
        "vocab_size": 2000,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
FEW = {"shape": "tiny", "dtype": "float32", "queries": 8, "plain_queries": 4, "steps": 1, "tokens": 4096}
PAD = 0
PAPER_STEPS = 1000
PARTS = ("encode", "learn-weights", "finetune", "plain")


def write_lengths(queries: int) -> None:
    """Lengths in tokens of the texts of `queries` random rows, equally many of each of the 20 tasks."""
    import tempfile

    from learn_weights import all_batches, recipe_text
    from real_rows import write_tasks

    from tdro_cli import recipe as recipes
    from tdro_cli.run.launch import Machines, run_plan
    from tdro_cli.run.plan import make_plans
    from tdro_cli.run.progress import Silent

    shape = argparse.Namespace(dtype="float32", hidden=32, layers=1, heads=2, queries=queries, steps=0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tasks = write_tasks(folder / "tasks", rows=200, negatives=7)
        (folder / "recipe.yaml").write_text(recipe_text(tasks, shape))
        plans = make_plans(recipes.load(folder / "recipe.yaml"), folder / "runs", needed=["learn-weights"])
        run_plan(plans["backbone"], Machines(), Silent())
        [batch] = all_batches(plans["learn-weights"])
    rows = [
        [len(query), *(len(tokens) for tokens in batch.passages[first : first + count])]
        for query, first, count in zip(batch.queries, batch.first_B, batch.count_B, strict=True)
    ]
    LENGTHS.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def token_batch(rows: list[list[int]], vocab: int, rng: np.random.Generator) -> Any:
    """Random tokens in these lengths: the query's, then its passages'."""
    from tdro_cli.data.collation import TokenBatch

    def texts(lengths: list[int]) -> list[np.ndarray]:
        return [rng.integers(1, vocab, length, dtype=np.int32) for length in lengths]

    count_B = np.array([len(row) - 1 for row in rows])
    nothing = np.zeros(len(rows), dtype=np.int64)
    return TokenBatch(
        queries=texts([row[0] for row in rows]),
        passages=texts([length for row in rows for length in row[1:]]),
        task_B=nothing,
        row_B=nothing,
        first_B=np.cumsum(count_B) - count_B,
        count_B=count_B,
        query_id_B=nothing,
        passage_id_M=np.arange(count_B.sum()),
        positive_ids_BP=nothing[:, None],
    )


@dataclass(frozen=True)
class Bench:
    """The device, what computes on it, and what it should reach."""

    arguments: argparse.Namespace
    recipe: Any
    world: Any
    peak_flops: float

    def encoder(self, seed: int, attention: str | None = None) -> Any:
        import torch
        from transformers import Qwen2Config, Qwen2Model

        from tdro_cli.model import varlen
        from tdro_cli.model.encoder import TextEncoder, compile_blocks

        varlen.register()
        config = Qwen2Config(**SHAPES[self.arguments.shape], max_position_embeddings=1024, use_cache=False)
        config._attn_implementation = attention or self.arguments.attention
        torch.manual_seed(seed)
        with torch.device(self.world.device):
            model = Qwen2Model(config)
        if self.arguments.compile:
            compile_blocks(model)
        return TextEncoder(model, autocast=self.arguments.dtype)

    def shape(self) -> Any:
        from tdro_cli.run.bench import model_shape

        return model_shape(self.encoder(0))

    def timed(self, what: str, step: Callable[[], object], batch: Any, passes: int) -> dict[str, Any]:
        """The median of a few steps after one that sets up kernels; `passes`: forwards, a backward counting two."""
        import torch

        seconds, cuda = [], self.world.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(1 + self.arguments.steps):
            began = time.perf_counter()
            step()
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        median = statistics.median(seconds[1:])
        lengths = [len(tokens) for tokens in batch.queries + batch.passages]
        flops = passes * sum(map(self.shape().forward_flops, lengths))
        result = {
            "what": what,
            "queries": len(batch.queries),
            "seconds": round(median, 4),
            "tokens_per_second": round(sum(lengths) / median),
            "queries_per_second": round(len(batch.queries) / median, 2),
            "utilisation": round(flops / median / self.peak_flops, 4),
            **({"peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1)} if cuda else {}),
        }
        print(json.dumps(result), flush=True)
        return result


def encode(bench: Bench, batch: Any) -> None:
    import torch

    from tdro_cli.model.packing import encode_token_lists

    for attention in dict.fromkeys((bench.arguments.attention, "sdpa")):
        encoder = bench.encoder(1, attention).eval()

        @torch.inference_mode()
        def step(encoder: Any = encoder) -> None:
            texts, budget = batch.queries + batch.passages, bench.arguments.tokens
            encode_token_lists(encoder, texts, pad_id=PAD, budget=budget, device=bench.world.device)

        bench.timed(f"encode, {attention}", step, batch, passes=1)


def engine_of(bench: Bench) -> Any:
    from tdro_cli.run.engine import Engine

    engine = Engine(bench.encoder(1), bench.recipe.learn_weights.optimizer, {}, bench.world)
    engine.train()
    return engine


def learn_weights(bench: Bench, batch: Any) -> dict[str, dict[str, Any]]:
    """A step with a cold cache of reference losses, and with a warm one."""
    import torch

    from tdro_cli.learn.weight_learning import _proxy_pass, micro_batches, query_losses

    engine, reference = engine_of(bench), bench.encoder(2).eval().requires_grad_(False)
    weight_B = torch.full((len(batch.queries),), 1 / len(batch.queries), device=bench.world.device)

    def proxy() -> None:
        _proxy_pass(engine, batch, bench.recipe, PAD, weight_B)
        engine.step(1e-4)

    def cold() -> None:
        with torch.inference_mode():
            parts = [
                query_losses(
                    reference,
                    batch,
                    rows,
                    pad_id=PAD,
                    temperature=bench.recipe.encoder.temperature,
                    tokens_at_once=bench.arguments.tokens,
                    device=bench.world.device,
                ).loss_B
                for rows in micro_batches(batch, bench.arguments.activation_tokens)
            ]
            torch.cat(parts).cpu()
        proxy()

    return {
        "cold": bench.timed("learn-weights, cold reference cache", cold, batch, passes=4),
        "warm": bench.timed("learn-weights, warm reference cache", proxy, batch, passes=3),
    }


def finetune(bench: Bench, batch: Any) -> dict[str, Any]:
    """Every query against the passages of all, by gradient caching."""
    import torch

    from tdro_cli.learn.contrastive import infonce
    from tdro_cli.learn.gradient_cache import Budget, backward, forward

    engine = engine_of(bench)
    budget = Budget(bench.arguments.tokens, bench.arguments.activation_tokens)
    first_B = torch.from_numpy(batch.first_B).to(bench.world.device)

    def step() -> None:
        passed = forward(engine, batch.queries + batch.passages, pad_id=PAD, budget=budget)
        embedding_ND = passed.embedding_ND.requires_grad_()
        queries, passages = embedding_ND.tensor_split([len(batch.queries)])
        loss = infonce(queries, passages, first_B, bench.recipe.encoder.temperature).mean()
        backward(engine, passed, *torch.autograd.grad(loss, embedding_ND))
        engine.step(1e-4)

    return bench.timed("finetune", step, batch, passes=3)


def plain(bench: Bench, batch: Any) -> dict[str, Any]:
    import torch
    from learn_weights import Plain

    encoders = bench.encoder(1, "sdpa"), bench.encoder(2, "sdpa").eval().requires_grad_(False)
    side = Plain(*encoders, PAD, bench.recipe, bench.arguments.micro_batch, bench.arguments.chunk)
    weight_B = torch.full((len(batch.queries),), 1 / len(batch.queries), device=bench.world.device)
    return bench.timed("learn-weights, plain", lambda: side.step(batch, weight_B), batch, passes=4)


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shape", choices=sorted(SHAPES), help="qwen2-0.5b on a GPU; else tiny, and few queries in float32"
    )
    parser.add_argument("--dtype", default="bfloat16", help="that the model computes in; weights are float32")
    parser.add_argument("--attention", choices=["varlen", "sdpa", "eager"], default="varlen")
    parser.add_argument("--compile", action="store_true", help="torch.compile of each layer")
    parser.add_argument("--only", choices=sorted(PARTS), nargs="*", default=sorted(PARTS))
    parser.add_argument("--queries", type=int, default=2048)
    parser.add_argument("--plain-queries", type=int, default=128)
    parser.add_argument("--steps", type=int, default=2, help="measured ones")
    parser.add_argument("--tokens", type=int, default=32_768, help="at once through the model")
    parser.add_argument("--activation-tokens", type=int, default=32_768, help="kept for the backward pass")
    parser.add_argument("--micro-batch", type=int, default=64, help="queries of the plain side's micro-batch")
    parser.add_argument("--chunk", type=int, default=32, help="texts that the plain side embeds at once")
    parser.add_argument("--write-lengths", action="store_true")
    arguments = parser.parse_args()
    if arguments.write_lengths:
        return write_lengths(512)
    if arguments.shape is None:
        few = {} if has_gpu() else FEW
        arguments = argparse.Namespace(**{**vars(arguments), "shape": "qwen2-0.5b", **few})
    measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    from types import SimpleNamespace

    import torch

    from tdro_cli.recipe import Optimizer
    from tdro_cli.run.bench import measured_peak
    from tdro_cli.run.distributed import join

    section = SimpleNamespace(
        activation_tokens=arguments.activation_tokens, micro_batch_tokens=arguments.tokens, temperature=0.02
    )
    recipe = SimpleNamespace(encoder=section, learn_weights=SimpleNamespace(optimizer=Optimizer()))
    bench = Bench(arguments, recipe, join(), measured_peak(arguments.dtype))
    lengths = json.loads(LENGTHS.read_text())
    rng = np.random.default_rng(7)
    vocab = SHAPES[arguments.shape]["vocab_size"]
    rows = [lengths[i] for i in rng.integers(0, len(lengths), arguments.queries)]
    whole, part = (token_batch(chosen, vocab, rng) for chosen in (rows, rows[: arguments.plain_queries]))
    device = torch.cuda.get_device_name() if bench.world.device.type == "cuda" else "CPU"
    print(json.dumps({"device": device, "torch": torch.__version__, "peak_tflops": round(bench.peak_flops / 1e12, 2)}))
    found: dict[str, dict[str, Any]] = {}
    if "encode" in arguments.only:
        encode(bench, whole)
    if "plain" in arguments.only:
        found["plain"] = plain(bench, part)
    if "learn-weights" in arguments.only:
        found |= learn_weights(bench, whole)
    if "finetune" in arguments.only:
        found["finetune"] = finetune(bench, whole)
    rate = {name: result["queries_per_second"] for name, result in found.items()}
    hours = {name: round(PAPER_STEPS * 2048 / per_second / 3600, 2) for name, per_second in rate.items()}
    ours = [name for name in ("cold", "warm") if {name, "plain"} <= rate.keys()]
    ratios = {f"ratio_{name}": round(rate[name] / rate["plain"], 2) for name in ours}
    print(json.dumps({**ratios, "hours_of_1000_steps_of_2048_queries": hours}))


if __name__ == "__main__":
    main()
