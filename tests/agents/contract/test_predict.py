"""`predict`: shapes, types and bounds, alone and in batches, and that it draws nothing."""

import contextlib
import random

import numpy as np
import pytest
import torch
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from tests.agents.contract.environments import CountingEnv, vector


@pytest.mark.parametrize("deterministic", [True, False])
def test_actions_of_one_observation_and_of_many(make, observations, deterministic):
    agent = make()
    single, _ = agent.predict(observations[0], deterministic=deterministic)
    batch, _ = agent.predict(observations, deterministic=deterministic)
    assert single.shape == (2,) and batch.shape == (20, 2)
    assert single.dtype == batch.dtype == agent.action_space.dtype
    for action in (single, *batch):
        assert agent.action_space.contains(action)


def test_deterministic_actions_are_the_same_each_time_and_in_a_batch(trained, observations):
    batch, _ = trained.predict(observations, deterministic=True)
    np.testing.assert_array_equal(trained.predict(observations, deterministic=True)[0], batch)
    for observation, action in zip(observations, batch, strict=True):
        single, _ = trained.predict(observation, deterministic=True)
        np.testing.assert_allclose(single, action, rtol=1e-5, atol=1e-6)
    assert len(np.unique(batch[:, 0])) > 1  # it looks at what it sees


def test_deterministic_prediction_draws_nothing(trained, observations):
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    expected = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    own = {k: v.get_state() for k, v in vars(trained).items() if isinstance(v, torch.Generator)}
    trained.predict(observations, deterministic=True)
    assert torch.equal(torch.get_rng_state(), expected[0])
    assert np.random.get_state()[1].tolist() == expected[1] and random.getstate() == expected[2]
    for name, state in own.items():
        assert torch.equal(getattr(trained, name).get_state(), state), name


def test_the_state_of_one_step_is_taken_by_the_next(trained, observations):
    """Agents without a memory return None; ones with it forget at an episode's start."""
    starts, state = np.ones(3, dtype=bool), None
    for step in range(3):
        seen = observations[3 * step : 3 * step + 3]
        action, state = trained.predict(seen, state, starts, deterministic=True)
        assert action.shape == (3, *trained.action_space.shape)
        starts = np.zeros(3, dtype=bool)
    again, _ = trained.predict(seen, state, np.ones(3, dtype=bool), deterministic=True)
    new, _ = trained.predict(seen, deterministic=True)
    np.testing.assert_array_equal(again, new)
    assert state is None or isinstance(state, tuple)


def test_prediction_needs_no_gradient_and_changes_nothing(trained, observations):
    copy = observations.copy()
    trained.predict(observations)
    np.testing.assert_array_equal(observations, copy)
    assert all(p.grad is None or not p.grad.requires_grad for p in trained.policy.parameters())
    assert trained.num_timesteps == 28


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 2, 4)])
def test_observations_of_another_shape_are_refused(trained, shape):
    with pytest.raises(ValueError, match="shape"):
        trained.predict(np.zeros(shape, np.float32))


def test_evaluate_policy_on_any_number_of_environments(trained):
    found = evaluate_policy(trained, vector(7, 4, 5), 6, return_episode_rewards=True)
    expected = [(4, -10.0)] * 2 + [(5, -15.0)] * 2 + [(7, -28.0)] * 2
    assert sorted(zip(found[1], found[0], strict=True)) == expected
    assert evaluate_policy(trained, Monitor(CountingEnv()), 2) == (-28.0, 0.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_observation_that_is_not_finite_is_one_sentence(make, observations, bad):
    agent, broken = make(), observations.copy()
    broken[3, 1] = bad
    with pytest.raises(ValueError, match=r"predict got 1 non-finite number\(s\)") as error:
        agent.predict(broken)
    assert "\n" not in str(error.value)
    agent.check_observations = False  # saves the look at every entry
    with contextlib.suppress(ValueError):  # of a distribution, where there is one
        agent.predict(broken, deterministic=True)


def test_what_gymnasiums_reset_returns_is_refused(make):
    """With stable-baselines3's words, which its users search for."""
    with pytest.raises(ValueError, match="mixing Gym API"):
        make().predict(CountingEnv().reset())
