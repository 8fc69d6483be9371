"""Runs of a tiny recipe over all stages, killed at random moments and started again until they are done.

`python tests/faults/kills.py --kills 20 --seed 1 [--ranks 2]` prints what was killed where, and fails where an artifact
differs from the undisturbed run's.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"

from test_end_to_end import ROWS, shorten

from tdro_cli import artifacts

STAGES = ("mine", "dedup", "backbone", "train-ref", "learn-weights", "transfer", "finetune", "eval")
PRELOADED = (  # what a run imports in time
    *("deepspeed", "peft", "transformers", "faiss", "ir_measures", "matplotlib.figure", "pyarrow.parquet", "pandas"),
    *("scipy.stats", "tensorboard.summary.writer.event_file_writer", "tdro_cli.learn.weight_learning"),
    *("tdro_cli.model.export", "tdro_cli.cli", "tdro_cli.report.tables"),
)
DISTRIBUTED = ("train-ref", "learn-weights", "finetune")
PATIENCE = 900.0  # seconds that a run may take to its end, on a machine that others use, too
RECIPE = f"""
name: killed
seed: 3
tasks: [{", ".join(f"{{name: {name}, path: data/{name}.jsonl.gz}}" for name in ROWS)}]
backbone: {{name: scratch, options: {{hidden_size: 32, layers: 1, heads: 2, vocab_size: 600}}}}
encoder: {{pooling: mean, query_length: 24, passage_length: 32, temperature: 0.05}}
lora: {{r: 2, dropout: 0.2}}
mine: {{negative_miner: bm25, rank_window: [2, 30], keep: 3, pad: true}}
dedup: {{deduplicator: simhash}}
train_ref: &trained
  steps: 12
  batch: {{queries: 8}}
  optimizer: {{learning_rate: 3e-3}}
  checkpoint: {{every_steps: 3}}
learn_weights:
  steps: 12
  batch: {{queries: 9, passages_per_query: 3}}
  optimizer: {{learning_rate: 3e-3}}
  checkpoint: {{every_steps: 3}}
finetune: *trained
eval:
  benchmarks: [{{name: folder, options: {{path: data/code_search}}}}]
  models: [bm25, train_ref, finetune]
"""


def make_project(folder: Path) -> Path:
    """The recipe with its data, cut from the embedded sample."""
    from tdro_cli.data import sample

    everything, sample.PACKAGES = sample.PACKAGES, (sample.STDLIB,)  # a sixth of the time, and enough for three tasks
    try:
        sample.write_sample(folder / "sample")
    finally:
        sample.PACKAGES = everything
    shorten(folder / "sample", folder / "data")
    shutil.rmtree(folder / "sample")
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


# ---- a run ----


def fork_server() -> Any:
    """Forks processes that have imported everything, so that a run begins in a moment."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def _command(folder: Path, told: Path, arguments: list[str]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born deaf to it
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # until there is a command to be stopped
    os.setsid()  # so that Ctrl-C can reach the whole group, as a terminal sends it
    os.chdir(folder)
    with open(told, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    sys.argv = ["tdro", *arguments]
    from tdro_cli import cli

    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        cli.main()
        code = 0
    except KeyboardInterrupt:  # before it had begun
        print("stopped", file=sys.stderr)
        code = 130
    except SystemExit as end:
        code = end.code or 0
    # ends as an interpreter does: the fork server would call what goes wrong from here on a failure of the command
    for last in (threading._shutdown, atexit._run_exitfuncs):
        try:
            last()
        except BaseException:
            print(f"while ending with {code}: {traceback.format_exc().splitlines()[-1]}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@dataclass
class Running:
    """`tdro run` in a process of its own, on runs in `runs`."""

    process: Any
    runs: Path
    told: Path

    @classmethod
    def start(cls, server: Any, project: Path, runs: Path, ranks: int) -> Running:
        told = runs.with_suffix(".told")
        arguments = ["run", "recipe.yaml", "--runs", str(runs), *(["--num-gpus", str(ranks)] if ranks > 1 else [])]
        process = server.Process(target=_command, args=(project, told, arguments))
        process.start()
        return cls(process, runs, told)

    def wait_for(self, stage: str) -> bool:
        """Whether the stage was begun before the run ended."""
        while self.process.is_alive():
            if any((self.runs / "killed").glob(f"{stage}-*/lock")):
                return True
            time.sleep(0.01)
        return False

    def end(self) -> int:
        self.process.join(PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"the run hangs: {self.told.read_text()[-2000:]}")
        return self.process.exitcode


def at_work(runs: Path) -> str:
    """The stage that a run has begun and not finished."""
    begun = {path.parent.name.rpartition("-")[0]: path.parent for path in (runs / "killed").glob("*/lock")}
    open_ = [stage for stage in STAGES if stage in begun and not artifacts.is_complete(begun[stage] / "out")]
    return open_[-1] if open_ else "between stages"


# ---- killing ----


def strike(running: Running, how: str, draw: random.Random) -> str:
    """Kills the run, or a part of it; names what was killed."""
    pid = running.process.pid
    if how in ("a rank", "the launcher"):
        there = list(_processes(pid, "tdro_cli.run.worker" if how == "a rank" else "deepspeed.launcher.launch"))
        if how == "a rank":
            there = [one for one in there if one not in set(_processes(pid, "deepspeed.launcher.launch"))]
        if there:
            os.kill(draw.choice(there), signal.SIGKILL)
            return how
        how = "SIGKILL"
    if running.process.is_alive():
        if how == "SIGINT":
            while os.getpgid(pid) != pid:  # not yet the head of a group: a process that is no command yet
                time.sleep(0.01)
            os.killpg(pid, signal.SIGINT)
        else:
            os.kill(pid, getattr(signal, how))
    return how


def _processes(parent: int, words: str) -> Iterator[int]:
    """The processes below `parent` whose command line holds `words`."""
    parents = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    for pid in parents:
        above = pid
        while above in parents and above != parent:
            above = parents[above]
        with contextlib.suppress(OSError):
            if above == parent and pid != parent and words in Path(f"/proc/{pid}/cmdline").read_text():
                yield pid


# ---- what is left ----

# what says when and how fast, and what was found in a cache: everything else is the same in every run
OF_THE_MOMENT = {
    "published",
    "published_from",
    "seconds",
    "seconds_left",
    "tokens_per_second",
    "waiting_share",
    "peak_memory",
}
OF_THE_MOMENT |= {"files", "base_model_name_or_path"}
COUNTED_BY_PROCESS = {"reference_forwards", "reference_hits", "queries_per_second", "forwards", "hits"}


def essence(out: Path) -> dict[str, str]:
    """The content of an artifact by file, without what no two runs share."""
    found = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file() and path.name != "README.md"):
        name = str(path.relative_to(out))
        if path.suffix in (".json", ".jsonl") and "tokenizer" not in path.name:
            lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            found[name] = artifacts.digest_of([_without(json.loads(line)) for line in lines])
        else:
            found[name] = artifacts.digest_file(path)
    return found


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        left_out = OF_THE_MOMENT | COUNTED_BY_PROCESS
        return {key: _without(item) for key, item in value.items() if key not in left_out}
    return [_without(item) for item in value] if isinstance(value, list) else value


def outputs(runs: Path) -> dict[str, Path]:
    """The output of each stage that there is."""
    found = [path for path in (runs / "killed").glob("*/out") if not path.parent.is_symlink()]
    return {path.parent.name.rpartition("-")[0]: path for path in found}


def check_whole(runs: Path) -> None:
    """Whatever looks like an artifact is one: a manifest, and every file as it says."""
    for out in outputs(runs).values():
        assert artifacts.is_complete(out), f"{out} without its manifest"
        for name, digest in artifacts.manifest_of(out)["files"].items():
            assert artifacts.digest_file(out / name) == digest, f"{out / name} is not what its manifest says"


@dataclass
class Report:
    """What was killed, and where."""

    kills: Counter[str] = field(default_factory=Counter)
    stages: Counter[str] = field(default_factory=Counter)
    lives: int = 0

    @property
    def total(self) -> int:
        return sum(self.kills.values())


def kill_runs(project: Path, kills: int, seed: int, ranks: int = 1, tell: Any = None) -> Report:
    """Runs the recipe again and again, kills it `kills` times in all, and compares what every run leaves in the end."""
    server, draw, report = fork_server(), random.Random(seed), Report()
    ways = ["SIGKILL", "SIGKILL", "SIGTERM", "SIGINT", *(["a rank", "the launcher"] if ranks > 1 else [])]
    whole = project / f"whole-{ranks}"
    if not whole.exists():
        assert Running.start(server, project, whole, ranks).end() == 0, whole.with_suffix(".told").read_text()
    expected = {stage: essence(out) for stage, out in outputs(whole).items()}
    took = stage_seconds(whole)
    assert set(expected) == set(STAGES)
    while report.total < kills:
        report.lives += 1
        runs = project / f"killed-{seed}-{ranks}-{report.lives}"
        aims = [stage for stage in (DISTRIBUTED if ranks > 1 else STAGES) for _ in range(draw.randrange(4))]
        for stage in aims[: kills - report.total]:
            _one_kill(server, project, runs, ranks, stage, draw.choice(ways), took[stage], draw, report)
        pass_an_hour(runs)
        assert Running.start(server, project, runs, ranks).end() == 0, runs.with_suffix(".told").read_text()
        check_whole(runs)
        for stage, out in outputs(runs).items():
            got = essence(out)
            differing = sorted(n for n in got.keys() | expected[stage].keys() if got.get(n) != expected[stage].get(n))
            assert not differing, f"{out}: {differing} differ from the undisturbed run (seed {seed})"
        left = [str(path) for path in runs.rglob(".*.partial*")]
        assert not left, f"left behind: {left}"
        if tell:
            tell(f"life {report.lives}: {report.total} kills so far, {dict(report.stages)}")
        shutil.rmtree(runs)
    return report


def pass_an_hour(runs: Path) -> None:
    """Makes what is half written old enough to be cleared away in folders that other machines may write to."""
    for left in runs.rglob(".*.partial*"):
        os.utime(left, (left.stat().st_atime, left.stat().st_mtime - artifacts.ORPHAN_SECONDS))


def stage_seconds(runs: Path) -> dict[str, float]:
    """How long each stage of a run was at work, from its lock to its manifest."""
    took = {}
    for stage, out in outputs(runs).items():
        began = (out.parent / "plan.json").stat().st_mtime
        took[stage] = max(0.1, (out / artifacts.MANIFEST).stat().st_mtime - began)
    return took


def _one_kill(server, project, runs, ranks, stage, how, seconds, draw, report: Report) -> None:
    running = Running.start(server, project, runs, ranks)
    if draw.random() < 0.85:
        running.wait_for(stage)
    time.sleep(draw.random() * seconds)
    where = at_work(runs)
    if running.process.is_alive():
        killed = strike(running, how, draw)
        report.kills[killed] += 1
        report.stages[where] += 1
    code = running.end()
    told = running.told.read_text() if running.told.exists() else ""  # killed before it said a word
    told = f"{how} at {where}, exit code {code}\n{told}"
    assert "Traceback" not in told, told
    if how in ("SIGTERM", "SIGINT") and code == 130:
        assert re.search(r"stopped", told), told
    elif code == 1:
        assert told.count("error: ") == 1 and "the same command goes on" in told, told
    else:
        assert code in (0, 130, -signal.SIGKILL, -signal.SIGTERM), (code, told)
    check_whole(runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keep the project here")
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="tdro-kills-"))
    if not (folder / "recipe.yaml").exists():
        make_project(folder)
    began = time.monotonic()
    report = kill_runs(folder, given.kills, given.seed, given.ranks, tell=lambda line: print(line, flush=True))
    print(
        f"{report.total} kills in {report.lives} runs, seed {given.seed}, {given.ranks} ranks, "
        f"{time.monotonic() - began:.0f} s: all artifacts as in the undisturbed run"
    )
    print(f"  {dict(report.kills)}\n  {dict(report.stages)}")


if __name__ == "__main__":
    main()
