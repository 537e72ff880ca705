"""The first-order leg of LR, and whole-graph rules with a base."""

import math

import numpy as np
import pytest
import torch

from totalprop.estimators import (
    ControlProbe,
    DenseJacobian,
    Estimator,
    assign_credit,
    gradient,
    legs,
    make,
    mixing,
)
from totalprop.estimators.baselines import leave_one_out

F64 = torch.float64
N, START, STD = 40, 0.3, 0.5


def randn(*shape, seed):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def chain(name, cost, noise, *, decay=0.8, theta=(0.2, STD), **changes):
    """The gradient in θ of E cost(x_H), x' ~ N(decay·x + θ_0, θ_1²), from noise [H, N, 1]."""
    theta = torch.tensor(theta, dtype=F64, requires_grad=True)
    n = noise.shape[1]
    jacobian = [torch.eye(2, dtype=F64)[i].expand(n, 1, 2) for i in range(2)]
    eye = torch.eye(2, dtype=F64).expand(n, -1, -1)

    def rollout(estimator, tap):
        x, credit = torch.full((n, 1), START, dtype=F64), torch.zeros(n, dtype=F64)
        for z in noise:
            mean = decay * x + theta[0]
            probe = ControlProbe(jacobian, lambda: DenseJacobian(eye))
            x, credit = estimator(mean, theta[1].expand(n, 1), z, credit, probe=probe, tap=tap)
        return assign_credit(cost(x.squeeze(-1)), credit).mean()

    found = gradient(rollout, [theta], make(name, **changes), samples=n, tap_size=2)
    return found.gradients[0]


def moments(horizon, decay=0.8, theta=0.2, std=STD):
    """Mean and standard deviation of x_H."""
    mean, variance = START, 0.0
    for _ in range(horizon):
        mean, variance = decay * mean + theta, decay**2 * variance + std**2
    return mean, math.sqrt(variance)


def test_the_leg_by_hand():
    """Two nodes and two halves: numpy's regression on f over the others of a sample's half."""
    halves = list(range(5)), list(range(5, 9))
    noise, slope = randn(2, 9, 2, seed=1), randn(2, 9, 2, seed=2)
    mean, std = randn(2, 9, 2, seed=3), 0.5 + randn(2, 9, 2, seed=4).square()
    returns = randn(2, 9, seed=5)
    nodes = [mixing.Context(None, (mean[t], std[t]), noise[t], returns[t], None) for t in range(2)]
    leg = legs.first_order(mixing.GraphContext(nodes, [(g, g * e) for g, e in zip(slope, noise)]))
    for t in (1, 0):
        found = leg((mean[t], std[t]), noise[t], returns[t], None, leave_one_out)
        for own, other in (halves, halves[::-1]):
            s = (slope * std)[:, other].mean(1)
            f = mean[t] @ slope[t, other].mean(0) + sum(noise[u] @ s[u] for u in range(t, 2))
            for i in own:
                rest = [j for j in own if j != i]
                a, b = np.polyfit(f[rest].numpy(), returns[t, rest].numpy(), 1)
                left = (returns[t, i] - a * f[i] - b) / std[t, i]
                by_hand = left * noise[t, i] + a * s[t] / std[t, i], left * (noise[t, i] ** 2 - 1)
                for got, expected in zip(found, by_hand, strict=True):
                    torch.testing.assert_close(got[i], expected)


@pytest.mark.parametrize("horizon", [1, 5])
@pytest.mark.parametrize("name", ["lr-first-order", "tpx"])
def test_a_linear_cost_leaves_no_noise_in_the_mean(horizon, name):
    """f is then the return itself: LR is as precise as RP."""
    noise = randn(horizon, N, 1, seed=6)
    changes = {} if name == "lr-first-order" else {"legs": "first-order"}
    found = chain(name, lambda x: 3 * x, noise, **changes)
    exact = 3 * sum(0.8**t for t in range(horizon))
    assert found[0].item() == pytest.approx(exact, rel=1e-9)


COSTS = {
    "cubic": (lambda x: x.pow(3), lambda m, s: m**3 + 3 * m * s**2),
    "step": (
        lambda x: x.square() + 2 * (x > 1),
        lambda m, s: m**2 + s**2 + 1 + torch.erf((m - 1) / s / 2**0.5),
    ),
}


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("horizon", [1, 4])
def test_it_is_unbiased_also_where_the_cost_jumps(cost, horizon):
    """3000 batches of 20: within 4 SE of the closed form, in the mean and in the std."""
    function, expected = COSTS[cost]
    theta = torch.tensor([0.2, STD], dtype=F64, requires_grad=True)
    mean, variance = START, 0.0
    for _ in range(horizon):
        mean, variance = 0.8 * mean + theta[0], 0.64 * variance + theta[1].square()
    (exact,) = torch.autograd.grad(expected(mean, variance.sqrt()), theta)
    found = torch.stack(
        [chain("lr-first-order", function, randn(horizon, 20, 1, seed=s)) for s in range(3000)]
    )
    error = found.std(0) / 3000**0.5
    assert ((found.mean(0) - exact).abs() < 4 * error).all()


@pytest.mark.parametrize(("horizon", "share"), [(1, 0.6), (10, 0.6)])
def test_it_has_less_variance_than_lr(horizon, share):
    """300 batches of 100, a cost that is a square and a step: in the mean's gradient."""
    function = COSTS["step"][0]
    spread = {
        name: torch.stack(
            [chain(name, function, randn(horizon, 100, 1, seed=s)) for s in range(300)]
        ).var(0)[0]
        for name in ("lr", "lr-first-order")
    }
    assert spread["lr-first-order"] < share * spread["lr"], spread


@pytest.mark.parametrize("factor", [1e9, 1e200, math.inf, math.nan])
def test_an_exploded_pathwise_gradient_does_no_harm(factor):
    """100 batches: a cost whose derivative is nonsense gives the variance of LR."""

    class Exploding(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return g * factor * (1e3 * x).sin()

    spread = {
        name: torch.stack(
            [chain(name, Exploding.apply, randn(3, 100, 1, seed=s)) for s in range(100)]
        ).var(0)[0]
        for name in ("lr", "lr-first-order")
    }
    assert spread["lr-first-order"] < 1.3 * spread["lr"]


@pytest.mark.parametrize(("n", "members"), [(9, 1), (7, 2)], ids=["categorical", "few"])
def test_categorical_nodes_and_few_samples_have_the_plain_score(n, members):
    zeta, noise = (randn(n, 4, seed=1).exp(),) * members, randn(n, 4, seed=2)
    returns = randn(n, seed=3)
    node = mixing.Context(None, zeta, noise, returns, None)
    leg = legs.first_order(mixing.GraphContext([node], [zeta]))
    found = leg(zeta, noise, returns, None, leave_one_out)
    expected = legs.score(zeta, noise, returns, None, leave_one_out)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_it_takes_several_passes():
    estimator = make("tpx", legs="first-order")
    x = randn(9, 2, seed=1)
    with pytest.raises(ValueError, match=r"several passes.*estimators\.gradient"):
        estimator(x, x.exp(), x, x[:, 0])
    with pytest.raises(ValueError, match="cross_fit=False"):
        make("tpx", legs="first-order", cross_fit=True)
    assert estimator.needs_pathwise and make("lr-first-order").needs_pathwise


# A whole-graph rule with a base.


def never_lr(rp, legs, probe):
    return [torch.zeros((), dtype=F64)]


def of_bases(*bases):
    """The calmest of RP and these, without LR."""
    return Estimator(never_lr, probe="all", whole_graph=True, base=bases)


RP_OR_LR = of_bases(make("lr", probe="all"))


def test_the_calmer_of_rp_and_the_base_is_taken():
    """With the rule k = 0; RP has less variance on a square, and LR on a steep sine."""
    noise = randn(3, 200, 1, seed=3)
    for cost, calmer in ((torch.square, "rp"), (lambda x: torch.sin(40 * x), "lr")):
        torch.testing.assert_close(chain(RP_OR_LR, cost, noise), chain(calmer, cost, noise))


def test_a_base_of_nearly_rps_variance_is_not_taken():
    """The variance of a base counts 1 + 2 H / N times: RP shrunk a little, and by 10 %."""
    noise = randn(3, 200, 1, seed=3)

    def shrink(factor):
        def weight(rp, legs, probe):
            return [torch.full((1, 1), 1 - factor, dtype=F64)]

        return of_bases(Estimator(weight, legs=(legs.nothing,), probe="all"))

    plain = chain("rp", torch.square, noise)
    torch.testing.assert_close(chain(shrink(0.999), torch.square, noise), plain)
    assert not torch.allclose(chain(shrink(0.9), torch.square, noise), plain, rtol=1e-3)


@pytest.mark.parametrize("order", [("rp", "lr"), ("lr", "rp")])
def test_of_two_bases_the_calmer_is_taken(order):
    noise = randn(3, 200, 1, seed=3)
    estimator = of_bases(*(make(name, probe="all") for name in order))
    for cost, calmer in ((torch.square, "rp"), (lambda x: torch.sin(40 * x), "lr")):
        found = chain(estimator, cost, noise)
        torch.testing.assert_close(found, chain(calmer, cost, noise))


def test_what_is_not_finite_is_not_taken():
    noise = randn(2, 50, 1, seed=4)
    noise[1, 0] = -(0.8 * (0.8 * START + 0.2 + STD * noise[0, 0]) + 0.2) / STD  # x = 0

    def cost(x):
        return x.abs().sqrt()  # of an infinite derivative at 0

    assert not chain("rp", cost, noise).isfinite().all()
    torch.testing.assert_close(chain(RP_OR_LR, cost, noise), chain("lr", cost, noise))


@pytest.mark.parametrize(
    ("cost", "most"),
    [(torch.square, 1.1), (COSTS["step"][0], 0.8), (lambda x: torch.sin(40 * x), 1.1)],
    ids=["square", "step", "steep"],
)
def test_safe_is_hardly_worse_than_any_other(cost, most):
    """40 batches of 300 over 5 steps: RMSE against 100 batches of LR with 10,000 samples."""
    many = torch.stack(
        [chain("lr-first-order", cost, randn(5, 10_000, 1, seed=1000 + s)) for s in range(100)]
    )
    truth = many.mean(0)
    noises = [randn(5, 300, 1, seed=s) for s in range(40)]

    def error(name):
        found = torch.stack([chain(name, cost, noise) for noise in noises])
        return (found - truth).square().sum(1).mean().sqrt().item()

    others = {name: error(name) for name in ("rp", "lr", "tp", "tpx", "tpg", "ivw")}
    assert error("safe") < most * min(others.values()), others
