"""From a recipe to frozen plans: what each stage reads, and the digest of all that changes its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tdro_cli import __version__, artifacts, registry
from tdro_cli.errors import Problems, RunFailed, TdroError, known_faults
from tdro_cli.recipe import LoadedRecipe, PluginChoice, Recipe, Training

STAGES = ("mine", "dedup", "backbone", "train-ref", "learn-weights", "transfer", "finetune", "eval")
SEEDED = ("backbone", "train-ref", "learn-weights", "finetune")
TRAINING = ("train-ref", "learn-weights", "finetune")
DISTRIBUTED = (*TRAINING, "eval")
LISTED = 10  # missing files of one benchmark that a fault names
MODEL_STAGES = {"untrained": "backbone", "train_ref": "train-ref", "finetune": "finetune"}


@dataclass(frozen=True)
class Plan:
    """One stage of one experiment. `numbers` is what the digest covers; `inputs` are the outputs of earlier stages.

    `recipe_text` is the recipe as it was written, `overrides` what the command line changed in it.
    """

    stage: str
    digest: str
    folder: str
    numbers: Mapping[str, Any]
    inputs: Mapping[str, str]
    recipe: Mapping[str, Any]
    recipe_text: str
    cache: str
    tasks: Mapping[str, str] = field(default_factory=dict)
    overrides: Sequence[str] = ()

    @property
    def out(self) -> Path:
        return Path(self.folder) / "out"

    def settings(self) -> Recipe:
        return Recipe.model_validate(dict(self.recipe))

    def input(self, stage: str) -> Path:
        return Path(self.inputs[stage])

    def save(self) -> Path:
        path = Path(self.folder) / "plan.json"
        artifacts.write_json(path, asdict(self))
        return path

    @staticmethod
    def read(path: Path) -> Plan:
        return Plan(**artifacts.read_json(path))


def make_plans(loaded: LoadedRecipe, runs: Path, *, needed: Sequence[str] = STAGES) -> dict[str, Plan]:
    """A plan for each stage that the recipe has and that `needed` depends on, in order.

    Reads, checks and caches the training files on the way. Raises TdroError or Problems for faulty ones.
    """
    recipe, cache = loaded.recipe, runs / ".cache"
    wanted = _closure(loaded, needed)
    _check_benchmarks(loaded, wanted)
    stores = open_tasks(recipe, {task.name: task.path for task in recipe.tasks}, cache)
    plans: dict[str, Plan] = {}
    data: dict[str, Any] = {
        task.name: {**task.numbers(), "path": None, "data": stores[task.name].digest} for task in recipe.tasks
    }
    data_stage: str | None = None
    for stage in (stage for stage in STAGES if stage in wanted):
        above = _dependencies(loaded, stage)
        inputs = {name: str(plans[name].out) for name in above}
        numbers = {
            "stage": stage,
            "tdro": __version__,
            "above": {name: plans[name].digest for name in above},
            **_numbers(recipe, stage, data, data_stage, cache),
        }
        digest = artifacts.digest_of(numbers)
        folder = runs / recipe.name / f"{stage}-{digest[:12]}"
        tasks = {task.name: _task_file(task.name, task.path, data_stage, plans) for task in recipe.tasks}
        plans[stage] = Plan(
            stage=stage,
            digest=digest,
            folder=str(folder),
            numbers=numbers,
            inputs=inputs,
            recipe=recipe.model_dump(mode="json"),
            recipe_text=loaded.text,
            cache=str(cache),
            tasks=tasks,
            overrides=list(loaded.overrides),
        )
        if stage in ("mine", "dedup"):
            data_stage = stage
    return plans


def _check_benchmarks(loaded: LoadedRecipe, wanted: set[str]) -> None:
    """Raises Problems for measures that don't exist and benchmark files that are missing: now, not after training."""
    recipe = loaded.recipe
    if not recipe.eval and not recipe.dedup:
        return
    from tdro_cli.retrieve.measures import check_measures

    problems: list[TdroError] = []
    places: list[tuple[str, PluginChoice]] = []
    if "eval" in wanted:
        try:
            check_measures(recipe.eval.measures, recipe.eval.depth)
        except TdroError as error:
            problems.append(TdroError(error.message, where=loaded.where("eval", "measures"), remedy=error.remedy))
    if "eval" in wanted or ("dedup" in wanted and not recipe.dedup.against):
        chosen = recipe.eval.benchmarks if recipe.eval else []
        places += [(loaded.where("eval", "benchmarks", i), choice) for i, choice in enumerate(chosen)]
    if "dedup" in wanted:
        places += [(loaded.where("dedup", "against", i), choice) for i, choice in enumerate(recipe.dedup.against)]
    for where, choice in places:
        missing: list[TdroError] = getattr(
            registry.resolve("benchmarks", choice.name, choice.options), "missing_files", list
        )()
        listed = missing if len(missing) <= LISTED else missing[: LISTED - 1]
        problems += [TdroError(fault.message, where=where, remedy=fault.remedy or fault.where) for fault in listed]
        if len(missing) > len(listed):
            words = f"{len(missing) - len(listed)} more files of {choice.name} are missing"
            problems.append(TdroError(words, where=where, remedy="`tdro eval --check-data` lists all"))
    if problems:
        raise Problems(problems)


def open_tasks(recipe: Recipe, files: Mapping[str, str], cache: Path) -> dict[str, Any]:
    """The training files by task name. Raises Problems with the faults of all, or what is wrong with `cache`."""
    with known_faults(str(cache)):
        return _open_tasks(recipe, files, cache)


def _open_tasks(recipe: Recipe, files: Mapping[str, str], cache: Path) -> dict[str, Any]:
    from tdro_cli.data.tasks import open_task

    stores, problems = {}, []
    for task in recipe.tasks:
        try:
            stores[task.name] = open_task(
                task.name, Path(files[task.name]), cache=cache / "tasks", skip_bad_rows=recipe.skip_bad_rows
            )
        except TdroError as error:
            problems += error.errors if isinstance(error, Problems) else [error]
    if problems:
        raise Problems(problems)
    return stores


def stores_of(plan: Plan) -> dict[str, Any]:
    """The training files of a stage. Raises RunFailed where one has changed since the plan was made.

    Hours may lie between the two, and what is made of other rows must not carry the digest of these.
    """
    stores = open_tasks(plan.settings(), plan.tasks, Path(plan.cache))
    for name, told in ((plan.numbers.get("held_out") or plan.numbers).get("tasks") or {}).items():
        if told.get("data") not in (None, stores[name].digest):
            raise RunFailed(
                f"the training file of {name!r} has changed since this run was planned",
                where=str(plan.tasks[name]),
                remedy="start the same command again: it plans with the file as it is now",
            )
    return stores


def data_warnings(recipe: Recipe, cache: Path) -> list[str]:
    """What is odd about the training files but no fault: rows set aside, one docid for two texts."""
    stores = open_tasks(recipe, {task.name: task.path for task in recipe.tasks}, cache)
    words = [f"task {name}: {warning}" for name, store in stores.items() for warning in store.warnings]
    words += [
        f"task {name}: {store.rejected} bad rows set aside, see {store.folder / 'rejected.jsonl'}"
        for name, store in stores.items()
        if store.rejected
    ]
    return words


def data_stage(loaded: LoadedRecipe) -> str | None:
    """The stage whose output is trained on; None: the recipe's files as they are."""
    return next((stage for stage in ("dedup", "mine") if getattr(loaded.recipe, stage) is not None), None)


def _task_file(name: str, path: str, stage: str | None, plans: Mapping[str, Plan]) -> str:
    return path if stage is None else str(plans[stage].out / "tasks" / f"{name}.jsonl.gz")


def _dependencies(loaded: LoadedRecipe, stage: str) -> list[str]:
    """The stages whose output a stage reads."""
    recipe = loaded.recipe
    data = [s for s in [data_stage(loaded)] if s]
    model = ["backbone"] if is_prepared(recipe) else []
    if stage == "mine":
        return []
    if stage == "dedup":
        return ["mine"] if recipe.mine else []
    if stage == "backbone":
        return data
    if stage == "train-ref":
        return [*data, *model]
    if stage == "learn-weights":
        return [*data, *model, "train-ref"]
    if stage == "transfer":
        return [*data, *(["learn-weights"] if reads_weights(recipe) and not recipe.transfer.weights_from else [])]
    if stage == "finetune":
        return [*data, *model, "transfer"]
    models = [MODEL_STAGES[m] for m in recipe.eval.models if m in MODEL_STAGES]
    measured = data if recipe.eval.held_out else []
    return [*measured, *(name for name in dict.fromkeys(models) if name != "backbone" or model)]


def stages_of(loaded: LoadedRecipe) -> set[str]:
    """The stages that `tdro run` does."""
    return _closure(loaded, STAGES)


def _closure(loaded: LoadedRecipe, needed: Sequence[str]) -> set[str]:
    """The stages to plan: those asked for that the recipe has, and what they depend on."""
    recipe, found = loaded.recipe, set()
    absent = {stage for stage in ("mine", "dedup", "eval") if getattr(recipe, stage) is None}
    absent |= set() if is_prepared(recipe) else {"backbone"}
    todo = [stage for stage in needed if stage not in absent]
    if not todo:
        section = needed[0].replace("-", "_")
        raise TdroError(
            f"the recipe has no section {section!r}",
            where=str(loaded.path),
            remedy=f"add `{section}:`, or leave out this stage",
        )
    while todo:
        stage = todo.pop()
        if stage not in found:
            found.add(stage)
            todo += _dependencies(loaded, stage)
    if not recipe.tasks and found - {"eval"}:
        first = next(stage for stage in STAGES if stage in found)
        raise TdroError(
            f"the recipe names no training tasks, which {first} needs",
            where=str(loaded.path),
            remedy="add `tasks:`; without them only `tdro eval` of `bm25` and of models by folder or name works",
        )
    if recipe.backbone is None and found & {"train-ref", "learn-weights", "finetune"}:
        raise TdroError(
            "the recipe names no backbone",
            where=str(loaded.path),
            remedy="add for instance `backbone: {source: Qwen/Qwen2.5-0.5B}`, or `backbone: {name: scratch}`",
        )
    return found


def is_prepared(recipe: Recipe) -> bool:
    """Whether the backbone is made from the tasks' own text."""
    if recipe.backbone is None:
        return False
    return hasattr(registry.find("backbones", recipe.backbone.name).load(), "prepare")


def data_seed(recipe: Recipe) -> int:
    return recipe.seed if recipe.data_seed is None else recipe.data_seed


def reads_weights(recipe: Recipe) -> bool:
    """Whether the transfer strategy uses learned weights (baselines such as `uniform` don't)."""
    strategy = registry.find("transfer_strategies", recipe.transfer.strategy.name).load()
    return getattr(strategy, "needs_weights", True)


def _numbers(recipe: Recipe, stage: str, data: Mapping[str, Any], data_from: str | None, cache: Path) -> dict[str, Any]:
    """The parts of the recipe that change what a stage computes."""
    numbers: dict[str, Any] = {}
    if stage != "eval":
        numbers["tasks"] = (
            data if data_from is None else {name: {**value, "data": None} for name, value in data.items()}
        )
    model = {
        "backbone": recipe.backbone and {**recipe.backbone.numbers(), **plugin("backbones", recipe.backbone)},
        "encoder": recipe.encoder.numbers(),
        "lora": recipe.lora and recipe.lora.numbers(),
        "deepspeed": recipe.deepspeed,
    }
    if stage in SEEDED:
        numbers["seed"] = recipe.seed
    if stage == "mine":
        numbers["seed"] = data_seed(recipe)
        numbers["mine"] = {
            **recipe.mine.numbers(),
            "negative_miner": plugin_numbers("negative_miners", recipe.mine.negative_miner, cache),
            "rescorer": recipe.mine.rescorer and plugin_numbers("rescorers", recipe.mine.rescorer, cache),
            "corpora": {task: _content(Path(file), cache) for task, file in recipe.mine.corpora.items()},
        }
    elif stage == "dedup":
        against = recipe.dedup.against or (recipe.eval.benchmarks if recipe.eval else [])
        numbers["dedup"] = {
            **recipe.dedup.numbers(),
            "against": None,
            "deduplicator": plugin_numbers("deduplicators", recipe.dedup.deduplicator, cache),
        }
        numbers["against"] = [_benchmark(choice, cache) for choice in against]
    elif stage == "backbone":
        numbers["backbone"] = model["backbone"]
        numbers["tasks"] = {name: {"data": value["data"]} for name, value in numbers["tasks"].items()}
    elif stage == "train-ref":
        numbers |= {**model, "train_ref": _training(recipe.train_ref, cache)}
    elif stage == "learn-weights":
        section = recipe.learn_weights
        numbers |= {**model, "learn_weights": section.numbers(), "hold_out": recipe.train_ref.hold_out}
        numbers["plugins"] = [
            plugin("loss_measurements", section.loss_measurement),
            plugin("weight_updaters", section.weight_updater),
        ]
    elif stage == "transfer":
        numbers |= {
            "transfer": recipe.transfer.numbers(),
            "plugin": plugin("transfer_strategies", recipe.transfer.strategy),
        }
        numbers["draws"] = recipe.finetune.steps * recipe.finetune.batch.queries
        if recipe.transfer.weights_from:
            numbers["weights_from"] = _file_digest(recipe.transfer.weights_from, "transfer.weights_from")
    elif stage == "finetune":
        numbers |= {**model, "finetune": _training(recipe.finetune, cache), "hold_out": recipe.train_ref.hold_out}
    elif stage == "eval":
        evaluated = recipe.eval
        numbers |= {
            "eval": {**evaluated.numbers(), "benchmarks": None},
            "collections": [_benchmark(choice, cache) for choice in evaluated.benchmarks],
        }
        if evaluated.held_out:
            numbers["held_out"] = {"tasks": data if data_from is None else None, "hold_out": recipe.train_ref.hold_out}
        if "untrained" in evaluated.models:
            numbers["backbone"] = {**model, "data": data}
        numbers["models"] = {name: _content(Path(name), cache) for name in evaluated.models if Path(name).is_dir()}
    return numbers


def _training(section: Training, cache: Path) -> dict[str, Any]:
    """The section with its mask, and a guide's folder by the content of its files."""
    choice = section.false_negative_mask
    named = plugin("false_negative_masks", choice)
    source = choice.options.get("source")
    if source is not None:
        from tdro_cli.model.embedding import model_folder

        folder = Path(model_folder(source))
        if folder.is_dir():
            files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".md"]
            index = artifacts.index_of(cache)
            named["files"] = {str(p.relative_to(folder)): artifacts.digest_file_once(p, index) for p in files}
            named["options"] = {**choice.options, "source": None}
    return {**section.numbers(), "false_negative_mask": named}


def plugin(kind: str, choice: Any) -> dict[str, Any]:
    """A plugin as a digest and a manifest name it."""
    found = registry.find(kind, choice.name)
    return {"name": choice.name, "options": choice.options, "distribution": f"{found.distribution} {found.version}"}


def plugin_numbers(kind: str, choice: Any, cache: Path) -> dict[str, Any]:
    """A plugin as a digest covers it: without options that change no result, and with models by their content.

    An option `source` that is a folder here is a model; a plugin inside `miners` is named as one is.
    """
    named = plugin(kind, choice)
    execution = getattr(registry.find(kind, choice.name).load(), "execution_options", ())
    options = {name: value for name, value in choice.options.items() if name not in execution}
    if isinstance(options.get("source"), str) and Path(options["source"]).is_dir():
        options["source"] = _content(Path(options["source"]), cache)
    if isinstance(options.get("miners"), list):
        inner = [PluginChoice.model_validate(miner) for miner in options["miners"]]
        options["miners"] = [plugin_numbers(kind, miner, cache) for miner in inner]
    return {**named, "options": options}


def _content(path: Path, cache: Path) -> dict[str, str]:
    """The digest of a file, or of every file in a folder but hidden ones, whatever the folder is called."""
    index = artifacts.index_of(cache)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    files = [p for p in files if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    return {str(p.relative_to(path)): artifacts.digest_file_once(p, index) for p in files}


def _benchmark(choice: PluginChoice, cache: Path) -> dict[str, Any]:
    """A benchmark by the content of the files at its path, wherever that is."""
    named = plugin("benchmarks", choice)
    path = choice.options.get("path")
    if isinstance(path, str):
        root = Path(path)
        named["files"] = _content(root, cache) if root.exists() else {}
        named["options"] = {**choice.options, "path": root.resolve().name}
    return named


def _file_digest(path: str, where: str) -> str:
    try:
        return artifacts.digest_file(Path(path))
    except OSError as error:
        raise TdroError(f"can't read {path}: {error.strerror}", where=where, remedy="name a weights file") from None
