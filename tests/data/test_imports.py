import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tdro_cli.data.formats import read_examples
from tdro_cli.data.imports import import_task

ROOT = Path(__file__).resolve().parents[2]


pytestmark = pytest.mark.usefixtures("empty_folder")


def write_lines(path, rows, opener=open):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with opener(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


# ---- BEIR ----

QRELS = "query-id\tcorpus-id\tscore\nq2\td1\t1\nq1\td3\t2\nq2\td2\t0\nq1\td1\t1\nq9\td2\t0\n"


@pytest.fixture
def beir():
    documents = [{"_id": f"d{i}", "title": f"T{i}" if i < 3 else "", "text": f"text {i}"} for i in range(1, 50)]
    write_lines("beir/corpus.jsonl.gz", documents, gzip.open)
    write_lines("beir/queries.jsonl", [{"_id": q, "text": f"query {q}"} for q in ("q1", "q2", "q3", "q9")])
    Path("beir/qrels").mkdir()
    Path("beir/qrels/train.tsv").write_text(QRELS)
    return "beir"


def test_judged_queries_are_joined_with_their_documents(beir):
    made = import_task(beir, Path("nq.jsonl.gz"))
    assert (made["kind"], made["rows"]) == ("beir", 2)  # q9 has nothing relevant, q3 no judgement
    second, first = read_examples("nq.jsonl.gz")
    assert (first.query_id, first.query) == ("q1", "query q1")
    assert [(p.docid, p.title, p.text) for p in first.positives] == [("d3", "", "text 3"), ("d1", "T1", "text 1")]
    assert [p.docid for p in second.positives] == ["d1"] and [p.docid for p in second.negatives] == ["d2"]


def test_a_split_that_is_not_there_is_told_with_those_that_are(beir, fault):
    assert fault(beir, Path("x.jsonl"), split="dev").remedy == "give --split one of train"


@pytest.mark.parametrize(
    "line, words",
    [
        ("q1\td77\t1", "names 'd77', not in corpus.jsonl"),
        ("q77\td1\t1\nq78\td1\t1", "names 'q77' and 1 more, not in queries.jsonl"),
        ("q1\td1", "bad judgement"),
        ("q1\td1\thigh", "bad judgement 'q1\\td1\\thigh'"),
    ],
)
def test_judgements_that_do_not_fit_are_told(beir, line, words, fault):
    Path("beir/qrels/train.tsv").write_text(QRELS + line + "\n")
    assert words in fault(beir, Path("x.jsonl")).message


def test_a_broken_corpus_line_is_told_with_its_place(beir, fault):
    Path("beir/corpus.jsonl.gz").unlink()
    Path("beir/corpus.jsonl").write_text('{"_id": "d1", "text": "a"}\n{"id": 3}\n')
    assert fault(beir, Path("x.jsonl")).where == "beir/corpus.jsonl:2"


def test_judgements_of_the_shared_collections_are_imported(tmp_path):
    folder = ROOT.parent / "shared/data/test/pubmedqa_en"
    if not folder.is_dir():
        pytest.skip("the real data are not here")
    assert import_task(str(folder), tmp_path / "x.jsonl.gz", split="test")["rows"] == 500
    assert sum(len(example.positives) for example in read_examples(tmp_path / "x.jsonl.gz")) == 500


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus():
    script = (
        "import sys, resource; from pathlib import Path; from tdro_cli.data.imports import import_task\n"
        "import_task(sys.argv[1], Path(sys.argv[1] + '.jsonl'))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )

    def peak(documents):
        name = f"beir{documents}"
        write_lines(f"{name}/corpus.jsonl", ({"_id": f"d{i}", "text": f"{i} " + "x" * 1000} for i in range(documents)))
        write_lines(f"{name}/queries.jsonl", ({"_id": f"q{i}", "text": f"query {i}"} for i in range(documents)))
        Path(f"{name}/qrels").mkdir()
        judged = "".join(f"q{i}\td{i}\t1\n" for i in range(documents))
        Path(f"{name}/qrels/train.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        run = [sys.executable, "-c", script, name]
        return int(subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout.split()[-1])

    assert peak(200_000) - peak(20_000) < 60  # MB; the larger corpus has 180 MB more
