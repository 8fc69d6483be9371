"""What has been run: all runs with their state, and the way from an artifact back to the raw files."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tdro_cli import artifacts
from tdro_cli.errors import TdroError

_RUN_FOLDER = re.compile(r"(.+)-[0-9a-f]{12}")
SHORT = 12  # digits of a digest that are shown


# ---- all runs ----


def list_runs(runs: Path) -> list[dict[str, Any]]:
    """Every run folder under `runs`, the oldest first.

    `status`: complete; running (a process holds its lock); partial (begun, and no process at work); damaged (its
    manifest can't be read). `checkpoint` is the newest whole checkpoint's step, `steps_done` the steps logged.
    Raises TdroError if there is no such folder.
    """
    if not runs.is_dir():
        raise TdroError(f"there is no folder {runs}", remedy="name the folder of runs with --runs, or run a recipe")
    found = [
        _run(folder)
        for recipe in sorted(runs.iterdir())
        if recipe.is_dir() and not recipe.name.startswith(".")
        for folder in sorted(recipe.iterdir())
        if _RUN_FOLDER.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink()
    ]
    return sorted(found, key=lambda run: (run["when"] or "", run["folder"]))


def _run(folder: Path) -> dict[str, Any]:
    run = {
        "recipe": folder.parent.name,
        "stage": _RUN_FOLDER.fullmatch(folder.name)[1],
        "status": "partial",
        "when": _time_of(folder),
        "bytes": size(folder),
        "checkpoint": None,
        "steps_done": _steps_done(folder / "metrics.jsonl"),
        "steps": _steps(folder),
        "folder": str(folder),
    }
    if whole := artifacts.checkpoints_in(folder / "checkpoints"):
        run["checkpoint"] = artifacts.step_of(whole[0])
    if artifacts.is_complete(folder / "out"):
        try:
            run |= {"status": "complete", "when": str(artifacts.manifest_of(folder / "out")["published"])}
        except (OSError, ValueError, KeyError, TypeError):
            run["status"] = "damaged"
    elif _is_held(folder / "lock"):
        run["status"] = "running"
    return run


def size(folder: Path) -> int:
    """Bytes of all files in a folder, links not followed."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # a running stage removes files
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def _is_held(lock: Path) -> bool:
    """Whether a living process holds the run's lock.

    The lock is tried only where the process that wrote its number into it lives: a run that is just about to start
    must not meet ours.
    """
    try:
        with open(lock) as file:
            pid = file.read().strip()
            if Path("/proc").is_dir() and not (pid.isdigit() and Path(f"/proc/{pid}").exists()):
                return False
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    except OSError:
        return False
    return False


def _time_of(folder: Path) -> str | None:
    """When a run that has published nothing was last at work."""
    times = []
    for name in ("plan.json", "metrics.jsonl", "checkpoints", "lock"):
        with suppress(OSError):
            times.append((folder / name).stat().st_mtime)
    return datetime.fromtimestamp(max(times), UTC).isoformat(timespec="seconds") if times else None


def _steps(folder: Path) -> int | None:
    """The steps that the plan asks for."""
    try:
        plan = artifacts.read_json(folder / "plan.json")
        steps = plan["recipe"][plan["stage"].replace("-", "_")]["steps"]
    except (AttributeError, OSError, ValueError, KeyError, TypeError):
        return None
    return steps if isinstance(steps, int) else None


def _steps_done(metrics: Path) -> int | None:
    """One more than the step in the last whole line (they count from 0), without reading the rest of the file."""
    try:
        with open(metrics, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - (1 << 16)))
            tail = file.read()
    except OSError:
        return None
    steps = re.findall(rb'"step": ?(\d+)', tail[: tail.rfind(b"\n") + 1])
    return int(steps[-1]) + 1 if steps else None


# ---- the runs of one experiment ----


@dataclass(frozen=True)
class StageRun:
    """One stage of an experiment. `status` is that of `list_runs`, or absent: nothing of it was begun.

    Here damaged is also an output that is no longer what was written; `fault` says in what.
    """

    stage: str
    status: str
    folder: Path
    digest: str = ""
    when: str | None = None
    steps_done: int | None = None
    steps: int | None = None
    plan: Mapping[str, Any] = field(default_factory=dict)
    fault: str | None = None

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def read(self, name: str) -> Any:
        """A JSON file of the stage's output; None where there is none that can be read."""
        try:
            return artifacts.read_json(self.out / name)
        except (OSError, ValueError):
            return None

    def metrics(self) -> list[dict[str, Any]]:
        """What was logged, a step an item; of a run that goes on, up to now; of a damaged one, nothing."""
        if self.fault:
            return []
        from tdro_cli.learn.training import read_metrics

        path = next((p for p in (self.out / "metrics.jsonl", self.folder / "metrics.jsonl") if p.is_file()), None)
        return read_metrics(path) if path else []


@dataclass(frozen=True)
class Experiment:
    """Runs that belong together: every stage that `tdro run` does, in order, absent ones included.

    `recipe` is the recipe with its defaults and with what the command line changed (`overrides`), `text` the recipe as
    it was written. `others` are the recipe's other run folders, as in `list_runs`.
    """

    recipe: Mapping[str, Any]
    text: str
    overrides: Sequence[str]
    folder: Path
    stages: Mapping[str, StageRun]
    others: Sequence[Mapping[str, Any]]

    @property
    def name(self) -> str:
        return self.recipe["name"]

    def complete(self, stage: str) -> StageRun | None:
        """The stage's run if it is complete."""
        run = self.stages.get(stage)
        return run if run is not None and run.status == "complete" else None

    def data_digests(self) -> dict[str, str]:
        """Of each task the digest of the file that was read, where a stage has read it."""
        found = {}
        for run in self.stages.values():
            for name, task in ((run.plan.get("numbers") or {}).get("tasks") or {}).items():
                if task.get("data"):
                    found[name] = task["data"]
        return found


def experiment(place: Path) -> Experiment:
    """The experiment that a recipe's folder of runs, a run folder, or anything in one belongs to.

    Of a recipe's folder it is the newest run's. Runs belong together by the digests that their plans name: what the run
    was made from, and of what was made from it the newest. Raises TdroError if there is no run.
    """
    folder, chosen = _recipe_folder(place)
    runs = {run.digest: run for run in sorted(_stage_runs(folder), key=lambda run: run.when or "")}
    if not runs:
        remedy = "name a recipe, a recipe's folder such as runs/NAME, or a run folder in it; `tdro runs` lists them"
        raise TdroError(f"there are no runs in {place}", remedy=remedy)
    start = next((run for run in runs.values() if run.folder.name == chosen), list(runs.values())[-1])
    lines = {digest: _ancestors(run, runs) for digest, run in runs.items()}
    below = [digest for digest in runs if start.digest in lines[digest]]
    last = max(below, key=lambda digest: len(lines[digest]))  # of equally long ones the first, so:
    last = [digest for digest in below if len(lines[digest]) == len(lines[last])][-1]
    return _experiment(runs[last].plan, [runs[digest] for digest in lines[last]], folder)


def planned_experiment(plans: Mapping[str, Any]) -> Experiment:
    """The experiment of a recipe's plans, as far as it has been run."""
    first = next(iter(plans.values()))
    there = [_stage_run(Path(plan.folder)) for plan in plans.values() if (Path(plan.folder) / "plan.json").is_file()]
    plan = {"recipe": first.recipe, "recipe_text": first.recipe_text, "overrides": first.overrides}
    return _experiment(plan, there, Path(first.folder).parent)


def _experiment(plan: Mapping[str, Any], runs: Sequence[StageRun], folder: Path) -> Experiment:
    found = {run.stage: _checked(run, folder.parent) for run in runs}
    stages = {name: found.get(name, StageRun(name, "absent", folder / name)) for name in _stages_of(plan, found)}
    used = {run.folder.name for run in runs}
    others = [run for run in list_runs(folder.parent) if run["recipe"] == folder.name] if folder.is_dir() else []
    others = [run for run in others if Path(run["folder"]).name not in used]
    text, overrides = plan.get("recipe_text", ""), plan.get("overrides", ())
    return Experiment(plan["recipe"], text, overrides, folder, stages, others)


def _checked(run: StageRun, runs: Path) -> StageRun:
    """The run, damaged where its output is not what its manifest says."""
    if run.status not in ("complete", "damaged"):
        return run
    index = artifacts.index_of(runs / ".cache")
    fault = next(artifacts.faults_of(run.out, lambda path: artifacts.digest_file_once(path, index)), None)
    return replace(run, status="damaged", fault=fault) if fault else run


def _stages_of(plan: Mapping[str, Any], found: Mapping[str, StageRun]) -> list[str]:
    """The stages that the recipe has; those that were run where its plugins are no longer installed."""
    from pydantic import ValidationError

    from tdro_cli.recipe import LoadedRecipe, Recipe
    from tdro_cli.run.plan import STAGES, stages_of

    try:
        wanted = stages_of(LoadedRecipe(Recipe.model_validate(plan["recipe"]), Path("recipe"), "", {}))
    except (TdroError, ValidationError):
        wanted = set()
    return [stage for stage in STAGES if stage in wanted or stage in found]


def _recipe_folder(place: Path) -> tuple[Path, str | None]:
    """The folder of a recipe's runs, and the name of the run folder that `place` is, or lies in."""
    if not place.exists():
        raise TdroError(f"there is no {place}", remedy="`tdro runs` lists what there is")
    here = place.resolve()
    for folder in (here, *here.parents):
        if _RUN_FOLDER.fullmatch(folder.name) and (folder / "plan.json").is_file():
            return _as_given(folder.parent), folder.name
    return place, None


def _stage_runs(folder: Path) -> Iterator[StageRun]:
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if _RUN_FOLDER.fullmatch(path.name) and not path.is_symlink() and _read_plan(path / "out"):
            yield _stage_run(path)


def _stage_run(folder: Path) -> StageRun:
    known, plan = _run(folder), _read_plan(folder / "out")
    kept = {key: known[key] for key in ("stage", "status", "when", "steps_done", "steps")}
    return StageRun(**kept, folder=folder, digest=plan.get("digest", ""), plan=plan)


def _ancestors(run: StageRun, runs: Mapping[str, StageRun]) -> list[str]:
    """Digests of the runs that `run` was made from, and its own; those whose folders are gone left out."""
    found: dict[str, Any] = {}
    todo = [run.digest]
    while todo:
        digest = todo.pop()
        if digest in runs and digest not in found:
            found[digest] = None
            todo += ((runs[digest].plan.get("numbers") or {}).get("above") or {}).values()
    return list(found)


# ---- where an artifact comes from ----


def provenance(artifact: Path, *, verify: bool = False) -> dict[str, Any]:
    """The stage that made `artifact` and all stages above it, the nearest first, with the raw files they read.

    `artifact`: the output folder of a stage, its run folder, or anything inside it. With `verify`, every file of every
    stage and every raw file is read and its digest compared; `faults` then lists what differs (None: not verified).
    Raises TdroError if `artifact` is not part of a complete stage.
    """
    out = _output_of(artifact)
    with _records_of(out):
        return _provenance(artifact, out, verify)


@contextmanager
def _records_of(out: Path) -> Iterator[None]:
    """Turns what a manifest or plan of the wrong shape leads to into a TdroError."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise TdroError(
            f"the manifest or the plan of {out} is damaged ({type(error).__name__}: {error})",
            where=str(out / artifacts.MANIFEST),
            remedy="`tdro runs` lists what is whole; remove the folder, and its command makes it again",
        ) from error


def _provenance(artifact: Path, out: Path, verify: bool) -> dict[str, Any]:
    stages, todo, missing = {}, [out], []
    while todo:
        folder = todo.pop(0)
        manifest = _read_manifest(folder)
        if manifest["digest"] in stages:
            continue
        plan = _read_plan(folder)
        stages[manifest["digest"]] = _stage(folder, manifest, plan)
        for stage, digest in manifest["inputs"].items():
            above = _above(folder, stage, digest, plan)
            if above is not None:
                todo.append(above)
            elif digest not in stages:
                missing.append({"stage": stage, "digest": digest, "of": manifest["stage"]})
    raw = _raw_files(stages.values())
    chain: dict[str, Any] = {
        "artifact": str(artifact),
        "out": str(out),
        "stages": list(stages.values()),
        "missing": missing,
        "raw": raw,
        "faults": None,
    }
    if verify:
        chain["faults"] = [fault for stage in stages.values() for fault in _faults(stage)]
        chain["faults"] += [fault for file in raw for fault in [_raw_fault(file)] if fault]
        chain["faults"] += [f"{gap['stage']}-{gap['digest'][:SHORT]}, input of {gap['of']}, is gone" for gap in missing]
    for stage in stages.values():
        del stage["manifest"], stage["raw"]
    return chain


def _output_of(artifact: Path) -> Path:
    """The stage's output folder that `artifact` is, holds, or lies in."""
    if not artifact.exists():
        raise TdroError(f"there is no {artifact}", remedy="`tdro runs` lists what there is")
    here = artifact.resolve()
    for folder in [here / "out", here, *here.parents]:
        if _is_stage(folder):
            return _as_given(folder)
    if (here / "plan.json").is_file():
        raise TdroError(
            f"{artifact} is not complete: it has no output yet",
            remedy="the command that began it goes on from the newest checkpoint; `tdro runs` shows how far it is",
        )
    raise TdroError(
        f"{artifact} is no output of a stage, and lies in none",
        remedy="name a run folder, its `out`, or a file in it such as measures.json; `tdro runs` lists them",
    )


def _as_given(folder: Path) -> Path:
    """Relative to the working directory where it lies below it, as everything else is shown."""
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def _is_stage(folder: Path) -> bool:
    """A published folder that names its stage: checkpoints and cached training files have manifests, too."""
    try:
        return {"stage", "digest", "numbers"} <= artifacts.manifest_of(folder).keys()
    except (OSError, ValueError, AttributeError):
        return False


def _read_manifest(folder: Path) -> dict[str, Any]:
    manifest = artifacts.manifest_of(folder)
    return {"inputs": {}, "files": {}, "versions": {}, **manifest}


def _read_plan(folder: Path) -> dict[str, Any]:
    """The plan beside an output; empty where the output was taken elsewhere without it."""
    try:
        plan = artifacts.read_json(folder.parent / "plan.json")
        return plan if isinstance(plan, dict) else {}
    except (OSError, ValueError):
        return {}


def _above(folder: Path, stage: str, digest: str, plan: Mapping[str, Any]) -> Path | None:
    """The output of an earlier stage: where the plan says, or beside this run if all were moved together."""
    recorded = (plan.get("inputs") or {}).get(stage)
    beside = folder.resolve().parent.parent / f"{stage}-{digest[:SHORT]}" / "out"
    for place in [beside, *([Path(recorded)] if recorded else [])]:
        if _is_stage(place) and artifacts.manifest_of(place)["digest"] == digest:
            return _as_given(place.resolve())
    return None


def _stage(folder: Path, manifest: Mapping[str, Any], plan: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "stage": manifest["stage"],
        "digest": manifest["digest"],
        "recipe": manifest.get("recipe"),
        "folder": str(folder),
        "published": manifest.get("published"),
        "published_from": manifest.get("published_from"),
        "commit": manifest.get("commit"),
        "devices": manifest.get("devices"),
        "versions": manifest["versions"],
        "plugins": list(_plugins(manifest["numbers"])),
        "inputs": manifest["inputs"],
        "files": len(manifest["files"]),
        "bytes": size(folder),
        "manifest": manifest,
        "raw": list(_raw_of(manifest["numbers"], plan)),
    }


def _plugins(numbers: Any, key: str = "") -> Iterator[dict[str, Any]]:
    """The plugins that a stage's numbers name, wherever they stand; each once."""
    if isinstance(numbers, Mapping):
        if "distribution" in numbers and "name" in numbers:
            known = {"name": numbers["name"], "distribution": numbers["distribution"]}
            yield {**known, "options": numbers.get("options", {})}
            return
        for name, value in numbers.items():
            yield from _plugins(value, name)
    elif isinstance(numbers, list):
        for value in numbers:
            yield from _plugins(value, key)


def _raw_of(numbers: Mapping[str, Any], plan: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The files from outside that a stage read, with what the digest recorded of them."""
    recipe = plan.get("recipe") or {}
    paths = {task["name"]: task["path"] for task in recipe.get("tasks") or []}
    tasks = {**(numbers.get("tasks") or {}), **((numbers.get("backbone") or {}).get("data") or {})}
    for name, task in tasks.items():
        if task.get("data") is not None:
            skip = recipe.get("skip_bad_rows", False)
            yield {"kind": "task", "name": name, "path": paths.get(name), "digest": task["data"], "skip_bad_rows": skip}
    if "weights_from" in numbers:
        path = (recipe.get("transfer") or {}).get("weights_from")
        yield {"kind": "weights", "name": "weights_from", "path": path, "digest": numbers["weights_from"]}
    benchmarks = (recipe.get("eval") or {}).get("benchmarks") or []
    chosen = {"against": (recipe.get("dedup") or {}).get("against") or benchmarks, "collections": benchmarks}
    for key, choices in chosen.items():
        for number, benchmark in enumerate(numbers.get(key) or []):
            if "files" in benchmark:
                path = choices[number]["options"]["path"] if number < len(choices) else None
                seen = {"digest": artifacts.digest_of(benchmark["files"]), "files": benchmark["files"]}
                yield {"kind": "collection", "name": benchmark["options"]["path"], "path": path, **seen}


def _raw_files(stages: Any) -> list[dict[str, Any]]:
    """Each raw file once, with the stages that read it."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for stage in stages:
        for file in stage["raw"]:
            key = (file["kind"], file["name"], file["digest"])
            known = found.setdefault(key, {**file, "read_by": []})
            known["path"] = known["path"] or file["path"]
            known["read_by"].append(stage["stage"])
    for file in found.values():
        file["exists"] = bool(file["path"]) and Path(file["path"]).exists()
    return list(found.values())


# ---- checking ----


def _faults(stage: Mapping[str, Any]) -> Iterator[str]:
    """Files of a stage's output that are not what its manifest says."""
    folder, manifest = Path(stage["folder"]), stage["manifest"]
    yield from artifacts.faults_of(folder)
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and name != artifacts.MANIFEST and name not in manifest["files"]:
            yield f"{path} was added later"


def _raw_fault(file: Mapping[str, Any]) -> str | None:
    """What is wrong with a raw file; None where it is the one that was read."""
    what = f"{file['kind']} {file['name']}"
    if file["path"] is None:
        return f"{what}: its path is not known, for there is no plan.json"
    path = Path(file["path"])
    if not path.exists():
        return f"{what}: {path} is gone (paths are relative to the folder of the run)"
    same = {"task": _same_task, "weights": _same_bytes, "collection": _same_files}[file["kind"]](path, file)
    return None if same else f"{what}: {path} has changed since it was read"


def _same_task(path: Path, file: Mapping[str, Any]) -> bool:
    from tdro_cli.data.tasks import IMPORT_VERSION

    told = {"content": artifacts.digest_file(path), "skip_bad_rows": file["skip_bad_rows"]}
    versions = range(1, IMPORT_VERSION + 1)
    return any(artifacts.digest_of({"import_version": version, **told}) == file["digest"] for version in versions)


def _same_bytes(path: Path, file: Mapping[str, Any]) -> bool:
    return artifacts.digest_file(path) == file["digest"]


def _same_files(path: Path, file: Mapping[str, Any]) -> bool:
    return all(
        (path / name).is_file() and artifacts.digest_file(path / name) == digest
        for name, digest in file["files"].items()
    )


def print_runs(listed: list[dict[str, Any]], runs: Path) -> None:
    from tdro_cli.report.tables import size_text, terminal, text_table

    console = terminal()
    rows = [
        [
            f"{run['recipe']}/{run['stage']}",
            Path(run["folder"]).name.rpartition("-")[2],
            run["status"],
            _how_far(run),
            _local(run["when"]),
            size_text(run["bytes"]),
        ]
        for run in listed
    ]
    console.print(text_table(f"Runs in {runs}", ["run", "digest", "status", "steps", "when", "size"], rows))
    cache = size(runs / ".cache")
    console.print(f"  {size_text(sum(run['bytes'] for run in listed))} in runs", end="")
    console.print(f", {size_text(cache)} in {runs / '.cache'} (safe to delete when nothing runs)")


def _how_far(run: Mapping[str, Any]) -> str:
    if run["steps"] is None:
        return "-"
    if run["status"] == "complete":
        return f"{run['steps']:,}"
    reached = f"{run['steps_done'] or 0:,} of {run['steps']:,}"
    return reached if run["checkpoint"] is None else f"{reached}, checkpoint {run['checkpoint']:,}"


def _local(when: str | None) -> str:
    with suppress(ValueError, TypeError):
        return datetime.fromisoformat(when).astimezone().strftime("%Y-%m-%d %H:%M") if when else "-"
    return "-"


def print_provenance(chain: Mapping[str, Any]) -> None:
    with _records_of(Path(chain["out"])):
        _print_provenance(chain)


def _print_provenance(chain: Mapping[str, Any]) -> None:
    from rich.tree import Tree

    from tdro_cli.report.tables import size_text, terminal, text_table

    console = terminal()
    by_digest = {stage["digest"]: stage for stage in chain["stages"]}
    shown: set[str] = set()

    def words(stage: Mapping[str, Any]) -> str:
        return f"{stage['stage']}  {stage['digest'][:SHORT]}  {_local(stage['published'])}"

    def grow(tree: Tree, digest: str, name: str) -> None:
        if digest not in by_digest:
            tree.add(f"{name}  {digest[:SHORT]}  is gone")
            return
        stage = by_digest[digest]
        again = digest in shown
        branch = tree.add(f"{words(stage)}{'  (above)' if again else ''}")
        if not again:
            fill(branch, stage)

    def fill(branch: Tree, stage: Mapping[str, Any]) -> None:
        shown.add(stage["digest"])
        branch.add(f"{stage['folder']}: {stage['files']} files, {size_text(stage['bytes'])}")
        for plugin in stage["plugins"]:
            options = ", ".join(f"{key} {value}" for key, value in plugin["options"].items())
            branch.add(f"plugin {plugin['name']} of {plugin['distribution']}{f' ({options})' if options else ''}")
        for name, digest in stage["inputs"].items():
            grow(branch, digest, name)

    first = chain["stages"][0]
    tree = Tree(words(first))
    fill(tree, first)
    console.print(tree)
    rows = [[f"{f['kind']} {f['name']}", f["digest"][:SHORT], _whereabouts(f)] for f in chain["raw"]]
    if rows:
        table = text_table("What was read from outside", ["", "digest", "path"], rows)
        table.columns[2].justify, table.columns[2].overflow = "left", "fold"
        console.print(table)
    versions = first["versions"]
    console.print("  versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()), soft_wrap=True)
    for stage in chain["stages"][1:]:
        differs = [f"{n} {v}" for n, v in stage["versions"].items() if versions.get(n) != v]
        if differs:
            console.print(f"  {stage['stage']} had other versions: {', '.join(differs)}", soft_wrap=True)
    commits = {stage["commit"] for stage in chain["stages"] if stage["commit"]}
    devices = {name for stage in chain["stages"] for name in stage["devices"] or ()}
    console.print(
        f"  commit: {', '.join(sorted(commits)) or 'not a source tree'}; devices: {', '.join(sorted(devices))}"
    )
    if chain["faults"] is None:
        console.print("  digests not verified: --verify reads every file")
    for fault in chain["faults"] or ():
        console.print(f"  fault: {fault}", style="red", soft_wrap=True)
    if chain["faults"] == []:
        count = sum(stage["files"] for stage in chain["stages"])
        console.print(f"  verified: {count} files of {len(chain['stages'])} stages, {len(chain['raw'])} raw files")


def _whereabouts(file: Mapping[str, Any]) -> str:
    return f"{file['path'] or 'unknown'}{'' if file['exists'] else '  (not here)'}"
