"""Reading and writing training files."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdro_cli.data.formats import (
    Example,
    FirstSeen,
    Passage,
    detect_format,
    passage_text,
    read_examples,
    write_examples,
)
from tdro_cli.errors import TdroError

REAL = Path(os.environ.get("TDRO_REAL_DATA", Path(__file__).parents[2] / "../shared/data"))
ROW = {
    "query_id": "q1",
    "query": "what is rust",
    "positive_passages": [{"docid": "d1", "title": "Rust", "text": "An oxide of iron."}],
    "negative_passages": [{"docid": "d2", "title": "", "text": "A language.", "score": 12.5}],
    "answers": ["iron oxide"],
}
EXAMPLE = Example(
    "q1",
    "what is rust",
    (Passage("d1", "Rust", "An oxide of iron."),),
    (Passage("d2", "", "A language.", {"score": 12.5}),),
    {"answers": ["iron oxide"]},
)


def write_lines(path, *rows):
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


def texts(passages):
    return [passage.text for passage in passages]


def bad_rows(path):
    found = []
    examples = list(read_examples(path, on_bad_row=lambda number, reason, row: found.append((number, reason))))
    return found, examples


# ---- layouts ----


def test_authors_row_keeps_its_further_keys(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ROW)
    assert detect_format(path) == "tdro"
    assert list(read_examples(path)) == [EXAMPLE]


def test_docid_and_title_are_optional_and_equal_texts_get_equal_docids(tmp_path):
    row = {"query_id": 7, "query": "q", "positive_passages": [{"text": "p"}]}
    first, second = read_examples(write_lines(tmp_path / "a.jsonl", row, {**row, "query_id": 8}))
    assert (first.query_id, first.positives[0].title, first.negatives) == ("7", "", ())
    assert first.positives[0].docid == second.positives[0].docid != ""


def test_flagembedding_rows_are_numbered_and_keep_scores_as_extra(tmp_path):
    row = {"query": "q", "pos": ["a", "b"], "neg": ["c"], "pos_scores": [1.0, 0.5]}
    path = write_lines(tmp_path / "f.jsonl", row, {"query": "r", "pos": ["a"]})
    first, second = read_examples(path)
    assert detect_format(path) == "flagembedding"
    assert (first.query_id, texts(first.positives), texts(first.negatives)) == ("row-1", ["a", "b"], ["c"])
    assert first.extra == {"pos_scores": [1.0, 0.5]}
    assert (second.query_id, second.positives[0].docid) == ("row-2", first.positives[0].docid)


@pytest.mark.parametrize(
    "row",
    [
        {"anchor": "q", "positive": "p"},
        {"query": "q", "positive": "p"},
        {"query": "q", "answer": "p"},
        {"question": "q", "answer": "p"},
        {"sentence1": "q", "sentence2": "p"},
        ["q", "p"],
    ],
)
def test_sentence_transformers_pairs(tmp_path, row):
    path = write_lines(tmp_path / "p.jsonl", row)
    [example] = read_examples(path)
    assert detect_format(path) == "sentence-transformers"
    assert (example.query, texts(example.positives), example.negatives) == ("q", ["p"], ())


@pytest.mark.parametrize(
    ("row", "negatives"),
    [
        ({"anchor": "q", "positive": "p", "negative": "n"}, ["n"]),
        ({"anchor": "q", "positive": "p", "negative_10": "z", "negative_2": "b", "negative_1": "a"}, ["a", "b", "z"]),
        ({"anchor": "q", "positive": "p", "negative_1": "a", "negative_2": None}, ["a"]),
        (["q", "p", "a", "b"], ["a", "b"]),
    ],
)
def test_sentence_transformers_negatives_come_in_number_order(tmp_path, row, negatives):
    [example] = read_examples(write_lines(tmp_path / "t.jsonl", row))
    assert texts(example.negatives) == negatives


@pytest.mark.parametrize(
    ("row", "found", "advice"),
    [
        ({"prompt": "q", "completion": "p"}, "prompt, completion", "rename the keys"),
        ({"_id": "1", "title": "", "text": "t"}, "_id, title, text", "BEIR"),
        ({"sentence1": "a", "sentence2": "b", "label": 1}, "label", "positive pairs only"),
        ([{"query": "q", "pos": ["p"]}], "an array", "one JSON object a line"),
        ({}, "(none)", "rename"),
    ],
)
def test_unknown_layout_names_the_keys_found_and_the_known_layouts(tmp_path, row, found, advice):
    path = write_lines(tmp_path / "u.jsonl", row)
    for read in (detect_format, lambda path: list(read_examples(path))):
        with pytest.raises(TdroError) as error:
            read(path)
        assert found in error.value.message and error.value.where == f"{path}:1"
        assert advice in error.value.remedy and "flagembedding" in error.value.remedy


def test_json_document_over_several_lines_is_named(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps([ROW, ROW], indent=1))
    with pytest.raises(TdroError, match="over several lines"):
        list(read_examples(path))


def test_first_row_need_not_be_good_to_know_the_layout(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", b"{", {"query_id": "q0", "query": "no passages"}, ROW)
    assert detect_format(path) == "tdro"
    found, examples = bad_rows(path)
    assert [number for number, _ in found] == [1, 2] and examples == [EXAMPLE]


# ---- containers ----


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_containers_hold_the_same_rows_and_equal_bytes_for_equal_rows(tmp_path, name):
    examples = [Example(f"q{i}", f"query {i} é 語", EXAMPLE.positives, EXAMPLE.negatives) for i in range(3000)]
    for folder in ("one", "two"):
        assert write_examples(tmp_path / folder / name, examples) == 3000
    assert list(read_examples(tmp_path / "one" / name)) == examples
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert [path.name for path in (tmp_path / "one").iterdir()] == [name]


def test_parquet_rows_equal_json_rows(tmp_path):
    rows = [{**ROW, "query_id": f"q{i}"} for i in range(2500)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=700)
    assert detect_format(tmp_path / "a.parquet") == "tdro"
    assert list(read_examples(tmp_path / "a.parquet")) == list(read_examples(write_lines(tmp_path / "a.jsonl", *rows)))


def test_parquet_nulls_and_nan_are_absent(tmp_path):
    rows = [
        {"anchor": "q", "positive": "p", "negative_1": None, "score": float("nan"), "note": None},
        {"anchor": "r", "positive": "p", "negative_1": "n", "score": 2.0, "note": "x"},
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, second = read_examples(tmp_path / "a.parquet")
    assert (first.negatives, first.extra) == ((), {"score": None})
    assert (texts(second.negatives), second.extra) == (["n"], {"score": 2.0, "note": "x"})


def test_bad_parquet_rows_are_named_by_row(tmp_path):
    queries = pa.array([b"fine", b"\xff\xfe", b"", b"also fine"]).view(pa.string())
    parquet.write_table(pa.table({"query": queries, "answer": ["a"] * 4}), tmp_path / "a.parquet")
    found, examples = bad_rows(tmp_path / "a.parquet")
    assert found == [(2, "not UTF-8 at byte 0"), (3, "query is empty")]
    assert [example.query_id for example in examples] == ["row-1", "row-4"]


def test_several_gzip_members_are_read_to_the_end(tmp_path):
    lines = [gzip.compress(json.dumps({**ROW, "query_id": f"q{i}"}).encode() + b"\n") for i in range(3)]
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(lines))
    assert [example.query_id for example in read_examples(tmp_path / "a.jsonl.gz")] == ["q0", "q1", "q2"]


def test_long_lines_byte_order_mark_crlf_and_blank_lines(tmp_path):
    long = {**ROW, "query_id": "long", "query": "x" * 20_000_000}
    line = json.dumps(ROW).encode()
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + json.dumps(long).encode() + b"\n" + b"{\r\n")
    found, examples = bad_rows(path)
    assert [example.query_id for example in examples] == ["q1", "long"]
    assert [number for number, _ in found] == [5]


def test_unicode_line_separators_do_not_end_a_row(tmp_path):
    query = "a\u2028b\u0085c\x00d \U0001f600"
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({**ROW, "query": query}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [example.query for example in read_examples(path)] == [query]


# ---- files that cannot be used ----


def test_missing_empty_and_folder_are_told_apart(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "beir").mkdir()
    (tmp_path / "beir" / "corpus.jsonl").touch()
    for name, message in {"none.jsonl": "no such", "empty.jsonl": "is empty", "beir": "is a folder"}.items():
        with pytest.raises(TdroError, match=message) as error:
            list(read_examples(tmp_path / name))
        assert error.value.where == str(tmp_path / name) and error.value.remedy
    assert "BEIR" in error.value.remedy


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: data[:-4]])
def test_file_cut_short_is_an_error_even_where_bad_rows_are_skipped(tmp_path, name, damage):
    rng = np.random.default_rng(0)
    examples = [Example(f"q{i}", rng.bytes(40).hex(), EXAMPLE.positives, ()) for i in range(2000)]
    if name.endswith("parquet"):
        rows = [{"anchor": example.query, "positive": "p"} for example in examples]
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    else:
        write_examples(tmp_path / name, examples)
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(TdroError, match="cannot be read") as error:
        bad_rows(tmp_path / name)
    assert error.value.where == str(tmp_path / name) and "cut short" in error.value.remedy


def test_flipped_bytes_in_gzip_are_an_error(tmp_path):
    write_examples(tmp_path / "a.jsonl.gz", [Example(f"q{i}", f"query {i}", EXAMPLE.positives, ()) for i in range(999)])
    data = bytearray((tmp_path / "a.jsonl.gz").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    with pytest.raises(TdroError, match="cannot be read"):
        bad_rows(tmp_path / "a.jsonl.gz")


def test_name_that_promises_another_container_is_an_error(tmp_path):
    with pytest.raises(TdroError, match="not a gzip file"):
        list(read_examples(write_lines(tmp_path / "a.jsonl.gz", ROW)))


# ---- bad rows ----

P = ROW["positive_passages"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b'{"query": ', "not JSON: Expecting value at character 11"),
        (b"{'query': 1}", "not JSON"),
        (b'{"query_id": "x", "query": "a\xff"}', "not UTF-8 at byte 29"),
        (b'{"query_id": "x", "query": "\\ud800", "positive_passages": [{"text": "p"}]}', "surrogate"),
        (b'{"query_id": "x", "query": "q", "positive_passages": [{"text": "p"}], "score": NaN}', "NaN is not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"3", "a number"),
        (b'["q", "p"]', "not a JSON object but an array"),
        ({"query_id": "x", "positive_passages": P}, "no query: query is missing"),
        ({"query_id": "x", "query": "", "positive_passages": P}, "query is empty"),
        ({"query_id": "x", "query": " \t\u3000", "positive_passages": P}, "query is empty"),
        ({"query_id": "x", "query": 3, "positive_passages": P}, "query is a number, not text"),
        ({"query_id": "", "query": "q", "positive_passages": P}, "query_id is empty"),
        ({"query_id": True, "query": "q", "positive_passages": P}, "query_id is true or false"),
        ({"query_id": "x", "query": "q"}, "no positive: positive_passages is missing"),
        ({"query_id": "x", "query": "q", "positive_passages": []}, "no positive: positive_passages is empty"),
        ({"query_id": "x", "query": "q", "positive_passages": {}}, "positive_passages is an object, not an array"),
        ({"query_id": "x", "query": "q", "positive_passages": ["p"]}, "positive 1 is text, not an object"),
        (
            {"query_id": "x", "query": "q", "positive_passages": [*P, {"docid": "d", "title": "", "text": " "}]},
            "positive 2 is empty",
        ),
        ({"query_id": "x", "query": "q", "positive_passages": [{"text": 1}]}, "title or text of positive 1"),
        ({"query_id": "x", "query": "q", "positive_passages": [{"docid": [], "text": "p"}]}, "docid of positive 1"),
        (
            {"query_id": "x", "query": "q", "positive_passages": P, "negative_passages": [{"text": ""}]},
            "negative 1 is empty",
        ),
        (
            {"query_id": "x", "query": "q", "positive_passages": P, "negative_passages": "n"},
            "negative_passages is text, not an array",
        ),
        (ROW, "query_id 'q1' is already in line 1"),
    ],
)
def test_bad_row_is_named_by_line_and_reason(tmp_path, row, reason):
    path = write_lines(tmp_path / "a.jsonl", ROW, row, {**ROW, "query_id": "q3"})
    with pytest.raises(TdroError) as error:
        list(read_examples(path))
    assert reason in error.value.message and error.value.where == f"{path}:2"
    assert error.value.remedy == "fix the line or pass --skip-bad-rows"
    found, examples = bad_rows(path)
    assert [number for number, _ in found] == [2]
    assert [example.query_id for example in examples] == ["q1", "q3"]


@pytest.mark.parametrize(
    ("good", "bad", "reason"),
    [
        ({"query": "q", "pos": ["p"]}, {"query": "q", "pos": "p"}, "pos is text, not an array"),
        ({"query": "q", "pos": ["p"]}, {"query": "q", "neg": ["p"]}, "no positive: pos is missing"),
        ({"query": "q", "pos": ["p"]}, {"query": "q", "pos": ["p", ""]}, "positive 2 is empty"),
        ({"query": "q", "pos": ["p"]}, {"query": "q", "pos": ["p"], "neg": [1]}, "negative 1 is a number"),
        ({"query": "q", "answer": "p"}, {"query": "q"}, "no positive: answer is missing"),
        ({"query": "q", "answer": "p"}, {"query": "q", "answer": ["p"]}, "answer is an array"),
        ({"query": "q", "answer": "p"}, {"question": "q", "answer": "p"}, "no query: query is missing"),
        (["q", "p"], ["q"], "no positive"),
        (["q", "p"], {"query": "q"}, "an array of texts was expected"),
        (["q", "p"], [" ", "p"], "query is empty"),
    ],
)
def test_bad_rows_of_the_other_layouts(tmp_path, good, bad, reason):
    found, examples = bad_rows(write_lines(tmp_path / "a.jsonl", good, bad))
    assert [number for number, _ in found] == [2] and reason in found[0][1]
    assert len(examples) == 1


def test_repeated_query_id_is_found_across_chunks(tmp_path):
    rows = [{**ROW, "query_id": f"q{i % 5000}"} for i in range(5003)]
    found, examples = bad_rows(write_lines(tmp_path / "a.jsonl", *rows))
    assert found == [(5001 + i, f"query_id 'q{i}' is already in line {i + 1}") for i in range(3)]
    assert len(examples) == 5000


def test_bad_row_is_handed_over_as_it_was_read(tmp_path):
    seen = []
    path = write_lines(tmp_path / "a.jsonl", ROW, b'{"query": "caf\xc3\xa9\xff"\r')
    list(read_examples(path, on_bad_row=lambda number, reason, row: seen.append(row)))
    assert seen == ['{"query": "café\ufffd"']


# ---- writing ----

words = st.text(min_size=1, max_size=12).filter(str.strip)
extras = st.dictionaries(words.map(lambda key: f"x{key}"), st.none() | st.integers() | words, max_size=2)
passages = st.builds(Passage, words, st.text(max_size=6), words, extras)
examples = st.builds(
    Example,
    words,
    words,
    st.lists(passages, min_size=1, max_size=3).map(tuple),
    st.lists(passages, max_size=3).map(tuple),
    extras,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(examples, min_size=1, max_size=8, unique_by=lambda e: e.query_id), st.sampled_from(["", ".gz", ".zst"]))
def test_what_is_written_is_what_is_read(tmp_path_factory, rows, suffix):
    path = tmp_path_factory.mktemp("round") / f"a.jsonl{suffix}"
    assert write_examples(path, rows) == len(rows)
    assert list(read_examples(path)) == rows


def test_failed_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.jsonl"
    write_examples(path, [EXAMPLE])
    before = path.read_bytes()
    with pytest.raises(ValueError):
        write_examples(path, [EXAMPLE, Example("q2", "q", EXAMPLE.positives, (), {"score": float("nan")})])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_file_can_be_rewritten_from_itself(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    rows = [Example(f"q{i}", f"query {i}", EXAMPLE.positives, ()) for i in range(3000)]
    write_examples(path, rows)
    assert write_examples(path, read_examples(path)) == 3000
    assert list(read_examples(path)) == rows


def test_passage_text_is_title_space_text():
    assert passage_text(Passage("d", "Rust", "Iron.")) == "Rust Iron."
    assert passage_text(Passage("d", "", "Iron.")) == "Iron."
    assert passage_text(Passage("d", "Rust", "")) == "Rust"


# ---- what was seen ----


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(-20, 20), st.integers(-9, 9)), max_size=12), max_size=12))
def test_first_seen_agrees_with_a_dictionary(batches):
    seen, expected = FirstSeen(), {}
    for batch in batches:
        is_first, value = seen.note([key for key, _ in batch], [value for _, value in batch])
        new = [key not in expected and key not in [k for k, _ in batch[:i]] for i, (key, _) in enumerate(batch)]
        for key, first_value in batch:
            expected.setdefault(key, first_value)
        assert is_first.tolist() == new
        assert value.tolist() == [expected[key] for key, _ in batch]
        assert len(seen) == len(expected)


# ---- real data ----


@pytest.mark.skipif(not (REAL / "train").is_dir(), reason="no real data: set TDRO_REAL_DATA")
def test_real_file_survives_a_round_trip(tmp_path):
    path = REAL / "train" / "bgb_de.jsonl.gz"
    rows = list(read_examples(path))
    assert (len(rows), detect_format(path)) == (2197, "tdro")
    write_examples(tmp_path / "a.jsonl.gz", rows)
    with gzip.open(path) as old, gzip.open(tmp_path / "a.jsonl.gz") as new:
        assert [json.loads(line) for line in old] == [json.loads(line) for line in new]
