"""The model of states and controls against closed forms and the processes it wraps."""

import math
import warnings

import pytest
import torch

from totalprop.world_models.gp_dynamics import GPDynamics, trig_features

F64 = torch.float64
S, A, ANGLES = 3, 2, (1,)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def steps(n, seed=0):
    """Random states, controls, next states and rewards."""
    shapes = ((n, S), (n, A), (n, S), (n,))
    return [randn(*shape, seed=10 * seed + i) for i, shape in enumerate(shapes)]


def make(n=12):
    """A model with data, whose two processes differ in their hyper-parameters."""
    model = GPDynamics(S, A, angle_dims=ANGLES)
    model.add(*steps(n))
    model.gp.log_signal.copy_(torch.tensor([0.5, 1.0, 2.0], dtype=F64).log())
    model.gp.log_noise.copy_(torch.tensor([0.1, 0.2, 0.3], dtype=F64).log())
    model.reward_gp.log_lengthscale.fill_(0.5)
    return model


def test_trig_features_replace_the_angle():
    x = randn(3, 4)
    found = trig_features(x, (1,))
    expected = torch.stack((x[:, 0], x[:, 2], x[:, 3], x[:, 1].sin(), x[:, 1].cos()), -1)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert trig_features(x, ()) is x
    assert trig_features(x[None], (0, 1)).shape == (1, 3, 6)


def test_encode_in_numbers():
    state = torch.tensor([1.0, math.pi / 6, 3.0], dtype=F64)
    control = torch.tensor([-0.5, 0.25], dtype=F64)
    found = GPDynamics(S, A, angle_dims=ANGLES).encode(state, control)
    expected = torch.tensor([1.0, 3.0, 0.5, math.sqrt(3) / 2, -0.5, 0.25], dtype=F64)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(GPDynamics(S, A).encode(state, control), torch.cat((state, control)))


def test_gradients_flow_through_the_encoding():
    """d (sin θ, cos θ) / dθ = (cos θ, -sin θ); the other entries pass theirs on."""
    states, controls = randn(4, S).requires_grad_(), randn(4, A).requires_grad_()
    weights = torch.arange(1.0, 7.0, dtype=F64)
    (GPDynamics(S, A, angle_dims=ANGLES).encode(states, controls) @ weights).sum().backward()
    angle = states[:, 1].detach()
    by_angle = 3 * angle.cos() - 4 * angle.sin()
    one = torch.ones_like(angle)
    torch.testing.assert_close(states.grad, torch.stack((one, by_angle, 2 * one), -1))
    torch.testing.assert_close(controls.grad, torch.stack((5 * one, 6 * one), -1))


def test_added_steps_stand_in_their_order():
    """Dynamics: from where a step began. Reward: of where it arrived, with the same control."""
    model, first, second = GPDynamics(S, A, angle_dims=ANGLES), steps(4), steps(3, seed=1)
    model.add(*first)
    model.add(*second)
    x, u, x_next, r = (torch.cat(parts) for parts in zip(first, second, strict=True))
    assert torch.equal(model.gp.inputs, torch.cat((trig_features(x, ANGLES), u), -1))
    assert torch.equal(model.gp.targets, x_next - x)
    assert torch.equal(model.reward_gp.inputs, torch.cat((trig_features(x_next, ANGLES), u), -1))
    assert torch.equal(model.reward_gp.targets, r[:, None])
    assert torch.equal(model.features, trig_features(x, ANGLES))
    assert model.n_points == 7


def test_keep_bounds_the_data_of_both_processes():
    model, first, second = GPDynamics(S, A), steps(4), steps(3, seed=1)
    model.add(*first, keep=5)
    model.add(*second, keep=5)
    assert model.n_points == len(model.reward_gp.inputs) == 5
    assert torch.equal(model.features, torch.cat((first[0][2:], second[0])))
    assert torch.equal(model.reward_gp.targets[:, 0], torch.cat((first[3][2:], second[3])))


@pytest.mark.parametrize(
    ("invariant", "seen"),
    [((0,), [1, 2, 3, 4, 5]), ((1,), [0, 1, 4, 5]), ((2, 0), [2, 3, 4, 5])],  # of x0, x2, sin, cos
)
def test_dynamics_do_not_see_what_no_change_depends_on(invariant, seen):
    model = GPDynamics(S, A, angle_dims=ANGLES, invariant_dims=invariant)
    states, controls, next_states, rewards = steps(6)
    model.add(states, controls, next_states, rewards)
    assert torch.equal(model.gp.inputs, model.encode(states, controls)[:, seen])
    assert torch.equal(model.gp.targets, next_states - states)  # all entries are predicted
    assert torch.equal(model.reward_gp.inputs, model.encode(next_states, controls))
    assert torch.equal(model.features, trig_features(next_states, ANGLES))

    model.gp.log_noise.fill_(-2)
    states, controls, *_ = steps(5, seed=2)
    before = model.predict(states, controls)
    states[:, invariant] += 3
    after = model.predict(states, controls)
    assert torch.equal(after.variance, before.variance)
    torch.testing.assert_close(after.mean - states, before.mean - steps(5, seed=2)[0])
    assert after.mean_jacobian.shape == (5, S, A)
    assert not torch.equal(model.reward(states, controls), model.reward(*steps(5, seed=2)[:2]))


# x = (q, other, q̇), T = 0.2
INTEGRATED = {"integrated_dims": ((0, 2),), "time_step": 0.2}


def test_a_position_is_integrated_in_numbers():
    """q' = 1 + 0.2 · 3 + 0.1 · (4 - 3) = 1.7."""
    model = GPDynamics(S, A, **INTEGRATED)
    assert model.predicted_dims == [1, 2] and model.gp.targets.shape[1] == 2
    state = torch.tensor([[1.0, 5.0, 3.0]], dtype=F64)
    arrived = model.complete(state, torch.tensor([[6.0, 4.0]], dtype=F64))
    torch.testing.assert_close(arrived, torch.tensor([[1.7, 6.0, 4.0]], dtype=F64))
    plain = GPDynamics(S, A)
    assert plain.complete(state, arrived) is arrived and plain.predicted_dims == [0, 1, 2]


def test_with_integration_only_the_others_are_predicted_from_all():
    """The same data and hyper-parameters give the same posterior of q̇ and other."""
    model, plain = GPDynamics(S, A, **INTEGRATED), GPDynamics(S, A)
    for each in (model, plain):
        each.add(*steps(12))
        each.gp.log_noise.fill_(math.log(0.3))
    assert torch.equal(model.gp.inputs, plain.gp.inputs)
    assert torch.equal(model.gp.targets, plain.gp.targets[:, 1:])
    states, controls, *_ = steps(5, seed=2)
    found, expected = model.predict(states, controls), plain.predict(states, controls)
    for part, whole in zip(found, expected, strict=True):
        torch.testing.assert_close(part, whole[:, 1:])
    arrived = model.complete(states, found.mean)
    q = states[:, 0] + 0.1 * (states[:, 2] + found.mean[:, 1])
    torch.testing.assert_close(arrived, torch.cat((q[:, None], found.mean), 1))


def test_gradients_flow_through_the_integration():
    model = GPDynamics(S, A, **INTEGRATED)
    states, predicted = randn(4, S).requires_grad_(), randn(4, 2).requires_grad_()
    weights = torch.tensor([1.0, 10.0, 100.0], dtype=F64)
    (model.complete(states, predicted) @ weights).sum().backward()
    assert torch.allclose(states.grad, torch.tensor([1.0, 0.0, 0.1], dtype=F64))
    assert torch.allclose(predicted.grad, torch.tensor([10.0, 100.1], dtype=F64))


def test_prediction_is_the_posterior_of_the_difference_added_to_the_state():
    model, (states, controls, *_) = make(), steps(5, seed=2)
    found = model.predict(states, controls)
    inputs = torch.cat((trig_features(states, ANGLES), controls), -1)
    delta = model.gp.posterior(inputs)
    torch.testing.assert_close(found.mean, states + delta.mean, rtol=0, atol=0)
    torch.testing.assert_close(found.variance, delta.variance, rtol=0, atol=0)


def test_predicted_moments_pass_gradcheck():
    model = make()
    states, controls = randn(4, S, seed=5).requires_grad_(), randn(4, A, seed=6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, u: model.predict(x, u)[:2], (states, controls))


def test_jacobians_are_those_of_the_moments_by_the_controls():
    model, states = make(), randn(4, S, seed=5)
    controls = randn(4, A, seed=6).requires_grad_()
    found = model.predict(states, controls)
    for moment, jacobian in ((found.mean, found.mean_jacobian),
                             (found.variance, found.variance_jacobian)):  # fmt: skip
        assert jacobian.shape == (4, S, A) and not jacobian.requires_grad
        for d in range(S):
            (expected,) = torch.autograd.grad(moment[:, d].sum(), controls, retain_graph=True)
            torch.testing.assert_close(jacobian[:, d], expected)


def test_reward_is_the_posterior_mean_for_any_leading_axes():
    model = make()
    states, controls = randn(2, 5, S, seed=3).requires_grad_(), randn(2, 5, A, seed=4)
    found = model.reward(states, controls)
    inputs = torch.cat((trig_features(states, ANGLES), controls), -1).flatten(0, 1)
    expected = model.reward_gp.posterior(inputs).mean.reshape(2, 5)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(found.sum(), states)
    assert (gradient != 0).all()


def test_dynamics_and_reward_are_fitted_apart():
    model = GPDynamics(S, A)
    model.add(*steps(20))
    assert not model.is_fitted
    likelihoods = model.fit(max_evaluations=5)
    assert likelihoods.shape == (S,) and model.is_fitted and not model.reward_gp.is_fitted
    assert torch.equal(model.noise, model.gp.noise)
    assert model.fit_reward(max_evaluations=5).shape == (1,) and model.reward_gp.is_fitted


def test_steps_that_are_not_finite_are_refused():
    model, (states, *rest) = GPDynamics(S, A), steps(2)
    states[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        model.add(states, *rest)


def test_state_dict_of_a_model_with_more_data_loads():
    model, fresh = make(), GPDynamics(S, A, angle_dims=ANGLES)
    fresh.load_state_dict(model.state_dict())
    (states, controls, *_) = steps(5, seed=2)
    assert torch.equal(fresh.predict(states, controls).mean, model.predict(states, controls).mean)
    assert torch.equal(fresh.reward(states, controls), model.reward(states, controls))


@pytest.mark.parametrize("shift", [1.0, 1e6])
def test_an_offset_of_the_rewards_changes_nothing_else(shift):
    costs = []
    for offset in (0.0, shift):
        model = GPDynamics(S, A)
        states, controls, next_states, rewards = steps(20)
        model.add(states, controls, next_states, rewards + offset)
        model.fit_reward(max_evaluations=30)
        costs.append(model.reward(*steps(5, seed=1)[:2]) - offset)
    torch.testing.assert_close(costs[0], costs[1], rtol=0, atol=1e-6)


def test_an_outlier_is_named_once_with_its_value():
    model = GPDynamics(S, A, angle_dims=ANGLES)
    states, controls, next_states, rewards = steps(30)
    states[7, 2] = 1e6  # an input, and with it a difference
    rewards[3] = -1e6
    model.add(states, controls, next_states, rewards)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(max_evaluations=1)
        model.fit_reward(max_evaluations=1)
        model.fit(max_evaluations=1)
    messages = [str(w.message) for w in caught]
    assert len(messages) == 3
    for name, message in zip(
        ["observation 2 was 1e+06 once", "the change of observation 2 in a step was -999999 once",
         "the reward was -1e+06 once"], messages, strict=True,
    ):  # fmt: skip
        assert message.startswith(name) and "clip it" in message


def test_ordinary_data_have_no_outliers():
    model = make(60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.fit(max_evaluations=1)
        model.fit_reward(max_evaluations=1)
