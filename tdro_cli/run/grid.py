"""Ablations: one recipe with several values of some keys and several seeds, sharing every stage that does not differ."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdro_cli import artifacts
from tdro_cli import recipe as recipes
from tdro_cli.errors import Problems, TdroError
from tdro_cli.run.launch import Machines, run_plan
from tdro_cli.run.plan import STAGES, Plan, make_plans
from tdro_cli.run.progress import Progress

_OUTSIDE_BRACKETS = re.compile(r",(?![^\[{(]*[\]})])")


@dataclass(frozen=True)
class Variant:
    """One combination of values: `label` tells it from the others, `overrides` makes it."""

    label: str
    overrides: tuple[str, ...]


def variants(grid: Sequence[str]) -> list[Variant]:
    """All combinations of `key.path=value,value,...`. Raises TdroError for a grid that is not of that form."""
    axes = []
    for axis in grid:
        key, equals, values = axis.partition("=")
        if not equals or not key or not values:
            raise TdroError(f"--grid {axis!r} is not key.path=value,value", remedy="for instance --grid seed=1,2")
        axes.append([(key, value) for value in _OUTSIDE_BRACKETS.split(values)])
    return [
        Variant(
            label=", ".join(value if len(axes) == 1 else f"{_short(key)} {value}" for key, value in combination)
            or "recipe",
            overrides=tuple(f"{key}={value}" for key, value in combination),
        )
        for combination in itertools.product(*axes)
    ]


def _short(key: str) -> str:
    """The part of a key path that says what it is: 'learn_weights.loss_measurement.name' -> 'loss_measurement'."""
    parts = [part for part in key.split(".") if part not in ("name", "options")]
    return parts[-1] if parts else key


def run_grid(
    stage: str,
    recipe: Path,
    overrides: Sequence[str],
    grid: Sequence[str],
    seeds: int,
    runs: Path,
    machines: Machines,
    shown: Progress,
) -> dict[str, Any]:
    """Runs `stage` ("learn-weights" or "eval") for every combination and seed; returns what the tables show.

    All recipes are checked before the first is run.
    """
    base = recipes.load(recipe, overrides).recipe
    seed_of = [base.seed + number for number in range(seeds)]
    fixed = [] if base.data_seed is not None else [f"data_seed={base.seed}"]
    if stage == "eval":
        if base.eval is None:
            raise TdroError("the recipe has no section 'eval'", where=str(recipe), remedy="add `eval:` with benchmarks")
        fixed += ["eval.models=[finetune]", "eval.compare_to=null"]
    chosen = variants(grid)
    problems: list[TdroError] = []
    loaded = {}
    for variant, seed in itertools.product(chosen, seed_of):
        try:
            loaded[variant.label, seed] = recipes.load(recipe, [*overrides, *fixed, *variant.overrides, f"seed={seed}"])
        except TdroError as error:
            problems += error.errors if isinstance(error, Problems) else [error]
    if problems:
        raise Problems(problems)
    plans: dict[tuple[str, int], dict[str, Plan]] = {}
    for (label, seed), one in loaded.items():
        shown.note(f"{label}, seed {seed}")
        plans[label, seed] = make_plans(one, runs, needed=STAGES if stage == "eval" else (stage,))
        _run_all(plans[label, seed], machines, shown)
    labels = [variant.label for variant in chosen]
    if stage == "learn-weights":
        return weights_by_design(plans, labels, seed_of)
    beside = [model for model in base.eval.models if model != "finetune"]
    baselines = {}
    if beside:
        for seed in seed_of:
            more = [f"eval.models=[{', '.join(beside)}]", "eval.compare_to=null", f"seed={seed}"]
            one = recipes.load(recipe, [*overrides, *fixed, *more])
            baselines[seed] = make_plans(one, runs, needed=("eval",))
            shown.note(f"{', '.join(beside)}, seed {seed}")
            _run_all(baselines[seed], machines, shown)
    return measures_by_design(plans, baselines, beside, labels, seed_of)


def _run_all(plans: Mapping[str, Plan], machines: Machines, shown: Progress) -> None:
    for plan in plans.values():
        state = "complete" if artifacts.is_complete(plan.out) else "running"
        shown.note(f"  {plan.stage}: {state}, {plan.folder}")
        run_plan(plan, machines, shown)


# ---- what the tables show ----


def weights_by_design(
    plans: Mapping[tuple[str, int], Mapping[str, Plan]], labels: Sequence[str], seeds: Sequence[int]
) -> dict[str, Any]:
    """Final weights of each design: mean and standard deviation over seeds, and rank correlations between designs."""
    import numpy as np
    from scipy.stats import spearmanr

    weights = {
        label: [
            artifacts.read_json(plans[label, seed]["learn-weights"].out / "weights.json")["tasks"] for seed in seeds
        ]
        for label in labels
    }
    names = list(weights[labels[0]][0])
    alpha = {
        label: np.array([[run[name]["weight"] for name in names] for run in runs]) for label, runs in weights.items()
    }
    mean = {label: values.mean(0) for label, values in alpha.items()}
    spread = {label: values.std(0, ddof=1) if len(seeds) > 1 else None for label, values in alpha.items()}
    forwards = {
        label: [
            artifacts.read_json(plans[label, seed]["learn-weights"].out / "summary.json")["reference"]["forwards"]
            for seed in seeds
        ]
        for label in labels
    }
    return {
        "stage": "learn-weights",
        "seeds": list(seeds),
        "designs": {
            label: {
                "tasks": {
                    name: {
                        "mean": float(mean[label][i]),
                        "sd": None if spread[label] is None else float(spread[label][i]),
                    }
                    for i, name in enumerate(names)
                },
                "effective_tasks": float(np.exp(-(mean[label] * np.log(mean[label])).sum())),
                "between_seeds": _mean_correlation(alpha[label]),
                "reference_forwards": forwards[label],
            }
            for label in labels
        },
        "rank_correlation": {a: {b: float(spearmanr(mean[a], mean[b]).statistic) for b in labels} for a in labels},
    }


def _mean_correlation(alpha_SG: Any) -> float | None:
    """Mean rank correlation between the weights of two seeds; None for one seed."""
    from scipy.stats import spearmanr

    pairs = list(itertools.combinations(alpha_SG, 2))
    return float(sum(spearmanr(a, b).statistic for a, b in pairs) / len(pairs)) if pairs else None


def measures_by_design(
    plans: Mapping[tuple[str, int], Mapping[str, Plan]],
    baselines: Mapping[int, Mapping[str, Plan]],
    beside: Sequence[str],
    labels: Sequence[str],
    seeds: Sequence[int],
) -> dict[str, Any]:
    """Measures of each design over seeds, the share of the data it uses, and tests against the first design."""
    from tdro_cli.retrieve.evaluation import compare, compare_seeds, folder_name, read_per_query

    reference = next((label for label in labels if label == "uniform"), labels[0])
    rows: dict[str, Any] = {}
    for model in beside:
        found = [
            artifacts.read_json(baselines[seed]["eval"].out / folder_name(model) / "measures.json") for seed in seeds
        ]
        rows[model] = {"data_used": None, "measures": _over_seeds(found)}
    for label in labels:
        found = [artifacts.read_json(plans[label, seed]["eval"].out / "finetune" / "measures.json") for seed in seeds]
        used = [
            artifacts.read_json(plans[label, seed]["transfer"].out / "sampling.json")["data_used"] for seed in seeds
        ]
        rows[label] = {"data_used": sum(used) / len(used), "measures": _over_seeds(found)}

    def values(label: str, seed: int) -> Any:
        return read_per_query(plans[label, seed]["eval"].out / "finetune" / "per_query.parquet")

    tests = {}
    for label in labels:
        if label != reference:
            if len(seeds) > 1:
                pairs = [(values(reference, seed), values(label, seed)) for seed in seeds]
                tests[label] = compare_seeds(pairs, baseline=reference, model=label)
            else:
                both = {reference: values(reference, seeds[0]), label: values(label, seeds[0])}
                tests[label] = compare(both, baseline=reference)
    return {"stage": "eval", "seeds": list(seeds), "baseline": reference, "rows": rows, "tests": tests}


def _over_seeds(found: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """{collection or "average": {measure: {"mean", "sd"}}} over the seeds."""
    from statistics import mean, stdev

    tables = [{**one["results"], "average": one["average"]} for one in found]
    return {
        collection: {
            measure: {
                "mean": mean(values := [table[collection][measure] for table in tables]),
                "sd": stdev(values) if len(values) > 1 else None,
            }
            for measure in tables[0][collection]
        }
        for collection in tables[0]
    }
