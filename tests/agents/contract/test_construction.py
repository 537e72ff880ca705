"""What every agent's constructor takes and refuses, as stable-baselines3's do."""

import inspect
import re

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from tests.agents.contract.conftest import SIZES
from tests.agents.contract.environments import CountingEnv
from totalprop.agents import AGENTS

COMMON = [
    "policy", "env", "learning_rate", "policy_kwargs", "stats_window_size", "tensorboard_log",
    "verbose", "seed", "device", "_init_setup_model",
]  # fmt: skip


@pytest.mark.parametrize("name", AGENTS)
def test_every_agent_has_small_sizes(name):
    assert name in SIZES, f"add small sizes of {name} to SIZES in tests/agents/contract/conftest.py"


def test_arguments_of_every_stable_baselines3_agent_are_there(make):
    known = inspect.signature(make.cls.__init__).parameters
    assert set(COMMON) <= set(known)
    assert list(known)[1:4] == ["policy", "env", "learning_rate"]  # the positional ones


@pytest.mark.parametrize(
    "env",
    [lambda: "Pendulum-v1", CountingEnv, lambda: DummyVecEnv([CountingEnv] * 2)],
    ids=["id", "instance", "VecEnv"],
)
def test_environment_may_be_an_id_an_instance_or_a_vec_env(make, env):
    given = env()
    agent = make(given)
    n_envs = getattr(given, "num_envs", 1)
    assert agent.n_envs == agent.get_env().num_envs == n_envs
    observations = np.zeros((n_envs, *agent.observation_space.shape), np.float32)
    assert agent.predict(observations)[0].shape == (n_envs, *agent.action_space.shape)
    assert agent.get_vec_normalize_env() is None


def test_an_instance_is_monitored_once(make):
    assert make(CountingEnv()).env.env_is_wrapped(Monitor) == [True]
    env = Monitor(CountingEnv())
    assert make(env).env.envs == [env]


def test_policy_may_be_a_name_or_a_class(make):
    name = make.arguments()["policy"]
    policy_class = make.cls.policy_aliases[name]
    for policy in (name, policy_class):
        agent = make(policy=policy)
        assert type(agent.policy) is agent.policy_class is policy_class


def test_unknown_policy_name_is_an_error(make):
    with pytest.raises(ValueError, match="unknown policy 'NoSuchPolicy'") as error:
        make(policy="NoSuchPolicy")
    assert make.arguments()["policy"] in str(error.value)  # it names those that there are


def test_constructor_without_an_environment_says_what_is_missing(make):
    with pytest.raises(ValueError, match="env") as error:
        make.cls(**make.arguments())
    assert "\n" not in str(error.value)


def test_without_set_up_there_is_no_policy_yet(make):
    agent = make(_init_setup_model=False)
    assert getattr(agent, "policy", None) is None
    agent._setup_model()
    assert agent.predict(np.zeros(4, np.float32))[0].shape == (2,)


def test_arguments_are_attributes(make):
    """As `load`, callbacks and users expect them."""
    agent = make(learning_rate=0.0123, stats_window_size=5, verbose=0)
    for name, value in make.arguments(learning_rate=0.0123).items():
        if name not in ("policy", "device", "policy_kwargs"):
            assert getattr(agent, name) == value, name
    assert str(agent.device) == "cpu" and agent.num_timesteps == agent._n_updates == 0


def test_stats_window_size_is_that_of_the_buffers(make):
    agent = make(stats_window_size=2).learn(28)
    assert len(agent.ep_info_buffer) == agent.ep_info_buffer.maxlen == 2
    assert agent.ep_success_buffer.maxlen == 2


@pytest.mark.parametrize(
    ("agent", "preset"), [(agent, preset) for agent in AGENTS for preset in AGENTS[agent].presets]
)
def test_presets_construct(agent, preset):
    entry = AGENTS[agent]
    arguments = entry.presets[preset]
    built = entry.cls(env="Pendulum-v1", device="cpu", **arguments)
    for key, value in arguments.items():
        if not callable(getattr(built, key)):  # a schedule
            assert getattr(built, key) == value, key


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), -0.1, "0.1"])
def test_learning_rate_must_not_be_negative(make, rate):
    with pytest.raises(ValueError, match="learning_rate must be at least 0") as error:
        make(learning_rate=rate)
    assert "\n" not in str(error.value)
    assert isinstance(error.value, AssertionError)  # as stable-baselines3's checks of arguments


@pytest.mark.parametrize("size", [0, -1, 1.5, "ten"])
def test_stats_window_size_must_be_a_whole_number(make, size):
    with pytest.raises(ValueError, match="stats_window_size must be at least 1"):
        make(stats_window_size=size)


VECTOR = spaces.Box(-1, 1, (3,), np.float32)
SPACES = {
    "discrete actions": (VECTOR, spaces.Discrete(3)),
    "action matrices": (VECTOR, spaces.Box(-1, 1, (2, 2), np.float32)),
    "unbounded actions": (VECTOR, spaces.Box(-np.inf, np.inf, (2,), np.float32)),
    "whole numbers": (VECTOR, spaces.Box(-2, 3, (1,), np.int64)),
    "no room": (VECTOR, spaces.Box(np.zeros(2, np.float32), np.float32([1, 0]))),
    "dictionary": (spaces.Dict({"a": VECTOR}), VECTOR),
    "small image": (spaces.Box(0, 255, (8, 8, 3), np.uint8), VECTOR),
    "discrete observations": (spaces.Discrete(4), VECTOR),
    "matrix": (spaces.Box(-1, 1, (2, 2), np.float32), VECTOR),
    "doubles": (spaces.Box(-1, 1, (2,), np.float64), spaces.Box(-1, 1, (1,), np.float64)),
}


class Sampled(gym.Env):
    """Random observations of a space; every episode has 7 steps."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        self.time = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.time += 1
        return self.observation_space.sample(), 0.5, False, self.time == 7, {}


@pytest.mark.parametrize("name", SPACES)
def test_spaces_are_learned_in_or_refused_by_the_constructor(make, name):
    """In one sentence, before any step is taken."""
    env = Sampled(*SPACES[name])
    try:
        agent = make(env)
    except (ValueError, AssertionError) as error:
        assert str(error) and "\n" not in str(error)  # noqa: PT017
        return
    agent.learn(21)
    assert all(np.isfinite(p.detach()).all() for p in agent.policy.parameters())


IMAGE = spaces.Box(0, 255, (64, 64, 3), np.uint8)
REFUSED = SPACES | {
    "image": (IMAGE, VECTOR),
    "grey image": (spaces.Box(0, 255, (64, 64), np.uint8), VECTOR),
    "image of floats": (spaces.Box(0, 1, (64, 64, 3), np.float32), VECTOR),
    "dictionary with an image": (spaces.Dict({"a": VECTOR, "look": IMAGE}), VECTOR),
    "dictionary of an image": (spaces.Dict({"look": IMAGE}), VECTOR),
    "tuple": (spaces.Tuple((VECTOR, VECTOR)), VECTOR),
    "switches": (spaces.MultiBinary(4), VECTOR),
    "many whole numbers": (VECTOR, spaces.Box(np.array([-2, 0]), np.array([3, 9]), dtype=np.int32)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_advice_on_spaces_is_not_refused_next(make, name):
    """Whoever does what the error says gets an agent, or is sent to another agent."""
    env, changes = Sampled(*REFUSED[name]), {}
    for _ in range(3):
        try:
            make(env, **changes)
            return
        except (ValueError, AssertionError) as error:
            advice = str(error).split("; ")[-1]
            assert "\n" not in str(error)  # noqa: PT017
        if "gymnasium.wrappers." in advice:
            code = advice[advice.index("gymnasium.wrappers.") :]
            try:
                wrapped = eval(code, {"gymnasium": gym, "env": env})
            except gym.error.DependencyNotInstalled:  # which says what to install
                return
            env = wrapped if isinstance(wrapped, gym.Env) else wrapped(env)
        elif found := re.findall(r"(\w+)='(\w+)'", advice):
            if "takes them" in advice and make.name != "daappo":
                return
            changes |= dict(found)
        else:
            assert "take DreamerTPX" in advice or "each with some room" in advice, advice
            return
    pytest.fail(f"advised three times, the last time: {advice}")


@pytest.mark.parametrize("env", [object(), CountingEnv, 7])
def test_what_is_no_environment_is_refused(make, env):
    with pytest.raises((ValueError, TypeError, AttributeError, AssertionError)):
        make(env)


def test_an_unknown_environment_id_is_gymnasiums_error(make):
    with pytest.raises(gym.error.Error, match="NoSuchEnv"):
        make("NoSuchEnv-v0")


def test_actions_of_whole_numbers_are_refused_in_one_way(make):
    with pytest.raises(ValueError, match=r"real numbers, got a vector of 1 whole number \(Box\); "):
        make(Sampled(*SPACES["whole numbers"]))
