"""The processes that train together, and what they exchange."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def gather(self, value: Tensor) -> Tensor:
        """The values of all ranks one after the other: [sum of first dimensions, ...]. First dimensions may differ."""
        if self.size == 1:
            return value
        count = torch.tensor([value.shape[0]], device=value.device)
        counts = [torch.zeros_like(count) for _ in range(self.size)]
        dist.all_gather(counts, count)
        longest = int(max(counts))
        padded = value.new_zeros(longest, *value.shape[1:])
        padded[: value.shape[0]] = value
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)])

    def most(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        if self.size == 1:
            return number
        value = torch.tensor([number], device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return int(value)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def join() -> World:
    """This process's place, from the launcher's environment; alone where there is none."""
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        os.environ["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed, imported by others too, looks for one and warns
    return World(rank, size, device)
