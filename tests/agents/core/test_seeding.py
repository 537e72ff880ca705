"""A seed given after construction is the seed of everything random, as in stable-baselines3."""

import pytest
import torch

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
