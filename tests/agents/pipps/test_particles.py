"""The particle simulation against plain rollouts, finite differences and closed forms."""

from dataclasses import replace

import pytest
import torch
from gymnasium import spaces
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from totalprop import estimators
from totalprop.agents.pipps.particles import (
    Noise,
    ParticleModel,
    gaussian_resample,
    policy_gradient,
    simulate,
)
from totalprop.agents.trials.controllers import LinearPolicy, RBFPolicy, saturate
from totalprop.estimators import ParameterProbe, assign_credit
from totalprop.world_models.gp_dynamics import GPDynamics, Prediction

F64 = torch.float64
HORIZON, PARTICLES, STATES = 4, 6, 2
NODEWISE = [name for name in estimators.names() if not estimators.make(name).several_passes]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def cost(states, actions):
    """Depends on states and actions, and is not quadratic."""
    return 1 - torch.exp(-0.5 * (states - 0.3).square().sum(-1)) + 0.1 * actions.square().sum(-1)


def state_cost(states, actions):
    return 1 - torch.exp(-0.5 * (states - 0.3).square().sum(-1))


# x = (q, q̇), T = 0.4
INTEGRATED = {"integrated_dims": ((0, 1),), "time_step": 0.4}


def make(
    controls=1, angle_dims=(), cost=state_cost, policy_class=RBFPolicy, integrated=None, **changes
):
    """A model with fixed hyper-parameters on 15 random points, and a small controller."""
    dynamics = GPDynamics(STATES, controls, angle_dims=angle_dims, **integrated or {})
    gp, dims = dynamics.gp, dynamics.predicted_dims
    inputs = torch.randn(15, gp.inputs.shape[1], dtype=F64, generator=generator(0))
    targets = 0.5 * torch.randn(15, STATES, dtype=F64, generator=generator(1))
    gp.set_data(inputs, targets[:, dims])
    gp.log_lengthscale.fill_(0.4)
    gp.log_signal.copy_(torch.tensor([0.5, 0.7], dtype=F64)[dims].log())
    gp.log_noise.copy_(torch.tensor([0.2, 0.3], dtype=F64)[dims].log())
    model = ParticleModel(
        dynamics,
        start_mean=torch.tensor([0.5, -0.5], dtype=F64),
        start_std=torch.tensor([0.3, 0.2], dtype=F64),
        cost=cost,
    )
    torch.manual_seed(0)
    kwargs = {"n_centres": 5} if policy_class is RBFPolicy else {}
    space = spaces.Box(-10, 10, (STATES,))
    policy = policy_class(space, spaces.Box(-1, 1, (controls,)), angle_dims=angle_dims, **kwargs)
    return replace(model, **changes), policy


def draw(n=PARTICLES, horizon=HORIZON, seed=3, resample=False):
    return Noise.draw(horizon, n, STATES, generator(seed), resample=resample)


def flat_gradient(loss, policy):
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(policy.parameters()))])


def flatten(gradients):
    return torch.cat([g.reshape(-1) for g in gradients])


def plain_rollout(model, policy, noise):
    """The reparameterised rollout without nodes, credits or probes."""
    x, total, path = model.start_mean + model.start_std * noise.start, 0.0, []
    dims = model.dynamics.predicted_dims
    for t in range(len(noise.model)):
        u = policy.act(x)
        found = model.dynamics.gp.posterior(model.dynamics.encode(x, u))
        variance = model.noise_multiplier * model.dynamics.noise**2
        if model.model_uncertainty:
            variance = variance + found.variance
        predicted = x[:, dims] + found.mean + variance.sqrt() * noise.model[t][:, dims]
        if len(dims) < STATES:  # q' = q + T/2 (q̇ + q̇')
            x = torch.cat((x[:, :1] + 0.2 * (x[:, 1:] + predicted), predicted), 1)
        else:
            x = predicted
        if noise.resample is not None:
            x = gaussian_resample(x, noise.resample[t])
        path.append(x)
        total = total + model.cost(x, u).mean()
    return total, torch.stack(path)


# RP


@pytest.mark.parametrize("resample", [False, True])
@pytest.mark.parametrize("changes", [{}, {"model_uncertainty": False}, {"noise_multiplier": 9.0}])
@pytest.mark.parametrize(("controls", "angle_dims"), [(1, ()), (2, ()), (1, (1,))])
@pytest.mark.parametrize("integrated", [None, INTEGRATED])
def test_rp_equals_a_plain_rollout(controls, angle_dims, changes, resample, integrated):
    model, policy = make(controls, angle_dims, cost=cost, integrated=integrated, **changes)
    noise = draw(resample=resample)
    loss, costs, states = simulate(model, policy, noise, estimators.make("rp"))
    expected, path = plain_rollout(model, policy, noise)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(states[1:], path)
    torch.testing.assert_close(states[0], model.start_mean + model.start_std * noise.start)
    assert costs.shape == (HORIZON, PARTICLES) and not costs.requires_grad
    torch.testing.assert_close(costs.sum(0).mean(), loss.detach())
    torch.testing.assert_close(flat_gradient(loss, policy), flat_gradient(expected, policy))


@pytest.mark.parametrize("resample", [False, True])
def test_rp_gradient_equals_finite_differences_with_fixed_noise(resample):
    model, policy = make(cost=cost)
    noise, rp = draw(resample=resample), estimators.make("rp")
    gradient = flat_gradient(simulate(model, policy, noise, rp)[0], policy)
    theta = parameters_to_vector(policy.parameters()).detach()

    def loss(theta):
        vector_to_parameters(theta, policy.parameters())
        with torch.no_grad():
            return float(simulate(model, policy, noise, rp)[0])

    step = 1e-5
    for i in range(0, len(theta), 3):
        shift = torch.zeros_like(theta)
        shift[i] = step
        slope = (loss(theta + shift) - loss(theta - shift)) / (2 * step)
        assert float(gradient[i]) == pytest.approx(slope, rel=1e-5, abs=1e-8)


# The probe


def simulate_with_the_general_probe(model, policy, noise, estimator, tap=None):
    """`simulate` with `ParameterProbe` (torch.func) instead of the cheap `ControlProbe`."""
    dynamics = model.dynamics.gp
    named = dict(policy.named_parameters())
    subset = {"weights": named["weights"]} if estimator.probe == "subset" else named
    dense = torch.linalg.inv(
        torch.stack([kernel(dynamics, e, dynamics.inputs) for e in range(STATES)])
        + torch.diag_embed((dynamics.noise**2)[:, None].expand(-1, len(dynamics.inputs)))
    )

    def zeta(parameters, x):  # one sample, all in torch.func's reach
        u = functional_call(policy, {**named, **parameters}, (x[None],))
        z = model.dynamics.encode(x[None], u)
        k = torch.stack([kernel(dynamics, e, z)[0] for e in range(STATES)])  # [E, n]
        weights = torch.einsum("en,enm->em", k, dense)
        mean = (weights * dynamics.targets.T).sum(-1)
        variance = (2 * dynamics.log_signal).exp() - (weights * k).sum(-1)
        return x + mean, (variance + dynamics.noise**2).sqrt()

    x = model.start_mean + model.start_std * noise.start
    credit, loss = x.new_zeros(len(x)), x.new_zeros(())
    for t in range(len(noise.model)):
        u = policy.act(x)
        found = dynamics.posterior(model.dynamics.encode(x, u))
        std = (found.variance + dynamics.noise**2).sqrt()
        probe = ParameterProbe(zeta, subset, x)
        x, credit = estimator(x + found.mean, std, noise.model[t], credit, probe=probe, tap=tap)
        loss = loss + assign_credit(model.cost(x, u), credit).mean()
    return loss


def kernel(gp, e, x):
    difference = (x[:, None, :] - gp.inputs[None]) / gp.log_lengthscale[e].exp()
    return (2 * gp.log_signal[e]).exp() * torch.exp(-0.5 * (difference**2).sum(-1))


@pytest.mark.parametrize("name", ["tp", "tps", "tpg"])
@pytest.mark.parametrize(("controls", "angle_dims"), [(1, ()), (2, (1,))])
def test_control_probe_equals_the_general_probe(name, controls, angle_dims):
    model, policy = make(controls, angle_dims)
    noise, estimator = draw(n=12), estimators.make(name)
    ours = flat_gradient(simulate(model, policy, noise, estimator)[0], policy)
    general = simulate_with_the_general_probe(model, policy, noise, estimator)
    torch.testing.assert_close(ours, flat_gradient(general, policy), rtol=1e-6, atol=1e-10)
    rp = flat_gradient(simulate(model, policy, noise, estimators.make("rp"))[0], policy)
    assert not torch.allclose(ours, rp, rtol=1e-3)


def test_tps_weighs_by_the_last_layer_only():
    model, policy = make(2)
    noise = draw(n=12)
    gradients = [
        flat_gradient(simulate(model, policy, noise, estimators.make(name))[0], policy)
        for name in ("tp", "tps")
    ]
    assert not torch.allclose(*gradients)
    assert torch.isfinite(gradients[1]).all()


@pytest.mark.parametrize("changes", [{}, {"model_uncertainty": False}])
@pytest.mark.parametrize("name", NODEWISE)
def test_taps_sum_to_the_gradient(name, changes):
    model, policy = make(controls=2, **changes)
    result = policy_gradient(model, policy, draw(n=9), estimators.make(name), per_sample=True)
    assert result.per_sample.shape == (9, sum(p.numel() for p in policy.parameters()))
    flat = flatten(result.gradients)
    torch.testing.assert_close(result.per_sample.sum(0), flat, rtol=1e-9, atol=1e-12)
    assert flat.norm() > 1e-4


def test_tap_rows_are_the_gradients_of_single_particles_for_rp():
    model, policy = make(controls=1)
    noise = draw(n=3)
    found = policy_gradient(model, policy, noise, estimators.make("rp"), per_sample=True).per_sample
    for i in range(3):
        one = Noise(noise.start[i : i + 1], noise.model[:, i : i + 1], None)
        alone = flat_gradient(plain_rollout(model, policy, one)[0], policy)
        torch.testing.assert_close(found[i], alone / 3, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "expected"), [("rp", 0.0), ("lr", 1.0)])
def test_meter_measures_k(name, expected):
    model, policy = make()
    meter = torch.zeros(HORIZON, STATES, dtype=F64, requires_grad=True)
    k = policy_gradient(model, policy, draw(), estimators.make(name), meter=meter).k
    torch.testing.assert_close(k, torch.full_like(meter, expected).detach())


# All estimators agree


DRAWS, N_EACH = 400, 25


@pytest.fixture(scope="module")
def reference():
    """RP's mean gradient over many particles at once: 200 x 300 particles, seed 99."""
    model, policy = make(policy_class=LinearPolicy)
    source = generator(99)
    gradients = torch.stack(
        [
            flatten(policy_gradient(model, policy, n, estimators.make("rp")).gradients)
            for n in (Noise.draw(2, 300, STATES, source, resample=False) for _ in range(200))
        ]
    )
    return gradients.mean(0), gradients.var(0) / len(gradients)


@pytest.mark.parametrize("name", estimators.names())
def test_estimators_agree_in_mean(name, reference):
    """400 draws of 25 particles, horizon 2, seed 7; <= 4 SE in each of the 3 parameters.

    Composite estimators choose k from the particles that they weigh; with cross-fitting their bias
    is far below the standard error. `safe` cannot be cross-fitted: 100 particles.
    """
    model, policy = make(policy_class=LinearPolicy)
    source, estimator = generator(7), estimators.make(name)
    n_each = 4 * N_EACH if estimator.base else N_EACH
    if name not in ("rp", "lr", "rp-cut") and not estimator.several_passes:
        estimator = replace(estimator, cross_fit=True)
    gradients = torch.stack(
        [
            flatten(policy_gradient(model, policy, n, estimator).gradients)
            for n in (Noise.draw(2, n_each, STATES, source, resample=False) for _ in range(DRAWS))
        ]
    )
    error = gradients.mean(0) - reference[0]
    standard_error = (gradients.var(0) / DRAWS + reference[1]).sqrt()
    assert (error.abs() <= 4 * standard_error).all()
    assert (reference[0].abs() > 4 * standard_error).any()  # the test can tell it from zero


# Gaussian resampling


def test_resampled_points_have_the_fitted_mean_and_covariance():
    """4000 particles -> 200 000 draws of the fitted Gaussian, seed 5, within 4 SE."""
    x = torch.randn(4000, 2, dtype=F64, generator=generator(4))
    x = x @ torch.tensor([[1.0, 0.6], [0.0, 0.5]], dtype=F64) + torch.tensor([3.0, -1.0])
    noise = torch.randn(50, 4000, 2, dtype=F64, generator=generator(5))
    y = torch.cat([gaussian_resample(x, z) for z in noise])
    covariance, n = torch.cov(x.T), len(y)
    mean_error = (y.mean(0) - x.mean(0)) / (covariance.diagonal() / n).sqrt()
    assert mean_error.abs().max() < 4
    variances = covariance.diagonal()
    error = (variances[:, None] * variances + covariance.square()) / n  # of a sample covariance
    assert ((torch.cov(y.T) - covariance).abs() <= 4 * error.sqrt()).all()


def test_resampling_equals_its_formula():
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 3.0]], dtype=F64)
    z = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=F64)
    # mean (1, 1); Bessel-corrected covariance diag(1, 3)
    expected = torch.tensor([[1.0, 1.0], [2.0, 1.0], [1.0, 1 + 3**0.5]], dtype=F64)
    torch.testing.assert_close(gaussian_resample(x, z), expected, rtol=1e-8, atol=1e-8)


def test_gradcheck_of_resampling():
    x = torch.randn(7, 3, dtype=F64, generator=generator(0)).requires_grad_()
    z = torch.randn(7, 3, dtype=F64, generator=generator(1))
    assert torch.autograd.gradcheck(lambda x: gaussian_resample(x, z), (x,))


def test_resampling_survives_collapsed_and_too_few_particles():
    z = torch.randn(3, 4, dtype=F64, generator=generator(1))
    collapsed = gaussian_resample(torch.ones(3, 4, dtype=F64), z)
    torch.testing.assert_close(collapsed, torch.ones(3, 4, dtype=F64), atol=1e-6, rtol=0)
    for seed in range(20):
        few = torch.randn(3, 4, dtype=F64, generator=generator(seed))
        assert torch.isfinite(gaussian_resample(few, z)).all()


# The model's options, in closed form


@pytest.mark.parametrize("multiplier", [1.0, 4.0, 100.0])
@pytest.mark.parametrize("uncertainty", [True, False])
def test_spread_after_one_step(multiplier, uncertainty):
    """From a known start x_1 - x_0 = m + z sqrt(σ_f² + multiplier·σ_n²), exactly for each z."""
    model, policy = make(model_uncertainty=uncertainty, noise_multiplier=multiplier)
    model = replace(model, start_std=torch.zeros(STATES, dtype=F64))
    noise = draw(horizon=1)
    _, _, states = simulate(model, policy, noise, estimators.make("rp"))
    start = model.start_mean[None]
    found = model.dynamics.gp.posterior(torch.cat((start, policy.act(start)), -1))
    variance = multiplier * torch.tensor([0.04, 0.09], dtype=F64)
    if uncertainty:
        assert (found.variance > 0.01).all()
        variance = variance + found.variance
    expected = start + found.mean + variance.sqrt() * noise.model[0]
    torch.testing.assert_close(states[1], expected.detach())


# Noise


def test_same_generator_state_gives_the_same_noise():
    first, second, other = draw(seed=1, resample=True), draw(seed=1, resample=True), draw(seed=2)
    for name, shape in (("start", (6, 2)), ("model", (4, 6, 2)), ("resample", (4, 6, 2))):
        assert torch.equal(getattr(first, name), getattr(second, name))
        assert getattr(first, name).shape == shape and getattr(first, name).dtype == F64
    assert not torch.equal(first.model, other.model) and other.resample is None
    assert not torch.equal(first.model, first.resample)


def test_simulation_draws_nothing_from_the_global_generator():
    model, policy = make()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    simulate(model, policy, draw(resample=True), estimators.make("tpx"))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("policy_class", [RBFPolicy, LinearPolicy])
@pytest.mark.parametrize("controls", [1, 2])
@pytest.mark.parametrize("name", ["rp", "lr", "tpx"])
def test_taps_hold_what_a_cost_of_the_actions_sends_back(name, controls, policy_class):
    """That path bypasses the nodes; the taps still sum to the gradient."""
    model, policy = make(controls, cost=cost, policy_class=policy_class)
    found = policy_gradient(model, policy, draw(), estimators.make(name), per_sample=True)
    torch.testing.assert_close(found.per_sample.sum(0), flatten(found.gradients))


# Termination

START, STD, BOUND = 0.3, 0.4, 1.0


class Walk:
    """x' ~ N(x + u, 0.4²), with the interface of GPDynamics."""

    noise, predicted_dims = torch.tensor([STD], dtype=F64), [0]

    def complete(self, states, predicted):
        return predicted

    def predict(self, states, controls):
        ones = torch.ones(len(states), 1, 1, dtype=F64)
        return Prediction(states + controls, torch.zeros_like(states), ones, torch.zeros_like(ones))


def walk(termination, cost, termination_cost=0.0):
    """A walk from 0.3 under a constant control of about 0.27."""
    start, spread = torch.tensor([START], dtype=F64), torch.zeros(1, dtype=F64)
    model = ParticleModel(
        Walk(), start, spread, cost, termination=termination, termination_cost=termination_cost
    )
    policy = LinearPolicy(spaces.Box(-9, 9, (1,)), spaces.Box(-1, 1, (1,)))
    with torch.no_grad():
        policy.weights.zero_()
        policy.bias.fill_(0.18)
    return model, policy


def walk_gradient(model, policy, name, n, horizon, seed):
    """Loss, d loss / d bias, and its standard error."""
    noise = Noise.draw(horizon, n, 1, generator(seed), resample=False)
    estimator = estimators.make(name)
    found = policy_gradient(model, policy, noise, estimator, per_sample=True)
    bias = found.per_sample[:, 1]
    return float(found.loss), float(found.gradients[1]), float(bias.std() * n**0.5)


def is_beyond(x):
    return x[..., 0] > BOUND


def is_probably_beyond(x):
    return torch.special.ndtr((x[..., 0] - BOUND) / 0.2)


def alive(x, controls):
    return 0 * x[..., 0] - 1.0


@pytest.mark.parametrize(
    ("termination", "spread", "names"),
    [
        (is_beyond, STD, ["lr"]),
        (is_probably_beyond, (STD**2 + 0.2**2) ** 0.5, ["rp", "lr", "tp", "tpx"]),
    ],
)
@pytest.mark.parametrize("end", [0.0, 3.0])
def test_the_gradient_of_an_end_equals_the_closed_form(termination, spread, names, end):
    """Two steps at a cost of -1, N = 20000, seed 0, within 4 standard errors.

    J = -1 - P(under way) + end (1 - P), P = Φ(z), z = (1 - x_0 - u) / spread, so that
    dJ/du = (1 + end) φ(z) / spread.
    """
    model, policy = walk(termination, alive, end)
    u = policy.act(torch.zeros(1, 1, dtype=F64))
    slope = float(torch.autograd.grad(u.sum(), policy.bias)[0])
    z = (BOUND - START - u.detach().squeeze()) / spread
    survival = torch.special.ndtr(z)
    density = (-0.5 * z**2).exp() / (2 * torch.pi) ** 0.5
    loss, gradient = float(-1 - survival + end * (1 - survival)), float(slope * density / spread)
    gradient *= 1 + end
    for name in names:
        found_loss, found, error = walk_gradient(model, policy, name, 20000, 2, 0)
        assert abs(found_loss - loss) < 4 * (1 + end) * 0.5 / 20000**0.5
        assert 0 < error < 0.05 * abs(gradient)
        assert abs(found - gradient) < 4 * error, name


@pytest.mark.parametrize("name", ["rp", "lr", "tpx", "tp", "ivw"])
@pytest.mark.parametrize("resample", [False, True])
def test_after_the_end_costs_are_fixed_and_there_is_no_gradient(name, resample):
    """All particles end in the first step: four steps are one, plus the cost of three."""

    def always(x):
        return x[..., 0] > -1e9

    model, policy = make(cost=cost, termination=always, termination_cost=5.0)
    noise = draw(n=20, resample=resample)
    one = Noise(noise.start, noise.model[:1], noise.resample[:1] if resample else None)
    estimator = estimators.make(name)
    found, expected = (
        policy_gradient(model, policy, each, estimator, per_sample=True) for each in (noise, one)
    )
    torch.testing.assert_close(found.loss, expected.loss + 3 * 5.0)
    torch.testing.assert_close(flatten(found.gradients), flatten(expected.gradients))
    torch.testing.assert_close(found.per_sample, expected.per_sample)
    _, costs, states = simulate(model, policy, noise, estimator if name != "ivw" else RP)
    assert (costs[1:] == 5.0).all() and (states[1:] == states[1]).all()


class Pushed(Walk):
    """q̇' ~ N(q̇ + u, 0.4²), q' = q + T/2 (q̇ + q̇') with T = 0.5."""

    predicted_dims = [1]

    def complete(self, states, predicted):
        return torch.cat((states[:, :1] + 0.25 * (states[:, 1:] + predicted), predicted), 1)

    def predict(self, states, controls):
        return super().predict(states[:, 1:], controls)


@pytest.mark.parametrize("name", ["rp", "lr", "tp", "tpx", "tpg"])
def test_the_gradient_of_an_integrated_position_equals_the_closed_form(name):
    """J = Σ q_t² under a constant control, N = 20000, seed 0, within 4 standard errors.

    E q_t = q_0 + T (q̇_0 t + u t² / 2), and the variance does not depend on u, so that
    dJ/du = Σ_t 2 E[q_t] T t² / 2.
    """
    _, policy = walk(None, alive)
    policy = LinearPolicy(spaces.Box(-9, 9, (2,)), spaces.Box(-1, 1, (1,)))
    with torch.no_grad():
        policy.weights.zero_()
        policy.bias.fill_(0.18)
    start = torch.tensor([0.3, -0.2], dtype=F64)
    square = lambda x, controls: x[..., 0].square()  # noqa: E731
    model = ParticleModel(Pushed(), start, torch.zeros(2, dtype=F64), square)
    u = policy.act(torch.zeros(1, 2, dtype=F64))
    slope = float(torch.autograd.grad(u.sum(), policy.bias)[0])
    means = {t: 0.3 + 0.5 * (-0.2 * t + float(u.detach()) * t**2 / 2) for t in range(1, 5)}
    expected = slope * sum(2 * mean * 0.5 * t**2 / 2 for t, mean in means.items())
    noise = Noise.draw(4, 20000, 2, generator(0), resample=False)
    found = policy_gradient(model, policy, noise, estimators.make(name), per_sample=True)
    error = float(found.per_sample[:, 2].std() * 20000**0.5)
    assert 0 < error < 0.2 * abs(expected)
    assert abs(float(found.gradients[1]) - expected) < 4 * error


def test_several_starts_take_turns():
    """Particles 0, 2, 4 from the first mean, the others from the second; the loss is of all."""
    means = torch.tensor([[0.5, -0.5], [-1.0, 2.0]], dtype=F64)
    model, policy = make(cost=cost, start_mean=means)
    noise = draw()
    loss, costs, states = simulate(model, policy, noise, RP)
    torch.testing.assert_close(states[0], means.repeat(3, 1) + model.start_std * noise.start)
    for i in range(2):
        rows = slice(i, None, 2)
        alone = Noise(noise.start[rows], noise.model[:, rows], None)
        _, expected, _ = simulate(replace(model, start_mean=means[i]), policy, alone, RP)
        torch.testing.assert_close(costs[:, rows], expected)
    torch.testing.assert_close(loss.detach(), costs.sum(0).mean())


# Dropout


def kept_of(dropout, n=400, seed=3):
    return Noise.draw(
        HORIZON, n, STATES, generator(seed), resample=False, n_basis=5, dropout=dropout
    )


def test_dropout_leaves_out_basis_functions_and_keeps_their_expectation():
    """8000 draws: 0 with probability 0.25, else 4/3; a mean of 1 within 4 standard errors."""
    kept = kept_of(0.25).kept
    assert kept.shape == (HORIZON, 400, 5)
    assert set(kept.unique().tolist()) == {0.0, 1 / 0.75}
    assert abs(float(kept.mean()) - 1) < 4 * (1 / 3 / kept.numel()) ** 0.5
    correlation = torch.corrcoef(kept.transpose(0, 1).flatten(1).T)  # of steps and functions
    assert float(correlation.fill_diagonal_(0).abs().max()) < 4 * 400**-0.5


def test_without_dropout_the_noise_is_what_it_was():
    with_basis, plain = kept_of(0.0), draw(n=400)
    assert with_basis.kept is None and torch.equal(with_basis.model, plain.model)
    assert torch.equal(kept_of(0.5).model, plain.model)


@pytest.mark.parametrize("controls", [1, 2])
def test_a_rollout_with_dropout_is_that_of_the_policies_without_the_functions(controls):
    model, policy = make(controls, cost=cost)
    noise = kept_of(0.5, n=PARTICLES)
    loss, _, states = simulate(model, policy, noise, RP)
    total = 0.0
    for t in range(HORIZON):
        basis = policy.basis(policy.features(states[t]), policy.constants())[1]
        u = saturate((noise.kept[t] * basis) @ policy.weights.T)
        found = model.dynamics.predict(states[t], u)
        std = (found.variance + model.dynamics.noise**2).sqrt()
        torch.testing.assert_close(states[t + 1], found.mean + std * noise.model[t])
        total = total + model.cost(states[t + 1], u).mean()
    torch.testing.assert_close(loss, total)


@pytest.mark.parametrize("name", ["rp", "tp", "tps", "tpg"])
@pytest.mark.parametrize("controls", [1, 2])
def test_gradients_of_particles_know_the_dropout(controls, name):
    """What enters the tap, by the controller's Jacobian, is what reaches the parameters."""
    model, policy = make(controls, cost=cost)
    noise = kept_of(0.5, n=20)
    found = policy_gradient(model, policy, noise, estimators.make(name), per_sample=True)
    torch.testing.assert_close(found.per_sample.sum(0), flatten(found.gradients))


RP = estimators.make("rp")


@pytest.mark.parametrize("leg", ["score", "biw"])
@pytest.mark.parametrize("name", ["rp", "lr", "tpx", "tp", "tps"])
@pytest.mark.parametrize("controls", [1, 2])
def test_particles_that_ended_do_not_touch_the_others(name, controls, leg):
    """Whatever would have happened to them: not in costs, baselines, k or sample gradients."""
    model, policy = make(controls, cost=cost)
    noise = draw(n=30)
    first = simulate(model, policy, noise, RP)[2][1, :, 0]
    bound = float(first.sort().values[-8])
    model = replace(model, termination=lambda x: x[..., 0] >= bound)
    is_over = first >= bound
    assert is_over.sum() == 8
    other = noise.model.clone()
    other[1:, is_over] *= 1000
    estimator = estimators.make(name, legs=(getattr(estimators.legs, leg),))
    found = []
    for each in (noise, replace(noise, model=other)):
        meter = noise.start.new_zeros(HORIZON, STATES, requires_grad=True)
        found.append(
            policy_gradient(model, policy, each, estimator, per_sample=leg == "score", meter=meter)
        )
    assert torch.equal(found[0].loss, found[1].loss)
    assert torch.equal(flatten(found[0].gradients), flatten(found[1].gradients))
    assert torch.equal(found[0].k, found[1].k)
    if leg == "score":
        assert torch.equal(found[0].per_sample, found[1].per_sample)
        total = found[0].per_sample.sum(0)
        torch.testing.assert_close(total, flatten(found[0].gradients))


def test_too_few_particles_to_choose_k_from_are_no_trouble():
    """One of six is left after the first step."""
    model, policy = make(cost=cost)
    first = simulate(model, policy, draw(), RP)[2][1, :, 0]
    bound = float(first.sort().values[1])
    model = replace(model, termination=lambda x: x[..., 0] >= bound)
    for resample in (False, True):
        noise = draw(resample=resample)
        found = policy_gradient(model, policy, noise, estimators.make("tpx"), per_sample=True)
        assert torch.isfinite(flatten(found.gradients)).all()
        assert torch.isfinite(found.per_sample).all()


def test_too_few_particles_to_fit_k_on_the_others_are_no_trouble():
    """Four of six are left, where each half needs three: all is RP from then on."""
    model, policy = make(cost=cost)
    noise = draw(resample=False)
    first = simulate(model, policy, noise, RP)[2][1, :, 0]
    bound = float(first.sort().values[4])
    model = replace(model, termination=lambda x: x[..., 0] >= bound)
    meter = noise.start.new_zeros(HORIZON, STATES, requires_grad=True)
    estimator = estimators.make("tpx", cross_fit=True)
    found = policy_gradient(model, policy, noise, estimator, meter=meter)
    assert torch.isfinite(flatten(found.gradients)).all()
    assert (found.k[1:] == 0).all() and (found.k[0] != 0).any()


def test_an_episode_that_never_ends_is_simulated_as_before():
    model, policy = make(cost=cost)
    never = replace(model, termination=lambda x: x[..., 0] > 1e9, termination_cost=5.0)
    results = [policy_gradient(m, policy, draw(), estimators.make("tpx")) for m in (model, never)]
    assert torch.equal(results[0].loss, results[1].loss)
    assert torch.equal(*(flatten(r.gradients) for r in results))
