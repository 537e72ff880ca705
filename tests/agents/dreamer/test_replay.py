"""DreamerTPX's replay, against environments whose numbers identify episode and step."""

import os
import re
import zipfile
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.vec_env import DummyVecEnv

from totalprop.agents.dreamer.replay import SequenceReplay

LENGTHS = [[7, 3, 12], [5], [1, 9]]  # decisions per episode, of three environments


class CountingEnv(gym.Env):
    """Observation (environment, episode, step).

    Episode e lasts lengths[e % len(lengths)] decisions; every third one is truncated, the others
    terminate. `history` lists the observations given, in order.
    """

    def __init__(self, index, lengths, dtype):
        self.observation_space = spaces.Box(0, 255, (3,), dtype)
        self.action_space = spaces.Box(-1e3, 1e3, (2,), np.float32)
        self.index, self.lengths, self.episode, self.history = index, lengths, -1, []

    def reset(self, *, seed=None, options=None):
        self.episode, self.t = self.episode + 1, 0
        return self._observe(), {}

    def step(self, action):
        np.testing.assert_array_equal(action, action_at(self.index, self.episode, self.t))
        self.t += 1
        done = self.t == self.lengths[self.episode % len(self.lengths)]
        cut = is_truncated(self.episode)
        reward = reward_at(self.index, self.episode, self.t)
        return self._observe(), reward, done and not cut, done and cut, {}

    def _observe(self):
        self.history.append((self.index, self.episode, self.t))
        return np.array(self.history[-1], self.observation_space.dtype)


def is_truncated(episode):
    return episode % 3 == 2


def action_at(env, episode, t):
    """The action taken at step t, all of it exact in float32."""
    return np.array([1 + t + env / 4, 1 + episode], np.float32)


def reward_at(env, episode, t):
    """The reward received on arriving at step t."""
    return 1 + t + 256.0 * episode + env / 4


class Loop:
    """The agent's loop: collects decisions from one VecEnv into any number of replays."""

    def __init__(self, lengths, dtype=np.uint8):
        makers = [lambda i=i, n=n: CountingEnv(i, n, dtype) for i, n in enumerate(lengths)]
        self.vec_env, self.lengths = DummyVecEnv(makers), lengths
        self.last = None

    def collect(self, decisions, *replays):
        if self.last is None:
            self.last = self.vec_env.reset()
            for replay in replays:
                replay.start(self.last)
        for _ in range(decisions):
            actions = np.stack([action_at(*observation) for observation in self.last.astype(int)])
            result = self.vec_env.step(actions)
            for replay in replays:
                replay.step(actions, *result)
            self.last = result[0]

    def windows(self, replay, length):
        """By brute force, all windows among the entries that each ring still holds."""
        ring, found = replay.capacity // replay.n_envs, []
        for env in self.vec_env.envs:
            held = env.history[-ring:]
            found += [tuple(held[i : i + length]) for i in range(len(held) - length + 1)]
        return found


class EveryIndex:
    """Stands in for a Generator: draws each integer once, so that a batch has every window."""

    def integers(self, high, size):
        return np.arange(high)


def make(capacity, n_envs=3, dtype=np.uint8, **kwargs):
    return SequenceReplay(capacity, (3,), dtype, 2, n_envs, **kwargs)


def filled(decisions, capacity, lengths=LENGTHS, **kwargs):
    replay, loop = make(capacity, len(lengths), **kwargs), Loop(lengths)
    loop.collect(decisions, replay)
    return replay, loop


def every_window(replay, length):
    return replay.sample(0, length, EveryIndex())


def windows(batch):
    """The windows of a batch, in the form of the environments' history."""
    per_window = batch.observation.transpose(0, 1).to(torch.int64).tolist()
    return [tuple(tuple(entry) for entry in window) for window in per_window]


def is_terminal(entry, lengths):
    env, episode, t = entry
    is_last = t == lengths[env][episode % len(lengths[env])]
    return is_last and not is_truncated(episode)


def assert_aligned(batch, lengths):
    """Assert that every action, reward and flag belongs to its observation."""
    for b, window in enumerate(windows(batch)):
        for i, (env, episode, t) in enumerate(window):
            action = action_at(env, episode, t - 1) if t else np.zeros(2)
            assert batch.action[i, b].tolist() == action.tolist()
            assert batch.reward[i, b] == (reward_at(env, episode, t) if t else 0)
            assert batch.is_first[i, b] == (t == 0)
            assert batch.is_terminal[i, b] == is_terminal((env, episode, t), lengths)


def assert_same(batch, other):
    for name, value in batch._asdict().items():
        assert value.dtype == getattr(other, name).dtype
        assert torch.equal(value, getattr(other, name)), name


@pytest.mark.parametrize("length", [1, 2, 4])
@pytest.mark.parametrize("decisions", [8, 40])  # before and after the rings of 30 are full
def test_actions_rewards_and_flags_belong_to_their_observation(decisions, length):
    replay, loop = filled(decisions, 90)
    batch = every_window(replay, length)
    assert batch.is_terminal.any()
    assert bool(batch.is_first.any())
    assert_aligned(batch, loop.lengths)
    # The final observation of an episode is there, and so is the one after the reset.
    steps = {(entry[0], entry[2]) for window in windows(batch) for entry in window}
    assert {(1, 0), (1, 5)} <= steps


def test_a_batch_has_time_first_and_the_stored_types():
    replay, _ = filled(20, 60)
    batch = replay.sample(6, 4, np.random.default_rng(0))
    assert batch.observation.shape == (4, 6, 3)
    assert batch.action.shape == (4, 6, 2)
    assert batch.reward.shape == batch.is_first.shape == batch.is_terminal.shape == (4, 6)
    kinds = [value.dtype for value in batch]
    assert kinds == [torch.uint8, torch.float32, torch.float32, torch.bool, torch.bool]


@pytest.mark.parametrize("length", [1, 3, 6])
def test_windows_are_consecutive_over_many_wrap_arounds(length):
    """None reaches from the newest entry over the write head to the oldest."""
    replay, loop = make(51), Loop(LENGTHS)  # rings of 17, prime to the episodes' lengths
    for _ in range(60):
        loop.collect(3, replay)
        expected = loop.windows(replay, length)
        if expected:
            batch = every_window(replay, length)
            assert sorted(windows(batch)) == sorted(expected)
            assert_aligned(batch, LENGTHS)
    assert len(replay) == replay.capacity == 51


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4), min_size=1, max_size=3),
    ring=st.integers(1, 25),
    decisions=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    length=st.integers(1, 8),
)
def test_stored_windows_are_those_of_brute_force(lengths, ring, decisions, length):
    # A capacity that n_envs does not divide loses the remainder.
    replay, loop = make(ring * len(lengths) + len(lengths) - 1, len(lengths)), Loop(lengths)
    for n in decisions:
        loop.collect(n, replay)
        histories = [env.history for env in loop.vec_env.envs]
        assert len(replay) == sum(min(ring, len(history)) for history in histories)
        expected = loop.windows(replay, length)
        held = {entry for history in histories for entry in history[-ring:]}
        assert replay.has_terminal() == any(is_terminal(entry, lengths) for entry in held)
        fewest = min(min(len(history), ring) for history in histories)
        assert replay.has_windows(length) == (fewest >= length)
        if expected:
            batch = every_window(replay, length)
            assert sorted(windows(batch)) == sorted(expected)
            assert_aligned(batch, lengths)
            if replay.has_windows(length):  # then every stored entry can be drawn
                assert {entry for window in windows(batch) for entry in window} == held
        else:
            with pytest.raises(ValueError, match=f"no window of {length} entries"):
                replay.sample(1, length, np.random.default_rng(0))


def test_every_window_is_equally_likely():
    # Chi-square of N = 20,000 draws over K windows: mean K - 1, variance 2 (K - 1); 4 sd allowed.
    n, length = 20_000, 3
    replay, loop = filled(40, 90)
    expected = loop.windows(replay, length)
    k = len(expected)

    def chi_square(drawn):
        counts = np.array([drawn.count(window) for window in expected])
        assert counts.sum() == n
        return ((counts - n / k) ** 2 / (n / k)).sum()

    threshold = k - 1 + 4 * np.sqrt(2 * (k - 1))
    generator = np.random.default_rng(0)
    assert chi_square(windows(replay.sample(n, length, generator))) < threshold
    # The test has the power to see danijar/dreamer's scheme: an episode, then a start in it.
    episodes = {}
    for window in expected:
        if window[0][:2] == window[-1][:2]:
            episodes.setdefault(window[0][:2], []).append(window)
    keys = list(episodes)
    picked = [episodes[keys[i]] for i in generator.integers(len(keys), size=n)]
    assert chi_square([starts[generator.integers(len(starts))] for starts in picked]) > threshold


def test_draws_are_the_generators():
    replay, _ = filled(20, 60)
    first, second = (replay.sample(9, 3, np.random.default_rng(5)) for _ in range(2))
    assert_same(first, second)
    assert windows(first) != windows(replay.sample(9, 3, np.random.default_rng(6)))


def test_a_new_entry_is_sampled_at_once():
    replay, loop = filled(3, 60, [[50]])
    assert len(windows(every_window(replay, 2))) == 3
    loop.collect(1, replay)
    assert len(windows(every_window(replay, 2))) == 4
    assert len(windows(every_window(replay, 4))) == 2


def test_a_reset_in_mid_episode_ends_it_without_a_termination():
    replay, loop = filled(3, 60, [[50]])
    loop.last = None
    loop.collect(2, replay)  # episode 1 begins
    batch = every_window(replay, 3)
    starts = [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 0, 3), (0, 1, 0)]
    assert [window[0] for window in windows(batch)] == starts
    assert_aligned(batch, [[50]])
    assert not batch.is_terminal.any()


def test_what_episodes_earned_includes_the_rest_of_one_that_is_partly_overwritten():
    """Episodes of 4 decisions, which are 5 entries; of 13 entries the ring holds the newest 6."""
    replay, _ = filled(10, 6, [[4]])
    whole, to_go = replay.returns(0.5)
    first = [reward_at(0, 1, t) for t in (2, 3, 4)]
    last = [reward_at(0, 2, t) for t in (1, 2)]
    assert whole.tolist() == [sum(first), sum(last)]
    expected = []
    for rewards in (first, last):
        for t in range(len(rewards)):
            expected.append(sum(0.5**i * r for i, r in enumerate(rewards[t:])))
    np.testing.assert_allclose(to_go, expected)


def test_without_a_window_the_error_says_how_many_entries_there_are():
    replay, _ = filled(6, 300, [[50]])
    assert replay.sample(1, 7, np.random.default_rng(0)).reward.shape == (7, 1)
    with pytest.raises(ValueError, match=r"no window of 8 entries .* has 7 at most: .*collect"):
        replay.sample(1, 8, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"has 0 at most: .*collect more steps"):
        make(10).sample(1, 1, np.random.default_rng(0))
    # What the ring has lost no longer counts.
    with pytest.raises(ValueError, match="has 4 at most: take a smaller sequence_length"):
        filled(60, 4, [[50]])[0].sample(1, 5, np.random.default_rng(0))


def test_episodes_that_end_early_are_drawn_as_often_as_they_are_stored():
    """Half of the episodes end at step 6; windows of 20 entries held none of their ends.

    Of N = 40,000 drawn entries, a share p is terminal; entries of a window are not independent, so
    the number of windows, 2000, gives the standard error of the mean share of each.
    """
    replay, loop = filled(3000, 3000, [[6, 40]])
    held = loop.vec_env.envs[0].history[-3000:]
    p = np.mean([is_terminal(entry, [[6, 40]]) for entry in held])
    shares = replay.sample(2000, 20, np.random.default_rng(0)).is_terminal.float().mean(0).numpy()
    assert abs(shares.mean() - p) < 4 * shares.std() / np.sqrt(2000)
    assert p > 0.02


def test_a_million_images_take_at_most_5_percent_more_than_their_bytes():
    image = {"observation_shape": (3, 64, 64), "observation_dtype": np.uint8, "action_size": 21}
    for n_envs in (1, 16):  # the meta device has shapes and no memory
        replay = SequenceReplay(1_000_000, **image, n_envs=n_envs, device="meta", storage="device")
        assert 1_000_000 * 64 * 64 * 3 < replay.bytes <= 12.9e9
    assert replay.describe() == ("replay: 1,000,000 entries of (3, 64, 64) uint8, 12.4 GB on meta")
    small = SequenceReplay(1000, **image)
    assert small.describe() == "replay: 1,000 entries of (3, 64, 64) uint8, 12.4 MB in RAM"
    arrays = [*small._arrays.values(), torch.from_numpy(small._position)]
    assert small.bytes == sum(array.nbytes for array in arrays)
    assert repr(small) == "SequenceReplay(0 of 1,000 entries in RAM)"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_memory_is_taken_as_entries_arrive():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    replay = SequenceReplay(40_000, (3, 64, 64), np.uint8, 6)
    replay.start(np.zeros((1, 3, 64, 64), np.uint8))
    assert replay.bytes > 490e6
    assert resident() - before < 50e6


@pytest.mark.parametrize(
    ("storage", "sentence"),
    [
        ("ram", "GB in RAM, which has .* GB: take a smaller buffer_size or storage='disk'"),
        ("disk", "GB on disk in .* which has .*: take a smaller buffer_size or another folder"),
    ],
)
def test_a_replay_too_large_says_what_to_do(storage, sentence, tmp_path):
    with pytest.raises(MemoryError, match=sentence):
        make(10**15, 1, storage=storage, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("storage", ["disk", "device"])
def test_every_storage_gives_the_same_samples(storage, tmp_path):
    loop, ram = Loop(LENGTHS), make(60)
    other = make(60, storage=storage, folder=tmp_path / "new")
    loop.collect(50, ram, other)
    assert_same(every_window(ram, 3), every_window(other, 3))
    draws = [replay.sample(40, 3, np.random.default_rng(1)) for replay in (ram, other)]
    assert_same(*draws)


@pytest.mark.gpu
@pytest.mark.parametrize("storage", ["ram", "disk", "device"])
def test_batches_on_a_gpu_equal_those_on_the_cpu(storage, tmp_path):
    loop, cpu = Loop(LENGTHS), make(60)
    gpu = make(60, storage=storage, folder=tmp_path, device="cuda")
    loop.collect(50, cpu, gpu)
    generators = np.random.default_rng(1), np.random.default_rng(1)
    batches = [(cpu.sample(40, 3, generators[0]), gpu.sample(40, 3, generators[1])) for _ in "ab"]
    for expected, batch in batches:  # both draws are under way before either is read
        assert {value.device.type for value in batch} == {"cuda"}
        assert_same(expected, type(batch)(*(value.cpu() for value in batch)))


def test_a_disk_folder_is_left_empty_and_may_be_shared(tmp_path):
    first, loop = filled(50, 60, storage="disk", folder=tmp_path)
    second = make(60, storage="disk", folder=tmp_path)
    second.start(np.zeros((3, 3), np.uint8))
    assert sorted(windows(every_window(first, 3))) == sorted(loop.windows(first, 3))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("decisions", [0, 9, 50])  # the first entries, part of a ring, wrapped
@pytest.mark.parametrize("storage", ["ram", "disk"])
def test_a_loaded_replay_continues_as_the_saved_one_would(
    decisions, storage, tmp_path, monkeypatch
):
    monkeypatch.setattr("totalprop.agents.dreamer.replay.BLOCK_BYTES", 100)  # four entries
    replay, loop = filled(decisions, 60)
    replay.save(tmp_path / "replay.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["replay.npz"]
    length = 3 if decisions else 1
    loaded, _ = filled(21, 60, storage=storage, folder=tmp_path / "scratch")
    every_window(loaded, length)  # what it holds and its cache are replaced
    loaded.load(tmp_path / "replay.npz")
    assert len(loaded) == len(replay)
    for more in (0, 1, 13):
        loop.collect(more, replay, loaded)
        first, second = (r.sample(30, length, np.random.default_rng(2)) for r in (replay, loaded))
        assert_same(first, second)


def test_an_empty_replay_can_be_saved_and_loaded(tmp_path):
    make(60).save(tmp_path / "replay.npz")
    replay, _ = filled(9, 60)
    replay.load(tmp_path / "replay.npz")
    assert len(replay) == 0


def test_a_larger_replay_keeps_what_was_loaded_into_it(tmp_path):
    replay, loop = filled(50, 60)
    replay.save(tmp_path / "replay.npz")
    larger = make(99)  # rings of 33 that begin with 20 entries
    larger.load(tmp_path / "replay.npz")
    draws = [r.sample(30, 3, np.random.default_rng(2)) for r in (replay, larger)]
    assert_same(*draws)
    histories = [env.history for env in loop.vec_env.envs]
    forgotten = [len(history) - 20 for history in histories]
    loop.collect(6, larger)
    held = {entry for (entry,) in windows(every_window(larger, 1))}
    assert held == {e for history, n in zip(histories, forgotten) for e in history[n:]}
    assert_aligned(every_window(larger, 3), LENGTHS)


def test_only_stored_entries_are_written(tmp_path):
    replay = SequenceReplay(20_000, (3, 64, 64), np.uint8, 2)
    replay.start(np.zeros((1, 3, 64, 64), np.uint8))
    replay.save(tmp_path / "replay.npz")
    assert (tmp_path / "replay.npz").stat().st_size < 20_000


def test_a_failed_save_keeps_the_previous_file(tmp_path, monkeypatch):
    replay, loop = filled(9, 60)
    path = tmp_path / "replay.npz"
    replay.save(path)
    before = path.read_bytes()
    loop.collect(5, replay)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("numpy.lib.format.write_array", fail)
        with pytest.raises(OSError, match="disk full"):
            replay.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["replay.npz"]


def test_loading_into_another_kind_of_replay_is_refused_and_changes_nothing(tmp_path):
    path = tmp_path / "replay.npz"
    replay, _ = filled(50, 60)
    replay.save(path)
    others = {
        "observations (4,) uint8": SequenceReplay(60, (4,), np.uint8, 2, 3),
        "observations (3,) float32": SequenceReplay(60, (3,), np.float32, 2, 3),
        "actions (1,)": SequenceReplay(60, (3,), np.uint8, 1, 3),
        "2 environment(s)": SequenceReplay(60, (3,), np.uint8, 2, 2),
        "room for 19": make(59),
    }
    for difference, other in others.items():
        other.start(np.ones((other.n_envs, *other._fields["observation"][0]), np.uint8))
        with pytest.raises(ValueError, match=re.escape(difference)):
            other.load(path)
        assert len(other) == other.n_envs
        assert other.sample(1, 1, np.random.default_rng(0)).observation.min() == 1


HOSTILE = {
    "missing": (lambda a: a.pop("reward/1/0"), "reward of environment 1 does not hold its 20"),
    "dtype": (lambda a: a.update({"reward/1/0": a["reward/1/0"].astype("f8")}), "float64"),
    "object": (lambda a: a.update({"reward/1/0": a["reward/1/0"].astype(object)}), "reward/1/0"),
    "shape": (lambda a: a.update({"action/0/0": a["action/0/0"][:, :1]}), "holds float32 of"),
    "axes": (lambda a: a.update({"reward/0/0": a["reward/0/0"][:, None]}), "holds float32 of"),
    "short": (lambda a: a.update({"reward/2/0": a["reward/2/0"][:9]}), "does not hold its 20"),
    "long": (lambda a: a.update({"reward/2/0": np.ones(21, "f4")}), "does not hold its 20"),
    "twice": (lambda a: a.update({"reward/2/4": np.ones(16, "f4")}), "does not hold its 20"),
    "gap": (lambda a: a.update({"reward/2/4": a.pop("reward/2/0")}), "does not hold its 20"),
    "unknown": (lambda a: a.update({"prize/0/0": np.ones(20, "f4")}), "unknown member"),
    "other env": (lambda a: a.update({"reward/7/0": np.ones(20, "f4")}), "holds float32 of"),
    "negative": (lambda a: a.update({"reward/0/-5": np.ones(5, "f4")}), "unknown member"),
    "no layout": (lambda a: a.pop("layout"), "it lacks its layout"),
    "layout": (lambda a: a.update(layout=np.array(3)), "layout is not a text"),
    "counts": (lambda a: a.update(filled=np.array([20, 20])), r"counts \[20, 20\]"),
    "reals": (lambda a: a.update(filled=np.array([20.0] * 3)), "not whole numbers"),
    "below 0": (lambda a: a.update(filled=np.array([20, 20, -1])), r"counts \[20, 20, -1\]"),
    "too many": (lambda a: a.update(filled=np.array([20, 20, 10**9])), "room for 20"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_lies_is_refused_before_anything_is_copied(name, tmp_path):
    """What no member holds would be whatever was in memory."""
    replay, _ = filled(50, 60)
    replay.save(tmp_path / "replay.npz")
    with np.load(tmp_path / "replay.npz") as file:
        arrays = dict(file)
    change, words = HOSTILE[name]
    change(arrays)
    np.savez(tmp_path / "replay.npz", **arrays)
    other, _ = filled(50, 60)
    for load in (other.check, other.load):
        with pytest.raises(ValueError, match=words) as error:
            load(tmp_path / "replay.npz")
        assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert len(other) == 60
    assert_same(every_window(other, 3), every_window(replay, 3))


def test_positions_that_no_episode_has_are_refused(tmp_path):
    replay, _ = filled(50, 60)
    replay.save(tmp_path / "replay.npz")
    for wrong in (-1, 1000):
        with np.load(tmp_path / "replay.npz") as file:
            arrays = dict(file)
        arrays["position/1/0"][5] = wrong
        np.savez(tmp_path / "wrong.npz", **arrays)
        with pytest.raises(ValueError, match="are not those of episodes"):
            make(60).load(tmp_path / "wrong.npz")


@pytest.mark.parametrize("compress", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
def test_a_large_header_is_refused_without_reading_it(compress, tmp_path):
    """Compressed, 3 MB became 3 GB; stored, a header says more than its member has."""
    replay, _ = filled(50, 60)
    replay.save(tmp_path / "replay.npz")
    with zipfile.ZipFile(tmp_path / "replay.npz", "a", compress) as file:
        header = b"\x93NUMPY\x01\x00\x76\x00" + b"{'descr': '<f4', 'fortran_order': False, "
        header += b"'shape': (99999999999,), }".ljust(0x76 - 41) + b"\n"
        file.writestr("reward/0/20.npy", header + bytes(10**6))
    words = "compressed" if compress else "not as long as its header says"
    with pytest.raises(ValueError, match=words):
        make(60).check(tmp_path / "replay.npz")


def test_a_pipe_is_no_replay(tmp_path):
    os.mkfifo(tmp_path / "replay.npz")
    with pytest.raises(ValueError, match="a pipe, not a file"):
        make(60).check(tmp_path / "replay.npz")


def test_a_load_that_fails_half_way_leaves_an_empty_replay(tmp_path, monkeypatch):
    replay, _ = filled(50, 60)
    replay.save(tmp_path / "replay.npz")
    path = tmp_path / "replay.npz"
    data = bytearray(path.read_bytes())
    data[data.index(b"reward/2/0.npy") + 200] ^= 1  # the checksum of that block fails
    (tmp_path / "damaged.npz").write_bytes(data)
    other, _ = filled(50, 60)
    with pytest.raises(ValueError, match="CRC"):
        other.load(tmp_path / "damaged.npz")
    with np.load(path) as file:
        arrays = dict(file)
    arrays["reward/2/0"][3] = np.nan  # found while it is copied
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match="reward holds a NaN or infinity"):
        other.load(path)
    assert len(other) == 0


@pytest.mark.parametrize("storage", ["ram", "disk"])
def test_a_replay_restored_from_its_segments_is_the_same(storage, tmp_path):
    """The rings of 20 entries are overwritten several times between the first and last state."""
    replay, loop = filled(4, 60)
    for more in (0, 9, 30, 5):
        loop.collect(more, replay)
        state = replay.state_dict(tmp_path)
        assert state["files"] == [name for ring in state["replay"] for *_, name in ring]
        assert {path.name for path in tmp_path.glob("*.zip")} >= set(state["files"])
        restored = make(60, storage=storage, folder=tmp_path / "scratch")
        restored.load_state_dict(state, tmp_path)
        assert len(restored) == len(replay)
        assert_same(every_window(restored, 3), every_window(replay, 3))
    loop.collect(13, replay, restored)
    assert_same(every_window(restored, 3), every_window(replay, 3))
    first = [r.state_dict(tmp_path)["replay"][0][0] for r in (replay, restored)]
    assert first[0] == first[1]  # the restored one writes only what is new


def test_segments_of_another_number_of_environments_are_refused(tmp_path):
    replay, _ = filled(9, 60)
    state = replay.state_dict(tmp_path)
    with pytest.raises(
        ValueError, match=r"the checkpoint has 3 environment\(s\), the replay has 2"
    ):
        make(60, 2).load_state_dict(state, tmp_path)


def test_a_loaded_file_is_not_taken_for_what_the_segments_hold(tmp_path):
    """It has as many entries as the replay had before, but different ones."""
    replay, _ = filled(9, 60)
    replay.state_dict(tmp_path)
    other, _ = filled(9, 60, lengths=[[8, 3], [6], [2, 9]])
    other.save(tmp_path / "other.npz")
    replay.load(tmp_path / "other.npz")
    restored = make(60)
    restored.load_state_dict(replay.state_dict(tmp_path), tmp_path)
    assert_same(every_window(restored, 2), every_window(other, 2))


def test_a_float64_observation_keeps_its_digits():
    replay = SequenceReplay(200, (1,), np.float64, 1)
    values = 1e6 + np.linspace(-1, 1, 100)
    replay.start(values[:1, None])
    for value in values[1:]:
        replay.step(np.zeros((1, 1)), value[None, None], np.zeros(1), np.array([False]), [{}])
    assert np.unique(values.astype(np.float32)).size < 40
    batch = replay.sample(0, 100, EveryIndex())
    np.testing.assert_array_equal(batch.observation[:, 0, 0], values)


def test_replays_of_float64_that_were_stored_as_float32_load(tmp_path):
    """Files and segments of older versions."""
    old, loop = filled(20, 60, dtype=np.float32)
    old.save(tmp_path / "old.npz")
    from_file, from_segments = make(60, dtype=np.float64), make(60, dtype=np.float64)
    from_file.load(tmp_path / "old.npz")
    from_segments.load_state_dict(old.state_dict(tmp_path), tmp_path)
    for replay in (from_file, from_segments):
        batch = every_window(replay, 3)
        assert batch.observation.dtype == torch.float64
        assert sorted(windows(batch)) == sorted(loop.windows(old, 3))
    from_file.save(tmp_path / "new.npz")
    with pytest.raises(ValueError, match=r"float64.*, this one is of .*float32"):
        old.load(tmp_path / "new.npz")


@pytest.mark.parametrize("is_read_only", [False, True])
def test_a_flipped_or_read_only_image_is_stored(is_read_only):
    replay = SequenceReplay(4, (3, 2, 2), np.uint8, 1)
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)[::-1].transpose(2, 0, 1)
    image.setflags(write=not is_read_only)
    replay.start(image[None])
    info = {"terminal_observation": image, "TimeLimit.truncated": True}
    replay.step(np.ones((1, 1)), image[None], np.ones(1), np.array([True]), [info])
    batch = every_window(replay, 2)
    assert batch.observation.shape == (2, 2, 3, 2, 2)
    assert (batch.observation.numpy() == image).all()


@pytest.mark.parametrize(
    ("observations", "complaint"),
    [
        (np.zeros((3, 3), np.float32), "observation of environment 0 is (3,) float32, the replay"),
        (np.zeros((3, 4), np.uint8), "is (4,) uint8, the replay stores (3,) uint8"),
        (np.zeros((3,), np.uint8), "is () uint8"),  # would broadcast
        (np.zeros((4, 3), np.uint8), "longer"),
        (np.zeros((2, 3), np.uint8), "shorter"),
    ],
)
def test_observations_of_another_kind_are_refused(observations, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)):
        make(60).start(observations)


def test_a_step_before_the_first_reset_is_refused():
    zeros = np.zeros((3, 3), np.uint8)
    with pytest.raises(ValueError, match="call start"):
        make(60).step(np.zeros((3, 2)), zeros, np.zeros(3), np.zeros(3, bool), [{}] * 3)


@pytest.mark.parametrize(
    ("kwargs", "complaint"),
    [
        ({"capacity": 2}, "capacity must be at least n_envs = 3, got 2"),
        ({"capacity": 9, "storage": "tape"}, "got 'tape'"),
        ({"capacity": 9, "storage": "disk"}, "'disk' with a folder"),
    ],
)
def test_a_wrong_argument_is_named(kwargs, complaint):
    with pytest.raises(ValueError, match=complaint):
        make(**kwargs)
