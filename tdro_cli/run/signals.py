"""How the processes of a run end: together, cleaned up, and between two steps where there is time."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


def die_with_parent(by: signal.Signals = signal.SIGTERM) -> None:
    """Has this process sent `by` when the one that started it is gone, so that no rank is left behind. Linux only."""
    if sys.platform == "linux":
        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, int(by))


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """Inside, SIGTERM raises KeyboardInterrupt, so that what was begun is cleaned up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class StopWish:
    """As a context, takes SIGINT and SIGTERM as the wish to stop between two steps; the second one stops at once."""

    def __init__(self) -> None:
        self.uttered = False

    def __enter__(self) -> StopWish:
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: object) -> None:
        if self.uttered:
            raise KeyboardInterrupt
        self.uttered = True
