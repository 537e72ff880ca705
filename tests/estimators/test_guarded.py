"""The guarded rules: k by hand, a jump that RP does not see, and rare alarms on a smooth cost."""

import math

import numpy as np
import pytest
import torch

from totalprop import estimators
from totalprop.estimators import (
    ControlProbe,
    DenseJacobian,
    assign_credit,
    gradient,
    make,
    mixing,
)
from totalprop.estimators.mixing import Context, GraphContext

F64 = torch.float64
GUARDED = ("tp-guarded", "tpx-guarded", "tpg-guarded")


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed):
    return torch.randn(*shape, dtype=F64, generator=generator(seed))


def probe_of_the_mean(n, d):
    """Parameters θ [D] that are added to the mean: the Jacobian of zeta is (1, 0)."""
    one = torch.eye(d, dtype=F64).expand(n, d, d)
    return ControlProbe([one, torch.zeros_like(one)], lambda: DenseJacobian(one))


def legs_that_differ(n=40, d=3, seed=1):
    """RP and LR of mean and std, whose means differ by 0.2, 2 and 0 of the spread, then 0, 0, 3."""
    rp = [0.5 + 0.3 * randn(n, d, seed=seed + i) for i in range(2)]
    lr = [g + 1.0 * randn(n, d, seed=seed + 10 + i) for i, g in enumerate(rp)]
    lr[0] = lr[0] + torch.tensor([0.2, 2.0, 0.0], dtype=F64)
    lr[1] = lr[1] + torch.tensor([0.0, 0.0, 3.0], dtype=F64)
    return tuple(rp), tuple(lr)


def moments(g_rp, g_lr):
    """Variances, covariance, N d² and z of two columns [N], by numpy."""
    rp, lr = np.asarray(g_rp), np.asarray(g_lr)
    (v_rp, c), (_, v_lr) = np.cov(np.stack((rp, lr)))
    delta = lr - rp
    square = len(rp) * delta.mean() ** 2
    return v_rp, v_lr, c, square, math.sqrt(square / delta.var(ddof=1))


def threshold(v_rp, v_lr):
    """Standard errors above which chance does not explain a difference of the means."""
    return min(6, math.sqrt(2 * math.log(1 + 100 * v_lr / v_rp)))


def test_k_of_tpx_guarded_is_that_of_least_mean_squared_error():
    rp, lr = legs_that_differ()
    (found,) = mixing.tpx_guarded(rp, [lr], None)
    (plain,) = mixing.tpx(rp, [lr], None)
    doubted = []
    for member in range(2):
        for d in range(3):
            v_rp, v_lr, c, square, z = moments(rp[member][:, d], lr[member][:, d])
            k = found[member][0, d].item()
            if z <= threshold(v_rp, v_lr):
                assert k == pytest.approx(plain[0, d].item(), rel=1e-12)
                continue
            doubted.append((member, d))
            b = square - (v_rp + v_lr - 2 * c)
            assert k == pytest.approx((v_rp - c + b) / (v_lr + v_rp - 2 * c + b), rel=1e-9)

            def error(k, v_rp=v_rp, v_lr=v_lr, c=c, b=b):
                return k**2 * v_lr + (1 - k) ** 2 * (v_rp + b) + 2 * k * (1 - k) * c

            assert error(k) < min(error(k + 1e-3), error(k - 1e-3))
    assert doubted == [(0, 1), (1, 2)]


@pytest.mark.parametrize("spread", [0.1, 1.0, 30.0, 1e4])
def test_more_variance_of_lr_asks_for_more_evidence(spread):
    """A difference of the means that is z standard errors, exactly: z just below, just above."""
    rp, noise = randn(50, 1, seed=3), spread * randn(50, 1, seed=4)
    noise = noise - noise.mean()
    limit = threshold(rp.var().item(), (rp + noise).var().item())
    assert limit == 6 if spread == 1e4 else 3 < limit < 5.5
    for z in (limit - 1e-3, limit + 1e-3):
        lr = rp + noise + z * noise.std() / math.sqrt(50)
        ((k, _),) = mixing.tpx_guarded((rp, rp), [(lr, lr)], None)
        (plain,) = mixing.tpx((rp, rp), [(lr, lr)], None)
        assert torch.isclose(k, plain, rtol=1e-9).all() == (z < limit)


def test_k_of_tp_guarded_by_hand():
    rp, lr = legs_that_differ()
    probe = probe_of_the_mean(40, 3)
    (k,) = mixing.tp_guarded(rp, [lr], probe)
    columns = [moments(rp[0][:, d], lr[0][:, d]) for d in range(3)]
    v_rp, v_lr, c, square = (sum(column[i] for column in columns) for i in range(4))
    b = square - (v_rp + v_lr - 2 * c)
    assert k.item() == pytest.approx((v_rp + b) / (v_rp + v_lr + b), rel=1e-9)
    same = tuple(g - (g - h).mean(0) for g, h in zip(lr, rp, strict=True))
    assert torch.equal(mixing.tp_guarded(rp, [same], probe)[0], mixing.tp(rp, [same], probe)[0])


def test_k_of_tpg_guarded_minimises_its_objective():
    """Where a variable is in doubt, N |Σ_d (1 - k_d) d_d|² is added for the doubted ones."""
    n, d = 60, 3
    rp, lr = legs_that_differ(n)
    jacobian = randn(n, d, 4, seed=30)
    zero = torch.zeros(n, d, d, dtype=F64)
    probe = ControlProbe(
        [torch.eye(d, dtype=F64).expand(n, d, d), zero], lambda: DenseJacobian(jacobian)
    )
    (found,) = mixing.tpg_guarded(rp, [lr], probe)
    b_rp, b_lr = (torch.einsum("nd,ndp->dnp", leg[0], jacobian) for leg in (rp, lr))
    doubted = torch.tensor([False, True, True])  # the mean's leg of 1, the std's of 2
    v_lr, v_rp = lr[0].var(0), rp[0].var(0)
    tested = (lr[0] - rp[0]).mean(0).square() * n

    def traces(b):
        centred = (b - b.mean(1, keepdim=True)).flatten(1)
        return centred @ centred.T

    c_rp, c_lr = traces(b_rp), traces(b_lr)
    unit = mixing.COTANGENT_SHARE * c_lr.trace() / v_lr.sum()
    shift = (b_lr - b_rp).mean(1)[doubted]  # [doubted, P]

    def objective(k):
        rest = 1 - k
        bias = n * (n - 1) * (rest[doubted] @ shift).square().sum()
        spread = rest @ c_rp @ rest + k @ c_lr @ k + c_lr.diagonal() @ k.square()
        own = v_lr @ k.square() + (v_rp + torch.where(doubted, tested, 0.0)) @ rest.square()
        return bias + spread + unit * own

    k = torch.zeros(d, dtype=F64, requires_grad=True)
    hessian = torch.autograd.functional.hessian(objective, k)
    slope = torch.autograd.grad(objective(k), k)[0]
    best = torch.linalg.solve(hessian, -slope).clamp(0, 1)
    torch.testing.assert_close(found[0], best, rtol=1e-6, atol=1e-8)
    (plain,) = mixing.tpg(rp, [lr], probe)
    assert (found - plain).abs().max() > 0.05


# x² + 1[x > 0], x ~ N(-0.15, 0.3): its derivative in the mean is 2 m + φ(m / σ) / σ.

MEAN, STD = -0.15, 0.3
TRUTH = 2 * MEAN + math.exp(-0.5 * (MEAN / STD) ** 2) / math.sqrt(2 * math.pi) / STD


def step_gradient(name, n, seed):
    estimator = make(name)
    mean = torch.full((n, 1), MEAN, dtype=F64, requires_grad=True)
    probe = None if estimator.probe == "none" else probe_of_the_mean(n, 1)
    sample, credit = estimator(
        mean, torch.full_like(mean, STD), randn(n, 1, seed=seed), mean.new_zeros(n), probe=probe
    )
    x = sample.squeeze(-1)
    loss = assign_credit(x.square() + (x > 0), credit).mean()
    return torch.autograd.grad(loss, mean)[0].sum().item()


@pytest.mark.parametrize("name", GUARDED)
def test_a_jump_is_found(name):
    """N = 1000, 100 batches: within 4 SE (0.005) of the truth, 0.87, where the others give -0.3."""
    found = np.array([step_gradient(name, 1000, seed) for seed in range(100)])
    standard_error = found.std(ddof=1) / 10
    assert standard_error < 0.007
    assert abs(found.mean() - TRUTH) < 4 * standard_error
    plain = np.array([step_gradient(name.removesuffix("-guarded"), 1000, s) for s in range(10)])
    assert (plain < 0).all()


def test_a_jump_that_only_the_std_feels_is_found():
    """1[|x| < 1/2] is symmetric about the mean: LR and RP agree in the mean, not in the std."""
    n, found = 1000, {"tpx": [], "tpx-guarded": []}
    for name, gradients in found.items():
        for seed in range(50):
            std = torch.full((n, 1), STD, dtype=F64, requires_grad=True)
            sample, credit = make(name)(
                torch.zeros_like(std), std, randn(n, 1, seed=seed), std.new_zeros(n)
            )
            x = sample.squeeze(-1)
            loss = assign_credit(x.square() + (x.abs() < 0.5), credit).mean()
            gradients.append(torch.autograd.grad(loss, std)[0].sum().item())
    u = 0.5 / STD  # d/dσ (σ² + 2 Φ(u) - 1) = 2 σ - 2 u φ(u) / σ
    truth = 2 * STD - 2 * u * math.exp(-0.5 * u * u) / math.sqrt(2 * math.pi) / STD
    guarded = np.array(found["tpx-guarded"])
    assert abs(guarded.mean() - truth) < 4 * guarded.std(ddof=1) / math.sqrt(50)
    assert np.mean(found["tpx"]) > truth + 0.3


@pytest.mark.parametrize("name", GUARDED)
@pytest.mark.parametrize("cost", [torch.sin, torch.square], ids=["sin", "square"])
def test_a_smooth_cost_rarely_raises_an_alarm(name, cost):
    """N = 300, seeds 0 to 199: in at most 2 % of the batches, k is not that of the unguarded rule.

    What the alarms add to the variance is below 5 % of it.
    """
    n, unguarded = 300, name.removesuffix("-guarded")
    found = {name: [], unguarded: []}
    for seed in range(200):
        noise = randn(n, 1, seed=seed)
        for one, gradients in found.items():
            leaf = torch.full((n, 1), 0.2, dtype=F64, requires_grad=True)
            probe = None if make(one).probe == "none" else probe_of_the_mean(n, 1)
            sample, credit = make(one)(
                leaf, torch.full_like(leaf, STD), noise, leaf.new_zeros(n), probe=probe
            )
            loss = assign_credit(cost(sample.squeeze(-1)), credit).mean()
            gradients.append(torch.autograd.grad(loss, leaf)[0].sum().item())
    guarded, plain = np.array(found[name]), np.array(found[unguarded])
    assert (~np.isclose(guarded, plain, rtol=1e-9, atol=0)).mean() <= 0.02
    assert guarded.var() < 1.05 * plain.var()


# safe: the graph of a chain as a whole.


def walk_gradient(name, n, seed, horizon=50):
    """A walk x' = x + θ - 0.3 x + 0.3 ε that dies where |x| > 1; every step alive earns 1."""
    theta = torch.tensor([0.1], dtype=F64, requires_grad=True)
    one = torch.ones(n, 1, 1, dtype=F64)
    noise = randn(horizon, n, 1, seed=seed)

    def rollout(estimator, tap):
        x, alive, credit = (
            torch.zeros(n, 1, dtype=F64),
            torch.ones(n, dtype=F64),
            noise.new_zeros(n),
        )
        loss = noise.new_zeros(())
        for z in noise:
            probe = ControlProbe([one, 0 * one], lambda: DenseJacobian(one))
            mean = 0.7 * x + theta
            x, credit = estimator(mean, torch.full_like(mean, 0.3), z, credit, probe=probe, tap=tap)
            alive = alive * (x.squeeze(-1).abs() < 1)
            loss = loss - assign_credit(alive, credit).mean()
        return loss

    return gradient(rollout, [theta], make(name), samples=n, tap_size=1).gradients[0].item()


def test_a_bias_that_no_node_can_see_is_seen_in_the_graph():
    """N = 300, 10 batches: RP is 0 at every node, and LR so noisy at each that none objects."""
    found = {
        name: np.array([walk_gradient(name, 300, seed) for seed in range(10)])
        for name in ("rp", "lr", "tpx-guarded", "safe")
    }
    truth = found["lr"].mean()
    assert (found["rp"] == 0).all() and truth > 10
    errors = {name: np.sqrt(np.mean((g - truth) ** 2)) for name, g in found.items()}
    assert errors["tpx-guarded"] > 0.5 * truth
    assert errors["safe"] < 1.2 * errors["lr"]


def one_node(returns, slope, mean=None):
    """The context of a graph with one node z ~ N(mean, 0.5²), where the return has this slope."""
    n = len(returns)
    mean = torch.zeros(n, 1, dtype=F64) if mean is None else mean
    zeta = mean, torch.full((n, 1), 0.5, dtype=F64)
    noise = torch.zeros(n, 1, dtype=F64)  # not used
    return GraphContext([Context(None, zeta, noise, returns / n, None)], [(slope / n, slope / n)])


def test_k_of_the_graph_by_hand():
    n, p = 100, 3
    told = one_node(randn(n, seed=42), torch.zeros(n, 1, dtype=F64), mean=randn(n, 1, seed=43))
    base, lr = (1 + 0.2 * randn(n, p, seed=40)) / n, (2 + randn(n, p, seed=41)) / n
    (k,) = mixing.guard((base,), [(lr,)], told)
    columns = [moments(n * base[:, i], n * lr[:, i]) for i in range(p)]
    v_base, v_lr, c, square = (sum(column[i] for column in columns) for i in range(4))
    difference = v_base + v_lr - 2 * c
    assert math.sqrt(square / difference) > threshold(v_base, v_lr)
    b = square - difference
    assert k.item() == pytest.approx((v_base - c + b) / (difference + b))
    (none,) = mixing.guard((base,), [(lr - (lr - base).mean(0),)], told)
    assert none.item() == 0


# In units of the noise: return, its derivative.
SMOOTH = {
    "linear": (lambda e: e, torch.ones_like),
    "quadratic": (lambda e: e.square(), lambda e: 2 * e),  # where the inequality is an equality
    "sine": (lambda e: (3 * e).sin(), lambda e: 3 * (3 * e).cos()),
    "ramp": (lambda e: (2 * e).clamp(0, 1), lambda e: 2.0 * ((e > 0) & (e < 0.5))),
}


def is_rough(function, slope, n, seed, scale=1.0, mean=None):
    e = randn(n, 1, seed=seed)
    told = one_node(scale * function(e).squeeze(-1), scale * slope(e) / 0.5, mean=mean)
    same = torch.zeros(n, 1, dtype=F64)
    (k,) = mixing.guard((same,), [(same,)], told)
    assert k.item() in (0, 1)
    return k.item() == 1


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("n", [50, 300])
def test_a_smooth_return_is_hardly_ever_called_rough(name, n):
    """Seeds 0 to 399: at most 1 %."""
    assert sum(is_rough(*SMOOTH[name], n, seed) for seed in range(400)) <= 4


def test_a_jump_is_called_rough_from_50_samples_on_if_all_start_alike():
    """Seeds 0 to 99, at any scale of the return."""
    jump = lambda e: (e > 0.3).to(e.dtype), torch.zeros_like
    for scale in (1.0, 1e-150, 1e150):
        assert all(is_rough(*jump, 50, seed, scale) for seed in range(100))
    assert not any(is_rough(*jump, 50, s, mean=randn(50, 1, seed=s)) for s in range(100))


def test_more_evidence_of_a_jump_is_asked_for_where_lr_would_cost_more():
    """A small jump in a linear return, 4.2 standard errors: enough where LR is as calm as RP."""
    n = 50
    e, base = randn(n, 1, seed=3), randn(n, 1, seed=5) / n
    told = one_node((e + (e > 0.3)).squeeze(-1), torch.ones_like(e) / 0.5)
    spread = randn(n, 1, seed=4)
    spread = spread - spread.mean(0)
    k = [
        mixing.guard((base,), [(base + times * spread / n,)], told)[0].item() for times in (1, 1e3)
    ]
    assert k == [1, 0]


def test_safe_keeps_away_from_lr_where_nothing_jumps():
    """A regulator without jumps, N = 300, seeds 0 to 99: at most 3 false alarms."""
    alarms = 0
    for seed in range(100):
        noise, gain = randn(10, 300, 1, seed=seed), {}
        for name in ("rp", "tpx", "tpg", "safe"):
            theta = torch.tensor([0.5], dtype=F64, requires_grad=True)

            def rollout(estimator, tap, theta=theta, noise=noise):
                x = torch.ones(300, 1, dtype=F64)
                credit, loss = x.new_zeros(300), 0.0
                for z in noise:
                    state = x.detach()
                    probe = ControlProbe(
                        [-state.unsqueeze(-1), torch.zeros(300, 1, 1, dtype=F64)],
                        lambda: DenseJacobian(torch.ones(300, 1, 1, dtype=F64)),
                    )
                    x, credit = estimator(
                        x - theta * x, torch.full_like(x, 0.1), z, credit, probe=probe, tap=tap
                    )
                    loss = loss + assign_credit(x.square().squeeze(-1), credit).mean()
                return loss

            estimator = make(name, legs="first-order") if name in ("tpx", "tpg") else make(name)
            found = gradient(rollout, [theta], estimator, samples=300, tap_size=1)
            gain[name] = found.gradients[0].item()
        alarms += not any(gain["safe"] == pytest.approx(gain[n]) for n in ("rp", "tpx", "tpg"))
    assert alarms <= 3


def test_a_base_is_nodewise_and_of_a_whole_graph_rule():
    for wrong in (
        {"base": (make("tpx"),)},
        {"base": (make("tpx"), make("ivw")), "whole_graph": True},
    ):
        with pytest.raises(ValueError, match="are nodewise estimators, for"):
            estimators.Estimator(mixing.guard, **wrong)
