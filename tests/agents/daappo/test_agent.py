"""DAAPPO beyond the contract of all agents: PPO without extra actions, the gradient with them.

All tests run on `Point`, a tiny noisy environment that can be rewound.
"""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from tests.agents.contract import probes
from tests.agents.contract.probes import Trace, parameters
from totalprop import estimators
from totalprop.agents import DAAPPO
from totalprop.agents.daappo import loss
from totalprop.agents.daappo.policy import TanhMeanPolicy
from totalprop.agents.daappo.recorder import ManyActionSamples
from totalprop.agents.daappo.sources import DynamicsSource, ExtraActions
from totalprop.agents.persistence import safe_file
from totalprop.world_models.transitions import UNKNOWN

SOURCES = ["dynamics", "q", "rewind", "states"]
PLAIN = {"n_steps": 16, "batch_size": 8, "n_epochs": 2, "seed": 0, "device": "cpu"}
TINY = {**PLAIN, "n_extra_actions": 2, "simulation_horizon": 2, "dynamics_width": 8}
SMALL = {"policy_kwargs": {"net_arch": [8]}}


class Point(gym.Env):
    """A point pushed along a line, with noise; truncated after 7 steps, terminated beyond ±2."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = spaces.Box(np.float32([-1.0, -0.5]), np.float32([1.0, 0.5]))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.time = float(self.np_random.normal()), 0
        return self._look(), {}

    def _look(self):
        return np.array([self.x, np.cos(self.x), self.time / 7], np.float32)

    def step(self, action):
        assert self.action_space.contains(action)
        self.time += 1
        self.x += 0.5 * float(action[0]) + 0.1 * float(self.np_random.normal())
        reward = -(self.x**2) + float(action[1])
        return self._look(), reward, abs(self.x) > 2, self.time == 7, {}

    def snapshot(self):
        return self.x, self.time, copy.deepcopy(self.np_random.bit_generator.state)

    def restore(self, state):
        self.x, self.time = state[:2]
        self.np_random.bit_generator.state = copy.deepcopy(state[2])

    def extra_step(self, action):
        return self.step(action)


def vector(n=1, normalise=False):
    env = DummyVecEnv([lambda: Monitor(Point()) for _ in range(n)])
    return VecNormalize(env) if normalise else env


def make(env=None, **changes):
    return DAAPPO("MlpPolicy", env or Point(), **{**TINY, **SMALL, **changes})


def assert_same(agent, other):
    """All networks and optimisers have the same bits."""
    probes.assert_same(agent.get_parameters(), other.get_parameters())


class Memory(KVWriter):
    """Keeps what is logged, one dictionary per dump, without wall-clock times."""

    def __init__(self):
        self.dumps = []

    def write(self, key_values, key_excluded, step=0):
        timed = ("time/fps", "time/time_elapsed")
        self.dumps.append({k: v for k, v in key_values.items() if k not in timed})

    def close(self):
        pass


def logged(agent):
    memory = Memory()
    agent.set_logger(Logger(None, [memory]))
    return memory.dumps


# Without extra actions

VARIANTS = {
    "plain": {},
    "envs": {"n": 3},
    "normalised": {"n": 2, "normalise": True},
    "value-clip": {"clip_range_vf": 1e-4},
    "target-kl": {"target_kl": 1e-4, "n_epochs": 5},
    "raw-advantages": {"normalize_advantage": False, "ent_coef": 0.01},
    "schedules": {"learning_rate": lambda p: 1e-3 * p, "clip_range": lambda p: 0.3 * p},
}


def begun(schedule):
    """A schedule of SB3's progress, after each of three rollouts, as ours is before it."""
    return (lambda p: schedule(1 - (2 - round(3 * p)) / 3)) if callable(schedule) else schedule


def pair(name, **changes):
    """PPO and DAAPPO after the same number of steps, with what they logged."""
    settings = dict(VARIANTS[name])
    worlds = {k: settings.pop(k) for k in ("n", "normalise") if k in settings}
    budget, agents, logs = 48 * worlds.get("n", 1), [], []
    for kind, extra in ((PPO, PLAIN), (DAAPPO, {**TINY, **changes})):  # the generators are global
        own = {k: begun(v) for k, v in settings.items()} if kind is PPO else settings
        agent = kind("MlpPolicy", vector(**worlds), **{**extra, **SMALL, **own})
        logs.append(logged(agent))
        agents.append(agent.learn(budget))
    ppo, daa = agents
    for log in logs:
        assert len(log) == 3 and "train/loss" in log[1]
    return ppo, daa, logs


@pytest.mark.parametrize("name", VARIANTS)
def test_none_is_stable_baselines3s_ppo_bit_for_bit(name):
    ppo, daa, (expected, found) = pair(name, action_source="none")
    assert_same(daa, ppo)
    assert found == expected
    if name == "target-kl":
        assert daa._n_updates < 15


@pytest.mark.parametrize("name", VARIANTS)
def test_until_the_warm_up_is_over_it_is_ppo(name):
    """Neither the model's fit nor our own code for the loss changes the result."""
    ppo, daa, (expected, found) = pair(name, dynamics_warmup=10**9)
    torch.testing.assert_close(parameters(daa), parameters(ppo), rtol=1e-5, atol=1e-7)
    for values, others in zip(found[1:], expected[1:]):
        assert values["train/extra_actions"] == 0 and values["dynamics/transition_loss"] > 0
        for key, value in others.items():
            assert values[key] == pytest.approx(value, rel=1e-3, abs=1e-6), key


def test_an_unseeded_agent_draws_from_torch_what_ppo_draws():
    states = []
    for cls in (PPO, DAAPPO):
        torch.manual_seed(5)
        agent = cls("MlpPolicy", Point(), n_steps=10, batch_size=10, device="cpu")
        states.append((torch.get_rng_state(), agent.policy.state_dict()))
    probes.assert_same(*states)


class Odd(gym.Env):
    """An environment with spaces that only action_source='none' supports."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space
        observation_space.seed(0)

    def reset(self, *, seed=None, options=None):
        self.time = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.time += 1
        return self.observation_space.sample(), float(np.sum(action)), False, self.time == 5, {}


BOX, IMAGE = Point.observation_space, spaces.Box(0, 255, (36, 36, 3), np.uint8)
ODD = {
    "discrete": ("MlpPolicy", BOX, spaces.Discrete(3)),
    "dictionary": ("MultiInputPolicy", spaces.Dict({"a": BOX, "b": BOX}), Point.action_space),
    "images": ("CnnPolicy", IMAGE, spaces.MultiBinary(2)),
}


@pytest.mark.parametrize("timeout_bootstrap", [True, False])
@pytest.mark.parametrize("name", ODD)
def test_none_takes_all_of_ppos_spaces(tmp_path, name, timeout_bootstrap):
    policy, *both = ODD[name]
    settings = {"n_steps": 8, "batch_size": 4, "n_epochs": 1, "seed": 0, "device": "cpu"}
    settings["policy_kwargs"] = {"net_arch": [8]}
    if name == "images":
        settings["policy_kwargs"]["features_extractor_kwargs"] = {"features_dim": 8}
    ppo = PPO(policy, Odd(*both), **settings).learn(16)
    settings.update(action_source="none", timeout_bootstrap=timeout_bootstrap)
    daa = DAAPPO(policy, Odd(*both), **settings).learn(16)
    if timeout_bootstrap:
        assert_same(daa, ppo)
    else:
        assert not torch.equal(parameters(daa), parameters(ppo))
    daa.save(tmp_path / "agent")
    assert_same(DAAPPO.load(tmp_path / "agent", env=Odd(*both)).learn(0), daa)


class Halved(RolloutBuffer):
    """A user's own buffer: all rewards are a fraction."""

    def __init__(self, *args, share=1.0, **kwargs):
        self.share = share
        super().__init__(*args, **kwargs)

    def add(self, obs, action, reward, *rest):
        super().add(obs, action, self.share * reward, *rest)


OF_PPO = [
    {"use_sde": True},
    {"use_sde": True, "sde_sample_freq": 3},
    {"rollout_buffer_class": Halved, "rollout_buffer_kwargs": {"share": 0.5}},
]


@pytest.mark.parametrize("settings", OF_PPO)
def test_none_takes_all_of_ppos_arguments(tmp_path, settings):
    ppo = PPO("MlpPolicy", Point(), **PLAIN, **SMALL, **settings).learn(32)
    daa = make(action_source="none", **settings).learn(32)
    assert_same(daa, ppo)
    plain = make(action_source="none").learn(32)
    assert any(
        not torch.equal(x, y) for x, y in zip(daa.policy.parameters(), plain.policy.parameters())
    )
    daa.save(tmp_path / "agent")
    kept = {k: v for k, v in settings.items() if k == "rollout_buffer_class"}
    loaded = DAAPPO.load(tmp_path / "agent", env=Point(), custom_objects=kept)
    assert type(loaded.rollout_buffer) is type(daa.rollout_buffer)
    assert_same(loaded, daa)
    loaded.learn(16)


@pytest.mark.parametrize("own", [{"action_source": "dynamics"}, {"value_clipping": "max"}])
@pytest.mark.parametrize(
    ("settings", "message"),
    [(OF_PPO[0], "pass use_sde=False"), (OF_PPO[2], "rollout_buffer_class=Halved; leave it")],
)
def test_ppos_arguments_that_extra_actions_cannot_take_are_refused(own, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        make(**{"action_source": "none", **own, **settings})
    assert "\n" not in str(error.value)


def test_none_clips_norms_apart_where_asked():
    settings = {"action_source": "none", "max_grad_norm": 0.01}
    joint, apart = make(**settings).learn(16), make(**settings, separate_grad_clip=True).learn(16)
    assert not torch.equal(parameters(joint), parameters(apart))
    plain = make(action_source="none", max_grad_norm=1e9).learn(16)
    same = make(action_source="none", max_grad_norm=1e9, separate_grad_clip=True).learn(16)
    torch.testing.assert_close(parameters(plain), parameters(same), rtol=1e-5, atol=1e-7)


class Loud(Point):
    """Its rewards are so large that squares of gradients overflow in single precision."""

    def step(self, action):
        observation, reward, *rest = super().step(action)
        return observation, 1e25 * reward, *rest


@pytest.mark.parametrize("source", ["dynamics", "q", "states"])
def test_a_value_model_that_could_not_be_loaded_ends_the_run(source):
    """Adam's second moment overflows; the weights, which then stand still, are finite."""
    agent = make(Loud(), action_source=source, dynamics_normalise=False)
    with pytest.raises(FloatingPointError, match=r"of value_optimizer is not finite.*smaller dyn"):
        agent.learn(16)
    assert all(torch.isfinite(x).all() for x in agent.value_model.parameters())


@pytest.mark.parametrize("source", ["none", "dynamics"])
def test_a_policy_that_could_not_be_loaded_ends_the_run(source):
    agent = make(action_source=source)
    with torch.no_grad():
        agent.policy.value_net.bias.fill_(np.nan)
    with pytest.raises(FloatingPointError, match=r"of policy is not finite.*at step 16"):
        agent.learn(16)


def test_warm_up_counts_steps_of_the_environment():
    agent = make(dynamics_warmup=33)
    dumps = logged(agent)
    agent.learn(80)  # a dump tells of the updates before it
    assert [values["train/extra_actions"] for values in dumps[1:]] == [0, 0, 2, 2]


# The gradient with extra actions


@pytest.fixture
def gathered(monkeypatch):
    """An agent after one rollout; its policy is perturbed, so that some ratios are clipped."""
    train = DAAPPO._train_epochs

    def made(**changes):
        monkeypatch.setattr(DAAPPO, "_train_epochs", lambda agent: None)
        settings = {"n_epochs": 1, "batch_size": 32, "n_steps": 16, "max_grad_norm": 1e9}
        agent = make(vector(2), **{**settings, "n_extra_actions": 3, **changes}).learn(32)
        monkeypatch.setattr(DAAPPO, "_train_epochs", train)
        torch.manual_seed(7)
        with torch.no_grad():
            for parameter in agent.policy.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return agent

    return made


def gradient(agent, monkeypatch):
    """The gradient that the update passes to the optimiser."""
    seen = []

    def step():
        seen.append([p.grad.clone() for p in agent.policy.parameters()])

    monkeypatch.setattr(agent.policy.optimizer, "step", step)
    state = np.random.get_state()
    agent._train_epochs()
    np.random.set_state(state)
    assert len(seen) == 1
    return seen[0]


def whole_batch(agent):
    """The rollout in one minibatch, with its advantages normalised if the agent does so."""
    (batch,) = agent.rollout_buffer.get(None)
    real, extra = batch.advantages, batch.extra
    slope = extra.action_gradient
    if extra.weights is None:
        extra = extra._replace(weights=torch.ones_like(extra.advantages))
    if agent.normalize_advantage:
        block = torch.cat((real[:, None], extra.advantages), 1)
        weights = torch.cat((torch.ones_like(real[:, None]), extra.weights), 1)
        mean = (weights * block).sum() / weights.sum()
        scale = ((weights * (block - mean) ** 2).sum() / (weights.sum() - 1)).sqrt()
        real, extra = (
            (real - mean) / scale,
            extra._replace(advantages=(extra.advantages - mean) / scale),
        )
        slope = None if slope is None else slope / scale
    return batch, real, extra, slope


def policy_at(agent, observations, actions):
    """Mean, standard deviation and log-probability, computed from the policy's networks."""
    policy = agent.policy
    mean = policy.action_net(policy.mlp_extractor(observations)[0])
    std = policy.log_std.exp().expand_as(mean)
    noise = (actions - mean) / std
    log_prob = (-0.5 * noise**2 - std.log() - 0.5 * np.log(2 * np.pi)).sum(-1)
    return mean, std, log_prob


def clip_loss(advantage, ratio):
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))


def rest(agent, batch):
    """The value and entropy terms of the loss."""
    values = agent.policy.predict_values(batch.observations)[:, 0]
    entropy = (agent.policy.log_std + 0.5 * np.log(2 * np.pi * np.e)).sum()
    return 0.5 * (values - batch.returns).square().mean() - agent.ent_coef * entropy


@pytest.mark.parametrize("normalize_advantage", [True, False])
@pytest.mark.parametrize("source", SOURCES)
def test_lr_is_ppos_clip_gradient_over_real_and_extra_actions(
    gathered, monkeypatch, source, normalize_advantage
):
    agent = gathered(action_source=source, normalize_advantage=normalize_advantage, ent_coef=0.01)
    batch, real, extra, _ = whole_batch(agent)
    k = agent.n_extra_actions
    states = batch.observations[:, None].expand(-1, k, -1)
    if source == "states":
        assert not torch.allclose(extra.observations[:, 0], batch.observations)
        assert 0.5 < extra.weights.mean() < 1  # some episodes terminate
        states = extra.observations
    _, _, log_real = policy_at(agent, batch.observations, batch.actions)
    _, _, log_extra = policy_at(agent, states, extra.actions)
    ratios = (log_real - batch.old_log_prob).exp(), (log_extra - extra.old_log_prob).exp()
    for ratio, advantage in zip(ratios, (real, extra.advantages)):
        binds = (advantage > 0) & (ratio > 1.2) | (advantage < 0) & (ratio < 0.8)
        assert binds.any() and not binds.all() and ((ratio - 1).abs() > 0.2).sum() > binds.sum()
    total = clip_loss(real, ratios[0]).sum()
    total = total + (extra.weights * clip_loss(extra.advantages, ratios[1])).sum()
    assert extra.weights.shape == (32, k) and (source == "states" or (extra.weights == 1).all())
    expected = torch.autograd.grad(
        total / (32 + extra.weights.sum()) + rest(agent, batch), list(agent.policy.parameters())
    )
    for found, wanted in zip(gradient(agent, monkeypatch), expected):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("normalize_advantage", [True, False])
@pytest.mark.parametrize("source", ["dynamics", "q"])
def test_rp_is_the_value_gradient_through_the_reparameterised_action(
    gathered, monkeypatch, source, normalize_advantage
):
    """-E[ratio dA/da da/dθ], and 0 where the ratio is clipped; real actions have PPO's gradient."""
    agent = gathered(action_source=source, normalize_advantage=normalize_advantage, estimator="rp")
    batch, real, extra, slope = whole_batch(agent)
    assert slope.abs().max() > 1e-3
    k = agent.n_extra_actions
    states = batch.observations[:, None].expand(-1, k, -1)
    _, _, log_real = policy_at(agent, batch.observations, batch.actions)
    mean, std, log_extra = policy_at(agent, states, extra.actions)
    ratio, advantage = (log_extra - extra.old_log_prob).exp().detach(), extra.advantages
    binds = (advantage > 0) & (ratio > 1.2) | (advantage < 0) & (ratio < 0.8)
    assert binds.any() and not binds.all()
    noise = ((extra.actions - mean) / std).detach()
    moved = ((mean + std * noise) * slope).sum(-1)
    losses = torch.where(binds, 0.0, -ratio * moved)
    total = clip_loss(real, (log_real - batch.old_log_prob).exp()).sum() + losses.sum()
    loss = total / (32 * (1 + k)) + rest(agent, batch)
    expected = torch.autograd.grad(loss, list(agent.policy.parameters()))
    for found, wanted in zip(gradient(agent, monkeypatch), expected):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def random_values(n=1000):
    """Values, old values and returns of n states, for a clipping range of 0.2."""
    values, old, returns = torch.randn(3, n, generator=torch.Generator().manual_seed(0)).double()
    unused = [torch.zeros(n)] * 4
    return values.requires_grad_(), ManyActionSamples(*unused[:2], old, *unused[:2], returns, None)


@pytest.mark.parametrize("clipping", ["clipped", "max"])
def test_which_states_give_the_critic_a_gradient(clipping):
    """SB3: those inside the range. CleanRL: also those whose error the range does not reduce."""
    values, batch = random_values()
    lost = loss.value_loss(values, batch, 0.2, clipping)
    (found,) = torch.autograd.grad(lost, values)
    old, returns = batch.old_values, batch.returns
    inside = (values - old).abs() < 0.2
    edge = old + torch.where(values > old, 0.2, -0.2)
    is_worse = (values - returns).abs() > (edge - returns).abs()
    keeps = inside | (is_worse if clipping == "max" else torch.zeros_like(inside))
    expected = torch.where(keeps, 2 * (values - returns) / len(values), 0.0).detach()
    torch.testing.assert_close(found, expected)
    # 1000 states, seed 0, 4 standard errors, of P(|N(0, 2)| > 0.2), and of 4 · 10^6 draws.
    share, error = {"clipped": (0.8875, 0.040), "max": (0.4149, 0.063)}[clipping]
    assert float((found == 0).double().mean()) == pytest.approx(share, abs=error)


def test_the_larger_error_is_cleanrls_value_loss():
    values, batch = random_values()
    v_loss_unclipped = (values - batch.returns) ** 2
    v_clipped = batch.old_values + torch.clamp(values - batch.old_values, -0.2, 0.2)
    expected = torch.max(v_loss_unclipped, (v_clipped - batch.returns) ** 2).mean()
    torch.testing.assert_close(loss.value_loss(values, batch, 0.2, "max"), expected)
    plain = loss.value_loss(values, batch, None, "max")
    torch.testing.assert_close(plain, v_loss_unclipped.mean())


@pytest.mark.parametrize("source", ["none", "dynamics"])
def test_value_clipping_decides_what_the_critic_learns(source):
    settings = {"action_source": source, "clip_range_vf": 1e-3}
    agents = [make(**settings, value_clipping=x).learn(32) for x in ("clipped", "max")]
    assert not torch.equal(*(agent.policy.value_net.weight for agent in agents))


@pytest.mark.parametrize("normalize_advantage", [True, False])
def test_an_extra_action_of_weight_two_counts_as_two_of_them(normalize_advantage):
    """Twice the same sample, or once with twice the weight: the same loss and gradient."""
    zeta, extra, _ = synthetic(k=3, b=4)
    batch = random_values(4)[1]._replace(advantages=torch.randn(4).double())
    log_prob = torch.randn(4).double()
    estimator = estimators.make("lr", baseline=estimators.baselines.none)
    found = []
    for k, weights in (([0, 1, 1, 2], None), ([0, 1, 2], torch.tensor([1.0, 2.0, 1.0]).double())):
        part = ExtraActions(
            extra.actions[:, k], extra.old_log_prob[:, k], extra.advantages[:, k], None,
            weights=None if weights is None else weights.expand(4, -1),
        )  # fmt: skip
        lost = loss.policy_loss(
            batch._replace(old_log_prob=log_prob, extra=part), log_prob,
            (zeta[0][k], zeta[1][k]), estimator,
            clip_range=0.2, normalize_advantage=normalize_advantage,
        )  # fmt: skip
        found.append((lost.total, lost.extra, *torch.autograd.grad(lost.total, zeta)))
    for once, twice in zip(*found):
        torch.testing.assert_close(once, twice)


def synthetic(k=5, b=4):
    """Mean and std [K, B, 2] as leaves, extra actions with random slopes, and the ratios."""
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=g).double()

    mean, std = randn(1, b, 2).repeat(k, 1, 1), (randn(1, b, 2) * 0.3).exp().repeat(k, 1, 1)
    actions = mean + std * randn(k, b, 2)
    log_prob = torch.distributions.Normal(mean, std).log_prob(actions).sum(-1)
    old = log_prob + 0.3 * randn(k, b)
    extra = ExtraActions(actions.transpose(0, 1), old.T, randn(b, k), 0.7 * randn(b, k, 2))
    return (mean.requires_grad_(), std.requires_grad_()), extra, (log_prob - old).exp()


def mixed(name):
    """Gradients of the estimator in mean and standard deviation, [K, B, 2] each."""
    zeta, extra, _ = synthetic()
    estimator = estimators.make(name, baseline=estimators.baselines.none)
    losses = loss.extra_loss(estimator, zeta, extra, 0.2)
    assert losses.shape == (5, 4)
    return torch.autograd.grad(losses.sum(), zeta)


def test_tpx_mixes_the_legs_of_each_state_by_their_variances_over_its_actions():
    (mean, std), extra, ratio = synthetic()
    advantage, actions = extra.advantages.T, extra.actions.transpose(0, 1)
    binds = (advantage > 0) & (ratio > 1.2) | (advantage < 0) & (ratio < 0.8)
    assert binds.any() and not binds.all()
    weight = torch.where(binds, 0.0, -ratio)[..., None]
    noise = (actions - mean) / std
    rp = weight * extra.action_gradient.transpose(0, 1)
    lr = weight * advantage[..., None] * noise / std
    rp_std, lr_std = rp * noise, weight * advantage[..., None] * (noise**2 - 1) / std
    c_rp, c_lr = rp - rp.mean(0), lr - lr.mean(0)
    k = (c_rp * (c_rp - c_lr)).sum(0) / ((c_rp - c_lr) ** 2).sum(0)
    k = k.clamp(0, 1)
    assert k.shape == (4, 2) and ((k > 0) & (k < 1)).sum() > 4
    found = mixed("tpx")
    torch.testing.assert_close(found[0], (rp + k * (lr - rp)).detach(), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(
        found[1], (rp_std + k * (lr_std - rp_std)).detach(), rtol=1e-5, atol=1e-8
    )


@pytest.mark.parametrize("name", ["tpx", "tpx-scalar", "tpx-ivw", "tpx-ivw-scalar"])
def test_composites_lie_between_their_legs(name):
    assert name in estimators.names()
    for found, lr, rp in zip(mixed(name), mixed("lr"), mixed("rp")):
        low, high = torch.minimum(lr, rp), torch.maximum(lr, rp)
        assert ((found >= low - 1e-9) & (found <= high + 1e-9)).all()
        assert not torch.allclose(found, lr) and not torch.allclose(found, rp)


@pytest.mark.parametrize("source", SOURCES)
def test_extra_advantages_are_against_the_critic_or_the_other_actions(source, gathered):
    settings = {"action_source": source, "n_extra_actions": 3}
    critic, others = (
        gathered(**settings, extra_baseline=baseline).rollout_buffer.extra
        for baseline in ("critic", "leave-one-out")
    )
    assert torch.equal(critic.actions, others.actions)
    expected = critic.advantages
    if source != "states":  # which has one action per state
        expected = expected - (expected.sum(1, keepdim=True) - expected) / 2
        assert not torch.allclose(expected, critic.advantages)
    torch.testing.assert_close(others.advantages, expected)


def test_value_of_the_loss_is_ppos_for_every_estimator():
    for name in ("lr", "rp", "tpx"):
        zeta, extra, ratio = synthetic()
        estimator = estimators.make(name, baseline=estimators.baselines.none)
        losses = loss.extra_loss(estimator, zeta, extra, 0.2)
        torch.testing.assert_close(losses, clip_loss(extra.advantages.T, ratio.detach()))


@pytest.mark.parametrize(("estimator", "least"), [("lr", 1), ("rp", 1), ("tpx", 2)])
def test_k_grows_from_what_the_estimator_needs(estimator, least):
    """`tpx` weighs its legs by variances over actions, which a single action does not have."""
    agent = make(estimator=estimator, grow_fraction=1.0, n_extra_actions=8)
    agent._total_timesteps, agent.num_timesteps = 1000, 0
    assert agent.k == least
    agent.num_timesteps = 500
    assert agent.k == 5


def test_norms_of_policy_and_critic_are_clipped_apart_where_asked(gathered, monkeypatch):
    for is_apart in (False, True):
        agent = gathered(separate_grad_clip=is_apart, max_grad_norm=0.01)
        found = dict(zip(dict(agent.policy.named_parameters()), gradient(agent, monkeypatch)))
        critic = {name for name in found if "value" in name}
        assert len(critic) == 4 and len(found) == 9

        def norm(names, found=found):
            return float(torch.stack([found[name].norm() for name in names]).norm())

        parts = norm(critic), norm(found.keys() - critic)
        if is_apart:
            assert parts == pytest.approx((0.01, 0.01), rel=1e-3)
        else:
            assert np.hypot(*parts) == pytest.approx(0.01, rel=1e-3)


# Rollouts stay as they were


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("source", SOURCES)
def test_rollouts_are_those_without_extra_actions(monkeypatch, source, n):
    """Sources have their own generators and restore the environment. Updates are left out here."""
    monkeypatch.setattr(DAAPPO, "_train_epochs", lambda agent: None)
    monkeypatch.setattr(PPO, "train", lambda agent: None)
    rows, states = {}, {}

    class Look(BaseCallback):
        def _on_rollout_end(self):
            buffer = self.model.rollout_buffer
            fields = ("observations", "actions", "rewards", "advantages", "episode_starts")
            seen.extend(getattr(buffer, field).copy() for field in fields)

        def _on_step(self):
            return True

    for name in ("none", source):
        seen = rows[name] = []
        agent = make(vector(n), action_source=name).learn(3 * 16 * n, callback=Look())
        states[name] = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert len(rows["none"]) == 15
    for x, y in zip(rows["none"], rows[source], strict=True):
        np.testing.assert_array_equal(x, y)
    assert torch.equal(states["none"][0], states[source][0])
    np.testing.assert_array_equal(states["none"][1], states[source][1])
    assert agent.rollout_buffer.extra.actions.shape == (16 * n, 2, 2)


def test_first_updates_differ_by_the_extra_actions_only():
    """The first rollout equals PPO's; the update from it does not."""
    agent, ppo = make().learn(16), make(action_source="none").learn(16)
    np.testing.assert_array_equal(
        agent.rollout_buffer.observations, ppo.rollout_buffer.observations
    )
    assert not torch.equal(parameters(agent), parameters(ppo))


def test_extra_steps_are_counted_separately():
    agent = make(action_source="rewind", simulation_horizon=1)
    dumps = logged(agent)
    agent.learn(48)
    assert [values["time/extra_env_steps"] for values in dumps[1:]] == [32, 64]
    assert [values["time/total_timesteps"] for values in dumps] == [16, 32, 48]


# Advantages cut off, growing K and H


@pytest.mark.parametrize("horizon", [1, 3, 8, 11, 12, 20])
def test_truncated_advantages_are_sums_of_deltas_within_the_episode(horizon):
    box, steps, n, gamma, lam = spaces.Box(-1, 1, (1,)), 12, 3, 0.9, 0.8
    buffer = RolloutBuffer(steps, box, box, n_envs=n, gamma=gamma, gae_lambda=lam)
    rng = np.random.default_rng(0)
    starts = rng.random((steps + 1, n)) < 0.25
    starts[:, 2] = False
    rewards, values = rng.normal(size=(2, steps + 1, n))
    for t in range(steps):
        x = np.zeros((n, 1))
        buffer.add(x, x, rewards[t], starts[t], torch.as_tensor(values[t]), torch.zeros(n))
    buffer.compute_returns_and_advantage(torch.as_tensor(values[steps]), starts[steps])
    whole = buffer.advantages.copy()
    expected = np.zeros((steps, n))
    for i in range(n):
        for t in range(steps):
            for s in range(t, min(t + horizon, steps)):
                goes_on = not starts[s + 1, i]
                delta = rewards[s, i] + gamma * goes_on * values[s + 1, i] - values[s, i]
                expected[t, i] += (gamma * lam) ** (s - t) * delta
                if not goes_on:
                    break
    found = loss.truncated_advantages(buffer, horizon)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(buffer.advantages, whole)
    assert np.allclose(found, whole) == (horizon >= steps)


@pytest.mark.parametrize("source", ["q", "states", "none"])
def test_matched_horizon_needs_extra_actions_of_that_horizon(source):
    with pytest.raises(ValueError, match="does not do: use real_advantage='gae'"):
        make(action_source=source, real_advantage="matched_horizon")


def test_matched_horizon_is_used_for_the_real_action_and_not_for_returns(gathered):
    settings = {"simulation_horizon": 3}
    gae, matched = gathered(**settings), gathered(**settings, real_advantage="matched_horizon")
    np.testing.assert_array_equal(gae.rollout_buffer.returns, matched.rollout_buffer.returns)
    expected = loss.truncated_advantages(gae.rollout_buffer, 3)
    np.testing.assert_array_equal(matched.rollout_buffer.advantages, expected)
    assert not np.allclose(expected, gae.rollout_buffer.advantages)
    warming = gathered(**settings, real_advantage="matched_horizon", dynamics_warmup=99)
    np.testing.assert_array_equal(warming.rollout_buffer.advantages, gae.rollout_buffer.advantages)


GROWTH = [  # fraction of all steps, K of 4, H of 8
    (0.0, 1, 2), (0.124, 1, 3), (0.126, 2, 4), (0.25, 3, 6), (0.37, 3, 7), (0.376, 4, 8),
    (0.5, 4, 8), (1.0, 4, 8), (1.2, 4, 8),
]  # fmt: skip


@pytest.mark.parametrize(("done", "k", "horizon"), GROWTH)
def test_k_and_horizon_grow_over_half_of_all_steps(done, k, horizon):
    agent = make(grow_fraction=0.5, n_extra_actions=4, simulation_horizon=8)
    agent._total_timesteps, agent.num_timesteps = 1000, round(1000 * done)
    assert (agent.k, agent.horizon) == (k, horizon)


@pytest.mark.parametrize(("done", "k", "horizon"), GROWTH)
def test_growth_begins_where_the_model_is_first_used(done, k, horizon):
    """The warm-up is 400 of 1000 steps; growth from step 0 would be complete by then."""
    agent = make(grow_fraction=0.5, n_extra_actions=4, simulation_horizon=8, dynamics_warmup=400)
    agent._total_timesteps, agent.num_timesteps = 1000, 400 + round(1000 * done)
    assert (agent.k, agent.horizon) == (k, horizon)
    agent.num_timesteps = 300
    assert (agent.k, agent.horizon) == (1, 2)


@pytest.mark.parametrize("done", [0.0, 0.5, 1.0])
def test_k_and_horizon_are_full_at_once_or_never_more(done):
    agent = make(grow_fraction=0.0, n_extra_actions=4, simulation_horizon=8)
    agent._total_timesteps, agent.num_timesteps = 1000, round(1000 * done)
    assert (agent.k, agent.horizon) == (4, 8)
    agent = make(grow_fraction=1.0, n_extra_actions=1, simulation_horizon=1)
    agent._total_timesteps, agent.num_timesteps = 1000, round(1000 * done)
    assert (agent.k, agent.horizon) == (1, 1)


def test_growth_is_logged_and_reaches_the_samples():
    agent = make(grow_fraction=1.0, n_extra_actions=4, simulation_horizon=8)
    dumps = logged(agent)
    agent.learn(64)
    assert [values["train/extra_actions"] for values in dumps[1:]] == [2, 3, 4]
    assert [values["train/simulation_horizon"] for values in dumps[1:]] == [4, 6, 8]
    assert agent.rollout_buffer.extra.actions.shape[1] == 4


def test_growth_after_a_warm_up_reaches_the_samples():
    agent = make(grow_fraction=0.5, n_extra_actions=4, simulation_horizon=8, dynamics_warmup=32)
    dumps = logged(agent)
    agent.learn(96)
    # After 16, 32, .. 80 steps, of which 0, 0, 16, 32, 48 with the model: thirds of 48.
    assert [values["train/extra_actions"] for values in dumps[1:]] == [0, 1, 2, 3, 4]
    assert [values["train/simulation_horizon"] for values in dumps[1:]] == [2, 2, 4, 7, 8]


# The contract


def test_clips_follow_their_own_schedules():
    agent, log = make(clip_range=lambda p: 0.2 * p, clip_range_vf=lambda p: 0.1 * p), Memory()
    agent.set_logger(Logger(None, [log]))
    agent.learn(4 * agent.n_steps)
    found = {name: [d[f"train/{name}"] for d in log.dumps if f"train/{name}" in d]
             for name in ("clip_range", "clip_range_vf")}  # fmt: skip
    progress = np.array([1, 0.75, 0.5])  # those of the last round are logged with the next
    np.testing.assert_allclose(found["clip_range"], 0.2 * progress)
    np.testing.assert_allclose(found["clip_range_vf"], 0.1 * progress)


@pytest.mark.parametrize(("batch_size", "expected"), [(6, 6), (64, 2)])
def test_a_model_is_fitted_to_each_transition_in_each_epoch(batch_size, expected, monkeypatch):
    """With dynamics_steps=0: ⌈16 / batch⌉ steps in each of 2 epochs, and never none."""
    steps, fit = [], DynamicsSource.fit

    def spy(self, *args, **kwargs):
        steps.append(kwargs["steps"])
        return fit(self, *args, **kwargs)

    monkeypatch.setattr(DynamicsSource, "fit", spy)
    make(n_steps=16, batch_size=batch_size, n_epochs=2, dynamics_steps=0).learn(16)
    assert steps == [expected]


@pytest.mark.parametrize("source", SOURCES)
def test_settings_that_are_changed_count_from_then_on(source):
    """As in a callback. Sizes of networks and buffers are those they were made with."""
    agent = make(action_source=source).learn(16)
    agent.dynamics_batch_size, agent.batch_size = 5, 8
    agent.dynamics_learning_rate, agent.dynamics_eps = 0.123, 0.01
    agent.timeout_bootstrap = False
    agent.learn(16, reset_num_timesteps=False)
    settings = agent.source.settings
    assert (settings.batch_size, settings.q_batch_size) == (5, 8)
    assert not settings.timeout_bootstrap and not agent._recorder.timeout_bootstrap
    if agent.value_optimizer is not None:
        groups = agent.value_optimizer.param_groups
        assert all((group["lr"], group["eps"]) == (0.123, 0.01) for group in groups)


@pytest.mark.parametrize("source", SOURCES)
def test_same_seed_same_bits_and_another_seed_others(source):
    settings = {"action_source": source}
    agent, again = make(**settings).learn(48), make(**settings).learn(48)
    assert_same(agent, again)
    other = make(**settings, seed=1).learn(48)
    assert not torch.equal(parameters(agent), parameters(other))


def test_without_a_seed_sources_are_seeded_at_random_and_not_from_the_global_generators():
    first, second = make(seed=None), make(seed=None)
    assert first.source.generator.initial_seed() != second.source.generator.initial_seed()
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    first.set_random_seed(None)
    assert torch.equal(torch.get_rng_state(), states[0])
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])


@pytest.mark.parametrize("estimator", ["lr", "rp", "tpx"])
@pytest.mark.parametrize("source", ["dynamics", "q"])
def test_parameters_move_and_stay_finite(source, estimator):
    agent = make(vector(2, normalise=True), action_source=source, estimator=estimator)
    before = parameters(agent)
    after = parameters(agent.learn(64))
    assert torch.isfinite(after).all() and not torch.equal(before, after)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("seen", "acted"), [(np.float64, np.float32), (np.float64, np.float64)])
def test_spaces_of_double_precision(source, seen, acted):
    class Double(Point):
        observation_space = spaces.Box(-np.inf, np.inf, (3,), seen)
        action_space = spaces.Box(-np.ones(2, acted), np.ones(2, acted), dtype=acted)

        def _look(self):
            return super()._look().astype(seen)

    assert torch.isfinite(parameters(make(Double(), action_source=source).learn(32))).all()


class Shifted(Point):
    """Point in double precision, with an offset and a scale of what is observed."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float64)

    def __init__(self, offset=0.0, scale=1.0):
        self.offset, self.scale = offset, scale

    def _look(self):
        exact = np.array([self.x, np.cos(self.x), self.time / 7])
        return exact * self.scale + self.offset


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("offset", "scale"), [(1e6, 1.0), (-1e9, 1.0), (0.0, 256.0), (1e6, 8.0)])
def test_offset_and_scale_of_the_observations_change_nothing(source, offset, scale):
    """With VecNormalize, which works in double precision, up to round-off.

    Its statistics are given: they begin with a mean of 0 and remember that for long.
    """
    found = []
    for settings in ((0.0, 1.0), (offset, scale)):
        env = VecNormalize(DummyVecEnv([lambda s=settings: Monitor(Shifted(*s))]), training=False)
        env.obs_rms.mean = settings[0] + settings[1] * np.array([0.1, 0.5, 0.5])
        env.obs_rms.var = (settings[1] * np.array([1.0, 0.3, 0.3])) ** 2
        agent = make(env, action_source=source, n_steps=32).learn(64)
        found.append((agent.rollout_buffer.extra.advantages, parameters(agent)))
    for plain, other in zip(*found):
        torch.testing.assert_close(other, plain, rtol=1e-2, atol=2e-3)


def test_an_offset_that_the_policy_cannot_resolve_is_told_once():
    agent = make(Shifted(1e9))
    with pytest.warns(UserWarning, match="entry 0 of the observation varies.*VecNormalize") as told:
        agent.learn(48)
    assert len([w for w in told if "entry 0 " in str(w.message)]) == 1


def test_states_of_older_checkpoints_continue_without_an_offset(tmp_path):
    """They hold float32, and their models were fitted to numbers with the offset."""
    agent = make(Shifted(8.0)).learn(32)
    agent.value_model.offset.zero_()
    state = agent.state_dict(tmp_path)
    (segment,) = state["files"]
    rows = safe_file.read(tmp_path / segment, "replay segment")
    for name in ("states", "next_states"):
        rows[name] = rows[name].astype(np.float32)
    safe_file.write(tmp_path / segment, "replay segment", rows)
    other = make(Shifted(8.0), seed=3)
    other.set_parameters(agent.get_parameters())
    other.load_state_dict(state, tmp_path)
    np.testing.assert_array_equal(other.source.transitions.states[:32], rows["states"])
    other.learn(32)
    assert not other.value_model.offset.any()


def test_learn_returns_self_and_rounds_up_to_whole_rollouts():
    agent = make(vector(2))
    assert agent.learn(33) is agent
    assert agent.num_timesteps == 64


@pytest.mark.parametrize("source", ["none", *SOURCES])
def test_events_are_those_of_ppo(source):
    trace, expected = Trace(), Trace()
    make(action_source=source).learn(32, callback=trace)
    PPO("MlpPolicy", Point(), **PLAIN).learn(32, callback=expected)
    assert trace.events == expected.events
    assert trace.events.count("init") == 1 and trace.events.count("step") == 32


def test_a_stop_does_not_lose_the_step_that_was_taken():
    """The next `learn` continues from the environment's state, so recorded transitions are real."""
    agent = make().learn(100, callback=Trace(stop_at=5))
    agent.learn(48, reset_num_timesteps=False)
    kept = agent.source.transitions
    rows = kept.rows(0, kept.count)
    clocks = 7 * rows["states"][:, 2], 7 * rows["next_states"][:, 2]
    np.testing.assert_allclose(clocks[1] - clocks[0], 1, atol=1e-5)
    assert agent._last_episode_starts.shape == (1,)


@pytest.mark.parametrize("source", ["none", "dynamics"])
def test_schedules_stay_in_their_range_where_the_last_rollout_overshoots(source):
    settings = {"learning_rate": lambda p: 1e-3 * p, "clip_range": lambda p: 0.2 * p}
    agent = make(action_source=source, **settings)
    found = logged(agent)
    agent.learn(20)  # of rollouts of 16
    agent.dump_logs()
    for values, progress in zip(found[1:], (1.0, 0.2), strict=True):
        assert values["train/clip_range"] == pytest.approx(0.2 * progress)
        assert values["train/learning_rate"] == pytest.approx(1e-3 * progress)


class Extractor(FlattenExtractor):
    def __init__(self, space):
        super().__init__(space)
        self.layer = torch.nn.Linear(3, 3)


def test_classes_in_policy_kwargs_are_passed_again(tmp_path):
    """No file holds a user's class: `save` warns, `load` names it, and takes it."""
    kwargs = {"features_extractor_class": Extractor, "activation_fn": torch.nn.Hardswish}
    kwargs = {**SMALL["policy_kwargs"], **kwargs}
    agent = make(policy_kwargs=kwargs)
    with pytest.warns(UserWarning, match="the file does not hold policy_kwargs") as caught:
        agent.save(tmp_path / "own")
    said = sorted(str(warning.message) for warning in caught)
    assert [text.split(": pass")[0] for text in said] == [
        "the file does not hold policy_kwargs['activation_fn'], a "
        "torch.nn.modules.activation.Hardswish",
        f"the file does not hold policy_kwargs['features_extractor_class'], a {__name__}.Extractor",
    ]
    with pytest.raises(
        ValueError, match=r"policy_kwargs\['.*'\] was a .*, which files do not hold"
    ):
        DAAPPO.load(tmp_path / "own")
    wrong = {**kwargs, "net_arch": [3]}
    with pytest.raises(ValueError, match="the file's policy_kwargs are"):
        DAAPPO.load(tmp_path / "own", policy_kwargs=wrong)
    loaded = DAAPPO.load(tmp_path / "own", policy_kwargs=kwargs)
    assert isinstance(loaded.policy.features_extractor, Extractor)
    observations = np.zeros((4, *agent.observation_space.shape), np.float32)
    for ours, theirs in zip(
        agent.predict(observations, deterministic=True),
        loaded.predict(observations, deterministic=True),
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_an_extractor_of_its_own_is_the_critics():
    kwargs = {"features_extractor_class": Extractor, "share_features_extractor": False}
    agent = make(separate_grad_clip=True, policy_kwargs={**SMALL["policy_kwargs"], **kwargs})
    names = {id(p): name for name, p in agent.policy.named_parameters()}
    policy, critic = ([names[id(p)] for p in group] for group in agent._clip_groups())
    assert {name for name in critic if "extractor.layer" in name} == {
        "vf_features_extractor.layer.weight", "vf_features_extractor.layer.bias"
    }  # fmt: skip
    assert not any(name.startswith("vf_") or "value" in name for name in policy)


def test_extra_actions_lie_in_a_space_whose_bounds_single_precision_has_not():
    class Narrow(Point):
        action_space = spaces.Box(np.array([-0.1, -0.3]), np.array([0.3, 0.1]), dtype=np.float64)

        def step(self, action):
            assert self.action_space.contains(action), action
            return super().step(action)

    make(Narrow(), action_source="rewind").learn(32)


@pytest.mark.parametrize("source", SOURCES)
def test_evaluating_and_saving_do_not_change_learning(tmp_path, source):
    settings = {"action_source": source}
    alone = make(vector(2, normalise=True), **settings).learn(64)
    callbacks = [
        EvalCallback(
            vector(1, normalise=True), n_eval_episodes=2, eval_freq=5, verbose=0,
            best_model_save_path=str(tmp_path), log_path=str(tmp_path),
        ),
        CheckpointCallback(10, str(tmp_path / "checkpoints")),
    ]  # fmt: skip
    watched = make(vector(2, normalise=True), **settings).learn(64, callback=callbacks)
    assert_same(watched, alone)
    assert (tmp_path / "best_model.zip").exists() and (tmp_path / "evaluations.npz").exists()
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3


def test_tanh_mean_policy_keeps_the_mean_inside_and_learns(tmp_path):
    agent = DAAPPO("TanhMeanPolicy", Point(), **TINY)
    assert isinstance(agent.policy, TanhMeanPolicy)
    before = parameters(agent)
    agent.learn(32)
    assert (parameters(agent) != before).float().mean() > 0.99  # the optimiser has them all
    wild = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    with torch.no_grad():
        agent.policy.action_net[0].bias.fill_(5.0)
    mean = agent.policy.get_distribution(torch.as_tensor(wild)).distribution.mean
    assert (mean.abs() < 1).all() and (mean > 0.9).all()
    agent.save(tmp_path / "agent")
    loaded = DAAPPO.load(tmp_path / "agent")
    np.testing.assert_array_equal(
        *(a.predict(wild, deterministic=True)[0] for a in (agent, loaded))
    )


# Files


def assert_tensors_differ(module, other):
    pairs = zip(module.parameters(), other.parameters())
    assert not all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("source", ["none", *SOURCES])
def test_save_and_load(tmp_path, source):
    agent = make(vector(2), action_source=source, estimator="lr", n_extra_actions=3).learn(64)
    agent.save(tmp_path / "agent")
    loaded = DAAPPO.load(tmp_path / "agent", env=vector(2), device="cpu")
    assert_same(loaded, agent)
    assert loaded.num_timesteps == 64
    for name in ("action_source", "n_extra_actions", "estimator", "dynamics_width"):
        assert getattr(loaded, name) == getattr(agent, name)
    observations = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    found, expected = (a.predict(observations, deterministic=True)[0] for a in (loaded, agent))
    np.testing.assert_array_equal(found, expected)
    if source in ("dynamics", "q", "states"):
        assert set(agent.get_parameters()) > {"value_model", "value_optimizer"}
        assert_tensors_differ(agent.value_model, make(action_source=source).value_model)
        steps = loaded.value_optimizer.state_dict()["state"][0]["step"]
        assert steps == agent.value_optimizer.state_dict()["state"][0]["step"] > 0
    else:
        assert set(agent.get_parameters()) == {"policy", "policy.optimizer"}
    before = parameters(loaded)
    loaded.learn(32, reset_num_timesteps=False)
    assert loaded.num_timesteps == 96 and not torch.equal(parameters(loaded), before)


def test_policy_parameters_can_be_taken_over_without_extra_actions(tmp_path):
    make().learn(16).save(tmp_path / "agent")
    names = {"policy", "policy.optimizer"}
    off = DAAPPO("MlpPolicy", Point(), action_source="none", **PLAIN, **SMALL)
    given = make().get_parameters()
    off.set_parameters({name: given[name] for name in names})
    off.learn(16).save(tmp_path / "off")
    assert DAAPPO.load(tmp_path / "off", env=Point()).learn(16).action_source == "none"


def test_loaded_model_and_optimiser_are_the_ones_in_use(tmp_path):
    agent = make().learn(16)
    agent.save(tmp_path / "agent")
    loaded = DAAPPO.load(tmp_path / "agent", env=Point())
    assert loaded.source.model is loaded.value_model
    assert loaded.value_optimizer.param_groups[0]["params"][0] is next(
        loaded.value_model.parameters()
    )
    before = copy.deepcopy(loaded.value_model.state_dict())
    loaded.learn(16)
    assert any(not torch.equal(x, before[k]) for k, x in loaded.value_model.state_dict().items())


def test_scales_of_the_model_are_saved(tmp_path):
    agent = make().learn(16)
    agent.save(tmp_path / "agent")
    loaded = DAAPPO.load(tmp_path / "agent")
    assert not torch.equal(agent.value_model.state_mean, torch.zeros(3))
    assert torch.equal(loaded.value_model.state_mean, agent.value_model.state_mean)


def test_an_estimator_of_ones_own_is_saved(tmp_path):
    own = estimators.make("tpx", baseline=estimators.baselines.leave_one_out)
    make(estimator=own).learn(16).save(tmp_path / "agent")
    assert DAAPPO.load(tmp_path / "agent", env=Point()).learn(16).estimator == own


def test_another_environment_is_rewound_after_set_env():
    agent = make(action_source="rewind").learn(16)
    other = vector(1)
    agent.set_env(other)
    agent.learn(16)
    assert agent.source.env is agent.get_env() and agent.source.env.envs is other.envs


class Ending(Point):
    """Terminates after some steps, and nowhere else."""

    def __init__(self, length):
        self.length = length

    def step(self, action):
        observation, reward, _, truncated, info = super().step(action)
        return observation, reward, self.time == self.length, truncated, info


@pytest.mark.parametrize("source", ["dynamics", "states"])
@pytest.mark.parametrize("ends", [True, False])
def test_terminations_reach_the_model_and_the_log(source, ends):
    agent = make(Ending(3 if ends else 99), action_source=source, timeout_bootstrap=False)
    dumps = logged(agent)
    agent.learn(32)
    agent.dump_logs()
    assert bool(agent.value_model.terminates) == ends
    assert ("dynamics/termination_loss" in dumps[-1]) == ends
    extra = agent.rollout_buffer.extra
    assert (extra.weights is not None) == (ends and source == "states")
    kept = agent.source.transitions
    expected = [ends and t % 3 == 2 for t in range(32)]
    assert kept.terminated[: len(kept)].tolist() == expected


def test_q_networks_learn_from_returns_that_stop_where_the_episode_does(monkeypatch):
    agent = make(Ending(3), action_source="q", n_steps=12)
    monkeypatch.setattr(DAAPPO, "_train_epochs", lambda agent: None)
    agent.learn(12)
    rollout = agent._rollout()
    rewards = torch.as_tensor(agent.rollout_buffer.rewards[:, 0])
    torch.testing.assert_close(rollout.returns[2::3], rewards[2::3])
    assert not torch.isclose(rollout.returns, rewards)[[0, 1, 3, 4]].any()


def test_files_from_before_terminations_resume(tmp_path):
    """Their transitions do not say which of them terminated, and their models have no such part."""
    agent = make(Ending(3)).learn(32)
    state = agent.state_dict(tmp_path)
    (segment,) = state["files"]
    kind = "replay segment"
    rows = safe_file.read(tmp_path / segment, kind)
    del rows["terminated"]
    safe_file.write(tmp_path / segment, kind, rows)
    given = agent.get_parameters()
    model, optimizer = given["value_model"], given["value_optimizer"]
    given["value_model"] = {k: v for k, v in model.items() if not k.startswith("terminat")}
    kept = set(optimizer["param_groups"][0]["params"])
    given["value_optimizer"] = {
        "state": {k: v for k, v in optimizer["state"].items() if k in kept},
        "param_groups": optimizer["param_groups"][:1],
    }
    other = make(Ending(3), seed=3)
    own = copy.deepcopy(other.value_model.termination.state_dict())
    other.set_parameters(given)
    other.load_state_dict(state, tmp_path)
    assert (other.source.transitions.terminated[:32] == UNKNOWN).all()
    assert not other.value_model.terminates
    probes.assert_same(other.value_model.termination.state_dict(), own)
    probes.assert_same(
        other.value_model.transition.state_dict(), agent.value_model.transition.state_dict()
    )
    other.learn(32)
    assert other.value_model.terminates


@pytest.mark.parametrize("source", SOURCES)
def test_setting_parameters_makes_agents_equal(source):
    agent, other = make(action_source=source).learn(32), make(action_source=source, seed=5)
    other.set_parameters(agent.get_parameters())
    assert_same(other, agent)
