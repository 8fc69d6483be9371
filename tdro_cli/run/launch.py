"""Runs plans: what is complete is left alone, the rest is done in this process or under the DeepSpeed launcher."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tdro_cli import artifacts
from tdro_cli.errors import Problems, RunFailed, TdroError, known_faults
from tdro_cli.run.plan import DISTRIBUTED, Plan
from tdro_cli.run.progress import Bar, Progress
from tdro_cli.run.signals import die_with_parent

LOOK_SECONDS = 0.5  # between two looks at how far the ranks are
PROGRESS_LINE = re.compile(rb"  \S.*: \d+(/\d+)? \w+, ")  # as `progress.Plain` writes it
LEFTOVER_SECONDS = 60.0  # that the ranks of a killed run are given to end


@dataclass(frozen=True)
class Machines:
    """Where distributed stages run: processes on this machine, or a DeepSpeed host file."""

    num_gpus: int | None = None
    hostfile: str | None = None

    slots: int = 1  # of all hosts together

    @property
    def many(self) -> bool:
        return self.hostfile is not None or (self.num_gpus or 1) > 1

    @property
    def device(self) -> str | None:
        """What the processes compute on, by what the user said: "cpu", "cuda", or None: what this machine has."""
        if os.environ.get("DS_ACCELERATOR") == "cpu":
            return "cpu"
        return "cuda" if self.hostfile is not None or self.num_gpus is not None else None

    @property
    def ranks(self) -> int:
        return self.slots if self.hostfile is not None else self.num_gpus or 1


A_LINE = "write a line `HOST slots=N` for each machine"
LOCAL = ("localhost", "127.0.0.1")


def machines(num_gpus: int | None, hostfile: str | None, *, reach: bool = True) -> Machines:
    """Where to run, from the command's options. A host file that names this machine alone needs no ssh.

    Raises Problems for a host file with faults, with `reach` TdroError where several machines can't be from here.
    """
    if hostfile is None:
        return Machines(num_gpus)
    slots = read_hostfile(Path(hostfile))
    if num_gpus is not None:
        slots = {host: min(count, num_gpus) for host, count in slots.items()}
    if len(slots) == 1 and next(iter(slots)) in LOCAL:
        return Machines(next(iter(slots.values())))
    if reach and shutil.which("pdsh") is None:
        raise TdroError(
            "several machines are reached through pdsh, which is not installed here",
            where=hostfile,
            remedy="install pdsh on this machine, and let it reach every host by ssh without a password",
        )
    return Machines(num_gpus, hostfile, sum(slots.values()))


def read_hostfile(path: Path) -> dict[str, int]:
    """Processes of each host, from lines `HOST slots=N`; blank lines and what follows a # are left out.

    Raises TdroError if it can't be read, Problems with every bad line.
    """
    try:
        lines = artifacts.read_text(path).splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise TdroError(f"can't read the host file {path}: {reason}", remedy=A_LINE) from None
    slots: dict[str, int] = {}
    problems: list[TdroError] = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        fault = _host_fault(words, slots)
        if fault is None:
            slots[words[0]] = int(words[1].removeprefix("slots="))
        else:
            problems.append(TdroError(fault, where=f"{path}:{number}", remedy="write HOST slots=N, a host once"))
    if problems:
        raise Problems(problems)
    if not slots:
        raise TdroError("the host file names no host", where=str(path), remedy=A_LINE)
    return slots


def _host_fault(words: Sequence[str], known: Mapping[str, int]) -> str | None:
    if len(words) != 2 or not re.fullmatch(r"slots=[1-9]\d{0,5}", words[1]):
        return f"not a host and its processes: {' '.join(words)[:80]!r}"
    if not re.fullmatch(r"[\w.:\[\]@-]+", words[0]) or words[0].startswith("-"):
        return f"not a host's name: {words[0][:80]!r}"
    return f"the host {words[0]} is named twice" if words[0] in known else None


def run_plan(plan: Plan, machines: Machines, shown: Progress, *, quiet: bool = False) -> bool:
    """Makes the plan's output exist; False where it did already.

    Raises TdroError where the input is at fault, RunFailed where the run is, or another run holds the folder.
    """
    folder = Path(plan.folder)
    if artifacts.is_complete(plan.out):
        _refuse_damage(plan)
        artifacts.point_to(folder.parent / plan.stage, folder)
        return False
    with known_faults(plan.folder), _alone(folder) as lock:
        if artifacts.is_complete(plan.out):  # another run has just finished it
            return False
        for left_in in (folder, folder / "checkpoints"):
            artifacts.sweep(left_in)
        for shared in (folder.parent, artifacts.index_of(Path(plan.cache))):
            artifacts.sweep_orphans(shared)
        path = plan.save()
        if machines.many and _is_divided(plan):
            _launch(plan, path, machines, shown, lock)
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


def _refuse_damage(plan: Plan) -> None:
    """Raises RunFailed where a finished output is no longer what was written, before anything is built on it."""
    index = artifacts.index_of(Path(plan.cache))
    faults = artifacts.faults_of(plan.out, lambda path: artifacts.digest_file_once(path, index))
    if fault := next(faults, None):
        remedy = f"remove {plan.out}, and the same command makes it anew; `tdro show {plan.folder} --verify` tells more"
        raise RunFailed(f"the finished output of {plan.stage} is damaged", where=fault, remedy=remedy)


def _is_divided(plan: Plan) -> bool:
    """Whether the stage runs on several ranks where there are any."""
    if plan.stage == "mine":
        from tdro_cli.retrieve.mining import worth_dividing

        section = plan.settings().mine
        return section is not None and worth_dividing(section)
    return plan.stage in DISTRIBUTED


@contextmanager
def _alone(folder: Path) -> Iterator[int]:
    """Holds the run folder; the lock goes with the process and the launcher it started, however they end."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "a+")  # noqa: SIM115 - held as long as the block lasts
    except OSError as error:
        raise TdroError(
            f"can't write to {folder}: {error.strerror}", remedy="give a folder that can be written to"
        ) from None
    with lock:
        began = time.monotonic()
        while not _locked(lock):
            # the ranks of a killed command end by themselves, and hold the lock until then
            if _holder_lives(lock) or time.monotonic() - began > LEFTOVER_SECONDS:
                raise RunFailed(
                    "another process is at work on this run", where=str(folder), remedy="wait for it, or stop it first"
                )
            time.sleep(0.2)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield lock.fileno()


def _locked(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder_lives(lock: IO[str]) -> bool:
    lock.seek(0)
    pid = lock.read().strip()
    return not pid.isdigit() or Path(f"/proc/{pid}").exists() or not Path("/proc").exists()


# ---- several processes ----


def _launch(plan: Plan, path: Path, machines: Machines, shown: Progress, lock: int) -> None:
    """The worker under the DeepSpeed launcher. What ranks print goes to the log; progress and faults to the user."""
    folder = Path(plan.folder)
    (folder / "log").mkdir(exist_ok=True)
    log_path = folder / "log" / "launcher.log"
    log_from = log_path.stat().st_size if log_path.exists() else 0
    with open(log_path, "a", encoding="utf-8") as log, _Follower(plan, shown, log_path, log_from):
        process = subprocess.Popen(
            _command(path, machines),
            stdout=log,
            stderr=log,
            env=_environment(machines),
            start_new_session=True,  # Ctrl-C reaches the ranks through us, once
            pass_fds=[lock],
            preexec_fn=die_with_parent,
        )
        try:
            code = process.wait()
        except BaseException:
            process.terminate()  # the launcher tells the ranks, which save and end
            process.wait()
            raise
    told = _own_lines(log_path, log_from, machines)
    for line in dict.fromkeys(line for line in told if line.startswith("warning: ")):
        shown.warn(line.removeprefix("warning: "))
    if artifacts.is_complete(plan.out):
        return
    raise _fault(told, code, log_path)


def _command(plan: Path, machines: Machines) -> list[str]:
    """The launcher's command line. On one machine its per-machine part is called at once, which spares one start."""
    worker = ["--no_local_rank", "--module", "tdro_cli.run.worker", str(plan)]
    if machines.hostfile:
        count = ["--num_gpus", str(machines.num_gpus)] if machines.num_gpus else []
        host = ["--hostfile", machines.hostfile, "--master_port", str(free_port())]
        return [sys.executable, "-m", "deepspeed.launcher.runner", *host, *count, *worker]
    place = {"localhost": _devices(machines.num_gpus or 1)}
    world = base64.urlsafe_b64encode(json.dumps(place).encode()).decode()
    here = [f"--world_info={world}", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    return [sys.executable, "-u", "-m", "deepspeed.launcher.launch", *here, *worker]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _devices(count: int) -> list[int | str]:
    """The first `count` devices; where CUDA_VISIBLE_DEVICES names some, the first of those."""
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    if not visible or os.environ.get("DS_ACCELERATOR") == "cpu":
        return list(range(count))
    if count > len(visible):
        raise TdroError(
            f"{count} GPUs are asked for, but CUDA_VISIBLE_DEVICES names {len(visible)}",
            where="--num-gpus",
            remedy=f"ask for at most {len(visible)}, or change the variable",
        )
    return [int(name) if name.isdigit() else name for name in visible[:count]]


def _environment(machines: Machines) -> dict[str, str]:
    """The cores of this machine divided among its processes, unless the user has said otherwise."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // (machines.num_gpus or 1))
    return {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONUNBUFFERED": "1"}


class _Follower:
    """Shows the ranks' progress as if they were this process, out of the metrics that the first one writes."""

    def __init__(self, plan: Plan, shown: Progress, log: Path, log_from: int):
        self.plan, self.shown, self.log, self.log_from = plan, shown, log, log_from
        self.file = Path(plan.folder) / "metrics.jsonl"
        self.before = self._identity()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *exc: object) -> None:
        self.ended.set()
        self.thread.join()

    def _identity(self) -> int | None:
        """Another number for each rewriting: ranks that go on from a checkpoint begin by one."""
        try:
            return self.file.stat().st_ino
        except OSError:
            return None

    def _follow(self) -> None:
        if self.plan.stage in ("mine", "eval"):  # have no steps and no metrics
            return self._follow_log()
        steps = getattr(self.plan.settings(), self.plan.stage.replace("-", "_")).steps
        bar, read = None, 0
        while True:
            ended = self.ended.wait(LOOK_SECONDS)
            now = self._identity()
            if now is not None and now != self.before:
                bar = bar or self.shown.start(self.plan.stage, steps, "steps")
                read = self._show_new(bar, read)
            if ended:
                break
        if bar is not None:
            bar.close()

    def _follow_log(self) -> None:
        """Repeats the lines of progress that the first rank prints."""
        with open(self.log, "rb") as log:
            log.seek(self.log_from)
            rest, ended = b"", False
            while not ended:
                ended = self.ended.wait(LOOK_SECONDS)
                *lines, rest = (rest + log.read()).split(b"\n")
                for line in lines:
                    if PROGRESS_LINE.match(line):
                        self.shown.note(line.decode(errors="replace"))

    def _show_new(self, bar: Bar, read: int) -> int:
        with open(self.file, "rb") as file:
            file.seek(read)
            lines = file.read().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        if whole:
            newest = json.loads(whole[-1])
            facts = {name: newest[name] for name in ("loss", "effective_tasks") if newest.get(name) is not None}
            bar.advance(len(whole), **facts)
        return read + sum(map(len, whole))


def _own_lines(log: Path, start: int, machines: Machines) -> list[str]:
    """What the processes of this run printed, without the host names that pdsh puts before a line."""
    with open(log, encoding="utf-8", errors="replace") as file:
        file.seek(start)
        lines = file.read().splitlines()
    return lines if machines.hostfile is None else [_after_host(line) for line in lines]


def _after_host(line: str) -> str:
    host, colon, rest = line.partition(": ")
    return rest if colon and " " not in host and host not in ("error", "warning") else line


def _fault(told: Sequence[str], code: int, log: Path) -> TdroError:
    """The first fault that a rank named, else the last words of one that fell."""
    for number, line in enumerate(told):
        if line.startswith("error: "):
            more = deque((rest.strip() for rest in told[number + 1 : number + 3] if rest.startswith("  ")), maxlen=2)
            kind = TdroError if code == TdroError.exit_code else RunFailed
            where, remedy = (more[0], more[1]) if len(more) == 2 else (str(log), more[0] if more else None)
            return kind(line.removeprefix("error: "), where=where, remedy=remedy)
    words = next((line for line in map(_after_rank, reversed(told)) if _names_exception(line)), None)
    if words is None:
        words = f"killed by signal {256 - code}" if 128 < code < 256 else f"the launcher returned {code}"
    return RunFailed(
        f"a worker failed: {words}", where=str(log), remedy="the same command goes on from the newest checkpoint"
    )


def _after_rank(line: str) -> str:
    """Without the rank that torch puts in front: '[rank1]: '."""
    return line.split("]: ", 1)[1] if line.startswith("[rank") and "]: " in line else line


def _names_exception(line: str) -> bool:
    """'SomethingError: why'."""
    name = line.partition(":")[0]
    return name.endswith(("Error", "Exception")) and " " not in name
