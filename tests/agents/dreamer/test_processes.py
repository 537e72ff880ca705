"""DreamerTPX in two processes: its update is that of one with all sequences and starts."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from tests.processes import together
from totalprop.agents import DreamerTPX
from totalprop.agents.dreamer.imagination import ImaginationNoise
from totalprop.agents.dreamer.replay import SequenceBatch
from totalprop.agents.dreamer.update import UpdateNoise

T, B, S, A, H = 5, 6, 3, 2, 4  # B of all processes
SETTINGS = {
    "batch_size": B, "sequence_length": T, "horizon": H, "seed": 0, "device": "cpu",
    "learning_rate": 1e-2, "model_learning_rate": 1e-2,
    "adam_eps": 1e-3,  # large: a step is then a smooth function of the gradient
    "policy_kwargs": {"stoch": 3, "deter": 4, "hidden": 5, "width": 5, "init_std": 1.0},
}  # fmt: skip
DREAMER_V3 = {"free_nats_per_step": True, "scale_returns": True, "entropy_scale": 0.01,
              "slow_critic_rate": 0.5, "slow_actor_rate": 0.5}  # fmt: skip
CATEGORICAL = {**SETTINGS["policy_kwargs"], "latent": "categorical", "classes": 3}
VARIANTS = {
    **{name: {"estimator": name} for name in ("rp", "lr", "tpx", "tps", "tpg")},
    "safe": {"estimator": "safe", "stop_grad_actor_input": False},
    "critic baseline": {"baseline": "critic"},
    "first-order": {"leg": "first-order"},
    "at the action": {"node": "action", "estimator": "lr", "credit": "own"},
    "DreamerV3": {**DREAMER_V3, "policy_kwargs": CATEGORICAL},
    # In units of the mean KL divergence, below which one of the two processes is by itself.
    "free nats": {"estimator": "rp", "free_nats": 0.999},
}


class Task(gym.Env):
    """Two actions that move nothing; the tests make the data themselves."""

    observation_space = spaces.Box(-np.inf, np.inf, (S,))
    action_space = spaces.Box(-1, 1, (A,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.normal(size=S).astype(np.float32), {}

    def step(self, action):
        return self.np_random.normal(size=S).astype(np.float32), float(action[0]), False, False, {}


def make(group, **changes) -> DreamerTPX:
    return DreamerTPX("DreamerPolicy", Task(), **{**SETTINGS, **changes}, group=group)


def updated(group, changes):
    """Parameters, k and scalars after one step on this process's part of a batch."""
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    agent = make(group, **{**changes, "free_nats": 0.1})
    source, latents = torch.Generator().manual_seed(3), agent.policy.model.rssm.latents
    observation = torch.randn(T, B, S, generator=source) * torch.linspace(0.5, 2, B).unsqueeze(1)
    batch = SequenceBatch(
        observation,
        torch.rand(T, B, A, generator=source) * 2 - 1,
        torch.randn(T, B, generator=source),
        torch.arange(T).eq(0).unsqueeze(1).expand(T, B),
        torch.zeros(T, B, dtype=torch.bool),
    )
    posterior = latents.noise(T, B, generator=source)
    noise = ImaginationNoise.draw(H, T * B, A, latents, source)
    own, rows = slice(rank * B // size, (rank + 1) * B // size), T * B // size
    # The states in the order of one process, which has the second half of the sequences last.
    halves = torch.arange(T * B).view(T, 2, B // 2).transpose(0, 1).flatten()
    starts = halves if size == 1 else torch.arange(rows)
    part = slice(rank * rows, (rank + 1) * rows)
    drawn = UpdateNoise(
        posterior[:, own], starts, ImaginationNoise(noise.action[:, part], noise.latent[:, part])
    )
    mine = SequenceBatch(*(x[:, own] for x in batch))
    update = agent._update
    if "free_nats" in changes:
        loss, _ = agent.policy.model.loss(*mine, drawn.posterior, update.settings.model)
        kl = float(agent._processes.average_one(loss.kl.detach()))
        agent.free_nats = changes["free_nats"] * kl
        update.configure(agent._update_settings())
    record = update._step(mine, drawn, True)
    scalars = agent._processes.average(list(record.scalars.values()))
    return {
        "parameters": dict(agent.policy.state_dict()),
        "scalars": dict(zip(record.scalars, scalars)),
        "k": record.k,
        "gauge": record.gauge,
    }


def all_updated(group):
    return {label: updated(group, changes) for label, changes in VARIANTS.items()}


@pytest.fixture(scope="module")
def in_two():
    return together(all_updated)


@pytest.mark.parametrize("label", VARIANTS)
def test_two_processes_take_the_step_of_one(in_two, label):
    expected = updated(None, VARIANTS[label])
    first, second = (found[label] for found in in_two)
    torch.testing.assert_close(first["parameters"], second["parameters"], rtol=0, atol=0)
    close = {"rtol": 1e-4, "atol": 1e-6}  # in single precision
    torch.testing.assert_close(first["parameters"], expected["parameters"], **close)
    torch.testing.assert_close(first["scalars"], expected["scalars"], **close)
    torch.testing.assert_close(first["k"], expected["k"], rtol=1e-3, atol=1e-4)


class Two:
    """Stands for a group of two where nothing is sent."""

    def size(self):
        return 2

    def rank(self):
        return 0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"batch_size": 5}, "batch_size must be a multiple of the 2 processes"),
        ({"imagination_starts": 9}, "imagination_starts must be a multiple of the 2 processes"),
        ({"buffer_size": 8}, "at least 5 x 2, got 8"),
        ({"cuda_graph": True}, "pass cuda_graph=False"),
        ({"leg": "lax"}, "set legs='score'"),
    ],
)
def test_what_processes_cannot_share_is_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(Two(), **changes)
