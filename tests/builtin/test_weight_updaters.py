import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor

from tdro_cli.builtin.weight_updaters import ODM, DoReMi, ExponentiatedGradient, GroupDRO, capped_share
from tdro_cli.errors import TdroError
from tdro_cli.learn.dro import squared_norm_share
from tdro_cli.registry import resolve
from tdro_cli.testing import check_weight_updater

UPDATERS = [
    ExponentiatedGradient(),
    ExponentiatedGradient(normalize="unit", smoothing=0.01, schedule="linear"),
    ExponentiatedGradient(normalize="none", learning_rate=1.0),
    ExponentiatedGradient(learning_rate=0.2, cap=0.3, schedule="cosine"),
    GroupDRO(),
    DoReMi(),
    ODM(),
]
measurements = st.lists(st.floats(0, 1e4), min_size=5, max_size=5).map(tensor)
starts = st.lists(st.floats(0.01, 1), min_size=5, max_size=5).map(lambda values: tensor(values) / sum(values))


def stepped(updater, weights_G, *measurements_G, progress=0.0):
    state = updater.start(weights_G)
    for measurement_G in measurements_G:
        state = updater.step(state, measurement_G, progress=progress)
    return updater.weights(state)


def uniform(num_tasks):
    return torch.full((num_tasks,), 1 / num_tasks)


@pytest.mark.parametrize("updater", UPDATERS, ids=repr)
def test_conforms(updater):
    check_weight_updater(updater)


def test_exponentiated_gradient_by_hand():
    # measurement (3, 4) is clipped to (0.6, 0.8): log ratio 0.2 · rate
    weights_G = stepped(ExponentiatedGradient(learning_rate=1.0), tensor([0.5, 0.5]), tensor([3.0, 4.0]))
    assert (weights_G[1] / weights_G[0]).item() == pytest.approx(math.exp(0.2), rel=1e-5)


@pytest.mark.parametrize(("normalize", "expected"), [("clip", [0.3, 0.4]), ("unit", [0.6, 0.8]), ("none", [0.3, 0.4])])
def test_a_short_measurement_is_lengthened_by_unit_only(normalize, expected):
    assert ExponentiatedGradient(normalize=normalize).gradient(tensor([0.3, 0.4])).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("normalize", "expected"), [("clip", [1.2, 1.6]), ("unit", [1.2, 1.6]), ("none", [3.0, 4.0])])
def test_a_long_measurement_is_shortened_unless_none(normalize, expected):
    gradient_G = ExponentiatedGradient(normalize=normalize, max_grad_norm=2.0).gradient(tensor([3.0, 4.0]))
    assert gradient_G.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("normalize", ["clip", "unit", "none"])
def test_a_zero_measurement_changes_nothing(normalize):
    weights_G = tensor([0.7, 0.2, 0.1])
    assert torch.allclose(stepped(ExponentiatedGradient(normalize=normalize), weights_G, torch.zeros(3)), weights_G)


def test_schedules_take_the_rate_from_full_to_nothing():
    def log_ratio(schedule, progress):
        updater = ExponentiatedGradient(learning_rate=1.0, normalize="none", schedule=schedule)
        weights_G = stepped(updater, tensor([0.5, 0.5]), tensor([0.0, 1.0]), progress=progress)
        return (weights_G[1] / weights_G[0]).log().item()

    assert [log_ratio("constant", p) for p in (0.0, 0.5, 1.0)] == pytest.approx([1, 1, 1], abs=1e-6)
    assert [log_ratio("linear", p) for p in (0.0, 0.25, 1.0)] == pytest.approx([1, 0.75, 0], abs=1e-6)
    assert [log_ratio("cosine", p) for p in (0.0, 0.5, 1.0)] == pytest.approx([1, 0.5, 0], abs=1e-6)


def test_smoothing_keeps_a_share_for_everyone():
    updater = ExponentiatedGradient(learning_rate=100.0, normalize="none", smoothing=0.04)
    assert stepped(updater, uniform(4), tensor([1.0, 0, 0, 0])).tolist() == pytest.approx([0.97, 0.01, 0.01, 0.01])


def test_the_cap_bounds_a_lucky_task_and_keeps_the_length():
    vector_G = tensor([100.0, 3.0, 4.0], dtype=torch.float64)
    capped_G = capped_share(vector_G, 0.5)  # level: 0.5 · 25 / 0.5, so (5, 3, 4) stretched to the old length
    assert (capped_G / capped_G[0]).tolist() == pytest.approx([1, 0.6, 0.8])
    assert capped_G.norm().item() == pytest.approx(vector_G.norm().item())


@given(
    values=st.lists(st.floats(0, 1e6).filter(lambda x: x == 0 or x > 1e-3), min_size=4, max_size=8),
    cap=st.floats(0.26, 1),
)
def test_no_task_has_more_than_the_cap_where_that_can_be(values, cap):
    vector_G = tensor(values, dtype=torch.float64)
    capped_G = capped_share(vector_G, cap)
    nonzero = sum(value > 0 for value in values)
    assert capped_G.norm().item() == pytest.approx(vector_G.norm().item())
    assert squared_norm_share(capped_G).max() <= max(cap, 1 / max(nonzero, 1)) + 1e-9
    assert (capped_G.argsort(stable=True).sort().values == torch.arange(len(values))).all()
    order = vector_G.argsort()
    assert (capped_G[order].diff() >= -1e-9 * capped_G.max()).all()  # who was ahead stays ahead


def test_a_cap_under_an_equal_share_is_refused_at_the_start():
    with pytest.raises(ValueError, match=r"^cap 0.2 is less than an equal share of 4 tasks; give at least that$"):
        ExponentiatedGradient(cap=0.2).start(uniform(4))


def test_groupdro_by_hand():
    weights_G = stepped(GroupDRO(step_size=0.1), tensor([0.25, 0.75]), tensor([2.0, 5.0]))
    raw = [0.25 * math.exp(0.2), 0.75 * math.exp(0.5)]
    assert weights_G.tolist() == pytest.approx([value / sum(raw) for value in raw])


def test_groupdro_raises_small_tasks_by_its_adjustment():
    # C / √n is 2 / √100 = 0.2 and 2 / √400 = 0.1: log ratio step_size · 0.1 more for the small one
    updater = GroupDRO(step_size=0.5, size_adjustment=2.0)
    state = updater.start_with_sizes(tensor([0.5, 0.5]), tensor([100, 400]))
    for _ in range(2):
        state = updater.step(state, tensor([1.0, 1.0]), progress=0.0)
    weights_G = updater.weights(state)
    assert (weights_G[0] / weights_G[1]).item() == pytest.approx(math.exp(2 * 0.5 * 0.1), rel=1e-5)
    with pytest.raises(ValueError, match=r"^size_adjustment needs the sizes of the tasks: call start_with_sizes$"):
        updater.start(tensor([0.5, 0.5]))


def test_doremi_by_hand_starts_each_step_from_the_smoothed_weights():
    updater = DoReMi(learning_rate=2.0, smoothing=0.1)
    alpha = [0.5, 0.5]
    for measured in ([1.0, 0.0], [0.0, 0.5]):
        raw = [a * math.exp(2.0 * m) for a, m in zip(alpha, measured, strict=True)]
        alpha = [0.9 * value / sum(raw) + 0.05 for value in raw]
    weights_G = stepped(updater, tensor([0.5, 0.5]), tensor([1.0, 0.0]), tensor([0.0, 0.5]))
    assert weights_G.tolist() == pytest.approx(alpha)
    assert DoReMi.output == "mean"


def bandit_reference(steps, num_tasks, memory=0.9):
    """arXiv:2312.02406, algorithm 1, every task drawn unless its loss is 0; plain Python."""
    reward, policy, before = [0.0] * num_tasks, [1 / num_tasks] * num_tasks, 1 / num_tasks  # E_1 is 1 / K
    for t, losses in enumerate(steps, start=2):  # after the losses of step t - 1 comes the policy of step t
        for k, loss in enumerate(losses):
            if loss:
                reward[k] = memory * reward[k] + (1 - memory) * loss / policy[k]
        explore = min(1 / num_tasks, math.sqrt(math.log(num_tasks) / (num_tasks * t)))
        raw = [math.exp(before * value) for value in reward]
        policy = [(1 - num_tasks * explore) * value / sum(raw) + explore for value in raw]
        before = explore
    return policy


def test_odm_equals_a_plain_reference():
    rng = np.random.default_rng(0)
    steps = (rng.lognormal(size=(60, 4)) * (rng.random((60, 4)) < 0.7)).astype(np.float32)
    weights_G = stepped(ODM(), uniform(4), *map(torch.from_numpy, steps))
    assert weights_G.tolist() == pytest.approx(bandit_reference(steps.tolist(), 4), rel=1e-5)
    assert weights_G.max() - weights_G.min() > 0.02  # it does move
    assert ODM.samples is True


def test_odm_explores_only_for_the_first_g_ln_g_steps():
    favourite = tensor([5.0, 1.0, 1.0, 1.0])
    assert stepped(ODM(), uniform(4), *[favourite] * 4).tolist() == pytest.approx(
        [0.25] * 4
    )  # for step 5; 4 ln 4 = 5.5
    assert stepped(ODM(), uniform(4), *[favourite] * 5)[0] > 0.25
    assert stepped(ODM(), uniform(4), *[favourite] * 50)[0] > 0.3


@settings(max_examples=50, deadline=None)
@given(weights_G=starts, value=st.floats(0, 1e3))
def test_equal_measurements_leave_any_weights_alone(weights_G, value):
    for updater in (ExponentiatedGradient(), ExponentiatedGradient(normalize="unit", cap=0.5), GroupDRO()):
        assert torch.allclose(stepped(updater, weights_G, torch.full((5,), value)), weights_G, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(weights_G=starts, measurement_G=measurements, task=st.integers(0, 4), more=st.floats(0, 1e4))
def test_a_higher_measurement_never_lowers_a_tasks_relative_weight(weights_G, measurement_G, task, more):
    raised_G = measurement_G.clone()
    raised_G[task] += more
    for updater in UPDATERS:
        if isinstance(updater, DoReMi) or getattr(updater, "normalize", "") == "none":
            continue  # at rate 1 these reach the smallest weight, below which nothing is relative
        lower_G, higher_G = (stepped(updater, weights_G, m).double() for m in (measurement_G, raised_G))
        assert (higher_G[task] / higher_G >= lower_G[task] / lower_G * (1 - 1e-5)).all()


@settings(max_examples=50, deadline=None)
@given(weights_G=starts, steps=st.lists(measurements, min_size=1, max_size=5))
def test_weights_stay_positive_and_sum_to_one(weights_G, steps):
    for updater in UPDATERS:
        result_G = stepped(updater, weights_G, *steps)
        assert (result_G > 0).all()
        assert result_G.double().sum().item() == pytest.approx(1, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(weights_G=starts, steps=st.lists(measurements, min_size=1, max_size=5))
def test_exponentiated_gradient_equals_a_float64_reference(weights_G, steps):
    log_weights = np.log(weights_G.double().numpy())
    for measurement_G in steps:
        gradient = measurement_G.double().numpy()
        log_weights = log_weights + 0.02 * gradient * min(1, 1 / (np.linalg.norm(gradient) + 1e-6))
        log_weights -= np.log(np.exp(log_weights).sum())
    np.testing.assert_allclose(stepped(ExponentiatedGradient(), weights_G, *steps), np.exp(log_weights), rtol=1e-5)


@pytest.mark.parametrize("updater", UPDATERS, ids=repr)
def test_a_measurement_that_is_not_finite_names_its_tasks(updater):
    with pytest.raises(ValueError, match=r"task number 1 \(nan\), 3 \(inf\)"):
        stepped(updater, uniform(5), tensor([1.0, math.nan, 1.0, math.inf, 1.0]))


def test_weights_that_are_no_distribution_are_refused():
    for wrong in ([0.5, 0.6], [1.0, 0.0], [1.5, -0.5]):
        with pytest.raises(ValueError, match="weights must be > 0 and sum to 1"):
            ExponentiatedGradient().start(tensor(wrong))


@pytest.mark.parametrize(
    ("updater", "options", "words"),
    [
        (ExponentiatedGradient, {"learning_rate": 0.0}, "learning_rate and max_grad_norm must be > 0, got 0.0, 1.0"),
        (ExponentiatedGradient, {"max_grad_norm": 0.0}, "learning_rate and max_grad_norm must be > 0, got 0.02, 0.0"),
        (ExponentiatedGradient, {"learning_rate": math.nan}, "learning_rate and max_grad_norm must be > 0, got nan"),
        (ExponentiatedGradient, {"normalize": "l1"}, "normalize must be clip, unit or none, got 'l1'"),
        (ExponentiatedGradient, {"schedule": "step"}, "schedule must be constant, linear or cosine, got 'step'"),
        *((ExponentiatedGradient, {"cap": cap}, f"cap must be in (0, 1], got {cap}") for cap in (0.0, -0.5, 1.5)),
        *(
            (updater, {"smoothing": smoothing}, f"smoothing must be in [0, 1), got {smoothing}")
            for updater in (ExponentiatedGradient, DoReMi)
            for smoothing in (1.0, -0.1, math.nan)
        ),
        (GroupDRO, {"step_size": 0.0}, "step_size must be > 0, got 0.0"),
        (GroupDRO, {"size_adjustment": -1.0}, "size_adjustment must be >= 0, got -1.0"),
        (DoReMi, {"learning_rate": 0.0}, "learning_rate must be > 0, got 0.0"),
        *((ODM, {"memory": memory}, f"memory must be in [0, 1), got {memory}") for memory in (1.0, -0.1)),
    ],
)
def test_options_out_of_range_are_refused(updater, options, words):
    with pytest.raises(ValueError, match="^" + re.escape(words)):
        updater(**options)


def test_options_at_the_end_of_their_range_work():
    halves = tensor([0.5, 0.5])
    # cap 1 and an equal share are both allowed; without memory the reward is the last one
    assert ExponentiatedGradient(cap=1.0).gradient(tensor([0.3, 0.4])).tolist() == pytest.approx([0.3, 0.4])
    assert stepped(ExponentiatedGradient(cap=0.5), halves, tensor([3.0, 4.0])).tolist() == pytest.approx([0.5, 0.5])
    assert ODM(memory=0.0).step(ODM().start(halves), tensor([2.0, 3.0]), progress=0.0)["reward"].tolist() == [4, 6]


def test_weights_may_sum_to_one_as_float32_does_and_no_further():
    assert stepped(DoReMi(), tensor([0.50005, 0.5]), tensor([0.0, 0.0])).double().sum().item() == pytest.approx(1)
    with pytest.raises(ValueError, match=r"^weights must be > 0 and sum to 1, got \[0.5\d*, 0.5\]$"):
        stepped(DoReMi(), tensor([0.5002, 0.5]), tensor([0.0, 0.0]))


def test_a_weight_never_falls_so_low_that_it_could_not_return():
    updater = ExponentiatedGradient(learning_rate=1000.0, normalize="none")
    state = updater.step(updater.start(uniform(2)), tensor([1.0, 0.0]), progress=0.0)
    assert updater.weights(state)[1].item() == pytest.approx(math.exp(-80), rel=1e-5)  # float32 ends at e^-103
    again = updater.step(state, tensor([0.0, 0.2]), progress=0.0)
    assert updater.weights(again)[1] > 0.999


def test_the_cap_survives_shares_that_add_up_to_all_but_the_rounding():
    # 1/3 each of the first three, which leaves nothing, in float64 a rounding error, for the fourth
    capped_G = capped_share(tensor([2.0, 1.5, 1.0, 1e-150], dtype=torch.float64), 1 / 3)
    assert (capped_G[:3] / capped_G[2]).tolist() == pytest.approx([1, 1, 1])
    assert capped_G.norm().item() == pytest.approx(math.sqrt(7.25))


def test_a_capped_measurement_keeps_its_signs():
    assert capped_share(tensor([-100.0, 3.0, 4.0], dtype=torch.float64), 0.5)[0] < 0


def test_all_are_registered_and_their_class_attributes_are_no_options():
    assert resolve("weight_updaters", "exponentiated_gradient", {"cap": 0.2}) == ExponentiatedGradient(cap=0.2)
    assert resolve("weight_updaters", "groupdro") == GroupDRO()
    with pytest.raises(TdroError, match="no option 'output'"):
        resolve("weight_updaters", "doremi", {"output": "final"})
