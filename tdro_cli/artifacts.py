"""What a stage leaves behind: it exists if and only if it is complete, and says what it was made from."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_CHECKPOINT = re.compile(r"step-([0-9]+)")
ORPHAN_SECONDS = 3600.0  # on a shared file system, the process of another machine may be at work on it


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_of(value: Any) -> str:
    """SHA-256 of a plain value, as 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    refuse_endless(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stamp_of(path: Path) -> list[int]:
    """What changes when a file does: size, time of change, inode."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def index_of(cache: Path) -> Path:
    """The folder where digests of files are remembered, below the cache of a folder of runs."""
    return cache / "tasks" / "index"


def memo_of(path: Path, index: Path) -> Path:
    """Where the digest of `path` is remembered, below the folder `index`."""
    return index / f"{hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:32]}.json"


def remembered_digest(memo: Path, stamp: list[int]) -> str | None:
    """SHA-256 of a file that was read before with this stamp, so that gigabytes are not read again."""
    try:
        remembered = read_json(memo)
        return remembered["sha256"] if remembered["stamp"] == stamp else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there yet, or damaged: made anew


def digest_file_once(path: Path, index: Path) -> str:
    """SHA-256 of a file's bytes, remembered below `index` until the file changes, where that can be written."""
    memo, stamp = memo_of(path, index), stamp_of(path)
    digest = remembered_digest(memo, stamp)
    if digest is None:
        digest = digest_file(path)
        with suppress(OSError):
            write_json(memo, {"stamp": stamp, "sha256": digest})
    return digest


def write_json(path: Path, value: Any) -> None:
    """Writes `value` so that a reader sees the old file or the whole new one."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes aside, syncs, renames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(path)
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk names none
        raise
    finally:
        aside.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises OSError or ValueError where there is none to be read."""
    try:
        return json.loads(read_text(path))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, without a byte order mark. Raises OSError or ValueError where it can't be read."""
    refuse_endless(path)
    return path.read_text(encoding="utf-8-sig")


def refuse_endless(path: Path) -> None:
    """Raises OSError for a pipe or a device: reading it might never end."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))


def is_complete(folder: Path) -> bool:
    """Whether `folder` is a published artifact."""
    return (folder / MANIFEST).is_file()


def checkpoints_in(folder: Path) -> list[Path]:
    """The whole checkpoints of a training run, the newest first."""
    return sorted(filter(is_complete, checkpoint_folders(folder)), key=step_of, reverse=True)


def checkpoint_folders(folder: Path) -> list[Path]:
    """Checkpoints, whole or not; a copy that somebody made under another name is none."""
    return [path for path in folder.glob("step-*") if _CHECKPOINT.fullmatch(path.name)]


def step_of(checkpoint: Path) -> int:
    """After how many steps a checkpoint was written."""
    return int(_CHECKPOINT.fullmatch(checkpoint.name)[1])  # type: ignore[index]


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest of a published artifact. Raises ValueError where it is damaged, OSError where there is none."""
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict):
        raise ValueError(f"{folder / MANIFEST} holds no JSON object")
    return manifest


def faults_of(folder: Path, digest: Callable[[Path], str] = digest_file) -> Iterator[str]:
    """What of a published artifact is not as its manifest says, one sentence each. `digest` of a file may remember."""
    try:
        manifest = manifest_of(folder)
        same, files = digest_of(manifest["numbers"]) == manifest["digest"], dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield f"{folder / MANIFEST} can't be read: {error}"
        return
    if not same:
        yield f"{folder / MANIFEST}: its digest is not that of the numbers it names"
    yield from file_faults(folder, files, digest)


def file_faults(folder: Path, files: Mapping[str, str], digest: Callable[[Path], str] = digest_file) -> Iterator[str]:
    """The same of files alone: {name: digest as it was written}."""
    for name, written in files.items():
        path = folder / name
        if not path.is_file():
            yield f"{path} is missing"
        elif digest(path) != written:
            yield f"{path} is not the file that was written"


@contextmanager
def publishing(folder: Path, manifest: Callable[[], Mapping[str, Any]]) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` when the block ends well and is removed when it does not.

    `manifest()` is called at the end; the digests of all files are added to what it returns. If another process has
    published `folder` meanwhile, its artifact stays and ours is dropped: both were made from the same inputs.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(folder)
    aside.mkdir()
    try:
        yield aside
        files = {str(path.relative_to(aside)): digest_file(path) for path in sorted(aside.rglob("*")) if path.is_file()}
        write_json(aside / MANIFEST, {**manifest(), "files": files})
        for path in [*aside.rglob("*"), aside]:
            _sync(path)
        _put(aside, folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _put(aside: Path, folder: Path) -> None:
    """Renames `aside` to `folder`, unless that is an artifact already; a leftover without a manifest makes way."""
    while not is_complete(folder):
        try:
            os.rename(aside, folder)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        _clear(folder)


def _clear(leftover: Path) -> None:
    """Empties a folder that is no artifact, or removes a file, so that a folder can be renamed to its name.

    Works through the folder's descriptor: an artifact that another process puts in its place meanwhile is not touched.
    """
    try:
        descriptor = os.open(leftover, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        leftover.unlink(missing_ok=True)  # a file or a link; of a folder, this fails
        return
    try:
        names = os.listdir(descriptor)
        for name in names if MANIFEST not in names else ():
            with suppress(FileNotFoundError):
                if stat.S_ISDIR(os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_mode):
                    shutil.rmtree(name, dir_fd=descriptor)
                else:
                    os.unlink(name, dir_fd=descriptor)
    finally:
        os.close(descriptor)


def _aside(path: Path) -> Path:
    """A hidden name beside `path`, of this process and this call on this machine alone."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")


def sweep(folder: Path) -> None:
    """Removes what killed processes left half written in `folder`, whose only writer is the caller."""
    for left in folder.glob(".*.partial"):
        _remove(left)


def sweep_orphans(folder: Path) -> None:
    """As `sweep`, in a folder that others write to: only what no process of this machine has written for an hour."""
    for left in folder.glob(".*.partial"):
        with suppress(FileNotFoundError):
            if time.time() - left.lstat().st_mtime > ORPHAN_SECONDS and not _lives(_writer_of(left)):
                _remove(left)


def _writer_of(aside: Path) -> int | None:
    pid = aside.name.removesuffix(".partial").rpartition(".")[2].partition("-")[0]
    return int(pid) if pid.isdigit() else None


def _lives(pid: int | None) -> bool:
    if pid is None:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def point_to(link: Path, target: Path) -> None:
    """Makes the relative symbolic link `link` name `target`, in one step."""
    aside = _aside(link)
    aside.symlink_to(os.path.relpath(target, link.parent))
    os.replace(aside, link)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
