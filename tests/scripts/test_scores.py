"""Statistics over seeds and tasks, against numbers computed by hand and closed forms."""

import math

import numpy as np
import pytest
from scipy.stats import t as student_t
from scipy.stats import trim_mean

from totalprop.scripts.studies import scores


def test_the_interquartile_mean_is_that_of_the_middle_half_of_all_runs():
    assert scores.iqm([np.array([-100.0, 1, 2, 3]), np.array([4.0, 5, 6, 100])]) == 3.5
    assert scores.iqm([np.array([0.0, 1, 5])]) == 2  # of fewer than 4 the mean


@pytest.mark.parametrize("n", [1, 3, 4, 5, 11])
def test_the_interquartile_mean_is_scipys(n):
    values = np.random.default_rng(n).normal(size=(n, 6))
    np.testing.assert_allclose(scores.iqm([values]), trim_mean(values, 0.25), rtol=1e-12)


def test_the_median_is_that_of_the_means_of_the_tasks():
    tasks = [np.array([0.0, 1]), np.array([0.2, 0.2, 0.2]), np.array([10.0])]
    assert scores.median(tasks) == 0.5


def test_the_optimality_gap_counts_nothing_beyond_1():
    assert scores.optimality_gap([np.array([0.5, 3]), np.array([0, 1])]) == pytest.approx(0.375)


def test_a_profile_is_the_mean_over_tasks_of_the_share_above():
    tasks = [np.array([0.1, 0.5]), np.array([0.5, 0.7, 0.8, 0.9])]
    found = scores.profile(tasks, np.array([0.0, 0.1, 0.5, 0.8, 1]))
    np.testing.assert_allclose(found, [1, 0.75, 0.375, 0.125, 0])


def test_the_bootstrap_draws_seeds_within_each_task():
    """Two tasks of constant scores have no spread, however different the tasks are."""

    def mean(tasks):
        return np.concatenate(tasks).mean()

    assert np.ptp(scores.bootstrap([np.full(3, 0.1), np.full(3, 0.9)], mean)) < 1e-12
    tasks = [np.random.default_rng(i).normal(size=20) for i in range(2)]
    spread = scores.bootstrap(tasks, mean).std()
    expected = math.sqrt(sum(own.var() for own in tasks) / 20) / 2  # of the mean of both
    assert spread == pytest.approx(expected, rel=4 / math.sqrt(2 * scores.DRAWS))


@pytest.mark.parametrize("n", [8, 20])
def test_the_interval_of_a_mean_covers_as_often_as_theory_says(n):
    """1000 problems of n normal scores, seed n, within 4 standard errors.

    The interval is the mean ± 1.96 times its plug-in standard error, nearly, so it covers where
    Student's t with n - 1 degrees of freedom is within 1.96 √((n - 1) / n).
    """
    problems = 1000
    values = np.random.default_rng(n).normal(size=(n, problems))
    low, high = scores.interval([values], lambda tasks: tasks[0].mean(0))
    expected = 1 - 2 * student_t.sf(1.96 * math.sqrt((n - 1) / n), n - 1)
    error = math.sqrt(expected * (1 - expected) / problems)
    assert ((low <= 0) & (high >= 0)).mean() == pytest.approx(expected, abs=4 * error)


def test_the_interval_of_few_seeds_covers_what_the_help_says():
    """IQM of 2000 problems of 4 and 8 normal scores: 88 % and 93 %, within 4 standard errors."""
    for n, expected in ((4, 0.88), (8, 0.93)):
        values = np.random.default_rng(n).normal(size=(n, 2000))
        low, high = scores.interval([values], scores.iqm)
        error = math.sqrt(expected * (1 - expected) / 2000)
        assert ((low <= 0) & (high >= 0)).mean() == pytest.approx(expected, abs=4 * error)


@pytest.mark.parametrize(("successes", "runs"), [(4, 5), (0, 5), (5, 5), (99, 100)])
def test_the_interval_of_a_rate_is_wilsons(successes, runs):
    """Wilson 1927: (p + z²/2n ± z √(p (1 - p) / n + z²/4n²)) / (1 + z²/n)."""
    z, p = 1.959964, successes / runs
    middle, scale = p + z**2 / (2 * runs), 1 + z**2 / runs
    half = z * math.sqrt(p * (1 - p) / runs + z**2 / (4 * runs**2))
    found = scores.rate_of(successes, runs)
    expected = ((middle - half) / scale, (middle + half) / scale)
    assert (found.low, found.high) == pytest.approx(expected, abs=1e-6)
    assert 0 <= found.low <= found.rate <= found.high <= 1
