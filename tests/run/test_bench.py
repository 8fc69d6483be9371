"""`tdro bench` on the tiny recipe: the stages themselves run."""

from __future__ import annotations

import json

import pytest
import torch

from tdro_cli import artifacts
from tdro_cli import recipe as recipes
from tdro_cli.learn.training import backbone_source, load_encoder
from tdro_cli.run.bench import PARTS, ModelShape, _devices, passes, texts_of_steps
from tdro_cli.run.launch import Machines


def test_a_forward_pass_is_counted_by_hand():
    shape = ModelShape(weights=100, layers=2, attention_width=8, causal=True)
    assert shape.forward_flops(10) == 2 * 100 * 10 + 4 * 2 * 8 * 10 * 10 / 2
    assert ModelShape(100, 2, 8, causal=False).forward_flops(10) == 2 * 100 * 10 + 4 * 2 * 8 * 10 * 10


def test_bench_says_where_the_time_of_a_step_goes_and_leaves_no_run_behind(tiny_recipe, tdro, tmp_path):
    runs = tmp_path / "benched"
    code, out, err = tdro("bench", str(tiny_recipe), "--steps", "2", "--json", "--runs", str(runs))
    assert code == 0, err
    found = json.loads(out)
    assert [stage["stage"] for stage in found["stages"]] == ["learn-weights", "finetune"]
    for stage in found["stages"]:
        assert stage["steps"] == 2 and stage["tokens_per_second"] > 0
        assert sum(stage["shares"].values()) == pytest.approx(1)
        assert all(stage["shares"][part] >= 0 for part in PARTS) and stage["shares"]["backward"] > 0
        assert 0 < stage["model_flop_utilisation"] < 1
        assert stage["projected_hours"] == pytest.approx(stage["seconds_per_step"] * stage["recipe_steps"] / 3600)
    assert found["stages"][0]["shares"]["reference"] > 0 == found["stages"][1]["shares"]["reference"]
    assert [path.name for path in runs.iterdir()] == [".cache"]


def test_the_tokens_counted_are_those_that_the_run_computes(experiment):
    sections = ("transfer.strategy=uniform", "finetune.rows=all", "finetune.steps=4")
    computed = artifacts.read_json(experiment.run(*sections) / "training.json")["tokens"]
    plan = experiment.plans(*sections)["finetune"]
    _, tokenizer = load_encoder(plan.settings(), backbone_source(plan))
    counted = [sum(map(sum, texts_of_steps(plan, tokenizer, once=once))) for once in (True, False)]
    assert counted[0] == computed < counted[1]  # some passages come again in a batch


def test_the_reference_counts_only_where_it_is_needed(tiny_recipe):
    def of(*sections):
        recipe = recipes.load(tiny_recipe, sections).recipe
        return passes(recipe, "learn-weights"), passes(recipe, "finetune")

    assert of() == (4, 3)
    assert of("learn_weights.loss_measurement=absolute") == (3, 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU here")
def test_ranks_share_a_processor():
    assert _devices(Machines(num_gpus=4)) == 1


def test_an_unknown_stage_is_told(tiny_recipe, tdro):
    code, _, err = tdro("bench", str(tiny_recipe), "--stage", "fine-tune")
    assert code == 2 and "did you mean 'finetune'" in err
