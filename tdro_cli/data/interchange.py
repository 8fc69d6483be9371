"""A sampling plan for other trainers: the files that each needs to draw the tasks in the planned shares.

What the formats want, and where that was read, is told in docs/interchange.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tdro_cli import artifacts
from tdro_cli.data.batching import BatchPlan, assemble, choose_passages, drawn_before, task_schedule
from tdro_cli.data.formats import Example, as_row, passage_text
from tdro_cli.errors import TdroError, did_you_mean
from tdro_cli.recipe import Recipe, Task
from tdro_cli.run.plan import Plan, open_tasks

ROWS_AT_ONCE = 1024
MOST_DOMAINS = 128  # of the authors' trainer, which keeps their numbers in 8 bits


@dataclass(frozen=True)
class Exported:
    """A task of the sampling plan: its recipe entry, its training file, and the rows that finetune uses."""

    task: Task
    store: Any
    rows: np.ndarray

    def head(self, query_template: str) -> str:
        """What stands before each query."""
        return query_template.removesuffix("{query}").replace("{prompt}", self.task.prompt) if self.task.prompt else ""


@dataclass(frozen=True)
class Export:
    """All that a format writes from. `draws`: the queries of each task in all of finetune's batches."""

    recipe: Recipe
    sampling: Mapping[str, Any]
    tasks: Sequence[Exported]
    batches: BatchPlan

    @property
    def steps(self) -> int:
        return self.recipe.finetune.steps

    @property
    def hard_negatives(self) -> int:
        return self.recipe.finetune.batch.passages_per_query - 1

    def draws(self) -> list[int]:
        return drawn_before(self.batches, self.steps).tolist()


def check_export(form: str, out: Path) -> None:
    """Raises TdroError for an unknown format, or if `out` exists."""
    if form not in FORMATS:
        raise TdroError(f"no export format {form!r}", where="--export", remedy=did_you_mean(form, FORMATS))
    if out.exists():
        raise TdroError(f"{out} exists", where="--out", remedy="name a folder that is not there yet")


def export_transfer(plan: Plan, form: str, out: Path) -> dict[str, Any]:
    """The export of a finished transfer stage."""
    recipe = plan.settings()
    stores = open_tasks(recipe, plan.tasks, Path(plan.cache))
    return export_plan(form, recipe, artifacts.read_json(plan.out / "sampling.json"), stores, out)


def export_plan(
    form: str, recipe: Recipe, sampling: Mapping[str, Any], stores: Mapping[str, Any], out: Path
) -> dict[str, Any]:
    """Writes the folder `out` and returns what it holds: {"format", "folder", "tasks": {NAME: rows}, "notes"}.

    `sampling`: the content of sampling.json. Raises TdroError for an unknown format, or if `out` exists.
    """
    check_export(form, out)
    export = _export(recipe, sampling, stores)
    notes = _notes(export)
    made = {"format": form, "strategy": sampling["strategy"], "steps": export.steps, "notes": notes}
    with artifacts.publishing(out, lambda: {"kind": "export", **made}) as aside:
        rows = FORMATS[form](export, aside)
        readme = "\n".join([f"# Sampling plan for {form}", "", READMES[form], "", *(f"* {note}" for note in notes)])
        (aside / "README.md").write_text(readme.rstrip() + "\n", encoding="utf-8")
    return {"format": form, "folder": str(out), "tasks": rows, "notes": notes}


def _export(recipe: Recipe, sampling: Mapping[str, Any], stores: Mapping[str, Any]) -> Export:
    held_out = recipe.train_ref.hold_out if recipe.finetune.rows == "held_in" else 0.0
    tasks = []
    for task in recipe.tasks:
        if task.name in sampling["tasks"]:
            store = stores[task.name]
            tasks.append(Exported(task, store, store.held_in_rows(held_out) if held_out else np.arange(len(store))))
    section = recipe.finetune.batch
    batches = BatchPlan(
        seed=recipe.seed,
        queries=section.queries,
        sizes=tuple(len(exported.rows) for exported in tasks),
        probabilities=tuple(sampling["tasks"][exported.task.name]["probability"] for exported in tasks),
        composition=section.composition,
        draws=section.draws,
    )
    return Export(recipe, sampling, tasks, batches)


def _notes(export: Export) -> list[str]:
    notes = []
    if factors := export.sampling.get("loss_weights"):
        notes.append(f"the strategy also scales each task's loss, which no other trainer does: {factors}")
    without = {
        e.task.name: len(e.rows) - len(np.intersect1d(e.rows, e.store.rows_with_negatives())) for e in export.tasks
    }
    bare = {name: rows for name, rows in without.items() if rows}
    if bare and export.hard_negatives:
        told = ", ".join(f"{name} ({rows:,})" for name, rows in bare.items())
        notes.append(f"rows without a hard negative, which a trainer may refuse: {told}; `tdro mine` finds some")
    return notes


# ---- rows ----


def _drawn(export: Export, number: int, draws: int) -> Iterator[tuple[Example, int, int]]:
    """(example, row, visit) of a task's first `draws` draws: each row once an epoch, in finetune's own order."""
    exported = export.tasks[number]
    for first in range(0, draws, ROWS_AT_ONCE):
        count_G, before_G = (np.zeros(len(export.tasks), dtype=np.int64) for _ in range(2))
        count_G[number], before_G[number] = min(ROWS_AT_ONCE, draws - first), first
        batch = assemble(export.batches, 0, count_G, before_G)
        examples = exported.store.examples(exported.rows[batch.row_B])
        yield from zip(examples, batch.row_B.tolist(), batch.visit_B.tolist(), strict=True)


def _all_rows(exported: Exported) -> Iterator[Example]:
    for first in range(0, len(exported.rows), ROWS_AT_ONCE):
        yield from exported.store.examples(exported.rows[first : first + ROWS_AT_ONCE])


def _write_lines(path: Path, rows: Iterator[Mapping[str, Any]]) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    return count


def _texts(export: Export, exported: Exported, example: Example) -> tuple[str, list[str], list[str]]:
    """Query, positives and negatives as the model is to read them, prompts included."""
    from tdro_cli.model.contract import EncoderContract

    head = exported.head(EncoderContract().query_template)
    before = head if exported.task.symmetric else ""
    positives, negatives = ([before + passage_text(p) for p in side] for side in (example.positives, example.negatives))
    return head + example.query, positives, negatives


# ---- the formats ----


def _authors(export: Export, out: Path) -> dict[str, int]:
    """The authors' trainer samples itself: a domain configuration, and a file a task with its own instruction."""
    if len(export.tasks) > MOST_DOMAINS:
        raise TdroError(
            f"{len(export.tasks)} tasks are more than the {MOST_DOMAINS} that the authors' trainer can number",
            where="--export",
            remedy="select fewer tasks, or merge some",
        )
    planned = export.sampling["tasks"]
    names = sorted(exported.task.name for exported in export.tasks)
    artifacts.write_json(
        out / "domain_config.json",
        {
            "domain_ids": {name: number for number, name in enumerate(names)},
            "domain_weights": {name: planned[name]["probability"] for name in names},
            "size": {name: planned[name]["size"] for name in names},
            "epoch": {name: planned[name]["epochs"] for name in names},
        },
    )

    def rows(exported: Exported) -> Iterator[Mapping[str, Any]]:
        instruction = {"instruction": exported.task.prompt} if exported.task.prompt else {}
        for example in _all_rows(exported):
            row = as_row(example)
            kept = {key: row[key] for key in ("query_id", "query", "positive_passages", "negative_passages")}
            yield kept | instruction

    return {e.task.name: _write_lines(out / "data" / f"{e.task.name}.jsonl", rows(e)) for e in export.tasks}


def _tevatron(export: Export, out: Path) -> dict[str, int]:
    """Tevatron reads one set and shuffles it: one pass over this file draws the tasks as planned."""
    draws = export.draws()

    def rows(number: int) -> Iterator[Mapping[str, Any]]:
        exported = export.tasks[number]
        for example, _, visit in _drawn(export, number, draws[number]):
            query, positives, negatives = _texts(export, exported, example)
            yield {
                "query_id": f"{exported.task.name}/{example.query_id}/{visit}",
                "query": query,
                "positive_passages": _named(example.positives, positives),
                "negative_passages": _named(example.negatives, negatives),
            }

    def all_rows() -> Iterator[Mapping[str, Any]]:
        for number in range(len(export.tasks)):
            yield from rows(number)

    _write_lines(out / "train.jsonl", all_rows())
    return {exported.task.name: count for exported, count in zip(export.tasks, draws, strict=True)}


def _named(passages: Sequence[Any], texts: Sequence[str]) -> list[dict[str, str]]:
    return [{"docid": passage.docid, "text": text} for passage, text in zip(passages, texts, strict=True)]


def _flagembedding(export: Export, out: Path) -> dict[str, int]:
    """FlagEmbedding makes batches of one set in proportion to its rows: a folder a task with the planned number."""
    written = {}
    for number, (exported, draws) in enumerate(zip(export.tasks, export.draws(), strict=True)):
        name = exported.task.name

        def rows(number: int = number, draws: int = draws) -> Iterator[Mapping[str, Any]]:
            for example, _, _ in _drawn(export, number, draws):
                query, positives, negatives = _texts(export, export.tasks[number], example)
                yield {"query": query, "pos": positives, "neg": negatives}

        folder = name if exported.task.in_batch_negatives else f"{name}-no_in_batch_neg"
        if draws:
            written[name] = _write_lines(out / "data" / folder / "train.jsonl", rows())
    total = sum(written.values())
    artifacts.write_json(out / "weights.json", {name: rows / total for name, rows in written.items()})
    return written


def _sentence_transformers(export: Export, out: Path) -> dict[str, int]:
    """sentence-transformers takes a sampler of ours: the task of every batch, in order, and a file a task."""
    if export.batches.composition != "homogeneous":
        raise TdroError(
            "sentence-transformers makes batches of one set, and finetune's are mixed",
            where="finetune.batch.composition",
            remedy="set it to homogeneous",
        )
    planned = export.sampling["tasks"]
    written = {}
    for number, exported in enumerate(export.tasks):
        negatives = export.hard_negatives if len(exported.store.rows_with_negatives()) == len(exported.store) else 0
        rows = (_columns(export, number, row, example, negatives) for row, example in enumerate(_all_rows(exported)))
        written[exported.task.name] = _write_lines(out / "data" / f"{exported.task.name}.jsonl", rows)
    artifacts.write_json(
        out / "plan.json",
        {
            "schema": 1,
            "batch_size": export.batches.queries,
            "tasks": [exported.task.name for exported in export.tasks],
            "probabilities": [planned[exported.task.name]["probability"] for exported in export.tasks],
            "batches": task_schedule(export.batches, export.steps).tolist(),
        },
    )
    (out / "train.py").write_text(TRAIN_PY, encoding="utf-8")
    return written


def _columns(export: Export, number: int, row: int, example: Example, wanted: int) -> dict[str, str]:
    """One positive and `wanted` negatives of a row, chosen as finetune would at the first visit; few are repeated."""
    query, positives, negatives = _texts(export, export.tasks[number], example)
    task_1, row_1, visit_1, positives_1, negatives_1 = (
        np.array([value]) for value in (number, row, 0, len(positives), len(negatives))
    )
    positive_1, (chosen,) = choose_passages(
        export.batches, task_1, row_1, visit_1, positives_B=positives_1, negatives_B=negatives_1, wanted=wanted
    )
    columns = {"anchor": query, "positive": positives[positive_1[0]]}
    return columns | {f"negative_{i + 1}": negatives[chosen[i % len(chosen)]] for i in range(wanted)}


FORMATS: dict[str, Callable[[Export, Path], dict[str, int]]] = {
    "authors": _authors,
    "tevatron": _tevatron,
    "flagembedding": _flagembedding,
    "sentence-transformers": _sentence_transformers,
}

TRAIN_PY = '''\
import json, sys  # python train.py MODEL [PER_DEVICE_BATCH]

from datasets import DatasetDict, load_dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import MultiDatasetDefaultBatchSampler
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

plan = json.load(open("plan.json"))


class Planned(MultiDatasetDefaultBatchSampler):
    """The batches' tasks in the planned order; a task that is used up begins anew."""

    def __iter__(self):
        starts, running = [0, *self.dataset.cumulative_sizes], {}
        for task in plan["batches"]:
            if not (rows := next(running.get(task, iter(())), None)):
                running[task] = iter(self.batch_samplers[task])
                rows = next(running[task])
            yield [starts[task] + row for row in rows]

    def __len__(self):
        return len(plan["batches"])


model = SentenceTransformer(sys.argv[1])
size = int(sys.argv[2]) if sys.argv[2:] else plan["batch_size"]
files = {task: f"data/{task}.jsonl" for task in plan["tasks"]}
data = DatasetDict({task: load_dataset("json", data_files=file, split="train") for task, file in files.items()})
options = dict(output_dir="out", per_device_train_batch_size=size, num_train_epochs=1, report_to="none")
arguments = SentenceTransformerTrainingArguments(multi_dataset_batch_sampler=Planned, **options)
loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=min(size, 32))
SentenceTransformerTrainer(model=model, args=arguments, train_dataset=data, loss=loss).train()
model.save_pretrained("out/model")
'''

READMES = {
    "authors": """\
`domain_config.json` holds the sampling probabilities, `data/` a file a task. Give the trainer
`--domain_config_path domain_config.json --preprocessed_dir data --homogenous_batch --add_prompt --prompt_type e5`.
Each row carries its task's instruction; a task without a prompt needs a name that the trainer's own table knows.""",
    "tevatron": """\
`train.jsonl` holds every draw of the plan: one pass over it (`--num_train_epochs 1`) draws the tasks in the planned
shares. Give Tevatron `--dataset_name json --dataset_path train.jsonl`. Prompts and titles are already part of the
texts: leave `--query_prefix` and `--passage_prefix` empty. Its batches are mixed.""",
    "flagembedding": """\
`data/` holds a folder a task with as many rows as the plan draws, `weights.json` their shares. Give FlagEmbedding
`--train_data data/* --same_dataset_within_batch True --small_threshold 0 --drop_threshold 0 --num_train_epochs 1`, with
the recipe's batch size. Prompts and titles are already part of the texts: set no instruction. A folder whose name
ends in `no_in_batch_neg` is trained without in-batch negatives.""",
    "sentence-transformers": """\
`plan.json` names the task of every batch, in order; `data/` holds a file a task. `python train.py MODEL` trains with
them (sentence-transformers 6). On N devices give `plan.json`'s `batch_size` / N as the second argument.""",
}
