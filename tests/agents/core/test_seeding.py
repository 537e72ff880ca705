"""A seed given after construction is the seed of everything random, as in stable-baselines3."""

import pytest
import torch
from stable_baselines3 import PPO

from totalprop.agents import DAAPPO, PIPPS, DreamerTPX

SETTINGS = {
    PIPPS: {"n_particles": 10, "horizon": 3, "gradient_steps": 2, "gp_evaluations": 3},
    DreamerTPX: {
        "policy_kwargs": {"stoch": 3, "deter": 5, "hidden": 5, "width": 5},
        "learning_starts": 10, "sequence_length": 6, "batch_size": 3, "train_freq": 10,
        "gradient_steps": 1, "horizon": 3,
    },
    DAAPPO: {"n_steps": 10, "batch_size": 10, "n_epochs": 1, "dynamics_width": 8},
}  # fmt: skip
POLICIES = {PIPPS: "LinearPolicy", DreamerTPX: "DreamerPolicy", DAAPPO: "MlpPolicy"}


@pytest.mark.parametrize("cls", SETTINGS)
def test_set_random_seed_reaches_an_agents_own_generators(cls):
    agents = [
        cls(POLICIES[cls], "Pendulum-v1", **SETTINGS[cls], seed=seed, device="cpu")
        for seed in (1, 2)
    ]
    agents[1].set_parameters(agents[0].get_parameters())
    for agent in agents:
        agent.set_random_seed(7)
        agent.learn(30)
    first, second = agents
    for name, value in first.policy.state_dict().items():
        assert torch.equal(value, second.policy.state_dict()[name]), name


def test_an_unseeded_daappo_draws_from_torch_what_ppo_draws():
    states = []
    for cls in (PPO, DAAPPO):
        torch.manual_seed(5)
        agent = cls("MlpPolicy", "Pendulum-v1", n_steps=10, batch_size=10, device="cpu")
        states.append((torch.get_rng_state(), agent.policy.state_dict()))
    assert torch.equal(states[0][0], states[1][0])
    for name, value in states[0][1].items():
        assert torch.equal(value, states[1][1][name]), name


@pytest.mark.parametrize("cls", SETTINGS)
def test_an_unseeded_agent_seeds_its_generators_differently_each_time(cls):
    agents = [cls(POLICIES[cls], "Pendulum-v1", **SETTINGS[cls], device="cpu") for _ in range(2)]
    assert agents[0]._generator.initial_seed() != agents[1]._generator.initial_seed()
