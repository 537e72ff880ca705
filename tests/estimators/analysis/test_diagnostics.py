"""Variance decomposition and signal-to-noise ratio, against a toy with known answers."""

import pytest
import torch

from totalprop.estimators.analysis.diagnostics import (
    GradientStatistics,
    gradient_statistics,
    statistics_of,
)

F64 = torch.float64


def test_hand_numbers_one_start():
    """Gradients (0, 2), (2, 4): mean (1, 3), variances 2 + 2, signal 10 - 4/2 = 8, ESNR 8/4."""
    found = statistics_of(torch.tensor([[[0.0, 2.0], [2.0, 4.0]]], dtype=F64))
    assert found.mean.tolist() == [1.0, 3.0]
    assert found.within == pytest.approx(4.0)
    assert found.esnr == pytest.approx(2.0)
    assert found.between != found.between  # nan: one start gives no variance between starts


def test_hand_numbers_two_starts():
    """Starts (0, 2) and (4, 8), P = 1: within (2 + 8)/2, means 1 and 6, between 12.5 - 5/2."""
    found = statistics_of(torch.tensor([[[0.0], [2.0]], [[4.0], [8.0]]], dtype=F64))
    assert found.mean.tolist() == [3.5]
    assert found.within == pytest.approx(5.0)
    assert found.between == pytest.approx(10.0)
    assert found.total == pytest.approx(15.0)
    assert found.esnr == pytest.approx(((1 - 1) / 2 + (36 - 4) / 8) / 2)


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


def test_esnr_of_pure_noise_is_zero_in_the_mean():
    """S = 2000, M = 20, seed 2: without the correction it would be 1 / M."""
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(2000, 20, 3, dtype=F64, generator=generator)
    ratios = [statistics_of(one.unsqueeze(0)).esnr for one in noise]
    ratios = torch.tensor(ratios, dtype=F64)
    standard_error = ratios.std() / 2000**0.5
    assert statistics_of(noise).esnr == pytest.approx(float(ratios.mean()))
    assert abs(float(ratios.mean() / standard_error)) <= 4
    assert 10 * standard_error < 1 / 20


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
