"""What `load` takes from the file, and what from its arguments."""

import pickle
import threading

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.running_mean_std import RunningMeanStd

from tests.agents.contract.conftest import Maker
from totalprop.agents import DAAPPO, DreamerTPX
from totalprop.agents.core import algorithm as saving
from totalprop.agents.core.processes import Processes, SharedStatistics
from totalprop.agents.core.spaces import UnsupportedSpaceError
from totalprop.agents.persistence import checkpoint

NAMES = {DreamerTPX: "dreamer", DAAPPO: "daappo"}
MODEL, VALUE = "_update.model_optimizer", "value_optimizer"


def trained(cls, folder=None):
    agent = Maker(NAMES[cls])()
    return agent.learn(21, None if folder is None else checkpoint.Checkpoints(folder))


def groups(agent):
    names = agent._get_torch_save_params()[0]
    states = {name: agent.get_parameters()[name] for name in names if "optimizer" in name}
    return {
        name: [(group["lr"], group["eps"]) for group in state["param_groups"]]
        for name, state in states.items()
    }


@pytest.mark.parametrize(
    ("cls", "argument", "changed", "place"),
    [
        (DreamerTPX, "model_learning_rate", [MODEL], 0),
        (DreamerTPX, "learning_rate", ["_update.actor_optimizer", "_update.critic_optimizer"], 0),
        (
            DreamerTPX,
            "adam_eps",
            [MODEL, "_update.actor_optimizer", "_update.critic_optimizer"],
            1,
        ),
        (DAAPPO, "dynamics_learning_rate", [VALUE], 0),
        (DAAPPO, "dynamics_eps", [VALUE], 1),
        (DAAPPO, "learning_rate", ["policy.optimizer"], 0),
    ],
)
@pytest.mark.parametrize("kind", ["model", "checkpoint"])
def test_step_sizes_passed_to_load_are_the_optimisers(
    cls, argument, changed, place, kind, tmp_path
):
    agent, passed = trained(cls, tmp_path), {argument: 1.25e-6}
    if kind == "model":
        agent.save(tmp_path / "model")
        loaded = cls.load(tmp_path / "model", device="cpu", **passed)
    else:
        loaded = checkpoint.Checkpoints(tmp_path).load(cls, agent.env, "cpu", **passed)
    assert getattr(loaded, argument) == 1.25e-6
    expected = groups(agent)
    for name in changed:
        pairs = [list(pair) for pair in expected[name]]
        for pair in pairs:
            pair[place] = 1.25e-6
        expected[name] = [tuple(pair) for pair in pairs]
    assert groups(loaded) == expected


def test_a_scheduled_step_size_is_the_file_s_where_nothing_is_passed(tmp_path):
    agent = trained(DAAPPO)
    for group in agent.policy.optimizer.param_groups:
        group["lr"] = 1e-7
    agent.save(tmp_path / "model")
    assert groups(DAAPPO.load(tmp_path / "model", device="cpu"))["policy.optimizer"][0][0] == 1e-7


def test_a_step_size_that_a_graph_reads_stays_where_it_is():
    weight, rate = torch.zeros(1, requires_grad=True), torch.tensor(0.5)
    optimizer = torch.optim.Adam([weight], rate, eps=1e-3)
    sizes = saving._step_sizes(torch.optim.Adam([weight], 0.25, eps=1e-4))
    saving._set_step_sizes(optimizer, sizes)
    (group,) = optimizer.param_groups
    assert group["lr"] is rate and float(rate) == 0.25 and group["eps"] == 1e-4


def test_an_optimiser_without_eps():
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], 0.5)
    saving._set_step_sizes(optimizer, saving._step_sizes(torch.optim.SGD([weight], 0.25)))
    assert optimizer.param_groups[0]["lr"] == 0.25 and "eps" not in optimizer.param_groups[0]


class Choices(gym.Env):
    def __init__(self, seen, actions):
        self.observation_space, self.action_space = seen, actions

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        return self.observation_space.sample(), 0.0, False, False, {}


BOX = spaces.Box(-1, 1, (2,))
LATE = spaces.Discrete(3, start=2)


@pytest.mark.parametrize(
    ("seen", "actions", "message"),
    [
        (BOX, LATE, "its actions, .* start at 2: shift them with .*TransformAction"),
        (LATE, spaces.Discrete(2), "its observations, .* start at 2: .*TransformObservation"),
        (spaces.Dict(a=BOX, b=LATE), spaces.Discrete(2), "its observations, .* start at 2"),
        (BOX, spaces.MultiDiscrete([2, 3], start=[0, 1]), r"its actions, .* start at \[0 1\]"),
    ],
)
def test_choices_that_are_not_counted_from_0_are_learned_or_refused(seen, actions, message):
    """stable-baselines3's policies take them for others, without a word."""
    policy = "MultiInputPolicy" if isinstance(seen, spaces.Dict) else "MlpPolicy"
    with pytest.raises(UnsupportedSpaceError, match=message):
        DAAPPO(policy, Choices(seen, actions), action_source="none")
    arguments = Maker("dreamer").arguments()
    DreamerTPX(env=TimeLimit(Choices(seen, actions), 7), **arguments).learn(21)


@pytest.mark.parametrize("cls", NAMES)
def test_action_bounds_whose_distance_overflows_are_refused(cls):
    wide = spaces.Box(-3e38, 3e38, (1,), np.float32)
    with pytest.raises(UnsupportedSpaceError, match="finite bounds, not too far apart"):
        cls(env=Choices(BOX, wide), **Maker(NAMES[cls]).arguments())


def test_a_dictionary_without_numbers_has_a_remedy_that_works():
    env = Choices(spaces.Dict(a=spaces.Text(3)), spaces.Box(-1, 1, (1,)))
    with pytest.raises(UnsupportedSpaceError, match=r"convert them with .*TransformObservation"):
        DreamerTPX(env=env, **Maker("dreamer").arguments())


def test_statistics_of_several_processes_are_pickled_alone():
    own = RunningMeanStd(shape=(2,))
    own.update(np.arange(6.0).reshape(3, 2))
    shared = SharedStatistics(own, Processes(threading.Lock()))  # like a group, it cannot be
    read = pickle.loads(pickle.dumps(shared))
    assert type(read) is RunningMeanStd and read.count == own.count
    np.testing.assert_array_equal(read.mean, own.mean)
