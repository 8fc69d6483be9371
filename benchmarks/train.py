"""Our train-ref beside sentence-transformers' trainer with CachedMultipleNegativesRankingLoss.

    python benchmarks/train.py [--queries 256] [--steps 3] [--hidden 128] [--layers 4] [--threads 2]

Real rows (TDRO_REAL_DATA) of 20 tasks in homogeneous batches, 1 positive and 1 hard negative a query, texts cut at 256
tokens, the same tiny Qwen2 with mean pooling, float32. Each side trains in a process of its own on the same rows in the
same order; they take turns, step by step. Memory is each process's peak. Both have their defaults: on a CPU ours 2,048
tokens at once and 12,288 with activations kept (or `--activation-tokens`), theirs 32 texts at once; threads wait as
each side lets them. Needs the extra `compare`. Prints one JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FIRST = 1  # steps before what is measured


def recipe_text(tasks: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    options = {"hidden_size": arguments.hidden, "layers": arguments.layers, "heads": 4, "vocab_size": 24000}
    return json.dumps(
        {
            "name": "speed",
            "tasks": tasks,
            "backbone": {"name": "scratch", "options": options},
            "encoder": {
                "pooling": "mean",
                "query_length": 256,
                "passage_length": 256,
                "temperature": 0.05,
                **({"activation_tokens": arguments.activation_tokens} if arguments.activation_tokens else {}),
            },
            "train_ref": {
                "steps": FIRST + arguments.steps,
                "hold_out": 0.0,
                "batch": {"queries": arguments.queries, "passages_per_query": 2},
            },
        }
    )


# ---- the two sides, each in a process of its own ----


def wait_for_turn() -> None:
    print(json.dumps({"memory_mib": peak_mib()}), flush=True)
    if sys.stdin.readline() == "":
        os._exit(0)


def told(wall: float, cpu: float) -> None:
    print(json.dumps({"wall": wall, "cpu": cpu}), flush=True)


def peak_mib() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


class OneStepATurn:
    """A progress of our stage, and the clock of both sides."""

    def __init__(self) -> None:
        self.began = (0.0, 0.0)

    def start(self, *what: Any) -> OneStepATurn:
        return self

    def __enter__(self) -> OneStepATurn:
        return self

    def __exit__(self, *exc: object) -> None: ...
    def close(self) -> None: ...
    def note(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...
    def show(self, *what: Any) -> None: ...

    def begin(self) -> None:
        wait_for_turn()
        self.began = time.perf_counter(), time.process_time()

    def end(self) -> None:
        told(time.perf_counter() - self.began[0], time.process_time() - self.began[1])

    def advance(self, n: float = 1, **facts: Any) -> None:
        if facts:
            self.end()
        self.begin()


def train_ours(folder: Path) -> None:
    from tdro_cli.cli import let_threads_wait

    let_threads_wait(os.environ)  # as the command does, before torch is there
    from tdro_cli import recipe as recipes
    from tdro_cli.run.launch import Machines, run_plan
    from tdro_cli.run.plan import make_plans

    plan = make_plans(recipes.load(folder / "recipe.yaml"), folder / "runs", needed=["train-ref"])["train-ref"]
    run_plan(plan, Machines(), OneStepATurn())


def train_theirs(folder: Path) -> None:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, models
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.sampler import DefaultBatchSampler
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback

    rows = [json.loads(line) for line in (folder / "triplets.jsonl").read_text().splitlines()]
    queries = json.loads((folder / "recipe.yaml").read_text())["train_ref"]["batch"]["queries"]
    transformer = models.Transformer(str(folder / "model"), max_seq_length=256)
    model = SentenceTransformer(
        modules=[transformer, models.Pooling(transformer.get_word_embedding_dimension(), "mean"), models.Normalize()],
        device="cpu",
    )
    clock = OneStepATurn()

    class Turns(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.begin()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.end()

    def in_order(dataset: Any, batch_size: int, drop_last: bool, **_: Any) -> DefaultBatchSampler:
        return DefaultBatchSampler(SequentialSampler(dataset), batch_size=batch_size, drop_last=drop_last)

    SentenceTransformerTrainer(
        model=model,
        args=Arguments(
            output_dir=str(folder / "theirs"),
            num_train_epochs=1,
            per_device_train_batch_size=queries,
            learning_rate=1e-4,
            batch_sampler=in_order,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        loss=CachedMultipleNegativesRankingLoss(model, scale=20.0, mini_batch_size=32),
        callbacks=[Turns()],
    ).train()


# ---- the same rows for both ----


def prepare(folder: Path, arguments: argparse.Namespace) -> None:
    """Recipe, model, and our batches' texts as triplets in order."""
    import shutil

    import numpy as np
    from real_rows import write_tasks

    from tdro_cli import recipe as recipes
    from tdro_cli.data.batching import BatchPlan, batch_at, choose_passages
    from tdro_cli.data.formats import passage_text
    from tdro_cli.learn.training import encoder_contract, training_tasks
    from tdro_cli.run.launch import Machines, run_plan
    from tdro_cli.run.plan import make_plans
    from tdro_cli.run.progress import Silent

    tasks = write_tasks(folder / "tasks", rows=600, negatives=1)
    (folder / "recipe.yaml").write_text(recipe_text(tasks, arguments))
    plans = make_plans(recipes.load(folder / "recipe.yaml"), folder / "runs", needed=["train-ref"])
    run_plan(plans["backbone"], Machines(), Silent())
    plan, recipe = plans["train-ref"], plans["train-ref"].settings()
    shutil.copytree(plan.input("backbone") / "model", folder / "model")
    stores = training_tasks(plan, "all")
    batches = BatchPlan(
        seed=recipe.seed,
        queries=arguments.queries,
        sizes=tuple(len(task.rows) for task in stores),
        probabilities=(1 / len(stores),) * len(stores),
    )
    contract = encoder_contract(recipe)
    with open(folder / "triplets.jsonl", "w", encoding="utf-8") as file:
        for step in range(FIRST + arguments.steps):
            batch = batch_at(batches, step)
            task = stores[batch.task_B[0]]
            examples = task.store.examples(task.file_rows(batch.row_B))
            positive_B, negatives = choose_passages(
                batches,
                *(batch.task_B, batch.row_B, batch.visit_B),
                positives_B=np.array([len(example.positives) for example in examples]),
                negatives_B=np.array([len(example.negatives) for example in examples]),
                wanted=1,
            )
            head = contract.head(task.prompt)
            behind = head if task.symmetric else ""
            for example, positive, negative in zip(examples, positive_B, negatives, strict=True):
                triplet = {
                    "anchor": head + example.query,
                    "positive": behind + passage_text(example.positives[positive]),
                    "negative": behind + passage_text(example.negatives[negative[0]]),
                }
                file.write(json.dumps(triplet, ensure_ascii=False) + "\n")


class Side:
    """A process that trains one step when told to."""

    def __init__(self, name: str, folder: Path, threads: int):
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.name, self.wall, self.cpu, self.memory = name, 0.0, 0.0, 0
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--child", name, "--folder", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(folder / f"{name}.log", "w"),  # noqa: SIM115 - the process's own
            text=True,
            env=environment,
        )
        self._hear("memory_mib")

    def step(self, counted: bool) -> None:
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        spent = self._hear("wall")
        if counted:
            self.wall, self.cpu = self.wall + spent["wall"], self.cpu + spent["cpu"]

    def peak(self) -> int:
        return int(Path(f"/proc/{self.process.pid}/status").read_text().partition("VmHWM:")[2].split()[0]) // 1024

    def _hear(self, key: str) -> dict[str, Any]:
        for line in self.process.stdout:
            if line.startswith("{") and key in line:
                return json.loads(line)
        raise SystemExit(f"{self.name} ended: see its log")

    def report(self, examples: int) -> dict[str, Any]:
        rate = round(examples / self.wall, 2)
        return {
            "side": self.name,
            "examples_per_second": rate,
            "cpu_seconds": round(self.cpu, 1),
            "memory_mib": self.memory,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3, help="measured ones")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--activation-tokens", type=int, help="ours: kept activations, where not the default")
    parser.add_argument("--child", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        {"ours": train_ours, "theirs": train_theirs}[arguments.child](arguments.folder)
        return
    with tempfile.TemporaryDirectory() as name:
        measure(Path(name), arguments)


def measure(folder: Path, arguments: argparse.Namespace) -> None:
    prepare(folder, arguments)
    sides = [Side(name, folder, arguments.threads) for name in ("ours", "theirs")]
    for step in range(FIRST + arguments.steps):
        for side in sides:
            side.step(counted=step >= FIRST)
            side.memory = side.peak()
    for side in sides:
        side.process.kill()
        print(json.dumps(side.report(arguments.queries * arguments.steps)))
    ours, theirs = sides
    ratios = {
        "ratio": theirs.wall / ours.wall,
        "cpu_ratio": theirs.cpu / ours.cpu,
        "memory": ours.memory / theirs.memory,
    }
    print(json.dumps({name: round(value, 2) for name, value in ratios.items()}))


if __name__ == "__main__":
    main()
