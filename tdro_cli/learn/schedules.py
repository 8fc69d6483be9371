"""Learning rates as a closed form of the step: nothing to checkpoint."""

from __future__ import annotations

import math
from typing import Literal, get_args

Schedule = Literal["constant", "linear", "cosine"]


def learning_rate(
    step: int, *, peak: float, steps: int, warmup_steps: int = 0, min_ratio: float = 0.0, name: Schedule = "cosine"
) -> float:
    """The rate of update `step` (0-based) out of `steps`.

    Linear from 0 at step 0 to `peak` at `warmup_steps`, then by `name` to `min_ratio` · peak at `steps` (constant:
    stays at the peak). The authors' release: 100 warm-up steps, cosine, 0.1. Raises ValueError for values out of range.
    """
    if name not in get_args(Schedule):
        raise ValueError(f"no schedule {name!r}; valid: {', '.join(get_args(Schedule))}")
    if not 0 <= warmup_steps <= steps:
        raise ValueError(f"warmup_steps must be in 0..steps ({steps}), got {warmup_steps}")
    if not 0 <= min_ratio <= 1:
        raise ValueError(f"min_ratio must be in 0..1, got {min_ratio}")
    if step < 0:
        raise ValueError(f"step must be >= 0, got {step}")
    if step < warmup_steps:
        return peak * step / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return peak * (min_ratio + (1 - min_ratio) * decay(done, name)) if name != "constant" else peak


def decay(progress: float, name: Schedule) -> float:
    """The factor, from 1 at `progress` 0 to 0 at 1 (constant: always 1)."""
    if name == "constant":
        return 1.0
    return 1.0 - progress if name == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
