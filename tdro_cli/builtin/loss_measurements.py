"""How much headroom each task has, from the losses of one global batch.

B queries, G tasks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from tdro_cli.protocols import TaskLosses

# The paper has no floor. A task whose reference loss is a small fraction of a nat is solved, and a few unlucky queries
# of the proxy then make a ratio that nothing else reaches: docs/decisions/2026-11-21-floor.md. Above the floor the
# ratio is the paper's.
DEFAULT_FLOOR = 0.2
DEFAULT_SHRINKAGE = 0.0


@dataclass(frozen=True)
class Relative:
    """Mean proxy loss over mean reference loss: arXiv:2408.10613, equation 5.

    (mean proxy + shrinkage) / max(mean reference + shrinkage, floor), both options in nats; floor 0 and shrinkage 0 is
    the paper's formula. A floor lets a solved task sink, shrinkage pulls it to the neutral 1. A zero denominator counts
    as the smallest normal number: 0/0 is 0 (nothing left to learn), anything else over 0 is large, but finite.
    `ema`: share of the old value in a moving average of both means over the batches that hold the task (0: none).
    """

    floor: float = DEFAULT_FLOOR
    """least denominator, in nats"""
    shrinkage: float = DEFAULT_SHRINKAGE
    """added to both means, in nats"""
    ema: float = 0.0

    def __post_init__(self) -> None:
        if not self.floor >= 0 or not self.shrinkage >= 0:
            raise ValueError(f"floor and shrinkage must be >= 0 nats, got {self.floor} and {self.shrinkage}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema}")

    def __call__(self, losses: TaskLosses) -> Tensor:
        reference_B = _reference(losses, "relative")
        return self._ratio(losses.mean_by_task(losses.proxy), losses.mean_by_task(reference_B), losses.counts() > 0)

    def start(self, num_tasks: int) -> dict[str, Any]:
        import torch

        return {
            "proxy": torch.zeros(num_tasks),
            "reference": torch.zeros(num_tasks),
            "seen": torch.zeros(num_tasks, dtype=torch.bool),
        }

    def measure(self, state: dict[str, Any], losses: TaskLosses) -> tuple[dict[str, Any], Tensor]:
        present_G = losses.counts() > 0
        seen_G = state["seen"].to(present_G.device)

        def averaged(old_G: Tensor, value_B: Tensor) -> Tensor:
            old_G, new_G = old_G.to(value_B), losses.mean_by_task(value_B)
            new_G = (self.ema * old_G + (1 - self.ema) * new_G).where(seen_G, new_G)
            return new_G.where(present_G, old_G)

        after = {
            "proxy": averaged(state["proxy"], losses.proxy),
            "reference": averaged(state["reference"], _reference(losses, "relative")),
            "seen": seen_G | present_G,
        }
        return after, self._ratio(after["proxy"], after["reference"], present_G)

    def floor_binds(self, losses: TaskLosses) -> Tensor:
        """Which tasks of this batch have a denominator under the floor: [G], bool. Without `ema`."""
        mean_G = losses.mean_by_task(_reference(losses, "relative"))
        return (mean_G + self.shrinkage < self._smallest(mean_G)) & (losses.counts() > 0)

    def clamped_share(self, losses: TaskLosses) -> Tensor:
        """1 for a task of which the floor binds, else 0: [G]."""
        return self.floor_binds(losses).to(losses.proxy.dtype)

    def _smallest(self, like: Tensor) -> float:
        import torch

        return max(self.floor, torch.finfo(like.dtype).tiny)

    def _ratio(self, proxy_G: Tensor, reference_G: Tensor, present_G: Tensor) -> Tensor:
        import torch

        denominator_G = (reference_G + self.shrinkage).clamp_min(self._smallest(reference_G))
        ratio_G = ((proxy_G + self.shrinkage) / denominator_G).clamp_max(torch.finfo(proxy_G.dtype).max)
        return ratio_G * present_G


@dataclass(frozen=True)
class RelativeOfficial:
    """The relative measurement as the authors' release computes it, for parity with the published weights.

    Per micro-batch of the gathered queries: reference losses over their L1 norm, entries under `threshold` replaced
    by 1, proxy over reference per query, floored at 0, mean by task (absent: 0); then the mean over the micro-batches.
    Solved tasks sink and the scale follows the batch size: not the paper's formula (rank correlation of α 0.26 in a
    trial on 20 tasks).
    """

    threshold: float = 1e-4

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ValueError(f"threshold must be >= 0, got {self.threshold}")

    def __call__(self, losses: TaskLosses) -> Tensor:
        share_B = self._share(losses)
        ratio_B = (losses.proxy / share_B.masked_fill(share_B < self.threshold, 1.0)).clamp_min(0.0)
        total_G = losses.proxy.new_zeros(losses.num_tasks)
        micro_batches = _micro_batches(losses)
        for chosen in micro_batches:
            part_B = ratio_B[chosen]
            sum_G = total_G.new_zeros(losses.num_tasks).index_add(0, losses.task[chosen], part_B)
            count_G = total_G.new_zeros(losses.num_tasks).index_add(
                0, losses.task[chosen], part_B.new_ones(len(part_B))
            )
            total_G = total_G + sum_G / count_G.clamp_min(1)
        return total_G / max(1, len(micro_batches))

    def clamped_share(self, losses: TaskLosses) -> Tensor:
        """Share of a task's queries whose reference loss was replaced by 1: [G]."""
        return losses.mean_by_task((self._share(losses) < self.threshold).to(losses.proxy.dtype))

    def _share(self, losses: TaskLosses) -> Tensor:
        """The reference losses over their L1 norm within each micro-batch: [B]; 0 where all of them are 0."""
        import torch

        reference_B = _reference(losses, "relative_official")
        share_B = torch.empty_like(reference_B)
        for chosen in _micro_batches(losses):
            norm = reference_B[chosen].abs().sum().clamp_min(torch.finfo(reference_B.dtype).tiny)
            share_B[chosen] = reference_B[chosen] / norm
        return share_B


@dataclass(frozen=True)
class Excess:
    """Mean of max(proxy - reference, 0) over a task's queries: the group excess loss of DoReMi, arXiv:2305.10429."""

    def __call__(self, losses: TaskLosses) -> Tensor:
        return losses.mean_by_task((losses.proxy - _reference(losses, "excess")).clamp_min(0.0))


@dataclass(frozen=True)
class Absolute:
    """Mean proxy loss: GroupDRO, arXiv:1911.08731. Crowds towards the tasks with the largest loss."""

    needs_reference: ClassVar[bool] = False

    def __call__(self, losses: TaskLosses) -> Tensor:
        return losses.mean_by_task(losses.proxy)


def _reference(losses: TaskLosses, name: str) -> Tensor:
    if losses.reference is None:
        raise ValueError(f"the loss measurement {name!r} needs reference losses")
    return losses.reference


def _micro_batches(losses: TaskLosses) -> list[Tensor] | list[slice]:
    """For each micro-batch which queries are in it: [B], bool; a slice of all where the batch is in one part."""
    if losses.micro_batch is None:
        return [slice(None)]
    return [losses.micro_batch == number for number in losses.micro_batch.unique()]
