"""A step of learn-weights beside a plain implementation that works as the authors' release does.

    python benchmarks/learn_weights.py [--queries 32] [--steps 3] [--layers 4] [--hidden 128] [--threads 2]

Real rows (TDRO_REAL_DATA) of 20 tasks, 1 + 7 passages a query, queries cut at 128 tokens and passages at 512 (the
paper's lengths), a tiny Qwen2 with random weights, float32. The plain side pads every text of a micro-batch to the
longest of its kind, embeds it without gradients in chunks, takes the loss and its gradient at the embeddings, embeds
every chunk once more to carry the gradient back, and embeds all with the reference, each time. Both sides train a proxy
on the same rows with the same weights; step by step they take turns in one process. Checked: each query's losses agree
and the gradients' norms do. The stage runs twice: with the reference cache cold, then warm. Ratios are of seconds on
the clock (`ratio`) and of processor time (`cpu_ratio`). Prints one JSON object a line. On a machine with a GPU the same
command measures that.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

FIRST = 1  # steps before what is measured: kernels are set up in them


def recipe_text(tasks: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    return json.dumps(
        {
            "name": "speed",
            "tasks": tasks,
            "backbone": {
                "name": "scratch",
                "dtype": arguments.dtype,
                "options": {
                    "hidden_size": arguments.hidden,
                    "layers": arguments.layers,
                    "heads": arguments.heads,
                    "vocab_size": 24000,
                },
            },
            "encoder": {"query_length": 128, "passage_length": 512, "temperature": 0.02},
            "train_ref": {"steps": 2, "batch": {"queries": 8}},
            "learn_weights": {
                "steps": FIRST + arguments.steps,
                "batch": {"queries": arguments.queries, "passages_per_query": 8},
                "rows": "all",
                "schedule": {"name": "constant", "warmup_steps": 0},
            },
        }
    )


class Plain:
    """The proxy and the reference as the release treats them, on batches of token lists."""

    def __init__(self, proxy: Any, reference: Any, pad_id: int, recipe: Any, micro_batch: int, chunk: int):
        import torch

        from tdro_cli.run.engine import parameter_groups

        self.proxy, self.reference = proxy.train(), reference
        self.device = next(proxy.parameters()).device
        self.pad_id, self.micro_batch, self.chunk = pad_id, micro_batch, chunk
        self.temperature, section = recipe.encoder.temperature, recipe.learn_weights.optimizer
        self.max_grad_norm = section.max_grad_norm
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.proxy, section.weight_decay),
            lr=section.learning_rate,
            betas=tuple(section.betas),
            eps=section.eps,
            fused=True,
        )
        self.computed = 0

    def step(self, batch: Any, weight_B: Any) -> tuple[Any, Any, float]:
        """Losses of proxy and reference [B] and the norm of the gradient of Σ w ℓ / Σ w, which is applied."""
        import torch

        proxy, reference = [], []
        for start in range(0, len(batch.queries), self.micro_batch):
            rows = range(start, min(start + self.micro_batch, len(batch.queries)))
            sides = [
                self._padded([batch.queries[i] for i in rows]),
                self._padded([batch.passages[batch.first_B[i] + n] for i in rows for n in range(batch.count_B[i])]),
            ]
            with torch.no_grad():
                reference.append(self._losses(*(self._embed(self.reference, *side) for side in sides)))
                cached = [self._embed(self.proxy, *side) for side in sides]
            cached = [embedding_ND.requires_grad_() for embedding_ND in cached]
            loss_B = self._losses(*cached)
            proxy.append(loss_B.detach())
            (loss_B * weight_B[rows.start : rows.stop]).sum().backward()
            for side, embedding_ND in zip(sides, cached, strict=True):
                self._carry_back(*side, embedding_ND.grad)
        norm = torch.nn.utils.clip_grad_norm_(self.proxy.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return torch.cat(proxy).cpu(), torch.cat(reference).cpu(), float(norm)

    def _padded(self, token_lists: list[list[int]]) -> tuple[Any, Any]:
        from tdro_cli.model.packing import pad_batch

        return tuple(tensor.to(self.device) for tensor in pad_batch(token_lists, self.pad_id))

    def _chunks(self, ids_NT: Any, mask_NT: Any) -> Any:
        return zip(ids_NT.split(self.chunk), mask_NT.split(self.chunk), strict=True)

    def _embed(self, model: Any, ids_NT: Any, mask_NT: Any) -> Any:
        import torch

        self.computed += ids_NT.numel()
        return torch.cat([model(ids, mask) for ids, mask in self._chunks(ids_NT, mask_NT)])

    def _carry_back(self, ids_NT: Any, mask_NT: Any, gradient_ND: Any) -> None:
        for (ids, mask), gradient in zip(self._chunks(ids_NT, mask_NT), gradient_ND.split(self.chunk), strict=True):
            (self.proxy(ids, mask) * gradient).sum().backward()

    def _losses(self, query_BD: Any, passage_MD: Any) -> Any:
        from tdro_cli.learn.contrastive import per_query_infonce

        passage_BND = passage_MD.view(len(query_BD), -1, passage_MD.shape[1])
        return per_query_infonce(query_BD, passage_BND, self.temperature)


class Cost(NamedTuple):
    """Seconds on the clock, and of the processor (all threads), which other work on the machine hardly changes."""

    wall: float
    cpu: float

    @staticmethod
    def now() -> Cost:
        return Cost(time.perf_counter(), time.process_time())

    def since(self) -> Cost:
        now = Cost.now()
        return Cost(now.wall - self.wall, now.cpu - self.cpu)


@dataclass
class Turns:
    """A progress of our stage that gives the plain side its turn after every step of ours."""

    plain: Plain | None
    batches: list[Any]
    folder: Path
    weights: list[Any] = field(default_factory=list)
    ours: list[Cost] = field(default_factory=list)
    theirs: list[Cost] = field(default_factory=list)
    plain_losses: list[Any] = field(default_factory=list)
    plain_norms: list[float] = field(default_factory=list)

    def start(self, what: str, total: int | None, unit: str) -> Turns:
        return self

    def __enter__(self) -> Turns:
        self.began = Cost.now()
        return self

    def __exit__(self, *exc: object) -> None: ...
    def close(self) -> None: ...
    def show(self, view: Any) -> None: ...
    def note(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...

    def advance(self, n: float = 1, **facts: Any) -> None:
        if not facts:  # where a resumed run begins
            self.began = Cost.now()
            return
        self.ours.append(self.began.since())
        if self.plain is not None:
            began = Cost.now()
            own, weight_B = self.batches[len(self.theirs)], self._weights()
            proxy_B, reference_B, norm = self.plain.step(own, weight_B)
            self.theirs.append(began.since())
            self.plain_losses.append((proxy_B, reference_B))
            self.plain_norms.append(norm)
        self.began = Cost.now()

    def _weights(self) -> Any:
        """w / Σ w of this step's queries, by the task weights before this step."""
        import torch

        from tdro_cli.learn.training import read_metrics

        step, task_B = len(self.theirs), torch.from_numpy(self.batches[len(self.theirs)].task_B)
        lines = read_metrics(self.folder / "metrics.jsonl")
        tasks = list(lines[0]["tasks"])
        weight_G = (
            torch.tensor([lines[step - 1]["tasks"][name]["weight"] for name in tasks])
            if step
            else torch.full((len(tasks),), 1 / len(tasks))
        )
        return (weight_G[task_B] / weight_G[task_B].sum()).to(self.plain.device)


def plain_side(plan: Any, micro_batch: int, chunk: int) -> Plain:
    from tdro_cli.learn.training import backbone_source, load_encoder
    from tdro_cli.learn.weight_learning import _load_reference
    from tdro_cli.run.distributed import join

    recipe, device = plan.settings(), join().device
    proxy, tokenizer = load_encoder(recipe, backbone_source(plan))
    reference = _load_reference(recipe, plan.input("train-ref") / "model").to(device)
    return Plain(proxy.to(device), reference, tokenizer.pad_id, recipe, micro_batch, chunk)


def all_batches(plan: Any) -> list[Any]:
    """What our stage will train on, step by step."""
    from tdro_cli.data.batching import BatchPlan
    from tdro_cli.data.loading import Arriving, Collation
    from tdro_cli.learn.training import backbone_source, load_encoder, training_tasks

    recipe, section = plan.settings(), plan.settings().learn_weights
    tasks = training_tasks(plan, "all", need_negatives=True)
    _, tokenizer = load_encoder(recipe, backbone_source(plan))
    batches = BatchPlan(
        seed=recipe.seed,
        queries=section.batch.queries,
        sizes=tuple(len(task.rows) for task in tasks),
        probabilities=(1 / len(tasks),) * len(tasks),
        composition="mixed",
    )
    coming = Arriving(Collation(batches, tasks, tokenizer, 0, 1, 7), range(section.steps), workers=0)
    return [own for _, own in coming]


def run_stage(loaded: Any, folder: Path, plain: Plain | None, batches: list[Any]) -> tuple[Turns, list[dict], Any]:
    """Our stage from its beginning, the plain side after each of its steps."""
    import pyarrow.parquet as pq

    from tdro_cli.learn.training import read_metrics
    from tdro_cli.run.launch import Machines, run_plan
    from tdro_cli.run.plan import make_plans

    plan = make_plans(loaded, folder, needed=["learn-weights"])["learn-weights"]
    turns = Turns(plain, batches, Path(plan.folder))
    run_plan(plan, Machines(), turns)
    losses = pq.read_table(plan.out / "losses.parquet")
    return turns, read_metrics(Path(plan.folder) / "metrics.jsonl"), losses


def disagreement(turns: Turns, metrics: list[dict], losses: Any) -> dict[str, float]:
    """The largest differences: of a query's losses (as a share of 1 + the loss), and of the gradients' norms."""
    import torch

    queries = len(turns.plain_losses[0][0])
    worst = {"proxy_loss": 0.0, "reference_loss": 0.0, "gradient_norm": 0.0}
    for step, (proxy_B, reference_B) in enumerate(turns.plain_losses):
        for name, plain_B in (("proxy_loss", proxy_B), ("reference_loss", reference_B)):
            column = losses.column(name.partition("_")[0]).to_numpy()
            own_B = torch.from_numpy(column[step * queries : (step + 1) * queries].copy())
            worst[name] = max(worst[name], float(((own_B - plain_B).abs() / (1 + plain_B)).max()))
        norm = metrics[step]["gradient_norm"]
        worst["gradient_norm"] = max(worst["gradient_norm"], abs(norm / turns.plain_norms[step] - 1))
    return {name: float(f"{value:.2g}") for name, value in worst.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=32, help="of a step; the plain side's micro-batch, too")
    parser.add_argument("--steps", type=int, default=3, help="measured ones")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dtype", default="float32", help="of both sides")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--micro-batch", type=int, help="queries of the plain side's micro-batch; all of the step's")
    parser.add_argument("--chunk", type=int, default=32, help="texts that the plain side embeds at once")
    parser.add_argument("--folder", type=Path, help="keep the rows and models here")
    parser.add_argument("--only-ours", action="store_true", help="for a profile of our side")
    arguments = parser.parse_args()
    from tdro_cli.cli import let_threads_wait

    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    let_threads_wait(os.environ)  # as the command does, before torch is there; the plain side's wait alike
    with tempfile.TemporaryDirectory() as name:
        measure(arguments, arguments.folder or Path(name))


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    import shutil

    import torch
    from real_rows import write_tasks

    from tdro_cli import recipe as recipes
    from tdro_cli.run.launch import Machines, run_plan
    from tdro_cli.run.plan import make_plans
    from tdro_cli.run.progress import Silent

    torch.set_num_threads(arguments.threads)
    if not (folder / "recipe.yaml").exists():
        tasks = write_tasks(folder / "tasks", rows=200, negatives=7)
        (folder / "recipe.yaml").write_text(recipe_text(tasks, arguments))
    loaded = recipes.load(folder / "recipe.yaml")
    plans = make_plans(loaded, folder / "runs", needed=["learn-weights"])
    for stage in ("backbone", "train-ref"):
        run_plan(plans[stage], Machines(), Silent())
    plan = plans["learn-weights"]
    batches = all_batches(plan)
    found = {}
    for cache in ("cold", "warm"):
        shutil.rmtree(plan.folder, ignore_errors=True)
        if cache == "cold":
            for path in Path(plan.cache).glob("reference_losses*"):
                path.unlink()
        plain = None
        if not arguments.only_ours:
            plain = plain_side(plan, arguments.micro_batch or arguments.queries, arguments.chunk)
        turns, metrics, losses = run_stage(loaded, folder / "runs", plain, batches)
        found[cache] = report(cache, turns, metrics, losses, batches, arguments, plain)
        print(json.dumps(found[cache]), flush=True)
    if not arguments.only_ours:
        ratios = {f"{kind}_{cache}": found[cache][kind] for cache in found for kind in ("ratio", "cpu_ratio")}
        print(json.dumps(ratios))


def total(costs: list[Cost]) -> Cost:
    return Cost(*map(sum, zip(*costs, strict=True)))


def report(
    cache: str, turns: Turns, metrics: list[dict], losses: Any, batches: list[Any], arguments: Any, plain: Plain | None
) -> dict[str, Any]:
    real = sum(len(tokens) for batch in batches for tokens in batch.queries + batch.passages)
    texts = [len(tokens) for batch in batches for tokens in batch.passages]
    ours = total(turns.ours[FIRST:])
    result = {
        "reference_cache": cache,
        "cores": arguments.threads,
        "queries": arguments.queries,
        "steps": arguments.steps,
        "mean_passage_tokens": round(sum(texts) / len(texts), 1),
        "ours_examples_per_second": round(arguments.queries * arguments.steps / ours.wall, 2),
        "ours_padding_share": round(sum(line["padding_share"] for line in metrics) / len(metrics), 3),
    }
    if plain is None:
        return result
    theirs = total(turns.theirs[FIRST:])
    return {
        **result,
        "plain_examples_per_second": round(arguments.queries * arguments.steps / theirs.wall, 2),
        "plain_padding_share": round(1 - 2 * real / plain.computed, 3),  # counted in the two passes without gradients
        "largest_difference": disagreement(turns, metrics, losses),
        "ratio": round(theirs.wall / ours.wall, 2),
        "cpu_ratio": round(theirs.cpu / ours.cpu, 2),
    }


if __name__ == "__main__":
    main()
