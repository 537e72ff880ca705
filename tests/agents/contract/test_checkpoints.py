"""Checkpoints of every agent: a stopped and resumed run ends as one that was not stopped."""

import shutil

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from tests.agents.contract.conftest import Maker
from tests.agents.contract.environments import RewindableEnv
from tests.agents.contract.runs import (
    TOTAL,
    StopAt,
    assert_same_states,
    load,
    make_env,
    new_agent,
    run,
    state_of,
    takes_vec_normalize,
)
from totalprop.agents import AGENTS
from totalprop.agents.persistence import checkpoint, safe_file
from totalprop.agents.persistence.checkpoint import Checkpoints, TrainingStopped
from totalprop.envs.rewind import Rewindable


@pytest.fixture(scope="session")
def quiet(make, tmp_path_factory):
    """(agent, evaluation, folder, global generators) of a run that was not stopped."""
    folder = tmp_path_factory.mktemp("quiet")
    agent, evaluation = run(make, folder)
    generators = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"]
    return agent, evaluation, folder, generators


def test_a_stopped_and_resumed_run_ends_bit_identical_to_an_uninterrupted_one(
    make, quiet, tmp_path
):
    agent, expected, folder, generators = quiet
    torch.rand(5), np.random.rand(5)
    resumed, evaluation = run(make, tmp_path, stops=(20, 50))
    assert resumed.num_timesteps == agent.num_timesteps and resumed._n_updates == agent._n_updates
    assert_same_states(state_of(resumed, tmp_path), state_of(agent, folder))
    assert evaluation.timesteps == expected.timesteps
    assert evaluation.returns == expected.returns and len(expected.returns) > 2
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (np.random.get_state(legacy=False)["state"]["key"] == generators[1]).all()
    action = resumed.predict(resumed.observation_space.sample(), deterministic=True)[0]
    assert np.isfinite(action).all()


def test_so_does_one_whose_episodes_were_running(tmp_path):
    """The other checkpoints of small agents are written between episodes."""
    make = Maker("daappo")
    make.changes = {"n_steps": 5, "batch_size": 5}
    ends = []
    for name, stops in (("quiet", ()), ("stopped", (20, 50))):
        agent, evaluation = run(make, tmp_path / name, stops=stops)
        ends.append((state_of(agent, tmp_path / name), evaluation.returns))
    assert_same_states(ends[1][0], ends[0][0])
    assert ends[1][1] == ends[0][1]


class Pending(BaseCallback):
    """Keeps the scalars that the logger held at the first and at the last start of a rollout."""

    def _on_rollout_start(self):
        logger = self.logger
        self.last = {
            name: (value, logger.name_to_count[name], logger.name_to_excluded[name])
            for name, value in logger.name_to_value.items()
            if isinstance(value, int | float | np.number)
        }
        if not hasattr(self, "first"):
            self.first = self.last

    def _on_step(self):
        return True


def test_scalars_that_the_logger_had_not_written_are_restored(make, tmp_path):
    """They go into the logger that `learn` makes; a loaded agent has none before."""

    def learn(total):
        checkpoints, pending = Checkpoints(tmp_path, every_seconds=0), Pending()
        agent = checkpoints.load(make.cls, make_env(make), "cpu") or new_agent(make)
        checkpoints.restore(agent)
        callbacks = [pending, checkpoints, StopAt(checkpoints, total)]
        with pytest.raises(TrainingStopped):
            agent.learn(TOTAL, callbacks, log_interval=1000, reset_num_timesteps=False)
        return pending

    stopped, resumed = learn(40), learn(60)
    assert stopped.last and resumed.first == stopped.last


def test_environments_that_cannot_be_rewound_begin_new_episodes_and_are_counted(make, tmp_path):
    found = []
    for name in ("one", "two"):
        agent, _ = run(make, tmp_path / name, stops=(40,), rewindable=False)
        assert agent.n_cut_episodes == 2 and agent.num_timesteps >= TOTAL
        found.append(state_of(agent, tmp_path))
    assert_same_states(*found)


def test_cut_episodes_begin_with_a_seed_of_their_own_step(make):
    """The first episodes are not repeated: the agent has seen them."""
    agent = new_agent(make)
    inner = agent.env.unwrapped
    assert inner._seeds == [3, 4]
    agent._last_obs = first = inner.reset()
    agent.num_timesteps = 70
    agent.cut_episodes()
    assert agent._last_obs is None and agent.n_cut_episodes == 2
    assert inner._seeds == [73, 74]
    assert (inner.reset() != first).any()
    agent.cut_episodes()  # where none is running
    assert agent.n_cut_episodes == 2


def test_cut_episodes_of_an_agent_without_a_seed_leave_the_environments_theirs(make):
    agent = new_agent(make, seed=None)
    agent.env.seed(11)
    agent._last_obs = np.zeros(1)
    agent.cut_episodes()
    assert agent.env.unwrapped._seeds == [11, 12]


def test_a_damaged_checkpoint_is_skipped(make, quiet, tmp_path, capsys):
    checkpoints = Checkpoints(shutil.copytree(quiet[2] / "checkpoints", tmp_path / "copy"))
    previous, newest = checkpoints.paths()
    newest.write_bytes(newest.read_bytes()[:-1000])
    agent = load(checkpoints, make)
    assert f"{agent.num_timesteps:012d}" in previous.name
    assert newest.name in capsys.readouterr().err
    assert checkpoints.paths() == [previous]
    previous.write_bytes(b"")
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read; checkpoint_0"):
        load(checkpoints, make)


@pytest.mark.parametrize("again", ["second learn", "new agent"])
def test_the_newest_checkpoint_is_the_last_written(make, again, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "MAX_TIME_FRACTION", np.inf)
    folder = tmp_path / "checkpoints"
    agent = new_agent(make).learn(TOTAL, Checkpoints(folder))
    most = Checkpoints(folder).newest_step()
    if again == "new agent":
        agent = new_agent(make)
    written, found = [], []

    class Look(BaseCallback):  # what a process that is killed at the next step leaves
        def _on_step(self):
            if Checkpoints(folder).paths()[-1] not in written:
                written.append(Checkpoints(folder).paths()[-1])
                newest = load(Checkpoints(folder), make)
                found.append((newest.num_timesteps, self.num_timesteps - 2))
                copy = shutil.copytree(folder, tmp_path / "copy" / str(len(found)))
                Checkpoints(copy).paths()[-1].write_bytes(b"")
                if len(found) > 1:  # the one before is whole
                    previous = load(Checkpoints(copy), make)
                    assert previous.num_timesteps == found[-2][0]
            return True

    agent.learn(42, [Checkpoints(folder, every_seconds=0), Look()])
    assert found[0] == (0, 0) and len(found) > 1 and all(a == b for a, b in found)
    assert load(Checkpoints(folder), make).num_timesteps == agent.num_timesteps < most


def test_a_new_run_keeps_the_segments_of_the_last_checkpoint_before_it(make, tmp_path):
    new_agent(make).learn(TOTAL, Checkpoints(tmp_path))
    newest = Checkpoints(tmp_path).newest_step()
    checkpoints = Checkpoints(tmp_path)
    new_agent(make).learn(42, checkpoints)  # one checkpoint, at the end
    previous, own = checkpoints.paths()
    files = [safe_file.read(path)["files"] for path in (previous, own)]
    assert not set(files[0]) & set(files[1])
    own.write_bytes(b"")
    assert load(checkpoints, make).num_timesteps == newest


def test_only_our_own_leftovers_are_removed_from_the_folder(make, tmp_path):
    folder = tmp_path / "checkpoints"
    theirs = [
        "rl_model_100000_steps.zip", "thesis.tex", "checkpoint_best.zip", "replay.npz",
        "transitions_of_mine.zip", "unreadable_checkpoint_000000000001.zip", ".hidden.7.tmp",
    ]  # fmt: skip
    leftovers = [
        "replay0_000000000000_000000000009.zip", ".checkpoint_000000000009.zip.41.tmp",
        "transitions_000000000000_000000000009_0123abcd.zip",
        ".checkpoint_000007_000000000009.zip.41.tmp",
        ".replay12_000000000000_000000000009_0123abcd.zip.41.tmp",
    ]  # fmt: skip
    (folder / "runs").mkdir(parents=True)
    (folder / "replay3_000000000000_000000000009.zip").mkdir()
    for name in [*theirs, *leftovers]:
        (folder / name).write_bytes(b"precious")
    new_agent(make).learn(28, Checkpoints(folder))
    left = {path.name for path in folder.iterdir()}
    assert left >= {*theirs, "runs"} and not left & set(leftovers)


def test_a_checkpoint_of_another_agent_is_refused(make, quiet):
    checkpoints = Checkpoints(quiet[2] / "checkpoints")
    for name in AGENTS:
        if name != make.name:
            words = f"holds a {make.cls.__name__} checkpoint"
            with pytest.raises(ValueError, match=words):
                checkpoints.load(AGENTS[name].cls, make_env(make), "cpu")


@pytest.mark.parametrize("n_envs", [1, 3])
def test_another_number_of_environments_is_refused(make, quiet, n_envs):
    checkpoints = Checkpoints(quiet[2] / "checkpoints")
    before = checkpoints.paths()
    words = rf"checkpoint has 2 environment\(s\), env has {n_envs}; resume with 2"
    envs = [make_env(make, n_envs=n_envs)]
    if n_envs == 1:
        envs.append(envs[0].unwrapped.envs[0])
    for env in envs:
        with pytest.raises(ValueError, match=words):
            load(checkpoints, make, env)
    assert checkpoints.paths() == before  # no file was set aside as unreadable


def test_other_vector_wrappers_are_refused(make, quiet):
    if not takes_vec_normalize(make):
        pytest.skip("it refuses the wrapper anyway")
    checkpoints = Checkpoints(quiet[2] / "checkpoints")
    agent = load(checkpoints, make, make_env(make).venv)
    with pytest.raises(
        ValueError, match=r"has 1 vector wrapper\(s\), env has 0; wrap it as it was"
    ):
        checkpoints.restore(agent)


def test_a_full_disk_leaves_the_checkpoint_before(make, quiet, tmp_path, monkeypatch):
    checkpoints = Checkpoints(shutil.copytree(quiet[2] / "checkpoints", tmp_path / "copy"))
    agent = load(checkpoints, make)
    checkpoints.restore(agent)
    before = {path.name: path.read_bytes() for path in checkpoints.folder.iterdir()}

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        agent.learn(28, Checkpoints(checkpoints.folder, every_seconds=0), reset_num_timesteps=False)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in checkpoints.folder.iterdir()} == before
    assert load(checkpoints, make).num_timesteps == quiet[0].num_timesteps


class Outer(gym.Wrapper):
    """Outside of Monitor, as those of `make_vec_env(..., wrapper_class=...)` are."""


@pytest.mark.parametrize("vec_env_cls", [DummyVecEnv, SubprocVecEnv])
def test_monitors_below_other_wrappers_are_restored(vec_env_cls, tmp_path):
    def env():
        return vec_env_cls([lambda: Outer(Monitor(Rewindable(RewindableEnv())))] * 2)

    make, whole, halves = Maker("dreamer"), env(), [env(), env()]
    expected = make(whole, seed=3).learn(44)
    make(halves[0], seed=3).learn(20, Checkpoints(tmp_path))
    checkpoints = Checkpoints(tmp_path)
    agent = checkpoints.load(make.cls, halves[1], "cpu")
    checkpoints.restore(agent)
    agent.learn(24, checkpoints, reset_num_timesteps=False)
    records = [[(x["r"], x["l"]) for x in each.ep_info_buffer] for each in (agent, expected)]
    assert records[0] == records[1] and len(records[0]) > 4
    for each in (whole, *halves):
        each.close()
