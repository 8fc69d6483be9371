import gzip
import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdro_cli import registry
from tdro_cli.data.formats import read_examples
from tdro_cli.data.tasks import open_task
from tdro_cli.errors import RunFailed
from tdro_cli.protocols import Ranking
from tdro_cli.recipe import Mine
from tdro_cli.retrieve.mining import Candidate, draw, generator_of, judge, mine_tasks, score_limit, text_key
from tdro_cli.run.progress import Silent

REAL = Path(os.environ.get("TDRO_REAL_DATA", Path(__file__).parents[3] / "shared/data"))


# ---- the rules ----


def verdict(ranking, *, texts=None, positives=("p",), refused=(), refused_texts=(), window=(1, 100), margin=None):
    """`ranking`: "p:9 a:8" is docid and score, best first. A text is its docid, unless `texts` says otherwise."""
    found = [item.split(":") for item in ranking.split()]
    docids, scores = [docid for docid, _ in found], [float(score) for _, score in found]
    keys = {docid: text_key((texts or {}).get(docid, docid)) for docid in docids}
    return judge(
        Ranking("q", docids, scores),
        positives=set(positives),
        refused=set(refused),
        refused_texts={text_key(text) for text in refused_texts},
        text_key=keys,
        window=window,
        margin=margin,
    )


def ids(verdict):
    return "".join(candidate.docid for candidate in verdict.candidates)


def test_positives_and_given_negatives_are_no_candidates():
    assert ids(verdict("a:9 p:8 b:7 c:6", refused=["b"])) == "ac"


def test_window_counts_ranks_from_one_with_the_positives_in():
    result = verdict("p:9 a:8 b:7 c:6 d:5", window=(3, 4))
    assert [(c.docid, c.rank, c.score) for c in result.candidates] == [("b", 3, 7.0), ("c", 4, 6.0)]


def test_margin_drops_what_scores_above_that_share_of_the_positive():
    result = verdict("a:12 p:10 b:9.6 c:9.5 d:9", margin=0.95)
    assert ids(result) == "cd"
    assert (result.dropped_by_margin, result.above_positive, result.positive_rank) == (2, 1, 2)


def test_margin_is_measured_on_the_best_positive():
    assert ids(verdict("p:10 a:9 r:5 b:4", positives=["p", "r"], margin=0.95)) == "ab"


def test_margin_of_one_drops_only_what_beats_the_positive():
    assert ids(verdict("a:11 p:10 b:10 c:9", margin=1.0)) == "bc"


def test_candidates_stay_where_the_positive_was_not_found():
    result = verdict("a:9 b:8", margin=0.5)
    assert ids(result) == "ab"
    assert (result.positive_rank, result.above_positive) == (None, 0)


def test_limit_of_a_negative_score_is_below_it():
    assert score_limit(10.0, 0.9) == pytest.approx(9.0)
    assert score_limit(-10.0, 0.9) == pytest.approx(-11.0)


@given(st.floats(-1e3, 1e3), st.floats(0.01, 2), st.floats(0.01, 2))
def test_smaller_margin_is_never_a_higher_limit(score, one, other):
    low, high = sorted((one, other))
    assert score_limit(score, low) <= score_limit(score, high)


def test_equal_texts_are_no_candidates_and_each_text_is_one_once():
    texts = {"a": "The  SAME", "b": "new", "c": "New ", "d": "ＮＥＷ", "e": "other"}
    result = verdict("p:9 a:8 b:7 c:6 d:5 e:4", texts=texts, refused_texts=["the same"])
    assert ids(result) == "be"
    assert result.dropped_as_equal_text == 3


def candidates(n):
    return [Candidate(f"d{i}", i + 1, float(n - i)) for i in range(n)]


def test_top_takes_the_first_and_uniform_draws_from_all():
    assert [c.rank for c in draw(candidates(9), 3, "top", random.Random(0))] == [1, 2, 3]
    drawn = [c.rank for i in range(3000) for c in draw(candidates(9), 3, "uniform", random.Random(i))]
    assert all(abs(drawn.count(rank) - 1000) < 120 for rank in range(1, 10))  # 1000 each expected, sd 26


@given(st.integers(0, 30), st.integers(1, 30), st.sampled_from(["top", "uniform"]), st.integers(0, 99))
def test_draw_gives_distinct_candidates_best_first_as_many_as_there_are(n, count, sampling, seed):
    ranks = [c.rank for c in draw(candidates(n), count, sampling, random.Random(seed))]
    assert ranks == sorted(set(ranks))
    assert len(ranks) == min(n, count)


def test_random_numbers_depend_on_seed_task_and_query_alone():
    numbers = [generator_of(*key).random() for key in ((1, "t", "q"), (2, "t", "q"), (1, "u", "q"), (1, "t", "r"))]
    assert len(set(numbers)) == 4
    assert generator_of(1, "t", "q").random() == numbers[0]


# ---- whole tasks, through miners that are found as a stranger's would be ----


@dataclass(frozen=True)
class ByLength:
    """Ranks every passage by how near its length is to the query's: enough to know the ranking by heart."""

    def mine(self, queries, corpus, *, depth: int) -> Iterator[Ranking]:
        texts = list(corpus)
        for query in queries:
            ranked = sorted(texts, key=lambda text: (abs(len(text.text) - len(query.text)), text.id))[:depth]
            yield Ranking(query.id, [t.id for t in ranked], [-abs(len(t.text) - len(query.text)) for t in ranked])


@dataclass(frozen=True)
class Astray:
    """Does what `fault` says."""

    fault: str

    def mine(self, queries, corpus, *, depth: int) -> Iterator[Ranking]:
        for query in queries:
            if self.fault == "stops":
                return
            docids = ["stranger"] if self.fault == "stranger" else []
            yield Ranking(
                "other" if self.fault == "shifted" else query.id,
                docids,
                [1.0] * (len(docids) + (self.fault == "scores")),
            )


@pytest.fixture(autouse=True)
def installed(monkeypatch, tmp_path):
    """A distribution with the two miners of this file, on the path."""
    package = tmp_path / "site"
    info = package / "tdro_test_miners-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tdro-test-miners\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[tdro.negative_miners]\nby_length = tdro_test_miners:ByLength\nastray = tdro_test_miners:Astray\n"
    )
    import sys
    import types

    module = types.ModuleType("tdro_test_miners")
    module.ByLength, module.Astray = ByLength, Astray
    monkeypatch.setitem(sys.modules, "tdro_test_miners", module)
    monkeypatch.syspath_prepend(str(package))
    registry.installed.cache_clear()
    yield
    registry.installed.cache_clear()


def row(number, query, positives, negatives=(), **extra):
    passages = {
        key: [{"docid": docid, "title": "", "text": text} for docid, text in texts]
        for key, texts in (("positive_passages", positives), ("negative_passages", negatives))
    }
    return {"query_id": f"q{number}", "query": query, **passages, **extra}


def task(tmp_path, rows, name="t"):
    path = tmp_path / f"{name}-{len(list(tmp_path.glob('*.jsonl')))}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_task(name, path, cache=tmp_path / "cache")


def mined(tmp_path, stores, *, seed=1, progress=None, miner="by_length", **settings):
    """(audit, {task: [examples]}) of a run."""
    folder = tmp_path / f"out-{len(list(tmp_path.glob('out-*')))}"
    settings = {"rank_window": [1, 100], "keep": 2, "positive_margin": None, "sampling": "top", **settings}
    section = Mine(negative_miner=miner, **settings)
    progress = progress or Silent()
    audit = mine_tasks(stores, section, prompts={}, seed=seed, folder=folder, progress=progress)
    assert json.loads((folder / "audit.json").read_text()) == audit
    assert sorted(path.name for path in folder.iterdir()) == ["audit.json", "tasks"]
    return audit, {store.name: list(read_examples(folder / f"tasks/{store.name}.jsonl.gz")) for store in stores}


ROWS = [
    row(1, "a", [("d1", "x")], answers=["yy"], source="kept"),
    row(2, "bb", [("d2", "yy")], [("d5", "vvvvv")]),
    row(3, "ccc", [("d3", "zzz"), ("d4", "wwww")]),
]


def test_every_row_keeps_its_order_and_fields_and_gets_the_nearest_passages(tmp_path):
    _, examples = mined(tmp_path, [task(tmp_path, ROWS)])
    found = {e.query_id: [p.docid for p in e.negatives] for e in examples["t"]}
    assert found == {"q1": ["d2", "d3"], "q2": ["d5", "d1"], "q3": ["d2", "d1"]}
    assert examples["t"][0].extra == {"answers": ["yy"], "source": "kept"}
    assert [p.docid for p in examples["t"][2].positives] == ["d3", "d4"]


def test_mined_negatives_say_score_rank_and_miner_and_given_ones_stay_as_they_are(tmp_path):
    _, examples = mined(tmp_path, [task(tmp_path, ROWS)])
    given, found = examples["t"][1].negatives
    assert dict(given.extra) == {}
    assert dict(found.extra) == {"score": -1, "rank": 2, "miner": "by_length"}


def test_given_negatives_can_be_replaced(tmp_path):
    _, examples = mined(tmp_path, [task(tmp_path, ROWS)], existing="replace")
    assert [p.docid for p in examples["t"][1].negatives] == ["d1", "d3"]


def test_positive_of_another_row_with_the_same_query_is_never_chosen(tmp_path):
    rows = [row(1, "Who?", [("d1", "four")]), row(2, "who? ", [("d2", "five")]), row(3, "x", [("d3", "sixsix")])]
    _, examples = mined(tmp_path, [task(tmp_path, rows)], keep=5)
    assert [[p.docid for p in e.negatives] for e in examples["t"]] == [["d3"], ["d3"], ["d1", "d2"]]


def test_text_of_a_positive_or_of_the_query_is_never_chosen_under_another_docid(tmp_path):
    rows = [
        row(1, "query", [("d1", "four")], []),
        row(2, "x", [("d2", "FOUR ")]),
        row(3, "y", [("d3", "Query"), ("d4", "z")]),
    ]
    audit, examples = mined(tmp_path, [task(tmp_path, rows)], keep=5)
    assert [p.docid for p in examples["t"][0].negatives] == ["d4"]
    assert audit["tasks"]["t"]["dropped_as_equal_text"] >= 2


def test_too_few_candidates_are_stated_and_warned_of(tmp_path):
    progress = Silent()
    audit, _ = mined(tmp_path, [task(tmp_path, ROWS)], keep=4, progress=progress)
    counts = audit["tasks"]["t"]
    assert (counts["rows"], counts["rows_with_fewer"], counts["rows_with_none"]) == (3, 1, 0)
    assert progress.warnings == ["task t: 1 of 3 rows have fewer than 4 negatives, 0 of them none"]


def test_padding_is_random_and_called_so(tmp_path):
    audit, examples = mined(tmp_path, [task(tmp_path, ROWS)], keep=3, rank_window=[5, 5], pad=True)
    for example in examples["t"]:
        assert len(example.negatives) == 3
        assert len({p.docid for p in (*example.positives, *example.negatives)}) == 3 + len(example.positives)
    assert {p.extra.get("miner") for p in examples["t"][2].negatives} == {"random", "by_length"}
    assert audit["tasks"]["t"]["padded"] == 6


def test_task_that_needs_nothing_is_copied_and_its_miner_not_even_opened(tmp_path):
    full = task(tmp_path, [ROWS[1]])
    audit, examples = mined(tmp_path, [full], keep=1, miner={"name": "astray", "options": {"fault": "stops"}})
    assert examples["t"] == list(full)
    assert audit["tasks"]["t"]["copied"] is True


def test_margin_counts_what_it_drops(tmp_path):
    rows = [row(1, "aaaa", [("d1", "12")]), row(2, "b", [("d2", "1234")]), row(3, "b2", [("d3", "12345678901")])]
    audit, examples = mined(tmp_path, [task(tmp_path, rows)], positive_margin=1.0)
    # q1: d2 (difference 0) beats its positive (2); q2: d1 (1) beats its positive (3); q3: both beat its positive (9)
    assert [[p.docid for p in e.negatives] for e in examples["t"]] == [["d3"], ["d3"], []]
    counts = audit["tasks"]["t"]
    assert (counts["candidates_above_positive"], counts["dropped_by_margin"], counts["rows_with_none"]) == (4, 4, 1)
    assert counts["share_positive_first"] == 0.0
    assert counts["positive_ranks"] == {"2": 2, "3-5": 1}


def test_answer_inside_a_negative_is_counted(tmp_path):
    audit, _ = mined(tmp_path, [task(tmp_path, ROWS)])
    assert (audit["tasks"]["t"]["rows_with_answers"], audit["tasks"]["t"]["negatives_with_answer"]) == (1, 1)


def long_rows(count):
    rng = random.Random(7)
    return [
        row(i, "x" * rng.randint(1, 40), [(f"d{i:03}", f"{i:03}" + "y" * rng.randint(1, 40))]) for i in range(count)
    ]


@pytest.mark.parametrize("pad", [False, True])
def test_order_of_rows_and_other_tasks_do_not_matter(tmp_path, pad):
    rows = long_rows(60)
    settings = {"sampling": "uniform", "keep": 9, "rank_window": [2, 9], "pad": pad}
    audit, straight = mined(tmp_path, [task(tmp_path, rows)], **settings)
    other = task(tmp_path, ROWS, name="u")
    shuffled_audit, shuffled = mined(tmp_path, [other, task(tmp_path, rows[::-1])], **settings)
    assert shuffled["t"][::-1] == straight["t"]
    assert shuffled_audit["tasks"]["t"] == audit["tasks"]["t"]


def test_seed_changes_the_draw_and_equal_seeds_give_equal_bytes(tmp_path):
    store = task(tmp_path, long_rows(60))
    settings = {"sampling": "uniform", "keep": 3, "rank_window": [1, 50]}
    first, second, other = (mined(tmp_path, [store], seed=seed, **settings)[1]["t"] for seed in (1, 1, 2))
    assert first == second != other
    files = [(tmp_path / f"out-{i}/tasks/t.jsonl.gz").read_bytes() for i in range(2)]
    assert files[0] == files[1]


def test_ten_examples_to_read(tmp_path):
    audit, _ = mined(tmp_path, [task(tmp_path, long_rows(30))])
    shown = audit["tasks"]["t"]["examples"]
    assert len(shown) == 10
    assert all(len(example["negatives"]) == 2 and example["positive"] for example in shown)


@pytest.mark.parametrize(
    "fault, words",
    [
        ("stops", "gave nothing where query 'q1' was due"),
        ("shifted", "gave a ranking for 'other' where query 'q1' was due"),
        ("stranger", "found 'stranger' for query 'q1', which is not in the corpus"),
        ("scores", "0 passages and 1 scores for 'q1'"),
    ],
)
def test_miner_that_goes_astray_is_named_and_nothing_is_left(tmp_path, fault, words):
    with pytest.raises(RunFailed, match=words) as caught:
        mined(tmp_path, [task(tmp_path, ROWS)], miner={"name": "astray", "options": {"fault": fault}})
    assert "'astray'" in str(caught.value)
    assert list((tmp_path / "out-0/tasks").iterdir()) == []


@pytest.mark.skipif(not (REAL / "train").is_dir(), reason="needs the real data: ../shared/data or TDRO_REAL_DATA")
def test_bm25_on_a_real_task_finds_most_positives_first(tmp_path):
    store = open_task("pubmedqa_en", REAL / "train/pubmedqa_en.jsonl.gz", cache=tmp_path / "cache")
    audit, examples = mined(tmp_path, [store], miner="bm25", keep=7, rank_window=[2, 100], positive_margin=0.95)
    counts = audit["tasks"]["pubmedqa_en"]
    assert counts["analyzer"] == "en"
    assert counts["share_positive_first"] > 0.95
    assert counts["rows_with_fewer"] < 10
    assert [e.query_id for e in examples["pubmedqa_en"]] == [e.query_id for e in store]
    with gzip.open(tmp_path / "out-0/tasks/pubmedqa_en.jsonl.gz", "rt") as file:
        assert set(json.loads(next(file))["negative_passages"][0]) == {
            "docid",
            "title",
            "text",
            "score",
            "rank",
            "miner",
        }
