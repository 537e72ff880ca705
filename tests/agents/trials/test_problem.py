"""What a problem takes from an environment, what it refuses, and what it learns from data."""

import warnings
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from gymnasium.wrappers import TransformReward
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor
from stable_baselines3.common.vec_env.base_vec_env import VecEnvWrapper

from totalprop.agents.core.vector_env import GymnasiumVecEnv
from totalprop.agents.trials.controllers import RBFPolicy
from totalprop.agents.trials.problem import Problem, cost_flaw
from totalprop.agents.trials.saturating_cost import SaturatingCost
from totalprop.world_models.gp_dynamics import GPDynamics

F64, CPU = torch.float64, torch.device("cpu")
SPACE, CONTROLS = spaces.Box(-9, 9, (2,), np.float32), spaces.Box(-1, 1, (1,), np.float32)
STATES = torch.tensor([[0.5, 2.0], [1.0, 3.0]], dtype=F64)
ACTIONS = torch.tensor([[0.1], [0.2]], dtype=F64)
MEAN, STD = np.array([3.0, 0.5]), np.array([0.1, 0.2])


class Plain(gym.Env):
    """Knows nothing of itself."""

    observation_space, action_space = SPACE, CONTROLS

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), 0.0, False, False, {}


class Known(Plain):
    """Has a cost, a start and names."""

    observation_names = ("position", "angle")

    def __init__(self):
        self.lookups = 0

    @property
    def initial_distribution(self):
        self.lookups += 1
        return MEAN, STD

    def cost(self, states):
        return states[..., 0] ** 2


class InCentimetres(gym.ObservationWrapper):
    def observation(self, observation):
        return 100 * observation


class Negated(VecEnvWrapper):
    """Ten times the observations, the negative rewards."""

    def reset(self):
        return 10 * self.venv.reset()

    def step_wait(self):
        observations, rewards, *rest = self.venv.step_wait()
        return 10 * observations, -rewards, *rest


def vector(env):
    return DummyVecEnv([lambda: env])


def make(env=None, **kwargs):
    """A problem of a (vector) environment; Known without any."""
    env = vector(Known() if env is None else env) if not isinstance(env, VecEnvWrapper) else env
    return Problem(env, SPACE, device=CPU, **kwargs)


def model(angle_dims=()):
    """Ten random steps, without a fit."""
    found, source = GPDynamics(2, 1, angle_dims=angle_dims), torch.Generator().manual_seed(0)
    shapes = ((10, 2), (10, 1), (10, 2), (10,))
    found.add(*(torch.randn(shape, dtype=F64, generator=source) for shape in shapes))
    return found


# Where a controller is placed


def test_a_constant_angle_has_no_scale_of_rounding_size():
    """2π in single precision and its neighbour: sines of 1e-7, which say nothing."""
    found, angle = GPDynamics(2, 1, angle_dims=(1,)), np.float32(2 * np.pi)
    angles = [float(angle), float(np.nextafter(angle, np.float32(7)))] * 5
    states = torch.stack((torch.arange(10.0), torch.tensor(angles)), 1).to(F64)
    found.add(states, torch.zeros(10, 1, dtype=F64), states, torch.zeros(10, dtype=F64))
    policy = RBFPolicy(SPACE, spaces.Box(-1, 1, (1,)), angle_dims=(1,))
    Problem(None, SPACE, device=CPU).place(policy, found)
    assert policy.log_inverse_scale[1:].tolist() == [0.0, 0.0]


# Cost


def test_given_cost_comes_first():
    problem = make(cost_fn=lambda states: 7 * states[..., 1])
    found = problem.step_cost(model())(STATES, ACTIONS)
    torch.testing.assert_close(found, 7 * STATES[:, 1])


@pytest.mark.parametrize("env", [Known(), Monitor(Known()), VecMonitor(vector(Known()))])
def test_the_environments_own_cost_is_used(env):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem = make(env)
    torch.testing.assert_close(problem.step_cost(model())(STATES, ACTIONS), STATES[:, 0] ** 2)


@pytest.mark.parametrize("env", [None, vector(Plain())], ids=["none", "plain"])
def test_without_a_cost_it_is_minus_the_models_reward(env):
    problem, learned = Problem(env, SPACE, device=CPU), model()
    assert problem.cost is None
    cost = problem.step_cost(learned)
    torch.testing.assert_close(cost(STATES, ACTIONS), -learned.reward(STATES, ACTIONS))
    assert cost(STATES[None], ACTIONS[None]).shape == (1, 2)


FLAWS = {
    "with action": (lambda states, action: states.sum(-1), "it raised TypeError"),
    "steps": (lambda states: (states[..., 0] > 0).double(), "must be differentiable"),
    "one for all": (lambda states: (states**2).sum(), r"a tensor \[2, 3\], got \[\]"),
    "a number": (lambda states: 1.0, r"a tensor \[2, 3\], got float"),
    "numpy": (lambda states: np.square(states.numpy()).sum(-1), "it raised RuntimeError"),
}


@pytest.mark.parametrize("name", FLAWS)
def test_an_own_cost_of_another_kind_is_not_used_with_a_warning(name):
    env, (cost, why) = Plain(), FLAWS[name]
    env.cost = cost
    with pytest.warns(UserWarning, match=rf"own `cost` is not used, because.*{why}"):
        assert make(env).cost is None


@pytest.mark.parametrize("name", FLAWS)
def test_a_given_cost_of_another_kind_is_an_error(name):
    cost, why = FLAWS[name]
    with pytest.raises(ValueError, match=rf"^cost_fn is not a cost of states: .*{why}"):
        make(cost_fn=cost)


@pytest.mark.parametrize("env", [Known(), Monitor(Known()), VecMonitor(vector(Known()))])
@pytest.mark.parametrize("given", ["ignore", None, lambda states: states[..., 1] > 2])
def test_a_given_termination_comes_before_the_environments_own(env, given, monkeypatch):
    monkeypatch.setattr(Known, "termination", lambda self, x: x[..., 0] > 0.7, raising=False)
    problem = make(env, termination=given)
    if given == "ignore":
        assert problem.termination is None
    else:
        x = torch.tensor([[1.0, 0.0], [0.0, 3.0]], dtype=F64)
        assert problem.termination(x).tolist() == [given is None, given is not None]
    assert not problem.end_has_gradient


def test_an_own_termination_of_another_kind_is_not_used_with_a_warning():
    env = Plain()
    env.termination = lambda states: 7.0
    with pytest.warns(UserWarning, match=r"`termination` is not used, because.*got float; simul"):
        assert make(env).termination is None


def test_a_probability_has_a_gradient():
    assert make(termination=lambda states: states[..., 0].sigmoid()).end_has_gradient


def test_the_time_limit_is_gymnasiums():
    assert make(Plain()).time_limit is None
    assert make(gym.wrappers.TimeLimit(Plain(), 40)).time_limit == 40
    assert make(Monitor(gym.wrappers.TimeLimit(Plain(), 40))).time_limit == 40
    assert Problem(None, SPACE, device=CPU).time_limit is None


def test_a_cost_has_no_flaw():
    assert cost_flaw(Known().cost, 2, CPU) is None


# What wrappers change


@pytest.mark.parametrize(
    ("wrapper", "changed"),
    [
        (InCentimetres, ["cost", "initial_distribution"]),
        (lambda env: gym.wrappers.TransformReward(env, lambda r: -r), ["cost"]),
        (gym.wrappers.NormalizeReward, ["cost"]),
        (lambda env: Negated(vector(env)), ["cost", "initial_distribution"]),
        (Monitor, []),
    ],
    ids=["observation", "reward", "rescaled reward", "vector", "monitor"],
)
def test_what_a_wrapper_changes_is_not_the_environments(wrapper, changed):
    """The space stays what it is; particles in centimetres have no cost in metres."""
    env = wrapper(Known())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        problem = make(env)
        assert (problem.cost is None) == ("cost" in changed)
        assert len(caught) == ("cost" in changed)  # now, not after the first trial
        assert (problem.start is None) == ("initial_distribution" in changed)
    expected = [
        f"the environment's own `{name}` is not used, because a wrapper" for name in changed
    ]
    assert all(str(w.message).startswith(e) for w, e in zip(caught, expected, strict=True))


@pytest.mark.parametrize(("kind", "is_reached"), [(SyncVectorEnv, True), (AsyncVectorEnv, False)])
def test_what_workers_of_gymnasium_keep_is_not_used_with_a_warning(kind, is_reached):
    env = GymnasiumVecEnv(kind([Known]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        problem = Problem(VecMonitor(env), SPACE, device=CPU)
        found = [str(w.message) for w in caught if w.category is UserWarning]
        assert problem.termination is None  # which no environment has
    env.close()
    assert (problem.cost is None) != is_reached
    assert [m for m in found if "AsyncVectorEnv" in m] == found and len(found) == (not is_reached)


# Start


def test_the_environments_own_start_is_looked_up_once_and_late():
    env = Known()
    problem = make(env)
    assert env.lookups == 0
    for _ in range(2):
        mean, std = problem.start_distribution([], torch.ones(2, dtype=F64))
        assert torch.equal(mean, torch.from_numpy(MEAN))
        assert torch.equal(std, torch.from_numpy(STD))
    assert env.lookups == 2  # whether it has it, and what it is


@pytest.mark.parametrize("own", [(np.zeros(3), np.ones(3)), (np.zeros(2),), lambda: None, 7])
def test_a_start_of_another_kind_is_not_used_with_a_warning(own):
    env = Plain()
    env.initial_distribution = own
    problem = make(env)
    with pytest.warns(UserWarning, match=r"`initial_distribution` is not used, because it must be"):
        assert problem.start is None


@pytest.mark.parametrize("own", [(1,), [1, 1], np.array([1])])
def test_the_environments_own_invariant_dims_are_used(own):
    env = Plain()
    env.invariant_dims = own
    assert make(env).invariant_dims == (1,)
    assert make(Plain()).invariant_dims == ()


@pytest.mark.parametrize("own", [(2,), (-1,), (0.5,), 1, lambda: None])
def test_invariant_dims_of_another_kind_are_not_used_with_a_warning(own):
    env = Plain()
    env.invariant_dims = own
    with pytest.warns(UserWarning, match=r"`invariant_dims` is not used, because .* 0\.\.1; "):
        assert make(env).invariant_dims == ()


def test_the_environments_own_start_may_have_several_means():
    env = Plain()
    env.initial_distribution = (
        np.array([[0.0, 1.0], [2.0, 3.0], [4.0, 8.0]]),
        np.array([0.1, 0.2]),
    )
    problem = make(env)
    mean, std = problem.start_distribution([], torch.ones(2, dtype=F64))
    assert mean.tolist() == [[0.0, 1.0], [2.0, 3.0], [4.0, 8.0]] and std.tolist() == [0.1, 0.2]
    policy = Placed(spaces.Box(-9, 9, (2,)), spaces.Box(-1, 1, (1,)))
    problem.place(policy, model())
    middle = torch.tensor([2.0, 4.0], dtype=F64)
    torch.testing.assert_close(policy.where[0], middle)


def test_each_of_several_given_starts_has_its_own_deviation():
    """Resets at -1 ± 0.1 and 3 ± 0.1: with two means 0.1, and with one that of all of them."""
    resets = [np.array([x, 5.0]) for x in (-1.1, -0.9, 2.9, 3.1)]
    problem, noise = make(Plain()), torch.full((2,), 1e-3, dtype=F64)
    mean, std = problem.start_distribution(resets, noise, means=[[-1.0, 5.0], [3.2, 5.0]])
    assert mean.tolist() == [[-1.0, 5.0], [3.2, 5.0]]
    torch.testing.assert_close(std, torch.tensor([0.1, 1e-3 / 2**0.5], dtype=F64))
    mean, std = problem.start_distribution(resets, noise, means=[[0.0, 5.0]])
    assert mean.tolist() == [[0.0, 5.0]]
    torch.testing.assert_close(std[0], torch.tensor(4.01, dtype=F64).sqrt())


def test_a_controller_is_placed_at_given_starts():
    problem = make(Known())
    policy = Placed(spaces.Box(-9, 9, (2,)), spaces.Box(-1, 1, (1,)))
    problem.place(policy, model(), means=[[2.0, 0.0], [4.0, 6.0]])
    torch.testing.assert_close(policy.where[0], torch.tensor([3.0, 3.0], dtype=F64))


@pytest.mark.parametrize("own", [((0, 1),), [[0, 1]], np.array([[0, 1]])])
def test_the_environments_own_integrated_dims_are_used(own):
    env = Plain()
    env.integrated_dims, env.time_step = own, np.float32(0.5)
    assert make(env).integrated_dims == ((0, 1),) and make(env).time_step == 0.5
    env.time_step = np.array(0.25)
    assert make(env).time_step == 0.25
    assert make(Plain()).integrated_dims == () and make(Plain()).time_step is None


@pytest.mark.parametrize("own", [((0, 2),), ((0, 0),), ((0, 1), (1, 0)), (0, 1), ((0,),), 1])
def test_integrated_dims_of_another_kind_are_not_used_with_a_warning(own):
    env = Plain()
    env.integrated_dims = own
    with pytest.warns(UserWarning, match=r"`integrated_dims` is not used, because .* 0\.\.1, each"):
        assert make(env).integrated_dims == ()


def test_an_unknown_start_is_that_of_the_resets():
    """Mean and std of (1, 5), (3, 5); no spread seen is that of one noisy observation."""
    resets = [np.array([1.0, 5.0], np.float32), np.array([3.0, 5.0], np.float32)]
    noise = torch.tensor([0.2, 0.2], dtype=F64)
    mean, std = make(Plain()).start_distribution(resets, noise)
    torch.testing.assert_close(mean, torch.tensor([2.0, 5.0], dtype=F64))
    torch.testing.assert_close(std, torch.tensor([1.0, 0.2 / 2**0.5], dtype=F64))


# Placing the controller


class Placed(RBFPolicy):
    """Remembers where it was put."""

    def place(self, mean, std):
        self.where = mean, std
        super().place(mean, std)


def test_a_controller_is_placed_at_a_known_start_with_unit_scale():
    policy = Placed(SPACE, CONTROLS, angle_dims=(1,))
    make().place(policy, model(angle_dims=(1,)))
    expected = torch.tensor([3.0, np.sin(0.5), np.cos(0.5)], dtype=F64)
    torch.testing.assert_close(policy.where[0], expected)
    torch.testing.assert_close(policy.where[1], torch.ones(3, dtype=F64))
    assert policy.is_placed


def test_without_a_start_a_controller_is_placed_over_the_data():
    policy, learned = Placed(SPACE, CONTROLS), model()
    make(Plain()).place(policy, learned)
    torch.testing.assert_close(policy.where[0], learned.gp.inputs[:, :2].mean(0))
    torch.testing.assert_close(policy.where[1], learned.gp.inputs[:, :2].std(0, correction=0))


def test_a_feature_that_never_changes_has_unit_scale():
    policy, learned = Placed(SPACE, CONTROLS), model()
    learned.gp.inputs[:, 1] = 0.1
    make(Plain()).place(policy, learned)
    assert policy.where[1][1] == 1 and policy.where[1][0] != 1


# Names


@pytest.mark.parametrize("names", [("x", "t"), np.array(["x", "t"])])
def test_names_of_observations_are_the_environments(names):
    env = Plain()
    env.observation_names = names
    assert list(make(env).observation_names) == ["x", "t"]


def test_without_names_that_fit_observations_are_numbered():
    env = Plain()
    env.observation_names = ["x"]
    for found in (make(env), make(Plain()), Problem(None, SPACE, device=CPU)):
        assert found.observation_names == ["observation 0", "observation 1"]


# A saturating cost


class Saturating(Plain):
    saturating_cost: ClassVar = {"target": [1.0, 0.0], "weights": [4.0, 0.0]}


def test_a_given_or_own_saturating_cost_is_known_as_one():
    given = SaturatingCost([0.0, 0.0], [1.0, 1.0])
    assert make(Saturating(), cost_fn=given).saturating_cost is given
    own = make(Saturating()).saturating_cost
    torch.testing.assert_close(own(STATES), 1 - torch.exp(-2 * (STATES[:, 0] - 1) ** 2))
    assert make().saturating_cost is None and Problem(None, SPACE, device=CPU).cost is None


def test_an_own_saturating_cost_must_be_the_own_cost():
    env = Saturating()
    env.cost = lambda states: 1 - torch.exp(-2 * (states[..., 0] - 1) ** 2)
    assert make(env).saturating_cost is not None
    env.cost = lambda states: 1 - torch.exp(-3 * (states[..., 0] - 1) ** 2)
    with pytest.warns(UserWarning, match=r"own `saturating_cost` is not used, because it differs"):
        assert make(env).saturating_cost is None


@pytest.mark.parametrize(
    ("own", "why"),
    [
        ({"target": [0.0] * 2, "weights": [-1.0] * 2}, "negative eigenvalues"),
        ({"target": [0.0] * 3, "weights": [1.0] * 3}, "it raised RuntimeError"),
        ({"goal": [0.0] * 2}, "unexpected keyword"),
        (lambda states: states, "must be a mapping"),
    ],
)
def test_an_own_saturating_cost_of_another_kind_is_not_used_with_a_warning(own, why):
    env = Saturating()
    env.saturating_cost = own
    with pytest.warns(UserWarning, match=rf"own `saturating_cost` is not used, because.*{why}"):
        assert make(env).saturating_cost is None


def test_a_saturating_cost_of_other_rewards_is_not_used():
    env = TransformReward(Saturating(), lambda reward: 2 * reward)
    with pytest.warns(UserWarning, match="a wrapper changes"):
        assert make(env).saturating_cost is None


@pytest.mark.parametrize("own", [0, -1.0, "x", np.nan, [0.1]])
def test_a_time_step_that_is_none_is_not_used_with_a_warning(own):
    env = Plain()
    env.time_step = own
    with pytest.warns(UserWarning, match="`time_step` is not used, because it must be a number ab"):
        assert make(env).time_step is None


@pytest.mark.parametrize("own", [([0, 0], [np.nan, 1]), ([0, 0], [-1, 1]), ([np.inf, 0], [1, 1])])
def test_a_start_that_is_no_distribution_is_not_used_with_a_warning(own):
    env = Plain()
    env.initial_distribution = own
    with pytest.warns(UserWarning, match="`initial_distribution` is not used, because it must"):
        assert make(env).start is None
