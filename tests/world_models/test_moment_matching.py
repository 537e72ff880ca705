"""Closed-form moments against Monte Carlo, finite differences and their limits.

Monte Carlo: N = 100,000 samples of the Gaussian input. Every entry of the mean, of the covariance
and of the input-output covariance lies within 4 standard errors, which are estimated from the same
samples. The seeds are fixed.
"""

import math

import pytest
import torch
from torch.autograd import gradcheck

from totalprop.world_models.gp import SUPPORT_POINTS, GaussianProcess
from totalprop.world_models.moment_matching import (
    Gaussian,
    Image,
    KernelSteps,
    KernelSum,
    join,
    kernel_sum,
    linear,
    saturate,
    saturating_cost,
    symmetric,
    trigonometry,
)

F64 = torch.float64
N, TOLERANCE = 100_000, 4.0


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def gaussian(d, width=0.5, seed=0, mean=1.0):
    """A Gaussian with correlations; its entries have standard deviations around `width`."""
    root = width * randn(d, d, seed=seed) / math.sqrt(d)
    return Gaussian(mean * randn(d, seed=seed + 1), root @ root.T)


def sample(x, n=N, seed=7):
    noise = randn(n, x.mean.shape[-1], seed=seed)
    # Of an eigendecomposition, since a covariance may be singular.
    values, vectors = torch.linalg.eigh(x.covariance)
    return x.mean + noise @ (vectors * values.clamp_min(0).sqrt()).T


def assert_means(samples, expected, what):
    """[N, ...] samples have the mean [...] that is expected, within TOLERANCE standard errors."""
    error = samples.mean(0) - expected
    # The round-off of a mean of constants is no standard error.
    spread = samples.std(0) / math.sqrt(len(samples)) + 1e-13 * (1 + expected.abs())
    worst = float((error.abs() / spread).max())
    assert worst < TOLERANCE, f"{what}: {worst:.2f} standard errors"


def assert_moments(x, image, function, variance=None):
    """Against samples of x; `variance` [N, E] is what f(x) varies by at a given x."""
    points = sample(x)
    values = function(points)
    centred, inputs = values - image.mean, points - x.mean
    products = centred.unsqueeze(2) * centred.unsqueeze(1)
    if variance is not None:
        products = products + variance(points).diag_embed()
    assert_means(values, image.mean, "mean")
    assert_means(products, image.covariance, "covariance")
    cross = inputs.unsqueeze(2) * centred.unsqueeze(1)
    assert_means(cross, x.covariance @ image.gain, "input-output covariance")


# Monte Carlo


def test_linear_map():
    x, weights, bias = gaussian(4), randn(2, 4, seed=3), randn(2, seed=4)
    assert_moments(x, linear(x, weights, bias), lambda z: z @ weights.T + bias)


@pytest.mark.parametrize("width", [0.1, 0.7, 3.0, 4.0])
def test_sines_and_cosines_of_several_angles(width):
    x = gaussian(3, width, seed=5)
    assert_moments(x, trigonometry(x), lambda z: torch.cat((z.sin(), z.cos()), -1))


def test_one_angle_is_the_textbook_formula():
    m, v = torch.tensor([0.4], dtype=F64), torch.tensor([[0.6]], dtype=F64)
    found, e = trigonometry(Gaussian(m, v)), math.exp(-0.6)
    mean = e**0.5 * torch.tensor([math.sin(0.4), math.cos(0.4)], dtype=F64)
    cross = -0.5 * e * (1 - e) * math.sin(0.8)
    covariance = torch.tensor(
        [[0.5 * (1 - e) * (1 + e * math.cos(0.8)), cross],
         [cross, 0.5 * (1 - e) * (1 - e * math.cos(0.8))]], dtype=F64,
    )  # fmt: skip
    gain = e**0.5 * torch.tensor([[math.cos(0.4), -math.sin(0.4)]], dtype=F64)
    for part, expected in zip(found, (mean, covariance, gain), strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-12, atol=1e-14)


def saturation(v):
    return (9 * v.sin() + (3 * v).sin()) / 8


@pytest.mark.parametrize("width", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("controls", [1, 3])
def test_saturation(width, controls):
    x = gaussian(controls, width, seed=2)
    assert_moments(x, saturate(x), saturation)


def test_saturation_of_one_control_is_the_closed_form_with_two_harmonics():
    m, v = 0.7, 0.9
    found = saturate(Gaussian(torch.tensor([m], dtype=F64), torch.tensor([[v]], dtype=F64)))
    one, three = math.exp(-v / 2), math.exp(-4.5 * v)
    mean = (9 * one * math.sin(m) + three * math.sin(3 * m)) / 8
    slope = (9 * one * math.cos(m) + 3 * three * math.cos(3 * m)) / 8
    weights, second = {1: 9 / 8, 3: 1 / 8}, 0.0
    for p, w_p in weights.items():
        for q, w_q in weights.items():
            near = math.exp(-((p - q) ** 2) * v / 2) * math.cos((p - q) * m)
            far = math.exp(-((p + q) ** 2) * v / 2) * math.cos((p + q) * m)
            second += w_p * w_q / 2 * (near - far)
    assert float(found.mean) == pytest.approx(mean, rel=1e-12)
    assert float(found.gain) == pytest.approx(slope, rel=1e-12)
    assert float(found.covariance) == pytest.approx(second - mean**2, rel=1e-12)


def make_gp(n=20, inputs=3, outputs=3, noise=0.1, seed=0):
    """A GP with hyper-parameters that differ between outputs and inputs."""
    gp = GaussianProcess(inputs, outputs)
    gp.set_data(randn(n, inputs, seed=seed), randn(n, outputs, seed=seed + 1))
    gp.log_lengthscale.copy_(0.3 * randn(outputs, inputs, seed=seed + 2))
    gp.log_signal.copy_(0.4 * randn(outputs, seed=seed + 3))
    gp.log_noise.copy_(math.log(noise) + 0.3 * randn(outputs, seed=seed + 4))
    return gp


@pytest.mark.parametrize("width", [0.1, 0.5, 2.0])
def test_gaussian_processes(width):
    gp, x = make_gp(), gaussian(3, width, seed=6, mean=0.5)
    assert_moments(
        x,
        kernel_sum(x, gp.kernel_sum()),
        lambda z: gp.posterior(z).mean,
        lambda z: gp.posterior(z).variance,
    )


def test_gaussian_processes_with_a_prior_mean():
    gp, x = make_gp(), gaussian(3, seed=6)
    gp.set_data(gp.inputs, gp.targets + 100.0)
    assert (gp.offset > 50).all()
    found = kernel_sum(x, gp.kernel_sum())
    assert_moments(x, found, lambda z: gp.posterior(z).mean, lambda z: gp.posterior(z).variance)


def test_gaussian_processes_on_their_support():
    """Along a trajectory, where the support of each output has another size."""
    time = torch.linspace(0, 6, 2 * SUPPORT_POINTS, dtype=F64)
    gp = GaussianProcess(3, 2)
    inputs = torch.stack((time.sin(), time.cos(), 0.3 * time), 1)
    gp.set_data(inputs, torch.stack((time.cos(), (2 * time).sin()), 1))
    gp.log_noise.fill_(math.log(0.05))
    gp.log_lengthscale[1].fill_(-0.5)
    function = gp.kernel_sum()
    assert function.centres.shape[1] < SUPPORT_POINTS / 2
    assert (function.root[0].abs().sum(0) == 0).any() != (function.root[1].abs().sum(0) == 0).any()
    x = Gaussian(inputs[100], gaussian(3, 0.3).covariance)
    assert_moments(
        x,
        kernel_sum(x, function),
        lambda z: gp.posterior(z).mean,
        lambda z: gp.posterior(z).variance,
    )


def network(inputs=3, outputs=2, n=6, seed=0):
    """An RBF network: centres and lengthscales are shared, there is no variance."""
    shared = randn(n, inputs, seed=seed)
    scale = (0.3 * randn(inputs, seed=seed + 1)).exp()
    return KernelSum(
        shared.expand(outputs, -1, -1), randn(outputs, n, seed=seed + 2),
        scale.expand(outputs, -1), torch.zeros(outputs, dtype=F64),
        torch.zeros(outputs, dtype=F64),
    )  # fmt: skip


def evaluate(function, z):
    offsets = (z[:, None, None] - function.centres) * function.inverse_lengthscale[:, None]
    return (function.beta * (-0.5 * offsets.square().sum(-1)).exp()).sum(-1)


@pytest.mark.parametrize("width", [0.1, 1.0])
def test_rbf_network(width):
    function, x = network(), gaussian(3, width, seed=8)
    assert_moments(x, kernel_sum(x, function), lambda z: evaluate(function, z))


@pytest.mark.parametrize("width", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("rank", [1, 3])
def test_saturating_cost(width, rank):
    x, target, root = gaussian(3, width, seed=9), randn(3, seed=1), randn(rank, 3, seed=2)
    mean, variance = saturating_cost(x, target, root)
    error = (sample(x) - target) @ root.T
    cost = 1 - (-0.5 * error.square().sum(-1)).exp()
    assert_means(cost, mean, "mean")
    assert_means((cost - mean).square(), variance, "variance")
    assert 0 < variance < 0.25 and 0 < mean < 1


def test_a_chain_of_functions_is_joined():
    """Angles, then a linear map of some entries with the sines, then the saturation.

    The input of each function is made Gaussian, as the method assumes, and what comes before is
    sampled along with it: cov(z, f(y)) = cov(z, y) gain is exact then.
    """
    joint = gaussian(4, 0.6, seed=3)
    weights, bias = randn(2, 4, seed=5), randn(2, seed=6)
    trig = lambda y: torch.cat((y.sin(), y.cos()), -1)  # noqa: E731
    stages = [
        ((3, 1), trigonometry, trig),
        ((0, 2, 4, 6), lambda y: linear(y, weights, bias), lambda y: y @ weights.T + bias),
        ((8, 9), saturate, saturation),
    ]
    for entries, match, function in stages:
        points = sample(joint)
        found = join(joint, entries, match(joint.marginal(entries)))
        assert found.mean.shape[0] > joint.mean.shape[0]
        both = torch.cat((points, function(points[:, list(entries)])), -1)
        centred = both - found.mean
        assert_means(both, found.mean, "mean")
        assert_means(centred.unsqueeze(2) * centred.unsqueeze(1), found.covariance, "covariance")
        assert torch.equal(found.covariance, found.covariance.mT)
        joint = found


# Limits


def cases():
    gp, function, d = make_gp(), network(), 3
    weights, bias, target = randn(2, d, seed=3), randn(2, seed=4), randn(d, seed=5)
    return {
        "linear": (lambda x: linear(x, weights, bias), lambda z: z @ weights.T + bias),
        "trigonometry": (trigonometry, lambda z: torch.cat((z.sin(), z.cos()), -1)),
        "saturation": (saturate, saturation),
        "gp": (lambda x: kernel_sum(x, gp.kernel_sum()), lambda z: gp.posterior(z).mean),
        "network": (lambda x: kernel_sum(x, function), lambda z: evaluate(function, z)),
        "cost": (
            lambda x: saturating_cost(x, target, weights),
            lambda z: 1 - (-0.5 * ((z - target) @ weights.T).square().sum(-1)).exp(),
        ),
    }


CASES = cases()


@pytest.mark.parametrize("name", CASES)
def test_without_uncertainty_it_is_the_function_and_its_jacobian(name):
    match, function = CASES[name]
    x = Gaussian(randn(3, seed=1), torch.zeros(3, 3, dtype=F64))
    found = match(x)
    torch.testing.assert_close(found[0], function(x.mean[None])[0], rtol=1e-11, atol=1e-12)
    if name == "gp":  # the process varies where its input does not
        expected = make_gp().posterior(x.mean[None]).variance[0].diag()
    else:
        expected = torch.zeros_like(found[1])
    torch.testing.assert_close(found[1], expected, rtol=1e-9, atol=1e-11)
    if isinstance(found, Image):
        slope = torch.autograd.functional.jacobian(lambda m: function(m[None])[0], x.mean)
        torch.testing.assert_close(found.gain.mT, slope, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("width", [1e-4, 1e-6])
def test_a_narrow_input_of_a_precise_model_keeps_its_digits(width):
    """J S Jᵀ of the posterior's mean, which sums of the βs, large and of both signs, would drown.

    Written as β_aᵀ Q β_b - mean_a mean_b it is off by 27 % and by a factor of 233.
    """
    gp = make_gp(n=40, inputs=2, outputs=2, noise=1e-3)
    x = gaussian(2, width)
    function = gp.kernel_sum()
    assert function.beta.abs().max() > 1e3
    found = kernel_sum(x, function)
    slope = torch.autograd.functional.jacobian(lambda m: gp.posterior(m[None]).mean[0], x.mean)
    expected = slope @ x.covariance @ slope.T
    torch.testing.assert_close(found.covariance[0, 1], expected[0, 1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("distance", [1.0, 1e2, 1e4, 1e150])
@pytest.mark.parametrize("width", [1e-8, 1.0, 1e3, 1e9])
def test_nothing_overflows_far_from_the_data_or_with_a_wide_input(distance, width):
    gp = make_gp()
    leaf = torch.full((3,), distance, dtype=F64, requires_grad=True)
    x = Gaussian(leaf, width**2 * gaussian(3, 1.0).covariance)
    for match, _ in CASES.values():
        parts = [part for part in match(x) if isinstance(part, torch.Tensor)]
        (slope,) = torch.autograd.grad(sum(part.sum() for part in parts), leaf, allow_unused=True)
        assert all(torch.isfinite(part).all() for part in parts)
        assert slope is None or torch.isfinite(slope).all()
    variance = kernel_sum(x, gp.kernel_sum()).covariance.diagonal()
    assert (variance >= 0).all()
    if distance >= 1e2 and width <= 1:  # the prior
        torch.testing.assert_close(variance, (2 * gp.log_signal).exp())


def test_an_offset_of_the_inputs_does_not_matter():
    gp, x, offset = make_gp(), gaussian(3), 2.0**30
    inputs = (gp.inputs * 2**20).round() / 2**20
    mean = (x.mean * 2**20).round() / 2**20
    found = []
    for shift in (0.0, offset):
        gp.set_data(inputs + shift, gp.targets)
        found.append(kernel_sum(Gaussian(mean + shift, x.covariance), gp.kernel_sum()))
    for part, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-7, atol=1e-9)


def test_a_state_that_is_known_exactly_beside_one_that_is_not():
    """A singular covariance: as if the known entry were part of the function."""
    gp, x = make_gp(outputs=2), gaussian(3)
    covariance = x.covariance.clone()
    covariance[1] = covariance[:, 1] = 0
    x = Gaussian(x.mean, covariance)
    assert_moments(
        x,
        kernel_sum(x, gp.kernel_sum()),
        lambda z: gp.posterior(z).mean,
        lambda z: gp.posterior(z).variance,
    )


# Batches and gradients


@pytest.mark.parametrize("name", CASES)
def test_a_batch_is_its_members(name):
    match, _ = CASES[name]
    members = [gaussian(3, width, seed=seed) for seed, width in enumerate((0.1, 0.6, 1.5, 0.3))]
    stacked = [torch.stack(parts).view(2, 2, *parts[0].shape) for parts in zip(*members)]
    together = match(Gaussian(*stacked))
    for i, member in enumerate(members):
        for part, expected in zip(together, match(member), strict=True):
            torch.testing.assert_close(part[i // 2, i % 2], expected, rtol=1e-10, atol=1e-12)


def test_a_batch_is_joined_and_taken_apart():
    members = [gaussian(3, seed=seed) for seed in range(4)]
    batch = Gaussian(*(torch.stack(parts) for parts in zip(*members)))
    entries = (2, 0)
    together = join(batch, entries, saturate(batch.marginal(entries)))
    for i, member in enumerate(members):
        alone = join(member, entries, saturate(member.marginal(entries)))
        torch.testing.assert_close(together.covariance[i], alone.covariance)
        torch.testing.assert_close(together.mean[i], alone.mean)


@pytest.mark.parametrize("width", [0.0, 0.5])
@pytest.mark.parametrize("name", CASES)
def test_gradients_with_respect_to_the_input_equal_finite_differences(name, width):
    match, _ = CASES[name]

    def parts(mean, root):
        covariance = symmetric(width * root @ root.T + root)  # any symmetric direction
        return tuple(match(Gaussian(mean, covariance)))

    start = randn(3, seed=2).requires_grad_()
    root = (0.3 * gaussian(3).covariance).requires_grad_()
    assert gradcheck(parts, (start, root), atol=1e-6)


def test_gradients_with_respect_to_a_networks_parameters_equal_finite_differences():
    x, function = gaussian(3, 0.5), network(n=4)
    shared = function.centres[0].clone().requires_grad_()
    scale = function.inverse_lengthscale[0].clone().requires_grad_()
    beta = function.beta.clone().requires_grad_()

    def parts(shared, beta, scale):
        changed = function._replace(
            centres=shared.expand(2, -1, -1), beta=beta, inverse_lengthscale=scale.expand(2, -1)
        )
        return tuple(kernel_sum(x, changed))

    assert gradcheck(parts, (shared, beta, scale))


def test_gradients_with_respect_to_a_linear_maps_parameters_equal_finite_differences():
    x = gaussian(3)
    weights, bias = randn(2, 3).requires_grad_(), randn(2, seed=1).requires_grad_()
    assert gradcheck(lambda w, b: tuple(linear(x, w, b)), (weights, bias))


# Derivatives in closed form


@pytest.mark.parametrize("width", [1e-3, 0.5, 2.0, 1e4])
@pytest.mark.parametrize("kind", ["process", "network"])
def test_derivatives_of_all_steps_together_equal_those_of_each(kind, width):
    """`KernelSteps` against backpropagation through `kernel_sum`, in every output."""
    function = make_gp(outputs=3).kernel_sum() if kind == "process" else network()
    inputs = [gaussian(3, width, seed=seed) for seed in range(3)]
    steps = KernelSteps(function, keep=True)
    for x in inputs:
        for part, expected in zip(steps(x), kernel_sum(x, function), strict=True):
            torch.testing.assert_close(part, expected, rtol=1e-12, atol=1e-14)
    leaves = [torch.stack(parts).requires_grad_() for parts in zip(*inputs)]
    together = steps.together(Gaussian(*leaves))

    def flat(image):
        return torch.cat([part.flatten(-n) for part, n in zip(image, (1, 2, 2))], -1)

    def alone(mean, covariance):
        return flat(kernel_sum(Gaussian(mean, symmetric(covariance)), function))

    outputs = flat(together)
    for h, x in enumerate(inputs):
        expected = torch.autograd.functional.jacobian(alone, tuple(x))
        for o in range(outputs.shape[1]):
            found = torch.autograd.grad(outputs[h, o], leaves, retain_graph=True)
            for part, whole in zip(found, expected, strict=True):
                scale = float(whole.abs().amax())
                torch.testing.assert_close(part[h], whole[o], rtol=1e-8, atol=1e-11 * (1 + scale))


def test_steps_without_derivatives_keep_nothing():
    steps = KernelSteps(network(), keep=False)
    steps(gaussian(3))
    assert not steps.terms
