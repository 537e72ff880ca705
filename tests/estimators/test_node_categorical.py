"""The categorical node: sampling, its two legs, and their mixture."""

import pytest
import torch

from totalprop import estimators
from totalprop.estimators import assign_credit
from totalprop.estimators.baselines import leave_one_out, none

F64 = torch.float64


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed):
    return torch.randn(*shape, dtype=F64, generator=generator(seed))


def test_categorical_sample_is_one_hot_with_softmax_frequencies():
    """N = 40000, seed 100: frequencies within 4 SE of softmax(logits)."""
    n, logits = 40_000, torch.tensor([0.0, 1.0, -0.5], dtype=F64)
    uniform = torch.rand(n, 3, dtype=F64, generator=generator(100))
    gumbel = -torch.log(-torch.log(uniform))
    sample, _ = estimators.make("lr")(logits.expand(n, 3), None, gumbel, logits.new_zeros(n))
    assert torch.equal(sample.sum(-1), torch.ones(n, dtype=F64))
    assert set(sample.unique().tolist()) == {0.0, 1.0}
    p = logits.softmax(0)
    assert ((sample.mean(0) - p) / (p * (1 - p) / n).sqrt()).abs().max() <= 4


@pytest.mark.parametrize("baseline", [leave_one_out, none])
def test_categorical_lr_matches_enumeration(baseline):
    """N = 40000, seed 101, tabular cost: within 4 SE of the gradient of Σ p_k c_k."""
    n, table = 40_000, torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=F64)
    logits = torch.tensor([0.2, -0.4, 0.1, 0.6], dtype=F64, requires_grad=True)
    exact = torch.autograd.grad(logits.softmax(0) @ table, logits)[0]
    batch = logits.detach().expand(n, 4).clone().requires_grad_()
    gumbel = -torch.log(-torch.log(torch.rand(n, 4, dtype=F64, generator=generator(101))))
    sample, credit = estimators.make("lr", baseline=baseline)(
        batch, None, gumbel, logits.new_zeros(n)
    )
    g = torch.autograd.grad(assign_credit(sample @ table, credit).sum(), batch)[0]
    standard_error = g.std(0) / n**0.5
    assert standard_error.max() < 0.1 * exact.abs().max()
    assert ((g.mean(0) - exact) / standard_error).abs().max() <= 4


def categorical(name, explode=1.0):
    logits = randn(30, 4, seed=102).requires_grad_()
    gumbel = -torch.log(-torch.log(torch.rand(30, 4, dtype=F64, generator=generator(103))))
    weight = randn(4, 4, seed=104)
    meter = torch.zeros(1, 4, dtype=F64, requires_grad=True)
    sample, credit = estimators.make(name)(logits, None, gumbel, logits.new_zeros(30), meter=meter)
    if sample.requires_grad:
        sample.register_hook(lambda g: g * explode)

    def cost(s):
        return torch.tanh(s @ weight).sum(-1)

    g, k = torch.autograd.grad(assign_credit(cost(sample), credit).mean(), [logits, meter])
    return g, k, logits, sample.detach(), cost


def test_categorical_rp_is_straight_through():
    g, k, logits, sample, cost = categorical("rp")
    p = logits.softmax(-1)
    straight_through = sample + p - p.detach()
    expected = torch.autograd.grad(cost(straight_through).mean(), logits)[0]
    torch.testing.assert_close(g, expected)
    assert torch.equal(k, torch.zeros_like(k))


def test_categorical_tpx_mixes_its_legs():
    (g_rp, *_), (g_lr, *_) = categorical("rp"), categorical("lr")
    g, k, *_ = categorical("tpx")
    torch.testing.assert_close(g, k * g_lr + (1 - k) * g_rp)
    assert ((k > 0) & (k < 1)).any()
    torch.testing.assert_close(categorical("tpx", explode=torch.nan)[0], g_lr)
