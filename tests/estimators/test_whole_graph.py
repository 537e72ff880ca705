"""Rules that choose one k for the whole graph, from their definitions."""

import math

import numpy as np
import pytest
import torch

from totalprop import estimators
from totalprop.estimators import ControlProbe, DenseJacobian, Estimator, assign_credit, mixing

F64 = torch.float64


def randn(*shape, seed):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def legs(n=200, p=3, seed=0, bias=0.0):
    """Per-sample gradients [N, P] in the scale of a mean loss; LR has 4 times RP's spread."""
    rp = (1 + 0.5 * randn(n, p, seed=seed)) / n
    lr = (1 + bias + 2.0 * randn(n, p, seed=seed + 1)) / n
    return rp, lr


def test_aobg_by_hand():
    """Inverse variances, a smaller weight of RP as its bias is tolerated less, and at last none."""
    n, p = 200, 3
    rp, lr = legs(n, p, bias=3.0)
    g, one = n * rp.numpy(), n * lr.numpy()
    s1, s0 = (x.var(axis=0, ddof=1).sum() for x in (g, one))
    log = math.log((p + 1) / 0.05)
    largest = np.linalg.norm(one - one.mean(0), axis=1).max()
    epsilon = math.sqrt(2 * s0 * log / n) + 2 * largest * log / (3 * n)
    bias = np.linalg.norm((g - one).mean(0))
    free = s0 / (s0 + s1)
    seen = set()
    for gamma in (0.5 * epsilon, epsilon + 0.3 * free * bias, epsilon + 2 * free * bias):
        if gamma < epsilon:
            alpha = 0.0
        elif free * bias <= gamma - epsilon:
            alpha = free
        else:
            alpha = (gamma - epsilon) / bias
        (k,) = mixing.aobg((rp,), [(lr,)], None, gamma=gamma)
        assert k.item() == pytest.approx(1 - alpha, rel=1e-9)
        seen.add(round(alpha / free, 6))
    assert seen == {0.0, 0.3, 1.0}


def test_aobg_of_equal_legs_divides_by_no_bias():
    rp, _ = legs()
    (k,) = mixing.aobg((rp,), [(rp,)], None, gamma=1e6)
    assert k.item() == pytest.approx(0.5)


def one_node(name, cost, *, n, seed, mean=-0.15, std=0.3):
    """The gradient in the mean, and k, of a cost of x ~ N(mean, std)."""
    theta = torch.tensor([mean], dtype=F64, requires_grad=True)
    noise, one = randn(n, 1, seed=seed), torch.ones(n, 1, 1, dtype=F64)
    meter = torch.zeros(1, dtype=F64, requires_grad=True)

    def rollout(estimator, tap):
        probe = ControlProbe([one, 0 * one], lambda: DenseJacobian(one))
        at = theta.expand(n, 1)
        x, credit = estimator(
            at, torch.full_like(at, std), noise, at.new_zeros(n), probe=probe, tap=tap, meter=meter
        )
        return assign_credit(cost(x.squeeze(-1)), credit).mean()

    found = estimators.gradient(
        rollout, [theta], estimators.make(name), samples=n, tap_size=1, meter=meter
    )
    return found.gradients[0].item(), found.k.item()


def step(x):
    return x.square() + (x > 0)


@pytest.mark.parametrize("n", [50, 1000])
def test_ddcg_is_lr_at_a_jump(n):
    """Seeds 0 to 99. Suh et al.'s test needs many samples, this one 50."""
    found = [one_node("ddcg", step, n=n, seed=seed) for seed in range(100)]
    assert all(k == 1 for _, k in found)
    g = np.array([g for g, _ in found])
    truth = -0.3 + math.exp(-0.125) / math.sqrt(2 * math.pi) / 0.3
    assert abs(g.mean() - truth) < 4 * g.std(ddof=1) / 10


@pytest.mark.parametrize(
    "cost", [lambda x: x, torch.square, torch.sin, lambda x: torch.sin(10 * x), torch.relu]
)
def test_ddcg_is_ivw_where_the_cost_is_smooth(cost):
    """N = 1000, seeds 0 to 99."""
    for seed in range(100):
        g, k = one_node("ddcg", cost, n=1000, seed=seed)
        expected, k_ivw = one_node("ivw", cost, n=1000, seed=seed)
        assert (g, k) == (pytest.approx(expected), pytest.approx(k_ivw)) and k < 1


def test_ddcg_refuses_categorical_nodes():
    logits = torch.zeros(5, 3, dtype=F64, requires_grad=True)
    noise, one = randn(5, 3, seed=0).exp(), torch.ones(5, 3, 1, dtype=F64)

    def rollout(estimator, tap):
        probe = ControlProbe([one], lambda: DenseJacobian(one))
        x, credit = estimator(logits, None, noise, noise.new_zeros(5), probe=probe, tap=tap)
        return assign_credit(x[:, 0], credit).mean()

    with pytest.raises(ValueError, match="needs Gaussian nodes, got categorical ones"):
        estimators.gradient(rollout, [logits], estimators.make("ddcg"), samples=5, tap_size=1)


def test_ddcg_by_hand():
    """Two nodes: both sides of the inequality, with c just below and above what it decides at."""
    n, std = 60, (0.4, 0.7)
    x, y = randn(n, 2, seed=1), randn(n, 2, seed=2)
    nodes = [
        mixing.Context(None, (x, torch.full_like(x, s)), x, randn(n, seed=3 + i), None)
        for i, s in enumerate(std)
    ]
    told = mixing.GraphContext(nodes, [(0.3 + 0.1 * x, x), (0.2 * y - 0.1, y)])
    rp, lr = legs(n)
    parts = [(0.3 + 0.1 * x) * std[0], (0.2 * y - 0.1) * std[1]]
    spread = sum(p.numpy().var(axis=0, ddof=1).sum() for p in parts)
    linear = sum((p.numpy().mean(0) ** 2).sum() for p in parts)
    at = 1 - (spread + 2 * linear) / (2 * nodes[0].returns.numpy().var(ddof=1))
    (ivw,) = mixing.tpx_ivw_scalar((rp,), [(lr,)], None)
    assert 0 < at < 1
    for slack, expected in ((at - 1e-6, 1.0), (at + 1e-6, ivw.item())):
        (k,) = mixing.ddcg((rp,), [(lr,)], told, slack=slack)
        assert k.item() == pytest.approx(expected)


def test_a_whole_graph_rule_with_several_k_is_refused():
    several = Estimator(mixing.tpx, probe="all", whole_graph=True)
    n, theta = 20, torch.zeros(2, dtype=F64, requires_grad=True)
    eye = torch.eye(2, dtype=F64).expand(n, 2, 2)

    def rollout(estimator, tap):
        probe = ControlProbe([eye, 0 * eye], lambda: DenseJacobian(eye))
        at = theta.expand(n, 2)
        noise = randn(n, 2, seed=1)
        x, credit = estimator(at, torch.ones_like(at), noise, at.new_zeros(n), probe=probe, tap=tap)
        return assign_credit(x.square().sum(-1), credit).mean()

    with pytest.raises(ValueError, match=r"one k for all parameters, got \[1, 2\]"):
        estimators.gradient(rollout, [theta], several, samples=n)
