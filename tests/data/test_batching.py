import dataclasses
import hashlib
import tracemalloc
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tdro_cli.data import batching
from tdro_cli.data.batching import (
    BatchPlan,
    assemble,
    batch_at,
    choose_passages,
    drawn_before,
    permuted,
    task_counts,
    task_schedule,
)


def plan(sizes=(5, 3), probabilities=(0.5, 0.5), queries=4, **options):
    return BatchPlan(options.pop("seed", 7), queries, tuple(sizes), tuple(probabilities), **options)


def equal(batch, other):
    return all(np.array_equal(getattr(batch, f), getattr(other, f)) for f in ("task_B", "row_B", "visit_B"))


@st.composite
def plans(draw):
    tasks = draw(st.integers(1, 6))
    raw = draw(st.lists(st.floats(0, 1), min_size=tasks, max_size=tasks).filter(lambda w: sum(w) > 1e-3))
    if draw(st.booleans()):
        raw = [1.0] * tasks
    return BatchPlan(
        seed=draw(st.integers(0, 2**63 - 1)),
        queries=draw(st.integers(1, 40)),
        sizes=tuple(draw(st.lists(st.integers(1, 30), min_size=tasks, max_size=tasks))),
        probabilities=tuple(float(w) for w in np.array(raw) / sum(raw)),
        composition=draw(st.sampled_from(["homogeneous", "mixed"])),
        draws=draw(st.sampled_from(["stratified", "independent"])),
    )


# ---- shares of the tasks ----


def test_equal_tasks_share_a_mixed_batch_equally_and_the_remainder_goes_round():
    mixed = plan(sizes=(9, 9, 9), probabilities=(1 / 3,) * 3, queries=7, composition="mixed")
    counts = [task_counts(mixed, step).tolist() for step in range(3)]
    assert counts == [[2, 2, 3], [2, 3, 2], [3, 2, 2]]  # 7 = 2 + 2 + 3
    assert task_counts(mixed, 3).tolist() == counts[0]
    assert [drawn_before(mixed, step).tolist() for step in (1, 2, 3, 4)] == [
        [2, 2, 3],
        [4, 5, 5],
        [7, 7, 7],
        [9, 9, 10],
    ]


def test_unequal_tasks_share_a_mixed_batch_by_their_probabilities():
    mixed = plan(sizes=(9, 9, 9), probabilities=(0.5, 0.25, 0.25), queries=8, composition="mixed")
    assert [task_counts(mixed, step).tolist() for step in range(3)] == [[4, 2, 2]] * 3


def test_homogeneous_batches_of_two_equal_tasks_alternate():
    schedule = task_schedule(plan(), 6)
    assert sorted(schedule[:2]) == sorted(schedule[2:4]) == sorted(schedule[4:6]) == [0, 1]
    assert [len(set(batch_at(plan(), step).task_B)) for step in range(4)] == [1] * 4


def test_a_task_of_a_quarter_has_one_homogeneous_batch_of_four():
    schedule = task_schedule(plan(probabilities=(0.75, 0.25)), 40)
    assert [list(schedule[i : i + 4]).count(1) for i in range(0, 40, 4)] == [1] * 10


@settings(max_examples=150, deadline=None)
@given(plans(), st.integers(0, 60))
def test_stratified_shares_are_within_one_batch_after_any_step(drawn, step):
    drawn = dataclasses.replace(drawn, draws="stratified", composition="homogeneous")
    due = np.array(drawn.probabilities) * step
    some = np.count_nonzero(drawn.probabilities)
    # 1 - 1 / (2n - 2): no schedule of n tasks does better for all shares (Tijdeman)
    assert (
        np.abs(drawn_before(drawn, step) / drawn.queries - due).max()
        <= (1 - 0.5 / (some - 1) if some > 1 else 0) + 1e-6
    )


def awkward_shares():
    """500 tasks whose shares span many orders; one of nearly all, one of nearly nothing; zeros between; thirds."""
    rng = np.random.default_rng(3)
    weights = rng.random(500) ** 8
    weights[::7] = 0.0
    yield weights / weights.sum()
    yield rng.dirichlet([0.01] * 500)
    yield np.array([0.0, 1 - 1e-9, 0.0, 1e-9])
    yield np.array([1e-300, 0.5, 0.0, 0.5])
    yield np.array([1 / 3, 1 / 3, 1 / 3])
    yield np.full(500, 1 / 500)
    yield np.array([0.0, 0.0, 1.0])


@pytest.mark.parametrize("number", range(7))
def test_awkward_shares_are_within_one_homogeneous_batch_after_every_step(number):
    share_G = list(awkward_shares())[number]
    schedule = task_schedule(plan((9,) * len(share_G), tuple(share_G.tolist())), 3000)
    had_SG = np.cumsum(schedule[:, None] == np.arange(len(share_G)), axis=0)
    due_SG = np.arange(1, 3001)[:, None] * share_G
    assert np.abs(had_SG - due_SG).max() < 1
    assert not had_SG[-1, share_G == 0].any()


@settings(max_examples=100, deadline=None)
@given(plans(), st.integers(0, 200))
def test_equal_tasks_of_mixed_batches_are_within_one_query_after_any_step(drawn, step):
    tasks = len(drawn.sizes)
    drawn = dataclasses.replace(drawn, probabilities=(1 / tasks,) * tasks, draws="stratified", composition="mixed")
    before = drawn_before(drawn, step)
    assert before.sum() == step * drawn.queries
    assert np.abs(before * tasks - step * drawn.queries).max() < tasks


@settings(max_examples=150, deadline=None)
@given(plans(), st.integers(0, 60))
def test_unequal_tasks_of_mixed_batches_are_within_three_queries_in_the_first_steps(drawn, step):
    drawn = dataclasses.replace(drawn, draws="stratified", composition="mixed")
    due = np.array(drawn.probabilities) * step * drawn.queries
    # N times the discrepancy of the golden sequence over all intervals is 2.50 at most for N <= 60, 6.2 for a million
    assert np.abs(drawn_before(drawn, step) - due).max() <= 2.51


def test_a_share_of_next_to_nothing_waits_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert task_schedule(plan((9, 9, 9), (1.0, 1e-310, 0.0)), 100).tolist() == [0] * 100


def test_numbers_that_wrap_round_are_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(batch_at(plan(seed=2**63 - 1), 5)) == 4


@settings(max_examples=150, deadline=None)
@given(plans(), st.integers(0, 60))
def test_a_stratified_mixed_batch_has_the_expected_counts_rounded_down_or_up(drawn, step):
    drawn = dataclasses.replace(drawn, draws="stratified", composition="mixed")
    due = np.array(drawn.probabilities) * drawn.queries
    counts = task_counts(drawn, step)
    assert counts.sum() == drawn.queries
    assert (counts >= np.floor(due - 1e-6)).all() and (counts <= np.ceil(due + 1e-6)).all()


@pytest.mark.parametrize("queries", [10**6, 10**9])
def test_a_mixed_batch_has_its_size_whatever_the_rounding_of_many_shares(queries):
    for seed in range(40):
        weights = np.random.default_rng(seed).random(100 + 10 * seed) ** 8
        weights[-1] = 0.0
        large = plan((9,) * len(weights), tuple(weights / weights.sum()), queries, composition="mixed")
        for step in range(5):
            counts = task_counts(large, step)
            assert counts.sum() == queries and counts.min() >= 0 and counts[-1] == 0


@settings(max_examples=100, deadline=None)
@given(plans(), st.integers(0, 200))
def test_drawn_before_is_the_sum_of_all_counts_before(drawn, step):
    counts = [task_counts(drawn, s) for s in range(step)]
    assert drawn_before(drawn, step).tolist() == np.sum(counts, axis=0, initial=0).astype(int).tolist() or (
        step == 0 and not drawn_before(drawn, step).any()
    )


def test_a_task_of_no_probability_is_never_drawn():
    for composition in ("mixed", "homogeneous"):
        for draws in ("stratified", "independent"):
            some = plan((5, 0, 3), (0.4, 0.0, 0.6), 8, composition=composition, draws=draws)
            assert drawn_before(some, 100)[1] == 0


def test_independent_draws_vary_about_their_expectation():
    mixed = plan((9,) * 4, (0.25,) * 4, 40, composition="mixed", draws="independent")
    counts = np.array([task_counts(mixed, step) for step in range(500)])
    assert counts.sum(1).tolist() == [40] * 500
    assert counts.var(0) == pytest.approx(40 * 0.25 * 0.75, rel=0.25)  # a binomial's
    assert counts.mean(0) == pytest.approx(10, abs=0.5)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"sizes": (5,)}, "1 sizes for 2 probabilities"),
        ({"sizes": (), "probabilities": ()}, "0 sizes for 0 probabilities"),
        *(
            (fault, "a batch needs queries >= 1 and probabilities >= 0 that sum to 1")
            for fault in [
                *({"queries": 0}, {"probabilities": (0.5, 0.4)}, {"probabilities": (0.5, 0.500002)}),
                *({"probabilities": (1.5, -0.5)}, {"probabilities": (float("nan"), 0.5)}),
            ]
        ),
        ({"sizes": (5, 0)}, "task 1 has no rows but the probability 0.5"),
    ],
)
def test_an_impossible_plan_is_refused(fault, words):
    with pytest.raises(ValueError, match=f"^{words}$"):
        plan(**fault)


def test_probabilities_may_sum_to_one_as_published_weights_do():
    for draws in ("stratified", "independent"):
        for composition in ("homogeneous", "mixed"):
            some = plan(probabilities=(0.5, 0.5000009), draws=draws, composition=composition)
            assert len(batch_at(some, 0)) == 4
    assert task_counts(plan(probabilities=(0.0, 1.0), sizes=(0, 3), composition="mixed"), 5).tolist() == [0, 4]


# ---- rows ----


def rows_by_task(drawn, steps):
    """The rows that each task gave, in order of use: {task: [(visit, row), ...]}."""
    used = {}
    for step in range(steps):
        batch = batch_at(drawn, step)
        for task, row, visit in zip(batch.task_B, batch.row_B, batch.visit_B, strict=True):
            used.setdefault(int(task), []).append((int(visit), int(row)))
    return used


def test_every_row_comes_once_an_epoch_and_each_epoch_has_another_order():
    alone = plan(sizes=(40,), probabilities=(1.0,), queries=8)
    epochs = [[row for step in range(5 * e, 5 * e + 5) for row in batch_at(alone, step).row_B] for e in range(3)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


@settings(max_examples=100, deadline=None)
@given(plans(), st.integers(1, 30))
def test_a_row_is_used_again_only_after_all_others_of_its_task(drawn, steps):
    for task, used in rows_by_task(drawn, steps).items():
        size = drawn.sizes[task]
        for visit in {visit for visit, _ in used}:
            rows = [row for v, row in used if v == visit]
            assert len(set(rows)) == len(rows) and set(rows) <= set(range(size))
            assert len(rows) == size or visit == max(v for v, _ in used)


def test_a_batch_larger_than_its_task_holds_every_row_as_often_to_within_one():
    batch = batch_at(plan(sizes=(3,), probabilities=(1.0,), queries=8), 0)
    assert sorted(np.bincount(batch.row_B)) == [2, 3, 3]
    assert sorted(batch.visit_B.tolist()) == [0, 0, 0, 1, 1, 1, 2, 2]


@settings(max_examples=60, deadline=None)
@given(plans(), st.lists(st.integers(0, 50), min_size=2, max_size=6))
def test_a_batch_does_not_depend_on_what_was_asked_before(drawn, steps):
    first = {step: batch_at(drawn, step) for step in steps}
    for kept in (batching._schedule, batching._block_sums):
        kept.cache_clear()
    again = {step: batch_at(drawn, step) for step in sorted(steps, reverse=True)}
    assert all(equal(first[step], again[step]) for step in steps)


@settings(max_examples=60, deadline=None)
@given(plans(), st.integers(0, 20), st.integers(1, 9))
def test_the_shards_of_any_number_of_ranks_make_up_the_batch(drawn, step, world):
    batch = batch_at(drawn, step)
    shards = [batch.shard(rank, world) for rank in range(world)]
    assert np.concatenate([batch.row_B[shard] for shard in shards]).tolist() == batch.row_B.tolist()
    lengths = [shard.stop - shard.start for shard in shards]
    assert max(lengths) - min(lengths) <= 1 and sum(lengths) == len(batch)


def test_seeds_and_tasks_have_orders_of_their_own():
    def rows(seed, tasks=1, task=0):
        one = plan((1000,) * tasks, (1 / tasks,) * tasks, 100 * tasks, seed=seed, composition="mixed")
        batch = batch_at(one, 0)
        return batch.row_B[batch.task_B == task].tolist()

    assert sorted(rows(1)) != sorted(rows(2))
    assert sorted(rows(1, 2, 0)) != sorted(rows(1, 2, 1))


def test_the_tasks_of_a_mixed_batch_are_spread_over_the_ranks():
    batch = batch_at(plan((500,) * 4, (0.25,) * 4, 400, composition="mixed"), 0)
    for rank in range(4):
        counts = np.bincount(batch.task_B[batch.shard(rank, 4)], minlength=4)
        assert counts.min() > 10  # 25 expected; 0 and 100 if they stood in order


def test_who_draws_by_changing_probabilities_takes_rows_in_the_same_order():
    mixed = plan((9, 9), (0.5, 0.5), 6, composition="mixed")
    batch = assemble(mixed, 3, np.array([6, 0]), np.array([4, 0]))
    assert len(batch) == 6 and set(batch.task_B) == {0}
    assert sorted(zip(batch.visit_B.tolist(), batch.row_B.tolist(), strict=True))[:5] == sorted(
        (0, int(row)) for row in set(range(9)) - {row for _, row in rows_by_task_at(mixed, range(4))}
    )


def rows_by_task_at(drawn, draws):
    """The rows of the first draws of task 0."""
    batch = assemble(drawn, 0, np.array([len(draws), 0]), np.array([draws[0], 0]))
    return list(zip(batch.visit_B.tolist(), batch.row_B.tolist(), strict=True))


def test_ten_million_rows_cost_what_a_thousand_cost():
    peaks = []
    for size in (10**3, 10**7):
        large = plan((size, size), (0.5, 0.5), 512)
        batch_at(large, 1)  # the schedule is kept
        tracemalloc.start()
        batch = batch_at(large, 0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert batch.row_B.max() > 0.9 * size
    assert peaks[1] < 2 * peaks[0] < 2_000_000


def test_a_late_step_is_reached_at_once_and_rows_stay_in_range():
    late = plan((10**7, 3), (0.5, 0.5), 2048)
    batch = batch_at(late, 100_000)
    assert len(batch) == 2048 and batch.row_B.min() >= 0
    assert (batch.row_B < np.array(late.sizes)[batch.task_B]).all()


# ---- the permutation ----


def test_permuted_is_a_permutation_of_every_size():
    for size in range(1, 201):
        for key in (0, 1, 2**62 + 5):
            assert sorted(permuted(np.arange(size), size, key)) == list(range(size))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**63 - 1))
def test_permuted_is_a_permutation_for_any_key(size, key):
    assert len(np.unique(permuted(np.arange(size), size, key))) == size


def test_permuted_leaves_its_argument_alone():
    index = np.arange(10, dtype=np.uint64)
    permuted(index, 10, 3)
    assert index.tolist() == list(range(10))


@pytest.mark.parametrize("size", [7, 16, 50])
def test_permuted_sends_every_place_everywhere_equally_often(size):
    keys = 100 * size
    images = np.stack([permuted(np.arange(size), size, key) for key in range(keys)])
    for place in (0, 1, size - 1):
        counts = np.bincount(images[:, place], minlength=size)
        assert stats.chisquare(counts).pvalue > 1e-4  # fixed keys: the same answer in every run
    pairs = np.bincount(images[:, 0] * size + images[:, 1], minlength=size * size)
    pairs = pairs[~np.eye(size, dtype=bool).ravel()]
    assert stats.chisquare(pairs).pvalue > 1e-4


# ---- passages ----


def passages_of(row, visits, *, positives, negatives, wanted):
    """The passages of one row at its visits 0, 1, 2 ..."""
    visit_V = np.arange(visits)
    found = choose_passages(
        plan(),
        np.zeros_like(visit_V),
        np.full_like(visit_V, row),
        visit_V,
        positives_B=np.full_like(visit_V, positives),
        negatives_B=np.full_like(visit_V, negatives),
        wanted=wanted,
    )
    return list(zip(*found, strict=True))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5), st.integers(0, 12), st.integers(0, 5), st.integers(0, 10**6))
def test_passages_are_all_used_before_any_is_used_again(positives, negatives, wanted, row):
    visits = positives * max(1, negatives)
    chosen = passages_of(row, visits, positives=positives, negatives=negatives, wanted=wanted)
    assert np.ptp(np.bincount([positive for positive, _ in chosen], minlength=positives)) == 0
    assert all(len(found) == len(set(found)) == min(wanted, negatives) for _, found in chosen)
    if negatives > wanted > 0:
        in_order = np.concatenate([found for _, found in chosen])
        for start in range(0, len(in_order) - negatives + 1, negatives):
            assert sorted(in_order[start : start + negatives]) == list(range(negatives))


def test_rows_begin_their_cycle_of_passages_at_different_places():
    firsts = [passages_of(row, 1, positives=4, negatives=9, wanted=1)[0] for row in range(400)]
    assert np.bincount([positive for positive, _ in firsts], minlength=4).min() > 60
    assert np.bincount([int(found[0]) for _, found in firsts], minlength=9).min() > 20


def test_rows_chosen_together_are_those_chosen_one_by_one():
    rng = np.random.default_rng(4)
    task_B, row_B, visit_B = rng.integers(0, 9, (3, 50))
    counts = {"positives_B": rng.integers(1, 5, 50), "negatives_B": rng.integers(0, 20, 50)}
    positive_B, negatives = choose_passages(plan(), task_B, row_B, visit_B, **counts, wanted=7)
    for i in range(50):
        one = {name: count_B[i : i + 1] for name, count_B in counts.items()}
        alone = choose_passages(plan(), *(x[i : i + 1] for x in (task_B, row_B, visit_B)), **one, wanted=7)
        assert alone[0][0] == positive_B[i] and alone[1][0].tolist() == negatives[i].tolist()


# a run that began in an older version must find its batches in a newer one


@pytest.mark.parametrize(
    ("composition", "draws", "task_B", "row_B", "visit_B"),
    [
        ("mixed", "stratified", [2, 0, 0, 1, 0], [1, 13, 38, 17, 3], [14, 6, 6, 5, 6]),
        ("mixed", "independent", [1, 0, 0, 0, 0], [1, 13, 38, 39, 3], [4, 6, 6, 6, 6]),
        ("homogeneous", "stratified", [0] * 5, [34, 39, 13, 14, 38], [6] * 5),
        ("homogeneous", "independent", [0] * 5, [4, 26, 32, 1, 3], [5] * 5),
    ],
)
def test_batches_stay_what_they_were(composition, draws, task_B, row_B, visit_B):
    batch = batch_at(plan((40, 30, 7), (0.5, 0.3, 0.2), 5, composition=composition, draws=draws, seed=1), 100)
    assert batch.task_B.tolist() == task_B
    assert batch.row_B.tolist() == row_B
    assert batch.visit_B.tolist() == visit_B
    assert batch.task_B.dtype == batch.row_B.dtype == batch.visit_B.dtype == np.int64


def test_schedules_stay_what_they_were():
    def first(draws):
        return task_schedule(plan((40, 30, 7), (0.5, 0.3, 0.2), 5, draws=draws, seed=1), 16).tolist()

    few = task_schedule(plan((9,) * 3, (0.7, 0.2, 0.1)), 20).tolist()
    assert few == [0, 0, 1, 0, 0, 2, 0, 0, 1, 0, 0, 0, 1, 0, 0, 2, 0, 0, 1, 0]
    many = task_schedule(plan((9,) * 500, tuple(next(awkward_shares()).tolist())), 3000)
    assert hashlib.sha256(many.astype("<i8").tobytes()).hexdigest().startswith("7eb7109cfca83480")
    # tasks of one deadline, in the order of the seed
    assert task_schedule(plan((9,) * 6, (1 / 6,) * 6), 12).tolist() == [3, 1, 0, 5, 2, 4] * 2
    assert first("stratified") == [0, 1, 0, 2, 0, 1, 0, 2, 1, 0, 0, 1, 0, 2, 0, 1]
    assert first("independent") == [2, 1, 1, 0, 0, 1, 2, 2, 2, 0, 0, 0, 0, 2, 1, 0]


def test_permutations_stay_what_they_were():
    assert [permuted(np.arange(size), size, 5).tolist() for size in (2, 4)] == [[1, 0], [3, 2, 0, 1]]
    expected = [1, 2, 11, 0, 8, 9, 15, 12, 13, 7, 4, 5, 3, 10, 14, 6]
    assert permuted(np.arange(16), 16, 5).tolist() == expected


def test_chosen_passages_stay_what_they_were():
    counts = {"positives_B": np.array([1, 3, 4, 1]), "negatives_B": np.array([5, 9, 2, 4])}
    rows = (np.array([0, 1, 1, 1]), np.array([3, 0, 2, 1]), np.array([0, 4, 9, 2]))
    positive_B, negatives = choose_passages(plan(), *rows, **counts, wanted=4)
    assert positive_B.tolist() == [0, 0, 3, 0] and positive_B.dtype == np.int64
    assert [found.tolist() for found in negatives] == [[0, 1, 3, 4], [5, 0, 2, 8], [0, 1], [0, 1, 2, 3]]


@pytest.mark.parametrize("draws", ["stratified", "independent"])
@pytest.mark.parametrize("composition", ["mixed", "homogeneous"])
def test_a_late_batch_costs_no_more_work_than_an_early_one(composition, draws, monkeypatch):
    asked = []
    counts = batching.task_counts
    monkeypatch.setattr(batching, "task_counts", lambda plan, step: asked.append(step) or counts(plan, step))
    some = plan((50, 60), (0.3, 0.7), 4, composition=composition, draws=draws, seed=77)
    batch_at(some, 1000)
    asked.clear()
    for step in range(1000, 1128):
        batch_at(some, step)
    assert len(asked) <= 128 * 66
