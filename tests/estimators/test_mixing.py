"""Weight rules: the example of Parmas et al. 2023, cross-fitting, and the objective of `tpg`."""

import pytest
import torch

from totalprop import estimators
from totalprop.estimators import (
    ControlProbe,
    DenseJacobian,
    ParameterProbe,
    Rollout,
    assign_credit,
    make,
    mixing,
    node,
)
from totalprop.estimators.probes import restrict

F64 = torch.float64


def generator(seed):
    return torch.Generator().manual_seed(seed)


# Parmas et al. 2023, App. A: R = x² / 2, x ~ N(0, 1): V_LR = 5/2, V_RP = 1, cov = 1 (Eq. 15).

N_QUADRATIC = 1_000_000


def quadratic(name):
    """Per-sample gradients w.r.t. the mean [N], and k; N = 1e6, seed 0."""
    noise = torch.randn(N_QUADRATIC, 1, dtype=F64, generator=generator(0))
    mean = torch.zeros_like(noise).requires_grad_()
    meter = torch.zeros(1, 1, dtype=F64, requires_grad=True)
    sample, credit = make(name)(
        mean, torch.ones_like(noise), noise, noise.new_zeros(N_QUADRATIC), meter=meter
    )
    cost = 0.5 * sample.square().squeeze(1)
    g, k = torch.autograd.grad((cost * (1 + credit)).sum(), [mean, meter])
    return g.squeeze(1), float(k)


def variance_and_error(g):
    """Sample variance and its standard error, from the fourth moment."""
    centred = g - g.mean()
    variance = centred.square().mean()
    return float(variance), float(((centred**4).mean() - variance**2) / len(g)) ** 0.5


@pytest.mark.parametrize(
    ("name", "variance"), [("rp", 1.0), ("lr", 2.5), ("tpx", 1.0), ("tpx-ivw", 55 / 49)]
)
def test_variances_of_the_quadratic_example(name, variance):
    """Eq. 15; Eq. 9 at k = 1 / 3.5 gives 55 / 49 = 1.122. Within 4 SE, and 4 SE below 4 %."""
    g, _ = quadratic(name)
    found, standard_error = variance_and_error(g)
    assert standard_error < 0.01 * variance
    assert abs(found - variance) <= 4 * standard_error


def test_covariance_of_the_quadratic_example():
    """cov(LR, RP) = 1, within 4 SE."""
    (rp, _), (lr, _) = quadratic("rp"), quadratic("lr")
    products = (rp - rp.mean()) * (lr - lr.mean())
    assert abs(products.mean() - 1) <= 4 * products.std() / N_QUADRATIC**0.5


@pytest.mark.parametrize("name", ["tpx", "tpx-scalar"])
def test_k_of_the_quadratic_example_with_covariance(name):
    """k* = 0. Before clipping, the regression's k has a standard error of sqrt(8 / N) / 1.5. Its
    influence function, including the error in the baseline, is (-x⁴/2 + 2x² - 1/2) / 1.5.
    """
    _, k = quadratic(name)
    assert 0 <= k <= 4 * (8 / N_QUADRATIC) ** 0.5 / 1.5


@pytest.mark.parametrize("name", ["tpx-ivw", "tpx-ivw-scalar"])
def test_k_of_the_quadratic_example_without_covariance(name):
    """k = 1 / 3.5; standard error by the delta method from the variances' influence functions."""
    _, k = quadratic(name)
    (rp, _), (lr, _) = quadratic("rp"), quadratic("lr")
    influence = (2.5 * rp.square() - lr.square()) / 3.5**2  # dk = (V_LR dV_RP - V_RP dV_LR) / V²
    # The baseline's error changes V_LR by 2 cov(lr, x) δb = 2 δb with cov = 1, δb = 1/2 - mean R.
    influence = influence - 2 * (0.5 - 0.5 * rp.square()) / 3.5**2
    standard_error = float(influence.std()) / N_QUADRATIC**0.5
    assert standard_error < 2e-3
    assert abs(k - 1 / 3.5) <= 4 * standard_error


# Cross-fitting. R = exp(x), x ~ N(m, 1): d E[R] / dm = exp(m + 1/2).


def exponential_gradients(name, cross_fit, *, n, repeats, seed=1):
    """[R] gradients of independent batches of n samples, m = 0; exact: exp(1/2)."""
    noise = torch.randn(n, repeats, 1, dtype=F64, generator=generator(seed))
    mean = torch.zeros_like(noise).requires_grad_()
    sample, credit = make(name, cross_fit=cross_fit)(
        mean, torch.ones_like(noise), noise, noise.new_zeros(n, repeats)
    )
    loss = (sample.exp().squeeze(-1) * (1 + credit)).mean(0).sum()
    return torch.autograd.grad(loss, mean)[0].sum((0, 2))


def exponential_gradients_with_probe(name, cross_fit, *, n, repeats, seed=2):
    """The same for rules in parameter space, where the only parameter is the mean."""
    one = torch.ones(n, 1, 1, dtype=F64)
    probe = ControlProbe([one, torch.zeros_like(one)], lambda: DenseJacobian(one))
    estimator, source, found = make(name, cross_fit=cross_fit), generator(seed), []
    for _ in range(repeats):
        noise = torch.randn(n, 1, dtype=F64, generator=source)
        mean = torch.zeros_like(noise).requires_grad_()
        sample, credit = estimator(
            mean, torch.ones_like(noise), noise, noise.new_zeros(n), probe=probe
        )
        loss = (sample.exp().squeeze(-1) * (1 + credit)).mean()
        found.append(torch.autograd.grad(loss, mean)[0].sum())
    return torch.stack(found)


CROSS_FITTED = {
    "tpx": (exponential_gradients, 100_000),
    "tpx-ivw": (exponential_gradients, 100_000),
    "tpg": (exponential_gradients_with_probe, 3_000),
}


def bias_in_standard_errors(g):
    exact = torch.tensor(0.5, dtype=F64).exp()
    return float((g.mean() - exact) / (g.std() / len(g) ** 0.5))


@pytest.mark.parametrize("name", CROSS_FITTED)
def test_k_of_the_same_samples_biases_a_small_batch(name):
    """N = 6: with an in-sample k the bias exceeds 6 SE (100000 repeats; tpg: 3000)."""
    gradients, repeats = CROSS_FITTED[name]
    g = gradients(name, False, n=6, repeats=repeats)
    assert abs(bias_in_standard_errors(g)) > 6


@pytest.mark.parametrize(
    ("cross_fit", "n", "repeats", "bias"),
    [
        (False, 6, 8000, (-0.14, -0.37)),
        (False, 50, 2000, (-0.041, -0.11)),
        (True, 6, 8000, (-0.015, -0.05)),
        (True, 50, 2000, (0.0, -0.003)),
    ],
)
def test_the_bias_of_tpx_over_a_chain_is_as_documented(cross_fit, n, repeats, bias):
    """Six steps x' ~ N(x + 0.5, 1) with cost x²: Σ t² and Σ 2 t are exact in mean and std; 4 SE."""
    parameters = [torch.full((repeats, 1), v, dtype=F64, requires_grad=True) for v in (0.5, 1.0)]
    r = Rollout(make("tpx", cross_fit=cross_fit), generator=generator(7))
    x, loss = torch.zeros(n, repeats, 1, dtype=F64), 0.0
    for _ in range(6):
        x = r.sample(x + parameters[0], parameters[1].expand_as(x))
        loss = loss + r.cost(x.square().squeeze(-1)).mean(0).sum()
    for g, exact, said in zip(torch.autograd.grad(loss, parameters), (91.0, 42.0), bias):
        error = g.std().item() / repeats**0.5 / exact
        assert g.mean().item() / exact - 1 == pytest.approx(said, abs=4 * error)


@pytest.mark.parametrize("name", CROSS_FITTED)
def test_cross_fit_is_unbiased_at_a_single_node(name):
    """With k from the other half of each batch the bias is below 4 SE (half as many repeats)."""
    gradients, repeats = CROSS_FITTED[name]
    g = gradients(name, True, n=6, repeats=repeats // 2)
    assert abs(bias_in_standard_errors(g)) <= 4


@pytest.mark.parametrize("name", ["tp", "tpx", "tpx-scalar", "tpx-ivw", "tpx-ivw-scalar", "tpg"])
@pytest.mark.parametrize("n", [12, 13])
def test_cross_fit_uses_the_other_half(name, n):
    """Against an explicit computation: each half has its own baseline and the other half's k."""
    rp, lr, probe = toy_legs(n=n)
    halves = slice(0, n // 2), slice(n // 2, n)
    legs_and_k = []
    for rows in halves:
        part = tuple(g[rows] for g in rp), tuple(g[rows] for g in lr)
        k = make(name).weight(part[0], [part[1]], restrict(probe, rows, n))[0]
        legs_and_k.append((*part, k))
    expected = []
    for (g_rp, g_lr, _), (*_, k) in zip(legs_and_k, legs_and_k[::-1], strict=True):
        expected.append(g_rp[0] + k * (g_lr[0] - g_rp[0]))

    def leg(zeta, noise, returns, value, baseline):
        return tuple(g[int(returns[0]) : int(returns[0]) + len(returns)] for g in lr)

    estimator = make(name, cross_fit=True, legs=(leg,))
    mean = torch.zeros(n, 3, dtype=F64, requires_grad=True)
    std = torch.ones(n, 3, dtype=F64, requires_grad=True)
    noise = rp[1] / rp[0]
    sample, credit = estimator(mean, std, noise, mean.new_zeros(n), probe=probe)
    row = torch.arange(n, dtype=F64)  # used as the return, so that the leg can identify its rows
    found = torch.autograd.grad((sample, credit), mean, (rp[0], row))[0]
    torch.testing.assert_close(found, torch.cat(expected))


# The rules applied to given legs.


def toy_legs(n=200, d=3, seed=3, correlation=0.5):
    """Legs [N, D] of unequal spread, independent if `correlation` is 0, and a probe."""
    source = generator(seed)
    spread = torch.tensor([0.5, 1.0, 3.0], dtype=F64)
    common = torch.randn(n, d, dtype=F64, generator=source)
    g_rp = 1 + spread * (common + torch.randn(n, d, dtype=F64, generator=source))
    g_lr = 1 + spread.flip(0) * (
        correlation * common + torch.randn(n, d, dtype=F64, generator=source)
    )
    noise = torch.randn(n, d, dtype=F64, generator=source)
    features = torch.randn(n, 4, dtype=F64, generator=source)
    parameters = {"w": torch.randn(d, 4, dtype=F64, generator=source)}

    def zeta(p, f):
        mean = torch.sin(p["w"] @ f)
        return mean + mean.sum(), mean.exp()

    return (g_rp, g_rp * noise), (g_lr, g_lr * noise), ParameterProbe(zeta, parameters, features)


def parameter_variance(rp, lr, probe, k):
    """tr Var_i of the per-sample parameter gradients of the mixture."""
    g = probe(tuple(one + k * (other - one) for one, other in zip(rp, lr, strict=True)))
    return float(g.var(0).sum())


@pytest.mark.parametrize(
    "name", [n for n in estimators.names() if n.startswith("t") and not make(n).several_passes]
)
def test_k_is_broadcastable_and_between_zero_and_one(name):
    rp, lr, probe = toy_legs()
    (found,) = make(name).weight(rp, [lr], probe)
    for k in found if isinstance(found, tuple) else (found,):
        assert torch.broadcast_shapes(k.shape, rp[0].shape) == rp[0].shape
        if name == "tpx-unclipped":
            assert ((k < 0) | (k > 1)).any()
        else:
            assert ((k >= 0) & (k <= 1)).all()
        assert ((k > 0) & (k < 1)).any()


def test_unclipped_k_is_equation_8():
    """With N - 1 in all variances and covariances; `tpx` is the same, clipped."""
    rp, lr, _ = toy_legs()
    (k,) = mixing.tpx_unclipped(rp, [lr], None)
    for d in range(rp[0].shape[1]):
        (v_rp, cov), (_, v_lr) = torch.cov(torch.stack((rp[0][:, d], lr[0][:, d])))
        torch.testing.assert_close(k[0, d], (v_rp - cov) / (v_lr + v_rp - 2 * cov))
    torch.testing.assert_close(mixing.tpx(rp, [lr], None)[0], k.clamp(0, 1))


def test_a_weight_above_one_is_used():
    """RP = 2 LR + noise: Eq. 8 subtracts RP, and halves the standard deviation of LR at least.

    N = 2000, seed 1; without the clip the variance is that of the regression's residual.
    """
    generator = torch.Generator().manual_seed(1)
    lr, noise = torch.randn(2, 2000, 1, dtype=F64, generator=generator)
    rp = 2 * lr + 0.3 * noise
    (k,) = mixing.tpx_unclipped((rp, rp), [(lr, lr)], None)
    assert k.item() > 1
    mixed = node._combine((rp, rp), [(lr, lr)], [(k, k)])[0][0]
    delta = (lr - rp - (lr - rp).mean()).squeeze()
    centred = (rp - rp.mean()).squeeze()
    residual = centred - delta * (delta @ centred) / (delta @ delta)
    torch.testing.assert_close(mixed.var(), residual.var())
    assert mixed.std() < 0.5 * lr.std()


def test_unclipped_weights_of_several_legs_are_generalised_least_squares():
    """The optimum on the plane Σ w = 1 is S⁻¹ 1 / 1ᵀ S⁻¹ 1, with a negative weight here."""
    generator = torch.Generator().manual_seed(2)
    common, *own = torch.randn(4, 500, 1, dtype=F64, generator=generator)
    rp, first, second = common + 0.1 * own[0], 2 * common + 0.1 * own[1], own[2]
    k = mixing.tpx_unclipped((rp, rp), [(first, first), (second, second)], None)
    s = torch.cov(torch.cat((rp, first, second), 1).T)
    expected = torch.linalg.solve(s, torch.ones(3, dtype=F64))
    expected = expected / expected.sum()
    torch.testing.assert_close(torch.cat(k).flatten(), expected[1:], rtol=1e-5, atol=1e-6)
    assert expected.min() < 0


def variances_in_parameter_space(rp, lr, probe):
    """tr Var_i under each rule's k, on the same samples that k was chosen from (no noise)."""
    rules = ("rp", "lr", "tp", "tpx", "tpx-scalar", "tpx-ivw", "tpx-ivw-scalar", "tpg")
    ks = {name: make(name).weight(rp, [lr], probe)[0] for name in rules}
    return {name: parameter_variance(rp, lr, probe, k) for name, k in ks.items()}


@pytest.mark.parametrize("seed", range(5))
def test_tpg_follows_the_best_rule_where_the_legs_are_independent(seed):
    variance = variances_in_parameter_space(*toy_legs(seed=seed, n=2000, correlation=0.0))
    best = min(v for name, v in variance.items() if name != "tpg")
    assert variance["tpg"] <= 1.1 * best
    assert variance["tpg"] < 0.8 * min(variance["rp"], variance["lr"])


def test_tpg_keeps_a_calm_coordinate_from_a_chaotic_one():
    """RP is 1e6 times worse in one coordinate. `tp`, with one k for both, loses the other too."""
    rp, lr, probe = toy_legs(seed=6)
    factor = torch.tensor([1e-3, 1e6, 1e-3], dtype=F64)
    rp = tuple(g * factor for g in rp)
    (k,) = mixing.tpg(rp, [lr], probe)
    assert k[0, 1] > 0.999
    assert (k[0, [0, 2]] < 0.01).all()
    assert (mixing.tp(rp, [lr], probe)[0] > 0.999).all()


def test_tpx_minimises_the_variance_of_each_coordinate():
    source = generator(7)
    rp, lr = (
        (1 + s * torch.randn(50, 3, dtype=F64, generator=source), torch.zeros(50, 3, dtype=F64))
        for s in (torch.ones(3, dtype=F64), torch.tensor([0.5, 1.0, 2.0], dtype=F64))
    )
    (k,) = mixing.tpx(rp, [lr], None)

    def variance(k):
        return (rp[0] + k * (lr[0] - rp[0])).var(0)

    assert ((k > 0) & (k < 1)).all()
    for step in (-0.01, 0.01):
        assert (variance(k + step) > variance(k)).all()


@pytest.mark.parametrize("name", ["tp", "tpx", "tpx-scalar", "tpx-ivw", "tpx-ivw-scalar"])
def test_swapping_the_legs_gives_one_minus_k(name):
    """Eq. 5, 6 and 8 are symmetric in the two estimators."""
    rp, lr, probe = toy_legs(seed=9)
    (k,), (swapped,) = (make(name).weight(a, [b], probe) for a, b in ((rp, lr), (lr, rp)))
    torch.testing.assert_close(swapped, 1 - k, rtol=1e-6, atol=1e-7)


def test_tpg_refuses_what_it_cannot_do():
    rp, lr, probe = toy_legs()
    with pytest.raises(ValueError, match=r"one score leg.*2 legs.*weight=tpx"):
        mixing.tpg(rp, [lr, lr], probe)
    deep = tuple(g.unsqueeze(1) for g in rp)
    with pytest.raises(ValueError, match=r"\[N, D\]"):
        mixing.tpg(deep, [deep], probe)


@pytest.mark.parametrize("reach", [0.0, 1e-6, 1e-3, 1e-2])
def test_tpg_keeps_a_coordinate_that_parameters_do_not_reach(reach):
    """A double integrator with Euler steps, where only the velocity moves the position.

    RP is accurate here. A k of 1 for the position would cost nothing at its own node, but would
    pass LR on to all earlier nodes (with 10 times the variance of the other rules).
    """
    n, horizon, dt = 200, 20, 0.1

    def variance(name):
        found = []
        for seed in range(20):
            g = torch.Generator().manual_seed(seed)
            theta = torch.tensor([-1.0, -0.5], dtype=F64, requires_grad=True)
            start = torch.tensor([1.0, 0.0], dtype=F64)
            x = start + 0.1 * torch.randn(n, 2, dtype=F64, generator=g)
            one = torch.tensor([reach, dt], dtype=F64).expand(n, 2).unsqueeze(-1)
            credit, loss = x.new_zeros(n), 0.0
            for _ in range(horizon):
                state = x.detach()
                probe = ControlProbe(
                    [one, torch.zeros_like(one)], lambda s=state: DenseJacobian(s.unsqueeze(1))
                )
                u = x @ theta
                mean = torch.stack((x[:, 0] + dt * x[:, 1] + reach * u, x[:, 1] + dt * u), 1)
                noise = torch.randn(n, 2, dtype=F64, generator=g)
                x, credit = make(name)(
                    mean, torch.full_like(mean, 0.05), noise, credit, probe=probe
                )
                loss = loss + assign_credit(x.square().sum(-1), credit).mean()
            found.append(torch.autograd.grad(loss, theta)[0])
        return float(torch.stack(found).var(0).sum())

    assert variance("tpg") < 1.1 * min(variance("rp"), variance("tp"), variance("tpx"))
