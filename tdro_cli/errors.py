"""What goes wrong, told to the user: what, where, and what to do."""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
MEMORY_WORDS = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "Cannot allocate memory",
    "std::bad_alloc",
)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# safetensors and torch, which report no OSError: the last is what closing a checkpoint says after a short write
FULL_WORDS = ("No space left on device", "PytorchStreamWriter failed", "inline_container.cc")


class TdroError(Exception):
    """A fault in the user's recipe or data. Shown without a traceback; exit code 2."""

    exit_code = 2

    def __init__(self, message: str, *, where: str | None = None, remedy: str | None = None):
        super().__init__(message)
        self.message, self.where, self.remedy = message, where, remedy

    def __str__(self) -> str:
        return "\n  ".join(_visible(part) for part in (self.message, self.where, self.remedy) if part)

    def problems(self) -> list[dict[str, str | None]]:
        """The same for machines: one object a problem."""
        return [{"message": self.message, "where": self.where, "remedy": self.remedy}]


def _visible(text: str) -> str:
    """On one line, and without what a terminal would obey: file names and data are shown, not followed."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


class RunFailed(TdroError):
    """A run that did not reach its end although the input was in order. Exit code 1."""

    exit_code = 1


class Problems(TdroError):
    """Several faults found together, so that they can be mended together."""

    def __init__(self, problems: Iterable[TdroError]):
        self.errors = list(problems)
        super().__init__("; ".join(error.message for error in self.errors))

    def problems(self) -> list[dict[str, str | None]]:
        return [problem for error in self.errors for problem in error.problems()]


def known_fault(error: BaseException, where: str | None = None) -> TdroError | None:
    """What to tell the user of an error that a full disk, a path or the memory is to blame for; None for any other.

    `where` is the folder that was worked in, for errors that name no place.
    """
    if isinstance(error, TdroError):
        return error
    return _full_disk(error, where) or _unusable_path(error) or _out_of_memory(error, where)


@contextmanager
def known_faults(where: str) -> Iterator[None]:
    """Turns such an error into what to tell the user. `where`: the folder that is worked in."""
    try:
        yield
    except TdroError:
        raise
    except Exception as error:
        if fault := known_fault(error, where):
            raise fault from error
        raise


def _full_disk(error: BaseException, where: str | None) -> TdroError | None:
    number, words = getattr(error, "errno", None), str(error).lower()
    if isinstance(error, OSError):
        # pyarrow and shutil give the number in words only
        number = next((n for n in FULL if n == number or f"[errno {n}]" in words), None)
    elif any(told.lower() in words for told in FULL_WORDS):
        number = errno.ENOSPC
    else:
        number = None
    if number is None:
        return None
    filename = getattr(error, "filename", None)
    remedy = "make room, or name another folder by --runs; what is complete is kept, and the same command goes on"
    return RunFailed(
        f"the disk is full: {os.strerror(number)}", where=os.fsdecode(filename) if filename else where, remedy=remedy
    )


def _unusable_path(error: BaseException) -> TdroError | None:
    if not isinstance(error, OSError) or error.errno not in UNUSABLE or not error.filename:
        return None
    remedy = "name another place, or change its permissions; what is complete is kept, and the same command goes on"
    return TdroError(f"can't use the path: {error.strerror}", where=os.fsdecode(error.filename), remedy=remedy)


def _out_of_memory(error: BaseException, where: str | None) -> TdroError | None:
    if not isinstance(error, MemoryError) and not any(words in str(error) for words in MEMORY_WORDS):
        return None
    remedy = (
        "lower encoder.activation_tokens, encoder.micro_batch_tokens or the batch; --dry-run says what training needs; "
        "the same command goes on from the newest checkpoint"
    )
    return RunFailed(f"not enough memory: {first_line(error) or 'none is left'}", where=where, remedy=remedy)


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """The part of a remedy that names the nearest valid names, or all of them."""
    choices = sorted(choices)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    valid = f"valid: {', '.join(choices)}" if choices else "none is valid here"
    return f"did you mean {near[0]!r}? {valid}" if near else valid
