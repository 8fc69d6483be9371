"""How the processes of a run end: together, cleaned up, and between two steps where there is time."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Self

STOPPING = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and what a scheduler sends


def die_with_parent(by: signal.Signals = signal.SIGTERM, *, parent: int | None = None) -> None:
    """Has this process sent `by` when the one that started it is gone, so that no rank is left behind. Linux only.

    `parent`: its id, where it may be gone already; then at once.
    """
    if sys.platform == "linux":
        import ctypes

        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, int(by))
        if parent is not None and os.getppid() != parent:
            os.kill(os.getpid(), by)


class _Hearing:
    """As a context, has `_hear` called for SIGINT and SIGTERM, where this is the main thread."""

    ignored_too = True  # whether ignored signals are heard, as Ctrl-C is by a shell's background jobs

    def __enter__(self) -> Self:
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            heard = [n for n in STOPPING if self.ignored_too or signal.getsignal(n) is not signal.SIG_IGN]
            self.before = {number: signal.signal(number, self._hear) for number in heard}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: object) -> None:
        raise NotImplementedError


class Interruption(_Hearing):
    """As a context, has SIGINT and SIGTERM raise KeyboardInterrupt, so that what was begun is cleaned up.

    A library that is interrupted may answer with an error of its own: `happened` tells that from a fault.
    """

    ignored_too = False

    def __init__(self) -> None:
        self.happened = False

    def _hear(self, number: int, frame: object) -> None:
        self.happened = True
        raise KeyboardInterrupt


class StopWish(_Hearing):
    """As a context, takes SIGINT and SIGTERM as the wish to stop between two steps; the second one stops at once."""

    def __init__(self) -> None:
        self.uttered = False

    def _hear(self, number: int, frame: object) -> None:
        if self.uttered:
            raise KeyboardInterrupt
        self.uttered = True
