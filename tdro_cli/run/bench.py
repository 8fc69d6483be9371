"""`tdro bench`: what a recipe's training steps cost on this machine, by running a few of them.

The stages themselves run, on the recipe's data, in a folder that is removed afterwards.
"""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdro_cli import artifacts, registry
from tdro_cli.errors import TdroError, did_you_mean
from tdro_cli.recipe import LoadedRecipe, PluginChoice, Recipe
from tdro_cli.run import timing
from tdro_cli.run.launch import Machines, run_plan
from tdro_cli.run.plan import Plan, make_plans, open_tasks
from tdro_cli.run.progress import Progress, Silent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tdro_cli.data.tokenization import TextTokenizer
    from tdro_cli.model.encoder import TextEncoder

STAGES = ("learn-weights", "finetune")
WARM_UP = 1  # steps that set up kernels and are not counted
PARTS = ("data", "reference", "forward", "backward", "optimizer", "communication")


def choose(names: Sequence[str]) -> tuple[str, ...]:
    """The stages named, in their order; all where none is. Raises TdroError for another."""
    for name in names:
        if name not in STAGES:
            raise TdroError(f"no steps to measure in {name!r}", where="--stage", remedy=did_you_mean(name, STAGES))
    return tuple(stage for stage in STAGES if stage in names or not names)


def bench_recipe(
    loaded: LoadedRecipe, stages: tuple[str, ...], steps: int, runs: Path, machines: Machines, shown: Progress
) -> dict[str, Any]:
    """Runs `steps` steps of each stage; the cost of a step, and of all the recipe's steps."""
    runs.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".bench-", dir=runs))
    try:
        (runs / ".cache").mkdir(exist_ok=True)
        _share_cache(runs / ".cache", folder / ".cache")
        shortened = _shortened(loaded, stages, steps, runs, shown)
        plans = make_plans(shortened, folder, needed=stages)
        for plan in plans.values():
            if plan.stage not in stages:
                shown.note(f"{plan.stage}: what the measured stages start from")
                run_plan(plan, Machines(), Silent())
        peak = measured_peak(shortened.recipe.backbone.dtype)
        return {
            "recipe": loaded.recipe.name,
            "dtype": shortened.recipe.backbone.dtype,
            "peak_flops": peak,
            "stages": [_measure(plans[stage], loaded.recipe, peak, machines, shown) for stage in stages],
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _share_cache(cache: Path, link: Path) -> None:
    """The caches of rows and tokens are shared; that of reference losses isn't: the models here are stand-ins."""
    link.mkdir()
    for name in ("tasks", "tokens"):
        (cache / name).mkdir(exist_ok=True)
        (link / name).symlink_to((cache / name).resolve())


def _shortened(loaded: LoadedRecipe, stages: tuple[str, ...], steps: int, runs: Path, shown: Progress) -> LoadedRecipe:
    """The recipe with few steps, a stand-in for the reference, and the data that training would read."""
    recipe = loaded.recipe
    files = _training_files(loaded, runs, shown)
    tasks = [task.model_copy(update={"path": files[task.name]}) for task in recipe.tasks]
    if "learn-weights" in stages:
        stores = open_tasks(recipe, files, runs / ".cache")
        without = [task.name for task in tasks if not len(stores[task.name].rows_with_negatives())]
        if len(without) == len(tasks):
            raise TdroError("no task has hard negatives", where=str(loaded.path), remedy="run `tdro mine` first")
        if without:
            shown.warn(f"left out, for they have no hard negatives yet (run `tdro mine`): {', '.join(without)}")
        tasks = [task for task in tasks if task.name not in without]
    count = WARM_UP + steps
    small = recipe.train_ref.model_copy(
        update={"steps": 1, "batch": recipe.train_ref.batch.model_copy(update={"queries": 2})}
    )
    changes = {
        "tasks": tasks,
        "mine": None,
        "dedup": None,
        "eval": None,
        "train_ref": small,
        "learn_weights": recipe.learn_weights.model_copy(update={"steps": count, "rows": "all"}),
        "transfer": recipe.transfer.model_copy(update={"strategy": PluginChoice(name="uniform"), "weights_from": None}),
        "finetune": recipe.finetune.model_copy(update={"steps": count, "rows": "all"}),
    }
    return replace(loaded, recipe=recipe.model_copy(update=changes))


def _training_files(loaded: LoadedRecipe, runs: Path, shown: Progress) -> dict[str, str]:
    """The files of the recipe's last stage of data that is complete, else the recipe's own."""
    missing = []
    for stage in ("dedup", "mine"):
        if getattr(loaded.recipe, stage) is None:
            continue
        plan = make_plans(loaded, runs, needed=[stage])[stage]
        if artifacts.is_complete(plan.out):
            return {task.name: str(plan.out / "tasks" / f"{task.name}.jsonl.gz") for task in loaded.recipe.tasks}
        missing.append(stage)
    if missing:
        shown.warn(f"{' and '.join(missing)} have not run yet: measured on the training files as they are")
    return {task.name: task.path for task in loaded.recipe.tasks}


# ---- one stage ----


def _measure(plan: Plan, whole: Recipe, peak_flops: float, machines: Machines, shown: Progress) -> dict[str, Any]:
    from tdro_cli.learn.training import backbone_source, load_encoder, read_metrics

    shown.note(f"{plan.stage}: {_section(plan.settings(), plan.stage).steps} steps")
    with _timing():
        run_plan(plan, machines, Silent())  # what it would warn about concerns what it learns
    lines = read_metrics(Path(plan.folder) / "metrics.jsonl")
    encoder, tokenizer = load_encoder(plan.settings(), backbone_source(plan), lora=False)
    draws = encoder.draws_at_random or bool(whole.lora and whole.lora.dropout)
    texts, shape = texts_of_steps(plan, tokenizer, once=not draws)[WARM_UP:], model_shape(encoder)
    at = [line["seconds"]["at"] for line in lines]
    wall = [now - before for before, now in itertools.pairwise(at)]
    seconds = {name: sum(line["seconds"].get(name, 0.0) for line in lines[WARM_UP:]) for name in PARTS}
    step_seconds = statistics.median(wall)
    steps = _section(whole, plan.stage).steps
    useful = passes(whole, plan.stage) * sum(shape.forward_flops(length) for lengths in texts for length in lengths)
    total = sum(wall)
    result = {
        "stage": plan.stage,
        "steps": len(wall),
        "seconds_per_step": step_seconds,
        "tokens_per_second": sum(map(sum, texts)) / total,
        "examples_per_second": _section(whole, plan.stage).batch.queries * len(wall) / total,
        "padding_share": statistics.mean(line["padding_share"] for line in lines[WARM_UP:]),
        "shares": {**{name: value / total for name, value in seconds.items()}},
        "model_flop_utilisation": useful / total / peak_flops / _devices(machines),
        "peak_memory_bytes": max(line["peak_memory_bytes"] for line in lines),
        "projected_hours": step_seconds * steps / 3600,
        "recipe_steps": steps,
    }
    result["shares"]["other"] = 1 - sum(result["shares"].values())
    if plan.stage == "learn-weights":
        warm = step_seconds * (1 - result["shares"]["reference"])
        result["projected_hours_with_cached_reference"] = warm * steps / 3600
    return result


def passes(recipe: Recipe, stage: str) -> int:
    """What a step needs, in forward passes: a backward is two, the reference's forward one more."""
    if stage == "finetune":
        return 3
    choice = recipe.learn_weights.loss_measurement
    measurement = registry.resolve("loss_measurements", choice.name, choice.options)
    return 3 + bool(getattr(measurement, "needs_reference", True))


def _devices(machines: Machines) -> int:
    """How many of what `measured_peak` measured: GPUs, else the processor, which the ranks share."""
    import torch

    return machines.ranks if torch.cuda.is_available() else 1


def _section(recipe: Recipe, stage: str) -> Any:
    return getattr(recipe, stage.replace("-", "_"))


@contextmanager
def _timing() -> Iterator[None]:
    """Ranks inherit the switch through their environment."""
    before = os.environ.get(timing.SWITCH)
    os.environ[timing.SWITCH] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[timing.SWITCH]
        else:
            os.environ[timing.SWITCH] = before


def texts_of_steps(plan: Plan, tokenizer: TextTokenizer, *, once: bool) -> list[list[int]]:
    """Lengths in tokens of the texts of every step's global batch; equal ones `once`, as they are then computed.

    As drawn by equal weights, from which an updater that samples departs.
    """
    from tdro_cli.data.batching import BatchPlan
    from tdro_cli.data.loading import Arriving, Collation
    from tdro_cli.learn.training import training_tasks
    from tdro_cli.model.packing import distinct

    recipe, section = plan.settings(), _section(plan.settings(), plan.stage)
    learning = plan.stage == "learn-weights"
    tasks = training_tasks(plan, "all", need_negatives=learning)
    batches = BatchPlan(
        seed=recipe.seed,
        queries=section.batch.queries,
        sizes=tuple(len(task.rows) for task in tasks),
        probabilities=(1 / len(tasks),) * len(tasks),
        composition="mixed" if learning else section.batch.composition,
        draws=section.batch.draws,
    )
    collation = Collation(batches, tasks, tokenizer, 0, 1, section.batch.passages_per_query - 1)
    arriving = Arriving(collation, range(section.steps), workers=0)
    steps = [batch.queries + batch.passages for _, batch in arriving]
    return [[len(tokens) for tokens in (distinct(texts)[0] if once else texts)] for texts in steps]


@dataclass(frozen=True)
class ModelShape:
    """What a forward pass computes: weights of its matrices (no embedding table), layers, width of attention."""

    weights: int
    layers: int
    attention_width: int
    causal: bool

    def forward_flops(self, length: int) -> float:
        """Of one text of `length` tokens: 2 a weight and token, 4 a pair of tokens and channel, half where causal."""
        pairs = length * length / (2 if self.causal else 1)
        return 2.0 * self.weights * length + 4.0 * self.layers * self.attention_width * pairs


def model_shape(encoder: TextEncoder) -> ModelShape:
    from tdro_cli.model.encoder import is_causal

    backbone: Any = encoder.backbone
    config: Any = backbone.config.get_text_config()
    tables = {id(p) for name, p in encoder.named_parameters() if "embed" in name}
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    return ModelShape(
        weights=sum(p.numel() for p in encoder.parameters() if p.ndim > 1 and id(p) not in tables),
        layers=config.num_hidden_layers,
        attention_width=heads * head,
        causal=is_causal(encoder.backbone),
    )


def measured_peak(dtype: str) -> float:
    """Floating-point operations a second of the fastest of a few large matrix products on this device."""
    import torch

    cuda = torch.cuda.is_available()
    device, size = ("cuda", 8192) if cuda else ("cpu", 2048)
    left, right = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    best = float("inf")
    for _ in range(10 if cuda else 4):
        began = time.perf_counter()
        left @ right
        if cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best


# ---- what is shown ----


def print_bench(result: Mapping[str, Any]) -> None:
    from rich.table import Table

    from tdro_cli.report.tables import terminal
    from tdro_cli.run.progress import duration

    table = Table(title=f"{result['recipe']}, {result['dtype']}: {result['peak_flops'] / 1e9:,.0f} GFLOP/s at most")
    table.add_column("")
    for stage in result["stages"]:
        table.add_column(f"{stage['stage']} ({stage['steps']} steps)", justify="right")
    rows: dict[str, Any] = {
        "seconds a step": lambda s: f"{s['seconds_per_step']:.2f}",
        "real tokens/s": lambda s: f"{s['tokens_per_second']:,.0f}",
        "examples/s": lambda s: f"{s['examples_per_second']:,.1f}",
        "padding": lambda s: f"{s['padding_share']:.1%}",
        **{f"  of the time: {name}": lambda s, name=name: f"{s['shares'][name]:.1%}" for name in (*PARTS, "other")},
        "FLOP utilisation, real tokens": lambda s: f"{s['model_flop_utilisation']:.1%}",
        "peak memory": lambda s: f"{s['peak_memory_bytes'] / 2**30:.2f} GiB",
        "the recipe's steps": lambda s: f"{s['recipe_steps']:,}",
        "  take": lambda s: duration(3600 * s["projected_hours"]),
        "  with cached reference": lambda s: (
            duration(3600 * s["projected_hours_with_cached_reference"])
            if "projected_hours_with_cached_reference" in s
            else ""
        ),
    }
    for name, show in rows.items():
        table.add_row(name, *map(show, result["stages"]))
    terminal().print(table)
