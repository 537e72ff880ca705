"""Held action noise: durations, episodes, checkpoints, and what the agent makes of it."""

import numpy as np
import pytest
import torch

from tests.agents.dreamer.test_agent import make, stored
from totalprop.agents.dreamer.exploration import LONGEST, HeldNoise

NEVER = np.zeros(1, bool)


def durations(exponent, decisions, starts=NEVER):
    """How long each noise of one environment was held."""
    held, rng = HeldNoise(), np.random.default_rng(0)
    seen = [
        held(torch.full((1, 1), float(t)), starts, exponent, rng).item() for t in range(decisions)
    ]
    return np.diff(np.flatnonzero(np.diff(seen)) + 1)


def test_durations_have_a_truncated_zeta_distribution():
    """40,000 decisions: the share of each of 1 to 4 within 4 SE; none above the longest."""
    found = durations(2.0, 40_000)
    weights = 1.0 / np.arange(1, LONGEST + 1) ** 2
    expected = weights / weights.sum()
    for d in range(1, 5):
        share, p = np.mean(found == d), expected[d - 1]
        assert abs(share - p) < 4 * np.sqrt(p * (1 - p) / len(found))
    assert found.max() <= LONGEST and (found > 20).any()


def test_exponent_0_holds_nothing_and_draws_nothing():
    held, rng = HeldNoise(), np.random.default_rng(0)
    before = rng.bit_generator.state
    for t in range(5):
        fresh = torch.full((3, 2), float(t))
        assert held(fresh, np.zeros(3, bool), 0.0, rng) is fresh
    assert rng.bit_generator.state == before


def test_environments_are_held_apart_and_episodes_begin_anew():
    held, rng = HeldNoise(), np.random.default_rng(1)
    starts = np.zeros(2, bool)
    kept = [held(torch.full((2, 1), float(t)), starts, 0.01, rng).flatten() for t in range(60)]
    changes = torch.stack(kept).diff(dim=0) != 0
    assert 0 < changes[:, 0].sum() < 30 and not torch.equal(changes[:, 0], changes[:, 1])
    starts[1] = True  # an episode of the second one begins at every decision
    for t in range(60, 90):
        found = held(torch.full((2, 1), float(t)), starts, 0.01, rng)
        assert found[1] == t


def test_a_loaded_state_goes_on_as_the_saved_one():
    one, rng = HeldNoise(), np.random.default_rng(2)
    starts = np.zeros(4, bool)
    for t in range(7):
        one(torch.full((4, 1), float(t)), starts, 1.5, rng)
    other, same_rng = HeldNoise(), np.random.default_rng()
    other.load_state_dict(one.state_dict(), torch.device("cpu"))
    same_rng.bit_generator.state = rng.bit_generator.state
    for t in range(7, 40):
        fresh = torch.full((4, 1), float(t))
        assert torch.equal(one(fresh, starts, 1.5, rng), other(fresh, starts, 1.5, same_rng))


def test_held_random_actions_are_at_the_bounds():
    """Both of them, each coordinate by itself; without holding they are uniform."""
    agents = (make(learning_starts=200, hold_exponent=e, seed=0).learn(150) for e in (1.5, 0.0))
    held, uniform = (stored(agent).action[1:] for agent in agents)
    at_bounds = np.abs(held) == 1
    starts = (held == 0).all(1)  # the entry that an episode begins with has no action
    assert at_bounds[~starts].all() and {-1.0, 1.0} <= set(held.flat)
    assert (np.abs(uniform[~(uniform == 0).all(1)]) < 1).all()


@pytest.mark.parametrize("learning_starts", [1, 200])
def test_the_agent_holds_random_actions_and_the_policys_noise(learning_starts):
    """Of the changes from decision to decision, held noise makes most small."""

    def share_of_small_changes(exponent):
        agent = make(
            learning_starts=learning_starts, train_freq=1000, hold_exponent=exponent,
            exploration_noise=0.0, seed=0,
        )  # fmt: skip
        changes = np.diff(stored(agent.learn(150)).action[1:], axis=0)
        return np.mean(np.abs(changes).max(1) < 0.05)

    assert share_of_small_changes(0.0) < 0.2
    assert share_of_small_changes(1.1) > 0.4
