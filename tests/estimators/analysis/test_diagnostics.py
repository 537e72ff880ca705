"""Variances, signal-to-noise ratio and agreement of gradients, against toys with known answers."""

import math

import pytest
import torch

from totalprop.estimators.analysis.diagnostics import (
    GradientStatistics,
    gradient_statistics,
    mean_difference,
    median_interval,
    signal_to_noise,
    statistics_of,
)

F64 = torch.float64


def test_hand_numbers_one_start():
    """Gradients (0, 2), (2, 4): mean (1, 3), variances 2 + 2. Two give no ratio."""
    found = statistics_of(torch.tensor([[[0.0, 2.0], [2.0, 4.0]]], dtype=F64))
    assert found.mean.tolist() == [1.0, 3.0]
    assert found.within == pytest.approx(4.0)
    assert math.isnan(found.esnr)
    assert math.isnan(found.between)  # one start gives no variance between starts


def test_hand_numbers_two_starts():
    """Starts (0, 2) and (4, 8), P = 1: within (2 + 8)/2, means 1 and 6, between 12.5 - 5/2."""
    found = statistics_of(torch.tensor([[[0.0], [2.0]], [[4.0], [8.0]]], dtype=F64))
    assert found.mean.tolist() == [3.5]
    assert found.within == pytest.approx(5.0)
    assert found.between == pytest.approx(10.0)
    assert found.total == pytest.approx(15.0)


def test_hand_numbers_of_the_ratio():
    """(0, 2, 2, 4), P = 1: mean 2, W = 8/3, 3 degrees of freedom: (1 - 2/3) 4 / (8/3) - 1/4."""
    one = torch.tensor([[0.0], [2.0], [2.0], [4.0]], dtype=F64)
    found = statistics_of(torch.stack([one, one - 2]))
    assert found.snr.tolist() == pytest.approx([0.25, -0.25])
    assert found.esnr == pytest.approx(0.0)


WITHIN = torch.tensor([0.5, 1.0, 2.0], dtype=F64)  # std of each parameter within a start
BETWEEN = torch.tensor([1.0, 0.1, 0.3], dtype=F64)  # std of the means between starts
MEAN = torch.tensor([0.4, -0.2, 0.0], dtype=F64)


def toy(starts, repeats, generator):
    def randn(*shape):
        return torch.randn(*shape, dtype=F64, generator=generator)

    return MEAN + BETWEEN * randn(starts, 1, 3) + WITHIN * randn(starts, repeats, 3)


def test_mean_and_variance_split_are_unbiased():
    """S = 6, M = 3, 4000 repeats, seed 0: each statistic within 4 SE of its exact value."""
    generator = torch.Generator().manual_seed(0)
    found = [statistics_of(toy(6, 3, generator)) for _ in range(4000)]

    def z(values, exact):
        values = torch.tensor(values, dtype=F64)
        standard_error = values.std() / len(values) ** 0.5
        assert standard_error < 0.05
        return float((values.mean() - exact) / standard_error)

    within, between = float(WITHIN.square().sum()), float(BETWEEN.square().sum())
    assert abs(z([f.within for f in found], within)) <= 4
    assert abs(z([f.between for f in found], between)) <= 4
    assert abs(z([f.total for f in found], within + between)) <= 4
    # Without the correction, `between` would be biased by within / M, far more than 4 SE.
    assert abs(z([f.between for f in found], between + within / 3)) > 20
    means = torch.stack([f.mean for f in found])
    error = means.std(0) / len(means) ** 0.5
    assert ((means.mean(0) - MEAN) / error).abs().max() <= 4


def test_esnr_of_a_known_signal():
    """S = 1, M = 2000, P = 3, seed 1: |MEAN|² / Σ WITHIN², within 4 SE by the delta method."""
    generator = torch.Generator().manual_seed(1)
    signal = 5 * MEAN
    noise = torch.randn(1, 2000, 3, dtype=F64, generator=generator)
    found = statistics_of(signal + WITHIN * noise).esnr
    v = WITHIN.square()
    exact = float(signal.square().sum() / v.sum())
    of_signal = 4 * (signal.square() * v).sum() / v.sum() ** 2
    of_noise = exact**2 * 2 * v.square().sum() / v.sum() ** 2
    standard_error = float((of_signal + of_noise) / 2000) ** 0.5
    assert standard_error < 0.05 * exact
    assert abs(found - exact) <= 4 * standard_error


@pytest.mark.parametrize("repeats", [6, 10])  # below 6 its variance is infinite
def test_the_ratio_of_one_parameter_is_unbiased(repeats):
    """S = 40,000, seed 2, mean 1 and std 2: ratio 1/4 within 4 SE; without c it is far above."""
    generator = torch.Generator().manual_seed(2)
    g = 1 + 2 * torch.randn(40_000, repeats, 1, dtype=F64, generator=generator)
    ratios = signal_to_noise(g)
    standard_error = float(ratios.std()) / 200
    assert abs(float(ratios.mean()) - 0.25) <= 4 * standard_error
    plain = g.mean(1).square().sum(-1) / g.var(1).sum(-1) - 1 / repeats
    assert float(plain.mean()) - 0.25 > 4 * float(plain.std()) / 200


@pytest.mark.parametrize("std", [torch.ones(40), torch.linspace(0.1, 3, 40), WITHIN], ids=str)
def test_the_ratio_of_many_parameters_is_nearly_unbiased(std):
    """S = 5000, M = 6, seed 3, mean 1: within 3 % of |mean|² / tr Var, or 4 SE."""
    generator = torch.Generator().manual_seed(3)
    g = 1 + std.double() * torch.randn(5000, 6, len(std), dtype=F64, generator=generator)
    exact = len(std) / float(std.double().square().sum())
    ratios = signal_to_noise(g)
    assert abs(float(ratios.mean()) - exact) <= 4 * float(ratios.std()) / 5000**0.5 + 0.03 * exact


def test_the_ratio_of_pure_noise_is_zero_in_the_mean():
    """S = 2000, M = 20, seed 2: without the correction it would be 1 / M."""
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(2000, 20, 3, dtype=F64, generator=generator)
    found = statistics_of(noise)
    standard_error = float(found.snr.std()) / 2000**0.5
    assert found.esnr == pytest.approx(float(found.snr.mean()))
    assert abs(found.esnr) <= 4 * standard_error
    assert 10 * standard_error < 1 / 20


def test_exploding_gradients_keep_their_ratio():
    """The ratio does not depend on the gradient's scale, although float32 squares overflow."""
    g = 1 + torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(signal_to_noise(g * 2.0**100), signal_to_noise(g))
    assert math.isfinite(statistics_of(g * 2.0**100).within)
    assert mean_difference(g * 2.0**100, g * 0) == pytest.approx(mean_difference(g, g * 0))


def test_equal_means_differ_by_about_one_standard_error():
    """1000 tests of S = 4, M = 6, seed 5, in 1 and in 30 unequal dimensions: mean 0, variance 1."""
    generator = torch.Generator().manual_seed(5)
    for scale in (torch.ones(1), torch.logspace(-2, 1, 30)):
        first, second = torch.randn(2, 1000, 4, 6, len(scale), dtype=F64, generator=generator)
        z = torch.tensor(
            [mean_difference(3 + scale * a, 3 + scale * b) for a, b in zip(first, second)]
        )
        assert abs(float(z.mean())) <= 4 / 1000**0.5
        assert abs(float(z.square().mean()) - 1) <= 4 * float(z.square().std()) / 1000**0.5
        assert float((z > 4).float().mean()) < 0.005


def test_different_means_are_told_apart():
    """Means 3 of their standard errors apart, in each of 4 starts, give more than 4."""
    generator = torch.Generator().manual_seed(6)
    first, second = torch.randn(2, 4, 10, 20, dtype=F64, generator=generator)
    assert mean_difference(first + 3 * (2 / 10) ** 0.5, second) > 4
    assert mean_difference(first, first) == 0.0
    assert mean_difference(first + 1, first) == pytest.approx((4 * 10 * 9 / 2) ** 0.5)


@pytest.mark.parametrize(("n", "j"), [(6, 1), (10, 2), (50, 18)])
def test_the_interval_of_a_median_is_of_order_statistics(n, j):
    """The ranks of the sign test's tables at 95 %."""
    found = median_interval(torch.randperm(n, generator=torch.Generator().manual_seed(7)) + 1.0)
    assert found == ((n + 1) / 2, j, n + 1 - j)


def test_few_values_give_no_interval():
    assert median_interval(torch.tensor([3.0, 1.0, 2.0])) == (2.0, -math.inf, math.inf)


def test_gradient_is_evaluated_repeats_times_at_each_start():
    calls = []

    def gradient(start):
        calls.append(start)
        return torch.tensor([float(start), float(len(calls))], dtype=F64)

    found = gradient_statistics(gradient, repeats=3, starts=2)
    assert calls == [0, 0, 0, 1, 1, 1]
    assert isinstance(found, GradientStatistics)
    assert found.mean.tolist() == [0.5, 3.5]


def test_one_repeat_has_no_variance():
    with pytest.raises(ValueError, match="repeats >= 2, got 1"):
        gradient_statistics(lambda start: torch.zeros(1), repeats=1)


@pytest.mark.parametrize("shape", [(), (2, 2)])
def test_a_gradient_that_is_no_vector_is_refused(shape):
    g = torch.ones(shape)
    with pytest.raises(
        ValueError, match=r"must be \[S, M, P\].*each gradient needs .reshape\(-1\)"
    ):
        gradient_statistics(lambda start: g, repeats=5)
    stacked = g.expand(3, 5, *shape)
    for function in (signal_to_noise, lambda x: mean_difference(x, x)):
        with pytest.raises(ValueError, match=r"must be \[S, M, P\]"):
            function(stacked)
    assert gradient_statistics(lambda start: g.reshape(-1), repeats=5).within == 0
