import json
from pathlib import Path

import pytest

from tdro_cli import recipe as recipes
from tdro_cli.errors import Problems, TdroError
from tdro_cli.run.plan import STAGES, Plan, data_stage, make_plans

RECIPE = """\
name: roads
tasks:
  - {name: bridges, path: data/bridges.jsonl, prompt: find the bridge}
  - {name: tunnels, path: data/tunnels.jsonl}
backbone: {name: scratch}
dedup: {against: [{name: folder, options: {path: test}}]}
mine:
lora: {r: 4}
eval: {benchmarks: [{name: folder, options: {path: test}}]}
"""
TRAINED = {"train-ref", "learn-weights", "finetune"}


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("bridges", "tunnels"):
        write_task(Path("data") / f"{name}.jsonl", [name])
    write_collection(Path("test"))
    return tmp_path


def write_task(path, words):
    path.parent.mkdir(exist_ok=True)
    rows = [{"query_id": w, "query": f"query {w}", "pos": [f"positive {w}"], "neg": [f"negative {w}"]} for w in words]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_collection(folder):
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text('{"_id": "d", "title": "", "text": "document"}\n')
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "query"}\n')
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")


def plans(*overrides, needed=STAGES, text=RECIPE, runs="runs"):
    Path("recipe.yaml").write_text(text)
    return make_plans(recipes.load("recipe.yaml", overrides), Path(runs), needed=needed)


def digests(*overrides, **options):
    return {stage: plan.digest for stage, plan in plans(*overrides, **options).items()}


def moved(*overrides, **options):
    """The stages whose digest the overrides change."""
    before, after = digests(), digests(*overrides, **options)
    return {stage for stage in before.keys() | after.keys() if before.get(stage) != after.get(stage)}


AFTER_TRAIN_REF = {"train-ref", "learn-weights", "transfer", "finetune", "eval"}


@pytest.mark.parametrize(
    "override, stages",
    [
        ("mine.keep=3", set(STAGES)),
        ("dedup.within=task", set(STAGES) - {"mine"}),
        ("backbone.options.layers=3", {"backbone", *AFTER_TRAIN_REF}),
        ("encoder.temperature=0.1", AFTER_TRAIN_REF),
        ("lora.r=8", AFTER_TRAIN_REF),
        ("tasks.bridges.prompt=other", None),
        ("train_ref.steps=7", AFTER_TRAIN_REF),
        ("learn_weights.steps=7", {"learn-weights", "transfer", "finetune", "eval"}),
        ("learn_weights.weight_updater.options.learning_rate=0.5", {"learn-weights", "transfer", "finetune", "eval"}),
        ("transfer.strategy.options.max_epochs=4", {"transfer", "finetune", "eval"}),
        ("transfer.weights=mean", {"transfer", "finetune", "eval"}),
        ("finetune.optimizer.learning_rate=1e-3", {"finetune", "eval"}),
        ("eval.depth=200", {"eval"}),
        ("deepspeed.zero_stage=2", AFTER_TRAIN_REF),
    ],
)
def test_a_key_changes_the_digest_of_its_stage_and_of_those_after_it(override, stages):
    changed = moved(override)
    if stages is None:  # mining uses prompts or not: the models do in any case
        assert changed >= AFTER_TRAIN_REF
    else:
        assert changed == stages


@pytest.mark.parametrize(
    "override",
    [
        "backbone.activation_checkpointing=true",
        "encoder.micro_batch_tokens=99",
        "encoder.activation_tokens=99",
        "train_ref.checkpoint.every_steps=3",
        "learn_weights.checkpoint.every_steps=3",
        "finetune.checkpoint.keep_last=3",
        "name=other",
    ],
)
def test_what_says_only_how_and_where_to_run_changes_no_digest(override):
    assert moved(override) == set()


def test_neither_the_runs_folder_nor_the_recipes_file_nor_the_order_of_its_keys_changes_a_digest():
    lines = RECIPE.splitlines()
    text = "\n".join(["# a comment", *lines[4:], *lines[:4]])
    assert digests(text=text, runs="elsewhere") == digests()


def test_a_training_file_counts_by_its_rows_and_not_by_its_name():
    before = digests()
    Path("data/bridges.jsonl").rename("data/renamed.jsonl")
    assert digests(text=RECIPE.replace("data/bridges", "data/renamed")) == before
    write_task(Path("data/renamed.jsonl"), ["bridges", "another"])
    after = digests(text=RECIPE.replace("data/bridges", "data/renamed"))
    assert all(after[stage] != before[stage] for stage in before)


def test_a_changed_weights_file_changes_what_follows_from_it():
    for weight in (0.5, 0.25):
        Path("weights.json").write_text(json.dumps({"domain_weights": {"bridges": weight, "tunnels": 1 - weight}}))
        found = digests("transfer.weights_from=weights.json", needed=["finetune"])
        assert "learn-weights" not in found
        if weight == 0.5:
            before = found
    assert {stage for stage in found if found[stage] != before[stage]} == {"transfer", "finetune"}


def test_a_changed_test_collection_changes_deduplication():
    before = digests()
    write_collection(Path("test/more"))
    after = digests()
    assert {stage for stage in before if before[stage] != after[stage]} == set(STAGES) - {"mine"}


# ---- which stages ----


def test_all_stages_come_in_order_and_read_the_one_before():
    found = plans()
    assert tuple(found) == STAGES
    assert data_stage(recipes.load("recipe.yaml")) == "dedup"
    assert set(found["train-ref"].inputs) == {"dedup", "backbone"}
    assert set(found["learn-weights"].inputs) == {"dedup", "backbone", "train-ref"}
    assert set(found["eval"].inputs) == {"train-ref", "finetune"}
    assert found["mine"].tasks["bridges"] == "data/bridges.jsonl"
    assert found["dedup"].tasks["bridges"] == str(found["mine"].out / "tasks" / "bridges.jsonl.gz")
    assert found["finetune"].tasks["bridges"] == str(found["dedup"].out / "tasks" / "bridges.jsonl.gz")


@pytest.mark.parametrize(
    "overrides, needed, expected",
    [
        (["mine=null", "dedup=null"], ["transfer"], ["backbone", "train-ref", "learn-weights", "transfer"]),
        (["mine=null", "dedup=null", "transfer.strategy=uniform"], ["transfer"], ["transfer"]),
        (["mine=null", "dedup=null", "transfer.strategy=uniform"], ["finetune"], ["backbone", "transfer", "finetune"]),
        (["dedup=null"], ["dedup", "mine"], ["mine"]),
        (["mine=null", "dedup=null", "eval.models=[bm25]", "eval.compare_to=null"], ["eval"], ["eval"]),
    ],
)
def test_only_what_a_stage_needs_is_planned(overrides, needed, expected):
    assert list(plans(*overrides, needed=needed)) == expected


def test_a_stage_that_the_recipe_lacks_is_told():
    with pytest.raises(TdroError, match="no section 'mine'"):
        plans("mine=null", needed=["mine"])
    with pytest.raises(TdroError, match="names no backbone"):
        plans("backbone=null", needed=["finetune"])


def test_faults_of_all_training_files_come_together():
    for name in ("bridges", "tunnels"):
        Path(f"data/{name}.jsonl").write_text('{"query": "", "pos": ["p"]}\n')
    with pytest.raises(Problems) as caught:
        plans()
    assert sorted(p["where"].split(":")[0] for p in caught.value.problems()) == [
        "data/bridges.jsonl",
        "data/tunnels.jsonl",
    ]


def test_a_plan_is_read_as_it_was_saved():
    for plan in plans().values():
        again = Plan.read(plan.save())
        assert again == plan
        assert again.settings() == recipes.load("recipe.yaml").recipe
    assert list(Path("runs/roads").glob("*/out")) == []  # planning makes no output
