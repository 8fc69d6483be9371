from __future__ import annotations

import json

import pytest

from tdro_cli.errors import TdroError
from tdro_cli.learn.transfer import read_weights, sampling_plan
from tdro_cli.recipe import PluginChoice, Transfer

OURS = {
    "schema": 1,
    "steps": 10,
    "tasks": {
        "a": {"weight": 0.7, "mean": 0.6, "ema": 0.5, "size": 10, "queries_seen": 5},
        "b": {"weight": 0.2, "mean": 0.3, "ema": 0.3, "size": 20, "queries_seen": 5},
        "c": {"weight": 0.1, "mean": 0.1, "ema": 0.2, "size": 70, "queries_seen": 5},
    },
}
SIZES = {"a": 10, "b": 20, "c": 70}


@pytest.fixture
def weights_file(tmp_path):
    path = tmp_path / "weights.json"
    path.write_text(json.dumps(OURS))
    return path


def section(name: str, *, weights: str = "final", **options) -> Transfer:
    return Transfer(strategy=PluginChoice(name=name, options=options), weights=weights)


def test_final_mean_and_moving_average_are_read_by_name(weights_file):
    assert read_weights(weights_file) == {"a": 0.7, "b": 0.2, "c": 0.1}
    assert read_weights(weights_file, "mean")["b"] == 0.3
    assert read_weights(weights_file, "ema")["c"] == 0.2


def test_a_weights_file_of_the_authors_is_read(tmp_path):
    path = tmp_path / "tdro_weights.json"
    path.write_text(json.dumps({"domain_weights": {"a": 0.75, "b": 0.25}}))
    assert read_weights(path) == {"a": 0.75, "b": 0.25}


@pytest.mark.parametrize("content", ["", "[1]", '{"tasks": {"a": 3}}', '{"tasks": {"a": {"mean": 1}}}', '{"x": 1}'])
def test_another_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(TdroError) as refused:
        read_weights(path)
    assert refused.value.where == str(path) and refused.value.remedy


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(TdroError, match="can't read weights"):
        read_weights(tmp_path / "none.json")


@pytest.mark.parametrize("weight", ["-0.1", "NaN", "1e400", "1" + "0" * 400, "true", '"0.5"', "null", "[1]"])
def test_a_weight_that_is_no_number_from_0_on_names_file_and_task(tmp_path, weight):
    path = tmp_path / "weights.json"
    path.write_text(f'{{"domain_weights": {{"a": 0.5, "b": {weight}}}}}')
    with pytest.raises(TdroError, match="the weight of 'b' is ") as refused:
        read_weights(path)
    assert refused.value.where == str(path) and len(refused.value.message) < 120


@pytest.mark.parametrize(
    "weights, words", [("{}", "there are no weights"), ('{"a": 0, "b": 0.0}', "all weights are 0")]
)
def test_weights_of_which_none_counts_are_refused(tmp_path, weights, words):
    path = tmp_path / "weights.json"
    path.write_text(f'{{"domain_weights": {weights}}}')
    with pytest.raises(TdroError, match=words) as refused:
        read_weights(path)
    assert refused.value.where == str(path)


def test_reweight_gives_draws_and_real_epochs(weights_file):
    plan = sampling_plan(section("reweight"), str(weights_file), SIZES, draws=200)
    assert plan["tasks"]["a"] == {"weight": 0.7, "probability": 0.7, "size": 10, "draws": 140.0, "epochs": 14.0}
    assert plan["tasks"]["c"]["epochs"] == pytest.approx(20 / 70)
    assert (plan["schema"], plan["strategy"], plan["weights"], plan["data_used"]) == (1, "reweight", "final", 1.0)
    assert "loss_weights" not in plan


def test_tasks_left_out_are_absent_and_the_used_share_of_the_data_is_told(weights_file):
    plan = sampling_plan(section("top_k", k=2), str(weights_file), SIZES, draws=100)
    assert {name: task["probability"] for name, task in plan["tasks"].items()} == {"a": 0.5, "b": 0.5}
    assert plan["data_used"] == pytest.approx(0.3)


def test_scaled_losses_leave_sampling_uniform(weights_file):
    plan = sampling_plan(section("loss_reweight"), str(weights_file), SIZES, draws=90)
    assert [task["probability"] for task in plan["tasks"].values()] == pytest.approx([1 / 3] * 3)
    factors = plan["loss_weights"]
    assert factors["a"] / factors["b"] == pytest.approx(3.5)


def test_a_strategy_without_weights_reads_no_file():
    plan = sampling_plan(section("proportional"), None, SIZES, draws=100)
    assert plan["tasks"]["c"]["probability"] == pytest.approx(0.7)
    assert plan["weights"] is None and plan["tasks"]["c"]["weight"] is None


def test_a_task_without_weight_is_refused_with_the_nearest_name(weights_file):
    with pytest.raises(TdroError, match="no weight for the task 'aa' and 1 others") as refused:
        sampling_plan(section("reweight"), str(weights_file), {"a": 1, "aa": 2, "zz": 3}, draws=10)
    assert "'a'" in refused.value.remedy


def test_options_that_leave_no_task_are_refused_as_the_users(weights_file):
    with pytest.raises(TdroError) as refused:
        sampling_plan(section("threshold", at_least=0.99), str(weights_file), SIZES, draws=10)
    assert refused.value.where.startswith("transfer.strategy")
