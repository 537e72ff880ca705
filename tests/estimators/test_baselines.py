"""Baselines: hand-computed numbers, explicit references, and their effect on the LR leg."""

import pytest
import torch

from totalprop.estimators import baselines, make

F64 = torch.float64
RETURNS = torch.tensor([1.0, 3.0, 8.0], dtype=F64)


def test_none_is_zero():
    assert torch.equal(baselines.none(RETURNS, None), torch.zeros(3, dtype=F64))


def test_mean_hand_numbers():
    assert baselines.mean(RETURNS, None).tolist() == [4.0]


def test_leave_one_out_hand_numbers():
    assert baselines.leave_one_out(RETURNS, None).tolist() == [5.5, 4.5, 2.0]


def test_leave_one_out_is_per_column():
    returns = torch.stack((RETURNS, -2 * RETURNS), 1)  # [N, 2]
    expected = torch.tensor([[5.5, -11.0], [4.5, -9.0], [2.0, -4.0]], dtype=F64)
    torch.testing.assert_close(baselines.leave_one_out(returns, None), expected)


def left_out_prediction(value, returns, i):
    """Least squares of returns on [1, value] without sample i, evaluated at i."""
    keep = torch.arange(len(returns)) != i
    design = torch.stack((torch.ones_like(value), value), -1)
    solution = torch.linalg.lstsq(design[keep], returns[keep].unsqueeze(-1)).solution
    return (design[i] @ solution).squeeze()


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e6])
def test_critic_is_explicit_leave_one_out_least_squares(scale):
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(9, 2, dtype=F64, generator=generator)
    returns = scale * (3 * value + torch.randn(9, 2, dtype=F64, generator=generator) - 2)
    found = baselines.critic(returns, value)
    for column in range(2):
        for i in range(9):
            expected = left_out_prediction(value[:, column], returns[:, column], i)
            torch.testing.assert_close(found[i, column], expected, rtol=1e-9, atol=1e-12 * scale)


def test_critic_does_not_see_the_sample_it_predicts():
    value = torch.tensor([0.3, -1.0, 0.5, 2.0], dtype=F64)
    returns = torch.tensor([1.0, 2.0, -1.0, 0.5], dtype=F64)
    moved = returns.clone()
    moved[2] += 100
    before, after = baselines.critic(returns, value), baselines.critic(moved, value)
    torch.testing.assert_close(before[2], after[2])
    assert (before[:2] - after[:2]).abs().min() > 1


def test_critic_with_a_constant_value_is_leave_one_out():
    expected = baselines.leave_one_out(RETURNS, None)
    found = baselines.critic(RETURNS, torch.full((3,), 7.0, dtype=F64))
    torch.testing.assert_close(found, expected)


def test_critic_with_one_sample_that_alone_determines_the_slope():
    """Without it all values are equal, so the mean of the other returns replaces the regression."""
    value = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=F64)
    returns = torch.tensor([9.0, 1.0, 2.0, 4.5], dtype=F64)
    found = baselines.critic(returns, value)
    torch.testing.assert_close(found[0], torch.tensor(2.5, dtype=F64))
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found[1], left_out_prediction(value, returns, 1))


@pytest.mark.parametrize("outlier", [10.0, 1e3, 1e4, 1e6])
@pytest.mark.parametrize("n", [10, 2500])
def test_critic_in_float32_survives_an_outlier_of_the_value(n, outlier):
    """With leverage close to 1, neither round-off in the hat matrix nor extrapolation explodes."""
    generator = torch.Generator().manual_seed(3)
    value = torch.randn(n, generator=generator)
    value[0] = outlier
    returns = torch.randn(n, generator=generator)
    found = baselines.critic(returns, value)
    expected = baselines.critic(returns.double(), value.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-2)
    assert found.abs().max() < 12 * returns.abs().max()


def test_errors_name_the_remedy():
    one = torch.ones(1, dtype=F64)
    with pytest.raises(ValueError, match=r"at least 2 samples.*got 1.*baseline=none"):
        baselines.leave_one_out(one, None)
    with pytest.raises(ValueError, match="value="):
        baselines.critic(RETURNS, None)
    with pytest.raises(ValueError, match=r"at least 3 samples.*got 2"):
        baselines.critic(RETURNS[:2], RETURNS[:2])


def test_one_sample_with_leave_one_out_fails_at_the_node():
    mean = torch.zeros(1, 2, requires_grad=True)
    with pytest.raises(ValueError, match="leave_one_out"):
        make("lr")(mean, torch.ones(1, 2), torch.ones(1, 2), torch.zeros(1))


def lr_gradients(baseline, *, n, repeats, seed):
    """[R] LR gradients w.r.t. the mean of N samples each, cost (x + v)², v ~ N(0, 2²) per sample.

    v is known before the noise is drawn, and serves as the critic's value on another scale. The
    exact gradient is 2 (mean + E v) = 1.
    """
    generator = torch.Generator().manual_seed(seed)
    v = 2 * torch.randn(n, repeats, dtype=F64, generator=generator)
    noise = torch.randn(n, repeats, 1, dtype=F64, generator=generator)
    mean = torch.full((n, repeats, 1), 0.5, dtype=F64, requires_grad=True)
    value = 0.01 * v.square() + 3
    sample, credit = make("lr", baseline=baseline)(
        mean, torch.ones_like(noise), noise, mean.new_zeros(n, repeats), value=value
    )
    cost = (sample.squeeze(-1) + v).square()
    loss = (cost * (1 + credit)).mean(0).sum()
    return torch.autograd.grad(loss, mean)[0].sum((0, 2))


def z_score(g, expected):
    return float((g.mean() - expected) / (g.std() / len(g) ** 0.5))


@pytest.mark.parametrize("name", ["none", "leave_one_out", "critic"])
def test_unbiased_baselines(name):
    """N = 8, 100000 repeats, seed 1: |mean - 1| <= 4 SE, where 6 SE < 1 / N, `mean`'s bias."""
    g = lr_gradients(getattr(baselines, name), n=8, repeats=100_000, seed=1)
    assert g.std() / len(g) ** 0.5 < 1 / 48
    assert abs(z_score(g, 1.0)) <= 4


def test_mean_baseline_shrinks_by_one_minus_one_over_n():
    """N = 4, 200000 repeats, seed 1: 3/4 within 4 SE, and more than 6 SE from 1."""
    g = lr_gradients(baselines.mean, n=4, repeats=200_000, seed=1)
    assert abs(z_score(g, 0.75)) <= 4
    assert z_score(g, 1.0) < -6


def test_a_useful_critic_reduces_the_variance():
    """N = 50, 4000 repeats, seed 2; relative SE of a variance ratio of this size is below 5 %."""
    critic, loo = (
        lr_gradients(b, n=50, repeats=4000, seed=2).var()
        for b in (baselines.critic, baselines.leave_one_out)
    )
    assert critic < 0.8 * loo
