import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdro_cli.data import sample
from tdro_cli.errors import TdroError

SOURCE = '''
import math

class RingBuffer:
    """Holds the newest items of a stream in the order of their arrival."""

    @property
    def full(self): return True

    def push(self, item, *, limit=3):
        """Add an item and forget the oldest one.

        The oldest item is forgotten once the buffer holds as many items as `limit` says,
        so that memory stays bounded for ever.

        Parameters
        ----------
        item : object
            What is to be kept for the time being in the buffer.
        limit : int, optional
            How many items the buffer may hold at the same time.
        """
        if limit < 1:
            raise ValueError(f"the limit must be positive, got {limit} instead")
        self.items = [*self.items, item][-limit:]

if True:
    def scale(values, factor=2.0):
        """Multiply every value of a sequence by a factor.

        Args:
            values (`list`): The numbers which are going to be
                scaled by this function.
            factor: What every one of the numbers is multiplied with.

        >>> import math
        >>> scale([1.0, 2.0], factor=3.0)
        [3.0, 6.0]
        """
        return [value * factor for value in values]

def silent(x):
    return x
'''


@pytest.fixture
def definitions(tmp_path):
    path = tmp_path / "ring.py"
    path.write_text(SOURCE)
    return {found.qualname: found for found in sample.read_definitions("python", "ring", path)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The sample of everything installed: the one slow step here, some 15 seconds."""
    folder = tmp_path_factory.mktemp("sample") / "made"
    return folder, sample.write_sample(folder)


def rows(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def module_of(docid: str) -> str:
    return docid.partition(":")[0]


def test_a_file_yields_what_is_documented_or_raises_and_nothing_else(definitions):
    assert list(definitions) == ["RingBuffer", "RingBuffer.push", "scale"]


def test_code_keeps_identifiers_and_loses_the_docstring(definitions):
    assert definitions["scale"].code == (
        "def scale(values, factor=2.0):\n    return [value * factor for value in values]"
    )


def test_summary_to_code(definitions):
    (pair,) = sample.summary_to_code(definitions["scale"])
    assert pair.query == "Multiply every value of a sequence by a factor."
    assert (pair.docid, pair.title) == ("ring:scale", "ring scale")


def test_an_error_message_is_taken_out_of_the_code_that_raises_it(definitions):
    (pair,) = sample.error_to_function(definitions["RingBuffer.push"])
    assert pair.query == "ValueError: the limit must be positive, got limit instead"
    assert pair.text == (
        "def push(self, item, *, limit=3):\n"
        "    if limit < 1:\n"
        "        raise ValueError(...)\n"
        "    self.items = [*self.items, item][-limit:]"
    )


def test_parameters_are_read_in_the_manner_of_numpy_and_of_google(definitions):
    assert sample.parameters(definitions["RingBuffer.push"].docstring) == [
        ("item", "object. What is to be kept for the time being in the buffer."),
        ("limit", "int, optional. How many items the buffer may hold at the same time."),
    ]
    assert sample.parameters(definitions["scale"].docstring) == [
        ("values", "list. The numbers which are going to be scaled by this function."),
        ("factor", "What every one of the numbers is multiplied with."),
    ]


def test_the_description_ends_where_the_sections_begin(definitions):
    text = sample.description(definitions["RingBuffer.push"].docstring)
    assert text.startswith("The oldest item") and text.endswith("stays bounded for ever.")


def test_an_example_is_its_statements_without_imports_and_output(definitions):
    assert sample.example_code(definitions["scale"].docstring) == "scale([1.0, 2.0], factor=3.0)"


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("Compute the norm.", "How do I compute the norm?"),
        ("Returns a list of names", "How do I return a list of names?"),
        ("Fetches nothing at all", ""),
        ("A queue of jobs.", "What is a queue of jobs?"),
    ],
)
def test_an_instruction_or_a_thing_becomes_a_question(text, asked):
    assert sample.question(text) == asked


def test_markup_becomes_words():
    assert (
        sample.plain("See :class:`~torch.Tensor` or\n``axis`` in [`Trainer`].")
        == "See torch.Tensor or axis in Trainer."
    )


def test_names_are_split_into_words():
    assert sample.split_words("BaseEventLoop._run_once") == "base event loop run once"
    assert sample.split_words("HTTPServer") == "http server"


@given(st.text(), st.integers(min_value=1, max_value=50))
def test_cap_keeps_a_beginning_within_the_limit(text, characters):
    kept = sample.cap(text, characters)
    assert text.startswith(kept) and len(kept) <= characters


def test_sources_are_read_in_one_order_whatever_the_file_system_says(monkeypatch):
    usual = sample.source_files("peft")
    listed = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda path, pattern: reversed(list(listed(path, pattern))))
    assert sample.source_files("peft") == usual


def test_a_missing_package_is_named():
    with pytest.raises(TdroError, match="'no_such_package' is not installed"):
        sample.package_folder("no_such_package")


def test_the_same_bytes_under_another_hash_seed(tmp_path, monkeypatch):
    packages = ("numpy", "peft")
    monkeypatch.setattr(sample, "PACKAGES", packages)
    files = sample.write_sample(tmp_path / "here")["files"]
    script = (
        "import sys; from pathlib import Path; from tdro_cli.data import sample; "
        f"sample.PACKAGES = {packages!r}; sample.write_sample(Path(sys.argv[1]))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "there")], check=True, env=environment, timeout=120)
    assert {name: (tmp_path / "there" / name).read_bytes() for name in files} == {
        name: (tmp_path / "here" / name).read_bytes() for name in files
    }


def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(TdroError, match="is not empty and holds no sample"):
        sample.write_sample(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_sample_of_other_versions_and_a_damaged_one_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "PACKAGES", ("pyarrow",))
    folder = tmp_path / "made"
    first = sample.write_sample(folder)
    assert sample.write_sample(folder) == first
    with monkeypatch.context() as patch:
        patch.setattr(sample, "REVISION", sample.REVISION + 1)
        with pytest.raises(TdroError, match="made from other versions") as refusal:
            sample.write_sample(folder)
        assert f"sample_revision {sample.REVISION - 1} there, {sample.REVISION} here" in str(refusal.value)
    (folder / "tasks" / "class_docstring.jsonl.gz").write_bytes(b"")
    with pytest.raises(TdroError, match=r"missing or changed: tasks/class_docstring\.jsonl\.gz"):
        sample.write_sample(folder)


def test_a_missing_package_leaves_nothing_written(tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "PACKAGES", ("pyarrow", "no_such_package"))
    with pytest.raises(TdroError):
        sample.write_sample(tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TdroError, match="cannot replace the current folder"):
        sample.write_sample(Path("."))


def test_the_sample_has_the_promised_size(whole):
    _, made = whole
    sizes = sorted(made["tasks"].values())
    assert len(sizes) >= 6 and 12_000 <= sum(sizes) <= 20_000
    assert sizes[0] <= 500 and sizes[-1] >= 8 * sizes[0]
    assert len(made["collections"]) == 2
    for collection in made["collections"].values():
        assert 300 <= collection["queries"] <= 500 and 1500 <= collection["documents"] <= 3000


def test_every_task_has_a_prompt_and_every_collection_too(whole):
    _, made = whole
    assert made["tasks"].keys() == sample.TASK_PROMPTS.keys() and all(sample.TASK_PROMPTS.values())
    assert made["collections"].keys() == sample.COLLECTION_PROMPTS.keys() and all(sample.COLLECTION_PROMPTS.values())


@pytest.mark.parametrize("task", sample.TASKS)
def test_training_rows_are_whole_and_distinct(whole, task):
    folder, made = whole
    found = rows(folder / "tasks" / f"{task}.jsonl.gz")
    assert len(found) == made["tasks"][task]
    assert max(Counter(row["query"] for row in found).values()) == 1
    assert max(Counter(row["query_id"] for row in found).values()) == 1
    texts = {}
    for row in found:
        (positive,) = row["positive_passages"]
        assert row.keys() == {"query_id", "query", "positive_passages", "negative_passages"}
        assert row["query"].strip() and positive["text"].strip() and row["negative_passages"] == []
        assert row["query"] not in (positive["text"], f"{positive['title']} {positive['text']}")
        assert len(positive["text"]) <= sample.PASSAGE_CHARACTERS
        assert texts.setdefault(positive["docid"], (positive["title"], positive["text"])) == (
            positive["title"],
            positive["text"],
        )


def test_no_module_is_both_trained_on_and_tested_on(whole):
    folder, made = whole
    trained = {
        module_of(row["positive_passages"][0]["docid"])
        for task in made["tasks"]
        for row in rows(folder / "tasks" / f"{task}.jsonl.gz")
    }
    tested = {
        module_of(document["_id"])
        for name in made["collections"]
        for document in rows(folder / "collections" / name / "corpus.jsonl.gz")
    }
    held_out = set(json.loads((folder / "provenance.json").read_text())["held_out_modules"])
    assert len(trained) > 1000 and len(tested) > 100
    assert not trained & held_out and tested <= held_out


@pytest.mark.parametrize("name", sample.COLLECTIONS)
def test_collections_judge_every_query_by_documents_that_exist(whole, name):
    folder = whole[0] / "collections" / name
    documents = {document["_id"]: document for document in rows(folder / "corpus.jsonl.gz")}
    queries = {query["_id"]: query["text"] for query in rows(folder / "queries.jsonl.gz")}
    header, *judged = (folder / "qrels" / "test.tsv").read_text().splitlines()
    pairs = [line.split("\t") for line in judged]
    assert header == "query-id\tcorpus-id\tscore"
    assert {query for query, _, _ in pairs} == queries.keys() and all(queries.values())
    assert {document for _, document, _ in pairs} <= documents.keys()
    assert {score for _, _, score in pairs} == {"1"}
    assert all(document["text"].strip() for document in documents.values())


@pytest.mark.parametrize("name", sample.COLLECTIONS)
def test_queries_share_words_with_their_documents_but_not_all(whole, name):
    folder = whole[0] / "collections" / name
    documents = {document["_id"]: document for document in rows(folder / "corpus.jsonl.gz")}
    queries = {query["_id"]: query["text"] for query in rows(folder / "queries.jsonl.gz")}
    shares = []
    for line in (folder / "qrels" / "test.tsv").read_text().splitlines()[1:]:
        query, document, _ = line.split("\t")
        asked = set(sample.split_words(queries[query]).split())
        said = set(sample.split_words(f"{documents[document]['title']} {documents[document]['text']}").split())
        shares.append(len(asked & said) / len(asked))
    assert 0.3 < sum(shares) / len(shares) < 0.8


def test_some_training_queries_are_test_queries_and_are_counted(whole):
    folder, made = whole
    trained = {row["query"] for task in made["tasks"] for row in rows(folder / "tasks" / f"{task}.jsonl.gz")}
    facts = json.loads((folder / "provenance.json").read_text())
    for name, collection in facts["collections"].items():
        asked = {query["text"] for query in rows(folder / "collections" / name / "queries.jsonl.gz")}
        assert len(asked & trained) == collection["queries_that_are_training_queries"]
    assert facts["collections"]["code_search"]["queries_that_are_training_queries"] > 0


def test_provenance_names_versions_and_licences_and_no_place(whole):
    folder, _ = whole
    text = (folder / "provenance.json").read_text()
    facts = json.loads(text)
    assert facts["made_from"]["packages"].keys() == facts["licences"].keys() == set(sample.PACKAGES)
    assert all(facts["made_from"]["packages"].values()) and all(facts["licences"].values())
    assert str(Path.home()) not in text and sys.prefix not in text


def test_a_second_call_finds_the_sample_and_starts_at_once(whole, monkeypatch):
    folder, made = whole
    monkeypatch.setattr(sample, "read_definitions", lambda *_: pytest.fail("sources were read again"))
    assert sample.write_sample(folder) == made
