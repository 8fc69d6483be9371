import io
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor

from tdro_cli.builtin.loss_measurements import Absolute, Excess, Relative, RelativeOfficial
from tdro_cli.builtin.weight_updaters import ODM, DoReMi, ExponentiatedGradient, GroupDRO
from tdro_cli.learn.dro import (
    WeightAverages,
    WeightState,
    clip_by_l2_norm,
    drift_over_noise,
    effective_tasks,
    fill_absent,
    last_measured,
    learned_weights,
    query_weights,
    replay,
    require_finite,
    robust_loss,
    squared_norm_share,
    standard_error,
    start_weights,
    update_weights,
)
from tdro_cli.protocols import TaskLosses

losses_of = st.lists(st.tuples(st.floats(0, 20), st.integers(0, 3)), min_size=1, max_size=20)


def batches(steps, num_tasks=4, queries=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        TaskLosses(
            proxy=torch.randn(queries, generator=generator).exp(),
            reference=torch.randn(queries, generator=generator).exp(),
            task=torch.randint(num_tasks, (queries,), generator=generator),
            num_tasks=num_tasks,
        )
        for _ in range(steps)
    ]


def uniform(num_tasks):
    return torch.full((num_tasks,), 1 / num_tasks)


# ---- robust_loss ----


def test_robust_loss_by_hand():
    loss = robust_loss(tensor([1.0, 3.0, 5.0]), tensor([0, 1, 1]), tensor([0.5, 0.25, 0.25]))
    assert loss.item() == pytest.approx((0.5 * 1 + 0.25 * 3 + 0.25 * 5) / (0.5 + 0.25 + 0.25))


def test_uniform_weights_give_the_mean_loss():
    assert robust_loss(tensor([1.0, 3.0, 5.0]), tensor([0, 2, 2]), uniform(3)).item() == pytest.approx(3.0)


def test_no_gradient_reaches_the_weights():
    loss_B, weights_G = tensor([1.0, 3.0], requires_grad=True), tensor([0.75, 0.25], requires_grad=True)
    robust_loss(loss_B, tensor([0, 1]), weights_G).backward()
    assert weights_G.grad is None
    assert loss_B.grad.tolist() == [0.75, 0.25]


@given(rows=losses_of, cut=st.integers(0, 20), seed=st.integers(0, 99))
def test_micro_batches_of_query_weights_add_up_to_robust_loss(rows, cut, seed):
    loss_B, task_B = tensor([loss for loss, _ in rows]), tensor([task for _, task in rows])
    weights_G = torch.rand(4, generator=torch.Generator().manual_seed(seed)) + 0.01
    weight_B = query_weights(task_B, weights_G)
    parts = (weight_B[:cut] * loss_B[:cut]).sum() + (weight_B[cut:] * loss_B[cut:]).sum()
    assert parts.item() == pytest.approx(robust_loss(loss_B, task_B, weights_G).item(), rel=1e-5, abs=1e-6)


@given(rows=losses_of, seed=st.integers(0, 99))
def test_robust_loss_equals_a_float64_loop(rows, seed):
    weights_G = torch.rand(4, generator=torch.Generator().manual_seed(seed)) + 0.01
    above = below = 0.0
    for loss, task in rows:
        above += weights_G[task].item() * loss
        below += weights_G[task].item()
    got = robust_loss(tensor([loss for loss, _ in rows]), tensor([task for _, task in rows]), weights_G).item()
    assert got == pytest.approx(above / below, rel=1e-5, abs=1e-6)


@given(rows=losses_of, seed=st.integers(0, 99), scale=st.floats(1e-3, 1e3))
def test_robust_loss_knows_neither_the_scale_of_the_weights_nor_the_numbers_of_the_tasks(rows, seed, scale):
    loss_B, task_B = tensor([loss for loss, _ in rows]), tensor([task for _, task in rows])
    generator = torch.Generator().manual_seed(seed)
    weights_G, number_G = torch.rand(4, generator=generator) + 0.01, torch.randperm(4, generator=generator)
    expected = pytest.approx(robust_loss(loss_B, task_B, weights_G).item(), rel=1e-5, abs=1e-6)
    assert robust_loss(loss_B, task_B, weights_G * scale).item() == expected
    assert robust_loss(loss_B, number_G[task_B], torch.empty(4).index_copy(0, number_G, weights_G)).item() == expected
    absent_G = torch.ones(4).index_fill(0, task_B, 0).bool()  # what nobody in the batch has, counts for nothing
    assert robust_loss(loss_B, task_B, weights_G.masked_fill(absent_G, 77.0)).item() == expected


# ---- clipping, absent tasks, shapes of weights ----


def test_clip_shortens_a_long_vector_by_the_release_rule():
    assert clip_by_l2_norm(tensor([3.0, 4.0]), 1.0).tolist() == pytest.approx([3 / 5.000001, 4 / 5.000001])


def test_clip_leaves_a_short_vector():
    assert clip_by_l2_norm(tensor([0.3, 0.4]), 1.0).tolist() == pytest.approx([0.3, 0.4])
    assert clip_by_l2_norm(torch.zeros(3), 1.0).tolist() == [0, 0, 0]


def test_clip_adds_a_millionth_to_the_norm():
    # norm 1e-6, max_norm 1e-6: half of it
    clipped_G = clip_by_l2_norm(tensor([6e-7, 8e-7]), 1e-6)
    assert (clipped_G * 1e7).tolist() == pytest.approx([3, 4]) and clipped_G.dtype == torch.float32


def test_clip_survives_the_largest_float():
    largest = torch.finfo(torch.float32).max
    assert clip_by_l2_norm(tensor([largest, 1.0]), 1.0).tolist() == pytest.approx([1.0, 0.0])


def test_share_of_the_squared_norm():
    assert squared_norm_share(tensor([3.0, 4.0, 0.0])).tolist() == pytest.approx([9 / 25, 16 / 25, 0])
    assert squared_norm_share(torch.zeros(2)).tolist() == [0, 0]


def test_an_absent_task_gets_the_mean_of_the_others_and_then_its_last_value():
    first_G, first_count_G = tensor([2.0, 4.0, 0.0]), tensor([1, 1, 0])
    assert fill_absent(first_G, first_count_G, None, "last").tolist() == [2, 4, 3]
    last_G = last_measured(first_G, first_count_G, None)
    second_G, second_count_G = tensor([0.0, 6.0, 0.0]), tensor([0, 2, 0])
    assert fill_absent(second_G, second_count_G, last_G, "last").tolist() == [2, 6, 6]  # never measured: mean again
    last_G = last_measured(second_G, second_count_G, last_G)
    assert last_G[:2].tolist() == [2, 6] and math.isnan(last_G[2])


def test_absent_zero_is_the_release():
    assert fill_absent(tensor([2.0, 0.0]), tensor([1, 0]), tensor([5.0, 5.0]), "zero").tolist() == [2, 0]


def test_a_present_task_that_measures_zero_keeps_its_zero():
    assert fill_absent(tensor([2.0, 0.0, 0.0]), tensor([1, 1, 0]), None, "last").tolist() == [2, 0, 1]


def test_an_empty_batch_and_an_unknown_policy_are_refused():
    with pytest.raises(ValueError, match=r"^a batch without queries has no measurement$"):
        fill_absent(torch.zeros(2), torch.zeros(2), None, "last")
    with pytest.raises(ValueError, match=r"^absent_tasks must be 'last' or 'zero', got 'mean'$"):
        fill_absent(torch.zeros(2), torch.ones(2), None, "mean")


def test_effective_tasks():
    assert effective_tasks(uniform(20)) == pytest.approx(20)
    assert effective_tasks(tensor([1.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_tasks(tensor([0.5, 0.25, 0.25])) == pytest.approx(2**1.5)
    assert effective_tasks(tensor([2.0, 1.0, 1.0])) == pytest.approx(2**1.5)


def test_averages_by_hand():
    averages = WeightAverages.start(tensor([0.5, 0.5]))
    assert averages.mean_G.tolist() == [0.5, 0.5]
    averages = averages.update(tensor([0.6, 0.4])).update(tensor([0.8, 0.2]))
    assert averages.mean_G.tolist() == pytest.approx([0.7, 0.3])  # the initial weights are not in it
    assert averages.ema_G.tolist() == pytest.approx([0.9 * (0.9 * 0.5 + 0.06) + 0.08, 0.9 * (0.9 * 0.5 + 0.04) + 0.02])
    assert averages.updates == 2


# ---- update and replay ----


def test_one_update_by_hand():
    losses = TaskLosses(tensor([2.0, 4.0, 3.0]), tensor([1.0, 2.0, 3.0]), tensor([0, 0, 1]), 2)
    updater = ExponentiatedGradient(learning_rate=0.1, normalize="none")
    state = start_weights(Relative(), updater, uniform(2))
    state, measurement_G = update_weights(state, Relative(), updater, losses, progress=0.0)
    assert measurement_G.tolist() == [2.0, 1.0]
    expected = 1 / (1 + math.exp(-0.1))
    assert updater.weights(state.updater).tolist() == pytest.approx([expected, 1 - expected])
    assert state.averages.mean_G.tolist() == pytest.approx([expected, 1 - expected])


def numpy_trajectory(steps, num_tasks, floor, rate):
    """The paper's algorithm in float64, absent tasks at their last value, written without the package."""
    log_weights, last, trajectory = np.zeros(num_tasks), {}, []
    for batch in steps:
        proxy, reference, task = (getattr(batch, field).numpy() for field in ("proxy", "reference", "task"))
        measured = {}
        for g in range(num_tasks):
            mine = task == g
            if mine.any():
                measured[g] = proxy[mine].astype(np.float64).mean() / max(
                    floor, reference[mine].astype(np.float64).mean()
                )
        others = np.mean(list(measured.values()))
        last |= measured
        gradient = np.array([last.get(g, others) for g in range(num_tasks)])
        gradient *= min(1, 1 / (np.linalg.norm(gradient) + 1e-6))
        log_weights += rate * gradient
        trajectory.append(np.exp(log_weights) / np.exp(log_weights).sum())
    return np.array(trajectory)


def test_replay_equals_a_float64_reference_with_absent_tasks():
    steps = batches(40, num_tasks=6, queries=5)
    assert any((batch.counts() == 0).any() for batch in steps)
    result = replay(steps, Relative(floor=0.3), ExponentiatedGradient(learning_rate=0.1), uniform(6))
    np.testing.assert_allclose(result.weights_SG[1:], numpy_trajectory(steps, 6, 0.3, 0.1), rtol=1e-5)
    assert result.weights_SG[0].tolist() == pytest.approx([1 / 6] * 6)
    np.testing.assert_allclose(result.state.averages.mean_G, result.weights_SG[1:].double().mean(0), rtol=1e-6)


@pytest.mark.parametrize("measurement", [Relative(), Relative(ema=0.9), RelativeOfficial(), Excess(), Absolute()])
def test_replay_is_the_run_and_a_resumed_run_is_the_run(measurement):
    steps, updater = batches(20), ExponentiatedGradient(schedule="cosine")
    whole = replay(steps, measurement, updater, uniform(4))
    state, trajectory = start_weights(measurement, updater, uniform(4)), []
    for step, batch in enumerate(steps):
        if step == 10:  # killed and started again
            file = io.BytesIO()
            torch.save(state.plain(), file)
            file.seek(0)
            state = WeightState.from_plain(torch.load(file, weights_only=True))
        state, _ = update_weights(state, measurement, updater, batch, progress=step / 20)
        trajectory.append(updater.weights(state.updater))
    assert torch.equal(torch.stack(trajectory), whole.weights_SG[1:])
    assert torch.equal(state.averages.ema_G, whole.state.averages.ema_G)


def test_absent_zero_lets_a_rare_task_sink():
    steps = [TaskLosses(tensor([1.0, 1.0]), tensor([1.0, 1.0]), tensor([0, 1]), 3) for _ in range(10)]
    last = replay(steps, Relative(), ExponentiatedGradient(), uniform(3), absent_tasks="last")
    zero = replay(steps, Relative(), ExponentiatedGradient(), uniform(3), absent_tasks="zero")
    assert last.weights_SG[-1].tolist() == pytest.approx([1 / 3] * 3)
    assert zero.weights_SG[-1, 2] < 0.31


def test_doremi_learns_the_mean_and_others_the_last_weights():
    steps = batches(5)
    for updater in (DoReMi(), ExponentiatedGradient()):
        result = replay(steps, Excess(), updater, uniform(4))
        learned = learned_weights(updater, result.state)
        mean_G, final_G = result.weights_SG[1:].mean(0), result.weights_SG[-1]
        assert torch.allclose(learned, mean_G if isinstance(updater, DoReMi) else final_G)
        assert not torch.allclose(mean_G, final_G, rtol=1e-4)


def test_a_bandit_never_learns_from_a_task_it_did_not_draw():
    updater, losses = ODM(), TaskLosses(tensor([2.0, 4.0]), None, tensor([0, 1]), 3)
    state = start_weights(Absolute(), updater, uniform(3))
    state, seen_G = update_weights(state, Absolute(), updater, losses, progress=0.0, absent_tasks="last")
    assert seen_G.tolist() == [2, 4, 0]
    assert state.updater["reward"].tolist() == pytest.approx([0.1 * 6, 0.1 * 12, 0])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999))
def test_weights_do_not_depend_on_the_order_of_queries_or_on_the_micro_batch_split(seed):
    steps = batches(3, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    shuffled = []
    for batch in steps:
        order = torch.randperm(12, generator=generator)
        split = torch.randint(3, (12,), generator=generator)
        shuffled.append(TaskLosses(batch.proxy[order], batch.reference[order], batch.task[order], 4, split))
    for measurement in (Relative(), Excess(), Absolute()):
        one = replay(steps, measurement, ExponentiatedGradient(), uniform(4))
        other = replay(shuffled, measurement, ExponentiatedGradient(), uniform(4))
        assert torch.allclose(one.weights_SG, other.weights_SG, atol=1e-6)


def test_a_measurement_that_is_not_finite_stops_the_update():
    losses = TaskLosses(tensor([1.0, math.nan]), None, tensor([0, 2]), 3)
    updater = ExponentiatedGradient()
    with pytest.raises(ValueError, match=r"task number 2 \(nan\)"):
        update_weights(start_weights(Absolute(), updater, uniform(3)), Absolute(), updater, losses, progress=0.0)


def test_what_is_not_finite_is_listed_with_its_value():
    with pytest.raises(
        ValueError, match=r"^the measurement is not finite for task number 1 \(nan\), 3 \(-inf\), count"
    ):
        require_finite(tensor([1.0, math.nan, 2.0, -math.inf]))
    assert require_finite(tensor([1.0, 0.0])).tolist() == [1.0, 0.0]


# ---- what an update hands to plugins ----


@dataclass(frozen=True)
class Agreement:
    """Raises the tasks whose gradient agrees with the others': log α ← log α + products with all tasks."""

    def start(self, weights_G):
        return weights_G.log()

    def step_with_gradients(self, state, measurement_G, product_GG, *, progress):
        return state + (1 - progress) * (measurement_G + product_GG.sum(1))

    def weights(self, state):
        return state.softmax(0)


def test_an_updater_that_reads_gradients_is_given_them_with_the_measurement_and_the_progress():
    losses = TaskLosses(tensor([1.0, 2.0]), None, tensor([0, 1]), 2)
    state = start_weights(Absolute(), Agreement(), uniform(2))
    products_GG = tensor([[3.0, -1.0], [-1.0, 4.0]])
    after, _ = update_weights(state, Absolute(), Agreement(), losses, progress=0.5, product_GG=products_GG)
    # half of (1 + 2, 2 + 3): log ratio 1
    assert (after.updater[1] - after.updater[0]).item() == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"^an updater that reads gradients was given none$"):
        update_weights(state, Absolute(), Agreement(), losses, progress=0.5)


def test_an_updater_that_asks_for_sizes_is_given_them_and_another_does_not_mind():
    sizes_G = tensor([100, 400])
    assert start_weights(Absolute(), GroupDRO(size_adjustment=2.0), uniform(2), sizes_G).updater[
        "adjustment"
    ].tolist() == pytest.approx([0.2, 0.1])
    one, other = (start_weights(Absolute(), DoReMi(), uniform(2), sizes) for sizes in (None, sizes_G))
    assert torch.equal(one.updater["log_weights"], other.updater["log_weights"])
    batch = TaskLosses(tensor([1.0, 1.0]), None, tensor([0, 1]), 2)
    weights_SG = replay([batch], Absolute(), GroupDRO(1.0, 2.0), uniform(2), sizes_G=sizes_G).weights_SG
    assert (weights_SG[1, 0] / weights_SG[1, 1]).item() == pytest.approx(math.exp(0.1))


def test_replay_takes_the_progress_from_the_steps_that_were_planned():
    batch = TaskLosses(tensor([0.0, 1.0]), None, tensor([0, 1]), 2)
    updater = ExponentiatedGradient(learning_rate=1.0, normalize="none", schedule="linear")

    def log_ratios(**options):
        weights_SG = replay([batch, batch], Absolute(), updater, uniform(2), **options).weights_SG
        return (weights_SG[:, 1] / weights_SG[:, 0]).log().tolist()

    assert log_ratios() == pytest.approx([0, 1, 1.5], abs=1e-5)  # rates 1 and 1/2
    assert log_ratios(steps=4) == pytest.approx([0, 1, 1.75], abs=1e-5)  # rates 1 and 3/4, of 4


def test_replay_of_no_steps_is_the_start():
    result = replay([], Absolute(), DoReMi(), tensor([0.75, 0.25]))
    assert result.weights_SG.tolist() == [[0.75, 0.25]] and result.measurement_SG.shape == (0, 2)
    assert learned_weights(DoReMi(), result.state).tolist() == [0.75, 0.25]


def test_replay_keeps_what_the_updater_saw():
    steps = [TaskLosses(tensor([1.0, 3.0]), None, tensor([0, 1]), 2), TaskLosses(tensor([5.0]), None, tensor([0]), 2)]
    assert replay(steps, Absolute(), DoReMi(), uniform(2)).measurement_SG.tolist() == [[1, 3], [5, 3]]
    zero = replay(steps, Absolute(), DoReMi(), uniform(2), absent_tasks="zero")
    assert zero.measurement_SG.tolist() == [[1, 3], [5, 0]]


# ---- standard error ----


def test_standard_error_of_two_queries_a_task_and_of_ten_folds_of_two_by_hand():
    pairs = TaskLosses(tensor([1.0, 4.0, 5.0, 7.0]), None, tensor([0, 1, 0, 1]), 2)
    assert standard_error(Absolute(), pairs).tolist() == pytest.approx([2.0, 1.5])  # std √8 and √4.5, over √2
    # query i goes to fold i mod 10; leaving out one fold of a mean of ten equals the spread of the folds' means
    value_B = torch.arange(20.0) ** 2
    fold_means = value_B.reshape(2, 10).mean(0).numpy()
    losses = TaskLosses(value_B, None, torch.zeros(20, dtype=torch.int64), 1)
    expected = np.std(fold_means, ddof=1) / np.sqrt(10)
    assert standard_error(Absolute(), losses).tolist() == pytest.approx([expected], rel=1e-5)


def test_standard_error_keeps_the_micro_batches():
    proxy_B, reference_B, split_B = torch.linspace(1, 2, 12), torch.linspace(2, 1, 12) ** 2, tensor([0, 0, 1, 1] * 3)
    task_B = torch.zeros(12, dtype=torch.int64)
    whole, parts = (TaskLosses(proxy_B, reference_B, task_B, 1, split) for split in (None, split_B))
    one, other = (standard_error(RelativeOfficial(), losses) for losses in (whole, parts))
    assert not torch.allclose(one, other, rtol=1e-3)


def test_standard_error_without_queries_is_unknown():
    nothing = TaskLosses(torch.empty(0), None, torch.empty(0, dtype=torch.int64), 2)
    assert standard_error(Absolute(), nothing).isnan().all()


def test_standard_error_of_a_mean_is_the_textbook_one():
    value_B = tensor([1.0, 2.0, 4.0, 9.0, 5.0, 7.0])
    losses = TaskLosses(value_B, None, tensor([0, 0, 0, 0, 1, 2]), 4)
    error_G = standard_error(Absolute(), losses)
    assert error_G[0].item() == pytest.approx(np.std([1, 2, 4, 9], ddof=1) / 2)
    assert error_G[1:].isnan().all()


def test_standard_error_of_a_ratio_matches_its_spread_over_many_batches():
    steps = batches(400, num_tasks=1, queries=200)
    spread = torch.stack([Relative()(batch) for batch in steps]).std().item()
    errors = torch.stack([standard_error(Relative(), batch) for batch in steps[:100]]).mean().item()
    assert errors == pytest.approx(spread, rel=0.15)


# ---- whether only noise moves the weights ----


def path_of(step_SG):
    """Weights whose log makes these steps, from equal shares."""
    log_SG = torch.cat([torch.zeros(1, step_SG.shape[1]), step_SG.cumsum(0)])
    return log_SG.softmax(1)


def test_drift_over_noise_by_hand():
    # log weights against their mean: task 0 goes +1, +1, task 1 -1, -1: (2)² / (1 + 1)
    assert drift_over_noise(path_of(tensor([[2.0, 0.0], [2.0, 0.0]]))) == pytest.approx(2.0, rel=1e-5)
    # there and back again
    assert drift_over_noise(path_of(tensor([[2.0, 0.0], [-2.0, 0.0]]))) == pytest.approx(0.0, abs=1e-9)
    assert drift_over_noise(uniform(3).expand(5, 3)) is None


def test_noise_makes_about_one_and_a_drift_much_more():
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(200, 20, generator=generator) * 0.02
    found = [drift_over_noise(path_of(noise[start : start + 100])) for start in range(0, 100, 10)]
    assert 0.4 < np.mean(found) < 1.7 and max(found) < 2.0
    drifting = noise[:100] + 0.01 * torch.linspace(-1, 1, 20)
    assert drift_over_noise(path_of(drifting)) > 4


def test_drift_over_noise_does_not_know_the_size_of_the_steps():
    step_SG = torch.randn(30, 5, generator=torch.Generator().manual_seed(6))
    assert drift_over_noise(path_of(step_SG * 0.01)) == pytest.approx(
        drift_over_noise(path_of(step_SG * 0.2)), rel=1e-2
    )
