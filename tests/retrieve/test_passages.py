import random
import tracemalloc

import pytest

from tdro_cli.data.formats import Passage
from tdro_cli.protocols import Text
from tdro_cli.retrieve.passages import Corpus, PassageStore, text_key


def passages(*names):
    return [Passage(name, "", f"text of {name}") for name in names]


def test_a_passage_is_found_by_docid_and_by_place(tmp_path):
    store = PassageStore.write(tmp_path / "s", [Passage("é\t1", "Title", "line\nline"), *passages("b", "c")])
    assert len(store) == 3
    place, absent = store.places(["é\t1", "nowhere"]).tolist()
    assert absent == -1
    assert store.passage(place) == Passage("é\t1", "Title", "line\nline")
    assert store[place] == Text("é\t1", "Title line\nline")
    assert store.docid(place) == "é\t1"
    assert sorted(store.docid(i) for i in range(3)) == ["b", "c", "é\t1"]


@pytest.mark.parametrize("text", ["\0\t\n\r\u2028", "قهوه\u200cخانه", "e\u0301 \ud800 🜁", "x" * 1_000_000, " "])
def test_any_text_comes_back_as_it_was(tmp_path, text):
    given = [Passage(text, "", text), Passage("a", text, text), Passage("b", text, "")]
    store = PassageStore.write(tmp_path / "s", given)
    assert [store.passage(place) for place in store.places([text, "a", "b"])] == given
    assert {store.docid(place) for place in range(3)} == {text, "a", "b"}


def test_the_order_is_that_of_the_docids_not_of_the_file(tmp_path):
    names = [f"p{i}" for i in range(200)]
    stores = []
    for folder in ("one", "other"):
        random.Random(folder).shuffle(names)
        stores.append(PassageStore.write(tmp_path / folder, passages(*names)))
    assert list(stores[0]) == list(stores[1])
    assert stores[0].keys.tolist() == stores[1].keys.tolist()


def test_of_passages_with_one_docid_the_first_stays(tmp_path):
    store = PassageStore.write(tmp_path / "s", [Passage("a", "", "first"), Passage("a", "", "second")])
    assert list(store) == [("a", "first")]


def test_an_empty_store_finds_nothing(tmp_path):
    store = PassageStore.write(tmp_path / "s", [])
    assert list(store) == [] and store.places(["a"]).tolist() == [-1]
    assert Corpus([store]).places(["a"]).tolist() == [-1] and len(Corpus([])) == 0


def test_a_corpus_is_its_stores_one_after_the_other(tmp_path):
    one, other = (PassageStore.write(tmp_path / name, passages(*name)) for name in ("abc", "xy"))
    corpus = Corpus([one, other])
    assert list(corpus) == [*one, *other] == corpus[:] == [corpus[i] for i in range(5)]
    place_x, place_b, absent = corpus.places(["x", "b", "q"]).tolist()
    assert (corpus.docid(place_x), corpus.passage(place_b).text, absent) == ("x", "text of b", -1)
    assert corpus.keys([place_x, place_b]) == [text_key("text of x"), text_key("Text  of b")]


def test_memory_does_not_grow_with_the_texts(tmp_path):
    def written(count):
        tracemalloc.start()
        store = PassageStore.write(tmp_path / str(count), (Passage(str(i), "", f"{i} " * 200) for i in range(count)))
        for i in range(0, count, 50):
            store.passage(i)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    small, large = written(500), written(2_500)
    assert large - small < 2_000 * 150  # a passage of about 1,000 characters costs at most 150 bytes
