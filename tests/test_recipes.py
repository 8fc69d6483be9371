"""The shipped recipes: every one is valid, with files that this machine lacks made as placeholders."""

import gzip
import json
import re
from pathlib import Path

import pytest
import yaml

from tdro_cli import recipe as recipes
from tdro_cli.errors import TdroError
from tdro_cli.learn.transfer import read_weights, sampling_plan
from tdro_cli.recipe import Transfer
from tdro_cli.report import reference
from tdro_cli.run.plan import make_plans

ROOT = Path(__file__).parents[1]
PAPER = ROOT.parent / "shared" / "paper"
NAMES = sorted(recipes.shipped())
PAPER_NAMES = [name for name in NAMES if name.startswith("paper/")]
ROW = b'{"query": "q", "pos": ["p"], "neg": ["n"]}\n'

needs_paper = pytest.mark.skipif(not PAPER.is_dir(), reason="needs ../shared/paper, the published numbers")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty working directory; the variables that recipes name point into it."""
    monkeypatch.chdir(tmp_path)
    for path in (ROOT / "recipes").rglob("*.yaml"):
        for name in re.findall(r"\$\{(\w+)", path.read_text(encoding="utf-8")):
            monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("TDRO_PAPER_WEIGHTS", str(tmp_path / "weights.json"))
    return tmp_path


def load(path):
    """The recipe in `path`, after every file it misses has been made with one row. Nothing else may be at fault."""
    try:
        return recipes.load(path)
    except TdroError as error:
        for problem in error.problems():
            missing = re.fullmatch(r"there is no file (.+)", problem["message"])
            assert missing, problem
            Path(missing[1]).parent.mkdir(parents=True, exist_ok=True)
            Path(missing[1]).write_bytes(gzip.compress(ROW) if missing[1].endswith(".gz") else ROW)
    return recipes.load(path)


def test_the_quickstart_and_the_papers_recipes_are_shipped():
    assert {"quickstart", "paper/learn-weights"} <= set(NAMES)
    assert len(PAPER_NAMES) == 7  # six backbones and the weights


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_is_valid_and_says_what_it_is(name, elsewhere):
    loaded = load(ROOT / "recipes" / f"{name}.yaml")
    assert len(loaded.recipe.tasks) >= 2
    assert len(recipes.shipped()[name]) > 20 and loaded.text.startswith("# ")


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_stands_alone_and_means_the_same(name, elsewhere):
    recipes.copy_shipped(name, elsewhere / "copy" / "recipe.yaml")
    copied = load("copy/recipe.yaml")
    assert copied.recipe == load(ROOT / "recipes" / f"{name}.yaml").recipe
    assert all(place.startswith("copy/recipe.yaml") for place in copied.places.values())


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "tasks").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_task_list_is_valid(path, elsewhere):
    Path("recipe.yaml").write_text(f"tasks: {path}\n")
    assert len(load("recipe.yaml").recipe.tasks) >= 2


@pytest.mark.parametrize("name", PAPER_NAMES)
def test_a_recipe_of_the_paper_has_its_settings(name, elsewhere):
    recipe = load(ROOT / "recipes" / f"{name}.yaml").recipe
    assert (recipe.seed, recipe.encoder.query_length, recipe.encoder.passage_length) == (42, 128, 512)
    assert (recipe.encoder.temperature, recipe.encoder.pooling, recipe.encoder.normalize) == (0.002, "last_token", True)
    sections = [recipe.train_ref, recipe.learn_weights if name == "paper/learn-weights" else recipe.finetune]
    for section in sections:
        assert (section.steps, section.batch.queries, section.optimizer.learning_rate) == (1000, 2048, 1e-4)
        assert (section.schedule.warmup_steps, section.schedule.min_ratio) == (100, 0.1)
    assert recipe.train_ref.hold_out == 0
    if name == "paper/learn-weights":
        assert recipe.backbone.source == "Qwen/Qwen1.5-0.5B"
        assert recipe.learn_weights.batch.passages_per_query == 8
    else:
        assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.dropout) == (8, 32, 0.1)
        assert recipe.finetune.batch == recipe.train_ref.batch  # the baseline differs in its tasks' shares alone
        assert recipe.finetune.optimizer == recipe.train_ref.optimizer


def test_the_papers_models_are_all_there(elsewhere):
    sources = {load(ROOT / "recipes" / f"{name}.yaml").recipe.backbone.source.split("/")[1] for name in PAPER_NAMES}
    qwen = {f"Qwen1.5-{size}" for size in ("0.5B", "1.8B", "4B", "7B")}
    assert sources == {*qwen, "Mistral-7B-v0.1", "Meta-Llama-3-8B"}


@pytest.mark.parametrize("name", [name for name in PAPER_NAMES if name != "paper/learn-weights"])
def test_a_backbone_of_the_paper_takes_both_ways_to_use_the_weights(name, elsewhere):
    path = ROOT / "recipes" / f"{name}.yaml"
    names = [task.name for task in load(path).recipe.tasks]
    Path("weights.json").write_text(json.dumps({"domain_weights": dict.fromkeys(names, 1 / 25)}))
    folders = {}
    for strategy in ("reweight", "top_percent"):
        loaded = recipes.load(path, [f"transfer.strategy={strategy}"])
        assert loaded.recipe.transfer.strategy.name == strategy
        plans = make_plans(loaded, Path("runs"), needed=["finetune"])
        folders[strategy] = {stage: plan.folder for stage, plan in plans.items()}
    assert all(folders["reweight"][stage] != folders["top_percent"][stage] for stage in ("transfer", "finetune"))


def test_weights_of_one_recipe_serve_another_with_a_larger_backbone(elsewhere):
    names = [task.name for task in load(ROOT / "recipes" / "paper" / "learn-weights.yaml").recipe.tasks]
    Path("weights.json").write_text(json.dumps({"domain_weights": dict.fromkeys(names, 1 / 25)}))
    plans = make_plans(load(ROOT / "recipes" / "paper" / "mistral-7b.yaml"), Path("runs"), needed=["finetune"])
    assert list(plans) == ["transfer", "finetune"]


@needs_paper
def test_the_papers_tasks_have_the_releases_names_and_the_papers_sizes():
    text = (ROOT / "recipes" / "tasks" / "paper25.yaml").read_text()
    names = [task["name"] for task in yaml.safe_load(text)]
    published = json.loads((PAPER / "published_weights.json").read_text())
    assert names == list(published["curr"]["domain_ids"])
    sizes = [int(size.replace(",", "")) for size in re.findall(r"^# ([\d,]+) rows", text, re.MULTILINE)]
    assert sizes == [task["size"] for task in json.loads((PAPER / "table2_tasks.json").read_text())["tasks"]]


@needs_paper
def test_the_published_weights_select_the_published_tasks(tmp_path):
    published = json.loads((PAPER / "published_weights.json").read_text())
    (tmp_path / "weights.json").write_text(json.dumps(published["curr"]))
    sizes = dict.fromkeys(read_weights(tmp_path / "weights.json"), 1000)
    section = Transfer(strategy={"name": "top_percent", "options": {"percent": 70}})
    chosen = list(sampling_plan(section, str(tmp_path / "weights.json"), sizes, 2_048_000)["tasks"])
    assert len(chosen) == 17 and chosen == published["top"]["70"]["order"]


@pytest.fixture(scope="module")
def page():
    return reference.page()


def test_the_reference_page_is_not_stale(page):
    assert (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8") == page, "run `make docs`"


def test_every_key_has_a_meaning_on_the_reference_page(page):
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    assert not [row for row in rows if not row.rstrip("| ").split(" | ")[-1].strip() or row.endswith("|  |")]
