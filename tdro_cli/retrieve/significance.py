"""Is a difference more than chance? Paired tests over queries or seeds, intervals, correction for many tests.

n paired observations (queries, seeds, or cells of both).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

EXACT_PAIRS = 14  # up to here all 2^n sign patterns are counted instead of drawn
_BLOCK = 1 << 22  # numbers drawn at once: 32 MB of float64


def paired_t_test(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p of the paired t-test of a against b, both [n].

    1 where nothing can be said: n < 2, or no difference at all. Where every difference is the same there is no spread
    to measure it by, and p is the randomisation test's, 2^(1 - n): two seeds that happen to agree prove nothing.
    """
    from scipy import stats

    diff_n = _differences(a, b)
    if diff_n.size < 2 or not diff_n.any():
        return 1.0
    spread = diff_n.std(ddof=1)
    # differences that are equal up to rounding have no spread: t would be a ratio of rounding errors
    if spread <= 1e-12 * abs(diff_n).max():
        return 2.0 ** (1 - diff_n.size)
    t = diff_n.mean() / (spread / np.sqrt(diff_n.size))
    return float(2 * stats.t.sf(abs(t), diff_n.size - 1))


def randomisation_test(a: Sequence[float], b: Sequence[float], *, seed: int = 0, rounds: int = 10_000) -> float:
    """Two-sided p of the paired randomisation (sign-flip) test of the mean difference; a and b are [n].

    Exact over all 2^n sign patterns for n <= 14; otherwise `rounds` patterns are drawn and the observed one is counted
    with them, so that p is never 0. 1 for n < 2 or no difference at all.
    """
    diff_n = _differences(a, b)
    diff_n = diff_n[diff_n != 0]  # a flip of 0 changes nothing
    if len(a) < 2 or not diff_n.size:
        return 1.0
    # a pattern that only differs from the observed one by rounding counts as extreme
    threshold = abs(diff_n.sum()) - 1e-12 * abs(diff_n).sum()
    if diff_n.size <= EXACT_PAIRS:
        pattern = np.arange(1 << diff_n.size)[:, None] >> np.arange(diff_n.size) & 1
        return float((abs((1 - 2 * pattern) @ diff_n) >= threshold).mean())
    rng = np.random.Generator(np.random.Philox(seed))
    extreme = 0
    for count in _blocks(rounds, diff_n.size):
        # sum of flipped = total - 2 * (sum of those flipped)
        flipped = rng.integers(0, 2, (count, diff_n.size), dtype=np.int8).astype(np.float32) @ diff_n
        extreme += int((abs(diff_n.sum() - 2 * flipped) >= threshold).sum())
    return (extreme + 1) / (rounds + 1)


def bootstrap_interval(
    diff: Sequence[float], *, seed: int = 0, rounds: int = 10_000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `diff` [n]: (low, high). The mean itself, twice, for n < 2."""
    return stratified_bootstrap_interval([diff], seed=seed, rounds=rounds, level=level)


def stratified_bootstrap_interval(
    diffs: Sequence[Sequence[float]],
    *,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    rounds: int = 10_000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the weighted mean of the means of several samples, each resampled by itself.

    `diffs` holds one [n_i] a stratum (a collection); `weights` one number a stratum, equal by default.
    """
    if not diffs or not all(len(diff) for diff in diffs):
        raise ValueError("a bootstrap interval needs at least one observation in every stratum")
    share_c = np.ones(len(diffs)) if weights is None else np.asarray(weights, dtype=np.float64)
    rng = np.random.Generator(np.random.Philox(seed))
    total_r = np.zeros(rounds)
    for share, diff in zip(share_c / share_c.sum(), diffs, strict=True):
        total_r += share * _resampled_means(np.asarray(diff, dtype=np.float64), rng, rounds)
    return _percentiles(total_r, level)


def two_level_interval(
    strata: Sequence[Sequence[Sequence[float]]],
    *,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    rounds: int = 10_000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Bootstrap interval of the weighted mean of the strata's means, with both seeds and queries resampled.

    A stratum (a collection) is diff_SN: seeds S, which all strata share, and queries N of its own. Wider than over
    queries alone by what a change of seed does.
    """
    diffs = [np.asarray(diff_SN, dtype=np.float64) for diff_SN in strata]
    num_seeds = diffs[0].shape[0]
    share_c = np.ones(len(diffs)) if weights is None else np.asarray(weights, dtype=np.float64)
    rng = np.random.Generator(np.random.Philox(seed))
    drawn_rS = _resampled_shares(rng, num_seeds, rounds)
    total_r = np.zeros(rounds)
    for share, diff_SN in zip(share_c / share_c.sum(), diffs, strict=True):
        start = 0
        for count in _blocks(rounds, diff_SN.shape[1]):
            part = slice(start, start + count)
            drawn_rN = _resampled_shares(rng, diff_SN.shape[1], count)
            total_r[part] += share * ((drawn_rS[part] @ diff_SN) * drawn_rN).sum(1)
            start += count
    return _percentiles(total_r, level)


def _resampled_shares(rng: np.random.Generator, size: int, rounds: int) -> np.ndarray:
    """What share each of `size` things has of a sample with replacement: [rounds, size]."""
    return rng.multinomial(size, np.full(size, 1 / size), rounds) / size


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction for testing several hypotheses at once, in the given order."""
    p_m = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p_m, kind="stable")
    stepped = np.maximum.accumulate(p_m[order] * np.arange(p_m.size, 0, -1))
    corrected = np.empty_like(p_m)
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected.tolist()


def _differences(a: Sequence[float], b: Sequence[float]) -> np.ndarray:
    a_n, b_n = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a_n.shape != b_n.shape or a_n.ndim != 1:
        raise ValueError(f"paired tests need two lists of the same length, got {a_n.shape} and {b_n.shape}")
    return a_n - b_n


def _resampled_means(value_n: np.ndarray, rng: np.random.Generator, rounds: int) -> np.ndarray:
    if value_n.size < 2 or (value_n == value_n[0]).all():
        return np.full(rounds, value_n.mean())
    blocks = _blocks(rounds, value_n.size)
    return np.concatenate([value_n[rng.integers(0, value_n.size, (n, value_n.size))].mean(1) for n in blocks])


def _percentiles(mean_r: np.ndarray, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    low, high = np.quantile(mean_r, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _blocks(rounds: int, width: int) -> list[int]:
    """`rounds` cut into counts such that count * width stays within the memory set aside."""
    size = max(1, _BLOCK // max(1, width))
    return [min(size, rounds - start) for start in range(0, rounds, size)]
