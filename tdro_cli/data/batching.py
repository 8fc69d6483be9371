"""Which rows make up the batch of step t: a pure function of the plan and t, whatever the ranks and workers.

B queries of a global batch, G tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Literal

import numpy as np

_GOLDEN = 0.6180339887498949  # the additive sequence of lowest discrepancy
_ROUNDS = 8  # of the Feistel network
_BLOCK = 64  # steps whose counts are summed once
_GROWING = Lock()
_INCREMENT = 0x9E3779B97F4A7C15  # of splitmix64


@dataclass(frozen=True)
class BatchPlan:
    """All that decides the batches of a run.

    `sizes`: rows of each task. `probabilities`: of each task, summing to 1. `composition` and `draws` as in the recipe:
    homogeneous (a global batch from one task) or mixed (a task per query); stratified or independent.
    Raises ValueError for a task without rows that has a probability.
    """

    seed: int
    queries: int
    sizes: tuple[int, ...]
    probabilities: tuple[float, ...]
    composition: Literal["homogeneous", "mixed"] = "homogeneous"
    draws: Literal["stratified", "independent"] = "stratified"

    def __post_init__(self) -> None:
        if len(self.sizes) != len(self.probabilities) or not self.sizes:
            raise ValueError(f"{len(self.sizes)} sizes for {len(self.probabilities)} probabilities")
        if self.queries < 1 or min(self.probabilities) < 0 or not abs(sum(self.probabilities) - 1) <= 1e-6:
            raise ValueError("a batch needs queries >= 1 and probabilities >= 0 that sum to 1")
        for task, (size, probability) in enumerate(zip(self.sizes, self.probabilities, strict=True)):
            if size < 1 and probability > 0:
                raise ValueError(f"task {task} has no rows but the probability {probability}")

    @property
    def uniform(self) -> bool:
        return max(self.probabilities) - min(self.probabilities) < 1e-12


@dataclass(frozen=True, eq=False)
class Batch:
    """The queries of one global batch: task and row of each, and how often that row was used before. All [B] int64."""

    task_B: np.ndarray
    row_B: np.ndarray
    visit_B: np.ndarray

    def __len__(self) -> int:
        return len(self.task_B)

    def shard(self, rank: int, world: int) -> slice:
        """The contiguous part of the batch that a rank computes; parts differ by one query at most."""
        return slice(len(self) * rank // world, len(self) * (rank + 1) // world)


def batch_at(plan: BatchPlan, step: int) -> Batch:
    """The global batch of `step` (from 0).

    Rows come without replacement inside an epoch of their task, in another order every epoch.
    """
    return assemble(plan, step, task_counts(plan, step), drawn_before(plan, step))


def assemble(plan: BatchPlan, step: int, count_G: np.ndarray, before_G: np.ndarray) -> Batch:
    """The batch of `step` with `count_G` queries of each task, which gave `before_G` queries in the steps before.

    For what draws by changing probabilities; else `batch_at` knows both.
    """
    task_B = np.repeat(np.arange(len(plan.sizes)), count_G)
    draw_B = np.concatenate([np.arange(before, before + n) for before, n in zip(before_G, count_G, strict=True) if n])
    size_B = np.asarray(plan.sizes)[task_B]
    visit_B = draw_B // size_B
    row_B = permuted(draw_B % size_B, size_B, _mix(plan.seed, 1, task_B, visit_B))
    order = _random(plan.seed, 2, step).permutation(len(task_B))  # tasks spread over the ranks
    return Batch(task_B[order], row_B[order], visit_B[order])


def task_counts(plan: BatchPlan, step: int) -> np.ndarray:
    """Queries of each task in the batch of `step`: [G] int64, summing to B.

    Mixed and stratified: what is due, rounded down or up. Over the steps before, equal tasks are within one query of
    what is due, others within 3 after 100 steps and 7 after a million (the discrepancy of the golden sequence).
    """
    if plan.composition == "homogeneous":
        count_G = np.zeros(len(plan.sizes), dtype=np.int64)
        count_G[task_schedule(plan, step + 1)[step]] = plan.queries
        return count_G
    if plan.draws == "independent":
        return drawn_counts(plan, step, plan.probabilities)
    tasks = len(plan.sizes)
    if plan.uniform:  # in whole numbers: equal counts, and the remainder goes round
        edge = plan.queries * (np.arange(tasks + 1) + step % tasks) // tasks
    else:  # systematic sampling: every count is the expected one, rounded down or up
        share = _cumulative(plan.probabilities)
        edge = np.floor(np.round(share * plan.queries + step * _GOLDEN % 1.0, 9)).astype(np.int64)
        edge[share >= share[-1]] = edge[0] + plan.queries  # whatever the rounding
    return np.diff(edge)


@lru_cache(maxsize=8)
def _cumulative(probabilities: tuple[float, ...]) -> np.ndarray:
    return np.cumsum([0.0, *_exact(probabilities)])


def drawn_counts(plan: BatchPlan, step: int, probabilities: Sequence[float]) -> np.ndarray:
    """Queries of each task in an independent draw with these probabilities: [G] int64."""
    return _random(plan.seed, 3, step).multinomial(plan.queries, _exact(probabilities))


def task_schedule(plan: BatchPlan, steps: int) -> np.ndarray:
    """The task of each of the first `steps` homogeneous batches: [steps] int64.

    Stratified: after every step each task has had its share of the steps to within one (Tijdeman, The chairman
    assignment problem, 1980). Tasks of one deadline are taken in a seeded order.
    """
    length = 1 << steps.bit_length()  # grows by doubling, so that asking step by step stays cheap
    return _schedule(plan, length)[:steps]


@lru_cache(maxsize=8)
def _schedule(plan: BatchPlan, steps: int) -> np.ndarray:
    return _drawn_schedule(plan, steps) if plan.draws == "independent" else _fair_schedule(plan, steps)


def _drawn_schedule(plan: BatchPlan, steps: int) -> np.ndarray:
    probability_G = _exact(plan.probabilities)
    return np.array([_random(plan.seed, 4, step).choice(len(probability_G), p=probability_G) for step in range(steps)])


def _fair_schedule(plan: BatchPlan, steps: int) -> np.ndarray:
    probability_G = _exact(plan.probabilities)
    tasks = np.flatnonzero(probability_G > 0)
    tasks = tasks[_random(plan.seed, 5, 0).permutation(len(tasks))]
    share = probability_G[tasks]
    if len(tasks) == 1:
        return np.full(steps, tasks[0])
    slack = 1.0 / (2 * len(tasks) - 2)
    had = np.zeros(len(tasks))
    chosen = np.empty(steps, dtype=np.int64)
    for step in range(steps):
        owed = share * (step + 1) - had
        with np.errstate(over="ignore"):  # a share of next to nothing may wait forever
            deadline = np.where(owed >= slack - 1e-12, (1.0 - slack - owed) / share, np.inf)
        pick = int(np.argmin(deadline))
        had[pick] += 1
        chosen[step] = pick
    return tasks[chosen]


def drawn_before(plan: BatchPlan, step: int) -> np.ndarray:
    """Queries that each task gave in all steps before `step`: [G] int64, at one cost for every step."""
    if plan.composition == "homogeneous":
        return np.bincount(task_schedule(plan, step), minlength=len(plan.sizes)) * plan.queries
    if plan.draws == "stratified" and plan.uniform:
        tasks = len(plan.sizes)
        rounds, rest = divmod(step, tasks)
        edge = plan.queries * np.arange(2 * tasks) // tasks  # the counts of `task_counts`, whose sum telescopes
        return rounds * plan.queries + edge[rest : rest + tasks] - edge[:tasks]
    block, rest = divmod(step, _BLOCK)
    return _sum_of_blocks(plan, block) + _counts_between(plan, step - rest, step)


def _counts_between(plan: BatchPlan, start: int, stop: int) -> np.ndarray:
    return sum((task_counts(plan, step) for step in range(start, stop)), np.zeros(len(plan.sizes), dtype=np.int64))


def _sum_of_blocks(plan: BatchPlan, blocks: int) -> np.ndarray:
    sums = _block_sums(plan)
    with _GROWING:  # the next batch is made in another thread
        while len(sums) <= blocks:
            first = (len(sums) - 1) * _BLOCK
            sums.append(sums[-1] + _counts_between(plan, first, first + _BLOCK))
    return sums[blocks]


@lru_cache(maxsize=8)
def _block_sums(plan: BatchPlan) -> list[np.ndarray]:
    """What each task gave in the first 0, 1, 2 ... blocks of steps; grows as later steps are asked for."""
    return [np.zeros(len(plan.sizes), dtype=np.int64)]


def choose_passages(
    plan: BatchPlan,
    task_B: np.ndarray,
    row_B: np.ndarray,
    visit_B: np.ndarray,
    *,
    positives_B: np.ndarray,
    negatives_B: np.ndarray,
    wanted: int,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Which positive and which hard negatives each row uses at its visit: [B] indices, and at most `wanted` a row.

    Both are cycled in a seeded order, so that every one is used before any is used again. Fewer negatives than wanted
    are not repeated.
    """
    key_B = _mix(plan.seed, 6, task_B, row_B)
    positive_B = ((key_B + visit_B.astype(np.uint64)) % positives_B.astype(np.uint64)).astype(np.int64)
    chosen = [np.arange(count) for count in negatives_B]
    rows = np.flatnonzero(negatives_B > wanted)
    size_RN = np.broadcast_to(negatives_B[rows, None], (len(rows), wanted))
    place_RN = (visit_B[rows, None] * wanted + np.arange(wanted)) % size_RN
    key_RN = np.broadcast_to(_mix(key_B[rows], 7)[:, None], size_RN.shape)
    for row, indices in zip(rows, permuted(place_RN, size_RN, key_RN), strict=True):
        chosen[row] = indices
    return positive_B, chosen


def permuted(index: np.ndarray, size: np.ndarray | int, key: np.ndarray | int) -> np.ndarray:
    """The image of each index under the permutation of 0..size-1 that `key` names; all three in one shape, or numbers.

    No permutation is held in memory: a Feistel network over the next even power of two, walked until it falls inside.
    """
    shape = np.shape(index)
    value = np.array(index, dtype=np.uint64).ravel()
    size, key = (np.broadcast_to(np.asarray(given, np.uint64), shape).ravel() for given in (size, key))
    distinct, place = np.unique(size, return_inverse=True)
    bits = [max((int(number) - 1).bit_length() + 1 >> 1, 1) for number in distinct]
    half = np.array(bits, dtype=np.uint64)[place]
    keys = np.stack([_mix(key, number) for number in range(_ROUNDS)])
    outside = np.arange(len(value))
    while len(outside):
        h = half[outside]
        mask = (np.uint64(1) << h) - np.uint64(1)
        left, right = value[outside] >> h, value[outside] & mask
        for round_key in keys[:, outside]:
            left, right = right, left ^ (_hash(right + round_key) & mask)
        value[outside] = left << h | right
        outside = outside[value[outside] >= size[outside]]
    return value.astype(np.int64).reshape(shape)


def _hash(value: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele et al., 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _mix(*words: np.ndarray | int) -> np.ndarray:
    """63-bit keys from several numbers each, by the same finalizer: uint64, in the words' common shape."""
    key = np.full(np.broadcast_shapes(*map(np.shape, words)), _INCREMENT, dtype=np.uint64)
    with np.errstate(over="ignore"):  # a single number's wrapping round would be told
        for word in words:
            key = _hash(key + np.asarray(word).astype(np.uint64) * np.uint64(_INCREMENT))
    return key >> np.uint64(1)


def _random(seed: int, stream: int, step: int) -> np.random.Generator:
    """Independent random numbers for every (seed, stream, step)."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, 0, step]))


def _exact(probabilities: Sequence[float]) -> np.ndarray:
    values = np.asarray(probabilities)
    return values / values.sum()
