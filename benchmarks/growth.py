"""What a step of the data path costs as tasks and rows grow: it should not grow with them.

    python benchmarks/growth.py [--tasks 5 50 500] [--rows 10000 1000000 10000000] [--queries 256]
    python benchmarks/growth.py --tasks 25 --rows-per-task 480000 --rows --words 5     # 12 million rows

Synthesised training files in the cache's own format, mixed batches of unequal shares, far into a run, and homogeneous
ones. A step: which rows, reading them, tokenizing them. Processor time of the median step, the memory that is the
process's own, and the seconds to open all tasks. One JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

WORDS = [f"word{i}" for i in range(2000)]


def write_store(folder: Path, rows: int, words: int) -> None:
    """A task's cache of `rows` rows, of which 1,024 differ: 1 positive, 3 negatives, so many words each."""
    import pyarrow as pa

    from tdro_cli.data.formats import Example, Passage
    from tdro_cli.data.tasks import BATCH_ROWS, _record_batch, _schema

    rng = np.random.Generator(np.random.Philox(3))
    folder.mkdir(parents=True)
    examples = []
    for i in range(BATCH_ROWS):
        texts = [" ".join(WORDS[w] for w in rng.integers(0, len(WORDS), words)) for _ in range(5)]
        passages = [Passage(f"d{i}-{n}", "", text) for n, text in enumerate(texts[1:])]
        examples.append(Example(f"q{i}", texts[0], passages[:1], passages[1:]))
    passages = [passage for example in examples for passage in example.positives + example.negatives]
    batch = _record_batch(examples, passages, np.ones(len(passages), bool))
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as file, pa.ipc.new_file(file, _schema()) as writer:
        for start in range(0, rows, BATCH_ROWS):
            writer.write_batch(batch.slice(0, min(BATCH_ROWS, rows - start)))
    meta = {"digest": folder.name, "format": "tdro", "rejected": 0, "warnings": [], "facts": {"rows": rows}}
    (folder / "meta.json").write_text(json.dumps(meta))


def own_memory() -> float:
    """Resident memory that no file stands behind, in MiB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) / 1024


def measure(folders: list[Path], queries: int, tokenizer: Any) -> dict[str, Any]:
    from tdro_cli.data.batching import BatchPlan, batch_at
    from tdro_cli.data.collation import TrainingTask, collate
    from tdro_cli.data.tasks import TaskStore

    before = own_memory()
    began = time.perf_counter()
    stores = [TaskStore(folder.name, folder, folder) for folder in folders]
    opened = time.perf_counter() - began
    tasks = [TrainingTask(store.name, store, range(len(store)), "", False, True) for store in stores]
    share = np.linspace(1.0, 3.0, len(tasks))
    result = {"tasks": len(tasks), "rows": sum(map(len, stores)), "open_seconds": round(opened, 3)}
    for composition, first in (("mixed", 2000), ("homogeneous", 2000)):
        plan = BatchPlan(
            seed=1,
            queries=queries,
            sizes=tuple(map(len, stores)),
            probabilities=tuple((share / share.sum()).tolist()),
            composition=composition,
        )
        batch_at(plan, first)  # what earlier steps drew is summed once
        costs = []
        for step in range(first, first + 12):
            began_cpu = time.process_time()
            batch = batch_at(plan, step)
            collate(plan, batch, batch.shard(0, 1), tasks, tokenizer, hard_negatives=2)
            costs.append(time.process_time() - began_cpu)
        result[f"{composition}_step_ms"] = round(1000 * float(np.median(costs)), 1)
    return {**result, "own_memory_mib": round(own_memory() - before)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, nargs="*", default=[5, 50, 500])
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 100_000, 1_000_000, 10_000_000])
    parser.add_argument("--rows-per-task", type=int, default=2048, help="with --tasks")
    parser.add_argument("--words", type=int, default=20, help="of a text; 20 make a row of 1 KB")
    parser.add_argument("--queries", type=int, default=256)
    arguments = parser.parse_args()

    from tdro_cli.builtin.backbones import Scratch
    from tdro_cli.data.tokenization import TextTokenizer
    from tdro_cli.model.contract import EncoderContract

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plugin = Scratch(hidden_size=16, layers=1, heads=2, vocab_size=3000)
        plugin.prepare(WORDS, folder / "model", seed=0)
        tokenizer = TextTokenizer(plugin.load(str(folder / "model")).tokenizer, EncoderContract())
        for count in arguments.tasks:
            folders = [folder / f"tasks{count}" / f"task{i}" for i in range(count)]
            for place in folders:
                write_store(place, arguments.rows_per_task, arguments.words)
            print(json.dumps(measure(folders, arguments.queries, tokenizer)), flush=True)
        for rows in arguments.rows:
            place = folder / f"rows{rows}" / "task"
            write_store(place, rows, arguments.words)
            print(json.dumps(measure([place], arguments.queries, tokenizer)), flush=True)
            (place / "rows.arrow").unlink()


if __name__ == "__main__":
    main()
