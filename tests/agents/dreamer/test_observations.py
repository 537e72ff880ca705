"""DreamerTPX on observations of any kind: images of any size, choices and dictionaries."""

import collections

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from tests.agents.contract.probes import assert_same, assert_same_agents
from totalprop.agents import DreamerTPX
from totalprop.agents.dreamer import open_loop
from totalprop.agents.dreamer.observations import ObservationForm
from totalprop.agents.dreamer.policy import DreamerPolicy
from totalprop.agents.dreamer.replay import SequenceReplay
from totalprop.agents.dreamer.resize import area_resize

TINY = {
    "policy_kwargs": {"deter": 8, "hidden": 8, "width": 8, "stoch": 4, "conv_depth": 2},
    "sequence_length": 8, "batch_size": 3, "horizon": 3, "learning_starts": 20, "train_freq": 10,
    "gradient_steps": 1, "buffer_size": 500, "decoded_share": 0.5, "seed": 0,
    "device": "cpu",
}  # fmt: skip
IMAGE = spaces.Box(0, 255, (84, 70, 3), np.uint8)
MIXED = spaces.Dict(
    {
        "position": spaces.Box(-9, 9, (2,), np.float64),
        "camera": IMAGE,
        "depth": spaces.Box(0, 255, (30, 40), np.uint8),
        "compass": spaces.Discrete(4, start=1),
        "doors": spaces.MultiBinary(3),
        "grid": spaces.MultiDiscrete([[2, 5], [3, 2]]),
    }
)
SPACES = {
    "mixed": MIXED,
    "vector in a dictionary": spaces.Dict({"a": spaces.Box(-9, 9, (3,), np.float32)}),
    "choices in a dictionary": spaces.Dict({"a": spaces.Discrete(5), "b": spaces.Discrete(3)}),
    "image in a dictionary": spaces.Dict({"look": IMAGE}),
    "image": IMAGE,
    "channel first": spaces.Box(0, 255, (3, 84, 70), np.uint8),
    "grey": spaces.Box(0, 255, (84, 84), np.uint8),
    "one channel": spaces.Box(0, 255, (210, 160, 1), np.uint8),
    "four channels": spaces.Box(0, 255, (32, 32, 4), np.uint8),
    "flags": spaces.Box(0, 1, (3,), np.bool_),
    "discrete": spaces.Discrete(7),
    "many choices": spaces.MultiDiscrete([3, 300]),
    "switches": spaces.MultiBinary([2, 2]),
}


class SpaceEnv(gym.Env):
    """Random observations of a space; episodes of 7 steps. `seen` lists them."""

    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, space):
        self.observation_space, self.seen = space, []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.time = 0
        return self._look(), {}

    def step(self, action):
        self.time += 1
        return self._look(), float(action[0]), self.time == 7, False, {}

    def _look(self):
        self.seen.append(self.observation_space.sample())
        return self.seen[-1]


def make(space, n_envs=1, **changes):
    env = DummyVecEnv([lambda: SpaceEnv(space)] * n_envs)
    return DreamerTPX("DreamerPolicy", env, **{**TINY, **changes})


def stored(agent):
    """All entries of environment 0, as the model sees them."""
    replay = agent.replay_buffer
    rows = replay._rows(0, 0, replay._count[0])
    if not replay._parts:
        return rows["observation"]
    return {name: rows[field] for name, field in replay._parts.items()}


@pytest.mark.parametrize("name", [*SPACES, "vector"])
def test_auto_depends_on_what_is_observed(name):
    space = {**SPACES, "vector": spaces.Box(-9, 9, (3,), np.float32)}[name]
    free_nats, representation_scale, rate = 1.0, 0.1, 3e-3
    if name in ("vector", "vector in a dictionary", "flags"):
        free_nats, representation_scale = 0.0, 1.0
    elif name not in ("choices in a dictionary", "discrete", "many choices", "switches"):
        rate = 1e-3
    arguments = ("free_nats", "representation_scale", "model_learning_rate")
    agent = make(space, **dict.fromkeys(arguments, "auto"))
    settings = agent._update_settings()
    assert settings.model.free_nats == free_nats
    assert settings.model.representation_scale == representation_scale
    assert settings.model_learning_rate == rate
    assert {getattr(agent, argument) for argument in arguments} == {"auto"}
    agent.free_nats, agent.representation_scale, agent.model_learning_rate = 0.5, 0.4, 0.3
    settings = agent._update_settings()
    assert settings.model.free_nats == 0.5 and settings.model.representation_scale == 0.4
    assert settings.model_learning_rate == 0.3


# --------------------------------------------------------------------------------------------
# what is stored
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("name", SPACES)
def test_every_space_is_learned_in(name, n_envs):
    agent = make(SPACES[name], n_envs).learn(60)
    assert agent._n_updates >= 4
    assert all(torch.isfinite(p).all() for p in agent.policy.parameters())
    observation = SPACES[name].sample()
    assert agent.predict(observation)[0].shape == (2,)
    assert evaluate_policy(agent, make(SPACES[name]).env, 1)[0] is not None


TAXI = max(name for name in gym.registry if name.startswith("Taxi-v"))  # versions differ


@pytest.mark.parametrize("env_id", ["FrozenLake-v1", TAXI, "Blackjack-v1"])
def test_gymnasiums_text_games_are_learned_in_or_sent_to_a_wrapper(env_id):
    env = gym.make(env_id)
    if env_id == "Blackjack-v1":  # a tuple
        with pytest.raises(ValueError, match="FlattenObservation"):
            DreamerTPX("DreamerPolicy", env, **TINY)
        env = gym.wrappers.FlattenObservation(env)
    agent = DreamerTPX("DreamerPolicy", env, **TINY).learn(60)
    action, _ = agent.predict(env.reset(seed=0)[0])
    assert env.action_space.contains(action) and agent._n_updates >= 4


def test_entries_are_stored_as_the_model_sees_them():
    """Images resized and channel first, choices from 0 on, the last observation of episodes too."""
    agent = make(MIXED).learn(30)
    seen, found = agent.env.envs[0].unwrapped.seen, stored(agent)
    assert len(found["compass"]) == len(seen) == 35
    for i, observation in enumerate(seen):
        camera = observation["camera"].transpose(2, 0, 1)
        assert np.array_equal(found["camera"][i], area_resize(camera, 64))
        assert np.array_equal(found["depth"][i], area_resize(observation["depth"][None], 64))
        assert np.array_equal(found["position"][i], observation["position"])
        assert found["compass"][i] == observation["compass"] - 1
        assert np.array_equal(found["doors"][i], observation["doors"])
        assert np.array_equal(found["grid"][i], observation["grid"].flatten())
    dtypes = {name: str(part.dtype) for name, part in found.items()}
    assert dtypes.pop("position") == "float64" and set(dtypes.values()) == {"uint8"}


def test_images_of_64x64_are_stored_as_they_come():
    space = spaces.Box(0, 255, (64, 64, 3), np.uint8)
    agent = make(space).learn(10)
    for image, found in zip(agent.env.unwrapped.envs[0].unwrapped.seen, stored(agent), strict=True):
        assert np.array_equal(found, image.transpose(2, 0, 1))
    assert agent.policy.to_model.describe() == ""


def test_resizing_is_said_once(capsys):
    agent = make(MIXED, verbose=1).learn(5)
    agent.learn(5, reset_num_timesteps=False)
    out = capsys.readouterr().out
    sentence = (
        "images of 84x70 ('camera'), 30x40 ('depth') are resized to 64x64 by averaging areas, "
        "without keeping their aspect ratio"
    )
    assert out.count(sentence) == 1
    assert agent.policy.to_model.describe() == sentence
    make(spaces.Box(0, 255, (210, 160, 3), np.uint8), verbose=1).learn(5)
    assert "images of 210x160 are resized to 64x64" in capsys.readouterr().out


def test_sizes_of_all_entries_are_counted_and_described(monkeypatch):
    form = ObservationForm(MIXED)
    replay = SequenceReplay(100, form.shapes, form.dtypes, 2)
    entry = (
        3 * 64 * 64 + 1 + 3 + 4 + 64 * 64 + 2 * 8
    )  # camera, compass, doors, grid, depth, position
    assert replay.bytes == 100 * (entry + 2 * 4 + 4 + 1 + 4)
    assert replay.describe() == (
        "replay: 100 entries of 'camera' (3, 64, 64) uint8, 'compass' (1,) uint8, "
        "'depth' (1, 64, 64) uint8, 'doors' (3,) uint8, 'grid' (4,) uint8, "
        "'position' (2,) float64, 1.6 MB in RAM"
    )
    monkeypatch.setattr("totalprop.agents.dreamer.replay.available_bytes", lambda _: 2**30)
    with pytest.raises(MemoryError, match=r"1,000,000 entries takes 16\.4 GB in RAM"):
        SequenceReplay(1_000_000, form.shapes, form.dtypes, 2)


# --------------------------------------------------------------------------------------------
# the same run in another form
# --------------------------------------------------------------------------------------------


class Walk(gym.Env):
    """A random walk of three numbers, pushed by the action."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.time = self.np_random.normal(size=3).astype(np.float32), 0
        return self.x.copy(), {}

    def step(self, action):
        self.x += np.float32(0.1) * np.float32([*action, self.np_random.normal()])
        self.time += 1
        return self.x.copy(), -float(self.x[0] ** 2), self.time == 9, False, {}


def learned(convert, space):
    """Parameters, replay and actions after a run on `Walk` in another form."""
    env = gym.wrappers.TransformObservation(Walk(), convert, space)
    agent = DreamerTPX("DreamerPolicy", env, **TINY).learn(80)
    return agent


def part(*shape):
    return spaces.Box(-np.inf, np.inf, shape, np.float32)


FORMS = {
    "one entry": (lambda x: {"a": x}, {"a": part(3)}),
    "two entries": (lambda x: {"a": x[:1], "b": x[1:]}, {"a": part(1), "b": part(2)}),
    "in another order": (
        lambda x: {"b": x[1:], "a": x[:1]},
        collections.OrderedDict([("b", part(2)), ("a", part(1))]),
    ),
    "odd names": (lambda x: {"../a/0": x[:1], "": x[1:2], "é.": x[2:]},
                  {"": part(1), "../a/0": part(1), "é.": part(1)}),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_dictionary_of_vectors_learns_the_run_of_their_concatenation(form):
    """Bit for bit: networks, optimisers, actions and rewards."""
    convert, entries = FORMS[form]
    plain = learned(lambda x: x, Walk.observation_space)
    if form == "odd names":  # joined in the order of their names
        plain = learned(lambda x: x[[1, 0, 2]], Walk.observation_space)
    agent = learned(convert, spaces.Dict(entries))
    own, expected = agent.policy.state_dict(), plain.policy.state_dict()
    renamed = {k.replace("coder.vector.net", "coder.net"): v for k, v in own.items()}
    assert_same(renamed, dict(expected))
    rows, theirs = (x.replay_buffer._rows(0, 0, 81) for x in (agent, plain))
    for name in ("action", "reward", "position"):
        np.testing.assert_array_equal(rows[name], theirs[name])
    joined = np.concatenate([rows[f] for f in agent.replay_buffer._parts.values()], -1)
    np.testing.assert_array_equal(joined, theirs["observation"])


def test_an_image_of_another_size_learns_the_run_of_the_resized_one():
    space = spaces.Box(0, 255, (96, 80, 3), np.uint8)

    class Resized(gym.ObservationWrapper):
        observation_space = spaces.Box(0, 255, (64, 64, 3), np.uint8)

        def observation(self, image):
            return area_resize(image.transpose(2, 0, 1), 64).transpose(1, 2, 0)

    one = DreamerTPX("DreamerPolicy", SpaceEnv(space), **TINY).learn(60)
    two = DreamerTPX("DreamerPolicy", Resized(SpaceEnv(space)), **TINY).learn(60)
    assert_same_agents(one, two)


def test_switches_learn_the_run_of_choices_between_two():
    spaces_of = [spaces.MultiBinary(3), spaces.MultiDiscrete([2, 2, 2])]

    class Switches(SpaceEnv):
        def _look(self):
            return self.np_random.integers(2, size=3).astype(self.observation_space.dtype)

    agents = [DreamerTPX("DreamerPolicy", Switches(x), **TINY).learn(60) for x in spaces_of]
    assert_same_agents(*agents)


# --------------------------------------------------------------------------------------------
# predict
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPACES)
def test_predict_takes_one_observation_and_batches_as_vec_envs_return_them(name):
    agent = make(SPACES[name], n_envs=3)
    seen = agent.env.reset()
    starts, state = np.ones(3, bool), None
    for _ in range(3):
        actions, state = agent.predict(seen, state, starts, deterministic=True)
        starts = np.zeros(3, bool)
        assert actions.shape == (3, 2)
    actions, _ = agent.predict(seen, deterministic=True)
    one = {k: v[1] for k, v in seen.items()} if isinstance(seen, dict) else seen[1]
    action, _ = agent.predict(one, deterministic=True)
    assert action.shape == (2,)
    np.testing.assert_allclose(action, actions[1], rtol=1e-5, atol=1e-6)
    raw = SPACES[name].sample()  # as the environment gives it: channel last, whole numbers
    assert agent.predict(raw)[0].shape == (2,)


def test_predict_sees_every_entry():
    torch.manual_seed(0)
    agent = make(MIXED, policy_kwargs={**TINY["policy_kwargs"], "layer_norm": True})
    agent.set_parameters(  # untrained, the actor hardly looks at the state
        {"policy": {k: v * 3 for k, v in agent.policy.state_dict().items()}}, exact_match=False
    )
    MIXED.seed(0)
    one, other = MIXED.sample(), MIXED.sample()
    other["compass"] = one["compass"] % 4 + 1
    expected, _ = agent.predict(one, deterministic=True)
    for name in MIXED:
        action, _ = agent.predict({**one, name: other[name]}, deterministic=True)
        assert not np.array_equal(action, expected), name
    extra, _ = agent.predict({**one, "unknown": 3}, deterministic=True)
    np.testing.assert_array_equal(extra, expected)


def test_observations_that_do_not_fit_are_one_sentence():
    agent, one = make(MIXED), MIXED.sample()
    for bad, expected in (
        (
            {k: v for k, v in one.items() if k != "doors"},
            "must be a dictionary of .*'doors'.* got a",
        ),
        (np.zeros(3), "must be a dictionary of 'camera', .* got ndarray"),
        ({**one, "position": np.zeros((4, 2))}, "batches of one size, got .*'position': 4"),
        (
            {**one, "position": np.zeros(3)},
            r"observation shape \(3,\) of entry 'position', expected \(2,\), or \(n, 2\) of",
        ),
        ({**one, "compass": 0}, "of entry 'compass' must be one of 1 to 4, got 0; correct"),
        ({**one, "grid": np.full((2, 2), 2)}, "of entry 'grid' must be one of 0 to 1, got 2"),
        ({**one, "position": np.array([0, np.nan])}, r"non-finite number.* entry 'position'"),
        ((one, {}), "mixing Gym API"),
    ):
        with pytest.raises(ValueError, match=expected) as error:
            agent.predict(bad)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="the observation must be one of 0 to 6, got 7; correct"):
        make(spaces.Discrete(7)).predict(7)


def test_an_environment_whose_choices_leave_their_space_is_refused():
    class Leaves(SpaceEnv):
        def _look(self):
            return 3 + self.time

    with pytest.raises(ValueError, match="must be one of 0 to 6, got 7; correct the environment"):
        DreamerTPX("DreamerPolicy", Leaves(spaces.Discrete(7)), **TINY).learn(30)


def test_a_policy_made_by_hand_takes_images_channel_last():
    kwargs = TINY["policy_kwargs"]
    policy = DreamerPolicy(IMAGE, SpaceEnv.action_space, **kwargs)
    first = DreamerPolicy(SPACES["channel first"], SpaceEnv.action_space, **kwargs)
    first.load_state_dict(policy.state_dict())
    image = IMAGE.sample()
    a, _ = policy.predict(image, deterministic=True)
    b, _ = first.predict(image.transpose(2, 0, 1), deterministic=True)
    c, _ = policy.predict(image[::-1], deterministic=True)
    np.testing.assert_array_equal(a, b)
    assert c.shape == (2,)


# --------------------------------------------------------------------------------------------
# files and pictures
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixed", "grey", "discrete"])
def test_files_of_agent_and_replay_hold_everything(name, tmp_path):
    agent = make(SPACES[name], n_envs=2).learn(60)
    agent.save(tmp_path / "agent"), agent.save_replay_buffer(tmp_path / "replay.npz")
    loaded = DreamerTPX.load(tmp_path / "agent", env=make(SPACES[name], n_envs=2).env, device="cpu")
    assert_same_agents(loaded, agent)
    observation = SPACES[name].sample()
    found, expected = (x.predict(observation, deterministic=True)[0] for x in (loaded, agent))
    np.testing.assert_array_equal(found, expected)
    loaded.load_replay_buffer(tmp_path / "replay.npz")
    batches = [x.replay_buffer.sample(9, 5, np.random.default_rng(0)) for x in (loaded, agent)]
    assert_same(*(batch._asdict() for batch in batches))
    loaded.learn(60)


def test_a_replay_of_other_entries_is_refused(tmp_path):
    agent = make(MIXED).learn(10)
    agent.save_replay_buffer(tmp_path / "replay.npz")
    others = {
        "name": spaces.Dict({("x" if k == "doors" else k): v for k, v in MIXED.items()}),
        "shape": spaces.Dict({**MIXED, "position": part(3)}),
        "number": spaces.Dict({k: v for k, v in MIXED.items() if k != "doors"}),
        "plain": part(3),
    }
    for space in others.values():
        with pytest.raises(ValueError, match=r"holds a replay of 1 environment.*this one is of"):
            make(space).load_replay_buffer(tmp_path / "replay.npz")


def test_choices_that_are_no_option_are_refused_in_files(tmp_path):
    form = ObservationForm(MIXED)
    foreign, own = (
        SequenceReplay(50, form.shapes, form.dtypes, 2, options=options)
        for options in ({}, form.options)
    )
    one = {name: part[None] for name, part in form.one(MIXED.sample()).items()}
    for compass in (3, 4):  # the last option, and none
        foreign.start({**one, "compass": np.array([[compass]], np.uint8)})
        foreign.save(tmp_path / "replay.npz")
        if compass == 3:
            own.load(tmp_path / "replay.npz")
            continue
        with pytest.raises(ValueError, match="a choice that is none of its options"):
            own.load(tmp_path / "replay.npz")
        with pytest.raises(ValueError, match="a choice that is none of its options"):
            own._put_rows(0, 0, foreign._rows(0, 0, 2))


def test_the_world_model_of_a_dictionary_is_pretrained(tmp_path):
    agent = make(MIXED).learn(40)
    agent.save(tmp_path / "agent")
    other = make(MIXED, seed=5, pretrained_world_model=str(tmp_path / "agent.zip"))
    assert_same(dict(other.policy.model.state_dict()), dict(agent.policy.model.state_dict()))
    other.learn(40)
    assert torch.equal(other.policy.model.offset, agent.policy.model.offset)
    with pytest.raises(ValueError, match="use the environment, preset and policy_kwargs of that"):
        make(spaces.Discrete(3), pretrained_world_model=str(tmp_path / "agent.zip"))


def test_pictures_show_the_image_or_else_all_numbers():
    agent = make(MIXED).learn(40)
    truth, model = open_loop.predict_sequences(agent, 2)
    assert truth.shape == model.shape == (8, 2, 64, 64, 3)
    assert len(open_loop.picture(agent).figure.axes[0].images) == 1
    for name, size in (("choices in a dictionary", 2), ("vector in a dictionary", 3)):
        agent = make(SPACES[name]).learn(40)
        truth, model = open_loop.predict_sequences(agent, 2)
        assert truth.shape == model.shape == (8, 2, size)
        axes = open_loop.picture(agent).figure.axes
        assert sum(axis.get_visible() and len(axis.lines) > 0 for axis in axes) == size


# --------------------------------------------------------------------------------------------
# what is refused
# --------------------------------------------------------------------------------------------

VECTOR = part(2)
NESTED = {
    "dictionary": spaces.Dict({"a": spaces.Dict({"b": VECTOR, "c": VECTOR}), "d": VECTOR}),
    "tuple": spaces.Tuple((VECTOR, spaces.Discrete(3))),
    "tuple in a dictionary": spaces.Dict({"a": spaces.Tuple((VECTOR, VECTOR))}),
    "images": spaces.Dict({"a": spaces.Dict({"look": IMAGE, "it's": VECTOR}), "d": VECTOR}),
    "tuple of images": spaces.Tuple((IMAGE, spaces.Tuple((VECTOR, IMAGE)))),
    "text": spaces.Dict({"mission": spaces.Text(9), "look": IMAGE, "way": spaces.Discrete(4)}),
    "image of both orders": spaces.Dict(
        {"look": IMAGE, "map": spaces.Box(0, 255, (2, 9, 8), np.uint8)}
    ),
    "image of floats": spaces.Dict({"a": spaces.Box(0, 1, (8, 8, 3), np.float32), "d": VECTOR}),
}


@pytest.mark.parametrize("name", NESTED)
def test_spaces_that_are_refused_are_learned_in_once_the_named_line_is_applied(name):
    env = SpaceEnv(NESTED[name])
    with pytest.raises(ValueError, match=r"gymnasium\.wrappers\.") as error:
        DreamerTPX("DreamerPolicy", env, **TINY)
    message = str(error.value)
    assert "\n" not in message
    code = message[message.index("gymnasium.wrappers.") :]
    wrapped = eval(code, {"gymnasium": gym, "env": env})
    agent = DreamerTPX(
        "DreamerPolicy", wrapped if isinstance(wrapped, gym.Env) else wrapped(env), **TINY
    )
    agent.learn(40)
    if "image" in name and "float" not in name:  # they are seen as images
        assert agent.policy.model.encoder.image is not None


def test_vec_normalize_around_a_dictionary_is_refused():
    space = spaces.Dict({"a": VECTOR})
    with pytest.raises(ValueError, match="pass the environment without VecNormalize"):
        DreamerTPX("DreamerPolicy", VecNormalize(DummyVecEnv([lambda: SpaceEnv(space)])), **TINY)
