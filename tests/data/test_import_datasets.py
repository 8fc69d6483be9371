"""`tdro import` of what Hugging Face's `datasets` can load."""

import json
from pathlib import Path

import pytest

from tdro_cli.data.formats import read_examples
from tdro_cli.data.imports import import_task
from tdro_cli.errors import Problems

datasets = pytest.importorskip("datasets", reason="pip install 'tdro[datasets]'")
PAIRS = {"question": ["a?", "b?"], "answer": ["A", "B"]}
SQUAD = {
    "id": ["7", "8"],
    "question": ["who?", "when?"],
    "context": ["Ada wrote it.", "In 1843."],
    "title": ["Notes", "Date"],
    "hard": [["no", "not this"], []],
    "meta": [{"page": {"text": "x"}}, {"page": {"text": "y"}}],
}


pytestmark = pytest.mark.usefixtures("empty_folder")


def test_a_saved_dataset_of_a_known_layout_needs_no_columns():
    datasets.Dataset.from_dict(PAIRS).save_to_disk("saved")
    assert import_task("saved", Path("pairs.jsonl"))["kind"] == "saved dataset"
    assert [(e.query, e.positives[0].text) for e in read_examples("pairs.jsonl")] == [("a?", "A"), ("b?", "B")]


def test_columns_are_mapped_and_dots_go_into_objects(tdro):
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(SQUAD)}).save_to_disk("saved")
    columns = ["query=question", "positive=context", "negative=hard", "title=title", "query_id=id"]
    code, out, _ = tdro("import", "saved", "squad.jsonl.zst", *(a for c in columns for a in ("--column", c)))
    assert code == 0 and "2 rows of a saved dataset" in out
    first, second = read_examples("squad.jsonl.zst")
    assert (first.query_id, first.positives[0].title, first.positives[0].text) == ("7", "Notes", "Ada wrote it.")
    assert [p.text for p in first.negatives] == ["no", "not this"] and second.negatives == ()
    import_task("saved", Path("deep.jsonl"), columns={"query": "question", "positive": "meta.page.text"})
    assert [e.positives[0].text for e in read_examples("deep.jsonl")] == ["x", "y"]


def test_a_folder_of_parquet_files_is_read(tdro):
    Path("many/train").mkdir(parents=True)
    for part in range(3):
        datasets.Dataset.from_dict(PAIRS).to_parquet(f"many/train/{part}.parquet")
    code, out, _ = tdro("import", "many", "pairs.jsonl.gz", "--json")
    assert code == 0 and json.loads(out)["rows"] == 6
    assert {example.query for example in read_examples("pairs.jsonl.gz")} == {"a?", "b?"}


def test_a_hub_name_without_network_is_told(monkeypatch, fault):
    error = fault("some-org/no-such-set", Path("x.jsonl"))
    assert "no dataset 'some-org/no-such-set', split 'train'" in error.message and "network" in error.remedy


def test_splits_and_columns_that_are_not_there_are_told(fault):
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(SQUAD)}).save_to_disk("saved")
    assert fault("saved", Path("x.jsonl"), split="dev").remedy == "give --split one of train"
    error = fault("saved", Path("x.jsonl"), columns={"query": "question", "positive": "contxt"})
    assert error.message == "no column 'contxt'" and "context" in error.remedy
    assert "query and positive must both" in fault("saved", Path("x.jsonl"), columns={"query": "question"}).message
    assert "no column 'passage' can be given" in fault("saved", Path("x.jsonl"), columns={"passage": "a"}).message


def test_bad_rows_are_told_together_or_left_out_and_counted(fault):
    rows = {"question": ["a?", "", "c?", None], "answer": ["A", "B", None, "D"]}
    datasets.Dataset.from_dict(rows).save_to_disk("saved")
    error = fault("saved", Path("x.jsonl"))
    assert isinstance(error, Problems)
    assert [e.where for e in error.errors] == ["saved, row 2", "saved, row 3", "saved, row 4"]
    made = import_task("saved", Path("x.jsonl"), skip_bad_rows=True)
    assert (made["rows"], made["skipped"]) == (1, 3)


def test_nothing_is_overwritten_and_a_strange_name_is_refused(tdro):
    datasets.Dataset.from_dict(PAIRS).save_to_disk("saved")
    Path("x.jsonl").write_text("kept")
    code, _, err = tdro("import", "saved", "x.jsonl")
    assert code == 2 and "x.jsonl exists" in err and Path("x.jsonl").read_text() == "kept"
    assert "name it .jsonl" in tdro("import", "saved", "x.csv")[2]
    Path("empty").mkdir()
    Path("loop").symlink_to("loop")
    for nothing in ("empty", "loop"):
        assert "nothing that can be imported" in tdro("import", nothing, "y.jsonl")[2]
