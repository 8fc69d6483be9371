import gzip
import json
import shutil
from pathlib import Path

import pytest

from tdro_cli import registry
from tdro_cli.builtin.benchmarks import BEIR, BEIR_SETS, MIRACL, MIRACL_LANGUAGES, MKQA, MKQA_LANGUAGES, Folder
from tdro_cli.data.formats import Passage, passage_text
from tdro_cli.errors import Problems, TdroError
from tdro_cli.protocols import Benchmark

FIXTURES = Path(__file__).parents[1] / "fixtures" / "benchmarks"


def places(error):
    return [problem["where"] for problem in error.value.problems()]


@pytest.fixture
def collection(tmp_path):
    """A copy of a good collection, to be spoilt."""
    return Path(shutil.copytree(FIXTURES / "folder" / "plain", tmp_path / "plain"))


@pytest.mark.parametrize("name, options", [("folder", {}), ("beir", {}), ("miracl", {}), ("mkqa", {})])
def test_every_benchmark_is_installed_and_keeps_the_protocol(name, options):
    benchmark = registry.resolve("benchmarks", name, {"path": str(FIXTURES), **options})
    assert isinstance(benchmark, Benchmark)
    assert list(benchmark.measures)


# ---- folder ----


def test_a_folder_of_folders_has_a_subset_each():
    assert Folder(str(FIXTURES / "folder")).subsets() == ["plain", "zipped"]
    assert Folder(str(FIXTURES / "folder")).missing_files() == []


def test_a_single_collection_is_its_own_subset():
    assert Folder(str(FIXTURES / "folder/plain")).subsets() == ["plain"]
    named = Folder(str(FIXTURES / "folder/plain"), name="roads")
    assert named.load("roads").name == "roads"


def test_a_name_goes_before_the_subsets():
    assert Folder(str(FIXTURES / "folder"), name="roads").load("plain").name == "roads/plain"


@pytest.mark.parametrize("subset", ["plain", "zipped"])  # BEIR's judgements and TREC's
def test_folder_reads_documents_queries_and_judgements(subset):
    loaded = Folder(str(FIXTURES / "folder")).load(subset)
    assert loaded.qrels == {"q1": {"d1": 2, "d3": 1, "d2": 0}, "q2": {"q2": 1}}
    assert [query.id for query in loaded.queries] == ["q1", "q2"]  # q3 has no judgements
    documents = {text.id: text.text for text in loaded.corpus()}
    assert list(documents) == ["d1", "d2", "d3", "q2"]
    assert documents["d1"] == passage_text(Passage("d1", "Bridges", "A bridge carries a road over a river."))
    assert documents["d2"] == "A tunnel leads a road through a hill."
    assert len(list(loaded.corpus())) == 4  # a second time


def test_same_ids_are_kept_unless_asked():
    path = str(FIXTURES / "folder/plain")
    assert Folder(path).load("plain").drop_same_id is False
    assert Folder(path, drop_same_id=True).load("plain").drop_same_id is True


def test_missing_files_are_named_all_together(tmp_path):
    (tmp_path / "corpus.jsonl").write_text('{"_id": "1", "text": "x"}\n')
    with pytest.raises(Problems) as error:
        Folder(str(tmp_path)).load(tmp_path.name)
    assert places(error) == [str(tmp_path / "queries.jsonl"), str(tmp_path / "qrels" / "test.tsv")]


def test_a_missing_split_names_those_that_are_there():
    (problem,) = Folder(str(FIXTURES / "folder/plain"), split="dev").missing_files()
    assert "the splits here are test" in str(problem)


def test_a_folder_that_is_not_there_is_missing(tmp_path):
    assert len(Folder(str(tmp_path / "no")).missing_files()) == 3


def test_unknown_subset_names_the_nearest():
    with pytest.raises(TdroError, match="no subset 'plian'") as error:
        Folder(str(FIXTURES / "folder")).load("plian")
    assert "did you mean 'plain'" in error.value.remedy


def test_bad_lines_of_a_query_file_come_together_with_their_lines(collection):
    with open(collection / "queries.jsonl", "a") as file:
        file.write('{"_id": "q4"}\n\nnot json\n{"_id": "q1", "text": "again"}\n{"_id": "q5", "text": " "}\n[1]\n')
    with pytest.raises(Problems) as error:
        Folder(str(collection)).load("plain")
    path = collection / "queries.jsonl"
    assert places(error) == [f"{path}:{line}" for line in (4, 6, 7, 8, 9)]
    assert [p["message"].split(": ")[1].split(" (")[0] for p in error.value.problems()] == [
        "no 'text'",
        "not JSON",
        "the query id 'q1' is given twice",
        "the query 'q5' is empty",
        "a JSON object is expected, not list",
    ]


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"title": "no id", "text": "x"}', "no '_id'"),
        ('{"_id": "d9"}', "no 'text'"),
        ('{"_id": "d 9", "text": "x"}', "white space"),
        ('{"_id": "d9", "text": 3}', "'text' is not text"),
        ('{"_id": "d9", "text": "x"', "not JSON"),
    ],
)
def test_a_bad_document_is_named_when_the_corpus_is_read(collection, line, reason):
    with open(collection / "corpus.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(TdroError, match=reason) as error:
        list(Folder(str(collection)).load("plain").corpus())
    assert error.value.where == f"{collection / 'corpus.jsonl'}:5"


def test_numbers_as_ids_and_null_titles_are_taken(collection):
    (collection / "corpus.jsonl").write_text('{"_id": 7, "title": null, "text": "x"}\n')
    assert list(Folder(str(collection)).load("plain").corpus()) == [("7", "x")]


def test_a_line_separator_inside_a_text_ends_no_line(collection):
    line = json.dumps({"_id": "d9", "title": "", "text": "one\u2028two\x85three"}, ensure_ascii=False)
    (collection / "corpus.jsonl").write_text(line + "\r\n", encoding="utf-8", newline="")
    assert [text.text for text in Folder(str(collection)).load("plain").corpus()] == ["one\u2028two\x85three"]


def test_a_broken_gzip_file_is_named(collection):
    whole = gzip.compress((collection / "corpus.jsonl").read_bytes() * 50)
    (collection / "corpus.jsonl").unlink()
    (collection / "corpus.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(TdroError, match="cannot be read: Truncated compressed stream"):
        list(Folder(str(collection)).load("plain").corpus())


@pytest.mark.parametrize(
    "line, reason", [("q1\td1", "3 columns"), ("q1\td1\thigh", "'high' is not a whole number"), ("a b c d e", "5")]
)
def test_a_bad_judgement_is_named(collection, line, reason):
    with open(collection / "qrels/test.tsv", "a") as file:
        file.write(line + "\n")
    with pytest.raises(TdroError, match=reason) as error:
        Folder(str(collection)).load("plain")
    assert error.value.where.endswith("test.tsv:6")


def test_judgements_of_unknown_queries_are_refused(collection):
    with open(collection / "qrels/test.tsv", "a") as file:
        file.write("q9\td1\t1\n")
    with pytest.raises(TdroError, match="judged queries that the query file lacks: 'q9'"):
        Folder(str(collection)).load("plain")


# ---- BEIR ----


def test_beir_is_fifteen_sets_with_twelve_forums():
    subsets = BEIR(str(FIXTURES / "beir")).subsets()
    assert len(BEIR_SETS) == 15
    assert len(subsets) == 14 + 12
    assert sum(subset.startswith("cqadupstack/") for subset in subsets) == 12


def test_beir_reads_ms_marco_on_dev_and_drops_same_ids_of_arguana():
    benchmark = BEIR(str(FIXTURES / "beir"), sets=("arguana", "msmarco", "cqadupstack"))
    assert benchmark.missing_files() == []
    assert benchmark.load("msmarco").provenance["split"] == "dev"
    assert benchmark.load("msmarco").drop_same_id is False
    assert benchmark.load("arguana").drop_same_id is True
    forum = benchmark.load("cqadupstack/tex")
    assert forum.name == "beir/cqadupstack/tex"
    assert [text.id for text in forum.corpus()] == ["tex1", "tex2"]


def test_beir_says_how_to_get_what_is_missing():
    missing = BEIR(str(FIXTURES / "beir"), sets=("nq",)).missing_files()
    assert len(missing) == 3
    assert "nq.zip" in missing[0].remedy


def test_beir_refuses_a_set_that_is_not_there():
    with pytest.raises(TdroError, match="did you mean 'nfcorpus'"):
        registry.resolve("benchmarks", "beir", {"path": "x", "sets": ["nfcorps"]})


# ---- MIRACL ----


def test_miracl_reads_topics_judgements_and_shards_in_number_order():
    benchmark = MIRACL(str(FIXTURES / "miracl"), languages=("sw",))
    assert benchmark.missing_files() == []
    loaded = benchmark.load("sw")
    assert loaded.name == "miracl/sw"
    assert loaded.queries == [("12", "Mto mrefu zaidi ni upi?"), ("13", "Mlima Kilimanjaro uko wapi?")]
    assert loaded.qrels == {"12": {"7#0": 1, "7#1": 0}, "13": {"8#0": 1}}
    documents = list(loaded.corpus())
    assert [text.id for text in documents] == ["7#0", "7#1", "8#0", "9#0"]
    assert documents[0].text == "Nile Nile ni mto mrefu."


def test_miracl_finds_files_in_folders_named_as_the_repositories(tmp_path):
    for name in ("miracl-v1.0-sw", "miracl-corpus-v1.0-sw"):
        shutil.copytree(FIXTURES / "miracl" / name, tmp_path / name.removesuffix("-v1.0-sw") / name)
    assert MIRACL(str(tmp_path), languages=("sw",)).missing_files() == []
    assert len(list(MIRACL(str(tmp_path), languages=("sw",)).load("sw").corpus())) == 4


def test_miracl_is_eighteen_languages_and_names_what_is_missing():
    benchmark = MIRACL(str(FIXTURES / "miracl"))
    assert len(benchmark.subsets()) == len(set(MIRACL_LANGUAGES)) == 18
    # topics and judgements of 17 languages, and their corpora: 222 files of half a million passages, less one
    assert len(benchmark.missing_files()) == len(benchmark.sources()) == 17 * 2 + 221
    with pytest.raises(Problems) as error:
        benchmark.load("yo")
    assert places(error)[0].endswith("miracl-v1.0-yo/topics/topics.miracl-v1.0-yo-dev.tsv")


# ---- MKQA ----


@pytest.mark.parametrize("language, first", [("th", "ใครเขียนเหยื่ออธรรม"), ("zh_cn", "悲惨世界是谁写的")])
def test_mkqa_asks_in_a_language_and_answers_in_english(language, first):
    loaded = MKQA(str(FIXTURES / "mkqa"), languages=(language,)).load(language)
    assert loaded.name == f"mkqa/{language}"
    assert [query.id for query in loaded.queries] == ["-101", "102", "105"]  # not those without an answer string
    assert loaded.queries[0].text == first
    assert loaded.answers["-101"] == ("Victor Hugo", "Hugo", "V. Hugo")
    assert loaded.answers["102"] == ("Yamoussoukro", "Abidjan")
    assert [text.id for text in loaded.corpus()] == ["doc0", "doc1", "doc2", "doc3"]


def test_mkqa_can_count_the_questions_that_no_string_answers():
    loaded = MKQA(str(FIXTURES / "mkqa"), questions="all").load("th")
    assert len(loaded.queries) == 6
    assert loaded.answers["103"] == loaded.answers["104"] == loaded.answers["106"] == ()


def test_mkqa_reads_the_passages_of_dpr():
    texts = list(MKQA(str(FIXTURES / "mkqa_dpr")).load("zh_cn").corpus())
    assert texts[0] == ("1", 'Les Misérables A novel by "Victor Hugo", published in 1862.')
    assert texts[1].text.startswith("Eiffel Tower ")


def test_mkqa_is_twenty_five_languages_and_names_what_is_missing(tmp_path):
    assert len(set(MKQA_LANGUAGES)) == len(MKQA(str(tmp_path)).subsets()) == 25
    assert len(MKQA(str(tmp_path)).missing_files()) == 2


def test_mkqa_names_a_question_that_lacks_the_language():
    with pytest.raises(Problems) as error:
        MKQA(str(FIXTURES / "mkqa"), languages=("fi",)).load("fi")
    assert places(error)[0].endswith("mkqa.jsonl.gz:1")
