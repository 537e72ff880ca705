"""Open-loop predictions: what they show, and that making them does not change learning."""

import random

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.logger import KVWriter, Logger

from totalprop.agents import DreamerTPX
from totalprop.agents.dreamer import open_loop
from totalprop.agents.dreamer.open_loop import OpenLoopPictures

TINY = {
    "policy_kwargs": {"deter": 8, "hidden": 8, "width": 8, "stoch": 4, "conv_depth": 2},
    "sequence_length": 8,
    "batch_size": 3,
    "horizon": 3,
    "learning_starts": 20,
    "train_freq": 10,
    "gradient_steps": 1,
    "buffer_size": 500,
    "seed": 0,
    "device": "cpu",
}


class Clock(gym.Env):
    """Shows the time as a vector (time, -time) or as an image of that grey level."""

    action_space = spaces.Box(-1, 1, (1,))

    def __init__(self, channels=0):
        self.channels, self.observation_space = channels, spaces.Box(-99, 99, (2,), np.float32)
        if channels:
            self.observation_space = spaces.Box(0, 255, (64, 64, channels), np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self._look(), {}

    def step(self, action):
        self.time += 1
        return self._look(), 0.0, False, self.time == 12, {}

    def _look(self):
        if self.channels:
            return np.full((64, 64, self.channels), self.time, np.uint8)
        return np.array([self.time, -self.time], np.float32)


def make(channels=0, **changes):
    return DreamerTPX("DreamerPolicy", Clock(channels), **{**TINY, **changes})


def clock(first):
    """[8, B] times from the first ones on; an episode has 13 of them."""
    return (first.round() + np.arange(8)[:, None]) % 13


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_in_the_unit_range_channel_last(channels):
    truth, model = open_loop.predict_sequences(make(channels).learn(30), sequences=4)
    assert truth.shape == model.shape == (8, 4, 64, 64, channels)
    assert model.min() >= 0 and model.max() <= 1
    times = truth[:, :, 0, 0, 0] * 255
    np.testing.assert_allclose(times, clock(times[:1]), atol=1e-4)


def test_vectors_are_as_the_environment_gives_them():
    truth, model = open_loop.predict_sequences(make().learn(30))
    assert truth.shape == model.shape == (8, 6, 2)
    np.testing.assert_array_equal(truth[..., 0], clock(truth[:1, :, 0]))
    np.testing.assert_array_equal(truth[..., 1], -truth[..., 0])
    assert np.isfinite(model).all()


@pytest.mark.parametrize("channels", [0, 1])
def test_sequences_lie_within_an_episode_where_they_can(channels):
    """13 entries of an episode hold 6 windows of 8; two steps after a reset hold none."""
    truth, _ = open_loop.predict_sequences(make(channels).learn(60))
    times = truth[..., 0] if channels == 0 else truth[:, :, 0, 0, 0] * 255
    assert (np.diff(times.round(), axis=0) == 1).all()
    crossing, _ = open_loop.predict_sequences(
        make(sequence_length=20, learning_starts=30).learn(40)
    )
    assert (np.diff(crossing[..., 0], axis=0) == -12).any()


def test_model_sees_the_context_and_nothing_after_it(monkeypatch):
    agent = make().learn(30)
    sample = agent.replay_buffer.sample
    _, expected = open_loop.predict_sequences(agent)
    for step, is_seen in ((open_loop.CONTEXT - 1, True), (open_loop.CONTEXT, False)):

        def changed(*args, step=step):
            batch = sample(*args)
            batch.observation[step] += 5
            return batch

        monkeypatch.setattr(agent.replay_buffer, "sample", changed)
        _, model = open_loop.predict_sequences(agent)
        assert np.array_equal(model[: open_loop.CONTEXT - 1], expected[: open_loop.CONTEXT - 1])
        assert np.array_equal(model[open_loop.CONTEXT :], expected[open_loop.CONTEXT :]) != is_seen


@pytest.mark.parametrize("length", [2, 4, 5, 6])
def test_sequences_may_be_shorter_than_the_context(length):
    truth, model = open_loop.predict_sequences(make(sequence_length=length).learn(20))
    assert truth.shape == model.shape == (length, 6, 2)


def test_without_a_replay_the_remedy_is_named():
    with pytest.raises(ValueError, match="no replay to sample from; call learn first"):
        open_loop.predict_sequences(make())


@pytest.mark.parametrize("channels", [0, 3], ids=["vectors", "images"])
def test_looking_does_not_change_the_training(channels):
    agent, other = make(channels).learn(30), make(channels).learn(30)
    first = open_loop.predict_sequences(agent)
    second = open_loop.predict_sequences(agent)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    for each in (agent, other):
        each.learn(20, reset_num_timesteps=False)
    for a, b in zip(agent.policy.parameters(), other.policy.parameters(), strict=True):
        assert torch.equal(a, b)


def test_looking_draws_from_no_generator_but_its_own():
    agent = make().learn(30)
    np.random.seed(0)

    def states():
        own = agent._generator.get_state().tolist(), str(agent._rng.bit_generator.state)
        return *own, torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()

    before = states()
    open_loop.predict_sequences(agent)
    assert states() == before


# Pictures


@pytest.mark.parametrize("channels", [1, 3])
def test_video_has_rows_truth_model_error_and_a_column_for_each_sequence(channels):
    T, B, H, W = 2, 3, 4, 5
    rng = np.random.default_rng(0)
    truth, model = (rng.uniform(size=(T, B, H, W, channels)).astype(np.float32) for _ in range(2))
    frames = open_loop.video(truth, model)
    assert frames.shape == (T, 3 * H, B * W, 3) and frames.dtype == np.uint8
    for row, values in enumerate((truth, model, (model - truth + 1) / 2)):
        for b in range(B):
            found = frames[:, row * H : (row + 1) * H, b * W : (b + 1) * W]
            expected = np.broadcast_to((values[:, b] * 255).round(), found.shape)
            np.testing.assert_array_equal(found, expected)


def test_a_perfect_model_has_a_grey_error_and_the_extremes_do_not_wrap():
    truth = np.zeros((1, 1, 2, 2, 3), np.float32)
    assert (open_loop.video(truth, truth)[0, 4:] == 128).all()
    assert (open_loop.video(truth, truth + 1)[0, 4:] == 255).all()
    assert (open_loop.video(truth + 1, truth)[0, 4:] == 0).all()


@pytest.mark.parametrize(("every", "columns"), [(1, 7), (5, 2), (7, 1)])
def test_film_strip_is_the_first_sequence_with_time_to_the_right(every, columns):
    rng = np.random.default_rng(0)
    truth, model = (rng.uniform(size=(7, 2, 4, 5, 3)) for _ in range(2))
    strip = open_loop.film_strip(truth, model, every)
    assert strip.shape == (12, columns * 5, 3)
    frames = open_loop.video(truth, model)
    for i in range(columns):
        np.testing.assert_array_equal(strip[:, i * 5 : i * 5 + 5], frames[i * every, :, :5])


@pytest.mark.parametrize("channels", [0, 3])
def test_pictures_are_logged_when_due_and_change_nothing(channels, tmp_path):
    class Recorder(KVWriter):
        def __init__(self):
            self.pictures = []

        def write(self, values, excluded, step=0):
            self.pictures += [v for k, v in values.items() if k == "figures/open_loop"]

        def close(self):
            pass

    def train(callback):
        agent, recorder = make(channels), Recorder()
        agent.set_logger(Logger(str(tmp_path), [recorder]))
        agent.learn(100, callback=callback, log_interval=1)
        return torch.nn.utils.parameters_to_vector(agent.policy.parameters()), recorder.pictures

    weights, pictures = train(OpenLoopPictures(40))
    assert len(pictures) == 2  # after the first updates, and 40 steps later
    axis = pictures[0].figure.axes[0]
    if channels:  # steps 0 and 5
        assert axis.images[0].get_array().shape == (3 * 64, 2 * 64, 3)
        assert [text.get_text() for text in axis.get_yticklabels()] == ["truth", "model", "error"]
        below = [text.get_text() for text in axis.get_xticklabels()]
        assert below == ["step 0\nseen", "step 5\npredicted"]
    else:
        names = [text.get_text() for text in pictures[0].figure.legends[0].get_texts()]
        assert names == ["truth", "model", "from here on it sees actions alone"]
    other, none = train(None)
    assert not none and torch.equal(weights, other)
