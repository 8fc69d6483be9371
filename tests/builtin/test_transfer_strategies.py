import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdro_cli.builtin.transfer_strategies import (
    BottomPercent,
    LossReweight,
    Proportional,
    Reweight,
    Temperature,
    Threshold,
    TopK,
    TopPercent,
    Uniform,
    UniMax,
    probabilities,
)
from tdro_cli.errors import TdroError
from tdro_cli.registry import resolve
from tdro_cli.testing import check_transfer_strategy

WEIGHTS = {"a": 0.1, "b": 0.5, "c": 0.15, "d": 0.25}
SIZES = {"a": 100, "b": 200, "c": 300, "d": 400}
ALL = [
    *(Reweight(), TopPercent(), BottomPercent(), TopK(2), Threshold(0.12), LossReweight(), Uniform()),
    *(Proportional(), Temperature(3.0), UniMax(2.0), Reweight(max_epochs=1.0, floor=0.05), Reweight(floor=0.1)),
    *(Uniform(max_epochs=0.5), TopPercent(60.0, max_epochs=0.1)),
]


@pytest.mark.parametrize("strategy", ALL, ids=repr)
def test_conforms(strategy):
    check_transfer_strategy(strategy)


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (Reweight(), WEIGHTS),
        (TopPercent(50.0), {"b": 0.5, "d": 0.5}),
        (TopPercent(70.0), {"b": 0.5, "d": 0.5}),  # floor(2.8)
        (TopPercent(100.0), {"b": 0.25, "d": 0.25, "c": 0.25, "a": 0.25}),
        (BottomPercent(), {"c": 0.5, "a": 0.5}),
        (TopK(1), {"b": 1.0}),
        (Threshold(0.25), {"b": 0.5, "d": 0.5}),
        (LossReweight(), dict.fromkeys("abcd", 0.25)),
        (Uniform(), dict.fromkeys("abcd", 0.25)),
        (Proportional(), {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4}),
        (Temperature(1.0), {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4}),
    ],
    ids=repr,
)
def test_by_hand(strategy, expected):
    result = strategy(WEIGHTS, SIZES)
    assert result == pytest.approx(expected)
    if isinstance(strategy, TopPercent | TopK | Threshold):
        assert list(result) == list(expected)  # by falling weight


def test_temperature_two_takes_the_root_of_the_size():
    result = Temperature(2.0)(WEIGHTS, SIZES)
    assert result["d"] / result["a"] == pytest.approx(2.0)


def test_ties_keep_the_order_given():
    equal = dict.fromkeys("dcba", 0.25)
    assert list(TopPercent(50.0)(equal, SIZES)) == ["d", "c"]
    assert list(BottomPercent(50.0)(equal, SIZES)) == ["b", "a"]


def test_top_and_bottom_halves_are_all_tasks_and_do_not_overlap():
    top, bottom = TopPercent(50.0)(WEIGHTS, SIZES), BottomPercent(50.0)(WEIGHTS, SIZES)
    assert set(top) | set(bottom) == set(SIZES) and not set(top) & set(bottom)


def test_percent_counts_exactly_where_the_product_is_not_representable():
    seven = {str(number): 1 / 7 for number in range(7)}
    assert len(TopPercent(300 / 7)(seven, dict.fromkeys(seven, 10))) == 3


def test_max_epochs_hands_the_surplus_on_in_proportion():
    # 1000 draws: b may have 200 of its 500; the 300 left over go to a, c, d as 0.1 : 0.15 : 0.25, where a may have 160
    result = Reweight(max_epochs=1.6)(WEIGHTS, SIZES | {"b": 125}, draws=1000)
    assert result == pytest.approx({"a": 0.16, "b": 0.2, "c": 0.24, "d": 0.4})


def test_floor_lifts_small_tasks_and_scales_the_others_down():
    result = Reweight(floor=0.2)(WEIGHTS, SIZES)
    assert result == pytest.approx({"a": 0.2, "b": 0.4, "c": 0.2, "d": 0.2})


def test_unimax_is_uniform_with_small_tasks_held_at_their_epochs():
    # the paper's walk from the smallest: 100 and 200 are used up, 700 draws are left for two tasks
    result = UniMax(1.0)(WEIGHTS, {"a": 100, "b": 200, "c": 1000, "d": 5000}, draws=1000)
    assert result == pytest.approx({"a": 0.1, "b": 0.2, "c": 0.35, "d": 0.35})


def unimax_walk(sizes, draws, epochs):
    """arXiv:2304.09151, algorithm 1: smallest first, an equal part of what is left or all that its epochs allow."""
    budget, left = {}, draws
    for number, task in enumerate(sorted(sizes, key=sizes.get)):
        budget[task] = min(left / (len(sizes) - number), epochs * sizes[task])
        left -= budget[task]
    return {task: value / draws for task, value in budget.items()}


sizes = st.lists(st.integers(1, 100_000), min_size=1, max_size=12).map(lambda s: {str(i): n for i, n in enumerate(s)})


@given(sizes=sizes, epochs=st.floats(0.1, 10), part=st.floats(0.01, 1))
def test_unimax_equals_the_papers_walk(sizes, epochs, part):
    draws = max(1, math.floor(part * epochs * sum(sizes.values())))
    if draws <= epochs * sum(sizes.values()):
        assert UniMax(epochs)({}, sizes, draws=draws) == pytest.approx(unimax_walk(sizes, draws, epochs), rel=1e-6)


@settings(max_examples=200)
@given(
    rows=st.lists(st.tuples(st.floats(1e-6, 1), st.integers(1, 100_000)), min_size=1, max_size=12),
    part=st.floats(0.01, 1),
    epochs=st.none() | st.floats(0.1, 10),
    floor_part=st.floats(0, 1),
)
def test_bounds_hold_the_sum_is_one_and_free_tasks_keep_their_ratio(rows, part, epochs, floor_part):
    shares = {str(i): share for i, (share, _) in enumerate(rows)}
    sizes = {str(i): size for i, (_, size) in enumerate(rows)}
    draws = max(1, math.floor(part * (epochs or 1) * sum(sizes.values())))
    if epochs is not None and draws > epochs * sum(sizes.values()):
        return
    highest = {task: math.inf if epochs is None else epochs * size / draws for task, size in sizes.items()}
    floor = floor_part * min([1 / len(rows), *highest.values()])
    result = probabilities(shares, sizes, draws=draws, max_epochs=epochs, floor=floor)
    assert math.fsum(result.values()) == pytest.approx(1, abs=1e-12)
    assert all(floor - 1e-12 <= p <= highest[task] + 1e-12 for task, p in result.items())
    free = [task for task in result if floor * (1 + 1e-9) < result[task] < highest[task] * (1 - 1e-9)]
    scales = [result[task] / shares[task] for task in free]
    assert scales == pytest.approx([scales[0]] * len(scales), rel=1e-6) if scales else True
    if scales:  # a capped task would have had more, a lifted one less
        for task in result:
            wanted = shares[task] * scales[0]
            assert result[task] == pytest.approx(min(highest[task], max(floor, wanted)), rel=1e-6, abs=1e-12)


def test_a_cap_that_the_data_cannot_meet_says_what_would_do():
    with pytest.raises(TdroError, match="3000 draws can't be had at max_epochs 2") as caught:
        Reweight(max_epochs=2.0)(WEIGHTS, SIZES, draws=3000)
    assert "max_epochs 3 or more" in caught.value.remedy
    assert sum(Reweight(max_epochs=3.0)(WEIGHTS, SIZES, draws=3000).values()) == pytest.approx(1, abs=1e-12)


def test_max_epochs_without_a_budget_is_refused():
    with pytest.raises(TdroError, match="how many queries"):
        UniMax()(WEIGHTS, SIZES)


def test_a_floor_against_a_cap_is_refused_by_task():
    with pytest.raises(TdroError, match="more than max_epochs 1 allows of a"):
        Reweight(max_epochs=1.0, floor=0.15)(WEIGHTS, SIZES, draws=900)


def test_a_floor_for_too_many_tasks_is_refused():
    with pytest.raises(TdroError, match="can't hold for 4 tasks"):
        Reweight(floor=0.3)(WEIGHTS, SIZES)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (TopPercent(20.0), "20 % of 4 tasks is no task"),
        (BottomPercent(10.0), "10 % of 4 tasks is no task"),
        (TopK(5), "k is 5, but there are 4 tasks"),
        (Threshold(0.6), "no task has a weight of at least 0.6"),
    ],
    ids=repr,
)
def test_an_empty_or_impossible_choice_says_what_to_do(strategy, message):
    with pytest.raises(TdroError, match=message) as caught:
        strategy(WEIGHTS, SIZES)
    assert caught.value.remedy


def test_weights_of_other_tasks_are_refused_by_name():
    with pytest.raises(TdroError, match="no size for z; no weight for d"):
        Reweight()({"a": 0.5, "b": 0.2, "c": 0.2, "z": 0.1}, SIZES)
    with pytest.raises(TdroError, match="no examples in b"):
        Reweight()(WEIGHTS, SIZES | {"b": 0})
    with pytest.raises(TdroError, match="weights of a are not numbers"):
        Reweight()(WEIGHTS | {"a": math.nan}, SIZES)
    with pytest.raises(TdroError, match="all weights are 0"):
        Reweight()(dict.fromkeys(SIZES, 0.0), SIZES)


def test_a_task_of_weight_zero_is_left_out():
    assert Reweight()({"a": 0.0, "b": 0.5, "c": 0.25, "d": 0.25}, SIZES) == {"b": 0.5, "c": 0.25, "d": 0.25}


def test_baselines_read_no_weights():
    for strategy in (Uniform(), Proportional(), Temperature(), UniMax()):
        assert strategy({}, SIZES, draws=500) == strategy(WEIGHTS, SIZES, draws=500)


def test_loss_weights_average_to_one_and_keep_the_ratios():
    factors = LossReweight().loss_weights(WEIGHTS)
    assert LossReweight.scales_loss is True
    assert factors == pytest.approx({"a": 0.4, "b": 2.0, "c": 0.6, "d": 1.0})


@pytest.mark.parametrize("options", [{"max_epochs": 0.0}, {"floor": -0.1}, {"floor": 1.5}])
def test_shared_options_out_of_range_are_refused_by_every_strategy(options):
    makers = [Reweight, TopPercent, BottomPercent, LossReweight, Uniform, Proportional, Temperature, UniMax]
    for make in [*makers, lambda **o: TopK(1, **o), lambda **o: Threshold(0.1, **o)]:
        with pytest.raises(ValueError, match=next(iter(options))):
            make(**options)


def test_all_are_registered():
    names = {"reweight": {}, "top_percent": {"percent": 70}, "bottom_percent": {}, "top_k": {"k": 3}, "uniform": {}}
    names |= {"threshold": {"at_least": 0.1}, "loss_reweight": {}, "proportional": {}, "temperature": {}, "unimax": {}}
    for name, options in names.items():
        assert resolve("transfer_strategies", name, options)
    assert resolve("transfer_strategies", "top_percent", {"percent": 70}) == TopPercent(70.0)


def published():
    folder = os.environ.get("TDRO_PAPER_DATA", Path(__file__).resolve().parents[3] / "shared" / "paper")
    path = Path(folder) / "published_weights.json"
    if not path.exists():
        pytest.skip("the authors' published weights are not here (shared/paper, or TDRO_PAPER_DATA)")
    return json.loads(path.read_text(encoding="utf-8"))


def test_top_percent_reproduces_the_authors_files():
    files = published()
    weights, sizes = files["curr"]["domain_weights"], files["curr"]["size"]
    assert list(files["top"]) == ["20", "30", "40", "50", "60", "70", "80", "90"]
    for percent, expected in files["top"].items():
        result = TopPercent(float(percent))(weights, sizes)
        total = sum(sizes[task] for task in result)
        content = {
            "k": len(result),
            "order": list(result),
            "domain_weight": result[expected["order"][0]],
            "total_size": total,
            "epoch": {task: probability * total / sizes[task] for task, probability in result.items()},
        }
        written = {key: expected[key] for key in content}
        assert set(result.values()) == {expected["domain_weight"]}
        assert json.dumps(content) == json.dumps(written), percent


def test_reweighting_by_the_published_weights_keeps_them():
    files = published()
    for name in ("curr", "mean", "ema"):
        weights = files[name]["domain_weights"]
        result = Reweight()(weights, files["curr"]["size"])
        assert result == pytest.approx(weights, rel=2e-6)  # the authors' own sums are off by up to 1.3e-6
        assert math.fsum(result.values()) == pytest.approx(1, abs=1e-12)
