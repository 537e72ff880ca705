"""Discrete and MultiDiscrete actions: their form, and agents that act with them."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv

from tests.agents.contract.probes import logged
from totalprop import estimators
from totalprop.agents import DAAPPO, PIPPS, DreamerTPX
from totalprop.agents.core.spaces import UnsupportedSpaceError
from totalprop.agents.dreamer.actions import Choices, Continuous, action_form
from totalprop.agents.persistence import safe_file

SPACES = {
    "discrete": spaces.Discrete(3),
    "from -1 on": spaces.Discrete(3, start=-1),
    "int32": spaces.Discrete(2, start=5, dtype=np.int32),
    "several": spaces.MultiDiscrete([2, 3]),
    "array": spaces.MultiDiscrete([[2, 3], [4, 1]], start=[[0, -1], [7, 0]], dtype=np.int32),
}
SMALL = {
    "policy_kwargs": {"deter": 5, "hidden": 5, "width": 5, "stoch": 3},
    "sequence_length": 5, "batch_size": 3, "imagination_starts": 6, "horizon": 3,
    "learning_starts": 10, "train_freq": 5, "gradient_steps": 1, "buffer_size": 200,
    "seed": 0, "device": "cpu",
}  # fmt: skip


class Guess(gym.Env):
    """The observation is what was done last; every action is checked and noted."""

    def __init__(self, space: spaces.Space) -> None:
        self.action_space = space
        self.size = int(np.prod(space.shape, dtype=int)) if space.shape is not None else 1
        self.observation_space = spaces.Box(-10, 10, (self.size,), np.float32)
        self.actions: list[np.ndarray] = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return np.zeros(self.size, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        assert np.asarray(action).dtype == self.action_space.dtype
        self.actions.append(np.array(action))
        self.time += 1
        seen = np.ravel(action).astype(np.float32)
        return seen, float(seen.sum()), False, self.time == 6, {}


@pytest.fixture(params=SPACES)
def space(request):
    return SPACES[request.param]


def make(space, **changes):
    return DreamerTPX("DreamerPolicy", Guess(space), **{**SMALL, **changes})


def numbers_of(space):
    """[options of each choice], and the smallest number of each."""
    options = [space.n] if isinstance(space, spaces.Discrete) else np.ravel(space.nvec)
    return [int(n) for n in options], np.ravel(space.start)


# Their form


def test_one_hots_become_numbers_of_the_space(space):
    form = action_form(space)
    assert isinstance(form, Choices)
    options, start = numbers_of(space)
    assert form.sizes == options and form.size == sum(options)
    rng = np.random.default_rng(0)
    picked = np.stack([rng.integers(n, size=50) for n in options], 1)
    one_hots = np.concatenate([np.eye(n)[picked[:, i]] for i, n in enumerate(options)], 1)
    found = form.to_env(one_hots.astype(np.float32))
    assert found.dtype == space.dtype and found.shape == (50, *space.shape)
    np.testing.assert_array_equal(found.reshape(50, -1), picked + start)
    assert all(space.contains(action) for action in found)


def test_a_box_is_scaled_and_cut_to_its_bounds():
    box = spaces.Box(np.array([[-2.0, 0.0]], np.float32), np.array([[4.0, 1.0]], np.float32))
    form = action_form(box)
    assert isinstance(form, Continuous) and form.size == 2
    found = form.to_env(np.array([[-1, -1], [0, 0], [1, 1], [2, -3]], np.float32))
    np.testing.assert_allclose(found[:, 0], [[-2, 0], [1, 0.5], [4, 1], [4, 0]])
    assert found.dtype == np.float32


def test_random_actions_are_uniform():
    """30,000 actions, seed 0: each option's frequency within 4 SE of 1 / n."""
    form, n = Choices(SPACES["several"]), 30_000
    actions = form.random(n, np.random.default_rng(0))
    assert actions.dtype == np.float32 and set(np.unique(actions)) == {0, 1}
    expected = np.array([1 / 2] * 2 + [1 / 3] * 3)
    error = np.sqrt(expected * (1 - expected) / n)
    assert (np.abs(actions.mean(0) - expected) / error).max() <= 4
    np.testing.assert_array_equal(actions[:, :2].sum(1), 1)
    np.testing.assert_array_equal(actions[:, 2:].sum(1), 1)


def test_exploration_replaces_whole_actions_by_uniform_ones():
    """30,000 actions, seed 0, ε = 0.3: changed in 0.3 · 5/6 of all cases, within 4 SE."""
    form, n = Choices(SPACES["several"]), 30_000
    actions = torch.tensor([[1.0, 0, 0, 0, 1]]).expand(n, -1)
    generator = torch.Generator().manual_seed(0)
    torch.testing.assert_close(form.explore(actions, 0.0, generator), actions)
    found = form.explore(actions, 0.3, generator)
    changed = (found != actions).any(1).double().mean()
    assert abs(changed - 0.25) <= 4 * (0.25 * 0.75 / n) ** 0.5
    everywhere = form.explore(actions, 1.0, generator).double().mean(0)
    expected = torch.tensor([1 / 2] * 2 + [1 / 3] * 3, dtype=torch.float64)
    assert ((everywhere - expected).abs() / (expected * (1 - expected) / n).sqrt()).max() <= 4


def test_exploration_of_numbers_adds_noise_within_the_bounds():
    form = Continuous(spaces.Box(-1, 1, (2,)))
    generator, same = (torch.Generator().manual_seed(0) for _ in range(2))
    actions = torch.tensor([[0.0, 0.9]]).expand(1000, -1)
    noise = torch.randn(actions.shape, generator=same)
    found = form.explore(actions, 0.5, generator)
    torch.testing.assert_close(found, (actions + 0.5 * noise).clamp(-1, 1))


# Agents


def test_an_agent_learns_acts_and_is_loaded(space, tmp_path):
    agent = make(space)
    before = {k: v.clone() for k, v in agent.policy.actor.state_dict().items()}
    agent.learn(30)
    env = agent.get_env().envs[0].unwrapped
    assert len(env.actions) == 30
    options, start = numbers_of(space)
    warm_up = np.reshape(env.actions[:10], (10, -1)) - start
    assert all(len(np.unique(column)) > 1 for column, n in zip(warm_up.T, options) if n > 1)
    moved = agent.policy.actor.state_dict()
    assert all((moved[k] != v).any() for k, v in before.items() if not k.startswith("out.bias"))
    assert all(torch.isfinite(v).all() for v in moved.values())
    observations = np.random.default_rng(0).normal(size=(7, env.size)).astype(np.float32)
    one, state = agent.predict(observations[0], deterministic=True)
    many, _ = agent.predict(observations, deterministic=True)
    assert one.shape == space.shape and many.shape == (7, *space.shape)
    assert one.dtype == many.dtype == space.dtype
    assert space.contains(one) and all(space.contains(action) for action in many)
    assert state[2].shape == (1, sum(options)) and state[2].sum() == len(options)  # one-hot
    agent.save(tmp_path / "agent")
    loaded = DreamerTPX.load(tmp_path / "agent", env=Guess(space), device="cpu")
    assert loaded.action_space == space
    np.testing.assert_array_equal(loaded.predict(observations, deterministic=True)[0], many)
    loaded.learn(15)


def test_the_replay_holds_one_hots_of_what_was_done():
    agent = make(SPACES["several"])
    agent.learn(12)
    env = agent.get_env().envs[0].unwrapped
    batch = agent.replay_buffer.sample(20, 5, np.random.default_rng(0))
    actions, observations = batch.action[~batch.is_first], batch.observation[~batch.is_first]
    np.testing.assert_array_equal(agent.policy.to_env(actions.numpy()), observations.numpy())
    assert not batch.action[batch.is_first].any() and len(env.actions) == 12


def test_predictions_go_on_from_the_state_of_before():
    """The state holds the last action, as the filter of `learn` does."""
    agent, steps = make(SPACES["several"]), []
    env = Guess(SPACES["several"])
    observation, _ = env.reset()
    state = None
    latent, action = agent.policy.initial_state(1)
    for _ in range(4):
        chosen, state = agent.predict(observation, state, deterministic=True)
        action, latent = agent.policy.step(
            torch.as_tensor(observation[None]), latent, action, torch.tensor([False]),
            deterministic=True,
        )  # fmt: skip
        np.testing.assert_array_equal(agent.policy.to_env(action.numpy())[0], chosen)
        np.testing.assert_allclose(state[0], latent.deter.numpy(), rtol=1e-6, atol=1e-7)
        observation, *_ = env.step(chosen)
        steps.append(chosen)


def takes(**changes):
    """Whether the constructor does, with choices; else it says why and what to use."""
    try:
        make(SPACES["several"], **changes)
    except ValueError as error:
        return "categorical" not in str(error) or "use estimator" not in str(error)
    return True


@pytest.mark.parametrize("node", ["auto", "latent", "action", "both"])
@pytest.mark.parametrize("name", estimators.names())
def test_every_estimator_learns_or_is_refused_at_once(name, node):
    if takes(estimator=name, node=node):
        agent = make(SPACES["several"], estimator=name, node=node).learn(20)
        assert agent._n_updates > 0
    else:
        assert node != "latent" and name in ("tpg", "ddcg")


def test_a_leg_for_gaussians_is_refused_at_choices():
    biw = estimators.make("tpx", legs="biw")
    with pytest.raises(ValueError, match=r"'biw' needs a Gaussian node.*categorical.*'tpx'"):
        make(SPACES["discrete"], estimator=biw)
    make(SPACES["discrete"], estimator=biw, node="latent")
    make(spaces.Box(-1, 1, (2,)), estimator=biw, node="both")


def test_auto_is_the_latent_for_a_box_and_the_action_for_choices():
    for space, expected in ((spaces.Box(-1, 1, (2,)), "latent"), (SPACES["discrete"], "action")):
        assert make(space)._update_settings().imagination.node == expected
    assert make(SPACES["discrete"], node="both")._update_settings().imagination.node == "both"


def test_the_node_can_be_set_between_calls_of_learn():
    """After it was set, an agent learns what one learns that was made so."""
    box, found = spaces.Box(-1, 1, (2,)), []
    for first, then in (("latent", "action"), ("action", "action"), ("latent", "latent")):
        agent = make(box, node=first, estimator="lr", learning_starts=20)
        agent.learn(19)  # no update yet
        agent.node = then
        agent.learn(11, reset_num_timesteps=False)
        found.append(torch.cat([p.flatten() for p in agent.policy.actor.parameters()]))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_k_is_logged_by_action_and_by_coordinate():
    for node, action, latent in (("latent", 0, 3), ("action", 2, 0), ("both", 2, 3)):
        agent = make(spaces.Box(-1, 1, (2,)), node=node, estimator="lr")
        memory = logged(agent)
        agent.learn(15)
        values = memory[0][0]
        for kind, count in (("action", action), ("coordinate", latent)):
            names = {name for name in values if name.startswith(f"k/{kind}_")}
            assert names == {f"k/{kind}_{i:02d}" for i in range(count)}
        assert values["train/k"] == 1.0


def test_a_probability_above_one_is_refused():
    with pytest.raises(ValueError, match=r"exploration_noise is a probability.*at most 1, got 1.5"):
        make(SPACES["discrete"], exploration_noise=1.5)
    make(spaces.Box(-1, 1, (2,)), exploration_noise=1.5)


def test_several_environments_each_get_their_own_action():
    envs = DummyVecEnv([lambda: Guess(SPACES["from -1 on"]) for _ in range(3)])
    agent = DreamerTPX("DreamerPolicy", envs, **SMALL).learn(36)
    done = np.array([env.unwrapped.actions for env in agent.get_env().envs])
    assert done.shape == (3, 12) and (done[0] != done[1]).any()


# Spaces that are refused, and files


def test_switches_are_refused_with_a_remedy_that_works():
    env = Guess(spaces.MultiBinary(3))
    with pytest.raises(UnsupportedSpaceError, match="Box, Discrete or MultiDiscrete") as caught:
        DreamerTPX("DreamerPolicy", env, **SMALL)
    remedy = str(caught.value).split(": ", 1)[1]
    wrapped = eval(remedy, {"gymnasium": gym, "numpy": np, "env": env})
    DreamerTPX("DreamerPolicy", wrapped, **SMALL).learn(12)
    assert len(env.actions) == 12


def test_choices_are_refused_elsewhere_with_the_agents_that_take_them():
    for agent, policy in ((PIPPS, "RBFPolicy"), (DAAPPO, "MlpPolicy")):
        env = Guess(SPACES["discrete"])
        if agent is DAAPPO:
            agent(policy, env, action_source="none")
            continue
        with pytest.raises(UnsupportedSpaceError, match=r"\(a Box\).*DreamerTPX takes them"):
            agent(policy, env)
    with pytest.raises(UnsupportedSpaceError, match="got a dictionary"):
        make(spaces.Dict({"a": spaces.Discrete(2)}))


def test_files_keep_start_and_dtype(space, tmp_path):
    path = tmp_path / "space"
    safe_file.write(path, "space", {"space": space})
    read = safe_file.read(path, "space")["space"]
    assert read == space and read.dtype == space.dtype and read.shape == space.shape
