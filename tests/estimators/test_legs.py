"""Legs: score and batch importance weighting against explicit references; more than one leg."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import chi
from torch.distributions import Normal

from totalprop import estimators
from totalprop.estimators import baselines, legs, make, mixing
from totalprop.estimators.baselines import leave_one_out, none
from totalprop.estimators.legs import draw

F64 = torch.float64


def randn(*shape, seed):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def gaussian(n=6, d=2, seed=0):
    mean, std = randn(n, d, seed=seed), 0.4 + randn(n, d, seed=seed + 1).square()
    return (mean, std), randn(n, d, seed=seed + 2), randn(n, seed=seed + 3)


def test_draw_gaussian():
    (mean, std), noise, _ = gaussian()
    torch.testing.assert_close(legs.draw((mean, std), noise), mean + std * noise)


def test_draw_categorical_is_the_argmax_of_logits_plus_noise():
    logits = torch.tensor([[0.0, 1.0, 2.0], [5.0, 1.0, 2.0]], dtype=F64)
    noise = torch.tensor([[0.0, 3.0, 0.0], [0.0, 0.0, 0.0]], dtype=F64)
    expected = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]], dtype=F64)
    assert torch.equal(legs.draw((logits,), noise), expected)


def test_pathwise_is_the_gradient_of_the_draw():
    zeta, noise, _ = gaussian()
    zeta = tuple(z.requires_grad_() for z in zeta)
    g_sample = randn(6, 2, seed=9)
    expected = torch.autograd.grad(legs.draw(zeta, noise), zeta, g_sample)
    torch.testing.assert_close(legs.pathwise(zeta, noise, g_sample), expected)


@pytest.mark.parametrize("baseline", [baselines.none, baselines.leave_one_out, baselines.mean])
def test_score_is_advantage_times_the_gradient_of_the_log_probability(baseline):
    zeta, noise, returns = gaussian()
    zeta = tuple(z.requires_grad_() for z in zeta)
    sample = legs.draw(zeta, noise).detach()
    advantage = returns - baseline(returns, None)
    surrogate = (advantage * Normal(*zeta).log_prob(sample).sum(-1)).sum()
    expected = torch.autograd.grad(surrogate, zeta)
    found = legs.score(zeta, noise, returns, None, baseline)
    torch.testing.assert_close(found, expected)


def test_score_of_a_categorical():
    logits, noise, returns = (
        randn(7, 4, seed=1).requires_grad_(),
        randn(7, 4, seed=2),
        randn(7, seed=3),
    )
    sample = legs.draw((logits,), noise)
    advantage = returns - baselines.leave_one_out(returns, None)
    distribution = torch.distributions.OneHotCategorical(logits=logits)
    expected = torch.autograd.grad((advantage * distribution.log_prob(sample)).sum(), logits)
    found = legs.score((logits,), noise, returns, None, baselines.leave_one_out)
    torch.testing.assert_close(found, expected)


def naive_biw(zeta, noise, returns, *, with_baseline):
    """The double loop of Parmas et al. 2018, Sec. 3.2, with densities instead of log-densities."""
    mean, std = zeta
    n = len(mean)
    sample = mean + std * noise

    def density(j, i):
        z = (sample[j] - mean[i]) / std[i]
        return (torch.exp(-0.5 * z**2) / std[i]).prod()

    g_mean, g_std = torch.zeros_like(mean), torch.zeros_like(std)
    p = torch.stack([torch.stack([density(j, i) for j in range(n)]) for i in range(n)])
    c = p / p.sum(0, keepdim=True)  # over the Gaussians
    for i in range(n):
        b = 0.0
        if with_baseline:
            others = [j for j in range(n) if j != i]
            b = sum(c[i, j] * returns[j] for j in others) / sum(c[i, j] for j in others)
        for j in range(n):
            x = sample[j] - mean[i]
            g_mean[i] += c[i, j] * (returns[j] - b) * x / std[i] ** 2
            g_std[i] += c[i, j] * (returns[j] - b) * (x**2 / std[i] ** 3 - 1 / std[i])
    return g_mean, g_std


@pytest.mark.parametrize("with_baseline", [True, False])
def test_biw_equals_the_naive_double_loop(with_baseline):
    zeta, noise, returns = gaussian(n=8)
    baseline = baselines.leave_one_out if with_baseline else baselines.none
    found = legs.biw(zeta, noise, returns, None, baseline)
    expected = naive_biw(zeta, noise, returns, with_baseline=with_baseline)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_biw_hand_numbers_for_two_samples():
    """Means ∓1, std 1, samples ∓1, returns 1 and 3: c = sigmoid(±2) and b_i is the other return."""
    mean = torch.tensor([[-1.0], [1.0]], dtype=F64)
    zeta, noise = (mean, torch.ones_like(mean)), torch.zeros_like(mean)
    returns = torch.tensor([1.0, 3.0], dtype=F64)
    c = 1 / (1 + torch.exp(torch.tensor(-2.0, dtype=F64)))  # c_ii: of each sample for its own mean
    # b_1 = 3, so only j = 1 counts, at z = 0: no gradient of the mean, -c (1 - 3) of the std.
    g_mean, g_std = legs.biw(zeta, noise, returns, None, baselines.leave_one_out)
    torch.testing.assert_close(g_mean, torch.zeros_like(mean))
    torch.testing.assert_close(g_std, torch.stack((2 * c, -2 * c)).unsqueeze(1))
    # b = 0: the other sample enters with 1 - c at z = ±2.
    g_mean, g_std = legs.biw(zeta, noise, returns, None, baselines.none)
    torch.testing.assert_close(g_mean, torch.stack((6 * (1 - c), -2 * (1 - c))).unsqueeze(1))
    expected = torch.stack((9 * (1 - c) - c, 3 * (1 - c) - 3 * c)).unsqueeze(1)
    torch.testing.assert_close(g_std, expected)


def test_biw_of_distant_gaussians_is_the_score_without_a_baseline():
    """Densities underflow, log-densities do not: each sample counts for its own Gaussian only."""
    n = 5
    mean = 1e3 * torch.arange(n, dtype=F64).unsqueeze(1).expand(n, 2)
    zeta, noise, returns = (mean, torch.full_like(mean, 0.3)), randn(n, 2, seed=4), randn(n, seed=5)
    found = legs.biw(zeta, noise, returns, None, baselines.none)
    expected = legs.score(zeta, noise, returns, None, baselines.none)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def leg_gradients(leg, baseline, *, n, repeats, seed):
    """[R, N] gradients w.r.t. each mean m_i of mean_i (x_i - 1)², x_i ~ N(m_i, s_i); exact [N]."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.linspace(-0.5, 1.0, n, dtype=F64).unsqueeze(1)
    std = torch.linspace(0.5, 0.8, n, dtype=F64).unsqueeze(1)
    found = []
    for _ in range(repeats):
        noise = torch.randn(n, 1, dtype=F64, generator=generator)
        returns = (mean + std * noise - 1).square().squeeze(1) / n
        found.append(leg((mean, std), noise, returns, None, baseline)[0].squeeze(1))
    return torch.stack(found), 2 * (mean.squeeze(1) - 1) / n


def test_biw_without_baseline_is_unbiased():
    """N = 8, 8000 repeats, seed 6: <= 4 SE for each sample's own gradient."""
    g, exact = leg_gradients(legs.biw, baselines.none, n=8, repeats=8000, seed=6)
    standard_error = g.std(0) / len(g) ** 0.5
    assert standard_error.max() < 0.02 * exact.abs().max()
    assert ((g.mean(0) - exact) / standard_error).abs().max() <= 4


def test_biw_has_a_much_lower_variance_than_the_score():
    """N = 50, 300 repeats, seed 7: each sample's own gradient; a variance has an SE of < 2 %."""
    biw, score = (
        leg_gradients(leg, baselines.leave_one_out, n=50, repeats=300, seed=7)[0].var(0).sum()
        for leg in (legs.biw, legs.score)
    )
    assert biw < 0.2 * score


def test_biw_refuses_other_nodes():
    noise = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=r"\[N, D\].*use legs='score'"):
        legs.biw((noise, noise + 1), noise, torch.zeros(2, 3), None, baselines.none)
    with pytest.raises(ValueError, match="biw"):
        legs.biw((noise[0],), noise[0], torch.zeros(3), None, baselines.none)


# More than two legs in total.


def antithetic(zeta, noise, returns, value, baseline):
    """A second, unbiased score leg: subtracts 0.5·score, a control variate with mean zero."""
    g = legs.score(zeta, noise, returns, value, baseline)
    scores = legs.score(zeta, noise, torch.full_like(returns, 0.3), value, baselines.none)
    return tuple(one + score for one, score in zip(g, scores, strict=True))


RULES = ("tpx", "tpx-scalar", "tpx-ivw", "tpx-ivw-scalar")


@pytest.mark.parametrize("second", [legs.biw, antithetic])
@pytest.mark.parametrize("name", ["lr", *RULES])
def test_three_legs_mix_with_weights_that_sum_to_at_most_one(name, second):
    """The gradient is Σ_l k_l leg_l + (1 - Σ k_l) RP, with the weights k_l from the rule."""
    n, d = 40, 3
    (mean, std), noise, _ = gaussian(n, d, seed=30)
    estimator = make(name, legs=(legs.score, second))
    zeta = (mean.requires_grad_(), std.requires_grad_())
    meter = torch.zeros(1, d, dtype=F64, requires_grad=True)
    sample, credit = estimator(mean, std, noise, mean.new_zeros(n), meter=meter)
    cost = torch.sin(4 * sample).sum(-1)
    *g, total = torch.autograd.grad((cost * (1 + credit)).mean(), [*zeta, meter])
    zeta, x = tuple(z.detach() for z in zeta), sample.detach()
    rp = legs.pathwise(zeta, noise, 4 * torch.cos(4 * x) / n)
    returns = cost.detach() / n
    leg_gradients = [
        leg(zeta, noise, returns, None, baselines.leave_one_out) for leg in estimator.legs
    ]
    k = estimator.weight(rp, leg_gradients, None)
    assert len(k) == 2
    assert all((one >= 0).all() for one in k)
    torch.testing.assert_close(total, sum(k).expand(1, d))
    assert (total <= 1 + 1e-12).all()
    for member in range(2):
        expected = (1 - sum(k)) * rp[member]
        expected = expected + sum(w * g[member] for w, g in zip(k, leg_gradients, strict=True))
        torch.testing.assert_close(g[member], expected)


def jointly_gaussian(covariance, n, seed):
    """N samples of estimators with this covariance and a common mean: rp, then the legs, [N, 1]."""
    draws = 0.7 + randn(n, len(covariance), seed=seed) @ torch.linalg.cholesky(covariance).T
    one, *rest = ((g.unsqueeze(1), torch.zeros(n, 1, dtype=F64)) for g in draws.unbind(1))
    return one, rest


def exact_variance(k, covariance):
    w = torch.cat([one.flatten() for one in k])
    w = torch.cat((1 - w.sum(0, keepdim=True), w))
    return float(w @ covariance @ w)


def covariance_of(stds, correlations):
    a, b, c = correlations
    correlation = torch.tensor([[1, a, b], [a, 1, c], [b, c, 1]], dtype=F64)
    return correlation * torch.outer(torch.tensor(stds), torch.tensor(stds)).to(F64)


@pytest.mark.parametrize("summed", [False, True])
def test_three_legs_reach_the_generalised_least_squares_optimum(summed):
    """N = 20000, seed 31: the exact variance under the estimated k is within 1 % of the optimum.

    A sampling error e in k costs e' V e = O(1 / N), so the 1 % leaves room for it.
    """
    covariance = covariance_of((1.0, 1.5, 0.8), (0.1, -0.2, 0.3))
    inverse = torch.linalg.inv(covariance)
    assert (inverse.sum(0) > 0).all(), "all weights of the optimum are positive"
    rp, rest = jointly_gaussian(covariance, 20_000, 31)
    k = (mixing.tpx_scalar if summed else mixing.tpx)(rp, rest, None)
    optimum = float(1 / inverse.sum())
    assert optimum < 0.75 * float(covariance.diagonal().min())
    assert exact_variance(k, covariance) == pytest.approx(optimum, rel=0.01)


def test_inverse_variances_of_three_legs():
    """N = 20000, seed 32: k_l = V_l⁻¹ / Σ V⁻¹; the relative SE of each variance is 1 %."""
    covariance = covariance_of((1.0, 1.5, 0.8), (0.0, 0.0, 0.0))
    rp, rest = jointly_gaussian(covariance, 20_000, 32)
    k = mixing.tpx_ivw(rp, rest, None)
    precision = 1 / covariance.diagonal()
    expected = (precision / precision.sum())[1:]
    torch.testing.assert_close(torch.cat(k).flatten(), expected, rtol=0.04, atol=0)


CLIPPED = [
    ((1.0, 2.0, 1.5), (0.0, 0.0, 0.95)),
    ((1.0, 3.0, 2.9), (0.3, 0.9, 0.5)),
    ((1.0, 3.0, 3.3), (0.6, 0.6, 0.97)),
    ((0.3, 2.0, 2.1), (0.5, 0.7, 0.95)),
    ((2.0, 1.0, 1.4), (0.9, 0.1, 0.4)),
]


@pytest.mark.parametrize(("stds", "correlations"), CLIPPED)
def test_three_legs_are_never_worse_than_the_best_one(stds, correlations):
    """N = 20000, seed 33: even if the optimum has negative weights (1 % for the error of k)."""
    covariance = covariance_of(stds, correlations)
    assert torch.linalg.eigvalsh(covariance).min() > 0
    assert (torch.linalg.inv(covariance).sum(0) < 0).any()
    rp, rest = jointly_gaussian(covariance, 20_000, 33)
    variance = exact_variance(mixing.tpx(rp, rest, None), covariance)
    assert variance <= 1.01 * float(covariance.diagonal().min())


def test_collinear_legs_share_the_weight():
    """The same leg twice: the system is singular, and the mixture is the same as with one leg."""
    zeta, noise, returns = gaussian(30, 2, seed=40)
    rp = (3 * randn(30, 2, seed=44), randn(30, 2, seed=45))
    g = legs.score(zeta, noise, returns, None, baselines.leave_one_out)
    once, twice = mixing.tpx(rp, [g], None), mixing.tpx(rp, [g, g], None)
    assert ((once[0] > 0) & (once[0] < 1)).any()
    torch.testing.assert_close(sum(twice), once[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(twice[0], twice[1], rtol=1e-6, atol=1e-6)


# Legs with a critic.


def critics_leg(leg, n, repeats, critic=None, cost=None, seed=0):
    """[repeats, 2] mean gradients in the mean and std of x ~ N(0.4, 0.6), of x³ by default."""
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(repeats):
        noise = torch.randn(n, 1, dtype=F64, generator=generator)
        zeta = (torch.full_like(noise, 0.4), torch.full_like(noise, 0.6))
        x = draw(zeta, noise)
        returns = (cost or (lambda x: x.pow(3)))(x).squeeze(-1)
        found.append(torch.stack([g.mean() for g in leg(zeta, noise, returns, None, none)]))
    return torch.stack(found)


EXACT = torch.tensor([3 * (0.4**2 + 0.6**2), 6 * 0.4 * 0.6], dtype=F64)  # of E x³


@pytest.mark.parametrize(
    "critic",
    [lambda x: x.squeeze(-1), lambda x: -7 * x.squeeze(-1).pow(2), lambda x: x.squeeze(-1).sin()],
    ids=["line", "square", "sine"],
)
def test_lax_is_unbiased_for_any_critic(critic):
    """2000 batches of 20 samples, within 4 SE."""
    found = critics_leg(legs.lax(critic), 20, 2000)
    assert ((found.mean(0) - EXACT).abs() < 4 * found.std(0) / 2000**0.5).all()


def test_a_critic_that_is_nearly_right_halves_the_variance():
    """x³ + x of a cost x³, beside `score` with its leave-one-out baseline."""

    def plain(zeta, noise, returns, value, baseline):
        return legs.score(zeta, noise, returns, value, leave_one_out)

    close = legs.lax(lambda x: (x.pow(3) + x).squeeze(-1))
    found, without = (critics_leg(leg, 20, 2000).var(0) for leg in (close, plain))
    assert (found < 0.5 * without).all()


def test_lax_with_the_return_itself_as_critic_is_the_pathwise_leg():
    noise = torch.randn(30, 1, dtype=F64, generator=torch.Generator().manual_seed(3))
    zeta = (torch.full_like(noise, 0.4), torch.full_like(noise, 0.6))
    x = draw(zeta, noise)
    leg = legs.lax(lambda x: 5 - 2 * x.squeeze(-1).pow(3))  # of another scale and sign
    found = leg(zeta, noise, x.squeeze(-1).pow(3), None, none)
    for g, expected in zip(found, legs.pathwise(zeta, noise, 3 * x**2), strict=True):
        torch.testing.assert_close(g, expected)


def test_lax_leaves_the_sample_out():
    """Slope and intercept of each sample by numpy's regression on the others."""
    x, y = torch.randn(2, 9, dtype=F64, generator=torch.Generator().manual_seed(4))
    slope, intercept = legs._left_out_line(x, y)
    for i in range(9):
        others = [j for j in range(9) if j != i]
        expected = np.polyfit(x[others].numpy(), y[others].numpy(), 1)
        assert (slope[i].item(), intercept[i].item()) == pytest.approx(tuple(expected))


def test_mvd_is_unbiased_as_a_function_of_its_critic():
    """The critic is the cost up to scale. 400 batches of 500 samples, within 4 SE."""
    found = critics_leg(legs.mvd(lambda x: -2 * x.squeeze(-1).pow(3)), 500, 400)
    error = found.std(0) / 400**0.5
    assert ((found.mean(0) - EXACT).abs() < 4 * error).all()
    assert (error < 0.05 * EXACT).all()


def test_mvd_needs_no_derivative():
    """A step 1[x > 0.5], N = 20000: d/dmean is the density there, d/dstd that times 0.1 / 0.6."""
    step = lambda x: (x.squeeze(-1) > 0.5).double()  # noqa: E731
    found = critics_leg(legs.mvd(step), 20_000, 30, cost=step)
    density = math.exp(-0.5 * (0.1 / 0.6) ** 2) / (0.6 * math.sqrt(2 * math.pi))
    exact = torch.tensor([density, density * 0.1 / 0.6], dtype=F64)
    assert ((found.mean(0) - exact).abs() < 4 * found.std(0) / 30**0.5).all()


def test_mvd_moves_one_coordinate_at_a_time():
    """x_1 x_2², whose derivative in the second mean is 2 m_1 m_2, in the second std 2 m_1 s_2."""
    generator, found = torch.Generator().manual_seed(5), []
    mean, std = torch.tensor([0.5, -0.8], dtype=F64), torch.tensor([0.3, 0.7], dtype=F64)
    product = lambda x: x[:, 0] * x[:, 1].square()  # noqa: E731
    for _ in range(200):
        noise = torch.randn(500, 2, dtype=F64, generator=generator)
        zeta = (mean.expand(500, 2), std.expand(500, 2))
        both = legs.mvd(product)(zeta, noise, product(draw(zeta, noise)), None, none)
        found.append(torch.cat([g.mean(0) for g in both]))
    found = torch.stack(found)
    exact = torch.tensor([0.64 + 0.49, 2 * 0.5 * -0.8, 0.0, 2 * 0.5 * 0.7], dtype=F64)
    assert ((found.mean(0) - exact).abs() < 4 * found.std(0) / 200**0.5).all()


@pytest.mark.parametrize("name", ["lax", "mvd"])
def test_a_node_makes_a_leg_by_name_from_its_critic(name):
    """The same gradient as with the leg that is made by hand; k is that of the rule."""

    def gradient(legs, **extra):
        (mean, std), noise, _ = gaussian(n=12, seed=60)
        zeta = mean.requires_grad_(), std.requires_grad_()
        x, credit = make("tpx", legs=legs)(*zeta, noise, mean.new_zeros(12), **extra)
        cost = estimators.assign_credit(x.pow(3).sum(-1), credit)
        return torch.autograd.grad(cost.sum(), zeta)

    def critic(x):
        return x.square().sum(-1)

    by_hand = gradient(legs.LEGS[name](critic))
    torch.testing.assert_close(gradient(name, critic=critic), by_hand)
    assert not torch.allclose(by_hand[0], gradient("score")[0])


@pytest.mark.parametrize("name", ["lax", "mvd"])
def test_a_leg_that_needs_a_critic_says_so(name):
    (mean, std), noise, _ = gaussian()
    with pytest.raises(ValueError, match="need a critic of the sample: pass critic="):
        make("tpx", legs=name)(mean, std, noise, mean.new_zeros(6))
    with pytest.raises(ValueError, match="set cross_fit=False"):
        make("tpx", legs=name, cross_fit=True)


def test_maxwell_quantiles_are_those_of_the_norm_of_three_normals():
    rank = torch.tensor([0.05, 0.5, 0.95], dtype=F64)
    expected = chi.ppf(rank.numpy(), 3)
    np.testing.assert_allclose(legs._maxwell(rank).numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("wrong", ["score", "lax", ("score", "biw"), (legs.nothing, legs.nothing)])
def test_cut_takes_no_score_leg(wrong):
    """It would be mixed in with a weight that says how much of RP was cut off."""
    with pytest.raises(ValueError, match=r"no score leg: leave legs out .leg|takes one score leg"):
        make("rp-cut", legs=wrong)


def test_cut_shortens_long_samples_and_drops_those_that_are_not_finite():
    g = torch.tensor([[1.0], [-1.0], [1.0], [2.0], [10.0], [float("nan")], [1.0]], dtype=F64)
    (k,) = mixing.cut((g, g), [(0 * g, 0 * g)], None, limit=4.0)
    kept = torch.tensor([1, 1, 1, 1, 0.4, 0.0, 1], dtype=F64).unsqueeze(1)
    torch.testing.assert_close(1 - k, kept)
    estimator = make("rp-cut")
    mean = torch.zeros(7, 1, dtype=F64, requires_grad=True)
    sample, credit = estimator(mean, torch.ones_like(mean), 0 * mean.detach(), mean.new_zeros(7))
    sample.register_hook(lambda _: g)
    (found,) = torch.autograd.grad(estimators.assign_credit(sample.sum(-1), credit).sum(), mean)
    torch.testing.assert_close(found, torch.where(kept > 0, g * kept, 0.0))
