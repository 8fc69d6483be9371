import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor

from tdro_cli.builtin.loss_measurements import DEFAULT_FLOOR, Absolute, Excess, Relative, RelativeOfficial
from tdro_cli.protocols import StatefulMeasurement, TaskLosses
from tdro_cli.registry import resolve
from tdro_cli.testing import check_loss_measurement

PAPER = Relative(floor=0.0, shrinkage=0.0)
SMALL = dict(proxy=tensor([2.0, 4.0, 1.0]), reference=tensor([1.0, 2.0, 4.0]), task=tensor([0, 0, 2]), num_tasks=3)


@pytest.mark.parametrize(
    "measurement",
    [Relative(), PAPER, Relative(shrinkage=0.1), Relative(ema=0.9), RelativeOfficial(), Excess(), Absolute()],
    ids=repr,
)
def test_conforms(measurement):
    check_loss_measurement(measurement)


@pytest.mark.parametrize(
    ("measurement", "expected"),
    [
        (PAPER, [3 / 1.5, 0, 1 / 4]),
        (Relative(), [3 / 1.5, 0, 1 / 4]),
        (Relative(floor=2.0), [3 / 2, 0, 1 / 4]),
        (Relative(floor=0.0, shrinkage=0.5), [3.5 / 2, 0, 1.5 / 4.5]),
        (Relative(floor=5.0, shrinkage=0.5), [3.5 / 5, 0, 1.5 / 5]),
        (Excess(), [(1 + 2) / 2, 0, 0]),
        (Absolute(), [3, 0, 1]),
        # shares 1/7, 2/7, 4/7: ratios 14, 14, 7/4
        (RelativeOfficial(), [14, 0, 1.75]),
    ],
    ids=repr,
)
def test_by_hand(measurement, expected):
    assert measurement(TaskLosses(**SMALL)).tolist() == pytest.approx(expected)


def test_absent_task_measures_zero():
    losses = TaskLosses(proxy=tensor([2.0, 4.0]), reference=tensor([1.0, 2.0]), task=tensor([0, 0]), num_tasks=2)
    assert Relative()(losses).tolist() == [2.0, 0.0]


def test_shrinkage_does_not_give_an_absent_task_the_neutral_one():
    losses = TaskLosses(proxy=tensor([2.0]), reference=tensor([1.0]), task=tensor([0]), num_tasks=2)
    assert Relative(shrinkage=1.0)(losses).tolist() == [1.5, 0.0]


def test_zero_over_zero_is_zero_and_something_over_zero_is_the_largest_float():
    losses = TaskLosses(proxy=tensor([0.0, 5.0]), reference=tensor([0.0, 0.0]), task=tensor([0, 1]), num_tasks=2)
    assert PAPER(losses).tolist() == [0.0, torch.finfo(torch.float32).max]
    assert Relative(floor=0.1)(losses).tolist() == pytest.approx([0.0, 50.0])
    assert Relative(floor=0.0, shrinkage=0.1)(losses).tolist() == pytest.approx([1.0, 51.0])


def test_the_default_floor_is_the_paper_above_it_and_says_where_it_binds():
    losses = TaskLosses(
        proxy=tensor([0.5, 0.042]), reference=tensor([DEFAULT_FLOOR, 0.001]), task=tensor([0, 1]), num_tasks=3
    )
    assert Relative()(losses).tolist() == pytest.approx([0.5 / DEFAULT_FLOOR, 0.042 / DEFAULT_FLOOR, 0])
    assert Relative().floor_binds(losses).tolist() == [False, True, False]
    share_G = Relative().clamped_share(losses)
    assert share_G.tolist() == [0.0, 1.0, 0.0] and share_G.dtype == torch.float32
    assert Relative(shrinkage=DEFAULT_FLOOR).floor_binds(losses).tolist() == [False, False, False]


def test_ema_averages_both_means_and_skips_absent_tasks():
    measurement = Relative(floor=0.0, ema=0.75)
    assert isinstance(measurement, StatefulMeasurement)
    first = TaskLosses(tensor([2.0, 8.0]), tensor([1.0, 2.0]), tensor([0, 1]), 3)
    second = TaskLosses(tensor([6.0, 1.0]), tensor([3.0, 1.0]), tensor([0, 2]), 3)
    third = TaskLosses(tensor([4.0]), tensor([6.0]), tensor([1]), 3)
    state, measured_G = measurement.measure(measurement.start(3), first)
    assert measured_G.tolist() == [2, 4, 0]
    state, measured_G = measurement.measure(state, second)
    assert measured_G.tolist() == pytest.approx([(1.5 + 1.5) / (0.75 + 0.75), 0, 1])
    _, measured_G = measurement.measure(state, third)
    assert measured_G.tolist() == pytest.approx([0, (6 + 1) / (1.5 + 1.5), 0])


def test_without_ema_measuring_with_state_is_calling():
    state = Relative().start(3)
    for _ in range(2):
        state, measured_G = Relative().measure(state, TaskLosses(**SMALL))
        assert torch.equal(measured_G, Relative()(TaskLosses(**SMALL)))


def released_rule(proxy, reference, task, micro_batch, num_tasks):
    """The release, query by query in float64: paper/README, `The authors' release, as it behaves`."""
    gradient = [0.0] * num_tasks
    numbers = sorted(set(micro_batch))
    for number in numbers:
        rows = [i for i in range(len(proxy)) if micro_batch[i] == number]
        norm = math.fsum(abs(reference[i]) for i in rows)
        total, count = [0.0] * num_tasks, [0] * num_tasks
        for i in rows:
            share = reference[i] / norm if norm else 0.0
            if share < 1e-4:
                share = 1.0
            total[task[i]] += max(proxy[i] / share, 0.0)
            count[task[i]] += 1
        for g in range(num_tasks):
            gradient[g] += total[g] / (count[g] if count[g] else 1)
    return [value / len(numbers) for value in gradient]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 9999), queries=st.integers(1, 40), num_micro_batches=st.integers(1, 4))
def test_official_equals_a_literal_loop(seed, queries, num_micro_batches):
    rng = np.random.default_rng(seed)
    proxy, reference = rng.lognormal(size=queries), rng.lognormal(-2, 4, size=queries)  # many under the threshold
    reference[rng.random(queries) < 0.1] = 0.0
    task, micro_batch = rng.integers(5, size=queries), rng.integers(num_micro_batches, size=queries)
    losses = TaskLosses(*map(tensor, (proxy, reference, task)), 5, tensor(micro_batch))
    expected = released_rule(proxy, reference, task.tolist(), micro_batch.tolist(), 5)
    np.testing.assert_allclose(RelativeOfficial()(losses), expected, rtol=1e-9)


def test_official_reports_the_share_of_replaced_queries():
    losses = TaskLosses(torch.ones(5), tensor([1e-5, 0.0, 1e-6, 1.0, 1.0]), tensor([0, 0, 0, 0, 1]), 3)
    assert RelativeOfficial().clamped_share(losses).tolist() == [0.75, 0, 0]


def test_official_replaces_shares_under_the_threshold_and_not_at_it():
    # shares 1/4 and 3/4; proxy losses 2 and 3
    losses = TaskLosses(tensor([2.0, 3.0]), tensor([1.0, 3.0]), tensor([0, 1]), 2)
    assert RelativeOfficial(threshold=0.25)(losses).tolist() == [8, 4]
    assert RelativeOfficial(threshold=0.25).clamped_share(losses).tolist() == [0, 0]
    assert RelativeOfficial(threshold=0.5)(losses).tolist() == [2, 4]
    assert RelativeOfficial(threshold=0.5).clamped_share(losses).tolist() == [1, 0]


def test_official_counts_the_micro_batches_of_the_update_and_not_those_with_the_task():
    # three micro-batches; task 0 is in the first alone, where its share is 1/2: (4 / 0.5 + 0 + 0) / 3
    proxy, reference = tensor([4.0, 1.0, 1.0, 1.0]), torch.ones(4)
    losses = TaskLosses(proxy, reference, tensor([0, 1, 1, 1]), 2, tensor([0, 0, 5, 7]))
    assert RelativeOfficial()(losses).tolist() == pytest.approx([8 / 3, (2 + 1 + 1) / 3])


def test_official_grows_with_the_batch_and_relative_does_not():
    small = TaskLosses(**SMALL)
    double = TaskLosses(*(torch.cat([column, column]) for column in (small.proxy, small.reference, small.task)), 3)
    assert torch.allclose(RelativeOfficial()(double), 2 * RelativeOfficial()(small))
    assert torch.allclose(Relative()(double), Relative()(small))


def test_official_has_no_negative_ratio():
    losses = TaskLosses(tensor([-1.0, 2.0]), tensor([1.0, 1.0]), tensor([0, 1]), 2)
    assert RelativeOfficial()(losses).tolist() == [0, 4]


@pytest.mark.parametrize("measurement", [Relative(), RelativeOfficial(), Excess(), Absolute()], ids=repr)
@pytest.mark.parametrize("micro_batch", [None, torch.empty(0, dtype=torch.int64)])
def test_no_queries_measure_zero(measurement, micro_batch):
    nothing = torch.empty(0)
    losses = TaskLosses(nothing, nothing, torch.empty(0, dtype=torch.int64), 2, micro_batch)
    assert measurement(losses).tolist() == [0, 0]


def test_official_depends_on_the_micro_batches_and_relative_does_not():
    split = SMALL | {"micro_batch": tensor([0, 1, 1])}
    # shares 1 | 1/3, 2/3: task 0 measures 2 and 12, task 2 is absent and then 3/2
    assert RelativeOfficial()(TaskLosses(**split)).tolist() == pytest.approx([7, 0, 0.75])
    assert torch.equal(Relative()(TaskLosses(**split)), Relative()(TaskLosses(**SMALL)))


rows = st.lists(
    st.tuples(st.floats(0, 30), st.floats(0, 30), st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=30
)


@given(rows=rows, seed=st.integers(0, 99))
def test_order_and_split_change_nothing_but_for_the_official_measurement(rows, seed):
    order = np.random.default_rng(seed).permutation(len(rows))
    for measurement in (PAPER, Relative(), Relative(shrinkage=0.1), Excess(), Absolute()):
        columns = [tensor([row[i] for row in rows], dtype=torch.float64 if i < 2 else torch.int64) for i in range(4)]
        measured_G = measurement(TaskLosses(columns[0], columns[1], columns[2], 5))
        proxy, reference, task, split = (column[order] for column in columns)
        assert torch.allclose(measured_G, measurement(TaskLosses(proxy, reference, task, 5, split)), rtol=1e-9)
        assert (measured_G >= 0).all() and measured_G.isfinite().all()


@given(rows=rows, factor=st.floats(1.0, 5.0), task=st.integers(0, 4))
def test_a_larger_proxy_loss_never_lowers_a_measurement(rows, factor, task):
    proxy, reference = (tensor([row[i] for row in rows], dtype=torch.float64) for i in range(2))
    tasks = tensor([row[2] for row in rows])
    raised = torch.where(tasks == task, proxy * factor, proxy)
    for measurement in (PAPER, Relative(), Relative(shrinkage=0.1), RelativeOfficial(), Excess(), Absolute()):
        lower_G = measurement(TaskLosses(proxy, reference, tasks, 5))
        higher_G = measurement(TaskLosses(raised, reference, tasks, 5))
        assert (higher_G >= lower_G * (1 - 1e-12)).all()
        assert torch.equal(higher_G.where(torch.arange(5) != task, lower_G), lower_G)


@pytest.mark.parametrize(
    ("measure", "name"),
    [
        *((Relative(), "relative"), (Relative().floor_binds, "relative"), (Excess(), "excess")),
        *((lambda losses: Relative().measure(Relative().start(1), losses), "relative"),),
        *((RelativeOfficial(), "relative_official"), (RelativeOfficial().clamped_share, "relative_official")),
    ],
)
def test_a_missing_reference_is_said_in_words(measure, name):
    with pytest.raises(ValueError, match=rf"^the loss measurement '{name}' needs reference losses$"):
        measure(TaskLosses(tensor([1.0]), None, tensor([0]), 1))


def test_absolute_says_that_it_needs_no_reference_and_the_others_do():
    assert Absolute.needs_reference is False
    assert all(getattr(kind, "needs_reference", True) for kind in (Relative, RelativeOfficial, Excess))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"floor": -1.0}, "floor and shrinkage must be >= 0 nats, got -1.0 and 0.0"),
        ({"floor": math.nan}, "floor and shrinkage must be >= 0 nats, got nan and 0.0"),
        ({"floor": 0.5, "shrinkage": -0.1}, "floor and shrinkage must be >= 0 nats, got 0.5 and -0.1"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\), got 1.0"),
        ({"ema": -0.5}, r"ema must be in \[0, 1\), got -0.5"),
    ],
)
def test_options_out_of_range_are_refused(options, words):
    with pytest.raises(ValueError, match=f"^{words}$"):
        Relative(**options)


def test_the_threshold_of_the_official_measurement_may_be_zero_and_not_less():
    losses = TaskLosses(tensor([2.0]), tensor([1e-9]), tensor([0]), 1)
    assert RelativeOfficial(threshold=0.0)(losses).tolist() == [2.0]
    for wrong in (-0.5, math.nan):
        with pytest.raises(ValueError, match=f"^threshold must be >= 0, got {wrong}$"):
            RelativeOfficial(threshold=wrong)


def test_all_are_registered_with_their_options():
    assert resolve("loss_measurements", "relative", {"floor": 0.001, "ema": 0.5}) == Relative(floor=0.001, ema=0.5)
    assert resolve("loss_measurements", "relative_official") == RelativeOfficial()
    assert resolve("loss_measurements", "excess") == Excess()
    assert resolve("loss_measurements", "absolute") == Absolute()


def test_the_built_in_plugins_of_learning_and_transfer_import_without_torch():
    code = (
        "import sys, tdro_cli.builtin.loss_measurements, tdro_cli.builtin.weight_updaters\n"
        "import tdro_cli.builtin.transfer_strategies, tdro_cli.testing\n"
        "print(sorted({'torch', 'numpy', 'pydantic'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
