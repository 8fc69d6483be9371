import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tdro_cli.data.formats import Example, Passage, read_examples, write_examples
from tdro_cli.data.tasks import open_task
from tdro_cli.errors import Problems, RunFailed, TdroError
from tdro_cli.protocols import TestCollection, Text
from tdro_cli.recipe import Dedup
from tdro_cli.retrieve import deduplication
from tdro_cli.retrieve.deduplication import deduplicate_tasks, find_duplicates
from tdro_cli.run.progress import Silent

RIVERS = [
    "Which river flows through Vienna?",
    "How deep is Lake Baikal at its deepest point?",
    "Where does the Nile end?",
    "which river flows through VIENNA",
    "Who first crossed the Rubicon?",
]
TEST_QUERIES = ["Where does the Nile end?", "Which river flows through Vienna?", "¿?"]


def task_of(tmp_path, name, queries, positives=None):
    examples = [
        Example(
            query_id=f"{name}-{row}",
            query=query,
            positives=(Passage(f"d{row}", "River", positives[row] if positives else f"answer {row}", {"score": 0.5}),),
            negatives=(Passage(f"n{row}", "", f"wrong {row}"),),
            extra={"source": row},
        )
        for row, query in enumerate(queries)
    ]
    path = tmp_path / f"{name}.jsonl"
    write_examples(path, examples)
    return open_task(name, path, cache=tmp_path / "cache")


def collection_of(name="rivers", queries=TEST_QUERIES, documents=("River answer 2", "something else")):
    return TestCollection(
        name=name,
        corpus=lambda: (Text(f"doc{i}", text) for i, text in enumerate(documents)),
        queries=[Text(f"q{i}", text) for i, text in enumerate(queries)],
        qrels={},
    )


def run(tasks, collections, tmp_path, **section):
    section = Dedup.model_validate({"deduplicator": "exact", **section})
    folder = tmp_path / "out"
    summary = deduplicate_tasks(tasks, section, iter(collections), folder=folder, progress=Silent())
    found = [json.loads(line) for line in (folder / "duplicates.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = {task.name: list(read_examples(folder / "tasks" / f"{task.name}.jsonl.gz")) for task in tasks}
    assert json.loads((folder / "summary.json").read_text(encoding="utf-8")) == summary
    return summary, found, kept


def test_rows_that_repeat_test_queries_go_and_the_others_stay_as_they_are(tmp_path):
    task = task_of(tmp_path, "geo", RIVERS)
    summary, found, kept = run([task], [collection_of()], tmp_path)
    assert kept["geo"] == task.examples([1, 4])
    assert [(pair["query_id"], pair["held_out_id"]) for pair in found] == [
        ("geo-0", "q1"),
        ("geo-2", "q0"),
        ("geo-3", "q1"),
    ]
    assert summary["tasks"]["geo"] == {"rows": 5, "kept": 2, "dropped": 3, "duplicates": {"rivers": 3}}
    assert summary["collections"] == {"rivers": {"queries": 3, "queries_found": 2}}


def test_a_pair_is_written_with_both_texts(tmp_path):
    _, found, _ = run([task_of(tmp_path, "geo", RIVERS)], [collection_of()], tmp_path)
    assert found[2] == {
        "task": "geo",
        "query_id": "geo-3",
        "collection": "rivers",
        "held_out_id": "q1",
        "field": "query",
        "deduplicator": "exact",
        "similarity": 1.0,
        "train_text": "which river flows through VIENNA",
        "held_out_text": "Which river flows through Vienna?",
    }


def test_positive_passages_are_compared_with_test_documents(tmp_path):
    task = task_of(tmp_path, "geo", RIVERS)
    summary, found, kept = run([task], [collection_of()], tmp_path, fields=["passage"])
    assert kept["geo"] == task.examples([0, 1, 3, 4])
    assert [(p["query_id"], p["held_out_id"], p["field"], p["train_text"], p["held_out_text"]) for p in found] == [
        ("geo-2", "doc0", "passage", "River answer 2", "River answer 2")
    ]
    assert summary["collections"]["rivers"]["queries_found"] == 0


def test_both_fields_and_several_collections_and_tasks(tmp_path):
    tasks = [task_of(tmp_path, "geo", RIVERS), task_of(tmp_path, "other", ["¿?", "fine"])]
    collections = [collection_of(), collection_of("lakes", [RIVERS[1]], [])]
    summary, found, kept = run(tasks, collections, tmp_path, fields=["query", "passage"])
    assert {name: [e.query for e in examples] for name, examples in kept.items()} == {
        "geo": [RIVERS[4]],
        "other": ["fine"],
    }
    assert summary["tasks"]["geo"]["duplicates"] == {"rivers": 3, "lakes": 1}
    # row 2 is found by its query and by its passage: two pairs, one row
    assert [(p["query_id"], p["field"]) for p in found if p["query_id"] == "geo-2"] == [
        ("geo-2", "query"),
        ("geo-2", "passage"),
    ]


def test_without_collections_nothing_goes(tmp_path):
    task = task_of(tmp_path, "geo", RIVERS)
    summary, found, kept = run([task], [], tmp_path)
    assert found == [] and kept["geo"] == list(task) and summary["tasks"]["geo"]["dropped"] == 0


def test_within_a_task_later_repeats_go(tmp_path):
    tasks = [task_of(tmp_path, "geo", RIVERS), task_of(tmp_path, "copy", [RIVERS[1], "new"])]
    summary, found, kept = run(tasks, [], tmp_path, within="task")
    assert [e.query for e in kept["geo"]] == [RIVERS[0], RIVERS[1], RIVERS[2], RIVERS[4]]
    assert len(kept["copy"]) == 2
    assert [(p["query_id"], p["collection"], p["held_out_id"]) for p in found] == [("geo-3", "train:geo", "geo-0")]
    assert summary["tasks"]["geo"]["duplicates"] == {"train:geo": 1}


def test_within_all_the_order_of_tasks_decides(tmp_path):
    tasks = [task_of(tmp_path, "geo", RIVERS), task_of(tmp_path, "copy", [RIVERS[1], "new", "NEW"])]
    _, found, kept = run(tasks, [], tmp_path, within="all")
    assert [e.query for e in kept["copy"]] == ["new"]
    assert [(p["task"], p["query_id"], p["collection"], p["held_out_id"], p["held_out_text"]) for p in found] == [
        ("geo", "geo-3", "train:geo", "geo-0", RIVERS[0]),
        ("copy", "copy-0", "train:geo", "geo-1", RIVERS[1]),
        ("copy", "copy-2", "train:copy", "copy-1", "new"),
    ]


def test_a_row_goes_for_an_earlier_row_only_if_that_one_is_kept(tmp_path):
    # a chain: each repeats its neighbour, the third does not repeat the first
    chain = [
        "one two three four five six",
        "one two three four five six sevens",
        "one three four five six sevens eight",
    ]
    task = task_of(tmp_path, "chain", chain)
    options = {"name": "minhash", "options": {"threshold": 0.7, "processes": 1}}
    _, found, kept = run([task], [], tmp_path, within="task", deduplicator=options)
    assert [e.query for e in kept["chain"]] == [chain[0], chain[2]]
    assert [(p["query_id"], p["held_out_id"]) for p in found] == [("chain-1", "chain-0")]


def test_a_task_of_which_nothing_is_left_is_refused_by_name(tmp_path):
    tasks = [task_of(tmp_path, "gone", RIVERS[:1]), task_of(tmp_path, "geo", RIVERS)]
    with pytest.raises(TdroError, match="'gone'") as refused:
        run(tasks, [collection_of()], tmp_path)
    assert "gone.jsonl" in refused.value.where and not (tmp_path / "out" / "tasks").exists()
    with pytest.raises(Problems, match=r"'gone'.*'lost'"):
        run([tasks[0], task_of(tmp_path, "lost", ["where does the nile end"])], [collection_of()], tmp_path)


def test_simhash_warns_of_its_weak_spots(tmp_path):
    task = task_of(tmp_path, "geo", RIVERS)
    summary, _, _ = run([task], [collection_of()], tmp_path, deduplicator="simhash")
    (warning,) = summary["warnings"]
    assert warning.startswith("rivers, queries: texts without a letter or digit: 1")
    assert run([task], [collection_of()], tmp_path)[0]["warnings"] == []


def test_the_output_is_a_function_of_the_input(tmp_path):
    task = task_of(tmp_path, "geo", RIVERS)
    outputs = []
    for number in range(2):
        folder = tmp_path / str(number)
        deduplicate_tasks([task], Dedup(), [collection_of()], folder=folder, progress=Silent())
        outputs.append({str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()})
    assert outputs[0] == outputs[1] and len(outputs[0]) == 3


def test_a_full_disk_is_told_and_nothing_is_lost(tmp_path):
    """A limit on the size of files stands for the disk: writing fails in the middle of the first one that is longer."""
    words = random.Random(1).choices
    queries = ["".join(words("abcdefghij klmnop", k=60)) for _ in range(1500)]
    task_of(tmp_path, "geo", queries)
    write_collection(tmp_path / "test", queries[:3])
    (tmp_path / "recipe.yaml").write_text(
        f"name: full\ntasks: [{{name: geo, path: {tmp_path}/geo.jsonl}}]\n"
        f"dedup: {{against: [{{name: folder, options: {{path: {tmp_path}/test}}}}]}}\n"
    )
    code, _, _ = run_limited(tmp_path, "dedup.deduplicator.name=exact")
    assert code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "runs/full").rglob("*") if path.is_file()}
    assert len(before) > 4

    code, _, error = run_limited(tmp_path, "dedup.deduplicator.name=minhash", limit=20_000)
    assert code == 1 and error.startswith("error: the disk is full") and "Traceback" not in error
    assert {path: path.read_bytes() for path in before} == before
    assert not list((tmp_path / "runs").rglob("*partial*"))

    code, out, _ = run_limited(tmp_path, "dedup.deduplicator.name=minhash")
    assert code == 0 and "1,497" in out


def run_limited(folder, override, *, limit=None):
    """`tdro dedup` in a process of its own: (exit code, stdout, stderr)."""
    code = "import resource, sys\n"
    code += f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n" if limit else ""
    code += "from tdro_cli.cli import main\nsys.argv[0] = 'tdro'\nmain()"
    arguments = ["dedup", f"{folder}/recipe.yaml", "--runs", f"{folder}/runs", "--quiet", "--set", override]
    # a coverage measurement would meet the limit, too
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    return done.returncode, done.stdout, done.stderr


def write_collection(folder, queries):
    folder.mkdir()
    (folder / "corpus.jsonl").write_text('{"_id": "d0", "title": "", "text": "some document"}\n')
    rows = [{"_id": f"q{i}", "text": query} for i, query in enumerate(queries)]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "qrels").mkdir()
    judged = "".join(f"q{i}\td0\t1\n" for i in range(len(queries)))
    (folder / "qrels/test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}")


@pytest.mark.parametrize("part", ["corpus", "queries"])
def test_a_corrupt_file_of_a_test_collection_is_named(tmp_path, tdro, part):
    task_of(tmp_path, "geo", RIVERS)
    write_collection(tmp_path / "test", TEST_QUERIES[:2])
    plain = tmp_path / f"test/{part}.jsonl"
    (tmp_path / f"test/{part}.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes())[:-12])
    plain.unlink()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"tasks: [{{name: geo, path: {tmp_path}/geo.jsonl}}]\ndedup: {{fields: [query, passage]}}\n")
    against = json.dumps([{"name": "folder", "options": {"path": str(tmp_path / "test")}}])
    arguments = ["--set", f"dedup.against={against}", "--runs", str(tmp_path / "runs"), "--quiet"]
    code, _, error = tdro("dedup", str(recipe), *arguments)
    assert code == 2 and f"{part}.jsonl.gz" in error
    assert not list((tmp_path / "runs").glob("*/*/out*"))


# ---- searching in chunks and processes ----


class EndsWith:
    """A matcher: texts that end with a held-out one."""

    def __init__(self, endings):
        self.endings = endings

    def __call__(self, texts):
        import numpy as np

        found = [(i, h) for i, text in enumerate(texts) for h, end in enumerate(self.endings) if text.endswith(end)]
        row, near = np.array(found, np.int64).reshape(-1, 2).T
        return row, near, np.ones(len(row))


class Dies(EndsWith):
    def __call__(self, texts):
        os._exit(9)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(deduplication, "CHUNK_TEXTS", 10)
    monkeypatch.setattr(deduplication, "PART_TEXTS", 5)
    monkeypatch.setattr(deduplication, "SERIAL_CHUNKS", 2)


def test_processes_give_the_same_pairs_in_the_same_order(small_chunks):
    train = [Text(f"t{i}", str(i)) for i in range(205)]
    alone = list(find_duplicates(EndsWith(["3", "73"]), train, ["a", "b"]))
    assert [pair[:2] for pair in alone[:2]] == [("t3", "a"), ("t13", "a")] and len(alone) == 21 + 2
    assert list(find_duplicates(EndsWith(["3", "73"]), train, ["a", "b"], processes=2)) == alone


def test_training_texts_are_read_as_they_are_needed(small_chunks):
    read = []
    train = (read.append(i) or Text(str(i), str(i)) for i in range(1000))
    assert next(find_duplicates(EndsWith(["0"]), train, ["a"])).train_id == "0"
    assert len(read) == 10


def test_long_texts_make_small_chunks(monkeypatch):
    monkeypatch.setattr(deduplication, "PART_TEXTS", 1)
    chunks = list(deduplication._chunks(Text(str(i), "x" * 600_000) for i in range(5)))
    assert [len(ids) for ids, _ in chunks] == [2, 2, 1]


def test_a_killed_process_is_told(small_chunks, monkeypatch):
    monkeypatch.setattr(deduplication, "SERIAL_CHUNKS", 0)
    with pytest.raises(RunFailed, match="killed"):
        list(find_duplicates(Dies(["3"]), (Text(str(i), str(i)) for i in range(30)), ["a"], processes=2))


# ---- real data ----

REAL = Path(os.environ.get("TDRO_REAL_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.mark.slow
@pytest.mark.skipif(not (REAL / "train").is_dir(), reason="the real data is not here: set TDRO_REAL_DATA")
def test_minhash_finds_every_test_query_that_was_left_in_the_training_files(tmp_path):
    """A row is known to be left in, whatever its query says, if its positive is the answer of a test query."""
    from tdro_cli.builtin.benchmarks import Folder

    tasks = [
        open_task(name, REAL / f"train/{name}.jsonl.gz", cache=tmp_path) for name in ("pubmedqa_en", "xquad_multi")
    ]
    collections = [Folder(str(REAL / "test" / task.name)) for task in tasks]
    collections = [benchmark.load(benchmark.subsets()[0]) for benchmark in collections]
    _, found, _ = run(tasks, collections, tmp_path, deduplicator="minhash")
    for task, collection in zip(tasks, collections, strict=True):
        answers = {doc for relevant in collection.qrels.values() for doc, score in relevant.items() if score > 0}
        texts = {document.text[-300:] for document in collection.corpus() if document.id in answers}
        planted = {e.query_id for e in task if any(p.text[-300:] in texts for p in e.positives)}
        assert len(planted) >= 40
        assert {pair["query_id"] for pair in found if pair["task"] == task.name} == planted
