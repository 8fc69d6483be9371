"""Does what a plan says: one function a stage. Also the program that the DeepSpeed launcher starts on every rank."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdro_cli import __version__, artifacts, registry
from tdro_cli.errors import TdroError, known_faults
from tdro_cli.run.plan import Plan, data_seed, stores_of
from tdro_cli.run.progress import Progress, Silent, progress

if TYPE_CHECKING:
    from tdro_cli.run.distributed import World

VERSIONS = ("torch", "transformers", "peft", "deepspeed", "tokenizers", "pyserini", "faiss-cpu", "ir-measures", "numpy")
BACKBONE_TEXTS = 200_000  # texts of all tasks that a tokenizer is trained on, at most


def work(plan: Plan, shown: Progress) -> None:
    """Runs the stage in this process, alone or as one rank, and publishes its output."""
    with known_faults(plan.folder):
        STAGES[plan.stage](plan, shown)


@contextmanager
def publishing(plan: Plan, details: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """The stage's output folder in the making; its manifest walks back to the raw files."""
    began = datetime.now(UTC)

    def manifest() -> dict[str, Any]:
        times = {"published_from": _second(began), "published": _second(datetime.now(UTC))}
        return {**provenance(plan), **times, **(details or {})}

    with artifacts.publishing(plan.out, manifest) as folder:
        yield folder


def _second(when: datetime) -> str:
    return when.isoformat(timespec="seconds")


def provenance(plan: Plan) -> dict[str, Any]:
    """What a stage's output is made from and with."""
    return {
        "schema": 1,
        "stage": plan.stage,
        "digest": plan.digest,
        "recipe": plan.settings().name,
        "numbers": plan.numbers,
        "inputs": {stage: artifacts.manifest_of(Path(path))["digest"] for stage, path in plan.inputs.items()},
        **surroundings(),
    }


def surroundings() -> dict[str, Any]:
    """With what an output is made, wherever it comes from."""
    return {"versions": installed_versions(), "commit": _commit(), "devices": _devices()}


def installed_versions() -> dict[str, str]:
    found = {"tdro": __version__, "python": ".".join(map(str, sys.version_info[:3]))}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """The commit of our source tree, where it is one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    told = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return told.stdout.strip() or None


def _devices() -> list[str]:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ["cpu"]


# ---- the stages ----


def mine(plan: Plan, shown: Progress) -> None:
    from tdro_cli.retrieve.mining import Alone, mine_tasks

    recipe = plan.settings()
    stores = stores_of(plan)
    with ExitStack() as stack:
        world: Any = Alone()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # alone, nothing here needs torch
            from tdro_cli.run.distributed import barriers

            world, shown = _joined(shown)
            stack.enter_context(barriers(world))
        out = stack.enter_context(publishing(plan)) if world.rank == 0 else None
        mine_tasks(
            list(stores.values()),
            recipe.mine,
            prompts={task.name: task.prompt for task in recipe.tasks},
            seed=data_seed(recipe),
            folder=out,
            scratch=Path(plan.folder) / "scratch",
            progress=shown,
            cache=Path(plan.cache),
            world=world,
        )


def dedup(plan: Plan, shown: Progress) -> None:
    from tdro_cli.retrieve.deduplication import deduplicate_tasks

    recipe = plan.settings()
    against = recipe.dedup.against or (recipe.eval.benchmarks if recipe.eval else [])
    stores = stores_of(plan)
    with publishing(plan) as out:
        summary = deduplicate_tasks(
            list(stores.values()), recipe.dedup, collections(against), folder=out, progress=shown
        )
        for warning in summary.get("warnings", []):
            shown.warn(warning)


def backbone(plan: Plan, shown: Progress) -> None:
    from itertools import islice

    from tdro_cli.data.formats import passage_text
    from tdro_cli.run.distributed import join

    join()
    recipe = plan.settings()
    stores = stores_of(plan)
    share = max(1, BACKBONE_TEXTS // (2 * len(stores)))

    def texts() -> Iterator[str]:
        for store in stores.values():
            for example in islice(store, share):
                yield example.query
                yield passage_text(example.positives[0])

    plugin = registry.resolve("backbones", recipe.backbone.name, recipe.backbone.options, where="backbone")
    with publishing(plan) as out:
        plugin.prepare(texts(), out / "model", seed=recipe.seed)


def train_ref(plan: Plan, shown: Progress) -> None:
    recipe = plan.settings()
    equal = {task.name: 1 / len(recipe.tasks) for task in recipe.tasks}
    _train(plan, shown, recipe.train_ref, "held_in", equal, {}, {})


def finetune(plan: Plan, shown: Progress) -> None:
    recipe = plan.settings()
    sampling = artifacts.read_json(plan.input("transfer") / "sampling.json")
    probabilities = {name: task["probability"] for name, task in sampling["tasks"].items()}
    weights = {name: task["weight"] for name, task in sampling["tasks"].items() if task.get("weight") is not None}
    loss_weights = sampling.get("loss_weights", {})
    _train(plan, shown, recipe.finetune, recipe.finetune.rows, probabilities, loss_weights, weights)


def _train(
    plan: Plan,
    shown: Progress,
    section: Any,
    rows: str,
    probabilities: Mapping[str, float],
    loss_weights: Mapping[str, float],
    weights: Mapping[str, float],
) -> None:
    from tdro_cli.learn.training import train
    from tdro_cli.model.card import training_details
    from tdro_cli.model.export import save_model

    world, shown = _joined(shown)

    def publish(engine: Any, tokenizer: Any, done: dict[str, Any]) -> None:
        with engine.whole_weights():
            if world.leads:
                done |= {"probabilities": probabilities, "loss_weights": loss_weights, "weights": weights}
                details = training_details(plan.settings(), plan.stage, done, manifest=provenance(plan), measures={})
                with publishing(plan) as out:
                    save_model(engine.module, tokenizer.tokenizer, tokenizer.contract, out / "model", details=details)
                    artifacts.write_json(out / "training.json", done)
                    shutil.copyfile(Path(plan.folder) / "metrics.jsonl", out / "metrics.jsonl")
        world.barrier()

    train(
        plan,
        world,
        shown,
        section=section,
        rows=rows,
        probabilities=probabilities,
        loss_weights=loss_weights,
        publish=publish,
    )


def learn_weights(plan: Plan, shown: Progress) -> None:
    from tdro_cli.learn.weight_learning import learn_weights as learn

    world, shown = _joined(shown)
    learn(plan, world, shown)


def transfer(plan: Plan, shown: Progress) -> None:
    from tdro_cli.learn.transfer import sampling_plan

    recipe = plan.settings()
    stores = stores_of(plan)
    learned = recipe.transfer.weights_from or (
        str(plan.input("learn-weights") / "weights.json") if "learn-weights" in plan.inputs else None
    )
    draws = recipe.finetune.steps * recipe.finetune.batch.queries
    sizes = {name: len(store) for name, store in stores.items()}
    with publishing(plan) as out:
        artifacts.write_json(out / "sampling.json", sampling_plan(recipe.transfer, learned, sizes, draws))


def evaluate(plan: Plan, shown: Progress) -> None:
    from tdro_cli.retrieve.evaluation import FINISHED
    from tdro_cli.retrieve.evaluation import evaluate as evaluate_models
    from tdro_cli.run.distributed import barriers

    world, shown = _joined(shown)
    recipe = plan.settings()
    models: dict[str, Any] = {
        name: "bm25" if name == "bm25" else _embedder(plan, name, world) for name in recipe.eval.models
    }
    made = Path(plan.folder) / "unfinished"  # a killed evaluation goes on from the runs there
    with barriers(world):
        evaluate_models(
            models,
            [*collections(recipe.eval.benchmarks), *_held_out(plan)],
            recipe.eval,
            folder=made,
            cache=Path(plan.cache),
            progress=shown,
            world=world,
        )
        if world.leads:
            with publishing(plan) as out:
                shutil.copytree(made, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(FINISHED))
            shutil.rmtree(made)
        world.barrier()


def _held_out(plan: Plan) -> Iterator[Any]:
    """The collections of `eval.held_out`: one for each task."""
    from tdro_cli.retrieve.held_out import held_out_collection

    recipe = plan.settings()
    if recipe.eval.held_out is None:
        return
    stores = stores_of(plan)
    for task in recipe.tasks:
        yield held_out_collection(
            stores[task.name], task, recipe.train_ref.hold_out, **recipe.eval.held_out.model_dump()
        )


def _embedder(plan: Plan, name: str, world: World) -> Callable[[], Any]:
    """How to load a model of `eval.models`, when its turn comes."""
    from tdro_cli.model.embedding import load_embedder

    recipe = plan.settings()
    precision = recipe.eval.dtype or (recipe.backbone.dtype if recipe.backbone else "float32")
    options: dict[str, Any] = {
        "token_budget": recipe.encoder.micro_batch_tokens,
        "dtype": precision,
        "device": world.device,
    }
    source: Any = name
    if name in ("train_ref", "finetune"):
        source = plan.input(name.replace("_", "-")) / "model"
    elif name == "untrained":
        from tdro_cli.learn.training import backbone_source, encoder_contract

        source, options["contract"] = backbone_source(plan), encoder_contract(recipe)
    return lambda: load_embedder(source, **options)


def collections(choices: Any) -> Iterator[Any]:
    """The test collections of the chosen benchmarks, one after the other."""
    for choice in choices:
        benchmark = registry.resolve("benchmarks", choice.name, choice.options, where="eval.benchmarks")
        for subset in benchmark.subsets():
            yield benchmark.load(subset)


def _joined(shown: Progress) -> tuple[World, Progress]:
    """This process's place; only the first rank speaks."""
    from tdro_cli.run.distributed import join

    world = join()
    return world, shown if world.leads else Silent()


STAGES: dict[str, Callable[[Plan, Progress], None]] = {
    "mine": mine,
    "dedup": dedup,
    "backbone": backbone,
    "train-ref": train_ref,
    "learn-weights": learn_weights,
    "transfer": transfer,
    "finetune": finetune,
    "eval": evaluate,
}


def main() -> None:
    """`python -m tdro_cli.run.worker PLAN [--quiet]`, on every rank."""
    quiet = "--quiet" in sys.argv
    path = next(argument for argument in sys.argv[1:] if not argument.startswith("--"))
    try:
        work(Plan.read(Path(path)), progress(quiet=quiet))
    except TdroError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
