"""Statistics of runs over seeds and tasks, as Agarwal et al. 2021 (arXiv 2108.13264) advise.

Scores are one array per task, whose first axis are the seeds: [seeds, ...].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binomtest

Scores = Sequence[np.ndarray]  # of each task
DRAWS = 2000  # of the bootstrap
MIN_RUNS = 4  # from which on there is an interval, and the interquartile mean leaves something out


def iqm(scores: Scores) -> Any:
    """Interquartile mean: the mean of the middle half of all runs (Agarwal et al. 2021, Sec. 4.3).

    Of fewer than 4 runs it is the mean.
    """
    runs = np.sort(np.concatenate(scores), axis=0)
    cut = len(runs) // 4
    return runs[cut : len(runs) - cut].mean(0)  # scipy's trim_mean takes 40 times as long


def median(scores: Scores) -> Any:
    """Median over the tasks of the mean over the seeds."""
    return np.median([own.mean(0) for own in scores], axis=0)


def optimality_gap(scores: Scores) -> Any:
    """By how much the runs miss a score of 1 on average; better ones count as 1."""
    return 1 - np.minimum(np.concatenate(scores), 1).mean(0)


def profile(scores: Scores, thresholds: np.ndarray) -> np.ndarray:
    """Performance profile: the share of runs with a score above each of [M] thresholds.

    The mean over the tasks of the share of seeds (Agarwal et al. 2021, Sec. 4.2).
    """
    return np.mean([(own[:, None] > thresholds).mean(0) for own in scores], axis=0)


def bootstrap(scores: Scores, statistic: Callable[[Scores], Any], draws: int = DRAWS) -> np.ndarray:
    """The statistic of resampled scores: seeds are drawn with replacement within each task.

    Args:
        scores: [seeds, ...] of each task.
        statistic: of the scores of all tasks together.
        draws: number of resamples.
    """
    generator = np.random.default_rng(0)
    return np.array([
        statistic([generator.choice(own, len(own)) for own in scores]) for _ in range(draws)
    ])  # fmt: skip


def interval(scores: Scores, statistic: Callable[[Scores], Any]) -> np.ndarray:
    """The two ends [2, ...] of the statistic's 95 % interval, percentiles of the bootstrap.

    It is too narrow for few seeds: of normal scores, that of the interquartile mean covers 88 %
    with 4 seeds, and 93 % with 8.
    """
    return np.quantile(bootstrap(scores, statistic), [0.025, 0.975], axis=0)


class Rate(NamedTuple):
    """A success rate and its 95 % interval."""

    successes: int
    runs: int
    low: float
    high: float

    @property
    def rate(self) -> float:
        """The share of successes."""
        return self.successes / self.runs


def rate_of(successes: int, runs: int) -> Rate:
    """A rate with its Wilson score interval, which lies in [0, 1] at rates of 0 and 1, too."""
    interval = binomtest(successes, runs).proportion_ci(0.95, method="wilson")
    return Rate(successes, runs, float(interval.low), float(interval.high))
