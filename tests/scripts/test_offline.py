"""`totalprop train dreamer --offline`: runs that learn from a Minari dataset."""

import json
import math
import sys
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from tests.agents.contract.probes import assert_same_agents
from totalprop.agents import DreamerTPX
from totalprop.agents.persistence import checkpoint
from totalprop.scripts import evaluate, train
from totalprop.scripts.reliability import kill_test
from totalprop.scripts.run import report
from totalprop.scripts.run.arguments import parse

minari = pytest.importorskip("minari")  # which needs Python 3.11
from tests.datasets import buffer, play, store  # noqa: E402

NAME, ENV = "tests/pendulum-v0", "Pendulum-v1"
TINY = ["dreamer", "--total-timesteps", "12", "--gradient-steps", "4", "--sequence-length", "6"]
TINY += ["--batch-size", "3", "--horizon", "3", "--buffer-size", "700", "--eval-every", "4"]
TINY += ["--stoch", "4", "--deter", "8", "--hidden", "8", "--width", "8", "--conv-depth", "2"]
TINY += ["--eval-episodes", "2", "--threads", "1", "--no-progress", "--no-tensorboard"]
TINY += ["--checkpoint-seconds", "0", "--eval-max-steps", "30"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    (tmp_path / "datasets").mkdir()
    monkeypatch.setattr(report, "record_gif", lambda *_, **__: None)  # longer than such a run
    return tmp_path / "datasets"


@pytest.fixture
def dataset():
    return pendulum()


def pendulum(name=NAME, env=None, **kwargs):
    env = gym.make(ENV, max_episode_steps=30) if env is None else env
    return store(name, play(env, 4), env, **kwargs)


def run(tmp_path, *extra, name="run", source=NAME):
    train.main([*TINY, "--offline", source, "--runs", str(tmp_path), "--name", name, *extra])
    return tmp_path / name


def fails(capsys, tmp_path, *extra, **kwargs):
    """The one line that a failing run prints; it leaves no folder."""
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, *extra, **kwargs)
    assert stop.value.code in (1, 2) and not (tmp_path / "run").exists()
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def read(path):
    return json.loads(path.read_text())


def test_a_run_learns_from_the_dataset_and_is_evaluated_in_its_environment(
    dataset, tmp_path, capsys
):
    path = run(tmp_path)
    out = capsys.readouterr().out
    assert f"120 steps of {NAME}, evaluated in {ENV}, writing to {path}" in out
    assert "     4 updates: return" in out and "after 12 gradient updates" in out
    assert read(path / "evaluations.json")["timesteps"] == [4, 8, 12]
    config = read(path / "config.json")
    assert config["env_id"] == ENV and config["options"]["offline"] == NAME
    assert config["env_args"] == {"max_episode_steps": 30}  # which is not that of the registry
    progress = (path / "progress.csv").read_text()
    assert "data/ep_rew_mean" in progress and "time/decisions" not in progress
    evaluate.main([str(path), "--episodes", "2", "--no-gif"])
    assert "mean length 30 steps" in capsys.readouterr().out


def test_the_folder_is_named_after_the_dataset(dataset, tmp_path):
    train.main([*TINY, "--offline", NAME, "--runs", str(tmp_path)])
    assert (tmp_path / "dreamer_tests-pendulum-v0_tpx_seed0" / "summary.json").exists()


def test_a_killed_run_resumes_bit_for_bit(dataset, tmp_path, folder, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "MAX_TIME_FRACTION", math.inf)  # one before every round
    quiet = run(tmp_path, name="quiet")
    step, seen = train.Evaluation._on_rollout_start, []

    def kill(self):
        seen.append(self.num_timesteps)
        step(self)
        if self.num_timesteps == 8:
            raise KeyboardInterrupt  # between an evaluation and the checkpoint after it

    with monkeypatch.context() as patch:
        patch.setattr(train.Evaluation, "_on_rollout_start", kill)
        with pytest.raises(SystemExit):
            run(tmp_path)
    assert seen == [0, 4, 8]
    killed = tmp_path / "run"
    assert not (killed / "summary.json").exists()
    train.main(["--resume", str(killed)])
    out = capsys.readouterr().out
    assert "after 4 steps" in out and "were cut" not in out
    assert kill_test.differences("dreamer", quiet, killed) == []


def test_one_killed_before_its_first_checkpoint_reads_the_dataset_again(
    dataset, tmp_path, monkeypatch
):
    quiet = run(tmp_path, name="quiet")
    with monkeypatch.context() as patch:
        patch.setattr(train.Checkpoints, "restore", lambda *_: sys.exit(1))
        with pytest.raises(SystemExit):
            run(tmp_path)
    train.main(["--resume", str(tmp_path / "run")])
    assert kill_test.differences("dreamer", quiet, tmp_path / "run") == []


def test_an_extended_run_is_one_of_more_updates(dataset, tmp_path):
    long = run(tmp_path, "--total-timesteps", "16", name="long")
    short = run(tmp_path)
    train.main(["--resume", str(short), "--total-timesteps", "16"])
    assert kill_test.differences("dreamer", long, short) == []


def test_the_settings_of_a_run_start_another(dataset, tmp_path):
    path = run(tmp_path)
    again = parse(["--config", str(path), "--seed", "1"], usage="")
    assert again.options.offline == NAME and again.options.env_id == ENV
    assert again.arguments["seed"] == 1 and again.env_args == {"max_episode_steps": 30}


def nameless():
    env = gym.make(ENV, max_episode_steps=30)
    of = SimpleNamespace(observation_space=env.observation_space, action_space=env.action_space)
    return store(NAME, play(env, 4), of)


@pytest.mark.parametrize("flag", [["--env-id", ENV], [f"--env-id={ENV}"], [f"--env_id={ENV}"]])
def test_env_id_names_another_environment(flag, tmp_path, capsys):
    nameless()
    path = run(tmp_path, *flag)
    assert read(path / "config.json")["env_id"] == ENV
    assert read(path / "config.json")["env_args"] == {}
    assert capsys.readouterr().err == ""


def test_without_an_environment_a_run_learns_and_says_that_it_is_not_evaluated(tmp_path, capsys):
    nameless()
    path = run(tmp_path)
    said = capsys.readouterr()
    assert f"no evaluations: the dataset '{NAME}' names no environment; pass --env-id" in said.err
    assert "DONE: not evaluated" in said.out and "totalprop evaluate" not in said.out
    assert (path / "model.zip").exists() and not (path / "evaluations.json").exists()
    assert "final_return" not in read(path / "summary.json")
    with pytest.raises(SystemExit):
        evaluate.main([str(path)])
    assert "no environment is named" in capsys.readouterr().err
    again = run(tmp_path, "--total-timesteps", "8", name="again")
    train.main(["--resume", str(again), "--total-timesteps", "12"])
    assert_same_agents(*(DreamerTPX.load(p / "model.zip") for p in (again, path)))


def rewritten(folder, **changes):
    """Change the environment that the dataset names."""
    path = folder / NAME / "data" / "metadata.json"
    metadata = read(path)
    metadata["env_spec"] = json.dumps(json.loads(metadata["env_spec"]) | changes)
    path.write_text(json.dumps(metadata))


def test_a_module_that_the_dataset_names_is_not_imported(dataset, folder, tmp_path, capsys):
    rewritten(folder, id="Far-v0", entry_point="far_away.envs:Far")
    run(tmp_path)
    said = capsys.readouterr().err
    assert "Far-v0, is not registered; if you know and trust its module" in said
    assert "pass --env-id far_away:Far-v0" in said


def test_what_a_dataset_says_of_a_registered_environment_is_not_called(
    dataset, folder, tmp_path, capsys
):
    rewritten(folder, entry_point="os:abort")
    assert read(run(tmp_path) / "config.json")["env_id"] == ENV


def test_wrappers_around_the_environment_are_named(dataset, folder, tmp_path, capsys):
    rewritten(
        folder, additional_wrappers=[{"name": "Abort", "entry_point": "os:abort", "kwargs": {}}]
    )
    run(tmp_path)
    assert "was in other wrappers than it is registered with (Abort)" in capsys.readouterr().err


def test_the_environment_for_evaluation_goes_first(tmp_path):
    pendulum(eval_env=gym.make(ENV, max_episode_steps=20, g=9.0))
    config = read(run(tmp_path) / "config.json")
    assert config["env_args"] == {"g": 9.0, "max_episode_steps": 20}


def test_a_dataset_of_an_endless_environment(tmp_path):
    env = gym.make(ENV, max_episode_steps=-1)
    store(NAME, play(gym.wrappers.TimeLimit(env, 30), 4), env)
    config = read(run(tmp_path) / "config.json")
    assert config["env_args"] == {"max_episode_steps": -1}


def test_other_spaces_than_those_of_env_id_are_a_sentence(dataset, tmp_path, capsys):
    error = fails(capsys, tmp_path, "--env-id", "CartPole-v1")
    assert f"the observations of the dataset '{NAME}' are a vector of 3 numbers" in error
    assert "those of the environment 'CartPole-v1' are a vector of 4 numbers" in error


def test_an_environment_of_other_spaces_than_its_dataset_is_not_evaluated_in(tmp_path, capsys):
    env = gym.wrappers.RescaleAction(gym.make(ENV, max_episode_steps=30), -1.0, 1.0)
    of = SimpleNamespace(
        observation_space=env.observation_space, action_space=env.action_space, spec=gym.spec(ENV)
    )
    store(NAME, play(env, 4), of, env=gym.spec(ENV))
    run(tmp_path)
    assert "no evaluations: the actions of the dataset" in capsys.readouterr().err


def test_a_dataset_larger_than_the_replay_is_refused_at_once(dataset, tmp_path, capsys):
    error = fails(capsys, tmp_path, "--buffer-size", "100")
    assert "124 entries, and the replay has room for 100" in error
    assert "--buffer-size 124" in error
    run(tmp_path, "--buffer-size", "124")


def test_an_unknown_dataset_is_a_sentence(tmp_path, capsys, monkeypatch):
    assert "error: --offline: 'pendulum' is neither" in fails(capsys, tmp_path, source="pendulum")
    monkeypatch.setattr(minari, "download_dataset", lambda name: 1 / 0)
    assert "cannot be downloaded: division" in fails(capsys, tmp_path, source="far/away-v0")


def test_without_minari_the_extra_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    assert "error: --offline: datasets need Minari: pip install" in fails(capsys, tmp_path)


def test_a_folder_is_a_dataset_too(dataset, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "elsewhere"))
    assert (run(tmp_path, source=str(folder / NAME)) / "summary.json").exists()


def test_other_agents_act(dataset, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["pipps", "--offline", NAME, "--runs", str(tmp_path)])
    assert stop.value.code == 1
    assert "pipps learns by acting; --offline is for dreamer" in capsys.readouterr().err


def test_normalize_is_refused_as_online(dataset, tmp_path, capsys):
    assert "DreamerTPX" in fails(capsys, tmp_path, "--normalize", "observations")


def test_images_of_a_dataset_are_learned_from(tmp_path, capsys):
    """Minari's JPEG, channels last; the agent has them first."""
    of = SimpleNamespace(
        observation_space=spaces.Box(0, 255, (48, 40, 3), np.uint8),
        action_space=spaces.Discrete(2),
    )
    rng = np.random.default_rng(0)
    frames = list(rng.integers(0, 256, (9, 48, 40, 3), dtype=np.uint8))
    store(NAME, [buffer(frames, [0, 1] * 4, [1.0] * 8, terminated=True)], of)
    run(tmp_path, "--estimator", "lr")
    assert "DONE" in capsys.readouterr().out
