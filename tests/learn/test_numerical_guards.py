"""The arithmetic at its edges: a spike, an overflow, no variance, equal losses, one task, temperature 0.002."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
from torch import tensor  # noqa: E402

from tdro_cli import registry  # noqa: E402
from tdro_cli.learn.contrastive import in_batch_infonce, per_query_infonce  # noqa: E402
from tdro_cli.learn.dro import (  # noqa: E402
    effective_tasks,
    learned_weights,
    robust_loss,
    squared_norm_share,
    standard_error,
    start_weights,
    update_weights,
)
from tdro_cli.protocols import TaskLosses  # noqa: E402

MEASUREMENTS = ("relative", "relative_official", "excess", "absolute")
UPDATERS = ("exponentiated_gradient", "groupdro", "doremi", "odm")


def losses(proxy, reference, task, num_tasks) -> TaskLosses:
    return TaskLosses(tensor(proxy), tensor(reference), tensor(task), num_tasks)


def learned(batches, num_tasks, measurement="relative", updater="exponentiated_gradient"):
    measure, update = registry.resolve("loss_measurements", measurement), registry.resolve("weight_updaters", updater)
    state = start_weights(measure, update, torch.full((num_tasks,), 1 / num_tasks))
    for number, batch in enumerate(batches):
        state, _ = update_weights(state, measure, update, batch, progress=number / len(batches))
    return learned_weights(update, state)


@pytest.mark.parametrize("updater", UPDATERS)
@pytest.mark.parametrize("measurement", MEASUREMENTS)
def test_all_equal_losses_leave_the_weights_uniform(measurement, updater):
    batch = losses([0.7] * 6, [0.7] * 6, [0, 1, 2, 0, 1, 2], 3)
    assert learned([batch] * 30, 3, measurement, updater).tolist() == pytest.approx([1 / 3] * 3, abs=1e-6)


@pytest.mark.parametrize("updater", UPDATERS)
@pytest.mark.parametrize("measurement", MEASUREMENTS)
def test_one_task_keeps_all_the_weight(measurement, updater):
    assert learned([losses([0.5, 3.0], [1.0, 0.1], [0, 0], 1)] * 5, 1, measurement, updater).tolist() == [1.0]


@pytest.mark.parametrize("measurement", MEASUREMENTS)
def test_losses_that_are_all_zero_move_nothing(measurement):
    batch = losses([0.0] * 4, [0.0] * 4, [0, 1, 0, 1], 2)
    assert learned([batch] * 10, 2, measurement).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("measurement", MEASUREMENTS)
@pytest.mark.parametrize("spike", [1e4, 1e30])
def test_one_spike_moves_a_weight_by_no_more_than_the_clipped_step(measurement, spike):
    calm, wild = [1.0, 1.0, 1.0, 1.0], [spike, 1.0, 1.0, 1.0]
    task = [0, 1, 2, 3]
    weights_G = learned([losses(wild, calm, task, 4)], 4, measurement)
    assert bool(weights_G.isfinite().all()) and float(weights_G.sum()) == pytest.approx(1)
    # the step is clipped to length 1, so that no ratio of weights changes by more than exp(0.02)
    assert float(weights_G.max() / weights_G.min()) <= 1.0203


def test_a_ratio_beyond_float32_is_its_largest_number_and_in_the_releases_way_is_refused():
    batch = losses([3e38, 1.0, 1.0], [0.01, 1.0, 1.0], [0, 1, 2], 3)
    assert float(learned([batch], 3, "relative").max()) <= 0.34 and learned([batch], 3, "relative").isfinite().all()
    with pytest.raises(ValueError, match="not finite for task number 0"):
        learned([batch], 3, "relative_official")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("model", ["proxy", "reference"])
@pytest.mark.parametrize("measurement", MEASUREMENTS)
def test_a_loss_that_is_not_finite_is_refused_and_the_state_stays(measurement, model, bad):
    measure = registry.resolve("loss_measurements", measurement)
    update = registry.resolve("weight_updaters", "groupdro")
    state = start_weights(measure, update, torch.full((2,), 0.5))
    wrong = {"proxy": [1.0, 1.0], "reference": [1.0, 1.0]} | {model: [1.0, bad]}
    words = rf"^the {model} loss is not finite for task number 1 \({bad}\), counted from 0$"
    with pytest.raises(ValueError, match=words):
        update_weights(state, measure, update, losses(**wrong, task=[0, 1], num_tasks=2), progress=0.0)
    assert update.weights(state.updater).tolist() == [0.5, 0.5]


def test_a_task_with_one_query_or_without_variance_has_a_finite_standard_error():
    relative = registry.resolve("loss_measurements", "relative")
    error_G = standard_error(relative, losses([1.0, 1.0, 2.0], [1.0, 1.0, 1.0], [0, 0, 1], 2))
    assert error_G[0] == 0 and not bool(error_G.isinf().any())


def test_weights_that_differ_by_eighty_orders_still_make_a_finite_loss():
    weights_G = torch.tensor([1.0, 1e-38])
    loss = robust_loss(tensor([2.0, 3e38]), tensor([0, 1]), weights_G)
    assert float(loss) == pytest.approx(2.0 + 3.0, rel=1e-3)
    assert effective_tasks(weights_G) == pytest.approx(1.0)
    assert squared_norm_share(tensor([3e38, 1.0])).tolist() == pytest.approx([1.0, 0.0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_embeddings_do_not_overflow_at_temperature_0_002(dtype):
    """A score of 1/0.002 = 500 is far inside float32; e^500 is not, and half precision ends at 65,504."""
    query_BD = torch.eye(4, dtype=dtype).requires_grad_()
    passage_BND = torch.stack([-torch.eye(4, dtype=dtype), torch.eye(4, dtype=dtype)], 1)
    loss_B = per_query_infonce(query_BD, passage_BND, 0.002)
    assert loss_B.dtype == torch.float32 and loss_B.tolist() == pytest.approx([1000.0] * 4)  # -500 and +500
    loss_B.mean().backward()
    assert bool(query_BD.grad.isfinite().all())


def test_embeddings_that_are_all_the_same_give_the_log_of_the_candidates():
    query_BD, passage_BND = torch.ones(3, 4), torch.ones(3, 2, 4)
    assert per_query_infonce(query_BD, passage_BND, 0.002).tolist() == pytest.approx([0.693147] * 3, rel=1e-5)
    assert in_batch_infonce(query_BD, passage_BND, 0.002).tolist() == pytest.approx([1.791759] * 3, rel=1e-5)  # log 6
