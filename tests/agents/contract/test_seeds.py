"""A seed decides everything that is random, on one CPU."""

import numpy as np
import torch

from tests.agents.contract.probes import assert_same, assert_same_agents, parameters


def test_same_seed_same_bits_and_another_seed_others(make, trained):
    assert_same_agents(make().learn(28), trained)
    other = make(seed=1).learn(28)
    assert not torch.equal(parameters(other), parameters(trained))


def test_no_seed_differs(make):
    agents = first, second = [make(seed=None) for _ in range(2)]
    own = [
        {k: v.initial_seed() for k, v in vars(agent).items() if isinstance(v, torch.Generator)}
        for agent in agents
    ]
    assert all(seed != own[1][name] for name, seed in own[0].items())
    assert not torch.equal(parameters(first.learn(14)), parameters(second.learn(14)))


def test_set_random_seed_is_the_seed_of_everything(make):
    """Also of generators that an agent has for itself: it is as if it had been made with it."""
    agents = [make("Pendulum-v1", seed=seed) for seed in (1, 2)]
    agents[1].set_parameters(agents[0].get_parameters())
    for agent in agents:
        agent.set_random_seed(7)
        agent.learn(28)
    assert_same(agents[0].policy.state_dict(), agents[1].policy.state_dict())


def test_environments_are_seeded_one_by_one(make):
    agent = make(seed=5)
    assert agent.env._seeds == [5]
    agent.set_random_seed(9)
    assert agent.env._seeds == [9]


def test_another_agent_made_in_between_changes_nothing(make, trained):
    agent = make()
    make(seed=3)
    torch.rand(3), np.random.rand(3)
    assert_same_agents(agent.learn(28), trained)
