import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdro_cli.learn.schedules import learning_rate

PAPER = dict(peak=1e-4, steps=1000, warmup_steps=100, min_ratio=0.1)


def test_warm_up_is_linear_from_zero():
    assert [learning_rate(step, **PAPER) for step in (0, 50, 100)] == pytest.approx([0, 0.5e-4, 1e-4])


def test_cosine_is_half_way_in_the_middle_and_a_tenth_at_the_end():
    assert learning_rate(550, **PAPER) == pytest.approx(0.55e-4)
    assert learning_rate(1000, **PAPER) == pytest.approx(1e-5)
    assert learning_rate(325, **PAPER) == pytest.approx(1e-4 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))))


def test_linear_and_constant():
    assert learning_rate(550, **PAPER, name="linear") == pytest.approx(0.55e-4)
    assert learning_rate(325, **PAPER, name="linear") == pytest.approx(0.775e-4)
    assert learning_rate(999, **PAPER, name="constant") == 1e-4


def test_past_the_end_it_stays_at_the_minimum():
    assert learning_rate(5000, **PAPER) == pytest.approx(1e-5)


def test_all_warm_up_ends_at_the_peak():
    assert learning_rate(10, peak=1.0, steps=10, warmup_steps=10) == 1.0


@given(
    step=st.integers(0, 200),
    warmup=st.integers(0, 100),
    ratio=st.floats(0, 1),
    name=st.sampled_from(["constant", "linear", "cosine"]),
)
def test_never_above_the_peak_and_after_warm_up_never_rising_nor_below_the_minimum(step, warmup, ratio, name):
    def rate(step):
        return learning_rate(step, peak=2.0, steps=100, warmup_steps=warmup, min_ratio=ratio, name=name)

    assert 0 <= rate(step) <= 2.0 + 1e-12
    if step >= warmup:
        assert rate(step) >= 2.0 * ratio - 1e-12
        assert rate(step + 1) <= rate(step) + 1e-12


@pytest.mark.parametrize(
    "wrong", [{"name": "cosin"}, {"warmup_steps": 1001}, {"min_ratio": 1.5}, {"step": -1}, {"warmup_steps": -1}]
)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)) if "name" not in wrong else "no schedule 'cosin'"):
        learning_rate(**({"step": 0} | PAPER | wrong))
