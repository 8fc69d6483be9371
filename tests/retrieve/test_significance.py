import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tdro_cli.retrieve import significance
from tdro_cli.retrieve.significance import (
    bootstrap_interval,
    holm,
    paired_t_test,
    randomisation_test,
    stratified_bootstrap_interval,
    two_level_interval,
)

A = np.random.default_rng(0).normal(0.5, 0.2, 40)
B = np.random.default_rng(1).normal(0.45, 0.2, 40)


def test_t_test_equals_scipy():
    assert paired_t_test(A, B) == pytest.approx(stats.ttest_rel(A, B).pvalue, rel=1e-12)


def test_t_test_of_a_hand_number():
    # differences 1, 2, 3: mean 2, spread 1, t = 2 sqrt(3) = 3.4641 with 2 degrees of freedom
    assert paired_t_test([2, 4, 6], [1, 2, 3]) == pytest.approx(0.07418, abs=1e-5)


@pytest.mark.parametrize("a, b", [([], []), ([1.0], [0.0]), ([0.3, 0.7], [0.3, 0.7])])
def test_nothing_to_test_gives_p_of_one(a, b):
    assert paired_t_test(a, b) == 1.0
    assert randomisation_test(a, b) == 1.0


@pytest.mark.parametrize("n", [2, 3, 40])
def test_a_constant_difference_is_as_sure_as_its_signs(n):
    a, b = [0.3 + 0.01 * i for i in range(n)], [0.2 + 0.01 * i for i in range(n)]
    assert paired_t_test(a, b) == 2.0 ** (1 - n)
    assert n > 14 or paired_t_test(a, b) == randomisation_test(a, b)


def test_exact_randomisation_of_hand_numbers():
    # of the 8 sign patterns of 1, 2, 3 only +++ and --- reach a sum of 6
    assert randomisation_test([1, 2, 3], [0, 0, 0]) == 2 / 8
    # sums of +-1 +-1 +-2: |4| twice, |2| four times, |0| twice; the observed 2 is reached by six of eight
    assert randomisation_test([1, -1, 2], [0, 0, 0]) == 6 / 8


def test_drawn_randomisation_agrees_with_the_exact_test(monkeypatch):
    a, b = A[:12], B[:12]
    exact = randomisation_test(a, b)
    by_scipy = stats.permutation_test((a - b,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
    assert exact == pytest.approx(by_scipy, abs=1e-12)
    monkeypatch.setattr(significance, "EXACT_PAIRS", 0)
    assert randomisation_test(a, b, rounds=40_000) == pytest.approx(exact, abs=0.01)


def test_drawn_randomisation_is_reproducible_and_never_zero():
    assert randomisation_test(A, B, seed=3) == randomisation_test(A, B, seed=3)
    assert randomisation_test(A + 5, B, rounds=999) == 1 / 1000


def test_bootstrap_interval_is_near_the_normal_one():
    diff = A - B
    low, high = bootstrap_interval(diff)
    half = 1.96 * diff.std() / np.sqrt(diff.size)
    assert low == pytest.approx(diff.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(diff.mean() + half, abs=0.1 * half)


def test_bootstrap_of_one_observation_is_that_observation():
    assert bootstrap_interval([0.25]) == (0.25, 0.25)


def test_bootstrap_refuses_an_empty_sample():
    with pytest.raises(ValueError, match="at least one observation"):
        bootstrap_interval([])


def test_strata_are_weighted_as_asked():
    assert stratified_bootstrap_interval([[1, 1], [5, 5, 5]], weights=[3, 1]) == (2.0, 2.0)


def test_interval_over_seeds_too_is_wider_when_seeds_disagree():
    rng = np.random.default_rng(0)
    query_n = rng.normal(0, 0.02, 100)
    diff_SN = np.array([[0.05], [-0.05], [0.02]]) + query_n
    low, high = two_level_interval([diff_SN])
    queries_low, queries_high = bootstrap_interval(diff_SN.mean(0))
    assert high - low > 3 * (queries_high - queries_low)


def test_holm_of_a_hand_example():
    # 0.01*4, 0.02*3, 0.03*2 raised to the 0.06 before it, 0.5
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_lies_between_p_and_bonferroni_and_keeps_the_order(p_values):
    corrected = holm(p_values)
    for p, q in zip(p_values, corrected, strict=True):
        assert p <= q <= min(1.0, p * len(p_values)) + 1e-12
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(np.array(corrected)[order]) >= 0).all()


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=30))
def test_tests_are_symmetric_in_their_arguments(pairs):
    a, b = zip(*pairs, strict=True)
    assert randomisation_test(a, b, rounds=200) == randomisation_test(b, a, rounds=200)
    assert paired_t_test(a, b) == pytest.approx(paired_t_test(b, a))
