"""Runs plans: what is complete is left alone, the rest is done in this process or under the DeepSpeed launcher."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tdro_cli import artifacts
from tdro_cli.errors import RunFailed, TdroError
from tdro_cli.run.plan import DISTRIBUTED, Plan
from tdro_cli.run.progress import Progress


@dataclass(frozen=True)
class Machines:
    """Where distributed stages run: processes on this machine, or a DeepSpeed host file."""

    num_gpus: int | None = None
    hostfile: str | None = None

    @property
    def many(self) -> bool:
        return self.hostfile is not None or (self.num_gpus or 1) > 1


def run_plan(plan: Plan, machines: Machines, shown: Progress, *, quiet: bool = False) -> bool:
    """Makes the plan's output exist; False where it did already.

    Raises TdroError where the input is at fault, RunFailed where the run is, or another run holds the folder.
    """
    folder = Path(plan.folder)
    if artifacts.is_complete(plan.out):
        artifacts.point_to(folder.parent / plan.stage, folder)
        return False
    with _alone(folder):
        if artifacts.is_complete(plan.out):  # another run has just finished it
            return False
        path = plan.save()
        if machines.many and plan.stage in DISTRIBUTED:
            _launch(path, machines, folder, quiet)
        else:
            from tdro_cli.run.worker import work

            work(plan, shown)
        if not artifacts.is_complete(plan.out):
            raise RunFailed(
                f"{plan.stage} ended without its output",
                where=str(folder / "log"),
                remedy="read the log there; the same command goes on from the newest checkpoint",
            )
    artifacts.point_to(folder.parent / plan.stage, folder)
    return True


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds the run folder; the lock goes with the process, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "a")  # noqa: SIM115 - held as long as the block lasts
    except OSError as error:
        raise TdroError(
            f"can't write to {folder}: {error.strerror}", remedy="give a folder that can be written to"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunFailed(
                "another process is at work on this run", where=str(folder), remedy="wait for it, or stop it first"
            ) from None
        yield


def _launch(plan: Path, machines: Machines, folder: Path, quiet: bool) -> None:
    """The worker under the DeepSpeed launcher; what ranks print is kept in the log."""
    from tdro_cli.run.distributed import free_port

    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(free_port())]
    if machines.hostfile:
        command += ["--hostfile", machines.hostfile]
    if machines.num_gpus:
        command += ["--num_gpus", str(machines.num_gpus)]
    command += ["--module", "tdro_cli.run.worker", str(plan), *(["--quiet"] if quiet else [])]
    (folder / "log").mkdir(exist_ok=True)
    with open(folder / "log" / "launcher.log", "a", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.PIPE, text=True, errors="replace", env=_environment()
        )
        told = _relay(process, log)
        code = process.wait()
    if code and not artifacts.is_complete(folder / "out"):
        faults = [line for line in told if line.startswith("error: ")]
        raise RunFailed(
            faults[0].removeprefix("error: ") if faults else f"a worker failed (the launcher returned {code})",
            where=str(folder / "log" / "launcher.log"),
            remedy="the same command goes on from the newest checkpoint",
        )


def _environment() -> dict[str, str]:
    cores = max(1, (os.cpu_count() or 1))
    return {"OMP_NUM_THREADS": str(cores), **os.environ, "PYTHONUNBUFFERED": "1"}


def _relay(process: subprocess.Popen, log) -> Sequence[str]:
    """Passes our own lines on to the user and everything to the log; returns the last lines."""
    last: list[str] = []
    for line in process.stderr:
        log.write(line)
        log.flush()
        last = [*last[-200:], line.rstrip("\n")]
        if line.startswith(("  ", "warning: ", "error: ")) and "[" not in line[:12]:
            print(line, end="", file=sys.stderr, flush=True)
    return last
