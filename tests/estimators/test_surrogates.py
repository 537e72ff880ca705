"""`surrogates.clipped` against automatic differentiation of PPO's objective."""

import pytest
import torch

from totalprop import estimators
from totalprop.estimators import surrogates

RATIOS = [0.3, 0.79, 0.81, 1.0, 1.19, 1.21, 2.5]
ADVANTAGES = [-2.0, -0.5, 0.0, 0.5, 3.0]


def grid():
    """Advantage, log π and log π_old in all combinations, within and beyond a clip range of 0.2."""
    advantage, ratio = torch.meshgrid(
        torch.tensor(ADVANTAGES, dtype=torch.float64),
        torch.tensor(RATIOS, dtype=torch.float64),
        indexing="ij",
    )
    old = torch.full_like(ratio, -1.3)
    return advantage.flatten(), (old + ratio.log()).flatten(), old.flatten()


def objective(advantage, log_prob, old, clip_range):
    ratio = (log_prob - old).exp()
    return -torch.min(advantage * ratio, advantage * ratio.clamp(1 - clip_range, 1 + clip_range))


@pytest.mark.parametrize("clip_range", [0.1, 0.2, 10.0])
def test_loss_and_gradient_are_those_of_ppo(clip_range):
    advantage, log_prob, old = grid()
    log_prob.requires_grad_()
    expected = objective(advantage, log_prob, old, clip_range)
    (gradient,) = torch.autograd.grad(expected.sum(), log_prob)
    surrogate = surrogates.clipped(advantage, log_prob, old, clip_range)
    torch.testing.assert_close(surrogate.loss, expected.detach())
    torch.testing.assert_close(advantage * surrogate.weight, gradient)


def test_weight_is_zero_only_where_clipping_binds():
    advantage, log_prob, old = grid()
    ratio = (log_prob - old).exp()
    binds = (advantage > 0) & (ratio > 1.2) | (advantage < 0) & (ratio < 0.8)
    weight = surrogates.clipped(advantage, log_prob, old, 0.2).weight
    assert binds.any() and not binds.all()
    torch.testing.assert_close(weight, torch.where(binds, 0.0, -ratio))


def test_no_gradient_leaves_it():
    advantage, log_prob, old = (x.requires_grad_() for x in grid())
    surrogate = surrogates.clipped(advantage, log_prob, old.detach(), 0.2)
    assert not surrogate.loss.requires_grad and not surrogate.weight.requires_grad


def test_with_a_nodes_credit_it_is_ppo_in_the_nodes_parameters():
    """As documented: loss + advantage·weight·credit', through a score leg."""
    torch.manual_seed(0)
    mean, std = torch.randn(40, 2).double(), torch.rand(40, 2).double() + 0.5
    mean.requires_grad_(), std.requires_grad_()
    actions, advantage = torch.randn(40, 2).double() * 2, torch.randn(40).double()
    log_prob = torch.distributions.Normal(mean, std).log_prob(actions).sum(-1)
    old = log_prob.detach() + 0.4 * torch.randn(40).double()
    expected = torch.autograd.grad(objective(advantage, log_prob, old, 0.2).sum(), (mean, std))
    surrogate = surrogates.clipped(advantage, log_prob, old, 0.2)
    estimator = estimators.make("lr", baseline=estimators.baselines.none)
    noise = estimators.infer_noise(mean, std, actions)
    _, credit = estimator(mean, std, noise, torch.zeros_like(advantage))
    loss = (surrogate.loss + advantage * surrogate.weight * credit).sum()
    for found, wanted in zip(torch.autograd.grad(loss, (mean, std)), expected):
        torch.testing.assert_close(found, wanted)
