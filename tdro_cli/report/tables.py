"""What a command shows at its end: tables on a terminal, the same as plain values for --json."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tdro_cli import artifacts
from tdro_cli.errors import TdroError
from tdro_cli.run.plan import TRAINING, Plan


def complete(plan: Plan) -> bool:
    return artifacts.is_complete(plan.out)


def terminal() -> Any:
    from rich.console import Console

    width = None if Console().is_terminal else int(os.environ.get("COLUMNS", 160))
    return Console(highlight=False, markup=False, width=width)  # a folder may be named runs/a[1]


def text_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    """A table whose first column is text and whose others are numbers."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(
            column, justify="left" if number == 0 else "right", overflow="fold" if number == 0 else "ellipsis"
        )
    for row in rows:
        table.add_row(*map(str, row))
    return table


# ---- results ----


def results(plans: Mapping[str, Plan], stages: Sequence[str]) -> dict[str, Any]:
    """The files that sum up the stages asked for, as they are."""
    files = {
        "mine": "audit.json",
        "dedup": "summary.json",
        "train-ref": "training.json",
        "learn-weights": "weights.json",
        "transfer": "sampling.json",
        "finetune": "training.json",
        "eval": "comparison.json",
    }
    found = {}
    for stage in stages:
        if stage in plans and stage in files and (plans[stage].out / files[stage]).is_file():
            found[stage] = artifacts.read_json(plans[stage].out / files[stage])
    return found


def print_results(plans: Mapping[str, Plan], stages: Sequence[str]) -> None:
    console = terminal()
    several = len(stages) > 1
    for stage in stages:
        if stage not in plans:
            continue
        out = plans[stage].out
        if stage == "mine" and not several:
            print_mining(console, out)
        elif stage == "dedup" and not several:
            print_dedup(console, out)
        elif stage in ("train-ref", "finetune") and not several:
            print_training(console, stage, out)
        elif stage == "learn-weights" and not several:
            print_weights(console, out)
        elif stage == "transfer":
            print_sampling(console, out)
        elif stage == "eval":
            print_measures(console, plans[stage])
    console.print("Where everything lies", style="bold")
    for stage, plan in plans.items():
        if stage in stages:
            console.print(f"  {stage:14} {plan.out}", soft_wrap=True)
    if "learn-weights" in plans and "learn-weights" in stages:
        console.print(f"  {'figure':14} {plans['learn-weights'].out / 'weights.png'}", soft_wrap=True)
    if several:
        folder = Path(next(iter(plans.values())).folder).parent
        console.print(f"  {'on one page':14} tdro report {folder}", soft_wrap=True)


def print_mining(console: Any, out: Path) -> None:
    audit = artifacts.read_json(out / "audit.json")
    rows = [
        [
            name,
            f"{task['rows']:,}",
            f"{task['negatives']:,}",
            task.get("rows_with_fewer", 0),
            task.get("rows_with_none", 0),
            _share(task.get("share_positive_found")),
            _share(task.get("share_positive_first")),
            _share(task.get("share_rows_above_positive")),
        ]
        for name, task in audit["tasks"].items()
    ]
    columns = ["task", "rows", "negatives", "rows with few", "with none", "positive found", "found first", "beaten"]
    console.print(text_table("Hard negatives", columns, rows))
    console.print(
        "  beaten: a passage not known to be relevant scores above the positive; some of these are relevant\n"
        f"  {out / 'audit.md'} has likely false negatives and rows to read\n",
        soft_wrap=True,
    )


def print_dedup(console: Any, out: Path) -> None:
    summary = artifacts.read_json(out / "summary.json")
    collections = sorted({name for task in summary["tasks"].values() for name in task["duplicates"]})
    rows = [
        [name, f"{task['rows']:,}", *(task["duplicates"].get(c, 0) for c in collections), f"{task['kept']:,}"]
        for name, task in summary["tasks"].items()
    ]
    console.print(text_table("Rows that repeat a test query", ["task", "rows", *collections, "kept"], rows))


def print_training(console: Any, stage: str, out: Path) -> None:
    training = artifacts.read_json(out / "training.json")
    rows = [
        [name, f"{training['rows'][name]:,}", f"{seen:,}", f"{training['epochs'][name]:.2f}"]
        for name, seen in training["queries_seen"].items()
    ]
    console.print(text_table(f"{stage}: {training['steps']} steps", ["task", "rows", "queries seen", "epochs"], rows))


def print_weights(console: Any, out: Path) -> None:
    weights = artifacts.read_json(out / "weights.json")
    summary = artifacts.read_json(out / "summary.json")
    uniform = 1 / len(weights["tasks"])
    rows = []
    for name, task in sorted(weights["tasks"].items(), key=lambda item: -item[1]["weight"]):
        facts = summary["tasks"][name]
        bound = summary["floor_binds"]
        rows.append(
            [
                name,
                f"{task['size']:,}",
                _number(facts["proxy_loss"]),
                _number(facts["reference_loss"]),
                *([f"{bound[name]:.0%}"] if bound else []),
                _number(facts["measurement"])
                + (f" ± {facts['standard_error']:.2f}" if facts["standard_error"] else ""),
                f"{task['weight']:.4f}",
                f"{task['mean']:.4f}",
                f"{task['weight'] / uniform:.2f} ×",
                "█" * round(20 * task["weight"] / max(t["weight"] for t in weights["tasks"].values())),
            ]
        )
    columns = [
        "task",
        "size",
        "proxy",
        "reference",
        *(["floor bound"] if summary["floor_binds"] else []),
        f"{weights['loss_measurement']} ± s.e.",
        "α",
        "mean α",
        "of uniform",
        "",
    ]
    table = text_table(f"Task weights after {weights['steps']} steps", columns, rows)
    table.columns[-1].justify = "left"  # bars
    console.print(table)
    print_counterfactual(console, weights, summary)
    if "moved" in summary:
        console.print(f"  {summary['moved']}")
    console.print(f"  effective number of tasks: {summary['effective_tasks']:.1f} of {len(weights['tasks'])}")
    console.print(f"  {summary['convergence']['words']}")
    if summary.get("stopped"):
        console.print(f"  {summary['stopped']}")
    console.print(
        f"  the largest measurement of a step carries {summary['top_share']:.0%} of the squared norm on average"
    )
    reference = summary["reference"]
    console.print(
        f"  reference: {reference['forwards']:,} queries computed, {reference['hits']:,} losses from the cache"
    )
    for warning in summary["warnings"]:
        console.print(f"  warning: {warning}", style="yellow")


def print_counterfactual(console: Any, weights: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
    designs = summary["counterfactual"]
    if designs:
        rows = [
            [name, f"{task['weight']:.4f}", *(f"{design[name]:.4f}" for design in designs.values())]
            for name, task in sorted(weights["tasks"].items(), key=lambda item: -item[1]["weight"])
        ]
        short = [name.replace("relative, ", "").replace("relative_", "") for name in designs]
        title = "α that the same losses give under other measurements"
        table = text_table(title, ["task", "this run", *short], rows)
        table.add_section()
        shapes = [summary["shapes"][design] for design in ("this run", *designs)]
        table.add_row("effective tasks", *(f"{shape['effective_tasks']:.1f}" for shape in shapes))
        correlations = [_number(shape["correlation_with_reference_loss"]) for shape in shapes]
        table.add_row("rank correlation with the reference's loss", *correlations)
        console.print(table)


def print_sampling(console: Any, out: Path) -> None:
    plan = artifacts.read_json(out / "sampling.json")
    rows = []
    for name, task in sorted(plan["tasks"].items(), key=lambda item: -item[1]["probability"]):
        weight = "" if task["weight"] is None else f"{task['weight']:.4f}"
        rows.append(
            [
                name,
                f"{task['size']:,}",
                weight,
                f"{task['probability']:.4f}",
                f"{task['draws']:,.0f}",
                f"{task['epochs']:.2f}",
            ]
        )
    options = ", ".join(f"{key} {value}" for key, value in plan["options"].items())
    title = f"Sampling plan: {plan['strategy']}{f' ({options})' if options else ''}"
    console.print(text_table(title, ["task", "size", "α", "probability", "draws", "real epochs"], rows))
    console.print(
        f"  {len(plan['tasks'])} tasks, {plan['data_used']:.0%} of the data in use, {plan['draws']:,} draws\n"
    )


def print_measures(console: Any, plan: Plan) -> None:
    """The measures of every model side by side, in the paper's layout, and the tests against the baseline."""
    from tdro_cli.report import measures

    evaluation = measures.read_evaluation(plan.out, plan.settings().eval.models)
    print_tables(console, measures.tables(evaluation))


def evaluation_as(plan: Plan, form: str) -> str:
    """The tables of `print_measures` in Markdown or LaTeX."""
    from tdro_cli.report import measures

    return measures.render(measures.tables(measures.read_evaluation(plan.out, plan.settings().eval.models)), form)


def print_benchmark_files(found: Mapping[str, Any]) -> None:
    """What `retrieve.benchmark_files.check` found."""
    console = terminal()
    for benchmark in found["benchmarks"]:
        state = "complete" if benchmark["complete"] else f"{len(benchmark['missing'])} files missing"
        console.print(f"{benchmark['name']} in {benchmark['path']}: {state}", style="bold", soft_wrap=True)
        for missing in benchmark["missing"]:
            console.print(f"  {missing['file']}\n    {missing['remedy']}", soft_wrap=True)
    if any(benchmark["fetchable"] for benchmark in found["benchmarks"]):
        console.print("`tdro eval --download` fetches what is published, where there is a network")


def print_tables(console: Any, found: Sequence[Any]) -> None:
    """Tables of `report.measures`."""
    from tdro_cli.report.measures import flat_header

    for table in found:
        console.print(text_table(table.title, flat_header(table), table.rows[1:]))
        if table.note:
            console.print(f"  {table.note}\n")


def print_sample(folder: Path, written: Mapping[str, Any]) -> None:
    console = terminal()
    title = f"Training tasks in {folder / 'tasks'}"
    console.print(text_table(title, ["task", "rows"], list(written["tasks"].items())))
    rows = [[name, c["documents"], c["queries"]] for name, c in written["collections"].items()]
    console.print(
        text_table(f"Test collections in {folder / 'collections'}", ["collection", "documents", "queries"], rows)
    )


def print_export(made: Mapping[str, Any]) -> None:
    console = terminal()
    title = f"{made['folder']}: the plan for {made['format']}, see its README.md"
    console.print(text_table(title, ["task", "rows"], [[name, f"{rows:,}"] for name, rows in made["tasks"].items()]))
    for note in made["notes"]:
        console.print(f"  {note}")


def print_plugins(listed: Sequence[Mapping[str, Any]]) -> None:
    from tdro_cli import registry

    console = terminal()
    for kind in registry.KINDS:
        rows = [line for row in listed if row["kind"] == kind for line in _plugin_lines(row)]
        _print_texts(console, kind, ["name", "distribution", "option", "default", "meaning"], rows)


def _plugin_lines(row: Mapping[str, Any]) -> list[list[str]]:
    """What a plugin does, then a line for each option."""
    head = [row["name"], f"{row['distribution']} {row['version']}"]
    if "fault" in row:
        return [[*head, "FAULT", "", row["fault"]]]
    options = [["", "", name, value, row["option_words"][name]] for name, value in row["options"].items()]
    return [[*head, "", "", row["words"]], *options]


def print_checks(rows: Sequence[Mapping[str, Any]]) -> None:
    lines = [
        [row["name"], row["kind"], f"{row['distribution']} {row['version']}", row["state"], row["words"]]
        for row in rows
    ]
    _print_texts(terminal(), "Plugins", ["name", "kind", "distribution", "contract", ""], lines)


def _print_texts(console: Any, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = text_table(title, columns, rows)
    for column in table.columns:
        column.justify, column.overflow = "left", "fold"
    console.print(table)


# ---- ablations ----


def print_grid(result: Mapping[str, Any]) -> None:
    console = terminal()
    (print_designs if result["stage"] == "learn-weights" else print_strategies)(console, result)


def print_designs(console: Any, result: Mapping[str, Any]) -> None:
    """Final weights side by side."""
    designs = result["designs"]
    names = next(iter(designs.values()))["tasks"]
    rows = [[name, *(_spread(design["tasks"][name], 4) for design in designs.values())] for name in names]
    rows.append(["effective tasks", *(f"{design['effective_tasks']:.1f}" for design in designs.values())])
    rows.append(["rank corr. between seeds", *(_number(design["between_seeds"]) for design in designs.values())])
    rows.append(["reference forwards", *(sum(design["reference_forwards"]) for design in designs.values())])
    seeds = ", ".join(map(str, result["seeds"]))
    console.print(text_table(f"Final α, mean ± standard deviation over seeds {seeds}", ["task", *designs], rows))
    rows = [[a, *map(_number, row.values())] for a, row in result["rank_correlation"].items()]
    console.print(text_table("Rank correlation of α between designs", ["", *designs], rows))


def print_strategies(console: Any, result: Mapping[str, Any]) -> None:
    """Strategies by collections, and tests against the baseline."""
    from tdro_cli.report.measures import comparison_note, comparison_table

    first = next(iter(result["rows"].values()))["measures"]
    seeds = ", ".join(map(str, result["seeds"]))
    for measure in first["average"]:
        rows = [
            [name, _share(row["data_used"]), *(_spread(row["measures"][c].get(measure), 4) for c in row["measures"])]
            for name, row in result["rows"].items()
        ]
        title = f"{measure}, mean ± standard deviation over seeds {seeds}"
        console.print(text_table(title, ["", "data used", *first], rows))
    for comparison in result["tests"].values():
        header, *rows = comparison_table(comparison)
        console.print(text_table(f"{comparison['models'][0]} against {comparison['baseline']}", header, rows))
    if result["tests"]:
        note = comparison_note(next(iter(result["tests"].values())))
        console.print(f"  {note.replace('over collections', 'over designs and collections')}\n")


def _spread(value: Mapping[str, float | None] | None, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value['mean']:.{digits}f}" + (f" ± {value['sd']:.{digits}f}" if value["sd"] is not None else "")


# ---- plans ----


def describe(plans: Mapping[str, Plan], *, ranks: int = 1, device: str | None = None) -> dict[str, Any]:
    """What the stages would do, {stage: {"status", ...}}; the data as it is now; memory of each of `ranks` devices.

    `device`: "cpu" or "cuda"; where None, what this machine computes on.
    """
    from tdro_cli.run.plan import open_tasks

    recipe = next(iter(plans.values())).settings()
    cache = Path(next(iter(plans.values())).cache)
    stores = open_tasks(recipe, {task.name: task.path for task in recipe.tasks}, cache)
    tasks = {
        name: {"rows": len(store), "format": store.format, "bytes": Path(store.path).stat().st_size, **store.facts}
        for name, store in stores.items()
    }
    stages: dict[str, dict[str, Any]] = {}
    for stage, plan in plans.items():
        stages[stage] = {
            "status": "complete" if complete(plan) else "to do",
            "folder": plan.folder,
            "digest": plan.digest,
        }
        section = getattr(recipe, stage.replace("-", "_"), None)
        if stage in TRAINING:
            queries = section.steps * section.batch.queries
            stages[stage] |= {
                "steps": section.steps,
                "queries_per_step": section.batch.queries,
                "texts_per_step": section.batch.queries * (1 + section.batch.passages_per_query),
                "queries": queries,
            }
            if stage != "finetune":
                kept = _share_kept(recipe, stage)
                stages[stage]["epochs"] = {
                    name: queries / len(tasks) / max(1.0, kept * task["rows"]) for name, task in tasks.items()
                }
            elif "transfer" in plans and complete(plans["transfer"]):
                sampling = artifacts.read_json(plans["transfer"].out / "sampling.json")
                stages[stage]["epochs"] = {name: task["epochs"] for name, task in sampling["tasks"].items()}
    return {"recipe": recipe.name, "tasks": tasks, "stages": stages, "memory": _memory(recipe, stages, ranks, device)}


def _memory(recipe: Any, stages: Mapping[str, Any], ranks: int, device: str | None) -> dict[str, Any] | None:
    """What training would need of each device; None where nothing is trained."""
    trained = [stage for stage in stages if stage in TRAINING]
    if not trained:
        return None
    from tdro_cli.run.memory import estimate

    try:
        return estimate(recipe, trained, ranks=ranks, device=device)
    except TdroError as error:
        return {"unknown": error.message}


def _share_kept(recipe: Any, stage: str) -> float:
    """The share of a task's rows that a stage uses."""
    fraction = recipe.train_ref.hold_out
    if stage == "train-ref":
        return 1 - fraction
    return fraction if fraction > 0 and recipe.learn_weights.rows == "held_out" else 1.0


def print_plans(description: Mapping[str, Any]) -> None:
    console = terminal()
    epochs = {stage: facts["epochs"] for stage, facts in description["stages"].items() if "epochs" in facts}
    rows = [
        [
            name,
            f"{task['rows']:,}",
            task["format"],
            size_text(task["bytes"]),
            *(f"{by_task[name]:.2f}" if name in by_task else "-" for by_task in epochs.values()),
        ]
        for name, task in description["tasks"].items()
    ]
    columns = ["task", "rows now", "format", "file", *(f"epochs, {stage}" for stage in epochs)]
    console.print(text_table(f"Plan of {description['recipe']}", columns, rows))
    for stage, facts in description["stages"].items():
        work = f", {facts['steps']} steps × {facts['texts_per_step']:,} texts" if "steps" in facts else ""
        console.print(f"  {stage:14} {facts['status']}{work}: {facts['folder']}", soft_wrap=True)
    if description["memory"] is not None:
        print_memory(console, description["memory"])


def print_memory(console: Any, memory: Mapping[str, Any]) -> None:
    """Bytes on each device by what they hold, for the last stage; of the others the totals."""
    from tdro_cli.run.memory import MOMENTARY

    if "unknown" in memory:
        console.print(f"  memory: not known: {memory['unknown']}", soft_wrap=True)
        return
    devices = f"each of {memory['ranks']} devices" if memory["ranks"] > 1 else "the device"
    kind, tokens = {"cpu": "CPU", "cuda": "GPU"}[memory["device"]], memory["tokens"]
    console.print(f"\nMemory of {devices} ({kind}), at most (texts as long as the recipe allows)", style="bold")
    console.print(
        f"  tokens at once {tokens['micro_batch_tokens']:,}, with activations kept {tokens['activation_tokens']:,}",
        soft_wrap=True,
    )
    for name, variant in memory["variants"].items():
        *others, (stage, by_zero) = variant["stages"].items()
        held = [key for key in next(iter(by_zero.values())) if key not in MOMENTARY]
        rows = [[key, *(size_text(facts[key]) for facts in by_zero.values())] for key in held]
        rows += [
            [f"worst moment, {of}", *(size_text(f["total"]) for f in stages.values())]
            for of, stages in [*others, (stage, by_zero)]
        ]
        trained = f"{variant['trainable'] / 1e6:,.4g} M of {memory['parameters'] / 1e6:,.4g} M parameters"
        title = f"{stage}, {name}: {trained}{', as in the recipe' if name == memory['trained'] else ''}"
        console.print(text_table(title, ["", *(f"ZeRO {zero}" for zero in by_zero)], rows))
    largest = memory["largest"]
    console.print(
        f"  most of it, {size_text(largest['bytes'])} in {largest['stage']}: {largest['what']}."
        f" Where a device has less: {largest['remedy']}",
        soft_wrap=True,
        highlight=False,
    )


def print_grid_plan(description: Mapping[str, Any]) -> None:
    """One row a combination; equal numbers in a column are one run."""
    console, stages = terminal(), description["stages"]
    number = {folder: place + 1 for facts in stages.values() for place, folder in enumerate(facts["folders"])}
    rows = []
    for one in description["combinations"]:
        cells = []
        for stage, facts in stages.items():
            folder = one["stages"].get(stage)
            cells.append("-" if folder is None else f"{number[folder]}{' ✓' if facts['folders'][folder] else ''}")
        rows.append([one["label"], one["seed"], *cells])
    title = f"{len(rows)} combinations; equal numbers in a column are one run, ✓ is complete"
    console.print(text_table(title, ["combination", "seed", *stages], rows))
    for stage, facts in stages.items():
        shared = "shared by all" if facts["runs"] == 1 else f"{facts['runs']} runs for {facts['combinations']}"
        console.print(f"  {stage:14} {shared}, {facts['runs'] - facts['complete']} to do")


def size_text(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
