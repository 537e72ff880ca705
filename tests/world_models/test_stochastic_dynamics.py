"""`StochasticDynamics`, `Reward` and `StateScale`: a linear system with noise of known size."""

import numpy as np
import pytest
import torch
from torch import nn

from totalprop.world_models.stochastic_dynamics import (
    MIN_STD,
    ParallelLinear,
    Reward,
    RunningMoments,
    StateScale,
    StochasticDynamics,
)

A = np.array([[0.9, 0.2], [-0.1, 0.8]])
B = np.array([[0.0], [0.5]])
NOISE = np.array([0.3, 0.02])


def linear_data(n: int, seed: int) -> list[torch.Tensor]:
    """States [n, 2], actions [n, 1], rewards [n] and next states [n, 2] of a linear system."""
    rng = np.random.default_rng(seed)
    states, actions = rng.normal(size=(n, 2)), rng.uniform(-1, 1, (n, 1))
    after = states @ A.T + actions @ B.T + NOISE * rng.normal(size=(n, 2))
    rewards = 100 + 5 * (states[:, 0] * actions[:, 0] - states[:, 1])
    return [torch.as_tensor(x).float() for x in (states, actions, rewards, after)]


@pytest.fixture(scope="module")
def fitted() -> tuple[StochasticDynamics, Reward]:
    torch.manual_seed(0)
    model, reward = StochasticDynamics(2, 1), Reward(2, 1, hidden=(32, 32))
    states, actions, rewards, after = linear_data(2000, seed=0)
    model.see((after - states).numpy(), StateScale(2))
    reward.see(rewards.numpy())
    optimizer = torch.optim.Adam([*model.parameters(), *reward.parameters()], 1e-2)
    rng = np.random.default_rng(0)
    for _ in range(500):
        rows = torch.as_tensor(rng.integers(0, 2000, 128))
        s, a = states[rows], actions[rows]
        loss = model.loss(s, a, after[rows]) + reward.loss(s, a, rewards[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, reward


def test_learns_mean_and_noise_of_each_dimension(fitted):
    states, actions, _, _ = linear_data(1000, seed=1)
    with torch.no_grad():
        mean, std = fitted[0](states, actions)
    true = states @ torch.as_tensor(A).float().T + actions @ torch.as_tensor(B).float().T
    error = (mean - true).square().mean(0).sqrt()
    assert (error < torch.tensor([0.1, 0.05])).all(), error  # of states with deviation 1
    assert std.shape == mean.shape and (std == std[0]).all()
    np.testing.assert_allclose(std[0], NOISE, rtol=0.5)
    assert std[0, 0] == pytest.approx(NOISE[0], rel=0.1)


def test_learns_the_reward_in_the_environments_units(fitted):
    states, actions, rewards, _ = linear_data(1000, seed=1)
    with torch.no_grad():
        error = (fitted[1](states, actions) - rewards).square().mean().sqrt()
    assert error < 0.15 * rewards.std()


def test_the_likelihood_is_that_of_a_normal_distribution():
    torch.manual_seed(0)
    model = StochasticDynamics(3, 2)
    model.see(np.random.default_rng(0).normal(0.5, [1.0, 2.0, 0.1], (50, 3)), StateScale(3))
    states, actions, after = torch.randn(7, 3), torch.randn(7, 2), torch.randn(7, 3)
    mean, std = model(states, actions)
    expected = -torch.distributions.Normal(mean, std).log_prob(after).mean().detach()
    constant = 0.5 * np.log(2 * np.pi) + float(model.change_std.log().mean())
    found = float(model.loss(states, actions, after).detach()) + constant
    assert found == pytest.approx(float(expected))


def test_sub_networks_are_those_of_separate_perceptrons():
    torch.manual_seed(0)
    model = StochasticDynamics(3, 2, hidden=(5, 4))
    states, actions = torch.randn(6, 3), torch.randn(6, 2)
    mean, _ = model(states, actions)
    x = torch.cat((states, actions), -1)
    for i in range(3):
        parts: list[nn.Module] = []
        for layer in model.layers:
            one = nn.Linear(layer.weight.shape[2], layer.weight.shape[1])
            one.load_state_dict({"weight": layer.weight[i], "bias": layer.bias[i]})
            parts += [one, nn.Tanh()]
        alone = nn.Sequential(*parts[:-1])(x).squeeze(-1)
        torch.testing.assert_close(mean[:, i], states[:, i] + alone)
    mean[:, 1].sum().backward()
    for layer in model.layers:  # the others do not take part
        assert (layer.weight.grad[[0, 2]] == 0).all() and (layer.weight.grad[1] != 0).any()


@pytest.mark.parametrize("shape", [(), (5,), (2, 5)])
def test_any_leading_shape(shape):
    model, reward = StochasticDynamics(3, 2, hidden=(4,)), Reward(3, 2, hidden=(4,))
    states, actions = torch.randn(*shape, 3), torch.randn(*shape, 2)
    mean, std = model(states, actions)
    assert mean.shape == std.shape == (*shape, 3)
    assert reward(states, actions).shape == shape


def test_one_hidden_unit_and_one_dimension_are_not_taken_for_a_shared_input():
    layer = ParallelLinear(1, 3, 2)
    x = torch.randn(4, 1, 3)
    torch.testing.assert_close(layer(x), x @ layer.weight[0].T + layer.bias)


def test_std_has_a_floor():
    model = StochasticDynamics(2, 1)
    with torch.no_grad():
        model.log_std.fill_(-100.0)
    _, std = model(torch.zeros(2), torch.zeros(1))
    torch.testing.assert_close(std, torch.full((2,), MIN_STD))


@pytest.mark.parametrize("parts", [(100,), (1, 99), (30, 0, 45, 25)])
def test_moments_do_not_depend_on_how_the_values_came(parts):
    values = np.random.default_rng(0).normal([3.0, -50.0], [2.0, 0.1], (100, 2))
    moments, seen = RunningMoments(2), 0
    for n in parts:
        moments.update(values[seen : seen + n])
        seen += n
    np.testing.assert_allclose(moments.mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.std, values.std(0), rtol=1e-10)


def test_rounding_makes_no_spread_of_a_constant():
    moments = RunningMoments(1)
    moments.update(np.full((10, 1), 0.1) * (1 + 1e-12 * np.arange(10)[:, None]))
    assert moments.std == 1


def test_a_clock_is_constant_in_spite_of_rounding():
    """Its change always is; what float64 makes of it is no spread in the units of the states."""
    scale, model = StateScale(1), StochasticDynamics(1, 1)
    clock = (0.1 * np.arange(1000) * 2.0**-20)[:, None]
    scale.update(clock)
    model.see(np.diff(clock, axis=0), scale)
    assert model.change_std == 1 and np.diff(clock, axis=0).std() > 0


def test_scale_of_changes_is_in_units_of_the_states():
    rng, scale, model = np.random.default_rng(0), StateScale(2), StochasticDynamics(2, 1)
    states, changes = rng.normal([5.0, 1.0], [4.0, 0.1], (50, 2)), rng.normal(1, 0.3, (50, 2))
    changes[:, 1] = 0.5  # always
    scale.update(states)
    model.see(changes, scale)
    expected = changes.std(0)[0] / states.std(0)[0]
    torch.testing.assert_close(model.change_std, torch.tensor([expected, 1.0]).float())
    expected = changes.mean(0) / states.std(0)
    torch.testing.assert_close(model.change_mean, torch.as_tensor(expected).float())


def test_state_scale_keeps_the_digits_of_states_around_a_large_number():
    rng, scale, expected = np.random.default_rng(0), StateScale(3), StateScale(3)
    states = np.round(rng.normal(size=(100, 3)) * 2**10) / 2**10
    states[:, 2] = 5.0  # constant
    for part in np.split(states, 4):
        expected.update(part)
        scale.update(2.0**30 + 4 * part)
    found = scale(torch.as_tensor(2.0**30 + 4 * states))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected(torch.as_tensor(states)))
    torch.testing.assert_close(found.mean(0), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.std(0, correction=0), torch.tensor([1.0, 1.0, 0.0]))
    assert scale.std[2] == 1


def test_state_scale_has_an_inverse():
    scale = StateScale(2)
    states = np.random.default_rng(0).normal([3.0, -50.0], [2.0, 0.1], (100, 2))
    scale.update(states)
    found = scale.inverse(scale(torch.as_tensor(states)))
    torch.testing.assert_close(found, torch.as_tensor(states), rtol=1e-6, atol=1e-6)


def test_states_without_a_scale_are_zero():
    assert (StateScale(2)(torch.full((3, 2), 7.0)) == 0).all()


@pytest.mark.parametrize(("a", "b"), [(5, 3), (3, 5), (4, 4), (3, 1)])
def test_weights_of_parallel_layers_are_orthogonal_and_differ(a, b):
    weight = ParallelLinear(6, a, b).weight.detach()
    assert weight.shape == (6, b, a)
    product = weight @ weight.mT if b <= a else weight.mT @ weight
    torch.testing.assert_close(product, torch.eye(min(a, b)).expand(6, -1, -1), atol=1e-5, rtol=0)
    assert (weight[0] != weight[1]).any()
