"""Checkpoints: an interrupted run ends like an uninterrupted one, and damage is survived."""

import shutil

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

import totalprop.envs  # noqa: F401
from totalprop.agents import DAAPPO, PIPPS, DreamerTPX
from totalprop.agents.core.evaluation import Evaluation
from totalprop.agents.persistence import checkpoint, safe_file
from totalprop.agents.persistence.checkpoint import Checkpoints, TrainingStopped
from totalprop.envs.rewind import Rewindable

CART_POLE = "totalprop/CartPoleSwingUp-v0"
SETTINGS = {
    PIPPS: {
        "n_particles": 8, "gradient_steps": 2, "gp_evaluations": 5, "random_trials": 2,
        "policy_kwargs": {"n_centres": 5},
    },
    DreamerTPX: {
        "learning_starts": 20, "sequence_length": 6, "batch_size": 3, "imagination_starts": 4,
        "horizon": 3, "train_freq": 14, "gradient_steps": 2, "buffer_size": 100,
        "policy_kwargs": {"stoch": 3, "deter": 5, "hidden": 5, "width": 5},
    },
    DAAPPO: {
        "n_steps": 32, "batch_size": 16, "n_epochs": 2, "dynamics_width": 8,
        "n_extra_actions": 2, "simulation_horizon": 2, "dynamics_buffer_size": 100,
    },
}  # fmt: skip
POLICIES = {PIPPS: "RBFPolicy", DreamerTPX: "DreamerPolicy", DAAPPO: "MlpPolicy"}
TOTAL = 180


class StopAt(BaseCallback):
    """Requests a stop once `step` is reached."""

    def __init__(self, checkpoints, step):
        super().__init__()
        self.checkpoints, self.step = checkpoints, step

    def _on_step(self):
        if self.num_timesteps >= self.step:
            self.checkpoints.request_stop()
        return True


def make_env(cls, *, rewindable=True, n_envs=2, env_id=CART_POLE):
    def make(**_):
        env = gym.make(env_id)
        return Rewindable(env) if rewindable else env

    env = make_vec_env(make, n_envs)
    return VecNormalize(env) if cls is DAAPPO else env


def state_of(agent, folder):
    """Everything that a further step depends on, as a flat dict of comparable values."""
    values = {"agent": agent.file_values(), "training": agent.state_dict(folder)}
    for key in ("start_time", "_num_timesteps_at_start", "ep_info_buffer"):
        values["agent"]["attributes"].pop(key)
    values["training"].pop("files", None)
    flat = {}

    def walk(value, where):
        if isinstance(value, dict):
            for key, entry in value.items():
                walk(entry, f"{where}/{key}")
        elif isinstance(value, list | tuple):
            for i, entry in enumerate(value):
                walk(entry, f"{where}/{i}")
        else:
            flat[where] = value

    walk({k: v for k, v in values["training"].items() if k not in ("replay", "transitions")}, "t")
    walk(values["agent"], "a")
    return flat


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, torch.Tensor | np.ndarray):
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(b[key])), key
        elif isinstance(value, int | float | str | bool | type(None)):
            assert value == b[key], key


def run(cls, folder, stops=(), **env_args):
    """Train to TOTAL, stopped and resumed in new objects at each of `stops`."""
    settings = {**SETTINGS[cls], "seed": 3, "device": "cpu"}
    for stop in [*stops, None]:
        evaluation = Evaluation(make_env(cls), n_episodes=2, every=40)
        if cls is DAAPPO:
            evaluation.eval_env.training = False
        evaluation.eval_env.seed(7)
        checkpoints = Checkpoints(
            folder / "checkpoints", every_seconds=0, also={"evaluation": evaluation}
        )
        env = make_env(cls, **env_args)
        agent = checkpoints.load(cls, env, "cpu") or cls(POLICIES[cls], env, **settings)
        checkpoints.restore(agent)
        callbacks = [evaluation, checkpoints]
        if stop is not None:
            callbacks.append(StopAt(checkpoints, stop))
        try:
            agent.learn(TOTAL - agent.num_timesteps, callbacks, reset_num_timesteps=False)
        except TrainingStopped:
            assert stop is not None
    return agent, evaluation


@pytest.mark.parametrize("cls", [PIPPS, DreamerTPX, DAAPPO])
def test_a_stopped_and_resumed_run_ends_bit_identical_to_an_uninterrupted_one(cls, tmp_path):
    quiet, quiet_evaluation = run(cls, tmp_path / "quiet")
    expected = state_of(quiet, tmp_path)
    generators = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"]
    torch.rand(5), np.random.rand(5)
    resumed, evaluation = run(cls, tmp_path / "stopped", stops=(30, 100))
    assert resumed.num_timesteps == quiet.num_timesteps and resumed._n_updates == quiet._n_updates
    assert_same(state_of(resumed, tmp_path), expected)
    assert evaluation.timesteps == quiet_evaluation.timesteps
    assert evaluation.returns == quiet_evaluation.returns
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (np.random.get_state(legacy=False)["state"]["key"] == generators[1]).all()
    action = quiet.predict(quiet.observation_space.sample(), deterministic=True)[0]
    assert np.isfinite(action).all()


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


@pytest.mark.parametrize("cls", [PIPPS, DreamerTPX, DAAPPO])
def test_scalars_that_the_logger_had_not_written_are_restored(cls, tmp_path):
    """They go into the logger that `learn` makes; a loaded agent has none before."""

    def learn(total):
        checkpoints, pending = Checkpoints(tmp_path, every_seconds=0), Pending()
        agent = checkpoints.load(cls, make_env(cls), "cpu") or cls(
            POLICIES[cls], make_env(cls), **SETTINGS[cls], seed=3, device="cpu"
        )
        checkpoints.restore(agent)
        callbacks = [pending, checkpoints, StopAt(checkpoints, total)]
        with pytest.raises(TrainingStopped):
            agent.learn(TOTAL, callbacks, log_interval=1000, reset_num_timesteps=False)
        return pending

    stopped, resumed = learn(100), learn(150)
    assert stopped.last and resumed.first == stopped.last


def test_a_run_in_parts_that_end_within_a_round_equals_the_whole_one(tmp_path):
    """A checkpoint is written at the end of each part, and the next part loads it."""
    settings, ends = {**SETTINGS[DreamerTPX], "seed": 3, "device": "cpu"}, [12, 46, 100, 132]
    found = {}
    for name, stops in {"whole": ends[-1:], "parts": ends}.items():
        for stop in stops:
            checkpoints = Checkpoints(tmp_path / name, every_seconds=0)
            env = make_env(DreamerTPX)
            agent = checkpoints.load(DreamerTPX, env, "cpu")
            agent = agent or DreamerTPX("DreamerPolicy", env, **settings)
            checkpoints.restore(agent)
            agent.learn(stop - agent.num_timesteps, checkpoints, reset_num_timesteps=False)
        found[name] = state_of(agent, tmp_path)
    assert agent.num_timesteps == 132 and agent._n_updates == 18  # rounds at 20, 34, .. 132
    assert_same(found["parts"], found["whole"])


@pytest.mark.parametrize("cls", [PIPPS, DreamerTPX, DAAPPO])
def test_environments_that_cannot_be_rewound_begin_new_episodes_and_are_counted(cls, tmp_path):
    agent, _ = run(cls, tmp_path, stops=(70,), rewindable=False)
    assert agent.n_cut_episodes == 2 and agent.num_timesteps >= TOTAL
    again, _ = run(cls, tmp_path / "again", stops=(70,), rewindable=False)
    assert_same(state_of(agent, tmp_path), state_of(again, tmp_path))


@pytest.mark.parametrize("cls", [PIPPS, DreamerTPX, DAAPPO])
def test_cut_episodes_begin_with_a_seed_of_their_own_step(cls):
    """The first episodes are not repeated: the agent has seen them."""
    agent = cls(POLICIES[cls], make_env(cls), **SETTINGS[cls], seed=3, device="cpu")
    inner = agent.env.unwrapped
    assert inner._seeds == [3, 4]
    first = inner.reset()
    agent.num_timesteps = 70
    agent.cut_episodes()
    assert agent._last_obs is None and agent.n_cut_episodes == 2
    assert inner._seeds == [73, 74]
    assert (inner.reset() != first).any()


def test_cut_episodes_of_an_agent_without_a_seed_leave_the_environments_theirs():
    agent = PIPPS("RBFPolicy", make_env(PIPPS), **SETTINGS[PIPPS], device="cpu")
    agent.env.seed(11)
    agent.cut_episodes()
    assert agent.env.unwrapped._seeds == [11, 12]


def test_the_last_two_checkpoints_are_kept_and_a_damaged_one_is_skipped(tmp_path, capsys):
    run(DreamerTPX, tmp_path, stops=(100,))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    previous, newest = checkpoints.paths()
    newest.write_bytes(newest.read_bytes()[:-1000])
    agent = checkpoints.load(DreamerTPX, make_env(DreamerTPX), "cpu")
    assert f"{agent.num_timesteps:012d}" in previous.name
    assert newest.name in capsys.readouterr().err
    assert checkpoints.paths() == [previous]
    previous.write_bytes(b"")
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read; checkpoint_0"):
        checkpoints.load(DreamerTPX, make_env(DreamerTPX), "cpu")


def new_agent(cls, **kwargs):
    return cls(POLICIES[cls], make_env(cls), **SETTINGS[cls], seed=3, device="cpu", **kwargs)


@pytest.mark.parametrize("again", ["second learn", "new agent"])
@pytest.mark.parametrize("cls", [PIPPS, DreamerTPX, DAAPPO])
def test_the_newest_checkpoint_is_the_last_written(cls, again, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "MAX_TIME_FRACTION", np.inf)
    folder = tmp_path / "checkpoints"
    agent = new_agent(cls).learn(TOTAL, Checkpoints(folder))
    most = Checkpoints(folder).newest_step()
    if again == "new agent":
        agent = new_agent(cls)
    written, found = [], []

    class Look(BaseCallback):  # what a process that is killed at the next step leaves
        def _on_step(self):
            if Checkpoints(folder).paths()[-1] not in written:
                written.append(Checkpoints(folder).paths()[-1])
                newest = Checkpoints(folder).load(cls, make_env(cls), "cpu")
                found.append((newest.num_timesteps, self.num_timesteps - 2))
                copy = shutil.copytree(folder, tmp_path / "copy" / str(len(found)))
                Checkpoints(copy).paths()[-1].write_bytes(b"")
                if len(found) > 1:  # the one before is whole
                    previous = Checkpoints(copy).load(cls, make_env(cls), "cpu")
                    assert previous.num_timesteps == found[-2][0]
            return True

    agent.learn(120, [Checkpoints(folder, every_seconds=0), Look()])
    assert found[0] == (0, 0) and len(found) > 1 and all(a == b for a, b in found)
    newest = Checkpoints(folder).load(cls, make_env(cls), "cpu")
    assert newest.num_timesteps == agent.num_timesteps < most


@pytest.mark.parametrize("cls", [DreamerTPX, DAAPPO])
def test_a_new_run_keeps_the_segments_of_the_last_checkpoint_before_it(cls, tmp_path):
    new_agent(cls).learn(TOTAL, Checkpoints(tmp_path))
    newest = Checkpoints(tmp_path).newest_step()
    checkpoints = Checkpoints(tmp_path)
    new_agent(cls).learn(120, checkpoints)  # one checkpoint, at the end
    previous, own = checkpoints.paths()
    files = [safe_file.read(path)["files"] for path in (previous, own)]
    assert all(files) and not set(files[0]) & set(files[1])
    own.write_bytes(b"")
    assert checkpoints.load(cls, make_env(cls), "cpu").num_timesteps == newest


def test_checkpoints_without_a_number_are_older_than_those_with_one(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    agent = new_agent(PIPPS).learn(60, checkpoints)
    checkpoints.paths()[0].rename(tmp_path / "checkpoint_000000000900.zip")
    assert checkpoints.newest_step() == 900
    assert Checkpoints(tmp_path).load(PIPPS, make_env(PIPPS), "cpu").num_timesteps == 60
    agent.learn(60, checkpoints)
    assert [path.name for path in checkpoints.paths()] == [
        "checkpoint_000000000900.zip", "checkpoint_000001_000000000060.zip"
    ]  # fmt: skip


@pytest.mark.parametrize("cls", [PIPPS, DreamerTPX, DAAPPO])
def test_only_our_own_leftovers_are_removed_from_the_folder(cls, tmp_path):
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
    run(cls, tmp_path)
    left = {path.name for path in folder.iterdir()}
    assert left >= {*theirs, "runs"} and not left & set(leftovers)


def test_a_checkpoint_of_another_agent_is_refused(tmp_path):
    run(PIPPS, tmp_path)
    with pytest.raises(ValueError, match="holds a PIPPS checkpoint"):
        Checkpoints(tmp_path / "checkpoints").load(DreamerTPX, make_env(DreamerTPX), "cpu")


def test_extra_steps_are_counted_on(tmp_path):
    settings = {**SETTINGS[DAAPPO], "action_source": "rewind"}
    env = make_env(DAAPPO)
    agent = DAAPPO("MlpPolicy", env, **settings, seed=3, device="cpu")
    agent.learn(64, Checkpoints(tmp_path))
    steps = agent.source.extra_steps
    assert steps == 252  # 64 x 2 actions x 2 steps, but 1 at the last steps of 2 episodes
    checkpoints = Checkpoints(tmp_path)
    resumed = checkpoints.load(DAAPPO, make_env(DAAPPO), "cpu")
    checkpoints.restore(resumed)
    assert resumed.source.extra_steps == steps
    resumed.set_env(make_env(DAAPPO))
    assert resumed.source.extra_steps == steps


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("cls", [PIPPS, DreamerTPX, DAAPPO])
def test_another_number_of_environments_is_refused(cls, n_envs, tmp_path):
    new_agent(cls).learn(60, Checkpoints(tmp_path))
    before = Checkpoints(tmp_path).paths()
    words = rf"checkpoint has 2 environment\(s\), env has {n_envs}; resume with 2"
    for env in (make_env(cls, n_envs=n_envs), *([gym.make(CART_POLE)] if n_envs == 1 else [])):
        with pytest.raises(ValueError, match=words):
            Checkpoints(tmp_path).load(cls, env, "cpu")
    assert Checkpoints(tmp_path).paths() == before  # no file was set aside as unreadable


def test_other_vector_wrappers_are_refused(tmp_path):
    new_agent(DAAPPO).learn(60, Checkpoints(tmp_path))
    checkpoints = Checkpoints(tmp_path)
    agent = checkpoints.load(DAAPPO, make_env(PIPPS), "cpu")
    with pytest.raises(
        ValueError, match=r"has 1 vector wrapper\(s\), env has 0; wrap it as it was"
    ):
        checkpoints.restore(agent)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    run(PIPPS, tmp_path)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    agent = checkpoints.load(PIPPS, make_env(PIPPS), "cpu")
    checkpoints.restore(agent)
    before = {path.name: path.read_bytes() for path in checkpoints.folder.iterdir()}

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        agent.learn(60, Checkpoints(checkpoints.folder, every_seconds=0), reset_num_timesteps=False)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in checkpoints.folder.iterdir()} == before
    assert checkpoints.load(PIPPS, make_env(PIPPS), "cpu").num_timesteps == TOTAL


def test_checkpoints_wait_for_their_share_of_the_time():
    checkpoints = Checkpoints("nowhere", every_seconds=10.0)
    saved = []
    checkpoints.save = lambda: saved.append(1)
    checkpoints._last -= 11.0
    checkpoints.cost = 0.5  # 2 % of 25 s
    checkpoints._on_rollout_start()
    assert not saved
    checkpoints._last -= 15.0
    checkpoints._on_rollout_start()
    assert saved
