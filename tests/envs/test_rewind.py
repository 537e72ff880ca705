"""Rewinding against the trajectory that was not rewound, bit for bit."""

import dataclasses
import importlib.util
import pickle
import re
from collections import deque

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import wrappers
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

import totalprop.envs  # noqa: F401, registers the ids
from totalprop.envs import mujoco_backend
from totalprop.envs.dm_control import TASKS
from totalprop.envs.rewind import MODEL_FIELDS, Rewindable, can_rewind, restore, rewound, snapshot

HAS_DM_CONTROL = all(importlib.util.find_spec(name) for name in ("dm_control", "shimmy"))
needs_dm_control = pytest.mark.skipif(not HAS_DM_CONTROL, reason="needs dm_control and shimmy")
CART_POLE = "totalprop/CartPoleSwingUp-v0"
RANDOM_MODELS = [  # they draw a part of their model at reset
    *("reacher-easy", "finger-turn_easy", "point_mass-hard", "fish-swim", "swimmer-swimmer6"),
    *("manipulator-bring_ball", "stacker-stack_2", "quadruped-escape", "reacher-hard"),
]
FIXED_MODELS = [
    *("cartpole-swingup", "ball_in_cup-catch", "cheetah-run", "walker-walk", "hopper-hop"),
    *("pendulum-swingup", "quadruped-walk", "humanoid-walk", "finger-spin", "dog-stand"),
    "fish-upright",
]
IDS = [
    *(CART_POLE, "Pendulum-v1", "MountainCarContinuous-v0", "totalprop/Unicycle-v0"),
    *(
        pytest.param(f"dmc/{name}-v0", marks=needs_dm_control)
        for name in RANDOM_MODELS + FIXED_MODELS
    ),
]


def random_actions(env, count, seed):
    space = env.action_space
    low, high = np.maximum(space.low, -1), np.minimum(space.high, 1)
    return np.random.default_rng(seed).uniform(low, high, (count, *space.shape)).astype(np.float32)


def play(env, actions):
    """All that the steps return, flat, up to the end of the episode."""
    numbers = []
    for action in actions:
        observation, reward, terminated, truncated, _ = env.step(action)
        numbers += [np.ravel(observation), [reward, terminated, truncated]]
        if terminated or truncated:
            break
    return np.concatenate(numbers)


def future(env):
    """The next 32 steps and the beginning of the next episode, whose start is drawn."""
    numbers = [play(env, random_actions(env, 32, seed=1))]
    numbers += [np.ravel(env.reset()[0]), play(env, random_actions(env, 4, seed=2))]
    return np.concatenate(numbers)


def begin(env, *, seed, steps=5):
    env.reset(seed=seed)
    play(env, random_actions(env, steps, seed=seed))
    return env


# Exactness


@pytest.mark.parametrize("name", IDS)
def test_the_future_repeats_after_a_reset_and_in_another_instance(name):
    env = begin(gym.make(name), seed=0)
    start = snapshot(env)
    original = future(env)

    restore(env, start)
    np.testing.assert_array_equal(future(env), original)
    begin(env, seed=7)
    restore(env, start)
    np.testing.assert_array_equal(future(env), original)

    other = begin(gym.make(name), seed=9, steps=3)
    assert not np.array_equal(future(other), original)
    restore(other, start)
    np.testing.assert_array_equal(future(other), original)

    fresh = gym.make(name)  # never reset
    restore(fresh, pickle.loads(pickle.dumps(start)))
    np.testing.assert_equal(dataclasses.asdict(snapshot(fresh)), dataclasses.asdict(start))
    np.testing.assert_array_equal(future(fresh), original)


@pytest.mark.parametrize("name", IDS)
def test_a_restored_environment_gives_the_same_snapshot(name):
    env = begin(gym.make(name), seed=0)
    start = snapshot(env)
    before = pickle.dumps(start)
    future(env)
    assert pickle.dumps(start) == before  # later steps do not reach into it
    assert pickle.dumps(snapshot(env)) != before
    restore(env, start)
    future(env)
    restore(env, start)
    np.testing.assert_equal(dataclasses.asdict(snapshot(env)), dataclasses.asdict(start))
    assert pickle.dumps(start) == before  # nor do steps after a restore


@pytest.mark.parametrize("name", IDS)
def test_a_snapshot_of_a_reset_repeats(name):
    env = gym.make(name)
    env.reset(seed=3)
    start = snapshot(env)
    original = future(env)
    restore(env, start)
    np.testing.assert_array_equal(future(env), original)


def test_seeds_and_unseeded_episodes_repeat():
    env = gym.make(CART_POLE)
    env.reset()  # seeds itself
    start, seed = snapshot(env), env.unwrapped.np_random_seed
    original = future(env)
    begin(env, seed=4)
    restore(env, start)
    assert env.unwrapped.np_random_seed == seed
    np.testing.assert_array_equal(future(env), original)


@needs_dm_control
def test_an_unseeded_first_reset_repeats():
    env = gym.make("dmc/reacher-easy-v0")
    start = snapshot(env)  # before any reset: the task's seed is yet to be drawn
    first = env.reset()[0]
    restore(env, start)
    np.testing.assert_array_equal(env.reset()[0], first)


@needs_dm_control
def test_model_fields_are_all_that_the_suite_randomises():
    changed = set()
    for domain, task in TASKS:
        env = gym.make(f"dmc/{domain}-{task}-v0").unwrapped
        model = env.dm_env.physics.model.ptr
        names = [name for name in dir(model) if isinstance(getattr(model, name), np.ndarray)]
        before = {name: getattr(model, name).copy() for name in names}
        for seed in range(2):
            begin(env, seed=seed, steps=2)
            now = {name for name in names if not np.array_equal(before[name], getattr(model, name))}
            changed |= now
    assert changed == set(MODEL_FIELDS)


@needs_dm_control
def test_pictures_repeat_in_another_instance_that_has_drawn_its_own_terrain():
    kwargs = {"observation": "pixels", "render": "fast"}
    try:
        mujoco_backend.check_rendering()
    except RuntimeError as error:
        pytest.skip(str(error))
    env, other = (
        begin(gym.make("dmc/quadruped-escape-v0", **kwargs), seed=seed, steps=1) for seed in (0, 1)
    )
    start = snapshot(env)
    restore(other, start)
    actions = random_actions(env, 2, seed=0)
    np.testing.assert_array_equal(play(other, actions), play(env, actions))


# The end of an episode


ENDING = [
    pytest.param(CART_POLE, {}, 30),
    pytest.param(CART_POLE, {"max_episode_steps": 12}, 12),
    pytest.param(
        "dmc/cartpole-swingup-v0", {"time_limit": 0.2}, 10, marks=needs_dm_control
    ),  # 10 ms, held twice
    pytest.param(
        "dmc/reacher-easy-v0", {"max_episode_steps": 11}, 11, marks=needs_dm_control
    ),  # TimeLimit around it
]


@pytest.mark.parametrize(("name", "kwargs", "length"), ENDING)
def test_the_time_limit_truncates_at_the_same_step(name, kwargs, length):
    env = begin(gym.make(name, **kwargs), seed=0, steps=4)
    start = snapshot(env)
    original = future(env)  # beyond the end, and into the next episode
    restore(env, start)
    np.testing.assert_array_equal(future(env), original)

    other = begin(gym.make(name, **kwargs), seed=1, steps=8)
    for candidate in (env, other):
        restore(candidate, start)
        ends = [candidate.step(action)[3] for action in random_actions(env, length - 4, seed=0)]
        assert ends == [False] * (length - 5) + [True]


def test_the_limit_itself_stays_the_environments_own():
    start = snapshot(begin(gym.make(CART_POLE), seed=0, steps=4))
    shorter = gym.make(CART_POLE, max_episode_steps=6)
    restore(shorter, start)
    ends = [shorter.step([0.0])[3] for _ in range(2)]
    assert ends == [False, True]


@needs_dm_control
def test_an_ended_episode_stays_ended_and_a_running_one_runs_again():
    env = begin(gym.make("dmc/cartpole-swingup-v0", time_limit=0.1), seed=0, steps=3)
    running = snapshot(env)
    play(env, random_actions(env, 5, seed=0))
    ended = snapshot(env)
    env.reset()
    restore(env, ended)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(np.zeros(1, np.float32))
    restore(env, running)
    assert not env.step(np.zeros(1, np.float32))[3]


# Extra rollouts


class FailedError(Exception):
    pass


def fail_inside(env, seed):
    with rewound(env):
        env.step(random_actions(env, 1, seed=seed)[0])
        raise FailedError


def extra_rollouts(env, seed):
    """Two with other actions, one beyond the end of the episode, one that raises."""
    with rewound(env) as start:
        first = play(env, random_actions(env, 6, seed=seed))
        restore(env, start)
        second = play(env, random_actions(env, 6, seed=seed + 1))
        assert not np.array_equal(first, second)
    with rewound(env):
        play(env, random_actions(env, 40, seed=seed))
        env.reset(seed=seed)
        with rewound(env):  # nested
            future(env)
        future(env)
    with pytest.raises(FailedError):
        fail_inside(env, seed)


def main_trajectory(env, extra):
    numbers = [np.ravel(env.reset(seed=0)[0])]
    for seed, action in enumerate(random_actions(env, 12, seed=0)):
        if extra:
            extra_rollouts(env, seed)
        numbers.append(play(env, [action]))
        if numbers[-1][-1]:  # truncated
            numbers.append(np.ravel(env.reset()[0]))
    return np.concatenate(numbers)


class Drift(gym.Wrapper):
    """A wrapper of somebody's, whose counters, lists and arrays change what is returned."""

    def __init__(self, env):
        super().__init__(env)
        self.count, self.seen, self.total = 0, [0.0], np.zeros(1)
        self.shift = lambda reward: reward + self.count + sum(self.seen) + self.total[0]

    def step(self, action):
        observation, reward, *rest = super().step(action)
        self.count += 1
        self.seen.append(float(observation[0]))
        self.total += reward
        return observation, self.shift(reward), *rest


class Secretive(gym.Wrapper):
    """A wrapper that says itself what its state is."""

    def __init__(self, env):
        super().__init__(env)
        self.steps = iter(range(10**6))  # no plain value
        self.offset = 0

    def step(self, action):
        observation, reward, *rest = super().step(action)
        self.offset = next(self.steps)
        return observation, reward + self.offset, *rest

    def get_state(self):
        return {"offset": self.offset}

    def set_state(self, state):
        self.offset, self.steps = state["offset"], iter(range(state["offset"] + 1, 10**6))


def secretive(env):
    wrapped = Secretive(env)
    wrapped.offset = next(wrapped.steps)
    return wrapped


WRAPPERS = {
    "none": lambda env: env,
    "TimeLimit": lambda env: wrappers.TimeLimit(env, 7),
    "FrameStack": lambda env: wrappers.FrameStackObservation(env, 3),
    "Delay": lambda env: wrappers.DelayObservation(env, 2),
    "NormalizeObservation": wrappers.NormalizeObservation,
    "NormalizeReward": wrappers.NormalizeReward,
    "TimeAware": lambda env: wrappers.TimeAwareObservation(wrappers.TimeLimit(env, 9)),
    "StickyAction": lambda env: wrappers.StickyAction(env, 0.5),
    "Monitor": Monitor,
    "Drift": Drift,
    "Secretive": secretive,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_extra_rollouts_leave_no_trace_through_wrappers(wrap):
    with_extra, without = (wrap(gym.make(CART_POLE)) for _ in range(2))
    np.testing.assert_array_equal(
        main_trajectory(with_extra, extra=True), main_trajectory(without, extra=False)
    )


@needs_dm_control
@pytest.mark.parametrize("name", ["reacher-easy", "cheetah-run"])
def test_extra_rollouts_leave_no_trace_in_the_suite(name):
    with_extra, without = (
        wrappers.TimeLimit(gym.make(f"dmc/{name}-v0", action_repeat=4), 9) for _ in range(2)
    )
    np.testing.assert_array_equal(
        main_trajectory(with_extra, extra=True), main_trajectory(without, extra=False)
    )


def test_statistics_of_episodes_are_not_counted_twice():
    with_extra, without = (
        wrappers.RecordEpisodeStatistics(gym.make(CART_POLE, max_episode_steps=5), 3)
        for _ in range(2)
    )
    main_trajectory(with_extra, extra=True)
    main_trajectory(without, extra=False)
    assert with_extra.episode_count == without.episode_count == 2
    assert with_extra.return_queue == without.return_queue
    assert with_extra.return_queue.maxlen == 3


def test_random_actions_of_rollouts_from_one_snapshot_differ():
    env = begin(gym.make(CART_POLE), seed=0)
    env.action_space.seed(0)
    drawn = []
    for _ in range(3):
        with rewound(env):
            drawn.append(env.action_space.sample().item())
    assert len(set(drawn)) == 3


@pytest.mark.parametrize("name", IDS[:2])
def test_extra_steps_of_a_vector_environment_leave_no_trace_in_its_monitor(name):
    vector, plain_vector = (
        DummyVecEnv([lambda: Monitor(Rewindable(gym.make(name, max_episode_steps=5)))] * 2)
        for _ in range(2)
    )
    actions = random_actions(vector, 12, seed=0)
    returned = []
    for candidate in (vector, plain_vector):
        candidate.seed(0)
        returned.append([candidate.reset()])
        for action in actions:
            if candidate is vector:
                starts = vector.env_method("snapshot")
                ended = False
                while not ended:
                    *_, ended, _ = vector.env_method("extra_step", -action, indices=[1])[0]
                vector.env_method("restore", starts[1], indices=[1])
            observations, rewards, dones, infos = candidate.step([action, action])
            episodes = [info.get("episode", {}).get("r", 0) for info in infos]
            returned[-1] += [observations, rewards, dones, episodes]
    for one, other in zip(*returned):
        np.testing.assert_array_equal(one, other)
    assert vector.get_attr("total_steps") == plain_vector.get_attr("total_steps")


# The snapshot, and what is refused


def test_a_snapshot_cannot_be_written():
    start = snapshot(begin(gym.make(CART_POLE), seed=0))
    with pytest.raises(dataclasses.FrozenInstanceError):
        start.layers = ()
    state = dict(start.layers)["CartPoleSwingUpEnv"]["state"]
    with pytest.raises(ValueError, match="read-only"):
        state[0] = 1.0


def plain(value):
    if isinstance(value, dict):
        return all(type(name) is str and plain(entry) for name, entry in value.items())
    if type(value) in (list, tuple):
        return all(map(plain, value))
    if isinstance(value, np.ndarray | np.generic):
        return value.dtype != object
    return type(value) in (int, float, bool, str, type(None))


@pytest.mark.parametrize("name", IDS[:3])
def test_a_snapshot_holds_numbers_and_names_only(name):
    env = wrappers.RecordEpisodeStatistics(wrappers.FrameStackObservation(gym.make(name), 2))
    env = wrappers.NormalizeReward(env)
    assert plain(dataclasses.asdict(snapshot(begin(env, seed=0))))


def refusal(name):
    return re.escape(
        f"{name} cannot be rewound: pass one dmc/ environment, {CART_POLE}, totalprop/Unicycle-v0, "
        "one of gymnasium's classic control or an environment with get_state() and set_state(), or "
        'choose action_source="dynamics".'
    )


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: gym.make("FrozenLake-v1"), "FrozenLakeEnv"),
        (lambda: Secretive(gym.make("FrozenLake-v1")), "FrozenLakeEnv"),  # the wrapper alone could
        (lambda: DummyVecEnv([lambda: gym.make(CART_POLE)]), "DummyVecEnv"),
        (lambda: None, "NoneType"),
    ],
)
def test_an_environment_that_cannot_be_rewound_is_named_with_the_remedy(make, name):
    env = make()
    start = snapshot(gym.make(CART_POLE))
    assert not can_rewind(env)
    with pytest.raises(ValueError, match=f"^{refusal(name)}$"):
        snapshot(env)
    with pytest.raises(ValueError, match=f"^{refusal(name)}$"):
        restore(env, start)
    with pytest.raises(ValueError, match=f"^{refusal(name)}$"), rewound(env):
        pytest.fail("entered")
    with pytest.raises(ValueError, match=f"^{refusal(name)}$"):
        Rewindable(env)


@pytest.mark.parametrize("name", IDS[:3])
def test_ours_can_be_rewound_wrapped_or_not(name):
    env = gym.make(name)
    assert can_rewind(env) and can_rewind(env.unwrapped) and can_rewind(Monitor(env))


@needs_dm_control
def test_a_snapshot_of_another_task_is_refused_and_changes_nothing():
    easy, hard = (begin(gym.make(f"dmc/reacher-{task}-v0"), seed=0) for task in ("easy", "hard"))
    expected = dataclasses.asdict(snapshot(hard))
    message = (
        "The snapshot is of reacher-easy, the environment is reacher-hard: "
        "restore it into dmc/reacher-easy-v0."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        restore(hard, snapshot(easy))
    np.testing.assert_equal(dataclasses.asdict(snapshot(hard)), expected)


@needs_dm_control
def test_a_snapshot_of_another_size_is_refused():
    env = begin(gym.make("dmc/reacher-easy-v0"), seed=0)
    start = pickle.loads(pickle.dumps(snapshot(env)))
    state = dict(start.layers)["DMControlEnv"]
    state["integration"] = state["integration"][:-1]
    count = state["integration"].size
    message = rf"^The snapshot holds {count} numbers, MuJoCo \S+ expects {count + 1} for this model"
    with pytest.raises(ValueError, match=message):
        restore(env, start)


def test_a_snapshot_of_other_wrappers_is_refused():
    env = gym.make(CART_POLE)
    message = (
        "The snapshot is of OrderEnforcing > CartPoleSwingUpEnv, the environment is TimeLimit > "
        "OrderEnforcing > CartPoleSwingUpEnv: restore it into an environment of the same task and "
        "wrappers."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        restore(env, snapshot(env.env))


def test_the_checker_of_gymnasium_makes_no_difference():
    start = snapshot(begin(gym.make(CART_POLE, disable_env_checker=True), seed=0))
    restore(gym.make(CART_POLE), start)


class Odd(gym.Wrapper):
    """Attributes that a file, or `restore`, could not give back as they were, and some it can."""

    def __init__(self, env):
        super().__init__(env)
        self.queue, self.inside = deque([1], maxlen=2), {"a": deque([1], maxlen=2)}
        self.word, self.words = np.str_("train"), np.array(["a"])
        self.root, self.count = np.complex64(1j), np.int64(3)


def test_attributes_that_cannot_be_put_back_are_left_alone():
    env = Odd(gym.make("totalprop/CartPoleSwingUp-v0"))
    env.reset(seed=0)
    layers = dict(snapshot(env).layers)
    assert set(layers["Odd"]) & set(vars(env)) == {"queue", "count"}
    start = snapshot(env)
    env.queue.append(5)
    env.inside["a"].append(5)
    restore(env, start)
    assert env.queue == deque([1], maxlen=2) and env.queue.maxlen == 2
    assert list(env.inside["a"]) == [1, 5] and env.inside["a"].maxlen == 2


@pytest.mark.parametrize("name", ["CartPole-v1", "Acrobot-v1", "MountainCar-v0"])
def test_classic_control_of_discrete_actions_goes_on_from_a_snapshot_and_from_its_values(name):
    def ahead(env):
        steps = [env.step(action) for action in (0, 1, 1, 0)]
        return np.concatenate([[*np.ravel(step[0]), step[1]] for step in steps])

    env = Rewindable(gym.make(name))
    env.reset(seed=3)
    env.step(1)
    values = env.snapshot().state_dict()
    expected = ahead(env)
    other = Rewindable(gym.make(name))
    other.reset(seed=4)
    for candidate in (env, other):
        candidate.restore(values)
        np.testing.assert_array_equal(ahead(candidate), expected)


def test_a_subclass_of_classic_control_may_have_more_state():
    class Drifting(type(gym.make("Pendulum-v1").unwrapped)):
        pass

    assert can_rewind(gym.make("Pendulum-v1")) and not can_rewind(Drifting())
