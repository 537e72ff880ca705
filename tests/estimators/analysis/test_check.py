"""`check` on rollouts whose gradient, credits and variances are known."""

import math
import warnings

import pytest
import torch
from torch import nn

from totalprop import estimators
from totalprop.estimators import ParameterProbe, check, make
from totalprop.scripts.studies.problems import PROBLEMS

F64 = torch.float64
NODEWISE = [name for name in estimators.names() if not make(name).several_passes]


def quadratic(theta, *, n=200, steps=3, is_credited=lambda t: True, cost=None):
    """x' ~ N(x + theta, 0.5²) from 0, cost x²: the exact gradient is Σ_t 2 t² theta."""

    def rollout(r):
        x, loss = torch.zeros(n, 1, dtype=F64), 0.0
        for t in range(steps):
            extra = {}
            if r.estimator.probe != "none":
                function = lambda p, s: (s + p["t"], 0.5 + 0 * s)  # noqa: E731
                extra["probe"] = ParameterProbe(function, {"t": theta}, x)
            x = r.sample(x + theta, torch.full_like(x, 0.5), **extra)
            c = x.square().sum(-1) if cost is None else cost(x)
            loss = loss + (r.cost(c) if is_credited(t) else c).mean()
        return loss

    return rollout


@pytest.fixture
def theta():
    return torch.tensor(0.7, dtype=F64, requires_grad=True)


@pytest.mark.parametrize("name", NODEWISE)
def test_a_right_rollout_passes_with_every_estimator(theta, name):
    report = check(quadratic(theta), {"theta": theta}, estimators=(name,))
    assert report.uncredited_cost is False
    assert report.credited == pytest.approx(report.loss)
    assert report.agree
    exact = 2 * (1 + 4 + 9) * 0.7
    for one in ("rp", "lr", name):
        error = (report.variances[one] / report.repeats) ** 0.5
        assert abs(report.means[one]["theta"].item() - exact) <= 4 * error
    assert "every cost that depends on a sample is credited" in str(report)
    assert theta.grad is None


def test_uncredited_costs_are_found_and_counted(theta):
    """Every second cost; all costs; a constant, which needs no credit."""
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        some = check(quadratic(theta, is_credited=lambda t: t != 1))
        none = check(quadratic(theta, is_credited=lambda t: False))
    assert torch.equal(torch.get_rng_state(), state)
    assert some.uncredited_cost
    assert none.uncredited_cost
    # E x_t² = (t theta)² + t / 4, for t = 1, 3 of 1, 2, 3
    assert some.credited == pytest.approx(10 * 0.49 + 1.0, rel=0.05)
    assert some.loss == pytest.approx(14 * 0.49 + 1.5, rel=0.05)
    assert none.credited == 0
    assert some.best is None
    assert not some.agree
    assert "NOT COMPLETE" in str(some)
    assert "Credit every cost" in str(some)
    regularised = check(lambda r: quadratic(theta)(r) + 0.1 * theta.square())
    assert regularised.uncredited_cost is False
    assert regularised.agree


def test_given_noise_does_not_hide_an_uncredited_cost(theta):
    def rollout(r):
        noise = torch.randn(50, 1, dtype=F64)
        x = r.sample(theta + 0 * noise, torch.ones_like(noise), noise=noise)
        return r.cost(x.sin().sum(-1)).mean() + x.square().mean()

    assert check(rollout, repeats=3).uncredited_cost


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("scale", [1.0, 1e5, 1e9])
def test_a_small_uncredited_cost_is_found_beside_a_large_credited_one(dtype, scale):
    theta = torch.tensor(0.7, dtype=dtype, requires_grad=True)

    def rollout(r, uncredited=lambda x: x.square().mean()):
        x, loss = torch.zeros(100, 1, dtype=dtype), 0.0
        for _ in range(20):
            x = r.sample(x + theta, torch.full_like(x, 0.5))
            loss = loss + scale * r.cost(x.square().sum(-1)).mean() + uncredited(x)
        return loss

    assert check(rollout, estimators=(), repeats=3).uncredited_cost
    report = check(lambda r: rollout(r, lambda x: theta.square()), estimators=(), repeats=3)
    assert report.uncredited_cost is False


def drawn_alike():
    return torch.randn(50, 1, dtype=F64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("is_outside", [True, False])
def test_noise_that_no_seed_changes_is_refused(theta, is_outside, first):
    """At both nodes, and at the second alone: over it, RP and LR have different means."""
    outside = drawn_alike()

    def rollout(r):
        x, loss = torch.zeros(50, 1, dtype=F64), 0.0
        for t in range(2):
            fixed = outside if is_outside else drawn_alike()
            noise = torch.randn_like(x) if t < first else fixed
            x = r.sample(x + theta, torch.ones_like(x), noise=noise)
            loss = loss + r.cost(x.square().sum(-1)).mean()
        return loss

    with pytest.raises(ValueError, match=f"node {first} of .* draw it within the rollout"):
        check(rollout)


@pytest.mark.parametrize("function", [torch.exp, torch.log, torch.square, torch.reciprocal])
def test_a_loss_that_is_not_linear_in_its_costs_is_not_accused(theta, function):
    report = check(lambda r: function(quadratic(theta)(r)))
    assert report.uncredited_cost is None
    assert "not linear" in str(report)


def test_a_jump_makes_rp_and_lr_disagree(theta):
    report = check(quadratic(theta, cost=lambda x: (x > 0.5).to(F64).sum(-1)), {"theta": theta})
    assert report.uncredited_cost is False
    assert report.means["rp"]["theta"] == 0
    assert abs(report.z["theta"].item()) > report.limit
    assert report.best == "lr"
    assert "DISAGREE" in str(report)


def test_chaos_needs_a_mixture(theta):
    """The logistic map, 30 steps: RP explodes, which is not taken for a disagreement."""

    def rollout(r):
        x, loss = torch.full((100, 1), 0.3, dtype=F64), 0.0
        for _ in range(30):
            mean = ((3.2 + theta) * x * (1 - x)).clamp(0.01, 0.99)
            x = r.sample(mean, torch.full_like(x, 0.02))
            loss = loss + r.cost(x.square().sum(-1)).mean()
        return loss

    report = check(rollout, {"theta": theta})
    assert report.agree
    assert report.best in ("lr", "tpx")
    assert report.saves("tpx") > 1e6
    assert report.saves("tpx") == report.variances["rp"] / report.variances["tpx"]


def test_a_rp_that_is_not_finite_is_no_disagreement(theta):
    def rollout(r):
        x = r.sample(theta.expand(50, 1), torch.ones(50, 1, dtype=F64))
        return r.cost((x * 0).abs().sqrt().sum(-1) + x.square().sum(-1)).mean()

    report = check(rollout, {"theta": theta}, repeats=20)
    assert not math.isfinite(report.variances["rp"])
    assert report.agree
    assert report.best != "rp"
    assert math.isinf(report.saves("lr"))


def test_parameters_are_named_by_a_module():
    torch.manual_seed(0)
    policy = nn.Linear(2, 2).double()

    def rollout(r):
        x = torch.ones(50, 2, dtype=F64)
        x = r.sample(policy(x), torch.full_like(x, 0.3))
        return r.cost(x.square().sum(-1)).mean()

    report = check(rollout, policy, repeats=10)
    assert list(report.z) == ["weight", "bias"]
    assert report.z["weight"].shape == (2, 2)
    assert set(check(rollout, repeats=3).z) == {"parameter 0", "parameter 1"}


@pytest.mark.parametrize(
    ("rollout", "kind", "message"),
    [
        (lambda r: 1.0, TypeError, r"must return its loss, a tensor \[\], got float"),
        (lambda r: torch.zeros(4), ValueError, r"return a loss \[\], got \[4\]; average"),
        (lambda r: torch.zeros(()), ValueError, "never called r.sample"),
        (
            lambda r: r.cost(r.sample(torch.zeros(4, 1), torch.ones(4, 1)).sum(-1)).mean(),
            ValueError,
            "the loss depends on no parameter",
        ),
    ],
)
def test_what_cannot_be_checked_is_said(rollout, kind, message):
    with pytest.raises(kind, match=message):
        check(rollout)


def test_too_few_repeats_are_refused(theta):
    with pytest.raises(ValueError, match="at least 3 repeats, got 2"):
        check(quadratic(theta), repeats=2)


def rollout_of(problem, horizon, n=100):
    """A problem of the benchmark of gradients as `check` takes it."""
    theta = torch.tensor(problem.theta, dtype=F64, requires_grad=True)

    def rollout(r):
        state, loss = torch.tensor(problem.start, dtype=F64).expand(n, -1), 0.0
        for t in range(1, horizon + 1):
            z = r.sample(*problem.node(state, theta))
            state = problem.advance(state, z)
            loss = loss + r.cost(problem.cost(state, z, t, horizon)).mean()
        return loss

    return rollout, {"theta": theta}


@pytest.mark.parametrize("name", [n for n, p in PROBLEMS.items() if p.kind != "stiff"])
def test_rp_and_lr_disagree_where_something_jumps_and_nowhere_else(name):
    """The benchmark's problems at their shortest horizon, up to 20 steps, with 100 samples."""
    problem = PROBLEMS[name]
    report = check(*rollout_of(problem, min(problem.horizons)), estimators=())
    assert report.agree == (problem.kind != "jump")


def test_a_smooth_problem_is_never_said_to_disagree():
    """Seeds 0 to 49."""
    found = [check(*rollout_of(PROBLEMS["quadratic"], 1), estimators=(), seed=s) for s in range(50)]
    assert all(report.agree for report in found)


def test_a_function_of_credited_costs_is_no_reason_for_lr():
    """E[(x²)²] of one draw: LR credits the square's argument, and is off by a factor."""
    theta = torch.tensor(0.5, requires_grad=True)

    def rollout(r):
        x = r.sample(theta.expand(1000, 1), torch.ones(1000, 1))
        return r.cost(x.square().sum(-1)).square().mean()

    report = check(rollout)
    assert report.uncredited_cost is None and not report.agree
    assert report.best is None and "Call r.cost(...) last" in str(report)


def test_parameters_without_names_are_refused():
    layer = nn.Linear(2, 2)

    def rollout(r):
        x = r.sample(layer(torch.ones(9, 2)), torch.ones(9, 2))
        return r.cost(x.square().sum(-1)).mean()

    with pytest.raises(TypeError, match=r"got generator; dict\(module.named_parameters\(\)\)"):
        check(rollout, layer.parameters())
    assert check(rollout, layer).means["rp"].keys() == {"weight", "bias"}
