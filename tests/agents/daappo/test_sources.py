"""Sources of extra actions against explicit loops or numbers by hand; what sources own."""

import copy
import dataclasses

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from totalprop.agents.daappo import sources as extra_actions
from totalprop.agents.daappo.sources import (
    SOURCES,
    Behaviour,
    DynamicsSource,
    ExtraActions,
    ModelSource,
    Normalization,
    QSource,
    Returns,
    RewindSource,
    Rollout,
    SourceSettings,
    StatesSource,
)
from totalprop.world_models import mlp_dynamics
from totalprop.world_models.mlp_dynamics import MLPDynamics
from totalprop.world_models.q_networks import QNetworks
from totalprop.world_models.transitions import TransitionBuffer

CPU = torch.device("cpu")
R, K, S, A = 6, 3, 3, 2
LOW, HIGH = np.array([-1.0, -0.5], np.float32), np.array([1.0, 0.5], np.float32)


def policy(*, std=1.0, s=S, low=LOW, high=HIGH):
    """A small random tanh policy whose mean is not close to zero."""
    torch.manual_seed(1)
    observation_space = spaces.Box(-np.inf, np.inf, (s,), np.float32)
    made = ActorCriticPolicy(
        observation_space,
        spaces.Box(low, high),
        lambda _: 0.0,
        net_arch=[8],
        log_std_init=np.log(std),
    )
    with torch.no_grad():
        made.action_net.weight.normal_(0, 0.5)
        made.action_net.bias.normal_(0, 0.5)
        made.value_net.bias.fill_(0.7)
    return made


def behaviour(made, normalization=None, seed=3):
    return Behaviour(
        made, normalization or Normalization(None, CPU), torch.Generator().manual_seed(seed)
    )


SETTINGS = SourceSettings(
    state_size=S, action_size=A, state_dtype=np.float32, device=CPU, seed=0,
    timeout_bootstrap=True, target="delta", normalise=True, width=4, activation="relu", n_q=2,
    q_target="return", q_learning_rate=1e-2, learning_rate=1e-2, eps=1e-5, batch_size=8,
    q_batch_size=4, buffer_size=20,
)  # fmt: skip


def source_of(kind, model):
    """A source with the given model."""
    source = kind(SETTINGS)
    source.model = model
    return source


def model():
    torch.manual_seed(2)
    made = MLPDynamics(S, A, width=16)
    made.reward_std.fill_(2.0)
    for network in (made.transition, made.reward):
        for i, part in enumerate(network):
            if isinstance(part, torch.nn.ReLU):  # smooth, for finite differences
                network[i] = torch.nn.Tanh()
    return made


def rollout(normalization=None, rows=R):
    """Its values are not the critic's, so that a source that predicted them again would fail."""
    states = torch.randn(rows, S, generator=torch.Generator().manual_seed(5))
    observations = states if normalization is None else normalization.observation(states)
    return seen(observations, states, torch.linspace(-1, 1, rows))


def seen(observations, states, values):
    """A rollout whose actions, returns and advantages are NaN: only fits may read them."""
    nan = torch.full((len(values), A + 2), torch.nan)
    return Rollout(observations, states, values, nan[:, :A], nan[:, A], nan[:, A + 1])


def normalizer(**settings):
    """VecNormalize with nontrivial statistics and narrow clipping."""

    class Still(gym.Env):
        observation_space = spaces.Box(-np.inf, np.inf, (S,), np.float32)
        action_space = spaces.Box(LOW, HIGH)

    made = VecNormalize(DummyVecEnv([Still]), clip_obs=1.0, clip_reward=0.6, **settings)
    if made.norm_obs:
        made.obs_rms.mean, made.obs_rms.var = np.array([0.3, -0.2, 0.1]), np.array([4.0, 0.25, 1.0])
    made.ret_rms.var = np.array(9.0)
    return made


# Returns, normalization, the policy


def expected_advantage(rewards, values, continuations, gamma, lam):
    """The mean over all lengths that the episode may have, each with its probability."""
    total, alive = 0, 1
    for n, c in enumerate(continuations, 1):
        ended = [*values[:n], torch.zeros_like(values[0])]
        p = alive * (1 - c)
        total = total + p * lambda_advantage(rewards[:n], ended, gamma, lam)
        alive = alive * c
    return total + alive * lambda_advantage(rewards, values, gamma, lam)


def lambda_advantage(rewards, values, gamma, lam):
    """The λ-weighted mean of n-step returns minus the baseline, an equivalent form."""
    horizon = len(rewards)
    returns = [
        sum(gamma**i * rewards[i] for i in range(n)) + gamma**n * values[n]
        for n in range(1, horizon + 1)
    ]
    mixed = sum((1 - lam) * lam ** (n - 1) * returns[n - 1] for n in range(1, horizon))
    return mixed + lam ** (horizon - 1) * returns[-1] - values[0]


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("horizon", [1, 2, 5])
def test_advantage_is_the_lambda_return_less_the_baseline(lam, horizon):
    torch.manual_seed(0)
    rewards = list(torch.randn(horizon, 4).double())
    values = list(torch.randn(horizon + 1, 4).double())
    found = Returns(0.9, lam, horizon).advantage(rewards, values)
    torch.testing.assert_close(found, lambda_advantage(rewards, values, 0.9, lam))


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("horizon", [1, 2, 5])
def test_advantage_is_the_mean_over_where_the_episode_ends(lam, horizon):
    torch.manual_seed(0)
    rewards = list(torch.randn(horizon, 4).double())
    values = list(torch.randn(horizon + 1, 4).double())
    continuations = list(torch.rand(horizon, 4).double())
    found = Returns(0.9, lam, horizon).advantage(rewards, values, continuations)
    expected = expected_advantage(rewards, values, continuations, 0.9, lam)
    torch.testing.assert_close(found, expected)
    sure = [torch.ones_like(c) for c in continuations]
    plain = Returns(0.9, lam, horizon).advantage(rewards, values)
    torch.testing.assert_close(Returns(0.9, lam, horizon).advantage(rewards, values, sure), plain)


@pytest.mark.parametrize("norm_obs", [True, False])
@pytest.mark.parametrize("norm_reward", [True, False])
def test_normalization_is_vec_normalizes(norm_obs, norm_reward):
    vec = normalizer(norm_obs=norm_obs, norm_reward=norm_reward)
    normalization = Normalization(vec, CPU)
    states, rewards = np.random.default_rng(0).normal(size=(2, 50, S)).astype(np.float32)
    rewards = 4 * rewards[:, 0]
    found = normalization.observation(torch.as_tensor(states))
    np.testing.assert_allclose(found, vec.normalize_obs(states), rtol=1e-5, atol=1e-6)
    found = normalization.reward(torch.as_tensor(rewards))
    np.testing.assert_allclose(found, vec.normalize_reward(rewards), rtol=1e-5, atol=1e-6)


def test_normalization_is_frozen():
    vec = normalizer()
    normalization, states = Normalization(vec, CPU), torch.ones(1, S)
    before = normalization.observation(states), normalization.reward(torch.ones(1))
    vec.obs_rms.mean[:] = 50.0
    vec.ret_rms.var = np.array(1e4)
    assert torch.equal(normalization.observation(states), before[0])
    assert torch.equal(normalization.reward(torch.ones(1)), before[1])


def test_draws_have_the_policys_log_probabilities_and_moments():
    made = policy(std=0.6)
    observations = torch.randn(3, S)
    actions, log_prob = behaviour(made).draw(observations, 4000)
    assert actions.shape == (3, 4000, A) and log_prob.shape == (3, 4000)
    for i in range(3):
        _, expected, _ = made.evaluate_actions(observations[i].expand(4000, S), actions[i])
        torch.testing.assert_close(log_prob[i], expected)
    mean = made.get_distribution(observations).distribution.mean
    # N = 4000, seed 3, 4 standard errors
    assert ((actions.mean(1) - mean).abs() < 4 * 0.6 / 4000**0.5).all()
    assert ((actions.std(1) - 0.6).abs() < 4 * 0.6 / 8000**0.5).all()


def test_actions_are_clipped_in_single_precision_whatever_the_space_has():
    made = policy(low=LOW.astype(np.float64), high=HIGH.astype(np.float64))
    made.action_space = spaces.Box(
        LOW.astype(np.float64), HIGH.astype(np.float64), dtype=np.float64
    )
    clipped = behaviour(made).clip(torch.tensor([[3.0, -3.0]]))
    assert clipped.dtype == torch.float32 and clipped.tolist() == [[1.0, -0.5]]


# The learned model


def explicit(made, network, data, returns, normalization, seed=3, rows=R, k=K):
    """Actions and advantages in plain loops, one action at a time; some actions are clipped."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(rows, k, A, generator=generator)
    later = [torch.randn(rows * k, A, generator=generator) for _ in range(returns.horizon - 1)]
    std = made.log_std.exp()
    low, high = torch.as_tensor(LOW), torch.as_tensor(HIGH)
    advantages, actions, is_clipped = torch.zeros(rows, k), torch.zeros(rows, k, A), False

    def mean(observation):
        return made.action_net(made.mlp_extractor(observation[None])[0])[0]

    for i in range(rows):
        for j in range(k):
            state, observation = data.states[i], data.observations[i]
            rewards, values = [], [data.values[i]]
            for step in range(returns.horizon):
                noise = first[i, j] if step == 0 else later[step - 1][i * k + j]
                action = mean(observation) + std * noise
                if step == 0:
                    actions[i, j] = action
                bounded = action.clamp(low, high)
                is_clipped |= not torch.equal(bounded, action)
                state, reward = network(state, bounded)
                observation = normalization.observation(state)
                rewards.append(normalization.reward(reward))
                values.append(made.predict_values(observation[None])[0, 0])
            advantages[i, j] = lambda_advantage(rewards, values, returns.gamma, returns.lam)
    assert is_clipped
    return actions, advantages


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("horizon", [1, 4])
def test_dynamics_equals_an_explicit_loop(horizon, gradient, normalised):
    made, network, returns = policy(), model(), Returns(0.9, 0.8, horizon)
    normalization = Normalization(normalizer() if normalised else None, CPU)
    data = rollout(normalization)
    extra = source_of(DynamicsSource, network)(
        data, behaviour(made, normalization), K, returns, gradient=gradient
    )
    with torch.no_grad():
        actions, advantages = explicit(made, network, data, returns, normalization)
    torch.testing.assert_close(extra.actions, actions)
    torch.testing.assert_close(extra.advantages, advantages, rtol=1e-4, atol=1e-5)
    wide = data.observations.repeat_interleave(K, 0)
    _, log_prob, _ = made.evaluate_actions(wide, actions.flatten(0, 1))
    torch.testing.assert_close(extra.old_log_prob.flatten(), log_prob)
    assert extra.observations is None and (extra.action_gradient is not None) == gradient
    assert not any(x.requires_grad for x in extra if x is not None)
    assert all(p.grad is None for p in (*made.parameters(), *network.parameters()))


@pytest.mark.parametrize("horizon", [1, 4])
def test_action_gradient_equals_finite_differences(horizon):
    """The gradient runs through the model and the policy's later actions, whose noise is fixed."""
    made, network, returns, data = policy(std=0.5), model(), Returns(0.9, 0.8, horizon), rollout()
    source = source_of(DynamicsSource, network)
    extra = source(data, behaviour(made), K, returns, gradient=True)
    states, start = data.states.repeat_interleave(K, 0), data.values.repeat_interleave(K)

    def advantage(actions):
        again = behaviour(made)
        again.draw(data.observations, K)  # the same noise for what follows
        with torch.no_grad():
            return source._advantage(states, actions.flatten(0, 1), start, again, returns)

    torch.testing.assert_close(advantage(extra.actions).view(R, K), extra.advantages)
    eps, checked = 1e-2, 0
    for d in range(A):
        shift = torch.zeros(A)
        shift[d] = eps
        slope = (advantage(extra.actions + shift) - advantage(extra.actions - shift)) / (2 * eps)
        found, action = extra.action_gradient[..., d], extra.actions[..., d]
        inside = (action > LOW[d] + eps) & (action < HIGH[d] - eps)
        outside = (action < LOW[d]) | (action > HIGH[d])
        assert inside.any() and outside.any()
        assert (found[outside] == 0).all()
        error = (slope.view(R, K) - found)[inside].abs()
        checked += int(inside.sum())
        # A later action may cross its bound between the two points.
        assert error.median() < 1e-3 and (error < 5e-2).all()
        assert found[inside].abs().median() > 0.02
    assert checked > 10


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(("horizon", "std"), [(1, 1.0), (4, 1e-9)])
def test_chunks_change_nothing_but_the_order_of_later_noise(monkeypatch, gradient, horizon, std):
    """With a single step, or with almost no noise, nothing changes at all."""
    made, network, data = policy(std=std), model(), rollout()

    def extra():
        returns = Returns(0.9, 0.8, horizon)
        return source_of(DynamicsSource, network)(
            data, behaviour(made), K, returns, gradient=gradient
        )

    whole = extra()
    monkeypatch.setattr(extra_actions, "ROWS", 5)
    for found, expected in zip(extra(), whole):
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected)


def sources():
    torch.manual_seed(4)
    q = QNetworks(S, A, width=8)
    return {
        "dynamics": source_of(DynamicsSource, model()),
        "states": source_of(StatesSource, model()),
        "q": source_of(QSource, q),
    }


@pytest.mark.parametrize("name", ["dynamics", "states", "q"])
def test_global_generators_are_left_alone_and_the_own_one_decides(name):
    made, data, source = policy(), rollout(), sources()[name]
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()

    def draw(seed):
        return source(data, behaviour(made, seed=seed), K, Returns(0.9, 0.8, 3), gradient=False)

    first, again, other = draw(0), draw(0), draw(1)
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)
    assert torch.equal(first.advantages, again.advantages)
    assert torch.equal(first.actions, again.actions)
    assert not torch.equal(first.actions, other.actions)


# The simulated states


class Sum:
    """s' = s + a with reward s_0 + 10 a_1; an episode goes on with probability σ(a_0)."""

    def __init__(self, terminates=False):
        self.terminates = terminates

    def __call__(self, states, actions):
        return states + actions, states[..., 0] + 10 * actions[..., 1]

    def continuation(self, states, actions):
        return actions[..., 0].sigmoid()


def test_states_are_the_later_pairs_of_one_rollout_of_k_plus_2_steps():
    """The model is s' = s + a with reward s_0 + 10 a_1; values are worked out from the noise."""
    made, gamma, lam = policy(s=2), 0.9, 0.8
    data = seen(torch.randn(R, 2), torch.randn(R, 2), torch.full((R,), 99.0))
    source = source_of(StatesSource, Sum())
    extra = source(data, behaviour(made), K, Returns(gamma, lam, 99), gradient=False)
    generator = torch.Generator().manual_seed(3)
    state, observation = data.states, data.observations
    trace = []
    with torch.no_grad():
        for _ in range(K + 2):
            mean = made.action_net(made.mlp_extractor(observation)[0])
            action = mean + made.log_std.exp() * torch.randn(R, A, generator=generator)
            value = made.predict_values(observation)[:, 0]
            log_prob = made.evaluate_actions(observation, action)[1]
            bounded = action.clamp(torch.as_tensor(LOW), torch.as_tensor(HIGH))
            reward = state[:, 0] + 10 * bounded[:, 1]
            trace.append((observation, action, log_prob, reward, value))
            state = observation = state + bounded
        last = made.predict_values(observation)[:, 0]
    assert extra.observations.shape == (R, K, 2)
    for j in range(K):
        observation, action, log_prob = trace[j + 1][:3]
        torch.testing.assert_close(extra.observations[:, j], observation)
        torch.testing.assert_close(extra.actions[:, j], action)
        torch.testing.assert_close(extra.old_log_prob[:, j], log_prob)
        rewards = [step[3] for step in trace[j + 1 :]]
        values = [step[4] for step in trace[j + 1 :]] + [last]
        expected = lambda_advantage(rewards, values, gamma, lam)
        torch.testing.assert_close(extra.advantages[:, j], expected, rtol=1e-4, atol=1e-4)


def test_states_are_normalised_as_the_policy_sees_them():
    normalization, network = Normalization(normalizer(), CPU), model()
    data, made = rollout(normalization), policy()
    extra = source_of(StatesSource, network)(
        data, behaviour(made, normalization), 1, Returns(0.9, 0.8, 9), gradient=False
    )
    action = behaviour(made).draw(data.observations)[0]
    state, _ = network(data.states, behaviour(made).clip(action))
    torch.testing.assert_close(extra.observations[:, 0], normalization.observation(state))


# The Q-network


def test_q_by_hand():
    """Q = min(2 + a_0, 2 - a_0) = 2 - |a_0| at the clipped action; the baseline is V."""
    made = policy()
    q = QNetworks(S, A, width=4)
    for i, sign in enumerate((1.0, -1.0)):
        q.networks[i] = torch.nn.Linear(S + A, 1)
        with torch.no_grad():
            q.networks[i].weight.zero_()[0, S] = sign
            q.networks[i].bias.fill_(2.0)
    data = rollout()
    extra = source_of(QSource, q)(data, behaviour(made), K, Returns(0.9, 0.8, 3), gradient=True)
    action = extra.actions[..., 0]
    expected = 2 - action.clamp(-1, 1).abs() - data.values[:, None]
    torch.testing.assert_close(extra.advantages, expected)
    inside = action.abs() < 1
    assert inside.any() and not inside.all()
    slope = torch.where(inside, -action.sign(), 0.0)
    assert torch.equal(extra.action_gradient[..., 0], slope)
    assert torch.equal(extra.action_gradient[..., 1], torch.zeros_like(slope))


def test_networks_of_advantages_are_not_compared_with_the_critic():
    source, data = sources()["q"], rollout()
    source.settings = dataclasses.replace(SETTINGS, q_target="advantage")
    extra = source(data, behaviour(policy()), K, Returns(0.9, 0.8, 3), gradient=False)
    observations = data.observations[:, None].expand(-1, K, -1)
    expected = source.model(observations, behaviour(policy()).clip(extra.actions))
    torch.testing.assert_close(extra.advantages, expected)


def test_q_networks_have_a_step_size_of_their_own():
    settings = dataclasses.replace(SETTINGS, q_learning_rate=0.5, learning_rate=0.25)
    for name, rate in (("q", 0.5), ("dynamics", 0.25)):
        assert SOURCES[name](settings).optimizer.param_groups[0]["lr"] == rate


def test_q_sees_what_the_policy_sees():
    normalization, source = Normalization(normalizer(), CPU), sources()["q"]
    data, made = rollout(normalization), policy()
    extra = source(data, behaviour(made, normalization), K, Returns(0.9, 0.8, 3), gradient=False)
    for j in range(K):
        bounded = behaviour(made).clip(extra.actions[:, j])
        expected = source.model(data.observations, bounded) - data.values
        torch.testing.assert_close(extra.advantages[:, j], expected)
    assert extra.action_gradient is None


# Termination


@pytest.mark.parametrize("horizon", [1, 3])
def test_dynamics_weighs_what_follows_by_the_probability_that_it_does(horizon):
    made, returns = policy(s=2), Returns(0.9, 0.8, horizon)
    data = seen(torch.randn(R, 2), torch.randn(R, 2), torch.linspace(-1, 1, R))
    source = source_of(DynamicsSource, Sum(terminates=True))
    extra = source(data, behaviour(made), K, returns, gradient=True)
    again = behaviour(made)
    actions, _ = again.draw(data.observations, K)
    first = actions.flatten(0, 1).requires_grad_()
    state, action = data.states.repeat_interleave(K, 0), first
    rewards, values, continuations = [], [data.values.repeat_interleave(K)], []
    for step in range(horizon):
        bounded = again.clip(action)
        rewards.append(state[:, 0] + 10 * bounded[:, 1])
        continuations.append(1 / (1 + torch.exp(-bounded[:, 0])))
        state = state + bounded
        values.append(again.value(state))
        if step + 1 < horizon:
            action, _ = again.draw(state)
    expected = expected_advantage(rewards, values, continuations, 0.9, 0.8)
    torch.testing.assert_close(extra.advantages.flatten(), expected.detach(), rtol=1e-4, atol=1e-4)
    (slope,) = torch.autograd.grad(expected.sum(), first)
    torch.testing.assert_close(extra.action_gradient.flatten(0, 1), slope, rtol=1e-4, atol=1e-4)
    assert extra.weights is None


def test_simulated_states_count_by_the_probability_that_the_episode_lasts_to_them():
    made, data = policy(s=2), seen(torch.randn(R, 2), torch.randn(R, 2), torch.zeros(R))
    source = source_of(StatesSource, Sum(terminates=True))
    extra = source(data, behaviour(made), K, Returns(0.9, 0.8, 99), gradient=False)
    again, state = behaviour(made), data.states
    observation, trace = data.observations, []
    with torch.no_grad():
        for _ in range(K + 2):
            bounded = again.clip(again.draw(observation)[0])
            reward, value = state[:, 0] + 10 * bounded[:, 1], again.value(observation)
            trace.append((reward, value, bounded[:, 0].sigmoid()))
            state = observation = state + bounded
        rewards, values, continuations = map(list, zip(*trace))
        values.append(again.value(observation))
    for j in range(K):
        lasts = torch.stack(continuations[: j + 1]).prod(0)
        torch.testing.assert_close(extra.weights[:, j], lasts)
        rest = rewards[j + 1 :], values[j + 1 :], continuations[j + 1 :]
        expected = expected_advantage(*rest, 0.9, 0.8)
        torch.testing.assert_close(extra.advantages[:, j], expected, rtol=1e-4, atol=1e-4)


class Cliff(gym.Env):
    """x += a, reward 1; beyond x = 1 the episode terminates. It can be rewound."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    x = 0.0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.time = float(self.np_random.uniform(-1, 1)), 0
        return np.float32([self.x]), {}

    def step(self, action):
        self.x, self.time = self.x + float(action[0]), self.time + 1
        return np.float32([self.x]), 1.0, self.x > 1, self.time == 50, {}

    def snapshot(self):
        return self.x, self.time

    def restore(self, state):
        self.x, self.time = state

    def extra_step(self, action):
        return self.step(action)


@pytest.mark.parametrize("name", ["dynamics", "q", "rewind"])
def test_actions_that_end_the_episode_are_worth_what_rewinding_says(name):
    """With a critic of V = 7, that is 1 - 7 = -6 of an action that ends the episode at once.

    A model that ignored the end would say 1 + 0.9 · 7 - 7 = 0.3, and the more the longer it went.
    """
    settings = dataclasses.replace(
        SETTINGS, state_size=1, action_size=1, width=32, batch_size=64, q_batch_size=64,
        buffer_size=800,
    )  # fmt: skip
    one = np.ones(1, np.float32)
    made = policy(std=0.8, s=1, low=-one, high=one)
    with torch.no_grad():
        for layer in (made.value_net, made.action_net):
            layer.weight.zero_(), layer.bias.zero_()
        made.value_net.bias.fill_(7.0)
    vec = DummyVecEnv([Cliff])
    vec.seed(0)
    source, acts = SOURCES[name](settings), behaviour(made)
    last, rows = vec.reset(), []
    source.start_rollout(vec)
    for _ in range(800):
        with torch.no_grad():
            action = acts.clip(acts.draw(torch.as_tensor(last))[0]).numpy()
        new, reward, done, info = vec.step(action)
        end = info[0]["terminal_observation"][None] if done[0] else new
        terminated = done & (not info[0]["TimeLimit.truncated"])
        source.record_step(last, action, reward, end, terminated)
        rows.append((last[0], action[0], reward[0] + 0.9 * 7 * (1 - terminated[0])))
        last = new
    states, actions, returns = (torch.as_tensor(np.array(x, np.float32)) for x in zip(*rows))
    data = Rollout(states, states, torch.full((800,), 7.0), actions, returns, returns - 7)
    source.fit(data, acts, steps=600)
    horizon = 1 if name == "q" else 3
    found = source(data, acts, 1, Returns(0.9, 0.8, horizon), gradient=False)
    ends = (states + acts.clip(found.actions[:, 0]))[:, 0]
    at_once, later = found.advantages[ends > 1.1, 0], found.advantages[ends < 0, 0]
    tolerance = {"dynamics": 0.3, "q": 0.3, "rewind": 1e-4}[name]
    assert float(at_once.mean()) == pytest.approx(-6, abs=tolerance)
    assert float(later.mean()) > -1.5


# The environment, rewound


class Walk(gym.Env):
    """x += a_0 (clipped by the caller), reward 10 t + x + noise; ends after 4 steps.

    It observes (x, t, 0). Its snapshots include the noise's generator and the episode's number.
    """

    observation_space = spaces.Box(-np.inf, np.inf, (S,), np.float32)
    action_space = spaces.Box(LOW, HIGH)

    def __init__(self, end="terminated"):
        self.end, self.extra, self.fail_at = end, 0, None
        self.x, self.t, self.episode = 0.0, 0, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t, self.episode = 0.0, 0, self.episode + 1
        return self._look(), {}

    def _look(self):
        return np.array([self.x, self.t, 0], np.float32)

    def step(self, action):
        assert self.action_space.contains(action)
        assert self.t < 4, "stepped after the end"
        self.x, self.t = self.x + float(action[0]), self.t + 1
        reward = 10.0 * self.t + self.x + float(self.np_random.normal())
        over = self.t == 4
        return (
            self._look(),
            reward,
            over and self.end != "truncated",
            over and self.end != "terminated",
            {},
        )

    def snapshot(self):
        return self.x, self.t, self.episode, copy.deepcopy(self.np_random.bit_generator.state)

    def restore(self, state):
        self.x, self.t, self.episode = state[:3]
        self.np_random.bit_generator.state = copy.deepcopy(state[3])

    def extra_step(self, action):
        self.extra += 1
        if self.extra == self.fail_at:
            raise RuntimeError("broken")
        return self.step(action)


def recorded(ends=("terminated",), steps=6, **changes):
    """A vector environment after `steps`, a source that recorded them, and the rollout."""
    vec = DummyVecEnv([lambda end=end: Walk(end) for end in ends])
    vec.seed(0)
    observations, states = vec.reset(), []
    source = RewindSource(dataclasses.replace(SETTINGS, **changes))
    source.start_rollout(vec)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        states.append(observations)
        actions = rng.uniform(LOW, HIGH, (len(ends), A)).astype(np.float32)
        observations, rewards = vec.step(actions)[:2]
        source.record_step(states[-1], actions, rewards, observations, np.zeros(len(ends), bool))
    states = torch.as_tensor(np.concatenate(np.stack(states, 1)))
    return vec, source, seen(states, states, torch.linspace(-3, 3, len(states)))


@pytest.mark.parametrize("horizon", [1, 3, 9])
@pytest.mark.parametrize("timeout_bootstrap", [True, False])
@pytest.mark.parametrize(
    "ends", [("terminated",), ("truncated",), ("both",), ("truncated", "terminated")]
)
def test_rewind_gives_true_rewards_and_values(ends, timeout_bootstrap, horizon):
    made, returns = policy(), Returns(0.9, 0.8, horizon)
    vec, source, data = recorded(ends, timeout_bootstrap=timeout_bootstrap)
    extra = source(data, behaviour(made), K, returns, gradient=False)

    generator = torch.Generator().manual_seed(3)
    first = torch.randn(len(data.states), K, A, generator=generator)
    row = steps = 0
    for end, kept in zip(ends, source.snapshots):
        for snapshot in kept[:-1]:
            for j in range(K):
                env = Walk(end)
                env.np_random  # noqa: B018  # makes the generator
                env.restore(snapshot)
                rewards, values, noise = [], [data.values[row]], first[row, j]
                observation = torch.as_tensor(env._look())
                for _ in range(horizon):
                    with torch.no_grad():
                        mean = made.action_net(made.mlp_extractor(observation[None])[0])[0]
                    action = (mean + made.log_std.exp() * noise).detach()
                    if not rewards:
                        torch.testing.assert_close(extra.actions[row, j], action)
                    bounded = action.numpy().clip(LOW, HIGH)
                    state, reward, terminated, truncated, _ = env.step(bounded)
                    observation, steps = torch.as_tensor(state), steps + 1
                    value = made.predict_values(observation[None])[0, 0].detach()
                    is_end = terminated or (truncated and not timeout_bootstrap)
                    rewards.append(reward)
                    values.append(0.0 if is_end else value)
                    if terminated or truncated:
                        break
                    noise = torch.randn(1, A, generator=generator)[0]
                expected = lambda_advantage(rewards, values, 0.9, 0.8)
                assert float(extra.advantages[row, j]) == pytest.approx(
                    float(expected), rel=1e-4, abs=1e-3
                )
            row += 1
    assert source.extra_steps == steps == sum(env.extra for env in vec.envs)
    assert steps == row * K if horizon == 1 else row * K < steps < row * K * horizon
    assert extra.action_gradient is None and extra.observations is None


@pytest.mark.parametrize("fail_at", [None, 1, 10, 23])
def test_rewind_leaves_the_environments_where_they_were(fail_at):
    vec, source, data = recorded(("truncated", "terminated"))
    before = vec.env_method("snapshot")
    vec.envs[1].fail_at = fail_at

    def ask():
        return source(data, behaviour(policy()), K, Returns(0.9, 0.8, 2), gradient=False)

    if fail_at is None:
        ask()
    else:
        with pytest.raises(RuntimeError, match="broken"):
            ask()
    assert vec.env_method("snapshot") == before


def test_rewind_gives_actions_in_the_spaces_own_precision():
    class Double(Walk):
        action_space = spaces.Box(LOW.astype(np.float64), HIGH.astype(np.float64), dtype=np.float64)

        def step(self, action):
            assert action.dtype == np.float64
            return super().step(action)

    vec = DummyVecEnv([Double])
    vec.reset()
    source = RewindSource(SETTINGS)
    source.start_rollout(vec)
    one = np.zeros((1, S))
    source.record_step(one, np.zeros((1, A)), np.zeros(1), one, np.zeros(1, bool))
    data = seen(torch.zeros(1, S), torch.zeros(1, S), torch.zeros(1))
    source(data, behaviour(policy()), K, Returns(0.9, 0.8, 2), gradient=False)


def test_rewind_normalises_like_vec_normalize():
    vec, source, data = recorded()
    normalization, made = Normalization(normalizer(), CPU), policy()
    data = data._replace(observations=normalization.observation(data.states))
    extra = source(data, behaviour(made, normalization), 1, Returns(0.9, 0.8, 1), gradient=False)
    for row, snapshot in enumerate(source.snapshots[0][:-1]):
        env = vec.envs[0]
        env.restore(snapshot)
        state, reward, over, _, _ = env.step(extra.actions[row, 0].numpy().clip(LOW, HIGH))
        value = made.predict_values(normalization.observation(torch.as_tensor(state)[None]))[0, 0]
        target = min(reward / 3, 0.6) + 0.9 * float(value.detach()) * (not over)
        assert float(extra.advantages[row, 0]) == pytest.approx(
            target - float(data.values[row]), abs=1e-4
        )


# What sources own


NAMES = [name for name, kind in SOURCES.items() if kind is not None]


def transitions(n, seed=0):
    rng = np.random.default_rng(seed)
    sizes = ((n, S), (n, A), (n,), (n, S))
    rows = [rng.normal(size=size).astype(np.float32) for size in sizes]
    return [*rows, rng.random(n) < 0.3]


def full(name, n=30):
    """A source that has recorded `n` transitions, of which it keeps the last 20."""
    source = SOURCES[name](SETTINGS)
    if source.needs_snapshots:
        vec = DummyVecEnv([Walk])
        vec.seed(0)
        vec.reset()
        source.start_rollout(vec)
    source.record_step(*transitions(n))
    return source


def whole_rollout():
    data = rollout()
    g = torch.Generator().manual_seed(6)
    return data._replace(
        actions=3 * torch.randn(R, A, generator=g),
        returns=torch.randn(R, generator=g),
        advantages=torch.randn(R, generator=g),
    )


def weights(source):
    return torch.nn.utils.parameters_to_vector(source.model.parameters()).detach().clone()


def test_sources_say_what_they_are():
    found = {
        name: (kind.is_differentiable, kind.draws_per_state, kind.needs_snapshots)
        for name, kind in SOURCES.items()
        if kind is not None
    }
    assert found == {
        "dynamics": (True, True, False),
        "q": (True, True, False),
        "rewind": (False, True, True),
        "states": (False, False, False),
    }
    steps = {name: SOURCES[name](SETTINGS).extra_steps for name in NAMES}
    assert steps == {"dynamics": None, "q": None, "rewind": 0, "states": None}


@pytest.mark.parametrize("name", ["dynamics", "states", "q"])
def test_a_seed_decides_the_model_and_the_global_generator_does_not(name):
    torch.manual_seed(8)
    state = torch.get_rng_state()
    first = SOURCES[name](SETTINGS)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    again, other = (SOURCES[name](dataclasses.replace(SETTINGS, seed=seed)) for seed in (0, 1))
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))
    group = first.optimizer.param_groups[0]
    assert (group["lr"], group["eps"]) == (SETTINGS.learning_rate, SETTINGS.eps)


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_given_later_is_that_of_both_generators(name):
    first, second = (SOURCES[name](dataclasses.replace(SETTINGS, seed=seed)) for seed in (0, 1))
    assert first.rng.random() != second.rng.random()
    for source in (first, second):
        source.set_random_seed(4)
    assert torch.equal(first.generator.get_state(), second.generator.get_state())
    assert first.rng.random() == second.rng.random()


@pytest.mark.parametrize("name", ["dynamics", "states"])
def test_a_dynamics_model_is_fitted_to_all_transitions_kept(name):
    source, reference = full(name), MLPDynamics(S, A, width=4)
    reference.load_state_dict(source.model.state_dict())
    buffer = TransitionBuffer(20, S, A)
    buffer.add(*transitions(30))
    optimizer = torch.optim.Adam(reference.parameters(), SETTINGS.learning_rate, eps=SETTINGS.eps)
    expected = mlp_dynamics.fit(
        reference, optimizer, buffer, steps=3, batch_size=8, rng=np.random.default_rng(0)
    )
    losses = source.fit(whole_rollout(), behaviour(policy()), steps=3)
    assert losses == expected and set(losses) == {
        "transition_loss", "reward_loss", "termination_loss"
    }  # fmt: skip
    for found, wanted in zip(source.model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("target", ["return", "advantage"])
def test_q_networks_are_fitted_to_returns_or_advantages_of_clipped_actions(target):
    source, data = full("q"), whole_rollout()
    source.settings = dataclasses.replace(SETTINGS, q_target=target)
    reference = copy.deepcopy(source.model)
    optimizer = torch.optim.Adam(reference.parameters(), SETTINGS.learning_rate, eps=SETTINGS.eps)
    clipped = data.actions.clamp(torch.as_tensor(LOW), torch.as_tensor(HIGH))
    assert not torch.equal(clipped, data.actions)
    expected = reference.fit(
        optimizer, data.observations, clipped,
        data.returns if target == "return" else data.advantages,
        steps=3, batch_size=4, rng=np.random.default_rng(0),
    )  # fmt: skip
    assert source.fit(data, behaviour(policy()), steps=3) == {"q_loss": expected}
    for found, wanted in zip(source.model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(found, wanted)


def test_rewinding_learns_nothing():
    source = full("rewind")
    assert source.fit(whole_rollout(), behaviour(policy()), steps=3) == {}
    assert source.model is None and source.optimizer is None


@pytest.mark.parametrize("name", NAMES)
def test_state_is_restored(name, tmp_path):
    source, other = full(name), SOURCES[name](dataclasses.replace(SETTINGS, seed=5))
    source.rng.random(3), torch.randn(3, generator=source.generator)
    if name == "rewind":
        source.extra_steps = 7
    state = source.state_dict(tmp_path)
    keys = {"generator", "rng", "files"} | ({"extra_steps"} if name == "rewind" else set())
    fits_a_model = isinstance(source, ModelSource)
    assert set(state) == keys | ({"transitions"} if fits_a_model else set())
    assert [path.name for path in tmp_path.iterdir()] == state["files"]
    other.load_state_dict(state, tmp_path)
    assert other.extra_steps == source.extra_steps
    assert other.rng.random() == source.rng.random()
    assert torch.equal(other.generator.get_state(), source.generator.get_state())
    if not fits_a_model:  # transitions would be stored for nothing
        assert state["files"] == [] and not hasattr(source, "transitions")
        return
    assert other.transitions.count == 30
    found, expected = (x.transitions.rows(10, 30) for x in (other, source))
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value)


# The record


@pytest.mark.parametrize("k", [2, 5])
def test_leave_one_out_subtracts_the_mean_of_the_other_actions(k):
    torch.manual_seed(0)
    advantages = torch.randn(R, k, dtype=torch.float64) + 5
    actions, slope = torch.randn(2, R, k, A)
    extra = ExtraActions(actions, torch.randn(R, k), advantages, slope)
    found = extra.leave_one_out()
    for r in range(R):
        for i in range(k):
            others = [float(advantages[r, j]) for j in range(k) if j != i]
            expected = float(advantages[r, i]) - sum(others) / len(others)
            assert float(found.advantages[r, i]) == pytest.approx(expected, rel=1e-12)
    # No other action depends on this one: its own gradient stays.
    assert found.action_gradient is extra.action_gradient
    assert found.actions is extra.actions and found.old_log_prob is extra.old_log_prob


def test_rows_select_the_same_states_everywhere():
    x = torch.arange(24.0).view(4, 3, 2)
    extra = ExtraActions(x, x[..., 0], x[..., 1], x + 1, x + 2, x[..., 0] + 3)
    rows = torch.tensor([3, 0])
    for found, field in zip(extra.rows(rows), extra):
        assert torch.equal(found, field[rows])
    bare = ExtraActions(x, x[..., 0], x[..., 1]).rows(rows)
    assert bare.action_gradient is None and bare.observations is None and bare.weights is None
