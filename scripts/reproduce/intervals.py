"""Intervals of what the claims of the papers are about, at any level."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats
from scipy.stats import binomtest

from totalprop.scripts.reproduce.verdicts import Interval, Part

DRAWS = 4000  # of a bootstrap
UNSEEN = 2.0  # log10 of how much larger a variance may be that is mostly that of one repeat


def ratio_of_variances(
    what: str, points: Sequence[tuple[np.ndarray, np.ndarray]], *, paired: bool = True
) -> Part:
    """log10 of the ratio of two variances, the first over the second: its mean over the points.

    The interval is the jackknife's over the repeats, with Student's t. (The bootstrap's is too
    narrow: gradients have heavy tails, and a resample often lacks the repeat that makes most of a
    variance.) Where one repeat makes more than half of a variance, its tail has hardly been seen:
    the true one may be a hundred times larger, and the interval reaches that much further.

    Args:
        what: names the part.
        points: [R] gradients of both at each point.
        paired: whether the repeats of both belong together.
    """
    estimates, squared_errors, further = [], [], np.zeros(2)
    for pair in points:
        first, second = (_log_variance(own[None])[0] for own in pair)
        estimates.append(first - second)
        without = [_log_variance(_each_left_out(own)) for own in pair]
        parts = [without[0] - without[1]] if paired else without
        squared_errors += [(len(own) - 1) * own.var() for own in parts]
        further += [UNSEEN / len(points) if _is_dominated(own) else 0.0 for own in pair]
    estimate = float(np.mean(estimates))
    error = math.sqrt(sum(squared_errors)) / len(points)
    freedom = min(len(own) for pair in points for own in pair) - 1

    def interval(level: float) -> Interval:
        half = float(stats.t.ppf((1 + level) / 2, freedom)) * error
        return float(estimate - half - further[1]), float(estimate + half + further[0])

    return Part(what, estimate, interval)


def _each_left_out(values: np.ndarray) -> np.ndarray:
    """[R, R - 1] of [R] values, each row without one of them."""
    n = len(values)
    return np.broadcast_to(values, (n, n))[~np.eye(n, dtype=bool)].reshape(n, n - 1)


def _is_dominated(values: np.ndarray) -> bool:
    """Whether one of [R] values makes more than half of their variance."""
    distances = np.abs(values - values.mean())
    shares = np.square(distances / max(distances.max(), np.finfo(float).tiny))
    return bool(shares.max() > 0.5 * shares.sum())


def _log_variance(rows: np.ndarray) -> np.ndarray:
    """[D] log10 of the variance of each row of [D, R]; huge numbers do not overflow."""
    deviation = rows - rows.mean(1, keepdims=True)
    scale = np.maximum(np.abs(deviation).max(1, keepdims=True), np.finfo(float).tiny)
    squares = np.square(deviation / scale).sum(1) / (rows.shape[1] - 1)
    return np.log10(np.maximum(squares, np.finfo(float).tiny)) + 2 * np.log10(scale[:, 0])


def bootstrapped(
    what: str, groups: Sequence[np.ndarray], statistic: Callable[[Sequence[np.ndarray]], float]
) -> Part:
    """A statistic of groups of rows [n, ...], whose rows are drawn with replacement."""
    generator = np.random.default_rng(0)
    draws = [
        statistic([own[generator.integers(len(own), size=len(own))] for own in groups])
        for _ in range(DRAWS)
    ]
    return Part(what, float(statistic(groups)), _percentiles(np.array(draws)))


def _percentiles(draws: np.ndarray) -> Callable[[float], Interval]:
    def interval(level: float) -> Interval:
        low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)

    return interval


def difference_of_means(
    what: str, first: Sequence[np.ndarray], second: Sequence[np.ndarray]
) -> Part:
    """The mean of the first less that of the second, averaged over the tasks.

    The interval is Student's with Welch's degrees of freedom, since there are few seeds.

    Args:
        what: names the part.
        first: [seeds] scores of each task.
        second: the same tasks'.
    """
    estimates = [a.mean() - b.mean() for a, b in zip(first, second, strict=True)]
    samples = [own for pair in zip(first, second, strict=True) for own in pair]
    return _student(what, float(np.mean(estimates)), samples, 1 / len(first))


def mean_of(what: str, values: np.ndarray) -> Part:
    """The mean of [n] numbers, with Student's interval."""
    return _student(what, float(np.mean(values)), [np.asarray(values, float)], 1.0)


def _student(what: str, estimate: float, samples: Sequence[np.ndarray], weight: float) -> Part:
    """A sum of means, each times ± the weight; Welch and Satterthwaite's degrees of freedom."""
    if min(map(len, samples)) < 2:
        return undecided(what, estimate)
    terms = [weight**2 * own.var(ddof=1) / len(own) for own in samples]
    error = math.sqrt(sum(terms))
    below = sum(term**2 / (len(own) - 1) for term, own in zip(terms, samples))
    freedom = sum(terms) ** 2 / below if below else 1.0

    def interval(level: float) -> Interval:
        half = float(stats.t.ppf((1 + level) / 2, freedom)) * error
        return estimate - half, estimate + half

    return Part(what, estimate, interval)


def difference_of_rates(what: str, first: tuple[int, int], second: tuple[int, int]) -> Part:
    """The first success rate less the second, with Newcombe's interval (1998, method 10).

    Args:
        what: names the part.
        first: successes, and runs.
        second: likewise.
    """
    (k, n), (j, m) = first, second
    estimate = k / n - j / m

    def interval(level: float) -> Interval:
        a, b = (binomtest(*own).proportion_ci(level, method="wilson") for own in ((k, n), (j, m)))
        below = math.hypot(k / n - a.low, b.high - j / m)
        above = math.hypot(a.high - k / n, j / m - b.low)
        return estimate - below, estimate + above

    return Part(what, estimate, interval)


def undecided(what: str, estimate: float) -> Part:
    """A number that decides nothing."""
    return Part(what, estimate, lambda level: (-math.inf, math.inf))


def known(what: str, estimate: float, ends: Interval, level: float = 0.95) -> Part:
    """A number whose interval of one level is known; others by that of a normal distribution."""
    halves = (estimate - ends[0], ends[1] - estimate)

    def interval(asked: float) -> Interval:
        scale = float(stats.norm.ppf((1 + asked) / 2) / stats.norm.ppf((1 + level) / 2))
        return estimate - scale * halves[0], estimate + scale * halves[1]

    return Part(what, estimate, interval)
