"""The arithmetic of learning task weights: pure functions from tensors to tensors.

B queries, G tasks, S steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from tdro_cli.protocols import (
    GradientUpdater,
    LossMeasurement,
    SizedUpdater,
    State,
    StatefulMeasurement,
    TaskLosses,
    WeightUpdater,
)

AbsentTasks = Literal["last", "zero"]

# ---- the proxy's loss ----


def robust_loss(loss_B: Tensor, task_B: Tensor, weights_G: Tensor) -> Tensor:
    """Σ w_i ℓ_i / Σ w_i over the given queries, w_i the weight of the query's task: a scalar, float32.

    No gradient reaches the weights. arXiv:2408.10613, equation 6, normalised over the global batch.
    """
    return (query_weights(task_B, weights_G) * loss_B.float()).sum()


def query_weights(task_B: Tensor, weights_G: Tensor) -> Tensor:
    """w_i / Σ w over a whole global batch: [B], float32, sums to 1.

    Σ query_weights · loss over a micro-batch, summed over micro-batches and ranks, is `robust_loss` of the global batch
    (where ranks average their gradients, times the number of ranks).
    """
    weight_B = weights_G.detach().float().to(task_B.device)[task_B]
    return weight_B / weight_B.sum()


# ---- measurements before the updater sees them ----


def clip_by_l2_norm(measurement_G: Tensor, max_norm: float) -> Tensor:
    """g · min(1, max_norm / (‖g‖ + 1e-6)), the rule of the authors' release; in the dtype given.

    The norm is taken in float64: ratios over a vanishing reference loss can be as large as float32 goes.
    """
    norm = measurement_G.double().norm()
    return (measurement_G.double() * (max_norm / (norm + 1e-6)).clamp(max=1.0)).to(measurement_G.dtype)


def require_finite(value_G: Tensor, what: str = "measurement") -> Tensor:
    """The values themselves. Raises ValueError that gives the tasks whose value isn't finite, numbered from 0."""
    bad = (~value_G.isfinite()).nonzero().flatten().tolist()
    if bad:
        listing = ", ".join(f"{number} ({value_G[number]:g})" for number in bad)
        raise ValueError(f"the {what} is not finite for task number {listing}, counted from 0")
    return value_G


def squared_norm_share(measurement_G: Tensor) -> Tensor:
    """Each task's part of the squared L2 norm: [G], float64, sums to 1 (all 0 for a zero vector)."""
    square_G = measurement_G.double().square()
    return square_G / square_G.sum().clamp_min(torch.finfo(torch.float64).tiny)


def fill_absent(measurement_G: Tensor, count_G: Tensor, last_G: Tensor | None, policy: AbsentTasks) -> Tensor:
    """The measurement with a value for tasks absent from the batch (`count_G` 0): [G].

    `last`: the task's last measured value out of `last_G` (see `last_measured`), before the first the mean of the tasks
    present. `zero`: as measured, like the authors' release, under which a rare task sinks by chance of absence.
    Raises ValueError for a batch without queries and for an unknown policy.
    """
    if policy not in ("last", "zero"):
        raise ValueError(f"absent_tasks must be 'last' or 'zero', got {policy!r}")
    present_G = count_G > 0
    if not present_G.any():
        raise ValueError("a batch without queries has no measurement")
    if policy == "zero":
        return measurement_G
    mean = measurement_G[present_G].mean()
    remembered_G = mean.expand_as(measurement_G) if last_G is None else torch.where(last_G.isnan(), mean, last_G)
    return torch.where(present_G, measurement_G, remembered_G)


def last_measured(measurement_G: Tensor, count_G: Tensor, last_G: Tensor | None) -> Tensor:
    """Each task's newest measured value: [G], NaN for a task that was never in a batch."""
    before_G = torch.full_like(measurement_G, torch.nan) if last_G is None else last_G
    return torch.where(count_G > 0, measurement_G, before_G)


# ---- what the weights look like ----


def effective_tasks(weights_G: Tensor) -> float:
    """exp of the entropy: G for uniform weights, 1 where a single task has everything."""
    weights_G = weights_G.double() / weights_G.double().sum()
    return float(torch.special.entr(weights_G).sum().exp())


def drift_over_noise(weight_SG: Tensor) -> float | None:
    """How far the weights went, against how far steps of the same lengths in random directions would have taken them.

    Mean over tasks of (Σ d)² / Σ d², d the steps of a task's log weight against the mean of all: 1 where the steps are
    noise, up to the number of steps where all go one way. None where no weight moved.
    """
    log_SG = weight_SG.double().log()
    step_SG = (log_SG - log_SG.mean(1, keepdim=True)).diff(dim=0)
    square_G = step_SG.square().sum(0)
    moved_G = square_G > 0
    if not moved_G.any():
        return None
    return float((step_SG.sum(0).square() / square_G)[moved_G].mean())


@dataclass(frozen=True)
class WeightAverages:
    """The running mean over updates, without the initial weights, and the moving average, which starts at them.

    [G] float64. Before the first update the mean is the initial weights. The rules of the authors' release.
    """

    mean_G: Tensor
    ema_G: Tensor
    updates: int = 0
    decay: float = 0.9

    @staticmethod
    def start(weights_G: Tensor) -> WeightAverages:
        return WeightAverages(weights_G.double().clone(), weights_G.double().clone())

    def update(self, weights_G: Tensor) -> WeightAverages:
        """The averages after one more update of the weights."""
        weights_G, updates = weights_G.double(), self.updates + 1
        mean_G = self.mean_G + (weights_G - self.mean_G) / updates
        return replace(
            self, mean_G=mean_G, ema_G=self.decay * self.ema_G + (1 - self.decay) * weights_G, updates=updates
        )


# ---- one update ----


@dataclass(frozen=True)
class WeightState:
    """All that an update of the weights leaves behind: `plain()` of it is a checkpoint."""

    updater: State
    measurement: State
    last_G: Tensor | None
    averages: WeightAverages

    def plain(self) -> dict[str, Any]:
        """As dicts, numbers and tensors, which torch.load(weights_only=True) takes."""
        return {**vars(self), "averages": dict(vars(self.averages))}

    @staticmethod
    def from_plain(plain: Mapping[str, Any]) -> WeightState:
        return WeightState(**{**plain, "averages": WeightAverages(**plain["averages"])})


def start_weights(
    measurement: LossMeasurement, updater: WeightUpdater, weights_G: Tensor, sizes_G: Tensor | None = None
) -> WeightState:
    """The state before the first update; `weights_G` sum to 1, `sizes_G` [G] int64 are the tasks' rows, if known."""
    start: State
    if sizes_G is not None and isinstance(updater, SizedUpdater):
        start = updater.start_with_sizes(weights_G.float(), sizes_G)
    else:
        start = updater.start(weights_G.float())
    return WeightState(
        updater=start,
        measurement=measurement.start(len(weights_G)) if isinstance(measurement, StatefulMeasurement) else None,
        last_G=None,
        averages=WeightAverages.start(weights_G),
    )


def update_weights(
    state: WeightState,
    measurement: LossMeasurement,
    updater: WeightUpdater,
    losses: TaskLosses,
    *,
    progress: float,
    absent_tasks: AbsentTasks = "last",
    product_GG: Tensor | None = None,
) -> tuple[WeightState, Tensor]:
    """The state after the losses of one global batch, and the measurement [G] as the updater saw it.

    Measures, fills in absent tasks, updates, averages. Does not change `state`. An updater with `samples = True` (a
    bandit) is always given 0 for an absent task: what it did not draw taught it nothing. `product_GG`: what a
    GradientUpdater reads. Raises ValueError for a loss or a measurement that isn't finite, naming the tasks by number.
    """
    for model, loss_B in (("proxy", losses.proxy), ("reference", losses.reference)):
        if loss_B is not None:  # a measurement may hide it: a loss over an infinite one is 0
            require_finite(losses.mean_by_task(loss_B), f"{model} loss")
    if isinstance(measurement, StatefulMeasurement):
        measurement_state, measured_G = measurement.measure(state.measurement, losses)
    else:
        measurement_state, measured_G = None, measurement(losses)
    measured_G, count_G = require_finite(measured_G.detach().float().cpu()), losses.counts().cpu()
    absent_tasks = "zero" if getattr(updater, "samples", None) else absent_tasks
    seen_G = fill_absent(measured_G, count_G, state.last_G, absent_tasks)
    if isinstance(updater, GradientUpdater):
        if product_GG is None:
            raise ValueError("an updater that reads gradients was given none")
        updater_state = updater.step_with_gradients(state.updater, seen_G, product_GG, progress=progress)
    else:
        updater_state = updater.step(state.updater, seen_G, progress=progress)
    after = WeightState(
        updater=updater_state,
        measurement=measurement_state,
        last_G=last_measured(measured_G, count_G, state.last_G),
        averages=state.averages.update(updater.weights(updater_state)),
    )
    return after, seen_G


def learned_weights(updater: WeightUpdater, state: WeightState) -> Tensor:
    """The updater's result: [G] float32. The mean where it has `output = "mean"` (DoReMi), else the last weights."""
    if getattr(updater, "output", None) == "mean":
        return state.averages.mean_G.float()
    return updater.weights(state.updater)


# ---- what another measurement would have given ----


@dataclass(frozen=True)
class Replay:
    """Weights after each step, row 0 the initial ones [S+1, G]; the measurements behind them [S, G]; the end state."""

    weights_SG: Tensor
    measurement_SG: Tensor
    state: WeightState


def replay(
    losses: Sequence[TaskLosses],
    measurement: LossMeasurement,
    updater: WeightUpdater,
    weights_G: Tensor,
    *,
    steps: int | None = None,
    sizes_G: Tensor | None = None,
    absent_tasks: AbsentTasks = "last",
) -> Replay:
    """The trajectory that logged losses give under another measurement, floor or updater, without running a model.

    Counterfactual: the proxy was trained with the weights of its own run. With the run's own measurement and updater it
    is the run's trajectory. An updater that also samples (`samples = True`) would have drawn other queries; one that
    reads gradients can't be replayed. `steps`: those that the run was planned for, of which it may have done fewer.
    """
    state = start_weights(measurement, updater, weights_G, sizes_G)
    weights, measured = [updater.weights(state.updater)], []
    for step, batch in enumerate(losses):
        progress = step / (steps or len(losses))
        state, measurement_G = update_weights(
            state, measurement, updater, batch, progress=progress, absent_tasks=absent_tasks
        )
        weights.append(updater.weights(state.updater))
        measured.append(measurement_G)
    empty_SG = torch.empty(0, len(weights_G))
    return Replay(torch.stack(weights), torch.stack(measured) if measured else empty_SG, state)


# ---- how sure a measurement is ----


def standard_error(measurement: LossMeasurement, losses: TaskLosses, *, folds: int = 10) -> Tensor:
    """Standard error of a task's measurement by leaving out one fold of its queries at a time: [G], float64.

    The queries of each task are dealt to `folds` folds (one a query where there are fewer), and the spread of the
    measurements without one of them is scaled up (delete-a-group jackknife). NaN for a task with fewer than 2 queries.
    """
    position_B = _position_in_task(losses)
    count_G = losses.counts()
    groups_G = count_G.clamp(max=folds).double()
    estimates = []
    for fold in range(folds):
        keep_B = position_B % folds != fold
        estimates.append(measurement(_select(losses, keep_B)).double())
    estimate_FG = torch.stack(estimates)
    used_FG = torch.arange(folds, device=count_G.device)[:, None] < groups_G
    mean_G = (estimate_FG * used_FG).sum(0) / groups_G
    spread_G = ((estimate_FG - mean_G).square() * used_FG).sum(0)
    error_G = (spread_G * (groups_G - 1) / groups_G).sqrt()
    return torch.where(groups_G >= 2, error_G, torch.nan)


def _position_in_task(losses: TaskLosses) -> Tensor:
    """0, 1, 2 ... within each task, in the order of the batch: [B]."""
    one_hot_BG = torch.nn.functional.one_hot(losses.task, losses.num_tasks)
    return (one_hot_BG.cumsum(0) * one_hot_BG).sum(1) - 1


def _select(losses: TaskLosses, keep_B: Tensor) -> TaskLosses:
    reference = None if losses.reference is None else losses.reference[keep_B]
    micro_batch = None if losses.micro_batch is None else losses.micro_batch[keep_B]
    return replace(
        losses, proxy=losses.proxy[keep_B], reference=reference, task=losses.task[keep_B], micro_batch=micro_batch
    )
