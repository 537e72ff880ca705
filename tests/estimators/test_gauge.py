"""Gauges: z and signal-to-noise ratios by hand, by brute force, and against closed forms."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal
from torch.func import vmap

from totalprop import Rollout, estimators
from totalprop.estimators import Estimator, ParameterProbe, assign_credit, diagnostics
from totalprop.estimators.baselines import none
from totalprop.estimators.gauge import LEAST, SHAPE, read
from totalprop.estimators.legs import biw, score

F64 = torch.float64
COMPOSITES = (
    "tp", "tps", "tpx", "tpx-unclipped", "tpx-scalar", "tpx-ivw", "tpx-ivw-scalar", "tpg",
    "tp-guarded", "tpx-guarded", "tpg-guarded",
)  # fmt: skip


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed):
    return torch.randn(*shape, dtype=F64, generator=generator(seed))


def new_gauge(*lead, dtype=F64):
    return torch.zeros(*lead, *SHAPE, dtype=dtype, requires_grad=True)


def fixed(value):
    def weight(rp, legs, probe):
        return [torch.full_like(rp[0][:1], value)]

    return weight


def gauged(estimator, *, slope, returns, noise, std=1.0, dtype=F64, **extra):
    """Gauge of one node, whose dL/dsample [N, D] and returns [N] are given; and zeta's gradient."""
    noise = torch.as_tensor(noise, dtype=dtype)
    zeta_mean = torch.zeros_like(noise).requires_grad_()
    zeta_std = torch.full_like(noise, std).requires_grad_()
    gauge = new_gauge(dtype=extra.pop("gauge_dtype", dtype))
    sample, credit = estimator(
        zeta_mean, zeta_std, noise, noise.new_zeros(len(noise)), gauge=gauge, **extra
    )
    loss = torch.zeros((), dtype=dtype)
    if slope is not None and sample.requires_grad:
        slope = torch.as_tensor(slope, dtype=dtype)
        loss = loss + (slope * (sample - sample.detach())).sum()
    if returns is not None:
        loss = loss + assign_credit(torch.as_tensor(returns, dtype=credit.dtype), credit).sum()
    found = torch.autograd.grad(loss, [gauge, zeta_mean, zeta_std], materialize_grads=True)
    return found[0], found[1:]


# By hand


HAND = {
    "slope": [[1.0], [1.0], [0.0], [2.0]],
    "returns": [1.0, 2.0, 1.0, 0.0],
    "noise": [[1.0], [-1.0], [2.0], [-2.0]],
}


def test_hand_computed_numbers():
    """Pathwise (1, 1, 0, 2) and (1, -1, 0, -4), LR (1, -2, 2, 0) and (0, 0, 3, 0), k = 1/4.

    d = (0, -3, 2, -2) and (-1, 1, 3, 4) have means -3/4 and 7/4 and both the variance 59/12, so
    that z² (N - 3) / (N - 1) is 9/59 and 49/59.
    """
    found, _ = gauged(Estimator(fixed(0.25), baseline=none), **HAND)
    expected = [[58 / 59, 2], [44 / 331, 1], [1 / 2, 1], [-16 / 31, 1]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=F64))
    reading = read(found)
    assert float(reading.z) == pytest.approx(math.sqrt(29 / 59))
    assert reading._fields == ("z", "snr", "snr_rp", "snr_lr")
    assert [float(x) for x in reading[1:]] == pytest.approx([44 / 331, 1 / 2, -16 / 31])


def test_sums_of_gauges_are_read_as_means():
    gauges = torch.tensor([[[6.0, 2], [1, 1], [3, 1], [0, 0]], [[0, 0], [2, 1], [5, 1], [0, 0]]])
    one, both = read(gauges), read(gauges.sum(0))
    assert torch.equal(one.snr, torch.tensor([1.0, 2.0]))
    assert one.z[0] == math.sqrt(3.0) and one.z[1].isnan() and one.snr_lr.isnan().all()
    assert [float(x) for x in both[:3]] == pytest.approx([math.sqrt(3.0), 1.5, 4.0])
    assert both.snr_lr.isnan()


def test_a_gauge_of_several_nodes_adds_up():
    shared, own = new_gauge(), new_gauge(2)
    for gauge, take in ((shared, lambda t: shared), (own, lambda t: own[t])):
        r, loss = Rollout("tpx", generator=generator(3)), 0.0
        for t in range(2):
            mean = torch.full((8, 2), 0.3, dtype=F64, requires_grad=True)
            sample = r.sample(mean, torch.ones_like(mean), gauge=take(t))
            loss = loss + r.cost(sample.square().sum(-1)).mean()
        loss.backward()
        assert gauge.grad is not None
    torch.testing.assert_close(shared.grad, own.grad.sum(0))


# Brute force


def statistics(legs):
    """What a gauge should hold, in loops over the coordinates of per-sample arrays [N, C]."""
    difference, *cotangents = (np.concatenate([g.reshape(len(g), -1) for g in x], 1) for x in legs)
    n, z_square = len(difference), []
    for d in difference.T:
        error = d.std(ddof=1) / n**0.5
        if error > 0:
            z_square.append((d.mean() / error) ** 2 * (n - 3) / (n - 1))
    rows = [[sum(z_square), len(z_square)]]
    for g in cotangents:
        signal = sum(column.mean() ** 2 for column in g.T)
        noise = sum(column.var(ddof=1) for column in g.T) / n
        rows.append([signal / noise - 1, 1] if noise > 0 else [0, 0])
    return torch.tensor(rows, dtype=F64)


def node(kind):
    """Inputs of a node: zeta, noise and the trailing shape of its samples."""
    shape = {"gaussian": (9, 3), "blocks": (9, 2, 3), "categorical": (9, 4), "groups": (9, 2, 4)}
    size = shape[kind]
    first = randn(*size, seed=1)
    if kind in ("categorical", "groups"):
        uniform = torch.rand(size, dtype=F64, generator=generator(2))
        return (first,), -torch.log(-torch.log(uniform))
    return (first, 0.5 + randn(*size, seed=3).square()), randn(*size, seed=2)


def cost_of(sample):
    """[N, ...]: one cost per sample of the node."""
    weight = torch.linspace(0.5, 2.0, sample.shape[-1], dtype=sample.dtype)
    return torch.sin(weight * sample).sum(-1) + torch.tanh(sample.prod(-1))


def log_density(zeta, sample):
    if len(zeta) == 1:
        return (zeta[0].log_softmax(-1) * sample).sum(-1)
    return Normal(*zeta).log_prob(sample).sum(-1)


def per_sample_legs(zeta, noise, baseline, value):
    """Pathwise and score leg from autograd and torch.distributions, without a node."""
    zeta = tuple(z.detach().clone().requires_grad_() for z in zeta)
    n = len(noise)
    if len(zeta) == 2:
        sample = zeta[0] + zeta[1] * noise
    else:
        p = zeta[0].softmax(-1)
        hot = torch.nn.functional.one_hot((zeta[0] + noise).argmax(-1), p.shape[-1])
        sample = hot + p - p.detach()
    cost = cost_of(sample) / n
    rp = torch.autograd.grad(cost.sum(), zeta, retain_graph=True)
    returns = cost.detach()
    if baseline == "none":
        b = torch.zeros_like(returns)
    elif baseline == "mean":
        b = returns.mean(0).expand_as(returns)
    elif baseline == "leave-one-out":
        b = torch.stack([returns[torch.arange(n) != i].mean(0) for i in range(n)])
    else:  # regression of the others' returns on the value
        b = torch.empty_like(returns)
        for i, column in itertools.product(range(n), np.ndindex(returns.shape[1:])):
            x, y = (a[(slice(None), *column)].numpy() for a in (value, returns))
            slope, intercept = np.polyfit(np.delete(x, i), np.delete(y, i), 1)
            b[(i, *column)] = intercept + slope * x[i]
    density = log_density(zeta, sample.detach())
    lr = torch.autograd.grad(((returns - b) * density).sum(), zeta)
    return rp, lr


@pytest.mark.parametrize("kind", ["gaussian", "blocks", "categorical", "groups"])
@pytest.mark.parametrize("baseline", ["none", "mean", "leave-one-out", "critic"])
@pytest.mark.parametrize("cross_fit", [False, True])
@pytest.mark.parametrize("name", ["lr", "tpx", "tpx-ivw-scalar"])
def test_gauge_equals_brute_force(name, cross_fit, baseline, kind):
    zeta, noise = node(kind)
    zeta = tuple(z.requires_grad_() for z in zeta)
    value = randn(*noise.shape[:-1], seed=4) if baseline == "critic" else None
    estimator = estimators.make(name, baseline=baseline, cross_fit=cross_fit)
    gauge = new_gauge()
    sample, credit = estimator(
        zeta[0],
        zeta[1] if len(zeta) == 2 else None,
        noise,
        noise.new_zeros(noise.shape[:-1]),
        value=value,
        gauge=gauge,
    )
    loss = assign_credit(cost_of(sample) / 9, credit).sum()
    found, *mixed = torch.autograd.grad(loss, [gauge, *zeta])
    rp, lr = per_sample_legs(zeta, noise, baseline, value)
    difference = [b - a for a, b in zip(rp, lr, strict=True)]
    expected = statistics([[g.numpy() for g in leg] for leg in (difference, mixed, rp, lr)])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert found[0, 1] == sum(z[0].numel() for z in zeta)


def test_rp_measures_its_bias_with_the_plain_score_leg():
    """`rp` needs no score leg, so its own may not fit: the plain one with its usual baseline."""
    zeta, noise = node("gaussian")
    rp, lr = per_sample_legs(zeta, noise, "leave-one-out", None)
    zeta = tuple(z.requires_grad_() for z in zeta)
    for changes in ({}, {"legs": "biw"}, {"baseline": "critic"}, {"cross_fit": True}):
        gauge = new_gauge()
        sample, credit = estimators.make("rp", **changes)(
            *zeta, noise, noise.new_zeros(9), gauge=gauge
        )
        loss = assign_credit(cost_of(sample), credit).mean()
        found = torch.autograd.grad(loss, gauge)[0]
        difference = [b - a for a, b in zip(rp, lr, strict=True)]
        expected = statistics([[g.numpy() for g in leg] for leg in (difference, rp, rp, lr)])
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["lr", "tpx", "tpx-ivw"])
def test_lr_is_the_mean_of_several_legs(name):
    zeta, noise = node("gaussian")
    zeta = tuple(z.requires_grad_() for z in zeta)
    gauges = {}
    for legs in (("score", "biw"), ("score",), ("biw",)):
        estimator = estimators.make(name, legs=legs, baseline="none")
        gauge = new_gauge()
        sample, credit = estimator(*zeta, noise, noise.new_zeros(9), gauge=gauge)
        loss = assign_credit(cost_of(sample), credit).mean()
        gauges[legs], *mixed = torch.autograd.grad(loss, [gauge, *zeta])
        if len(legs) == 2:
            of_both = mixed
    returns = cost_of(zeta[0] + zeta[1] * noise).detach() / 9
    found = [leg(tuple(z.detach() for z in zeta), noise, returns, None, none)
             for leg in (score, biw)]  # fmt: skip
    lr = [(a + b) / 2 for a, b in zip(*found, strict=True)]
    rp, _ = per_sample_legs(zeta, noise, "none", None)
    difference = [b - a for a, b in zip(rp, lr, strict=True)]
    expected = statistics([[g.numpy() for g in leg] for leg in (difference, of_both, rp, lr)])
    torch.testing.assert_close(gauges["score", "biw"], expected)
    assert not torch.isclose(gauges[("score",)], gauges[("biw",)]).all()


def test_ratio_is_that_of_diagnostics_up_to_its_correction_for_few_samples():
    """N = 400, 3 parameters: the correction is within 2 / (N - 1) of 1."""
    n = 400
    slope, noise = 1 + randn(n, 3, seed=5), randn(n, 3, seed=6)
    found, zeta_gradient = gauged(
        estimators.make("tpx"), slope=slope, returns=randn(n, seed=7), noise=noise
    )
    expected = n * diagnostics.signal_to_noise(torch.cat(zeta_gradient, 1).unsqueeze(0))
    assert float(read(found).snr) == pytest.approx(float(expected), rel=3 / n)
    assert expected > 50


# Closed forms


def linear_quadratic(name, n, source, *, horizon=3, **changes):
    """Gauges [H, 4, 2] of x' = A x + θ + ε/2 with cost |x|², from one start."""
    dynamics = torch.tensor([[0.9, 0.2], [-0.1, 0.8]], dtype=F64)
    gauge = new_gauge(horizon)
    theta = torch.tensor(0.3, dtype=F64, requires_grad=True)
    r, loss = Rollout(estimators.make(name, **changes), generator=source), 0.0
    x = torch.full((n, 2), 0.5, dtype=F64)
    for t in range(horizon):
        mean = x @ dynamics.T + theta
        x = r.sample(mean, torch.full_like(mean, 0.5), gauge=gauge[t])
        loss = loss + r.cost(x.square().sum(-1)).mean()
    return torch.autograd.grad(loss, gauge)[0]


@pytest.mark.parametrize(
    ("name", "changes"), [("rp", {}), ("lr", {}), ("tpx", {}), ("tpx", {"cross_fit": True})]
)
def test_mean_square_of_z_is_1_where_both_legs_have_one_mean(name, changes):
    """N = 3000, 200 rollouts, seed 8, 3 nodes: within 4 standard errors, about 0.04 each."""
    source = generator(8)
    found = torch.stack([linear_quadratic(name, 3000, source, **changes) for _ in range(200)])
    square = found[:, :, 0, 0] / found[:, :, 0, 1]  # [200, 3]
    error = square.std(0) / 200**0.5
    assert error.max() < 0.08
    assert ((square.mean(0) - 1) / error).abs().max() <= 4


def test_mean_square_of_z_is_1_for_normal_differences_of_few_samples():
    """d normal, N = 20, seed 9: z² is F(1, 19), with mean 19/17; within 4 standard errors."""
    n, coordinates = 20, 40_000
    slope = randn(n, coordinates, seed=9)
    noise = torch.zeros(n, coordinates, dtype=F64)
    found, _ = gauged(
        Estimator(fixed(0.5), baseline=none), slope=slope, returns=torch.zeros(n), noise=noise
    )
    assert found[0, 1] == coordinates  # the std's cotangents are 0
    fourth_moment = 3 * 19**2 / (17 * 15)
    error = 17 / 19 * ((fourth_moment - (19 / 17) ** 2) / coordinates) ** 0.5
    assert abs(float(found[0, 0] / found[0, 1]) - 1) <= 4 * error < 0.04


def test_z_is_large_where_the_cost_jumps():
    """Cost x² + 1[x > 0], x ~ N(0, 1), N = 1000, 300 batches, seed 10.

    RP misses the jump, whose gradient is φ(0) in the mean and 0 in the std. By numerical
    integration of the LR leg without the mean return: E z² = 1 + N φ(0)² / V, and 1.
    """
    n, x = 1000, torch.linspace(-12, 12, 200_001, dtype=F64)
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    cost = x.square() + (x > 0)

    def moment(f):
        return float(torch.trapezoid(f * density, x))

    d = (cost - moment(cost)) * x - 2 * x
    bias = moment(d)
    assert bias == pytest.approx(1 / math.sqrt(2 * math.pi), abs=1e-4)
    expected = 1 + n * bias**2 / (moment(d.square()) - bias**2)
    source, found = generator(10), []
    for _ in range(300):
        mean = torch.zeros(n, 1, dtype=F64, requires_grad=True)
        gauge, r = new_gauge(), Rollout("tpx", generator=source)
        sample = r.sample(mean, torch.ones_like(mean), gauge=gauge)
        jump = (sample > 0).to(F64)
        loss = r.cost((sample.square() + jump).squeeze(-1)).mean()
        found.append(torch.autograd.grad(loss, gauge)[0][0])
    total = torch.stack(found)
    square = total[:, 0] / total[:, 1]  # mean over two coordinates
    error = float(square.std()) / 300**0.5
    assert abs(float(square.mean()) - (expected + 1) / 2) <= 4 * error
    assert float(square.mean()) > 8 and error < 1


@pytest.mark.parametrize("blocked", [False, True])
def test_z_is_large_where_a_path_is_blocked(blocked):
    """x ~ N(1, s²), the action -3 x answers it, cost (x - 3 x)²; N = 1000, 100 batches, seed 12.

    d cost / dx is 8 x, or -4 x if the action is blocked, so that the means differ by 12 (by 12 s in
    the std). Within 5 % of 1 + N (E d)² / V, with V from a batch of 10⁶.
    """
    s, source = 0.5, generator(12)

    def batch(n):
        mean = torch.ones(n, 1, dtype=F64, requires_grad=True)
        gauge, r = new_gauge(), Rollout("tpx", generator=source)
        sample = r.sample(mean, torch.full_like(mean, s), gauge=gauge)
        action = -3 * (sample.detach() if blocked else sample)
        loss = r.cost((sample + action).square().squeeze(-1)).mean()
        return torch.autograd.grad(loss, gauge)[0][0]

    found = sum(batch(1000) for _ in range(100))
    square = float(found[0] / found[1])
    if not blocked:
        assert abs(square - 1) < 4 * (2 / 200) ** 0.5  # of a χ² variable with 200 degrees
        return
    noise = torch.randn(10**6, dtype=F64, generator=source)
    x = 1 + s * noise
    advantage = 4 * x.square() - 4 * (1 + s**2)
    expected = 0.0
    for d, bias in (
        (advantage * noise / s + 4 * x, 12.0),
        (advantage * (noise.square() - 1) / s + 4 * x * noise, 12 * s),
    ):
        assert abs(float(d.mean()) - bias) <= 4 * float(d.std()) / 1000
        expected += 1000 * bias**2 / float(d.var()) / 2
    assert square == pytest.approx(1 + expected, rel=0.05)
    assert square > 50


def test_snr_of_rp_and_lr_in_closed_form():
    """Cost a x + x² / 2 at x = s ε, N = 200000, seed 11, within 4 standard errors.

    RP is a + s ε and a ε + s ε². LR is a ε² + s (ε³ - ε) / 2 and a (ε³ - ε) + s (ε² - 1)² / 2.
    """
    n, a, s = 200_000, 2.0, 0.5
    mean = torch.zeros(n, 1, dtype=F64, requires_grad=True)
    gauge, r = new_gauge(), Rollout("tpx", generator=generator(11))
    sample = r.sample(mean, torch.full_like(mean, s), gauge=gauge)
    loss = r.cost((a * sample + sample.square() / 2).squeeze(-1)).mean()
    found = read(torch.autograd.grad(loss, gauge)[0])
    signal = a**2 + s**2
    rp, lr = s**2 + (a**2 + 2 * s**2), (2 * a**2 + 2.5 * s**2) + (10 * a**2 + 14 * s**2)
    for found_snr, variance in ((found.snr_rp, rp), (found.snr_lr, lr)):
        expected = n * signal / variance
        assert float(found_snr) == pytest.approx(expected, rel=4 * 2 / expected**0.5)
        assert expected > 15_000


# Contracts


def probe_of(n, d):
    features = randn(n, 4, seed=30)
    parameters = {"w": torch.ones(d, 4, dtype=F64), "v": torch.zeros(d, 4, dtype=F64)}

    def zeta(p, f):
        return p["w"] @ f, (p["v"] @ f).exp()

    return ParameterProbe(zeta, parameters, features)


@pytest.mark.parametrize("cross_fit", [False, True])
@pytest.mark.parametrize("name", ["rp", "lr", *COMPOSITES])
def test_gauge_leaves_the_gradient_alone(name, cross_fit):
    estimator = estimators.make(name, cross_fit=cross_fit)
    extra = {} if estimator.probe == "none" else {"probe": probe_of(16, 3)}
    zeta = (randn(16, 3, seed=20).requires_grad_(), randn(16, 3, seed=21).exp().requires_grad_())

    def gradient(**kwargs):
        sample, credit = estimator(
            *zeta, randn(16, 3, seed=22), torch.zeros(16, dtype=F64), **extra, **kwargs
        )
        loss = assign_credit(cost_of(sample), credit).mean()
        return torch.autograd.grad(loss, [*zeta, *kwargs.values()])

    *metered, gauge = gradient(gauge=new_gauge())
    assert all(torch.equal(a, b) for a, b in zip(metered, gradient(), strict=True))
    assert gauge.isfinite().all() and gauge[:, 1].tolist() == [6, 1, 1, 1]


def test_without_a_path_or_a_credit_only_the_other_leg_is_measured():
    lr = Estimator(fixed(1.0), baseline=none)
    found, _ = gauged(lr, slope=None, returns=HAND["returns"], noise=HAND["noise"])
    assert found[:, 1].tolist() == [0, 1, 0, 1]
    reading = read(found)
    assert reading.z.isnan() and reading.snr_rp.isnan()
    assert float(reading.snr) == float(reading.snr_lr) == pytest.approx(-16 / 31)
    rp = estimators.make("rp")
    found, _ = gauged(rp, slope=HAND["slope"], returns=None, noise=HAND["noise"])
    assert found[:, 1].tolist() == [0, 1, 1, 0]
    assert float(read(found).snr_rp) == pytest.approx(1 / 2)


@pytest.mark.parametrize("n", range(1, LEAST + 1))
def test_few_samples_are_not_measured(n):
    estimator = estimators.make("rp")
    given = {name: values[:n] for name, values in HAND.items()}
    found, _ = gauged(estimator, **given)
    assert bool(found.any()) == (n == LEAST)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_what_is_not_finite_is_not_counted(bad):
    slope = torch.ones(6, 2, dtype=F64)
    slope[3, 1] = bad
    found, _ = gauged(
        estimators.make("tpx"), slope=slope, returns=randn(6, seed=1), noise=randn(6, 2, seed=2)
    )
    assert found.isfinite().all()
    assert found[1:, 1].tolist() == [1, 0, 1]  # the mixture leaves that coordinate's pathwise out
    reading = read(found)
    assert reading.snr.isfinite() and reading.snr_lr.isfinite() and reading.snr_rp.isnan()


def test_coordinates_without_variation_are_not_counted():
    """Nothing depends on the second coordinate's noise where it is 0 and its slope is 0."""
    slope, noise = randn(8, 2, seed=1), randn(8, 2, seed=2)
    slope[:, 1] = 0
    noise[:, 1] = 1.0  # (noise² - 1) is 0
    found, _ = gauged(
        Estimator(fixed(0.5), baseline=none), slope=slope, returns=randn(8, seed=3), noise=noise
    )
    assert found[0, 1] == 3
    zeros, _ = gauged(estimators.make("tpx"), slope=0 * slope, returns=torch.zeros(8), noise=noise)
    assert not zeros.any()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_gauge_is_independent_of_the_losss_scale(scale):
    """In float32, where squares would overflow or vanish."""
    slope, noise = randn(12, 3, seed=1).float(), randn(12, 3, seed=2).float()
    returns = randn(12, seed=3).float()

    def found(scale):
        return gauged(
            estimators.make("tpx"), slope=scale * slope, returns=scale * returns, noise=noise,
            dtype=torch.float32,
        )[0]  # fmt: skip

    torch.testing.assert_close(found(scale), found(1.0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_measured_in_float32(dtype):
    half, _ = gauged(
        Estimator(fixed(0.25), baseline=none), **HAND, dtype=dtype, gauge_dtype=torch.float32
    )
    assert half.dtype == torch.float32
    expected = [[58 / 59, 2], [44 / 331, 1], [1 / 2, 1], [-16 / 31, 1]]
    torch.testing.assert_close(half, torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_gauge_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"gauge must be zeros \[4, 2\], got \[3, 4, 2\]"):
        Rollout("tpx").sample(torch.zeros(4, 1), torch.ones(4, 1), gauge=torch.zeros(3, 4, 2))


def test_gauges_under_vmap():
    """A gauge for each of 3 batches equals three calls."""
    means, noise = randn(3, 8, 2, seed=1), randn(3, 8, 2, seed=2)
    estimator = estimators.make("tpx")

    def gradient(mean, noise):
        def loss(gauge):
            sample, credit = estimator(
                mean, torch.ones_like(mean), noise, mean.new_zeros(8), gauge=gauge
            )
            return assign_credit(cost_of(sample), credit).mean()

        return torch.func.grad(loss)(torch.zeros(SHAPE, dtype=F64))

    expected = torch.stack([gradient(m, e) for m, e in zip(means, noise, strict=True)])
    torch.testing.assert_close(vmap(gradient)(means, noise), expected)
    assert expected[:, 0, 0].std() > 0


def test_whole_graph_ivw_has_no_mixture_at_a_node():
    """Its z and legs are those of the RP pass."""
    weight, noise = torch.tensor(0.4, dtype=F64, requires_grad=True), randn(2, 12, 2, seed=1)

    def rollout(estimator, tap, gauge):
        x, credit, loss = torch.ones(12, 2, dtype=F64), torch.zeros(12, dtype=F64), 0.0
        for t in range(2):
            probe = ParameterProbe(
                lambda p, s: (torch.sin(p["w"] * s), torch.ones_like(s)), {"w": weight}, x
            )
            mean = torch.sin(weight * x)
            x, credit = estimator(
                mean, torch.ones_like(mean), noise[t], credit, probe=probe, tap=tap, gauge=gauge[t]
            )
            loss = loss + assign_credit(cost_of(x), credit).mean()
        return loss

    found = {}
    for name in ("ivw", "rp"):
        gauge = new_gauge(2)
        found[name] = estimators.gradient(
            lambda estimator, tap, gauge=gauge: rollout(estimator, tap, gauge),
            [weight], estimators.make(name), samples=12, gauge=gauge,
        ).gauge  # fmt: skip
    ivw, rp = found["ivw"], found["rp"]
    assert read(ivw).snr.isnan().all()
    torch.testing.assert_close(ivw[:, [0, 2, 3]], rp[:, [0, 2, 3]])
    assert (rp[:, :, 1] > 0).all()


@pytest.mark.parametrize(("n", "z"), [(50, 1.52), (1000, 1.11)])
def test_few_samples_of_skewed_differences_raise_z_above_1(n, z):
    """x² of one coordinate ~ N(0.5, 1), 4000 nodes, as the documentation says: 4 SE."""
    theta = torch.tensor(0.5, dtype=F64, requires_grad=True)
    gauge, r = new_gauge(), Rollout("tpx", generator=generator(40))
    ones = torch.ones(n, 4000, 1, dtype=F64)
    x = r.sample(theta * ones, ones, gauge=gauge)
    (found,) = torch.autograd.grad(r.cost(x.square().squeeze(-1)).mean(0).sum(), gauge)
    assert read(found).z.item() == pytest.approx(z, abs=4 * 0.016)
