"""What a report tells of an experiment, chapter by chapter, from what its runs left; absent stages are named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdro_cli import __version__
from tdro_cli.errors import Problems, TdroError
from tdro_cli.report import figures
from tdro_cli.report.measures import SIGNIFICANT
from tdro_cli.report.page import Block, Chapter, Document, Drawing, Facts, Listing, Notes, Table, Words
from tdro_cli.run.history import SHORT, Experiment, StageRun
from tdro_cli.run.plan import TRAINING

if TYPE_CHECKING:
    from tdro_cli.run.progress import Progress


def report(experiment: Experiment, health: Mapping[str, Any] | str) -> Document:
    """The whole report. `health`: what `health.quick_inspection` found, or why the data could not be looked at."""
    made = [
        Chapter("In short", list(_in_short(experiment))),
        Chapter("Data", list(_data(experiment, health))),
        Chapter("Task weights", list(_weights(experiment))),
        Chapter("Sampling", list(_sampling(experiment))),
        Chapter("Training", list(_training(experiment))),
        Chapter("Measures", list(_measures(experiment))),
        Chapter("Where it comes from", list(_provenance(experiment))),
        Chapter("Recipe", list(_recipe(experiment))),
    ]
    times = sorted(run.when for run in experiment.stages.values() if run.when)
    span = f", {_minute(times[0])} to {_minute(times[-1])}" if times else ""
    subtitle = f"How much of each task to train on: a report by tdro {__version__}{span} (UTC)"
    return Document(experiment.name, subtitle, [c for c in made if c.blocks])


def write_report(
    target: Path, overrides: Sequence[str], runs: Path, to: Path | None, progress: Progress, *, force: bool
) -> dict[str, Any]:
    """Writes the report of the experiment that `target` names: a recipe, its folder of runs, or anything below.

    A stage whose output was changed is left out, with a warning. Returns {"file", "replaced", "files", "stages"}.
    Raises TdroError if there is nothing to report, or if the file exists and `force` is not set.
    """
    from tdro_cli.report import page

    experiment = _experiment(target, overrides, runs)
    to = to or Path(f"{experiment.name}-report.html")
    page.check_target(to, force=force)
    for run in experiment.stages.values():
        if run.fault:
            progress.warn(f"{run.stage} is left out, as it is damaged: {run.fault}")
    replaced = to.exists()
    written = page.write(report(experiment, _health_of(experiment, progress)), to)
    stages = {stage: run.status for stage, run in experiment.stages.items()}
    return {"file": str(to), "replaced": replaced, "files": [str(path) for path in written], "stages": stages}


def _experiment(target: Path, overrides: Sequence[str], runs: Path) -> Experiment:
    from tdro_cli import recipe
    from tdro_cli.run.history import experiment, planned_experiment
    from tdro_cli.run.plan import make_plans

    if (target.is_file() and target.suffix.lower() in (".yaml", ".yml")) or not target.exists():
        return planned_experiment(make_plans(recipe.load(target, overrides), runs))
    if overrides:
        raise TdroError("--set goes with a recipe", where=str(target), remedy="name the recipe, or leave out --set")
    return experiment(target)


def _health_of(experiment: Experiment, progress: Progress) -> dict[str, Any] | str:
    """What a quick look at the training files tells; why not, where they are gone or are others by now."""
    from tdro_cli.recipe import LoadedRecipe, Recipe
    from tdro_cli.report.health import quick_inspection

    try:
        loaded = LoadedRecipe(Recipe.model_validate(experiment.recipe), Path("recipe"), experiment.text, {})
        made = experiment.complete("backbone")
        model = made.out / "model" if made else None  # that of this experiment, whatever the recipe would make today
        health = quick_inspection(loaded, experiment.folder.parent, progress, model=model)
    except TdroError as error:
        return (error.errors[0] if isinstance(error, Problems) else error).message
    read = experiment.data_digests()
    changed = [name for name, digest in health["digests"].items() if read.get(name, digest) != digest]
    return f"changed since it was read: {', '.join(changed)}" if changed else health


# ---- in short ----


def _in_short(experiment: Experiment) -> Iterator[Block]:
    recipe = experiment.recipe
    weights, summary = _read(experiment, "learn-weights", "weights.json"), _read_summary(experiment)
    sampling, comparison = _read(experiment, "transfer", "sampling.json"), _read(experiment, "eval", "comparison.json")
    rows = _rows_now(experiment)
    pairs = [("tasks", f"{len(recipe['tasks'])}")]
    pairs += [("training rows", f"{sum(rows.values()):,}")] if rows else []
    backbone = recipe.get("backbone") or {}
    pairs += [("backbone", str(backbone.get("source") or backbone.get("name") or "none"))]
    if weights:
        pairs += [("loss measurement", weights["loss_measurement"]), ("weight updater", weights["weight_updater"])]
        pairs += [("effective tasks", f"{summary['effective_tasks']:.1f} of {len(weights['tasks'])}")]
    if sampling:
        pairs += [("sampling", sampling["strategy"]), ("data in use", f"{sampling['data_used']:.0%}")]
    if comparison:
        pairs += [("compared", f"{comparison['models'][-1]} with {comparison['baseline']}")]
    yield Facts(pairs)
    if summary:
        yield Words(f"{summary['moved'][0].upper()}{summary['moved'][1:]}.")
    if comparison:
        yield Words(" ".join(_verdict(row, comparison["baseline"]) for row in _headline(comparison)))
        yield Words("One run a model: what another seed would give is not known from this page.")
    yield from _missing(experiment)


def _verdict(row: Mapping[str, Any], baseline: str) -> str:
    """A row of comparison.json in words; nothing is claimed that the test does not bear."""
    p = row.get("p_holm", row.get("p_seeds", row.get("p_randomisation")))
    low, high = row["interval"]
    scope = row.get("collection") or f"average of {row['collections']} collections"
    told = f"{row['model']} {_number(row['model_value'])}, {baseline} {_number(row['baseline_value'])}"
    test = f"95 % interval of the difference {low:+.4f} to {high:+.4f}, p {_p(p)}"
    clear = p is not None and p <= SIGNIFICANT
    claim = (
        f"{row['model']} is {'better' if row['difference'] > 0 else 'worse'}"
        if clear
        else f"no difference is shown at p ≤ {SIGNIFICANT}"
    )
    return f"{row['measure']}, {scope}: {told}; {test}: {claim}."


def _headline(comparison: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows that sum up: averages over all collections, or the only collection's, of the last model."""
    model = comparison["models"][-1]
    whole = [row for row in comparison["averages"] if row["benchmark"] == "all" and row["model"] == model]
    return whole or [row for row in comparison["rows"] if row["model"] == model]


def _missing(experiment: Experiment) -> Iterator[Block]:
    absent = [(_state(run), None) for run in experiment.stages.values() if run.status != "complete"]
    if absent:
        begun = any(run.status == "running" for run in experiment.stages.values())
        yield Words(
            "This experiment is still running. What there is so far:"
            if begun
            else "This experiment is not complete; `tdro run` with its recipe goes on. What there is so far:"
        )
        yield Notes(absent, kind="note")


def _state(run: StageRun) -> str:
    if run.status == "absent":
        return f"{run.stage}: not begun"
    done = f", {run.steps_done:,} of {run.steps:,} steps" if run.steps and run.steps_done else ""
    words = {"partial": "begun and stopped", "damaged": f"damaged: {run.fault}"}
    return f"{run.stage}: {words.get(run.status, run.status)}{done}"


# ---- data ----


def _data(experiment: Experiment, health: Mapping[str, Any] | str) -> Iterator[Block]:
    audit, summary = _read(experiment, "mine", "audit.json"), _read(experiment, "dedup", "summary.json")
    looked = health["tasks"] if not isinstance(health, str) else {}
    rows = []
    for task in experiment.recipe["tasks"]:
        name = task["name"]
        facts = looked.get(name, {})
        given = ((audit or summary or {}).get("tasks") or {}).get(name, {}).get("rows", facts.get("rows"))
        marks = [word for word, key in (("symmetric", "symmetric"),) if task.get(key)]
        marks += [] if task.get("in_batch_negatives", True) else ["no in-batch negatives"]
        row = [name, task.get("prompt") or "-", ", ".join(marks) or "-", _count(given)]
        if audit:
            mined = audit["tasks"].get(name, {})
            row += [_count(mined.get("negatives")), _percent(mined.get("share_positive_found"))]
        if summary:
            row += [_count(summary["tasks"].get(name, {}).get("dropped"))]
        rows.append(row)
    columns = ["task", "prompt", "kind", "rows"]
    columns += ["negatives", "positive found"] if audit else []
    columns += ["repeat a test query"] if summary else []
    note = "Positive found: share of the rows whose positive the miner ranks in its window. " if audit else ""
    note += "Rows that repeat a test query were taken out before training." if summary else ""
    yield Table(columns, rows, words=3, note=note.strip())
    yield from _health(health)


def _health(health: Mapping[str, Any] | str) -> Iterator[Block]:
    if isinstance(health, str):
        yield Notes([(f"the data could not be looked at: {health}", None)], kind="note")
        return
    from tdro_cli.report.health import health_parts

    captions = {
        "lengths": f"Lengths in {health['unit']}, of the files as they are given",
        "languages": "Languages of the queries, as a model guesses them",
        "faults": "What may cost quality, by task",
    }
    names = list(health["tasks"])
    for name, draw in health_parts(health).items():
        yield Drawing(name, partial(figures.data_part, draw, names), captions[name])
    found = [[warning["task"], warning["message"], warning["remedy"]] for warning in health["warnings"]]
    note = health["sampled"] or ""
    if found:
        columns = ["task", "found", "what to do"]
        yield Table(
            columns, found, words=3, title="What tdro inspect warns of in the files as they are given", note=note
        )
    else:
        yield Words(f"tdro inspect finds nothing to warn of in the files as they are given. {note}".strip())


# ---- weights ----


def _weights(experiment: Experiment) -> Iterator[Block]:
    run = experiment.stages.get("learn-weights")
    metrics = run.metrics() if run else []
    weights, summary = _read(experiment, "learn-weights", "weights.json"), _read_summary(experiment)
    if weights:
        words = "Final α and its mean over the steps, against equal shares"
        yield Drawing("weights", partial(figures.final_weights, weights["tasks"], width=5), words)
    if metrics:
        words = "α over the steps; the dotted line is an equal share"
        yield Drawing("trajectory", partial(figures.weights_over_time, metrics, width=5), words)
    if not weights:
        return
    uniform = 1 / len(weights["tasks"])
    rows = []
    for name, task in sorted(weights["tasks"].items(), key=lambda item: -item[1]["weight"]):
        facts = summary["tasks"][name]
        error = facts.get("standard_error")
        measured = _number(facts["measurement"]) + (f" ± {error:.2f}" if error is not None else "")
        relative = f"{task['weight'] / uniform:.2f} ×"
        weight = [f"{task['weight']:.4f}", relative, f"{task['mean']:.4f}", f"{task['ema']:.4f}"]
        rows.append([name, *weight, _number(facts["proxy_loss"]), _number(facts["reference_loss"]), measured])
    columns = ["task", "α", "of an equal share", "mean α", "EMA α", "proxy loss", "reference loss"]
    columns += [f"{weights['loss_measurement']} ± s.e."]
    yield Table(
        columns, rows, note="Losses are means over the queries of all steps, in nats; s.e. is that of one step."
    )
    yield Words(f"{summary['convergence']['words'][0].upper()}{summary['convergence']['words'][1:]}.")
    if summary["warnings"]:
        yield Notes([(warning, None) for warning in summary["warnings"]])
    if summary["counterfactual"]:
        designs = summary["counterfactual"]
        names = sorted(weights["tasks"], key=lambda name: -weights["tasks"][name]["weight"])
        rows = [
            [name, f"{weights['tasks'][name]['weight']:.4f}", *(f"{d[name]:.4f}" for d in designs.values())]
            for name in names
        ]
        title = "α that the same losses give under other measurements"
        note = "Replayed; the proxy itself was trained with this run's weights, so runs of their own may differ."
        yield Table(["task", "this run", *designs], rows, title=title, note=note)


# ---- sampling ----


def _sampling(experiment: Experiment) -> Iterator[Block]:
    plan = _read(experiment, "transfer", "sampling.json")
    if not plan:
        return
    rows = _rows_kept(experiment)
    left_out = {name: {"size": count, "draws": 0, "epochs": 0} for name, count in rows.items()}
    words = f"{len(plan['tasks'])} of {len(experiment.recipe['tasks'])} tasks, {plan['data_used']:.0%} of the rows"
    options = ", ".join(f"{key} {value}" for key, value in plan["options"].items())
    how = f"{plan['strategy']}{f' ({options})' if options else ''}"
    yield Words(f"Strategy {how}: {words}, {plan['draws']:,} draws for fine-tuning.")
    yield Drawing(
        "data-used",
        partial(figures.data_used, {**left_out, **plan["tasks"]}),
        "What each task has of all rows, and what it gets of the rows drawn",
    )
    table = []
    for name, task in sorted(plan["tasks"].items(), key=lambda item: -item[1]["probability"]):
        weight = "-" if task["weight"] is None else f"{task['weight']:.4f}"
        row = [name, f"{task['size']:,}", weight, f"{task['probability']:.4f}"]
        table.append([*row, f"{task['draws']:,.0f}", f"{task['epochs']:.2f}"])
    table += [[name, _count(rows.get(name)), "-", "0", "0", "0"] for name in left_out if name not in plan["tasks"]]
    columns = ["task", "rows", "α", "probability", "draws", "real epochs"]
    yield Table(columns, table, note="Real epochs: how often each row of the task is seen while fine-tuning.")


# ---- training ----


def _training(experiment: Experiment) -> Iterator[Block]:
    logs = {stage: experiment.stages[stage].metrics() for stage in TRAINING if stage in experiment.stages}
    logs = {stage: metrics for stage, metrics in logs.items() if metrics}
    if not logs:
        return
    curves = {
        stage: ([line["step"] for line in metrics], [line["loss"] for line in metrics])
        for stage, metrics in logs.items()
        if stage != "learn-weights" and all(line.get("loss") is not None for line in metrics)
    }
    if curves:
        words = "Training loss; faint: each step, strong: the mean of its neighbourhood. Each batch is of one task"
        yield Drawing("loss", partial(figures.curves_by_step, curves, "loss, nats"), words)
    if "learn-weights" in logs:
        proxy = partial(figures.curves_by_step, _proxy_curves(logs["learn-weights"]), "loss, mean of tasks, nats")
        yield Drawing("proxy", proxy, "learn-weights: loss of proxy and reference on the same queries")
    rows = [_speed(experiment, stage, metrics) for stage, metrics in logs.items()]
    columns = ["stage", "steps", "first loss", "last loss", "tokens/s", "padding", "tokens", "minutes"]
    note = "Losses are means of the first and of the last tenth of the steps; tokens/s is the median of the steps."
    yield Table(columns, rows, note=note)
    seen = {stage: _read(experiment, stage, "training.json") for stage in ("train-ref", "finetune")}
    seen = {stage: training for stage, training in seen.items() if training}
    if seen:
        names = [task["name"] for task in experiment.recipe["tasks"]]
        table = [
            [name, *(cell for training in seen.values() for cell in _seen(training, name))]
            for name in names
            if any(name in training["rows"] for training in seen.values())
        ]
        columns = ["task", *(f"{stage}: {what}" for stage in seen for what in ("rows", "queries seen", "epochs"))]
        yield Table(columns, table, title="What the models have seen")


def _proxy_curves(metrics: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for key, words in (("proxy_loss", "proxy"), ("reference_loss", "reference")):
        known = [
            (line["step"], [t[key] for t in line["tasks"].values() if t.get(key) is not None and t.get("count")])
            for line in metrics
        ]
        means = [(step, sum(values) / len(values)) for step, values in known if values]
        if means:
            curves[words] = ([step for step, _ in means], [value for _, value in means])
    return curves


def _seen(training: Mapping[str, Any], name: str) -> list[str]:
    if name not in training["rows"]:
        return ["-", "-", "-"]
    return [f"{training['rows'][name]:,}", f"{training['queries_seen'][name]:,}", f"{training['epochs'][name]:.2f}"]


def _speed(experiment: Experiment, stage: str, metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    from statistics import fmean, median

    run, done = experiment.stages[stage], _read(experiment, stage, "training.json") or {}
    tenth = max(1, len(metrics) // 10)
    losses = [line["loss"] for line in metrics if line.get("loss") is not None]
    steps = f"{len(metrics):,}" + ("" if run.status == "complete" else f" of {run.steps or '?'}")
    return [
        stage,
        steps,
        _number(fmean(losses[:tenth])) if losses else "-",
        _number(fmean(losses[-tenth:])) if losses else "-",
        f"{median(line['tokens_per_second'] for line in metrics):,.0f}",
        _percent(fmean(line["padding_share"] for line in metrics)),
        _count(done.get("tokens")),
        f"{done['seconds'] / 60:.1f}" if "seconds" in done else "-",
    ]


# ---- measures ----


def _measures(experiment: Experiment) -> Iterator[Block]:
    run = experiment.complete("eval")
    if run is None:
        return
    from tdro_cli.report.measures import comparison_note, comparison_table
    from tdro_cli.retrieve.evaluation import folder_name

    models = experiment.recipe["eval"]["models"]
    summaries = {name: run.read(f"{folder_name(name)}/measures.json") for name in models}
    summaries = {name: summary for name, summary in summaries.items() if summary}
    names = list(dict.fromkeys(m for s in summaries.values() for values in s["results"].values() for m in values))
    for measure in names[:1]:
        values = {
            name: {c: v[measure] for c, v in s["results"].items() if measure in v} for name, s in summaries.items()
        }
        yield Drawing("measures", partial(figures.measures, values, measure), f"{measure} of every model")
    comparison = run.read("comparison.json")
    if comparison:
        yield from _difference_figure(comparison, names[0])
    for measure in names:
        collections = dict.fromkeys(c for s in summaries.values() for c, v in s["results"].items() if measure in v)
        rows = [[c, *(_number(s["results"].get(c, {}).get(measure)) for s in summaries.values())] for c in collections]
        rows.append(["average", *(_number(s["average"].get(measure)) for s in summaries.values())])
        yield Table(["collection", *summaries], rows, title=measure)
    if comparison:
        header, *rows = comparison_table(comparison)
        several = len(comparison["models"]) > 1
        title = f"Tests against {comparison['baseline']}"
        yield Table(header, rows, words=3 if several else 2, title=title, note=comparison_note(comparison))


def _difference_figure(comparison: Mapping[str, Any], measure: str) -> Iterator[Block]:
    model = comparison["models"][-1]
    rows = [r for r in comparison["rows"] if r["model"] == model and r["measure"] == measure and "interval" in r]
    averages = [r for r in _headline(comparison) if r["measure"] == measure and "interval" in r and "benchmark" in r]
    shown = [(r["collection"], r["difference"], *r["interval"]) for r in rows]
    shown += [(f"average of {r['collections']}", r["difference"], *r["interval"]) for r in averages]
    if shown:
        words = f"{measure}, {model} minus {comparison['baseline']}"
        caption = f"{words}, with 95 % intervals over queries; filled marks: the interval excludes no difference"
        yield Drawing("differences", partial(figures.differences, shown, words), caption)


# ---- where it comes from ----


def _provenance(experiment: Experiment) -> Iterator[Block]:
    rows: list[Any] = []
    versions: dict[str, Any] = {}
    commits: dict[str, Any] = {}
    devices: dict[str, Any] = {}
    for run in experiment.stages.values():
        manifest = run.read("manifest.json") or {}
        above = (manifest.get("inputs") or {}) if manifest else {}
        made_from = ", ".join(f"{stage}-{digest[:SHORT]}" for stage, digest in above.items())
        digest = run.digest[:SHORT] or "-"
        rows.append([run.stage, digest, run.status, made_from or "the files below", _minute(run.when)])
        versions |= manifest.get("versions") or {}
        commits |= dict.fromkeys([manifest["commit"]] if manifest.get("commit") else [])
        devices |= dict.fromkeys(manifest.get("devices") or [])
    yield Table(["stage", "digest", "state", "made from", "when"], rows, words=5, title="Stages")
    yield from _raw(experiment)
    told = [("versions", ", ".join(f"{name} {version}" for name, version in versions.items()))]
    told += [("commit of tdro", ", ".join(commits) or "not a source tree"), ("devices", ", ".join(devices))]
    yield Table(["", ""], [row for row in told if row[1]], words=2, title="Software and devices")
    if experiment.others:
        others = [
            [run["stage"], Path(run["folder"]).name, run["status"], _minute(run["when"])] for run in experiment.others
        ]
        note = "Not part of this report: name one of these folders to have it reported."
        yield Table(["stage", "folder", "state", "when"], others, words=4, title="Other runs of this recipe", note=note)


def _raw(experiment: Experiment) -> Iterator[Block]:
    """The files from outside, with their digests, as the manifests of complete stages name them."""
    from tdro_cli.run.history import provenance

    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for run in experiment.stages.values():
        if run.status == "complete":
            try:
                for file in provenance(run.folder)["raw"]:
                    known = found.setdefault((file["kind"], file["name"], file["digest"]), {**file, "read_by": []})
                    known["read_by"] += [stage for stage in file["read_by"] if stage not in known["read_by"]]
            except TdroError:
                continue
    rows = [
        [f["kind"], f["name"], f["digest"][:SHORT], f["path"] or "unknown", ", ".join(f["read_by"])]
        for f in found.values()
    ]
    if rows:
        columns = ["", "name", "digest", "path", "read by"]
        yield Table(columns, rows, words=5, title="What was read from outside")


# ---- the recipe ----


def _recipe(experiment: Experiment) -> Iterator[Block]:
    import yaml

    if experiment.text:
        title = "As it was written"
        yield Listing(experiment.text, "yaml", title)
    if experiment.overrides:
        yield Words("The command line changed: " + ", ".join(experiment.overrides))
    plain = yaml.safe_dump(dict(experiment.recipe), sort_keys=False, allow_unicode=True, width=100)
    yield Listing(plain, "yaml", "As it was run, with every default: this alone repeats the experiment")


# ---- parts ----


def _read(experiment: Experiment, stage: str, name: str) -> Any:
    run = experiment.complete(stage)
    return run.read(name) if run else None


def _read_summary(experiment: Experiment) -> Any:
    return _read(experiment, "learn-weights", "summary.json")


def _rows_now(experiment: Experiment) -> dict[str, int]:
    """Rows of each task before dedup took any out, where a stage has counted them."""
    for stage, name in (("mine", "audit.json"), ("dedup", "summary.json")):
        found = _read(experiment, stage, name)
        if found:
            return {task: facts["rows"] for task, facts in found["tasks"].items()}
    return _rows_kept(experiment)


def _rows_kept(experiment: Experiment) -> dict[str, int]:
    """Rows of each task that transfer divides the draws by."""
    dedup, mined = _read(experiment, "dedup", "summary.json"), _read(experiment, "mine", "audit.json")
    if dedup:
        return {name: task["kept"] for name, task in dedup["tasks"].items()}
    if mined:
        return {name: task["rows"] for name, task in mined["tasks"].items()}
    weights = _read(experiment, "learn-weights", "weights.json") or _read(experiment, "transfer", "sampling.json")
    return {name: task["size"] for name, task in weights["tasks"].items()} if weights else {}


def _minute(when: str | None) -> str:
    return when[:16].replace("T", " ") if when else "-"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _p(value: float | None) -> str:
    return "-" if value is None else "< 0.0001" if value < 1e-4 else f"{value:.4f}"
