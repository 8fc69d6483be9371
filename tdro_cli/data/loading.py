"""The batches of a run, made ahead of the steps that need them.

By a thread where the model computes on the processor. Beside a GPU by processes of their own: a thread that tokenizes
holds Python's lock, and with it the one that gives the GPU its work.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from tdro_cli.data.batching import Batch, BatchPlan, batch_at
from tdro_cli.data.collation import TokenBatch, TrainingTask, collate
from tdro_cli.data.tokenization import TextTokenizer
from tdro_cli.errors import RunFailed, TdroError
from tdro_cli.run import timing
from tdro_cli.run.signals import STOPPING, die_with_parent

if TYPE_CHECKING:
    from tdro_cli.run.distributed import World

SWITCH = "TDRO_DATA_WORKERS"
MOST_WORKERS = 8  # each tokenizes thousands of texts a second


@dataclass(frozen=True)
class Collation:
    """A rank's part of any step's batch, and the whole batch without its texts."""

    plan: BatchPlan
    tasks: Sequence[TrainingTask]
    tokenizer: TextTokenizer
    rank: int
    size: int
    hard_negatives: int
    keep_texts: bool = True

    def __call__(self, step: int) -> tuple[Batch, TokenBatch]:
        return self.of(batch_at(self.plan, step))

    def of(self, batch: Batch) -> tuple[Batch, TokenBatch]:
        """The same of a batch that is drawn already."""
        part = batch.shard(self.rank, self.size)
        own = collate(self.plan, batch, part, self.tasks, self.tokenizer, hard_negatives=self.hard_negatives)
        return batch, own if self.keep_texts else replace(own, query_texts=(), passage_texts=())


def num_workers(world: World) -> int:
    """Processes that read and tokenize for this rank; 0 for a thread. Raises TdroError for a bad TDRO_DATA_WORKERS."""
    told = os.environ.get(SWITCH)
    if told is not None:
        if not told.isdecimal():
            raise TdroError(f"{SWITCH} must be a whole number, got {told!r}", remedy="unset it, or 0 for a thread")
        return int(told)
    if world.device.type == "cpu":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks_here = int(os.environ.get("LOCAL_SIZE", "1"))  # set by DeepSpeed's launcher
    return max(1, min(MOST_WORKERS, cores // ranks_here - 1))


class Arriving:
    """Iterates over the batches of `steps`; `waited`: seconds that the newest one was waited for."""

    def __init__(self, collation: Collation, steps: range, *, workers: int):
        self.collation, self.steps, self.workers = collation, steps, workers
        self.waited = 0.0
        self._batches = self._make()

    def __iter__(self) -> Iterator[tuple[Batch, TokenBatch]]:
        return self

    def __next__(self) -> tuple[Batch, TokenBatch]:
        return next(self._batches)

    def close(self) -> None:
        """Ends what makes batches ahead."""
        self._batches.close()

    def _make(self) -> Generator[tuple[Batch, TokenBatch]]:
        coming: deque[Future[tuple[Batch, TokenBatch]]] = deque()
        todo = iter(self.steps)
        pool, make = self._pool()
        try:
            with _blocked(STOPPING):  # processes start with signals blocked, until they know how to treat them
                coming.extend(pool.submit(make, step) for step in islice(todo, max(1, self.workers)))
            while coming:
                batch = self._next(coming.popleft())
                coming.extend(pool.submit(make, step) for step in islice(todo, 1))
                yield batch
        finally:
            pool.shutdown(cancel_futures=True)

    def _pool(self) -> tuple[Executor, Any]:
        if not self.workers:
            return ThreadPoolExecutor(1), self.collation
        # spawned, not forked: threads and a GPU's state do not survive a fork
        spawn = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(self.workers, spawn, initializer=_begin, initargs=(self.collation,)), _make_one

    def _next(self, future: Future[tuple[Batch, TokenBatch]]) -> tuple[Batch, TokenBatch]:
        began = time.monotonic()
        try:
            with timing.part("data"):
                return future.result()
        except BrokenProcessPool as error:
            raise RunFailed(
                "a process that reads training data has died",
                remedy=f"if memory was short, set {SWITCH}=0; the same command goes on from the newest checkpoint",
            ) from error
        finally:
            self.waited = time.monotonic() - began


@contextmanager
def _blocked(signals: tuple[signal.Signals, ...]) -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_collation: Collation  # of a worker process


def _begin(collation: Collation) -> None:
    global _collation
    for number in STOPPING:  # meant for the training process, which ends its workers
        signal.signal(number, signal.SIG_IGN)
    run = multiprocessing.parent_process()
    assert run is not None
    die_with_parent(signal.SIGKILL, parent=run.pid)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    _collation = collation


def _make_one(step: int) -> tuple[Batch, TokenBatch]:
    return _collation(step)
