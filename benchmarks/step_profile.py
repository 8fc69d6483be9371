"""Where the processor time of a learn-weights step goes, plain and ours, by kind of operation: numbers and a figure.

    python benchmarks/step_profile.py [--queries 20] [--threads 1] [--figure docs/figures/learn-weights-step.png]

The step of `device.py` (random weights, real lengths, a Qwen2 of hidden 128 and 4 layers) under torch's profiler, after
one that sets up kernels. Prints one JSON object a side: seconds by kind.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

KINDS = {  # by the names of torch's operations; what is not named is element-wise work on memory
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear"),
    "attention": ("scaled_dot_product",),
    "optimizer": ("adamw", "Optimizer"),
}
OTHER = "element-wise, copies"


def by_kind(step: Callable[[], object]) -> dict[str, float]:
    """Seconds of the processor in a step, divided as the clock's are among its operations: other work hardly counts."""
    from torch.profiler import ProfilerActivity, profile

    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        began = time.process_time()
        step()
        total = time.process_time() - began
    clock: Counter[str] = Counter()
    for operation in profiler.key_averages():
        kind = next((kind for kind, names in KINDS.items() if any(name in operation.key for name in names)), OTHER)
        clock[kind] += operation.self_cpu_time_total
    return {kind: round(total * clock[kind] / clock.total(), 3) for kind in (*KINDS, OTHER)}


def sides(queries: int) -> dict[str, Callable[[], object]]:
    import device
    import torch
    from learn_weights import Plain

    from tdro_cli.learn.weight_learning import _proxy_pass, micro_batches, query_losses
    from tdro_cli.model.packing import budget_on
    from tdro_cli.recipe import Optimizer
    from tdro_cli.run.distributed import join

    encoder = SimpleNamespace(activation_tokens=0, micro_batch_tokens=16_384, temperature=0.02)  # the device's usual
    recipe = SimpleNamespace(encoder=encoder, learn_weights=SimpleNamespace(optimizer=Optimizer()))
    arguments = SimpleNamespace(shape="small", attention="sdpa", compile=False, dtype="float32")
    bench: Any = device.Bench(arguments, recipe, join(), 1.0)
    lengths, rng = json.loads(device.LENGTHS.read_text()), np.random.default_rng(7)
    rows = [lengths[i] for i in rng.integers(0, len(lengths), queries)]
    batch = device.token_batch(rows, device.SHAPES["small"]["vocab_size"], rng)
    weight_B = torch.full((queries,), 1 / queries)
    engine, reference = device.engine_of(bench), bench.encoder(2).eval().requires_grad_(False)
    plain = Plain(bench.encoder(1), reference, device.PAD, recipe, queries, 32)

    def warm() -> None:
        _proxy_pass(engine, batch, recipe, device.PAD, weight_B)
        engine.step(1e-4)

    @torch.inference_mode()
    def referred() -> None:
        budget = budget_on(engine.world.device, encoder)
        options = {"temperature": 0.02, "tokens_at_once": budget.micro_batch_tokens, "device": engine.world.device}
        for rows in micro_batches(batch, budget.activation_tokens):
            query_losses(reference, batch, rows, pad_id=device.PAD, **options)

    def cold() -> None:
        referred()
        warm()

    return {"plain": lambda: plain.step(batch, weight_B), "cold": cold, "warm": warm}


def draw(found: dict[str, dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = {"plain": "plain", "cold": "ours, cold reference cache", "warm": "ours, warm reference cache"}
    figure, axes = plt.subplots(figsize=(7.5, 2.4), layout="constrained")
    left = np.zeros(len(found))
    for kind in (*KINDS, OTHER):
        width = np.array([seconds[kind] for seconds in found.values()])
        axes.barh([names[side] for side in found], width, left=left, label=kind)
        left += width
    for place, total in enumerate(left):
        axes.text(total, place, f" {total:.1f} s", va="center")
    axes.invert_yaxis()
    axes.set_xlabel("processor time of a step (s)")
    axes.set_xlim(0, left.max() * 1.12)
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    found = {}
    for side, step in sides(arguments.queries).items():
        found[side] = by_kind(step)
        print(json.dumps({"side": side, **found[side]}), flush=True)
    if arguments.figure:
        draw(found, arguments.figure)


if __name__ == "__main__":
    main()
