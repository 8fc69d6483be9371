"""What reading and tokenizing ahead costs a training thread that gives a device its work: waiting, and slower work.

    python benchmarks/loading.py [--queries 1024] [--seconds 1.5] [--workers 0 1] [--steps 6] [--folder DIR]

Real rows of 20 tasks (TDRO_REAL_DATA), 1 + 7 passages a query. A step stands for a GPU's: the training thread calls
small torch functions, as many as it manages in `--seconds` when nothing else runs. `held_up` is the share of their time
in which the thread was not at work, because another held Python's lock (or its core); `waiting_share` the share of a
step that waits for its batch. Workers: 0 for a
thread, else so many processes (`TDRO_DATA_WORKERS`). Prints one JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any


def calls(count: int) -> tuple[float, float]:
    """Seconds for so many small torch functions: on the clock, and of them at work."""
    import torch

    value = torch.zeros(8)
    began, began_work = time.perf_counter(), time.thread_time()
    for _ in range(count):
        value = value + 1.0
    return time.perf_counter() - began, time.thread_time() - began_work


def collation_of(folder: Path, queries: int) -> Any:
    from learn_weights import recipe_text
    from real_rows import write_tasks

    from tdro_cli import recipe as recipes
    from tdro_cli.data.batching import BatchPlan
    from tdro_cli.data.loading import Collation
    from tdro_cli.learn.training import backbone_source, load_encoder, training_tasks
    from tdro_cli.run.launch import Machines, run_plan
    from tdro_cli.run.plan import make_plans
    from tdro_cli.run.progress import Silent

    if not (folder / "recipe.yaml").exists():
        shape = argparse.Namespace(dtype="float32", hidden=32, layers=1, heads=2, queries=queries, steps=1)
        tasks = write_tasks(folder / "tasks", rows=200, negatives=7)
        (folder / "recipe.yaml").write_text(recipe_text(tasks, shape))
    plans = make_plans(recipes.load(folder / "recipe.yaml"), folder / "runs", needed=["learn-weights"])
    run_plan(plans["backbone"], Machines(), Silent())
    plan = plans["learn-weights"]
    tasks = training_tasks(plan, "all", need_negatives=True)
    _, tokenizer = load_encoder(plan.settings(), backbone_source(plan))
    sizes, equal = tuple(len(task.rows) for task in tasks), (1 / len(tasks),) * len(tasks)
    return Collation(BatchPlan(1, queries, sizes, equal, "mixed"), tasks, tokenizer, 0, 1, 7, keep_texts=False)


def measure(collation: Any, workers: int, count: int, steps: int) -> dict[str, Any]:
    from tdro_cli.data.loading import Arriving

    arriving = Arriving(collation, range(steps + 1), workers=workers)
    next(arriving)  # processes start
    seconds, at_work, waited = 0.0, 0.0, 0.0
    for _ in range(steps):
        passed, worked = calls(count)
        seconds, at_work = seconds + passed, at_work + worked
        next(arriving)
        waited += arriving.waited
    return {
        "workers": workers,
        "step_seconds": round((seconds + waited) / steps, 3),
        "waiting_share": round(waited / (seconds + waited), 4),
        "held_up": round(1 - at_work / seconds, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=1.5, help="of a step without anything else")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--folder", type=Path, help="keep the rows here")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory() as name:
        collation = collation_of(arguments.folder or Path(name), arguments.queries)
        began = time.perf_counter()
        _, batch = collation(0)
        seconds, texts = time.perf_counter() - began, len(batch.queries) + len(batch.passages)
        print(json.dumps({"texts": texts, "texts_per_second_and_core": round(texts / seconds)}), flush=True)
        count = round(100_000 * arguments.seconds / calls(100_000)[0])
        passed, worked = calls(count)
        print(json.dumps({"alone": True, "held_up": round(1 - worked / passed, 4)}), flush=True)
        for workers in arguments.workers:
            print(json.dumps(measure(collation, workers, count, arguments.steps)), flush=True)


if __name__ == "__main__":
    main()
