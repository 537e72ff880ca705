"""`Replay`: rounds, and the episodes in them, of several environments that take turns."""

import numpy as np
import pytest

from totalprop.agents.svg.replay import Replay


def run(replay, lengths, steps, count=0):
    """Environment i has episodes of lengths[i] steps; its state is [i, time since its start]."""
    n = len(lengths)
    for step in range(count, count + steps):
        time = np.array([step % length for length in lengths])
        states = np.stack([np.arange(n), time], 1).astype(np.float32)
        after = states + np.array([0, 1], np.float32)
        dones = np.array([t == length - 1 for t, length in zip(time, lengths, strict=True)])
        actions = np.full((n, 1), step, np.float32)
        replay.step(
            states, actions, time * 10.0, after, dones,
            log_probs=-time.astype(np.float32), starts=time == 0, dones=dones,
        )  # fmt: skip


def make(capacity=100, n_envs=2, horizon=50):
    return Replay(capacity, 2, 1, n_envs=n_envs, horizon=horizon)


def test_episodes_are_whole_and_of_one_environment():
    replay = make()
    run(replay, (3, 5), 7)
    episodes = replay.episodes()
    assert [len(e["rewards"]) for e in episodes] == [3, 5, 3]  # in the order of their ends
    for episode, i in zip(episodes, (0, 1, 0), strict=True):
        n = len(episode["rewards"])
        assert episode["states"].tolist() == [[i, t] for t in range(n)]
        assert episode["next_states"].tolist() == [[i, t + 1] for t in range(n)]
        assert episode["rewards"].tolist() == [10 * t for t in range(n)]
        assert episode["log_probs"].tolist() == [-t for t in range(n)]
        assert episode["terminated"].tolist() == [0] * (n - 1) + [1]


def test_an_episode_that_began_in_the_round_before_is_whole_too():
    replay = make()
    run(replay, (3, 5), 4)
    replay.begin_round()
    assert replay.episodes() == [] and len(replay.recent()) == 0
    run(replay, (3, 5), 3, count=4)
    assert [e["states"][0].tolist() for e in replay.episodes()] == [[1, 0], [0, 0]]
    assert [len(e["rewards"]) for e in replay.episodes()] == [5, 3]
    recent = replay.take(replay.recent())
    assert recent["actions"][:, 0].tolist() == [4, 4, 5, 5, 6, 6]


def test_endless_episodes_are_cut_at_the_horizon():
    replay = make(n_envs=1, horizon=4)
    run(replay, (1000,), 11)
    times = [e["states"][:, 1].tolist() for e in replay.episodes()]
    assert times == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_an_episode_that_was_cut_off_by_a_reset_is_no_episode():
    replay = make(n_envs=1)
    run(replay, (5,), 2)
    run(replay, (5,), 5)  # begins at time 0 again
    assert [e["states"][:, 1].tolist() for e in replay.episodes()] == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("recent", [True, False])
def test_draws_are_different_transitions_of_the_round_or_of_all(recent):
    replay, rng = make(capacity=20), np.random.default_rng(0)
    run(replay, (3, 5), 12)
    replay.begin_round()
    run(replay, (3, 5), 4, count=12)
    first = 12 if recent else 6  # of 32 transitions 20 are kept
    every = replay.draw(1000, rng, recent=recent)["actions"][:, 0]
    assert sorted(every) == sorted([*range(first, 16)] * 2)
    some = [tuple(replay.draw(5, rng, recent=recent)["actions"][:, 0]) for _ in range(20)]
    assert all(len(x) == 5 for x in some) and len(set(some)) > 10


def test_a_copy_of_the_state_continues_alike(tmp_path):
    replay, copy = make(capacity=20), make(capacity=20)
    run(replay, (3, 5), 8)
    replay.begin_round()
    run(replay, (3, 5), 3, count=8)
    copy.load_state_dict(replay.state_dict(tmp_path), tmp_path)
    for each in (replay, copy):
        run(each, (3, 5), 3, count=11)
    assert copy.finished == replay.finished and copy.count == replay.count
    for a, b in zip(copy.episodes(), replay.episodes(), strict=True):
        assert all((a[name] == b[name]).all() for name in b)
    numbers = np.arange(replay.count - 20, replay.count)
    for name, values in replay.take(numbers).items():
        np.testing.assert_array_equal(copy.take(numbers)[name], values)


def test_a_file_of_the_transitions_of_which_the_newest_fit(tmp_path):
    replay, larger, smaller = make(capacity=20), make(capacity=30), make(capacity=8)
    run(replay, (3, 5), 14)
    replay.save(tmp_path / "file")
    for each, n in ((larger, 20), (smaller, 8)):
        run(each, (3, 5), 2)
        each.load(tmp_path / "file")
        assert (len(each), each.finished, len(each.recent())) == (n, [], 0)
        newest = replay.take(np.arange(replay.count - n, replay.count))
        for name, values in each.take(np.arange(n)).items():
            np.testing.assert_array_equal(values, newest[name])
        run(each, (3, 5), 5)
        assert [len(episode["rewards"]) for episode in each.episodes()] == [3, 5]


def test_a_file_of_other_transitions_changes_nothing(tmp_path):
    Replay(20, 3, 1, n_envs=2, horizon=50).save(tmp_path / "other")
    replay = make()
    run(replay, (3, 5), 4)
    with pytest.raises(ValueError, match="is a replay of another agent: states of 0 transitions"):
        replay.load(tmp_path / "other")
    assert len(replay) == 8 and len(replay.episodes()) == 1
