"""The prediction of PILCO, stage by stage and as a whole, against samples and derivatives.

Monte Carlo as in tests/world_models/test_moment_matching.py: 100,000 samples, 4 standard errors.
"""

from dataclasses import replace

import pytest
import torch
from gymnasium import spaces
from torch.autograd import gradcheck
from torch.func import functional_call

from tests.world_models.test_moment_matching import assert_means, assert_moments, gaussian, sample
from totalprop.agents.pilco.propagation import (
    MomentModel,
    minus_reward,
    predict,
    propagate,
    saturating,
)
from totalprop.agents.trials.controllers import LinearPolicy, RBFPolicy, saturate
from totalprop.agents.trials.saturating_cost import SaturatingCost
from totalprop.world_models import moment_matching
from totalprop.world_models.gp_dynamics import GPDynamics, join_trig_features
from totalprop.world_models.moment_matching import Gaussian, join, kernel_sum

F64 = torch.float64
STATES = 3
POLICIES = [RBFPolicy, LinearPolicy]


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def make(policy_class=RBFPolicy, controls=2, angle_dims=(1,), n_centres=5, **changes):
    """Fixed hyper-parameters on 15 random points, and a small controller with large weights."""
    dynamics = GPDynamics(STATES, controls, angle_dims=angle_dims, **changes)
    for gp, seed in ((dynamics.gp, 0), (dynamics.reward_gp, 5)):
        inputs, outputs = gp.inputs.shape[1], gp.targets.shape[1]
        gp.set_data(randn(15, inputs, seed=seed), 0.5 * randn(15, outputs, seed=seed + 1))
        gp.log_lengthscale.copy_(0.4 + 0.2 * randn(outputs, inputs, seed=seed + 2))
        gp.log_signal.copy_(-0.5 + 0.2 * randn(outputs, seed=seed + 3))
        gp.log_noise.copy_(-1.8 + 0.2 * randn(outputs, seed=seed + 4))
    torch.manual_seed(0)
    kwargs = {"n_centres": n_centres} if policy_class is RBFPolicy else {}
    space = spaces.Box(-10, 10, (STATES,))
    policy = policy_class(space, spaces.Box(-1, 1, (controls,)), angle_dims=angle_dims, **kwargs)
    with torch.no_grad():
        for i, parameter in enumerate(policy.parameters()):
            parameter.add_(0.5 * randn(*parameter.shape, seed=20 + i))
    return dynamics, policy


def closed_loop(dynamics, policy, x):
    """Posterior of the next state at states [N, S] under the policy: mean and variance."""
    found = dynamics.predict(x, policy.act(x))
    return found.mean, found.variance


# One step


@pytest.mark.parametrize("angle_dims", [(), (1,), (0, 2)])
@pytest.mark.parametrize("policy_class", POLICIES)
def test_the_controllers_moments(policy_class, angle_dims):
    _, policy = make(policy_class, angle_dims=angle_dims)
    x = gaussian(STATES + len(angle_dims), 0.6, seed=2)
    with torch.no_grad():
        assert_moments(x, policy.match(x), policy.preactivation)


@pytest.mark.parametrize("policy_class", POLICIES)
def test_every_stage_of_a_step_and_the_step(policy_class):
    """State -> sines -> controller -> saturation -> GP -> next state.

    The method makes what enters a stage Gaussian; sampled as such, with all that came before, each
    stage must give the moments of its samples, input-output covariances included.
    """
    dynamics, policy = make(policy_class)
    x, a = gaussian(STATES, 0.5, seed=3), policy.n_controls
    joint, features = join_trig_features(x, STATES, (1,))
    points = sample(x)
    check(joint, torch.cat((points, points[:, 1:2].sin(), points[:, 1:2].cos()), -1))
    with torch.no_grad():
        points = sample(joint)
        joint = join(joint, features, policy.match(joint.marginal(features)))
        check(joint, torch.cat((points, policy.preactivation(points[:, features])), -1))
        before = [5, 6]
        points = sample(joint)
        joint = join(joint, before, moment_matching.saturate(joint.marginal(before)))
        check(joint, torch.cat((points, saturate(points[:, before])), -1))
        points = sample(joint)
        posterior = dynamics.gp.posterior(points[:, [*features, 7, 8]])
        std = (posterior.variance + dynamics.noise.square()).sqrt()
        delta = posterior.mean + std * randn(*std.shape, seed=30)
        arrived = torch.cat((points[:, :STATES] + delta, points[:, 7:]), -1)
        found = propagate(dynamics, policy, x, process_noise=True)
    assert found.mean.shape == (STATES + a,)
    check(found, arrived)
    assert torch.equal(found.covariance, found.covariance.T)


def check(found, samples):
    centred = samples - found.mean
    assert_means(samples, found.mean, "mean")
    assert_means(centred.unsqueeze(2) * centred.unsqueeze(1), found.covariance, "covariance")


@pytest.mark.parametrize("invariant_dims", [(), (2,), (0, 1)])
@pytest.mark.parametrize("angle_dims", [(), (1,), (0, 2)])
@pytest.mark.parametrize("controls", [1, 2])
@pytest.mark.parametrize("policy_class", POLICIES)
def test_a_narrow_state_moves_as_the_closed_loop_does(
    policy_class, controls, angle_dims, invariant_dims
):
    """S' = J S Jᵀ + σ_f² + σ_n² with J = d(x + m(x, π(x)))/dx, whatever the stages between."""
    dynamics, policy = make(policy_class, controls, angle_dims, invariant_dims=invariant_dims)
    x = gaussian(STATES, 1e-4)
    found = propagate(dynamics, policy, x, process_noise=False).marginal(range(STATES))
    step = lambda m: closed_loop(dynamics, policy, m[None])[0][0]  # noqa: E731
    variance = closed_loop(dynamics, policy, x.mean[None])[1][0]
    torch.testing.assert_close(found.mean, step(x.mean), rtol=0, atol=1e-6)
    jacobian = torch.autograd.functional.jacobian(step, x.mean)
    still = Gaussian(x.mean, torch.zeros_like(x.covariance))
    alone = propagate(dynamics, policy, still, process_noise=False)
    torch.testing.assert_close(alone.covariance[:STATES, :STATES], variance.diag())
    moved = found.covariance - alone.covariance[:STATES, :STATES]
    expected = jacobian @ x.covariance @ jacobian.T
    mixed = ~torch.eye(STATES, dtype=torch.bool)  # the variance also varies with x
    torch.testing.assert_close(moved[mixed], expected[mixed], rtol=1e-4, atol=1e-13)


def test_process_noise_is_added_to_the_next_state_alone():
    dynamics, policy = make()
    x = gaussian(STATES)
    with_noise, without = (
        propagate(dynamics, policy, x, process_noise=noise).covariance for noise in (True, False)
    )
    noise = torch.cat((dynamics.noise.square(), torch.zeros(2, dtype=F64)))
    torch.testing.assert_close(with_noise - without, noise.diag())


@pytest.mark.parametrize("process_noise", [False, True])
def test_a_step_with_integrated_positions_has_the_moments_of_its_samples(process_noise):
    dynamics, policy = make(n_centres=3, integrated_dims=((0, 2),), time_step=0.3)
    x = gaussian(STATES, 1e-6, seed=3)  # so narrow that all is linear
    found = propagate(dynamics, policy, x, process_noise=process_noise)
    points = sample(x)
    with torch.no_grad():
        controls = policy.act(points)
        predicted = dynamics.predict(points, controls)
        variance = predicted.variance + process_noise * dynamics.noise.square()
        rates = predicted.mean + variance.sqrt() * randn(*variance.shape, seed=30)
    q = points[:, 0] + 0.15 * (points[:, 2] + rates[:, 1])
    check(found, torch.cat((q[:, None], rates, controls), 1))


# The whole prediction

COST = SaturatingCost([0.2, 0.0, -0.1, 0.5, 0.5], [1.0, 0.0, 0.5, 2.0, 2.0], angles=[[0, 1, 0]])


def model_of(dynamics, **changes):
    start = gaussian(STATES, 0.3, seed=8)
    return replace(MomentModel(dynamics, start, saturating(COST)), **changes)


def test_the_loss_is_the_sum_of_the_steps_costs():
    dynamics, policy = make()
    model, x, total = model_of(dynamics), None, 0.0
    found = predict(model, policy, 4)
    x = model.start
    for t in range(4):
        torch.testing.assert_close(found.means[t], x.mean.detach())
        torch.testing.assert_close(found.covariances[t], x.covariance.detach())
        x = propagate(dynamics, policy, x, process_noise=True).marginal(range(STATES))
        cost = COST.moments(x)[0]
        torch.testing.assert_close(found.costs[t], cost.detach())
        total += cost
    torch.testing.assert_close(found.loss, total)
    assert found.means.shape == (5, STATES) and 0 < float(found.loss.detach()) < 4


def test_a_bolder_policy_search_counts_the_deviation_of_the_cost():
    dynamics, policy = make()
    model = model_of(dynamics)
    plain = predict(model, policy, 3)
    bold = predict(replace(model, exploration=-0.5), policy, 3)
    arrivals = [Gaussian(m, s) for m, s in zip(plain.means[1:], plain.covariances[1:])]
    deviations = sum(COST.moments(x)[1].sqrt() for x in arrivals)
    torch.testing.assert_close(bold.loss, plain.loss - 0.5 * deviations)
    torch.testing.assert_close(bold.costs, plain.costs)


def test_several_starts_are_the_mean_of_each():
    dynamics, policy = make()
    model, other = model_of(dynamics, exploration=0.2), gaussian(STATES, 0.2, seed=9)
    both = Gaussian(*(torch.stack(parts) for parts in zip(model.start, other)))
    first, second, found = (
        predict(replace(model, start=start), policy, 3) for start in (model.start, other, both)
    )
    torch.testing.assert_close(found.loss, (first.loss + second.loss) / 2)
    torch.testing.assert_close(found.costs, torch.stack((first.costs, second.costs), 1))
    torch.testing.assert_close(found.means, torch.stack((first.means, second.means), 1))


def test_an_unknown_cost_is_minus_the_reward_of_next_state_and_control():
    dynamics, _ = make()
    arrival = gaussian(STATES + 2, 0.5, seed=4)
    joint, features = join_trig_features(arrival, STATES, (1,))
    points = sample(joint)[:, [*features, 3, 4]]
    posterior = dynamics.reward_gp.posterior(points)
    mean, variance = minus_reward(dynamics)(arrival)
    assert_means(-posterior.mean[:, 0], mean, "mean")
    square = (posterior.mean[:, 0] + mean).square() + posterior.variance[:, 0]
    assert_means(square, variance, "variance")


@pytest.mark.parametrize("cost", ["saturating", "reward"])
@pytest.mark.parametrize("policy_class", POLICIES)
def test_the_gradient_equals_finite_differences(policy_class, cost):
    """Of every parameter, through two steps with an angle and two controls."""
    dynamics, policy = make(policy_class, n_centres=3)
    kind = minus_reward(dynamics) if cost == "reward" else saturating(COST)
    model = model_of(dynamics, cost=kind, exploration=0.3)
    names = [name for name, _ in policy.named_parameters()]

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.policy = policy

        def forward(self):
            return predict(model, self.policy, 2).loss

    module = Loss()

    def loss(*values):
        named = {f"policy.{name}": value for name, value in zip(names, values, strict=True)}
        return functional_call(module, named, ())

    values = [p.detach().clone().requires_grad_() for p in policy.parameters()]
    assert gradcheck(loss, values, atol=1e-6)


def test_a_batch_of_states_takes_a_step_together():
    dynamics, policy = make()
    members = [gaussian(STATES, width, seed=i) for i, width in enumerate((0.1, 0.5, 1.0))]
    batch = Gaussian(*(torch.stack(parts) for parts in zip(*members)))
    together = propagate(dynamics, policy, batch, process_noise=True)
    for i, member in enumerate(members):
        alone = propagate(dynamics, policy, member, process_noise=True)
        torch.testing.assert_close(together.mean[i], alone.mean)
        torch.testing.assert_close(together.covariance[i], alone.covariance)


def test_a_model_that_knows_nothing_predicts_finite_costs_and_gradients():
    dynamics, policy = make()
    dynamics.gp.log_signal.fill_(5.0)
    found = predict(model_of(dynamics), policy, 10)
    gradient = torch.autograd.grad(found.loss, list(policy.parameters()))
    assert all(torch.isfinite(g).all() for g in gradient) and found.loss > 8
    assert kernel_sum(gaussian(6, 1e4), dynamics.gp.kernel_sum()).covariance.isfinite().all()
