"""Batches made ahead: by a thread and by processes they are those that each step would have made itself."""

import json
import os
import pickle
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tdro_cli.data.batching import BatchPlan
from tdro_cli.data.collation import TrainingTask
from tdro_cli.data.loading import Arriving, Collation, num_workers
from tdro_cli.data.tasks import open_task
from tdro_cli.data.tokenization import TextTokenizer
from tdro_cli.errors import RunFailed, TdroError
from tdro_cli.model.contract import EncoderContract

tiny_tokenizer = cache(runpy.run_path(str(Path(__file__).parents[1] / "model" / "conftest.py"))["tiny_tokenizer"])
ARRAYS = ("task_B", "row_B", "first_B", "count_B", "query_id_B", "passage_id_M", "positive_ids_BP")


@pytest.fixture(scope="module")
def collation(tmp_path_factory):
    """Two tasks, one of them prompted on both sides; rank 1 of 2."""
    folder = tmp_path_factory.mktemp("tasks")
    tasks = []
    for name in ("plain", "alike"):
        rows = [{"query": f"{name} {i}", "pos": [f"good {i}"], "neg": [f"bad {i}", "no"]} for i in range(7)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        store = open_task(name, folder / f"{name}.jsonl", cache=folder / "cache")
        tasks.append(TrainingTask(name, store, np.arange(7), f"Find {name}", name == "alike", True))
    plan = BatchPlan(3, 5, (7, 7), (0.3, 0.7), composition="mixed")
    tokenizer = TextTokenizer(tiny_tokenizer("qwen2"), EncoderContract(query_length=64, passage_length=64))
    return Collation(plan, tasks, tokenizer, 1, 2, 1)


def described(pair):
    """Everything that a step's batch holds, as plain values."""
    whole, own = pair
    return (
        [whole.task_B.tolist(), whole.row_B.tolist(), whole.visit_B.tolist()],
        [[tokens.tolist() for tokens in own.queries], [tokens.tolist() for tokens in own.passages]],
        {name: getattr(own, name).tolist() for name in ARRAYS},
        (list(own.query_texts), list(own.passage_texts)),
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_made_ahead_are_those_of_their_steps_in_order(collation, workers):
    arriving = Arriving(collation, range(3, 12), workers=workers)
    assert [described(batch) for batch in arriving] == [described(collation(step)) for step in range(3, 12)]
    with pytest.raises(StopIteration):
        next(arriving)


def test_no_steps_start_nothing(collation):
    assert list(Arriving(collation, range(5, 5), workers=1)) == []


def test_texts_are_left_out_where_nobody_reads_them(collation):
    _, own = replace(collation, keep_texts=False)(0)
    assert own.query_texts == own.passage_texts == () and len(own.queries) == 3


def test_a_worker_imports_neither_torch_nor_transformers(collation):
    pool, make = Arriving(collation, range(1), workers=1)._pool()
    with pool:
        pool.submit(make, 0).result()
        loaded = pool.submit(eval, "{'torch', 'transformers'} & set(__import__('sys').modules)").result()
    assert loaded == set()


def test_what_a_worker_refuses_is_told_by_the_training_process(collation):
    short = EncoderContract(query_length=8, passage_length=8)
    refusing = replace(collation, tokenizer=TextTokenizer(collation.tokenizer.tokenizer, short))
    with pytest.raises(ValueError, match="the prompt takes"):
        next(Arriving(refusing, range(4), workers=1))


def test_a_worker_that_is_killed_fails_the_run(collation):
    arriving = Arriving(replace(collation, tasks=[Deadly(task) for task in collation.tasks]), range(4), workers=1)
    with pytest.raises(RunFailed, match="has died") as caught:
        list(arriving)
    assert "TDRO_DATA_WORKERS=0" in caught.value.remedy and caught.value.exit_code == 1


class Deadly:
    """A task whose reading kills the process."""

    def __init__(self, task):
        self.prompt, self.symmetric, self.rows, self.store = task.prompt, task.symmetric, task.rows, self

    def file_rows(self, rows):
        return rows

    def examples(self, rows):
        os.kill(os.getpid(), signal.SIGKILL)


TRAINING = """
import multiprocessing, os, pickle, sys, threading, time
from tdro_cli.data.loading import Arriving
if __name__ == "__main__":
    arriving = Arriving(pickle.load(open(sys.argv[1], "rb")), range(100), workers=2)
    if sys.argv[2] == "at work":
        next(arriving)
    else:
        threading.Thread(target=next, args=(arriving,)).start()
        while len(multiprocessing.active_children()) < 2:
            time.sleep(0.001)
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="by the kernel's help")
@pytest.mark.parametrize("moment", ["starting", "at work"])
def test_workers_do_not_outlive_a_killed_run_and_leave_its_interrupt_alone(moment, collation, tmp_path):
    (tmp_path / "train.py").write_text(TRAINING)
    (tmp_path / "collation.pickle").write_bytes(pickle.dumps(collation))
    command = [sys.executable, "train.py", "collation.pickle", moment]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as training:
        workers = [int(pid) for pid in training.stdout.readline().split()]
        assert len(workers) == 2
        for pid in workers:  # as a terminal's Ctrl-C does
            os.kill(pid, signal.SIGINT)
            os.kill(pid, signal.SIGTERM)
        if moment == "at work":
            time.sleep(0.2)
        assert all(Path(f"/proc/{pid}/exe").exists() for pid in workers)
        training.kill()
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in workers)


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # what is left for an absent parent to collect


@pytest.mark.parametrize(("cores", "ranks", "workers"), [(1, 1, 1), (16, 1, 8), (16, 8, 1), (64, 8, 7)])
def test_a_gpu_has_workers_by_the_cores_there_are(monkeypatch, cores, ranks, workers):
    monkeypatch.delenv("TDRO_DATA_WORKERS", raising=False)
    monkeypatch.setenv("LOCAL_SIZE", str(ranks))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert num_workers(on("cuda")) == workers and num_workers(on("cpu")) == 0


def on(device):
    return SimpleNamespace(device=SimpleNamespace(type=device))


def test_the_number_of_workers_can_be_told(monkeypatch):
    monkeypatch.setenv("TDRO_DATA_WORKERS", "3")
    assert num_workers(on("cpu")) == num_workers(on("cuda")) == 3
    monkeypatch.setenv("TDRO_DATA_WORKERS", "many")
    with pytest.raises(TdroError, match="must be a whole number, got 'many'"):
        num_workers(on("cpu"))
