"""The Gaussian process against dense algebra, GPyTorch and finite differences."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

from totalprop.world_models.gp import (
    ROUNDING,
    SUPPORT_POINTS,
    SUPPORT_TOLERANCE,
    GaussianProcess,
    negative_log_likelihood,
    outlier,
)

F64 = torch.float64
N_DATA, N_INPUTS, N_OUTPUTS = 25, 3, 2
KERNELS = ("rbf", "rbf+linear")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=generator(seed))


def make_gp(seed=0, noise=0.1, kernel="rbf"):
    """A GP with known hyper-parameters, different for every output and input."""
    gp = GaussianProcess(N_INPUTS, N_OUTPUTS, kernel=kernel)
    gp.set_data(randn(N_DATA, N_INPUTS, seed=seed), randn(N_DATA, N_OUTPUTS, seed=seed + 1))
    lengthscale = torch.tensor([[0.7, 1.3, 2.0], [1.1, 0.5, 0.9]], dtype=F64)
    gp.log_lengthscale.copy_(lengthscale.log())
    gp.log_signal.copy_(torch.tensor([1.5, 0.6], dtype=F64).log())
    gp.log_noise.copy_(torch.tensor([noise, 2 * noise], dtype=F64).log())
    if kernel == "rbf+linear":
        gp.log_slope.copy_(torch.tensor([[0.3, 1.0, 0.6], [0.8, 0.1, 0.5]], dtype=F64).log())
    return gp


def kernel(gp, e, a, b):
    """s² exp(-½ Σ (a - b)² / l²), and the plane's Σ slope² (a - m) (b - m), written out."""
    difference = (a[:, None, :] - b[None, :, :]) / gp.log_lengthscale[e].exp()
    k = gp.log_signal[e].exp() ** 2 * torch.exp(-0.5 * (difference**2).sum(-1))
    if gp.slope_variance is None:
        return k
    m = gp.inputs.mean(0)
    products = (a - m)[:, None, :] * (b - m)[None, :, :]
    return k + (gp.log_slope[e].exp() ** 2 * products).sum(-1)


def dense_posterior(gp, x):
    """Mean and variance [N, E] by a dense solve, differentiable."""
    means, variances = [], []
    for e in range(gp.targets.shape[1]):
        k_xx = kernel(gp, e, gp.inputs, gp.inputs)
        k_xx = k_xx + gp.log_noise[e].exp() ** 2 * torch.eye(len(gp.inputs), dtype=F64)
        k_star = kernel(gp, e, x, gp.inputs)
        means.append(k_star @ torch.linalg.solve(k_xx, gp.targets[:, e]))
        explained = (k_star * torch.linalg.solve(k_xx, k_star.T).T).sum(-1)
        variances.append(kernel(gp, e, x, x).diagonal() - explained)
    return torch.stack(means, -1), torch.stack(variances, -1)


def sample_targets(inputs, lengthscale, signal, noise, seed):
    """One draw of a GP's noisy observations at the inputs."""
    scaled = inputs / torch.as_tensor(lengthscale, dtype=F64)
    covariance = signal**2 * torch.exp(-0.5 * torch.cdist(scaled, scaled) ** 2)
    covariance += noise**2 * torch.eye(len(inputs), dtype=F64)
    return torch.linalg.cholesky(covariance) @ randn(len(inputs), seed=seed)


# The posterior


@pytest.mark.parametrize("noise", [0.1, 1e-3])  # from a ratio of 100 on R is a root
@pytest.mark.parametrize("kernel", KERNELS)
def test_posterior_equals_a_dense_solve(kernel, noise):
    gp, x = make_gp(noise=noise, kernel=kernel), randn(17, N_INPUTS, seed=5)
    mean, variance = dense_posterior(gp, x)
    found = gp.posterior(x)
    torch.testing.assert_close(found.mean, mean, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found.variance, variance, rtol=1e-8, atol=1e-10)


def test_posterior_equals_gpytorch():
    gpytorch = pytest.importorskip("gpytorch")
    gp, x = make_gp(), randn(11, N_INPUTS, seed=6)
    found = gp.posterior(x)

    class Exact(gpytorch.models.ExactGP):
        def __init__(self, inputs, targets, likelihood):
            super().__init__(inputs, targets, likelihood)
            self.mean_module = gpytorch.means.ZeroMean()
            rbf = gpytorch.kernels.RBFKernel(ard_num_dims=N_INPUTS)
            self.covar_module = gpytorch.kernels.ScaleKernel(rbf)

        def forward(self, x):
            covariance = self.covar_module(x)
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), covariance)

    for e in range(N_OUTPUTS):
        likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
        model = Exact(gp.inputs, gp.targets[:, e], likelihood).double()
        model.covar_module.base_kernel.lengthscale = gp.log_lengthscale[e].exp()
        model.covar_module.outputscale = gp.log_signal[e].exp() ** 2
        likelihood.noise = gp.noise[e] ** 2
        model.eval()
        with torch.no_grad(), gpytorch.settings.fast_computations(False, False, False):
            reference = model(x)
            mean, variance = reference.mean, reference.variance
        torch.testing.assert_close(found.mean[:, e], mean, rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(found.variance[:, e], variance, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_and_jacobians_equal_autograd_through_the_dense_solve(kernel):
    gp = make_gp(kernel=kernel)
    x = randn(9, N_INPUTS, seed=7).requires_grad_()
    found, reference = gp.posterior(x), dense_posterior(gp, x)
    jacobians = found.mean_jacobian, found.variance_jacobian
    for moment, dense, jacobian in zip(found[:2], reference, jacobians, strict=True):
        assert not jacobian.requires_grad
        for e in range(N_OUTPUTS):
            (by_ours,) = torch.autograd.grad(moment[:, e].sum(), x, retain_graph=True)
            (by_dense,) = torch.autograd.grad(dense[:, e].sum(), x, retain_graph=True)
            torch.testing.assert_close(by_ours, by_dense, rtol=1e-8, atol=1e-9)
            torch.testing.assert_close(jacobian[:, e], by_dense, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradcheck_of_mean_and_variance(kernel):
    gp = make_gp(kernel=kernel)
    x = randn(4, N_INPUTS, seed=8).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gp.posterior(x)[:2], (x,))


def test_far_from_the_data_is_the_prior():
    gp = make_gp()
    found = gp.posterior(torch.full((2, N_INPUTS), 60.0, dtype=F64))
    torch.testing.assert_close(found.mean, torch.zeros(2, N_OUTPUTS, dtype=F64), atol=1e-12, rtol=0)
    prior = (gp.log_signal.exp() ** 2).expand(2, -1)
    torch.testing.assert_close(found.variance, prior, rtol=1e-12, atol=0)


def test_variance_is_never_negative_and_interpolates_without_noise():
    gp = make_gp(noise=1e-6)
    found = gp.posterior(gp.inputs)
    assert (found.variance >= 0).all()
    assert found.variance.max() < 1e-9
    torch.testing.assert_close(found.mean, gp.targets, atol=1e-6, rtol=1e-6)


def test_observation_noise_is_not_in_the_variance():
    gp = make_gp()
    gp.set_data(gp.inputs[:1], gp.targets[:1])
    s, n = gp.log_signal.exp() ** 2, gp.noise**2
    expected = (s - s * s / (s + n)).unsqueeze(0)  # one datum, asked at the datum
    torch.testing.assert_close(gp.posterior(gp.inputs).variance, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_inputs_far_from_the_origin_give_the_same_posterior(offset):
    gp, x = make_gp(), randn(6, N_INPUTS, seed=9)
    before = gp.posterior(x)
    gp.set_data(gp.inputs + offset, gp.targets)
    after = gp.posterior(x + offset)
    torch.testing.assert_close(after.mean, before.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(after.variance, before.variance, rtol=1e-4, atol=1e-6)


def test_no_data_is_a_clear_error():
    with pytest.raises(RuntimeError, match="no data"):
        GaussianProcess(2, 1).posterior(torch.zeros(1, 2, dtype=F64))
    with pytest.raises(RuntimeError, match="no data"):
        GaussianProcess(2, 1).fit()


@pytest.mark.parametrize(
    "shapes", [((4, 2), (4,)), ((4, 2), (3, 1)), ((4, 3), (4, 1)), ((2,), (1,))]
)
@pytest.mark.parametrize("method", ["set_data", "add_data"])
def test_data_of_another_shape_are_refused(method, shapes):
    gp = GaussianProcess(2, 1)
    with pytest.raises(ValueError, match=r"inputs \[n, 2\] and targets \[n, 1\], got"):
        getattr(gp, method)(*(torch.zeros(shape, dtype=F64) for shape in shapes))
    assert not len(gp.inputs)


@pytest.mark.parametrize("name", ["inputs", "targets", "log_noise", "log_lengthscale"])
def test_attributes_that_are_set_in_place_count_at_once(name):
    gp, fresh, x = make_gp(), make_gp(), randn(5, N_INPUTS, seed=3)
    before = gp.posterior(x).mean, gp.kernel_sum().beta
    for one in (gp, fresh):
        getattr(one, name).add_(0.5)
    after = gp.posterior(x).mean, gp.kernel_sum().beta
    expected = fresh.posterior(x).mean, fresh.kernel_sum().beta
    assert not torch.equal(after[0], before[0])
    assert torch.equal(after[0], expected[0])
    assert torch.equal(after[1], expected[1])


def test_what_was_computed_in_inference_mode_can_be_differentiated_later():
    gp, x = make_gp(), randn(5, N_INPUTS, seed=3).requires_grad_()
    with torch.inference_mode():
        gp.posterior(x)
        sums = gp.kernel_sum()
    gp.posterior(x).mean.sum().backward()
    assert not sums.beta.is_inference()


# Data


def test_add_data_appends_and_the_posterior_uses_it_at_once():
    gp, whole = make_gp(), make_gp()
    inputs, targets, x = gp.inputs, gp.targets, randn(5, N_INPUTS, seed=3)
    gp.set_data(inputs[:10], targets[:10])
    few = gp.posterior(x).mean
    gp.add_data(inputs[10:], targets[10:])
    assert torch.equal(gp.inputs, inputs) and torch.equal(gp.targets, targets)
    torch.testing.assert_close(gp.posterior(x).mean, whole.posterior(x).mean)
    assert not torch.allclose(few, gp.posterior(x).mean)


@pytest.mark.parametrize("keep", [0, 1, 7, N_DATA, N_DATA + 5])
def test_add_data_keeps_the_newest(keep):
    gp = make_gp()
    inputs, targets = randn(5, N_INPUTS, seed=3), randn(5, gp.targets.shape[1], seed=4)
    whole = torch.cat((gp.inputs, inputs)), torch.cat((gp.targets, targets))
    gp.add_data(inputs, targets, keep=keep)
    assert len(gp.inputs) == (keep or N_DATA + 5)
    for found, expected in zip((gp.inputs, gp.targets), whole):
        assert torch.equal(found, expected[len(expected) - len(gp.inputs) :])


def test_data_are_stored_in_float64_and_detached():
    gp = GaussianProcess(1, 1)
    gp.set_data(torch.ones(2, 1, requires_grad=True), torch.ones(2, 1))
    assert gp.inputs.dtype == F64 and not gp.inputs.requires_grad


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["inputs", "targets"])
def test_non_finite_data_raise_and_leave_the_data_alone(bad, where):
    gp = make_gp()
    inputs, targets = gp.inputs[:2].clone(), gp.targets[:2].clone()
    (inputs if where == "inputs" else targets)[1, 0] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        gp.add_data(inputs, targets)
    assert len(gp.inputs) == N_DATA


def test_state_dict_of_another_size_loads_and_predicts_the_same():
    gp, x = make_gp(), randn(4, N_INPUTS, seed=4)
    other = GaussianProcess(N_INPUTS, N_OUTPUTS)
    other.set_data(randn(3, N_INPUTS), randn(3, N_OUTPUTS))
    other.posterior(x)  # fills the cache, which must not survive
    other.load_state_dict(gp.state_dict())
    assert not other.is_fitted  # its hyper-parameters were set by hand
    torch.testing.assert_close(other.posterior(x).mean, gp.posterior(x).mean, rtol=0, atol=0)


def test_data_are_loaded_to_the_models_device():
    """A file's tensors are on the CPU; "meta" stands for a GPU."""
    gp = GaussianProcess(N_INPUTS, N_OUTPUTS).to("meta")
    gp.load_state_dict(make_gp().state_dict())
    assert {x.device.type for x in gp.state_dict().values()} == {"meta"}
    assert gp.inputs.shape == make_gp().inputs.shape


def test_load_copies_rather_than_shares():
    gp, other = make_gp(), GaussianProcess(N_INPUTS, N_OUTPUTS)
    other.load_state_dict(gp.state_dict())
    gp.inputs.add_(1.0)
    assert not torch.equal(other.inputs, gp.inputs)


def test_unfitted_gp_with_data_stays_unfitted_through_a_state_dict():
    gp, other = GaussianProcess(1, 1), GaussianProcess(1, 1)
    gp.set_data(randn(4, 1), randn(4, 1))
    other.load_state_dict(gp.state_dict())
    assert other.is_fitted == gp.is_fitted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"log_noise": torch.tensor([0.0, 1e4], dtype=F64)}, "'log_noise' reaches 1e[+]04"),
        (
            {
                "inputs": torch.zeros(0, N_INPUTS, dtype=F64),
                "targets": torch.zeros(0, N_OUTPUTS, dtype=F64),
            },
            "a fit and no data",
        ),
    ],
)
def test_a_state_without_a_meaning_is_refused(changes, message):
    gp = make_gp()
    gp.fit()
    gp.check_state(gp.state_dict())
    with pytest.raises(ValueError, match=message):
        gp.check_state({**gp.state_dict(), **changes})


# The likelihood

THETA = torch.tensor([0.2, -0.3, 0.1, 0.4, -1.2], dtype=F64)  # log l (3), log s, log σ_n


def test_likelihood_equals_the_multivariate_normal():
    gp = make_gp()
    gp.log_lengthscale[0], gp.log_signal[0], gp.log_noise[0] = THETA[:3], THETA[3], THETA[4]
    covariance = kernel(gp, 0, gp.inputs, gp.inputs)
    covariance = covariance + math.exp(2 * THETA[4]) * torch.eye(N_DATA, dtype=F64)
    normal = MultivariateNormal(torch.zeros(N_DATA, dtype=F64), covariance)
    value, _ = negative_log_likelihood(THETA, gp.inputs, gp.targets[:, 0])
    assert value == pytest.approx(-float(normal.log_prob(gp.targets[:, 0])), rel=1e-10)


def test_likelihood_with_a_plane_equals_the_multivariate_normal():
    gp = make_gp(kernel="rbf+linear")
    slopes = torch.tensor([-0.5, 0.3, -1.0], dtype=F64)
    gp.log_lengthscale[0], gp.log_signal[0], gp.log_noise[0] = THETA[:3], THETA[3], THETA[4]
    gp.log_slope[0] = slopes
    covariance = kernel(gp, 0, gp.inputs, gp.inputs)
    covariance = covariance + math.exp(2 * THETA[4]) * torch.eye(N_DATA, dtype=F64)
    normal = MultivariateNormal(torch.zeros(N_DATA, dtype=F64), covariance)
    value, _ = negative_log_likelihood(torch.cat((THETA, slopes)), gp.inputs, gp.targets[:, 0])
    assert value == pytest.approx(-float(normal.log_prob(gp.targets[:, 0])), rel=1e-10)


@pytest.mark.parametrize("slopes", [[], [-0.5, 0.3, -1.0]])
@pytest.mark.parametrize("curb", [False, True])
def test_likelihood_gradient_equals_finite_differences(curb, slopes):
    gp = make_gp()
    # Far enough from the inputs' spread, and noise far enough below, that the curbs matter.
    theta = torch.tensor([4.7, -0.3, -4.9, 1.5, -5.2], dtype=F64) if curb else THETA
    theta = torch.cat((theta, torch.tensor(slopes, dtype=F64)))  # of the plane, or none
    log_std = gp.inputs.std(0, correction=0).log() if curb else None

    def value(theta):
        return negative_log_likelihood(theta, gp.inputs, gp.targets[:, 0], log_std)[0]

    gradient = negative_log_likelihood(theta, gp.inputs, gp.targets[:, 0], log_std)[1]
    step = 1e-5
    for i in range(len(theta)):
        shift = torch.zeros_like(theta)
        shift[i] = step
        slope = (value(theta + shift) - value(theta - shift)) / (2 * step)
        assert float(gradient[i]) == pytest.approx(slope, rel=1e-5, abs=1e-5)


def test_curbs_are_those_of_hypcurb():
    inputs, target = randn(12, N_INPUTS), randn(12, seed=1)
    log_std = inputs.std(0, correction=0).log()

    def penalty(theta):
        with_curb = negative_log_likelihood(theta, inputs, target, log_std)[0]
        return with_curb - negative_log_likelihood(theta, inputs, target)[0]

    start = torch.cat((log_std, torch.tensor([0.3, 0.3 - math.log(10)], dtype=F64)))
    assert penalty(start) == pytest.approx((math.log(10) / math.log(1000)) ** 30, abs=1e-12)
    # SNR e × 1000 and one lengthscale e × 100 deviations, by hand:
    theta = torch.cat((log_std, torch.tensor([0.0, -math.log(1000) - 1], dtype=F64)))
    theta[1] += math.log(100) + 1
    expected = (1 + 1 / math.log(1000)) ** 30 + (1 + 1 / math.log(100)) ** 30
    assert penalty(theta) == pytest.approx(expected, rel=1e-8)


# The fit


def test_far_from_the_data_a_plane_goes_on():
    """y = 2 x + noise on [-1, 1]: at x = 5 the plane says 10 ± 0.5, where "rbf" falls back to 0."""
    inputs = torch.linspace(-1, 1, 40, dtype=F64)[:, None]
    targets, far = 2 * inputs + 0.1 * randn(40, 1), torch.tensor([[5.0]], dtype=F64)
    means, deviations = [], []
    for kernel in KERNELS:
        gp = GaussianProcess(1, 1, kernel=kernel)
        gp.set_data(inputs, targets)
        gp.fit()
        gp.log_lengthscale.clamp_(max=0.0)  # as that of a curved function would be
        found = gp.posterior(far)
        means.append(float(found.mean)), deviations.append(float(found.variance.sqrt()))
    assert abs(means[0]) < 0.1 and means[1] == pytest.approx(10, abs=0.5)
    assert deviations[1] < 1


def test_moments_are_matched_of_the_rbf_kernel_alone():
    with pytest.raises(ValueError, match=r"needs kernel='rbf', got 'rbf[+]linear'; take particles"):
        make_gp(kernel="rbf+linear").kernel_sum()


def test_a_plane_is_in_the_state_dict_and_a_file_without_one_has_none():
    gp, x = make_gp(kernel="rbf+linear"), randn(4, N_INPUTS, seed=4)
    other = GaussianProcess(N_INPUTS, N_OUTPUTS, kernel="rbf+linear")
    other.load_state_dict(gp.state_dict())
    assert torch.equal(other.posterior(x).mean, gp.posterior(x).mean)
    assert "log_slope" not in make_gp().state_dict()


def test_fit_recovers_the_hyper_parameters_of_sampled_data():
    """One draw of n = 150 points (seeds 11, 12): within 35 % for l and s, 15 % for the noise.

    The noise's standard error is about 1 / sqrt(2·150) = 6 %.
    """
    inputs = 6 * torch.rand(150, 2, dtype=F64, generator=generator(11)) - 3
    target = sample_targets(inputs, [0.9, 1.8], 2.0, 0.2, seed=12)
    gp = GaussianProcess(2, 1)
    gp.set_data(inputs, target[:, None])
    gp.fit()
    assert gp.is_fitted
    ratio = gp.log_lengthscale[0].exp() / torch.tensor([0.9, 1.8], dtype=F64)
    assert ((ratio > 1 / 1.35) & (ratio < 1.35)).all()
    assert float(gp.log_signal.exp()) == pytest.approx(2.0, rel=0.35)
    assert float(gp.noise) == pytest.approx(0.2, rel=0.15)


def test_fit_starts_from_the_data_and_increases_the_likelihood():
    inputs = randn(40, 2, seed=1)
    targets = (2 * inputs[:, :1]).sin() + 0.1 * randn(40, 1, seed=2)
    gp = GaussianProcess(2, 1)
    gp.set_data(inputs, targets)
    start = torch.cat((inputs.std(0, correction=0), targets.std(0, correction=0).expand(1)))
    start = torch.cat((start, start[-1:] / 10)).log()
    at_start = negative_log_likelihood(start, inputs, targets[:, 0])[0] / 40
    loss = float(gp.fit())
    assert loss < at_start - 0.1
    theta = torch.cat((gp.log_lengthscale[0], gp.log_signal, gp.log_noise))
    at_end = negative_log_likelihood(theta, inputs, targets[:, 0])[0] / 40
    assert loss == pytest.approx(at_end, rel=1e-12)


def test_second_fit_starts_from_the_first_optimum():
    gp = make_gp()
    gp.has_fit.fill_(False)
    gp.fit()
    first = gp.log_lengthscale.clone()
    gp.fit(max_evaluations=1)  # not enough to get anywhere: it stays at its start
    torch.testing.assert_close(gp.log_lengthscale, first, rtol=0.02, atol=0.05)


def test_posterior_after_a_fit_uses_the_new_hyper_parameters():
    gp, x = make_gp(), randn(3, N_INPUTS, seed=2)
    before = gp.posterior(x).mean
    gp.fit()
    torch.testing.assert_close(gp.posterior(x).mean, dense_posterior(gp, x)[0])
    assert not torch.allclose(before, gp.posterior(x).mean)


# Offsets and scales


def fitted(inputs, targets, **kwargs):
    gp = GaussianProcess(inputs.shape[1], targets.shape[1], **kwargs)
    gp.set_data(inputs, targets)
    gp.fit()
    return gp


def noisy_sine(n=60):
    """Inputs [n, 2], targets [n, 1] with a mean of less than their deviation, noise of 0.1."""
    inputs = 6 * torch.rand(n, 2, dtype=F64, generator=generator(1)) - 3
    truth = (2 * inputs[:, :1]).sin() + 0.3 * inputs[:, 1:]
    return inputs, truth + 0.1 * randn(n, 1, seed=2)


@pytest.mark.parametrize("offset", [0.0, 3.0, 1e3, 1e6])
def test_an_offset_of_the_targets_is_an_offset_of_the_mean(offset):
    """Before, an offset of 1e3 doubled the noise, and one of 1e6 made the fit worthless."""
    inputs, targets = noisy_sine()
    x = randn(20, 2, seed=3)
    reference = fitted(inputs, targets, prior_mean="data")
    shifted = fitted(inputs, targets + offset, prior_mean="data")
    torch.testing.assert_close(shifted.noise, reference.noise, rtol=1e-5, atol=0)
    found, expected = shifted.posterior(x), reference.posterior(x)
    torch.testing.assert_close(found.mean - offset, expected.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.variance, expected.variance, rtol=1e-4, atol=1e-9)
    if offset > 10:  # many deviations: PILCO's prior mean gives way
        same = fitted(inputs, targets + offset)
        torch.testing.assert_close(same.posterior(x).mean, found.mean, rtol=0, atol=0)


def test_the_prior_mean_is_zero_while_the_offset_is_small():
    """The model of PILCO: far from the data, a state stays where it is."""
    inputs, targets = noisy_sine()
    far = torch.full((1, 2), 1e3, dtype=F64)
    for offset in (0.0, 5.0):
        gp = fitted(inputs, targets + offset)
        assert abs(float(gp.targets.mean())) > 0.01 and gp.offset == 0
        assert gp.posterior(far).mean == 0
    gp = fitted(inputs, targets, prior_mean="data")
    torch.testing.assert_close(gp.posterior(far).mean[0], targets.mean(0))
    gp = fitted(inputs, targets + 100)
    torch.testing.assert_close(gp.posterior(far).mean[0], targets.mean(0) + 100)


@pytest.mark.parametrize(("scale", "offset"), [(2.0**-20, 0.0), (2.0**-3, 2.0**24), (2.0**20, 0.0)])
def test_the_units_of_inputs_and_targets_do_not_matter(scale, offset):
    """float64 inputs with a deviation of 0.2 at an offset of 2e7 used to count as constant."""
    inputs, targets = noisy_sine()
    inputs = (inputs * 2**20).round() * 2.0**-20  # the shifted ones are exact
    x = (randn(20, 2, seed=3) * 2**20).round() * 2.0**-20
    expected = fitted(inputs, targets)
    found = fitted(scale * inputs + offset, targets / scale, rounding=ROUNDING[np.float64])
    ratio = (found.log_lengthscale - expected.log_lengthscale).exp()
    torch.testing.assert_close(ratio, torch.full_like(ratio, scale), rtol=1e-4, atol=0)
    mean = found.posterior(scale * x + offset).mean * scale
    torch.testing.assert_close(mean, expected.posterior(x).mean, rtol=0, atol=1e-5)


def test_a_float64_input_is_not_constant_where_a_float32_one_would_be():
    column = 1e7 + 0.1 * randn(30, 1)
    starts = []
    for kind in (np.float32, np.float64):
        gp = GaussianProcess(1, 1, rounding=ROUNDING[kind])
        gp.set_data(column, randn(30, 1, seed=1))
        gp.fit(max_evaluations=1)
        starts.append(float(gp.log_lengthscale.exp()))
    assert starts[0] > 0.5 and starts[1] < 0.2


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ([*range(30), 1e6], 1e6),
        ([*range(30), -1e6], -1e6),
        ([*range(30), 1000.0], None),  # 34 times their range: the fit is as good
        ([0.0] * 29 + [1e6], None),  # it hardly ever changes
        ([], None),
        ([1.0, 2.0], None),
    ],
)
def test_an_outlier_is_what_is_out_of_all_proportion(column, expected):
    found = outlier(torch.tensor(column, dtype=F64))
    assert found == (None if expected is None else (expected, 0.0, 29.0))


@pytest.mark.parametrize("n", [30, 31])
@pytest.mark.parametrize("value", [0.0, 0.1, 0.7, 1234.567])
def test_constant_input_column_is_ignored(value, n):
    """Even if the mean of its values is not exactly the value in floating point."""
    check_fit_ignores(torch.full((n,), value, dtype=F64))


@pytest.mark.parametrize(("value", "spread"), [(1.0, 1e-7), (100.0, 1e-5)])
def test_input_column_that_wobbles_by_its_rounding_is_ignored(value, spread):
    """What a float32 observation of a constant may look like."""
    check_fit_ignores((value + spread * torch.randn(30, generator=generator(5))).double())


def check_fit_ignores(column):
    n = len(column)
    inputs = torch.stack((randn(n, seed=1), column), -1)
    truth = inputs[:, :1].sin()
    gp = GaussianProcess(2, 1)
    gp.set_data(inputs, truth + 0.05 * randn(n, 1, seed=2))
    assert torch.isfinite(gp.fit()).all()
    found = gp.posterior(inputs)
    assert float((found.mean - truth).square().mean().sqrt()) < 0.1
    assert (found.variance >= 0).all()


@pytest.mark.parametrize("value", [0.0, 0.1, 1.0, -300.0])
def test_constant_targets_are_constant_away_from_the_data_too(value):
    """A clock that ticks by 1 has to keep ticking beyond the times that were seen."""
    gp = GaussianProcess(1, 1)
    gp.set_data(randn(20, 1), torch.full((20, 1), value, dtype=F64))
    assert torch.isfinite(gp.fit()).all()
    found = gp.posterior(torch.tensor([[0.0], [5.0]], dtype=F64))
    error, predictive = (found.mean - value).abs(), found.variance + gp.noise.square()
    assert (error <= 2e-3 * abs(value)).all()
    assert (predictive.sqrt() <= max(0.01 * abs(value), 2e-3)).all()


def test_targets_that_stop_being_constant_are_fitted():
    inputs = randn(40, 1)
    gp = GaussianProcess(1, 1)
    gp.set_data(inputs, torch.ones(40, 1, dtype=F64))
    gp.fit()
    truth = 1 + (2 * inputs).sin()
    gp.set_data(inputs, truth + 0.05 * randn(40, 1, seed=1))
    gp.fit()
    assert float((gp.posterior(inputs).mean - truth).square().mean().sqrt()) < 0.05


def test_constant_targets_do_not_collapse_over_repeated_fits():
    """A likelihood without a lower bound: every warm start used to shrink signal and noise more."""
    gp = GaussianProcess(2, 1)
    for trial in range(10):
        gp.add_data(randn(7, 2, seed=trial), torch.zeros(7, 1, dtype=F64))
        assert torch.isfinite(gp.fit()).all()
    assert float(gp.noise) > 1e-12
    assert (gp.posterior(gp.inputs).mean.abs() < 1e-3).all()


def test_duplicate_points_without_noise_do_not_crash():
    gp = make_gp(noise=1e-9)
    gp.set_data(gp.inputs.repeat(3, 1), gp.targets.repeat(3, 1))
    found = gp.posterior(gp.inputs)
    assert torch.isfinite(found.mean).all() and (found.variance >= 0).all()
    torch.testing.assert_close(found.mean, gp.targets, atol=1e-2, rtol=1e-2)
    assert torch.isfinite(gp.fit()).all()


def test_one_point_can_be_fitted():
    gp = GaussianProcess(2, 1)
    gp.set_data(torch.ones(1, 2, dtype=F64), torch.ones(1, 1, dtype=F64))
    assert torch.isfinite(gp.fit()).all()
    assert torch.isfinite(gp.posterior(gp.inputs).mean).all()


def test_fit_does_not_touch_the_global_random_generators():
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(0)
    np.random.seed(0)
    make_gp().fit(max_evaluations=5)
    assert torch.equal(torch.rand(3), expected[0]) and (np.random.rand(3) == expected[1]).all()


# What round-off may add to an error, relative to the predictive variance. On the same support, at a
# signal-to-noise ratio of 1300, double differed from long double by at most 2.2e-5 (several seeds,
# the data in several orders).
ROUND_OFF = 1e-4


def jets(gp, e, x):
    """Covariances [1 + D, n, N] of f and its slopes at x with f at the data, and variances."""
    lengthscale, signal_variance = gp.log_lengthscale[e].exp(), gp.log_signal[e].exp() ** 2
    k = kernel(gp, e, gp.inputs, x)
    slopes = (gp.inputs[:, None] - x[None]) / lengthscale**2 * k[..., None]
    prior = signal_variance * torch.cat((torch.ones(1, dtype=F64), lengthscale**-2))
    return torch.cat((k[None], slopes.movedim(-1, 0))), prior[:, None]


def whitened(lower, covariances):
    return torch.linalg.solve_triangular(lower, covariances, upper=False)


def check_posterior_within_its_bounds(gp, x, round_off):
    """Compare the posterior and its Jacobians with dense algebra, point by point.

    The support S stands for the data through K(X, x) ≈ W K(S, x), whose error δ is the prior
    covariance given S of f at the data and at x. With A = (K + σ_n² I)⁻¹, β = A y, w = A k*,
    η = Σ_j d(X_j) / σ_n² <= SUPPORT_TOLERANCE and d the prior, v the posterior variance,

        |δ|² <= Σ_j d(X_j) d(x) = η σ_n² d(x)       (Cauchy-Schwarz)
        σ_n² |w|² <= v(x)                           (wᵀy predicts f with a variance of v)

    so the mean is off by |δᵀβ| <= |β| σ_n √(η d), and the variance by
    |2 δᵀw - δᵀAδ| <= 2 √(η d v) + η d. Its slope is twice the covariance of f and its slope, which
    is off by |δ'ᵀw + w'ᵀδ - δ'ᵀAδ| <= √(η d' v) + √(η d v') + η √(d d'), the primes meaning the
    same for the slope of f. All this holds for whichever points are the support. Round-off adds
    `round_off` of the predictive variance, to the slopes ROUND_OFF of it per lengthscale (of the
    mean: times σ_n |β|, of the predictive deviation).
    """
    found, factors = gp.posterior(x), gp._factors
    for e in range(gp.targets.shape[1]):
        noise_variance = gp.noise[e] ** 2
        k_xx = kernel(gp, e, gp.inputs, gp.inputs)
        noisy = k_xx + noise_variance * torch.eye(len(k_xx), dtype=F64)
        lower = torch.linalg.cholesky(noisy)
        beta = torch.cholesky_solve((gp.targets - gp.offset)[:, e, None], lower)[:, 0]
        covariances, prior = jets(gp, e, x)
        mean = torch.einsum("n,jnx->jx", beta, covariances)
        solved = whitened(lower, covariances)
        reduction = (solved * solved[0]).sum(1)
        v = prior - solved.square().sum(1)
        if len(k_xx) < SUPPORT_POINTS:
            eta, d = 0.0, torch.zeros_like(v)
        else:
            points = support_points(gp, factors, e)
            root = torch.linalg.cholesky(k_xx[points][:, points])
            d = (prior - whitened(root, covariances[:, points]).square().sum(1)).clamp_min(0)
            left = k_xx.diagonal() - whitened(root, k_xx[points]).square().sum(0)
            eta = float(left.clamp_min(0).sum() / noise_variance)
            assert eta <= SUPPORT_TOLERANCE
        predictive = v[0] + noise_variance
        allowance = ROUND_OFF * (prior / prior[0]).sqrt()  # [1 + D, 1] 1 / l for the slopes
        allowance[0] = round_off
        bound = beta.norm() * (eta * noise_variance * d).sqrt()
        bound = bound + allowance * (beta.norm() * gp.noise[e] * predictive.sqrt())
        found_mean = found.mean[None, :, e] - gp.offset[e]
        error = torch.cat((found_mean, found.mean_jacobian[:, e].T)) - mean
        assert (error.abs() <= bound).all()
        variance_bound = (eta * d * v[0]).sqrt() + (eta * d[0] * v).sqrt() + eta * (d * d[0]).sqrt()
        variance_bound = variance_bound + allowance * predictive
        assert ((found.variance[:, e] - v[0]).abs() <= variance_bound[0]).all()
        error = found.variance_jacobian[:, e].T + 2 * reduction[1:]
        assert (error.abs() <= 2 * variance_bound[1:]).all()


def support_points(gp, factors, e):
    """Indices of the data whose scaled inputs stand in the posterior's factors."""
    centre, inverse_lengthscale, features = factors[:3]
    n_inputs = gp.inputs.shape[1]
    scaled = (gp.inputs - centre[:, 0]) * inverse_lengthscale[e, :, 0]
    support = features[e, factors[4][e, -1] != 0, :n_inputs]
    return torch.cdist(support, scaled).argmin(1)


def trajectories(n, noise):
    """Points along similar trajectories, with a signal-to-noise ratio up to 2000."""
    t = torch.linspace(0, 3, n // 10, dtype=F64).repeat(10)
    inputs = torch.stack((t, t.sin(), (2 * t).cos()), 1) + 0.02 * randn(n, 3, seed=1)
    targets = torch.stack((inputs[:, 0], (3 * inputs[:, 1]).sin()), 1)
    return inputs, targets + noise * randn(n, 2, seed=2)


@pytest.mark.parametrize("n", [100, 400])
@pytest.mark.parametrize("noise", [0.1, 0.01, 0.001])
def test_posterior_keeps_its_digits_with_many_points_and_little_noise(n, noise):
    """On, near and far from the data, whichever points come first.

    The order of the data decides which points are the support, as does the rounding of a CPU.
    """
    inputs, targets = trajectories(n, noise)
    gp = GaussianProcess(3, 2)
    gp.set_data(inputs, targets)
    gp.fit()
    near = inputs[::7] + 0.3 * randn(len(inputs[::7]), 3, seed=3)
    x = torch.cat((inputs[::7], near, 3 * inputs.std(0) * randn(100, 3, seed=4)))
    supports = set()
    for seed in range(5):
        order = torch.randperm(n, generator=generator(seed))
        gp.set_data(inputs[order], targets[order])
        check_posterior_within_its_bounds(gp, x, 1e-6 if n == 100 else ROUND_OFF)
        if n == 400:
            sizes = [int((plain[-1] != 0).sum()) for plain in gp._factors[4]]
            assert len(set(sizes)) == 2, "each output has a support of its own"
            assert max(sizes) == gp._factors[5].shape[1] < 100
            supports.add(tuple(order[support_points(gp, gp._factors, 0)].sort().values.tolist()))
    assert n < 400 or len(supports) > 1


def test_jacobians_of_a_supported_posterior_are_those_of_its_moments():
    """Central differences; the outputs' supports differ in size."""
    t = torch.linspace(0, 3, 200, dtype=F64)
    inputs = torch.stack((t, t.sin(), (2 * t).cos()), 1) + 0.02 * randn(200, 3, seed=1)
    gp = GaussianProcess(3, 2)
    targets = torch.stack((inputs[:, 0], (3 * inputs[:, 1]).sin()), 1)
    gp.set_data(inputs, targets + 0.1 * randn(200, 2, seed=2))
    gp.fit()
    x = inputs[::20] + 0.1 * randn(10, 3, seed=3)
    found = gp.posterior(x)
    assert gp._factors[5].shape[1] < 100
    for d in range(3):
        h = 1e-3 * torch.eye(3, dtype=F64)[d]
        above, below = gp.posterior(x + h), gp.posterior(x - h)
        for moment, jacobian in (("mean", "mean_jacobian"), ("variance", "variance_jacobian")):
            expected = (getattr(above, moment) - getattr(below, moment)) / 2e-3
            torch.testing.assert_close(
                getattr(found, jacobian)[..., d], expected, rtol=1e-5, atol=1e-6
            )
