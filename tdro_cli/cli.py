"""The command line. A command loads the recipe, plans and runs; nothing heavy is imported before it must."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tdro_cli.errors import Problems, RunFailed, TdroError, first_line, known_fault
from tdro_cli.run.signals import Interruption

app = typer.Typer(
    help="Learn how much of each retrieval training task to use, fine-tune with it, and prove the gain.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipe_app = typer.Typer(help="Check, list, copy recipes; print their JSON schema.", no_args_is_help=True)
plugins_app = typer.Typer(help="What is installed for each kind of plugin.", invoke_without_command=True)
app.add_typer(recipe_app, name="recipe")
app.add_typer(plugins_app, name="plugins")


def _tell_version(asked: bool) -> None:
    if asked:
        from tdro_cli import __version__

        print(f"tdro {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None: ...


RecipePath = Annotated[Path, typer.Argument(metavar="[RECIPE]", help="the recipe, a YAML file")]
Set = Annotated[
    list[str], typer.Option("--set", metavar="KEY.PATH=VALUE", help="override a key of the recipe; repeatable")
]
SkipBadRows = Annotated[
    bool, typer.Option("--skip-bad-rows", help="set bad rows of training files aside and count them")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the plan and stop")]
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="say nothing but the result")]
Debug = Annotated[bool, typer.Option("--debug", help="show tracebacks")]
Runs = Annotated[Path, typer.Option("--runs", metavar="DIR", help="where runs are kept")]
NumGpus = Annotated[
    int | None, typer.Option("--num-gpus", min=1, help="processes of distributed stages on this machine")
]
Hostfile = Annotated[str | None, typer.Option("--hostfile", help="DeepSpeed host file, for several machines")]

Grid = Annotated[list[str], typer.Option("--grid", metavar="KEY.PATH=A,B,...", help="run all combinations; repeatable")]
Seeds = Annotated[int, typer.Option("--seeds", min=1, help="run each with this many seeds")]

DEFAULT_RECIPE = Path("recipe.yaml")
DEFAULT_RUNS = Path("runs")


@dataclass(frozen=True)
class Manner:
    """How the command talks."""

    json: bool
    quiet: bool


def _run(
    stages: tuple[str, ...],
    recipe: Path,
    overrides: list[str],
    manner: Manner,
    runs: Path,
    *,
    dry_run: bool,
    num_gpus: int | None,
    hostfile: str | None,
    strategy: str | None = None,
    tables_as: str | None = None,
    export: tuple[str, Path] | None = None,
) -> None:
    """Plans `stages` and what they need, does what is not done, and shows what the last ones left."""
    from tdro_cli import recipe as recipes
    from tdro_cli.report import health, tables
    from tdro_cli.run.launch import machines, run_plan
    from tdro_cli.run.plan import TRAINING, data_warnings, make_plans
    from tdro_cli.run.progress import progress

    if export:
        from tdro_cli.data.interchange import check_export

        check_export(*export)
    where = machines(num_gpus, hostfile, reach=not dry_run)
    loaded = recipes.load(recipe, overrides, strategy=strategy)
    plans = make_plans(loaded, runs, needed=stages)
    shown = progress(quiet=manner.quiet or manner.json)
    for warning in data_warnings(loaded.recipe, runs / ".cache"):
        shown.warn(warning)
    if dry_run:
        description = tables.describe(plans, ranks=where.ranks, device=where.device)
        _tell(description, manner, lambda: tables.print_plans(description))
        return
    done, to_train = [], {stage for stage in TRAINING if stage in plans and not tables.complete(plans[stage])}
    told: set[str] = set()
    if to_train:
        health.warn_before_training(loaded, runs, shown, told)
    for plan in plans.values():
        if plan.stage in to_train:  # by now the tokenizer of a backbone made from the tasks is there, too
            health.warn_before_training(loaded, runs, shown, told)
        shown.note(f"{plan.stage}: {'complete' if tables.complete(plan) else 'running'}, {plan.folder}")
        ran = run_plan(plan, where, shown, quiet=manner.quiet or manner.json)
        done.append(
            {"stage": plan.stage, "status": "done" if ran else "complete", "folder": plan.folder, "digest": plan.digest}
        )
    if tables_as:
        print(tables.evaluation_as(plans["eval"], tables_as), end="")
        return
    result = {"recipe": loaded.recipe.name, "stages": done, "results": tables.results(plans, stages)}
    if export:
        from tdro_cli.data.interchange import export_transfer

        result["export"] = exported = export_transfer(plans["transfer"], *export)
        _tell(result, manner, lambda: tables.print_export(exported))
        return
    _tell(result, manner, lambda: tables.print_results(plans, stages))


def _grid(
    stage: str,
    recipe: Path,
    overrides: list[str],
    grid: list[str],
    seeds: int,
    manner: Manner,
    runs: Path,
    *,
    dry_run: bool,
    num_gpus: int | None,
    hostfile: str | None,
) -> None:
    """Runs every combination and seed up to `stage` and shows them side by side."""
    from tdro_cli.report import tables
    from tdro_cli.run.grid import describe_grid, plan_grid, run_grid
    from tdro_cli.run.launch import machines
    from tdro_cli.run.progress import progress

    planned = plan_grid(stage, recipe, overrides, grid, seeds, runs)
    if dry_run:
        description = describe_grid(planned)
        _tell(description, manner, lambda: tables.print_grid_plan(description))
        return
    result = run_grid(planned, machines(num_gpus, hostfile), progress(quiet=manner.quiet or manner.json))
    _tell(result, manner, lambda: tables.print_grid(result))


def _with(overrides: list[str], skip_bad_rows: bool) -> list[str]:
    return [*overrides, "skip_bad_rows=true"] if skip_bad_rows else overrides


def _tell(result: Any, manner: Manner, show: Callable[[], None]) -> None:
    if manner.json:
        print(json.dumps(result, ensure_ascii=False, indent=1))
    else:
        show()


def _stage(name: str, words: str) -> None:
    """Registers the command of a stage: all take the same options."""

    def command(
        recipe: RecipePath = DEFAULT_RECIPE,
        overrides: Set = [],  # noqa: B006 - typer copies it
        skip_bad_rows: SkipBadRows = False,
        dry_run: DryRun = False,
        as_json: Json = False,
        quiet: Quiet = False,
        debug: Debug = False,
        runs: Runs = DEFAULT_RUNS,
        num_gpus: NumGpus = None,
        hostfile: Hostfile = None,
    ) -> None:
        _run(
            (name,),
            recipe,
            _with(overrides, skip_bad_rows),
            Manner(as_json, quiet),
            runs,
            dry_run=dry_run,
            num_gpus=num_gpus,
            hostfile=hostfile,
        )

    app.command(name, help=words)(command)


_stage("mine", "Find hard negatives for every training query.")
_stage("dedup", "Remove training rows that repeat test queries.")
_stage("train-ref", "Train the reference model: all tasks in equal shares.")


@app.command("learn-weights", help="Learn the task weights with a proxy model beside the reference.")
def learn_weights(
    recipe: RecipePath = DEFAULT_RECIPE,
    overrides: Set = [],  # noqa: B006 - typer copies it
    skip_bad_rows: SkipBadRows = False,
    grid: Grid = [],  # noqa: B006 - typer copies it
    seeds: Seeds = 1,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    runs: Runs = DEFAULT_RUNS,
    num_gpus: NumGpus = None,
    hostfile: Hostfile = None,
) -> None:
    manner = Manner(as_json, quiet)
    if grid or seeds > 1:
        _grid(
            "learn-weights",
            recipe,
            _with(overrides, skip_bad_rows),
            grid,
            seeds,
            manner,
            runs,
            dry_run=dry_run,
            num_gpus=num_gpus,
            hostfile=hostfile,
        )
        return
    stages = ("learn-weights",)
    _run(
        stages,
        recipe,
        _with(overrides, skip_bad_rows),
        manner,
        runs,
        dry_run=dry_run,
        num_gpus=num_gpus,
        hostfile=hostfile,
    )


@app.command(help="Turn learned weights into a sampling plan.")
def transfer(
    recipe: RecipePath = DEFAULT_RECIPE,
    strategy: Annotated[
        str | None, typer.Option("--strategy", help="reweight, top_percent, ... in place of the recipe's")
    ] = None,
    export: Annotated[
        str | None,
        typer.Option("--export", metavar="FORMAT", help="authors, tevatron, flagembedding or sentence-transformers"),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="a new folder for the export")] = None,
    overrides: Set = [],  # noqa: B006 - typer copies it
    skip_bad_rows: SkipBadRows = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    runs: Runs = DEFAULT_RUNS,
    num_gpus: NumGpus = None,
    hostfile: Hostfile = None,
) -> None:
    manner = Manner(as_json, quiet)
    if (export is None) != (out is None):
        raise TdroError("--export and --out go together", remedy="for instance --export tevatron --out exported")
    _run(
        ("transfer",),
        recipe,
        _with(overrides, skip_bad_rows),
        manner,
        runs,
        dry_run=dry_run,
        num_gpus=num_gpus,
        hostfile=hostfile,
        strategy=strategy,
        export=None if export is None or out is None else (export, out),
    )


_stage("finetune", "Fine-tune the retriever on the sampling plan.")


@app.command("eval", help="Evaluate the models on the recipe's benchmarks, with significance tests.")
def evaluate(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE]",
            help="the recipe, a YAML file; with --compare also what to compare, the baseline first: folders of "
            "`tdro eval`, NAME=FOLDER,FOLDER (seeds), or models of the recipe",
        ),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="compare two or more models or runs")] = False,
    check_data: Annotated[
        bool, typer.Option("--check-data", help="say which benchmark files are missing and how to get them, and stop")
    ] = False,
    download: Annotated[
        bool, typer.Option("--download", help="fetch missing benchmark files from their official places first")
    ] = False,
    form: Annotated[str, typer.Option("--format", help="of the tables: text, markdown, latex, json")] = "text",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="with --compare: train and evaluate so many seeds")] = 1,
    overrides: Set = [],  # noqa: B006 - typer copies it
    skip_bad_rows: SkipBadRows = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    runs: Runs = DEFAULT_RUNS,
    num_gpus: NumGpus = None,
    hostfile: Hostfile = None,
) -> None:
    from tdro_cli.run.progress import progress

    recipe, others = _recipe_and_others(targets or [], compare)
    form = _checked_format("json" if as_json else form)
    manner = Manner(form == "json", quiet or form != "text")
    overrides = _with(overrides, skip_bad_rows)
    shown = progress(quiet=quiet or form == "json")
    if check_data or download:
        _benchmark_data(recipe, overrides, manner, runs, download=download, shown=shown)
        if check_data:
            return
    if compare:
        from tdro_cli.report import measures, tables
        from tdro_cli.run.compare import compare_entries
        from tdro_cli.run.launch import machines

        found = compare_entries(others, recipe, overrides, seeds, runs, machines(num_gpus, hostfile), shown)
        _tell_tables(found, form, lambda: tables.print_tables(tables.terminal(), measures.tables(found)))
        return
    manner = Manner(form == "json", quiet)
    show = None if form in ("text", "json") else form
    _run(
        ("eval",),
        recipe,
        overrides,
        manner,
        runs,
        dry_run=dry_run,
        num_gpus=num_gpus,
        hostfile=hostfile,
        tables_as=show,
    )


def _recipe_and_others(targets: list[str], compare: bool) -> tuple[Path, list[str]]:
    """The recipe is the first word, or with --compare the first if it is a YAML file."""
    if not compare:
        if len(targets) > 1:
            raise TdroError(f"one recipe is expected, got {', '.join(targets)}", remedy="did you mean --compare?")
        return Path(targets[0]) if targets else DEFAULT_RECIPE, []
    if targets and targets[0].endswith((".yaml", ".yml")):
        return Path(targets[0]), targets[1:]
    return DEFAULT_RECIPE, targets


def _checked_format(form: str) -> str:
    from tdro_cli.report.measures import FORMATS

    if form not in FORMATS:
        raise TdroError(f"no format {form!r}", where="--format", remedy=f"one of {', '.join(FORMATS)}")
    return form


def _tell_tables(found: dict[str, Any], form: str, show: Callable[[], None]) -> None:
    from tdro_cli.report import measures

    if form == "json":
        print(json.dumps(found, ensure_ascii=False, indent=1))
    elif form == "text":
        show()
    else:
        print(measures.render(measures.tables(found), form), end="")


def _benchmark_data(
    recipe: Path, overrides: list[str], manner: Manner, runs: Path, *, download: bool, shown: Any
) -> None:
    """Says what benchmark files are missing, after fetching what can be; exit code 2 if any is."""
    from tdro_cli import recipe as recipes
    from tdro_cli.report import tables
    from tdro_cli.retrieve import benchmark_files

    loaded = recipes.load(recipe, overrides)
    if download:
        benchmark_files.download_missing(loaded, shown)
    found = benchmark_files.check(loaded)
    _tell(found, manner, lambda: tables.print_benchmark_files(found))
    if any(not benchmark["complete"] for benchmark in found["benchmarks"]):
        raise typer.Exit(2)


@app.command(help="Run all stages in order, skipping what is complete.")
def run(
    recipe: RecipePath = DEFAULT_RECIPE,
    overrides: Set = [],  # noqa: B006 - typer copies it
    skip_bad_rows: SkipBadRows = False,
    grid: Grid = [],  # noqa: B006 - typer copies it
    seeds: Seeds = 1,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    runs: Runs = DEFAULT_RUNS,
    num_gpus: NumGpus = None,
    hostfile: Hostfile = None,
) -> None:
    from tdro_cli.run.plan import STAGES

    manner = Manner(as_json, quiet)
    if grid or seeds > 1:
        _grid(
            "eval",
            recipe,
            _with(overrides, skip_bad_rows),
            grid,
            seeds,
            manner,
            runs,
            dry_run=dry_run,
            num_gpus=num_gpus,
            hostfile=hostfile,
        )
        return
    _run(
        STAGES,
        recipe,
        _with(overrides, skip_bad_rows),
        manner,
        runs,
        dry_run=dry_run,
        num_gpus=num_gpus,
        hostfile=hostfile,
    )


@app.command(help="Write a recipe for the training files of a folder.")
def init(
    folder: Annotated[Path, typer.Argument(help="where the training files are: JSONL or Parquet")] = Path("."),
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="the recipe to write")] = DEFAULT_RECIPE,
    name: Annotated[str | None, typer.Option("--name", help="of the recipe; the folder's own by default")] = None,
    backbone: Annotated[
        str | None, typer.Option("--backbone", metavar="NAME_OR_PATH", help="a model; `scratch` needs no network")
    ] = None,
    evaluation: Annotated[
        list[Path], typer.Option("--eval", metavar="FOLDER", help="a test collection in BEIR layout; repeatable")
    ] = [],  # noqa: B006 - typer copies it
    yes: Annotated[bool, typer.Option("--yes", "-y", help="ask nothing")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    from tdro_cli import init as scaffold

    ask = None if yes or as_json or not sys.stdin.isatty() else typer.prompt
    made = scaffold.write_recipe(folder, to, name=name, backbone=backbone, evaluation=evaluation, ask=ask)
    _tell(made, Manner(as_json, False), lambda: scaffold.print_made(made))


@app.command(help="Write the embedded sample data: real training tasks and test collections.")
def sample(
    folder: Annotated[Path, typer.Argument(help="a new folder")],
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    from tdro_cli.data.sample import write_sample
    from tdro_cli.report import tables
    from tdro_cli.run.progress import progress

    written = write_sample(folder, progress=progress(quiet=quiet or as_json))
    _tell(written, Manner(as_json, quiet), lambda: tables.print_sample(folder, written))


# ---- trained models ----

Model = Annotated[str, typer.Argument(help="a run folder, a model or adapter folder, or a hub name")]
Revision = Annotated[str | None, typer.Option("--revision", help="commit of a hub model")]


@app.command(help="Write a model for other libraries: whole, LoRA merged in, with prompts and a model card.")
def export(
    model: Model,
    to: Annotated[Path, typer.Argument(metavar="OUT", help="a new folder")],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option("--dtype", help="of the saved weights")
    ] = "float32",
    query_prompt: Annotated[
        str | None, typer.Option("--query-prompt", metavar="TASK_OR_TEXT", help="the default prompt of queries")
    ] = None,
    revision: Revision = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    from tdro_cli.model.export import export_model
    from tdro_cli.run.distributed import join
    from tdro_cli.run.worker import surroundings

    join()
    made_of = export_model(
        model, to, dtype=dtype, query_prompt=query_prompt, revision=revision, surroundings=surroundings()
    )
    _tell({"out": str(to), **made_of}, Manner(as_json, False), lambda: print(f"wrote {to}"))


@app.command(help="Write the embeddings of a file of texts, as a NumPy array, and their ids.")
def encode(
    file: Annotated[Path, typer.Argument(help="JSON lines or plain text, .gz and .zst too; a BEIR corpus or queries")],
    model: Annotated[str, typer.Option("--model", help="a run folder, a model or adapter folder, or a hub name")],
    to: Annotated[Path, typer.Option("--out", metavar="DIR", help="a new folder")],
    side: Annotated[Literal["query", "passage"], typer.Option("--side", help="how the model reads the texts")],
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TASK_OR_TEXT", help="in place of the model's own; '' for none")
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16"], typer.Option("--dtype", help="of the written embeddings")
    ] = "float32",
    precision: Annotated[Literal["float32", "bfloat16"], typer.Option("--precision", help="to compute in")] = "float32",
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="that go through the model at once")] = 16384,
    revision: Revision = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    from tdro_cli.model.embedding import load_embedder
    from tdro_cli.model.encode import encode_file
    from tdro_cli.run.distributed import join
    from tdro_cli.run.progress import progress
    from tdro_cli.run.worker import surroundings

    join()
    embedder = load_embedder(model, token_budget=tokens, dtype=precision, revision=revision)
    made = encode_file(
        file,
        embedder,
        to,
        side=side,
        prompt=embedder.contract.prompts.get(prompt, prompt),
        dtype=dtype,
        surroundings=surroundings(),
        progress=progress(quiet=quiet or as_json),
    )
    words = f"wrote {made['texts']:,} embeddings of size {made['dimension']} into {to}"
    _tell({"out": str(to), **made}, Manner(as_json, quiet), lambda: print(words))


@app.command("import", help="Make a training file of a Hugging Face dataset or of a BEIR collection's judgements.")
def import_(
    source: Annotated[
        str, typer.Argument(help="a BEIR folder, a saved dataset, Parquet or JSONL files, or a hub name")
    ],
    to: Annotated[
        Path, typer.Argument(metavar="FILE", help="the training file to write: .jsonl, .jsonl.gz, .jsonl.zst")
    ],
    split: Annotated[str, typer.Option("--split", help="of the dataset, or of the judgements")] = "train",
    config: Annotated[str | None, typer.Option("--config", help="of a hub dataset that has several")] = None,
    columns: Annotated[
        list[str],
        typer.Option(
            "--column", metavar="NAME=COLUMN", help="query=..., positive=..., negative=..., title=...; repeatable"
        ),
    ] = [],  # noqa: B006 - typer copies it
    skip_bad_rows: Annotated[bool, typer.Option("--skip-bad-rows", help="leave bad rows out and count them")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    from tdro_cli.data.imports import import_task
    from tdro_cli.run.progress import progress

    named = dict(column.partition("=")[::2] for column in columns)
    with progress(quiet=quiet or as_json).start("import", None, "rows") as bar:
        made = import_task(
            source,
            to,
            split=split,
            config=config,
            columns=named or None,
            skip_bad_rows=skip_bad_rows,
            advance=bar.advance,
        )
    left_out = f", {made['skipped']:,} bad rows left out" if made["skipped"] else ""
    _tell(
        made, Manner(as_json, quiet), lambda: print(f"wrote {to}: {made['rows']:,} rows of a {made['kind']}{left_out}")
    )


# ---- what there is, and whether it is sound ----


@app.command(help="Look at the training data before training: lengths, unknown tokens, negatives, repetitions.")
def inspect(
    recipe: RecipePath = DEFAULT_RECIPE,
    overrides: Set = [],  # noqa: B006 - typer copies it
    rows: Annotated[
        int | None, typer.Option("--rows", min=1, help="look at so many rows of each task, not at all of them")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    runs: Runs = DEFAULT_RUNS,
) -> None:
    from tdro_cli import recipe as recipes
    from tdro_cli.report import health
    from tdro_cli.run.progress import progress

    found = health.inspect_recipe(recipes.load(recipe, overrides), runs, progress(quiet=quiet or as_json), rows=rows)
    found["figure"] = str(health.save_figure(found, runs))
    _tell(found, Manner(as_json, quiet), lambda: health.print_health(found))


@app.command(help="Write a report of an experiment: one HTML page, or Markdown where the file ends in .md.")
def report(
    target: Annotated[
        Path, typer.Argument(metavar="[TARGET]", help="a recipe, its folder of runs, or a run folder in it")
    ] = DEFAULT_RECIPE,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="FILE", help="the file to write; NAME-report.html by default")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace the file if it exists")] = False,
    overrides: Set = [],  # noqa: B006 - typer copies it
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    runs: Runs = DEFAULT_RUNS,
) -> None:
    from tdro_cli.report import chapters
    from tdro_cli.run.progress import progress

    manner = Manner(as_json, quiet)
    made = chapters.write_report(target, overrides, runs, to, progress(quiet=quiet or as_json), force=force)
    _tell(made, manner, lambda: print(f"{'replaced' if made['replaced'] else 'wrote'} {made['file']}"))


@app.command(help="Measure a few training steps of a recipe on this machine: speed, where the time goes, hours in all.")
def bench(
    recipe: RecipePath = DEFAULT_RECIPE,
    overrides: Set = [],  # noqa: B006 - typer copies it
    stages: Annotated[
        list[str], typer.Option("--stage", help="learn-weights or finetune; repeatable; both by default")
    ] = [],  # noqa: B006 - typer copies it
    steps: Annotated[int, typer.Option("--steps", min=1, help="steps to measure, after one to warm up")] = 3,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    runs: Runs = DEFAULT_RUNS,
    num_gpus: NumGpus = None,
) -> None:
    from tdro_cli import recipe as recipes
    from tdro_cli.run import bench as benches
    from tdro_cli.run.launch import machines
    from tdro_cli.run.progress import progress

    chosen = benches.choose(stages)
    loaded, shown = recipes.load(recipe, overrides), progress(quiet=quiet or as_json)
    found = benches.bench_recipe(loaded, chosen, steps, runs, machines(num_gpus, None), shown)
    _tell(found, Manner(as_json, quiet), lambda: benches.print_bench(found))


@app.command(help="Check this installation and machine; exit code 1 if training can't work.")
def doctor(
    as_json: Json = False,
    debug: Debug = False,
    runs: Runs = DEFAULT_RUNS,
) -> None:
    from tdro_cli.run import doctor as checks

    findings = checks.examine(runs)
    _tell([vars(finding) for finding in findings], Manner(as_json, False), lambda: checks.print_findings(findings))
    if checks.stops_training(findings):
        raise typer.Exit(1)


@app.command(help="List all runs: stage, state, when, size.")
def runs(
    folder: Runs = DEFAULT_RUNS,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    from tdro_cli.run import history

    listed = history.list_runs(folder)
    _tell(listed, Manner(as_json, False), lambda: history.print_runs(listed, folder))


@app.command(help="Show where an artifact comes from, back to the raw files.")
def show(
    artifact: Annotated[Path, typer.Argument(help="a run folder, its `out`, or a file in it")],
    verify: Annotated[bool, typer.Option("--verify", help="read every file and compare its digest")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    from tdro_cli.run import history

    chain = history.provenance(artifact, verify=verify)
    _tell(chain, Manner(as_json, False), lambda: history.print_provenance(chain))
    if chain["faults"]:
        raise typer.Exit(1)


# ---- recipes ----


@recipe_app.command("check", help="Report every fault of a recipe and of its training files.")
def recipe_check(
    recipe: RecipePath = DEFAULT_RECIPE,
    overrides: Set = [],  # noqa: B006 - typer copies it
    skip_bad_rows: SkipBadRows = False,
    as_json: Json = False,
    debug: Debug = False,
    runs: Runs = DEFAULT_RUNS,
) -> None:
    from tdro_cli import recipe as recipes
    from tdro_cli.run.plan import open_tasks

    loaded = recipes.load(recipe, _with(overrides, skip_bad_rows))
    tasks = loaded.recipe.tasks
    stores = open_tasks(loaded.recipe, {task.name: task.path for task in tasks}, runs / ".cache")
    rows = {name: len(store) for name, store in stores.items()}
    result = {"recipe": str(recipe), "tasks": rows}
    _tell(
        result,
        Manner(as_json, False),
        lambda: print(f"{recipe} is valid: {len(rows)} tasks, {sum(rows.values()):,} rows"),
    )


@recipe_app.command("schema", help="Print the JSON schema of recipes, for editors.")
def recipe_schema(debug: Debug = False) -> None:
    from tdro_cli.recipe import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=1))


@recipe_app.command("list", help="List the recipes that come with tdro.")
def recipe_list(as_json: Json = False, debug: Debug = False) -> None:
    from tdro_cli import recipe as recipes

    shipped = recipes.shipped()
    _tell(
        shipped,
        Manner(as_json, False),
        lambda: print("\n".join(f"{name:40} {words}" for name, words in shipped.items())),
    )


@recipe_app.command("copy", help="Copy a recipe that comes with tdro.")
def recipe_copy(
    name: Annotated[str, typer.Argument(help="see `tdro recipe list`")],
    to: Annotated[Path, typer.Argument(help="the new file")] = DEFAULT_RECIPE,
    debug: Debug = False,
) -> None:
    from tdro_cli import recipe as recipes

    recipes.copy_shipped(name, to)
    print(f"wrote {to}")


# ---- plugins ----


@plugins_app.callback()
def plugins(context: typer.Context, as_json: Json = False, debug: Debug = False) -> None:
    if context.invoked_subcommand is None:
        plugins_list(as_json=as_json)


@plugins_app.command("list", help="List plugins with their distribution and options.")
def plugins_list(as_json: Json = False, debug: Debug = False) -> None:
    from tdro_cli import registry
    from tdro_cli.report import tables

    listed = registry.listing()
    _tell(listed, Manner(as_json, False), lambda: tables.print_plugins(listed))


@plugins_app.command("check", help="Run the conformance checks on a plugin, or on all.")
def plugins_check(
    name: Annotated[str | None, typer.Argument(help="the plugin's name; all when left out")] = None,
    kind: Annotated[str | None, typer.Option("--kind", help="where one name is of several kinds")] = None,
    options: Annotated[str | None, typer.Option("--options", help="its options, as JSON")] = None,
    source: Annotated[str | None, typer.Option("--source", help="the model for a backbone to load")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    from tdro_cli import plugins as installed
    from tdro_cli.report import tables

    rows = installed.check(name, kind=kind, options=_as_json(options), source=source)
    _tell(rows, Manner(as_json, False), lambda: tables.print_checks(rows))
    installed.raise_broken(rows)


@plugins_app.command("new", help="Write an installable folder with a working plugin and its tests.")
def plugins_new(
    kind: Annotated[str, typer.Argument(help="for instance loss_measurement")],
    name: Annotated[str, typer.Argument(help="the name that recipes will use, for instance my_ratio")],
    to: Annotated[Path | None, typer.Option("--to", metavar="FOLDER", help="./tdro-NAME when left out")] = None,
    debug: Debug = False,
) -> None:
    from tdro_cli import plugins as installed

    folder = installed.new(kind, name, to)
    print(f"wrote {folder}\n  pip install -e {folder}\n  tdro plugins check {name}\n  pytest {folder}/tests")


def _as_json(options: str | None) -> Any:
    if options is None:
        return None
    try:
        return json.loads(options)
    except json.JSONDecodeError as error:
        example = """--options '{"percent": 70}'"""
        raise TdroError(f"--options is not JSON: {error}", remedy=f"for instance {example}") from None


def let_threads_wait(environment: MutableMapping[str, str]) -> None:
    """How OpenMP's threads wait for work, unless the user has said it. Read when torch is first imported."""
    # threads that spin as long as they wait made training six times slower on cores shared with other work; some
    # microseconds of it spare most of the waking up: a fifth of a step of a small model on two free cores
    if "OMP_WAIT_POLICY" not in environment:
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
        environment.setdefault("GOMP_SPINCOUNT", "1000")


def keep_few_kernels(environment: MutableMapping[str, str]) -> None:
    """How many compiled kernels oneDNN keeps, unless the user has said it. Read when torch is first imported."""
    # in bfloat16 each shape of a batch has kernels of its own, which two caches keep, 1,024 of them each by default:
    # mining with MiniLM took 2 GB for them. No loss of time was seen with 64, or 16: layers of one batch share them
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        environment.setdefault(name, "64")


def fit_output(environment: MutableMapping[str, str], *, as_json: bool) -> None:
    """Lets any name be printed, wherever output goes: JSON as UTF-8, else what an encoding lacks as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8" if as_json else None, errors="backslashreplace")
    width = environment.get("COLUMNS", "1")
    if not width.isdecimal() or int(width) == 0:  # of a terminal that has no size
        del environment["COLUMNS"]


def main() -> None:
    """Runs the command; faults become one clear text and an exit code."""
    debug, as_json = "--debug" in sys.argv, "--json" in sys.argv
    let_threads_wait(os.environ)
    keep_few_kernels(os.environ)
    fit_output(os.environ, as_json=as_json)
    interruption = Interruption()
    try:
        with interruption:
            app()
    except BaseException as error:
        # typer turns an interruption into this exit code, and says nothing of it
        if interruption.happened or isinstance(error, KeyboardInterrupt) or getattr(error, "code", None) == 130:
            print("stopped; the same command goes on from the newest checkpoint", file=sys.stderr)
            raise SystemExit(130) from None
        if isinstance(error, BrokenPipeError):
            raise SystemExit(1) from None
        if debug or not isinstance(error, Exception):
            raise
        fault = known_fault(error) or _unknown_fault(error)
        _report(fault, as_json)
        raise SystemExit(fault.exit_code) from None


def _unknown_fault(error: Exception) -> TdroError:
    if isinstance(error, OSError):
        remedy = "check the disk, the path and its permissions; --debug shows where it happened"
        return RunFailed(
            error.strerror or first_line(error), where=error.filename and str(error.filename), remedy=remedy
        )
    if isinstance(error, UnicodeEncodeError):
        remedy = "set LC_ALL=C.UTF-8, or name tasks and files in letters that it has"
        return RunFailed(f"a name can't be written in this system's encoding ({error.encoding})", remedy=remedy)
    remedy = "this is a fault of tdro: run again with --debug"
    return RunFailed(f"{type(error).__name__}: {first_line(error)}", remedy=remedy)


def _report(error: TdroError, as_json: bool) -> None:
    faults = error.errors if isinstance(error, Problems) else [error]
    if as_json:
        print(json.dumps({"errors": error.problems()}, ensure_ascii=False, indent=1))
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    if len(faults) > 1:
        print(f"{len(faults)} errors", file=sys.stderr)
