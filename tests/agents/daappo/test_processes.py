"""DAAPPO in two processes of one environment each learns what one process with both learns."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from tests.processes import together
from totalprop.agents import DAAPPO
from totalprop.agents.daappo.sources import Behaviour

N_STEPS, A = 12, 2
SETTINGS = {
    "n_steps": N_STEPS, "batch_size": 2 * N_STEPS, "n_epochs": 2, "seed": 0, "device": "cpu",
    "learning_rate": 0.05, "dynamics_width": 8, "dynamics_steps": 6, "dynamics_batch_size": 10,
    "dynamics_eps": 1e-2,  # large: a step is then a smooth function of the gradient
    "simulation_horizon": 3,
    "policy_kwargs": {"net_arch": [6], "optimizer_class": torch.optim.SGD, "optimizer_kwargs": {}},
}  # fmt: skip
VARIANTS = {
    "ppo": {"action_source": "none"},
    "ppo with a limit": {"action_source": "none", "target_kl": 2e-4, "n_epochs": 20},
    "dynamics": {"action_source": "dynamics", "estimator": "tpx"},
    "q": {"action_source": "q", "estimator": "tpx", "q_target": "advantage"},
    "states": {"action_source": "states"},
    "normalised": {"action_source": "dynamics", "normalize": True, "separate_grad_clip": True},
}
LOGGED = ("train/loss", "train/approx_kl", "train/clip_fraction", "train/explained_variance",
          "rollout/ep_rew_mean", "time/total_timesteps")  # fmt: skip


class Task(gym.Env):
    """Deterministic; where it begins and when it terminates depends on its number."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,))
    action_space = spaces.Box(-1, 1, (A,))

    def __init__(self, number):
        self.number = number

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.state = 0, np.array([self.number, 1.0, -0.5], np.float32)
        return self.state, {}

    def step(self, action):
        self.t += 1
        self.state = (0.9 * self.state + 0.3 * np.append(action, self.number)).astype(np.float32)
        reward = float(1 - np.square(self.state).sum())
        return self.state, reward, self.t == 4 + 3 * self.number, False, {}


def learned(group, changes):
    """Parameters, statistics and logs after two rollouts; all noise is that of one process."""
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    numbers = [0, 1] if size == 1 else [rank]
    source = torch.Generator().manual_seed(5)

    def noise(shape):  # of both environments, whose rows come one after the other
        whole = torch.randn(2, shape[0] // len(numbers), *shape[1:], generator=source)
        return whole[numbers].flatten(0, 1)

    def sample(self):
        return self.distribution.mean + self.distribution.stddev * noise((len(numbers), A))

    def draw(self, observations, k=None):
        distribution = self.policy.get_distribution(observations).distribution
        mean, std = distribution.mean, distribution.stddev
        if k is not None:
            mean, std = (x.unsqueeze(1).expand(-1, k, -1) for x in (mean, std))
        actions = mean + std * noise(mean.shape)
        return actions, torch.distributions.Normal(mean, std).log_prob(actions).sum(-1)

    env = DummyVecEnv([lambda i=i: Monitor(Task(i)) for i in numbers])
    settings = {**SETTINGS, **changes}
    if settings.pop("normalize", False):
        env = VecNormalize(env)
    logged = {}

    class Logs(Logger):
        def dump(self, step=0):
            logged.update({key: self.name_to_value[key] for key in LOGGED if key in
                           self.name_to_value})  # fmt: skip
            super().dump(step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiagGaussianDistribution, "sample", sample)
        patch.setattr(Behaviour, "draw", draw)
        agent = DAAPPO("MlpPolicy", env, **settings, group=group)
        agent.set_logger(Logs(None, []))
        agent.learn(3 * 2 * N_STEPS)
        agent.dump_logs()
    parts = {"policy": dict(agent.policy.state_dict())}
    if agent.value_model is not None:
        parts["value_model"] = dict(agent.value_model.state_dict())
    if isinstance(env, VecNormalize):
        parts["statistics"] = {
            f"{of}_{name}": torch.as_tensor(getattr(getattr(env, of), name))
            for of in ("obs_rms", "ret_rms") for name in ("mean", "var", "count")
        }  # fmt: skip
    parts["logged"] = {key: torch.tensor(float(value)) for key, value in logged.items()}
    return parts, agent._n_updates


def all_learned(group):
    return {label: learned(group, changes) for label, changes in VARIANTS.items()}


@pytest.fixture(scope="module")
def in_two():
    return together(all_learned)


@pytest.mark.parametrize("label", VARIANTS)
def test_two_processes_learn_what_one_learns(in_two, label):
    expected, n_updates = learned(None, VARIANTS[label])
    (first, n_first), (second, _) = (found[label] for found in in_two)
    assert n_first == n_updates and set(first["logged"]) == set(LOGGED)
    for part in first.keys() - {"logged"}:
        torch.testing.assert_close(first[part], second[part], rtol=0, atol=0)
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=2e-6)  # in single precision


def test_a_minibatch_that_processes_cannot_share_is_refused():
    class Three:
        def size(self):
            return 3

    with pytest.raises(ValueError, match="batch_size must be a multiple of the 3 processes"):
        DAAPPO("MlpPolicy", Monitor(Task(0)), **{**SETTINGS, "batch_size": 32}, group=Three())


def test_the_limit_of_the_divergence_ends_an_update_early():
    _, n_updates = learned(None, VARIANTS["ppo with a limit"])
    assert n_updates < 3 * 20


def test_a_group_that_is_set_later_is_refused():
    agent = DAAPPO("MlpPolicy", Monitor(Task(0)), **SETTINGS)
    agent.group = object()
    with pytest.raises(ValueError, match="group cannot be changed any more"):
        agent.learn(1)
