"""transfer: from learned weights to the sampling plan that finetune follows."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tdro_cli import artifacts, registry
from tdro_cli.errors import TdroError, did_you_mean
from tdro_cli.recipe import Transfer

MOST = sys.float_info.max
COLUMN = {"final": "weight", "mean": "mean", "ema": "ema"}


def read_weights(path: Path, which: str = "final") -> dict[str, float]:
    """Task weights from our weights.json (`final`, `mean` or `ema`), or from a file of the authors' release.

    Raises TdroError if it is neither, or if a weight is no finite number >= 0, or none is more than 0.
    """
    try:
        content = artifacts.read_json(path)
    except (OSError, ValueError) as error:
        raise TdroError(f"can't read weights: {error}", where=str(path), remedy="name a weights.json") from None
    try:
        if "domain_weights" in content:  # the authors' name for them
            weights = dict(content["domain_weights"].items())
        else:
            weights = {name: task[COLUMN[which]] for name, task in content["tasks"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise TdroError(
            "this is no file of task weights",
            where=str(path),
            remedy='expected {"schema": 1, "tasks": {NAME: {"weight": ...}}} or {"domain_weights": {NAME: ...}}',
        ) from None
    remedy = "a weight is a number >= 0, and at least one is more"
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= MOST:
            raise TdroError(f"the weight of {name!r} is {str(weight)[:80]}", where=str(path), remedy=remedy)
    if not any(weights.values()):
        raise TdroError("all weights are 0" if weights else "there are no weights", where=str(path), remedy=remedy)
    return {name: float(weight) for name, weight in weights.items()}


def sampling_plan(section: Transfer, weights_file: str | None, sizes: Mapping[str, int], draws: int) -> dict[str, Any]:
    """The content of sampling.json. `sizes`: examples of each task; `draws`: queries that finetune will take.

    `weights_file` may be None for a strategy that reads no weights. Raises TdroError if weights and tasks don't match.
    """
    strategy = registry.resolve(
        "transfer_strategies", section.strategy.name, section.strategy.options, where="transfer.strategy"
    )
    weights: dict[str, float] = {}
    if getattr(strategy, "needs_weights", True):
        found = read_weights(Path(str(weights_file)), section.weights)
        unknown = [name for name in sizes if name not in found]
        if unknown:
            raise TdroError(
                f"there is no weight for the task {unknown[0]!r}"
                + (f" and {len(unknown) - 1} others" if unknown[1:] else ""),
                where=str(weights_file),
                remedy=did_you_mean(unknown[0], found),
            )
        weights = {name: found[name] for name in sizes}
    options = {"draws": draws} if "draws" in inspect.signature(strategy.__call__).parameters else {}
    try:
        probabilities = strategy(weights, sizes, **options)
    except (ValueError, TdroError) as error:
        remedy = getattr(error, "remedy", None) or "change those options"
        message = error.message if isinstance(error, TdroError) else str(error)
        raise TdroError(message, where="transfer.strategy.options", remedy=remedy) from None
    plan: dict[str, Any] = {
        "schema": 1,
        "strategy": section.strategy.name,
        "options": dict(section.strategy.options),
        "weights": section.weights if weights else None,
        "draws": draws,
        "data_used": sum(sizes[name] for name in probabilities) / sum(sizes.values()),
        "tasks": {
            name: {
                "weight": weights.get(name),
                "probability": probability,
                "size": sizes[name],
                "draws": probability * draws,
                "epochs": probability * draws / sizes[name],
            }
            for name, probability in probabilities.items()
        },
    }
    if getattr(strategy, "scales_loss", False):
        plan["loss_weights"] = strategy.loss_weights(weights)
    return plan
