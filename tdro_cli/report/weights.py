"""What learn-weights leaves behind: weights.json, the trajectory, every query's losses, and what they say.

G tasks, S steps.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tdro_cli import artifacts, registry
from tdro_cli.builtin.loss_measurements import Absolute, Excess, Relative, RelativeOfficial
from tdro_cli.learn.dro import WeightState, effective_tasks, replay
from tdro_cli.learn.training import read_metrics
from tdro_cli.learn.weight_learning import LossLog, final_weights, task_losses
from tdro_cli.run.plan import Plan
from tdro_cli.run.progress import Progress

NEAR_ZERO = 0.05  # nats; a task with a mean reference loss under it is solved, and its ratio is noise
COLLAPSED = 0.1  # of an equal share


def publish_weights(
    plan: Plan,
    names: Sequence[str],
    state: WeightState,
    updater: Any,
    log: LossLog,
    seen_G: np.ndarray,
    tasks: Sequence[Any],
    counts: Mapping[str, Any],
    progress: Progress,
) -> None:
    """Writes the stage's output."""
    from tdro_cli.report.figures import weight_figures
    from tdro_cli.run.worker import publishing

    section = plan.settings().learn_weights
    metrics = read_metrics(Path(plan.folder) / "metrics.jsonl")
    columns = final_weights(updater, state)
    weights = {
        "schema": 1,
        "steps": section.steps,
        "loss_measurement": section.loss_measurement.name,
        "weight_updater": section.weight_updater.name,
        "tasks": {
            name: {
                **{column: float(values[i]) for column, values in columns.items()},
                "size": len(tasks[i].store),
                "queries_seen": int(seen_G[i]),
            }
            for i, name in enumerate(names)
        },
    }
    summary = summarize(plan, names, metrics, log, columns["weight"]) | {"reference": dict(counts)}
    with publishing(plan) as out:
        artifacts.write_json(out / "weights.json", weights)
        artifacts.write_json(out / "summary.json", summary)
        shutil.copyfile(Path(plan.folder) / "metrics.jsonl", out / "metrics.jsonl")
        _write_trajectory(out / "trajectory.parquet", metrics)
        _write_losses(out / "losses.parquet", log, names)
        weight_figures(out, weights, metrics)
    for warning in summary["warnings"]:
        progress.warn(warning)
    log.path.unlink()  # now losses.parquet


def summarize(
    plan: Plan, names: Sequence[str], metrics: Sequence[Mapping[str, Any]], log: LossLog, weight_G: np.ndarray
) -> dict[str, Any]:
    """What moved, whether it has settled, what binds, and the weights that other measurements would have given."""
    section = plan.settings().learn_weights
    table = {
        key: _column(metrics, names, key)
        for key in ("weight", "reference_loss", "proxy_loss", "measurement", "standard_error")
    }
    reference_G = (
        np.nanmean(table["reference_loss"], axis=0)
        if metrics[0]["tasks"][names[0]].get("reference_loss") is not None
        else None
    )
    uniform = 1 / len(names)
    warnings = []
    for i, name in enumerate(names):
        if reference_G is not None and reference_G[i] < NEAR_ZERO:
            warnings.append(
                f"task {name}: the reference's mean loss is {reference_G[i]:.2g} nats: solved, or its negatives are too easy; "
                "its weight says little"
            )
        if weight_G[i] < COLLAPSED * uniform:
            warnings.append(f"task {name}: its weight {weight_G[i]:.2g} is under a tenth of an equal share")
    records = log.read()
    bound = _floor_binds(section, records, len(names))
    noise = np.nanmean(table["standard_error"], axis=0) if "standard_error" in metrics[0]["tasks"][names[0]] else None
    spread = float(np.std(np.nanmean(table["measurement"], axis=0)))
    settled = _settled(table["weight"])
    if noise is not None and float(np.nanmedian(noise)) > spread:
        warnings.append(
            f"differences between tasks are within noise: the median standard error of a step's measurement is "
            f"{np.nanmedian(noise):.2g}, their spread over tasks {spread:.2g}; use more queries per task or a higher temperature"
        )
    if not settled["settled"]:
        warnings.append("the weights have not settled: " + settled["words"])
    moved = np.argsort(weight_G)
    return {
        "effective_tasks": effective_tasks(torch.from_numpy(weight_G)),
        "raised": [names[i] for i in moved[::-1][:3] if weight_G[i] > uniform],
        "lowered": [names[i] for i in moved[:3] if weight_G[i] < uniform],
        "convergence": settled,
        "top_share": float(np.mean([line["top_share"] for line in metrics])),
        "clamped_share": _mean_of(metrics, "clamped_share"),
        "floor_binds": bound and dict(zip(names, bound, strict=True)),
        "tasks": {
            name: {
                "proxy_loss": float(np.nanmean(table["proxy_loss"][:, i])),
                "reference_loss": None if reference_G is None else float(reference_G[i]),
                "measurement": float(np.nanmean(table["measurement"][:, i])),
                "standard_error": None if noise is None else float(noise[i]),
            }
            for i, name in enumerate(names)
        },
        "counterfactual": counterfactual(section, records, names),
        "warnings": warnings,
    }


def counterfactual(section: Any, records: np.ndarray, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Final weights that other measurements would have given on this run's losses: {measurement: {task: weight}}.

    The proxy was trained with this run's own weights, so a run of their own may differ.
    """
    if np.isnan(records["reference"][0, 0]):
        return {}
    updater = registry.resolve("weight_updaters", section.weight_updater.name, section.weight_updater.options)
    if getattr(updater, "samples", False):
        return {}
    losses = [task_losses(step, len(names), section.batch.parts) for step in records]
    uniform_G = torch.full((len(names),), 1 / len(names))
    designs = {
        "relative, floor 0.001": Relative(floor=0.001),
        "relative, floor 0.01": Relative(floor=0.01),
        "relative, floor 0.05": Relative(floor=0.05),
        "relative, shrinkage 0.05": Relative(floor=0.0, shrinkage=0.05),
        "relative, shrinkage 0.2": Relative(floor=0.0, shrinkage=0.2),
        "relative_official": RelativeOfficial(),
        "excess": Excess(),
        "absolute": Absolute(),
    }
    weights = {}
    for design, measurement in designs.items():
        end = replay(losses, measurement, updater, uniform_G, absent_tasks=section.absent_tasks).weights_SG[-1]
        weights[design] = {name: float(weight) for name, weight in zip(names, end, strict=True)}
    return weights


def _floor_binds(section: Any, records: np.ndarray, num_tasks: int) -> list[float] | None:
    """Share of the steps in which the measurement's floor bound, of each task."""
    measurement = registry.resolve("loss_measurements", section.loss_measurement.name, section.loss_measurement.options)
    if not hasattr(measurement, "floor_binds"):
        return None
    losses = (task_losses(step, num_tasks, section.batch.parts) for step in records)
    return torch.stack([measurement.floor_binds(batch) for batch in losses]).double().mean(0).tolist()


def _settled(weight_SG: np.ndarray) -> dict[str, Any]:
    """Whether the last fifth of the steps still moved the weights, against how far they had moved in all."""
    steps = len(weight_SG)
    log_SG = np.log(weight_SG)
    tail = max(1, steps // 5)
    moved = float(np.abs(log_SG[-1] - log_SG[-1 - tail if steps > tail else 0]).mean())
    total = float(np.abs(log_SG[-1] + np.log(weight_SG.shape[1])).mean())
    share = moved / total if total > 0 else 0.0
    half = steps // 2
    first, second = log_SG[half] - log_SG[0], log_SG[-1] - log_SG[half]
    alike = float(np.corrcoef(first, second)[0, 1]) if steps > 3 and first.std() > 0 and second.std() > 0 else None
    return {
        "last_fifth_share": share,
        "halves_correlation": alike,
        "settled": share < 0.3,
        "words": f"the last fifth of the steps made {share:.0%} of the whole movement"
        + (f"; the increments of both halves correlate {alike:.2f}" if alike is not None else ""),
    }


def _column(metrics: Sequence[Mapping[str, Any]], names: Sequence[str], key: str) -> np.ndarray:
    """A number of every step and task: [S, G], NaN where there is none."""
    rows = [[line["tasks"][name].get(key) for name in names] for line in metrics]
    return np.array([[np.nan if value is None else value for value in row] for row in rows], dtype=np.float64)


def _mean_of(metrics: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [line[key] for line in metrics if line.get(key) is not None]
    return float(np.mean(values)) if values else None


def _write_trajectory(path: Path, metrics: Sequence[Mapping[str, Any]]) -> None:
    """One row a step and task."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"step": line["step"], "task": name, **values} for line in metrics for name, values in line["tasks"].items()
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)


def _write_losses(path: Path, log: LossLog, names: Sequence[str]) -> None:
    """One row a step and query: task, row of the task's file, proxy and reference loss."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    records = log.read()
    schema = pa.schema(
        [
            ("step", pa.int32()),
            ("task", pa.dictionary(pa.int32(), pa.string())),
            ("row", pa.int64()),
            ("proxy", pa.float32()),
            ("reference", pa.float32()),
        ]
    )
    with pq.ParquetWriter(path, schema) as writer:
        for step, batch in enumerate(records):
            columns = [
                pa.array(np.full(len(batch), step, dtype=np.int32)),
                pa.DictionaryArray.from_arrays(pa.array(np.ascontiguousarray(batch["task"])), pa.array(list(names))),
                *(pa.array(np.ascontiguousarray(batch[name])) for name in ("row", "proxy", "reference")),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
