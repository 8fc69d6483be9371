import json
import runpy
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tdro_cli.data.batching import BatchPlan, batch_at
from tdro_cli.data.collation import NO_TEXT, TrainingTask, collate, text_id
from tdro_cli.data.tasks import open_task
from tdro_cli.data.tokenization import TextTokenizer
from tdro_cli.model.contract import EncoderContract

tiny_tokenizer = cache(runpy.run_path(str(Path(__file__).parents[1] / "model" / "conftest.py"))["tiny_tokenizer"])


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer(tiny_tokenizer("qwen2"), EncoderContract(query_length=64, passage_length=64))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Two tasks of six rows: row i of `plain` has i negatives; rows of `alike` have two positives and a prompt."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = {
        "plain": [
            {"query": f"plain {i}", "pos": [f"good {i}"], "neg": [f"bad {i}.{n}" for n in range(i)]} for i in range(6)
        ],
        "alike": [{"query": f"alike {i}", "pos": [f"same {i}", "shared"], "neg": [f"other {i}"]} for i in range(6)],
    }
    found = []
    for name, examples in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
        store = open_task(name, folder / f"{name}.jsonl", cache=folder / "cache")
        symmetric = name == "alike"
        prompt = "Find what is alike" if symmetric else "Find it"
        found.append(TrainingTask(name, store, np.arange(6), prompt, symmetric, True))
    return found


def plan(queries=12, **options):
    return BatchPlan(3, queries, (6, 6), (0.5, 0.5), composition="mixed", **options)


def collated(tasks, tokenizer, step=0, part=slice(None), wanted=3, plan=plan()):
    return collate(plan, batch_at(plan, step), part, tasks, tokenizer, hard_negatives=wanted)


def words(tokenizer, tokens):
    return tokenizer.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def plain(token_lists):
    return [tokens.tolist() for tokens in token_lists]


def test_a_query_stands_with_its_positive_first_and_at_most_the_wanted_negatives(tasks, tokenizer):
    batch = collated(tasks, tokenizer)
    assert batch.first_B.tolist() == [0, *np.cumsum(batch.count_B)[:-1]]
    assert len(batch.passages) == batch.count_B.sum() == len(batch.passage_id_M) == len(batch.owner_M())
    for b, query in enumerate(batch.queries):
        task, row = tasks[batch.task_B[b]], int(batch.row_B[b])
        own = [
            words(tokenizer, tokens)
            for tokens, owner in zip(batch.passages, batch.owner_M(), strict=True)
            if owner == b
        ]
        asked = words(tokenizer, query)
        assert asked.startswith(f"Instruct: {task.prompt}") and asked.endswith(f"Query: {task.name} {row}")
        if task.name == "plain":
            assert own[0] == f"good {row}" and len(own) == 1 + min(row, 3)
            assert set(own[1:]) <= {f"bad {row}.{n}" for n in range(row)} and len(set(own)) == len(own)
        else:  # both sides are prompted
            assert all(text.startswith(f"Instruct: {task.prompt}") for text in own)
            assert own[0].endswith(("shared", f"same {row}")) and own[1].endswith(f"other {row}")


def test_text_ids_are_equal_exactly_where_texts_are(tasks, tokenizer):
    batch = collated(tasks, tokenizer)
    assert len(set(batch.query_id_B)) == 12
    assert batch.query_id_B[0] == text_id(f"{tasks[batch.task_B[0]].name} {batch.row_B[0]}")
    for b in range(12):
        row, known = int(batch.row_B[b]), batch.positive_ids_BP[b]
        if batch.task_B[b] == 0:
            assert known.tolist() == [text_id(f"good {row}"), NO_TEXT]
        else:
            assert known.tolist() == [text_id(f"same {row}"), text_id("shared")]
        assert batch.passage_id_M[batch.first_B[b]] in known


def test_the_parts_of_any_number_of_ranks_make_up_the_batch(tasks, tokenizer):
    whole = collated(tasks, tokenizer)
    for world in (2, 3, 5):
        parts = [collated(tasks, tokenizer, part=batch_at(plan(), 0).shard(rank, world)) for rank in range(world)]
        for side in ("queries", "passages"):
            assert plain(tokens for part in parts for tokens in getattr(part, side)) == plain(getattr(whole, side))
        for name in ("task_B", "row_B", "query_id_B", "passage_id_M", "count_B"):
            assert np.concatenate([getattr(part, name) for part in parts]).tolist() == getattr(whole, name).tolist()


def test_rows_of_the_batch_are_mapped_to_those_of_the_file(tasks, tokenizer):
    some = [TrainingTask("plain", tasks[0].store, np.array([5, 2]), "", False, True)]
    few = BatchPlan(3, 4, (2,), (1.0,), composition="mixed")
    batch = collated(some, tokenizer, plan=few)
    assert sorted(batch.row_B) == [2, 2, 5, 5]
    assert {words(tokenizer, query) for query in batch.queries} == {"plain 5", "plain 2"}  # no prompt, no template


def test_negatives_are_cycled_over_the_epochs(tasks, tokenizer):
    seen = []
    for step in range(4):  # a step is an epoch of both tasks
        batch = collated(tasks, tokenizer, step, wanted=2)
        (b,) = np.flatnonzero((batch.task_B == 0) & (batch.row_B == 4))
        seen.append(set(batch.passage_id_M[batch.first_B[b] + 1 : batch.first_B[b] + batch.count_B[b]]))
    assert seen[0].isdisjoint(seen[1]) and seen[0] | seen[1] == {text_id(f"bad 4.{n}") for n in range(4)}
    assert seen[2] == seen[0] and seen[3] == seen[1]


def test_without_wanted_negatives_there_are_only_positives(tasks, tokenizer):
    batch = collated(tasks, tokenizer, wanted=0)
    assert batch.count_B.tolist() == [1] * 12


def test_a_text_id_is_positive_and_the_same_everywhere():
    assert text_id("") == text_id("") >= 0
    assert text_id("ab") != text_id("a b")
    assert text_id("\ud800") >= 0  # half a surrogate pair, as JSON can hold
    # BLAKE2b of "abc" with a digest of 8 bytes is d8bb14d833d59559
    assert text_id("abc") == 0xD8BB14D833D59559 >> 1
