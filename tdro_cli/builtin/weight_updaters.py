"""From measurements to task weights. States are float64 and in log space; weights come out as float32.

G tasks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from torch import Tensor

# a weight under it would be 0 in float32, and could never return
SMALLEST_LOG_WEIGHT = -80.0


@dataclass(frozen=True)
class ExponentiatedGradient:
    """log α ← log α + η · g, then softmax: arXiv:2408.10613, equation 4.

    `normalize`: `clip` shortens g to an L2 norm of `max_grad_norm` (the authors' release; nearly always active), `unit`
    also lengthens it to that, `none` takes it as measured. `cap`: no task may have more than this share of the squared
    norm; its entry is lowered and the length kept. `smoothing` mixes that much of uniform in at each step. `schedule`
    takes η from `learning_rate` at the first step to 0 at the last. Raises ValueError for a measurement not finite.
    """

    learning_rate: float = 0.02
    max_grad_norm: float = 1.0
    normalize: Literal["clip", "unit", "none"] = "clip"
    smoothing: float = 0.0
    cap: float | None = None
    schedule: Literal["constant", "linear", "cosine"] = "constant"

    def __post_init__(self) -> None:
        if not self.learning_rate > 0 or not self.max_grad_norm > 0:
            raise ValueError(
                f"learning_rate and max_grad_norm must be > 0, got {self.learning_rate}, {self.max_grad_norm}"
            )
        if self.normalize not in ("clip", "unit", "none"):
            raise ValueError(f"normalize must be clip, unit or none, got {self.normalize!r}")
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ValueError(f"schedule must be constant, linear or cosine, got {self.schedule!r}")
        if self.cap is not None and not 0 < self.cap <= 1:
            raise ValueError(f"cap must be in (0, 1], got {self.cap}")
        _check_smoothing(self.smoothing)

    def start(self, weights_G: Tensor) -> dict[str, Any]:
        if self.cap is not None and self.cap * len(weights_G) < 1:
            raise ValueError(
                f"cap {self.cap} is less than an equal share of {len(weights_G)} tasks; give at least that"
            )
        return {"log_weights": _log(weights_G)}

    def step(self, state: dict[str, Any], measurement_G: Tensor, *, progress: float) -> dict[str, Any]:
        from tdro_cli.learn.schedules import decay

        gradient_G = self.gradient(measurement_G)
        rate = self.learning_rate * decay(progress, self.schedule)
        return {"log_weights": _multiplied(state["log_weights"], rate * gradient_G, self.smoothing)}

    def weights(self, state: dict[str, Any]) -> Tensor:
        return _exp(state["log_weights"])

    def gradient(self, measurement_G: Tensor) -> Tensor:
        """The measurement as it is applied, before the learning rate: [G], float64."""
        from tdro_cli.learn.dro import clip_by_l2_norm

        gradient_G = _finite(measurement_G)
        if self.normalize == "clip":
            gradient_G = clip_by_l2_norm(gradient_G, self.max_grad_norm)
        elif self.normalize == "unit" and gradient_G.any():
            gradient_G = gradient_G * (self.max_grad_norm / gradient_G.norm())
        return gradient_G if self.cap is None else capped_share(gradient_G, self.cap)


@dataclass(frozen=True)
class GroupDRO:
    """α ← α · exp(step_size · (M + size_adjustment / √n)), then normalised: arXiv:1911.08731, with `absolute` as M.

    Algorithm 1; the adjustment is that of its section 3.3 (equation 5), n the rows of the task: small tasks, whose loss
    on unseen rows is the less known, are raised. 0: none.
    """

    step_size: float = 0.01
    """η, the step on log α"""
    size_adjustment: float = 0.0
    """added over √rows; 0: none"""

    def __post_init__(self) -> None:
        if not self.step_size > 0:
            raise ValueError(f"step_size must be > 0, got {self.step_size}")
        if not self.size_adjustment >= 0:
            raise ValueError(f"size_adjustment must be >= 0, got {self.size_adjustment}")

    def start(self, weights_G: Tensor) -> dict[str, Any]:
        if self.size_adjustment:
            raise ValueError("size_adjustment needs the sizes of the tasks: call start_with_sizes")
        return {"log_weights": _log(weights_G), "adjustment": weights_G.new_zeros(len(weights_G)).double()}

    def start_with_sizes(self, weights_G: Tensor, sizes_G: Tensor) -> dict[str, Any]:
        return {"log_weights": _log(weights_G), "adjustment": self.size_adjustment / sizes_G.double().sqrt()}

    def step(self, state: dict[str, Any], measurement_G: Tensor, *, progress: float) -> dict[str, Any]:
        exponent_G = self.step_size * (_finite(measurement_G) + state["adjustment"])
        return {**state, "log_weights": _multiplied(state["log_weights"], exponent_G)}

    def weights(self, state: dict[str, Any]) -> Tensor:
        return _exp(state["log_weights"])


@dataclass(frozen=True)
class DoReMi:
    """α ← α · exp(learning_rate · M), mixed with uniform by `smoothing`: arXiv:2305.10429, with `excess` as M.

    Algorithm 1. Its result is the mean over the updates, not the last weights. The proxy there is weighted with the new
    α: the recipe's `proxy_weights: current`.
    """

    learning_rate: float = 1.0
    """η, the step on log α"""
    smoothing: float = 1e-4
    output: ClassVar[str] = "mean"

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be > 0, got {self.learning_rate}")
        _check_smoothing(self.smoothing)

    def start(self, weights_G: Tensor) -> dict[str, Any]:
        return {"log_weights": _log(weights_G)}

    def step(self, state: dict[str, Any], measurement_G: Tensor, *, progress: float) -> dict[str, Any]:
        exponent_G = self.learning_rate * _finite(measurement_G)
        return {"log_weights": _multiplied(state["log_weights"], exponent_G, self.smoothing)}

    def weights(self, state: dict[str, Any]) -> Tensor:
        return _exp(state["log_weights"])


@dataclass(frozen=True)
class ODM:
    """Online data mixing, an EXP3 bandit over tasks: arXiv:2312.02406, algorithm 1, with the `absolute` measurement.

    The weights are also the probabilities with which the next batch's queries are drawn (`samples`). A task's reward is
    the moving average (`memory` of the old) of its loss over its probability; one not drawn (measurement 0) keeps it.
    Step t explores by E_t = min(1/G, sqrt(ln G / (G t))) and exploits by exp(E_{t-1} · reward), so that the weights
    stay uniform for the first G ln G steps. Where the paper sums the losses of a task's micro-batches, a task's loss
    is the mean over its queries.
    """

    memory: float = 0.9
    samples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.memory < 1:
            raise ValueError(f"memory must be in [0, 1), got {self.memory}")

    def start(self, weights_G: Tensor) -> dict[str, Any]:
        weights_G = _log(weights_G).exp()
        return {"weights": weights_G, "reward": weights_G.new_zeros(len(weights_G)), "steps": 0}

    def step(self, state: dict[str, Any], measurement_G: Tensor, *, progress: float) -> dict[str, Any]:
        measurement_G, num_tasks, steps = _finite(measurement_G), len(measurement_G), state["steps"] + 1
        seen_G = self.memory * state["reward"] + (1 - self.memory) * measurement_G / state["weights"]
        reward_G = seen_G.where(measurement_G != 0, state["reward"])
        # the weights of step t + 1, after t steps
        explore, rate = _exploration(num_tasks, steps + 1), _exploration(num_tasks, steps)
        weights_G = (1 - num_tasks * explore) * (rate * reward_G).softmax(0) + explore
        return {"weights": weights_G, "reward": reward_G, "steps": steps}

    def weights(self, state: dict[str, Any]) -> Tensor:
        weights_G: Tensor = state["weights"]
        return weights_G.float()


def capped_share(vector_G: Tensor, cap: float) -> Tensor:
    """`vector_G` with no entry above `cap` of the squared norm, at the same length: [G].

    Entries above a level are lowered to it, so that the largest has exactly `cap`. Where fewer than 1/cap entries
    differ from 0 that can't be, and all of those become equally large.
    """
    square_G = vector_G.square()
    norm: Tensor = vector_G.norm()
    ordered = square_G[square_G > 0].sort(descending=True).values.tolist()
    if not ordered:
        return vector_G
    level = ordered[-1]
    for number in range(len(ordered)):  # of entries above the level
        left = 1 - number * cap
        rest = sum(ordered[number:])
        if left > 0 and ordered[number] <= cap * rest / left:
            level = cap * rest / left
            break
    lowered_G = vector_G.sign() * square_G.clamp_max(level).sqrt()
    lowered_norm: Tensor = lowered_G.norm()
    return lowered_G * (norm / lowered_norm)


def _exploration(num_tasks: int, steps: int) -> float:
    return min(1 / num_tasks, math.sqrt(math.log(num_tasks) / (num_tasks * steps)))


def _check_smoothing(smoothing: float) -> None:
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must be in [0, 1), got {smoothing}")


def _finite(measurement_G: Tensor) -> Tensor:
    """In float64. Raises ValueError that numbers the tasks whose measurement isn't finite."""
    from tdro_cli.learn.dro import require_finite

    return require_finite(measurement_G).double()


def _log(weights_G: Tensor) -> Tensor:
    """Log weights in float64. Raises ValueError unless the weights are > 0 and sum to 1 within 1e-4."""
    if not bool((weights_G > 0).all()) or abs(float(weights_G.double().sum()) - 1) > 1e-4:
        raise ValueError(f"weights must be > 0 and sum to 1, got {weights_G.tolist()}")
    return weights_G.double().log().log_softmax(0)


def _multiplied(log_weights_G: Tensor, exponent_G: Tensor, smoothing: float = 0.0) -> Tensor:
    log_weights_G = (log_weights_G + exponent_G).log_softmax(0)
    if smoothing:
        log_weights_G = ((1 - smoothing) * log_weights_G.exp() + smoothing / len(log_weights_G)).log()
    return log_weights_G.clamp_min(SMALLEST_LOG_WEIGHT)


def _exp(log_weights_G: Tensor) -> Tensor:
    return log_weights_G.softmax(0).float()
