"""Files written before every module moved (tests/golden/) load, act and resume."""

import json
import shutil
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from totalprop.agents import AGENTS
from totalprop.agents.persistence import safe_file
from totalprop.agents.persistence.checkpoint import Checkpoints
from totalprop.envs.rewind import Rewindable
from totalprop.scripts import evaluate, train

GOLDEN = Path(__file__).parents[2] / "golden"
ACTIONS = json.loads((GOLDEN / "actions.json").read_text())
CHECKPOINTS = json.loads((GOLDEN / "checkpoints" / "actions.json").read_text())
RUNS = sorted(path.name for path in (GOLDEN / "runs").iterdir())
# Of float32 networks on another CPU, whose sums run in another order: about 1e-6 of an activation.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def observations(space):
    """The observations that the golden actions answer."""
    if isinstance(space, spaces.Dict):
        return {name: observations(part) for name, part in space.items()}
    if isinstance(space, spaces.Discrete):
        return space.start + np.arange(3) % space.n
    if isinstance(space, spaces.MultiDiscrete):
        return np.arange(3)[:, None] % space.nvec
    if len(space.shape) == 1:
        return np.linspace(-1, 1, 3 * space.shape[0]).reshape(3, -1).astype(space.dtype)
    return (np.arange(3 * np.prod(space.shape)) % 251).reshape(3, *space.shape).astype(np.uint8)


def load(name):
    return AGENTS[name.split("_")[0]].cls.load(GOLDEN / "models" / f"{name}.zip", device="cpu")


def test_there_is_a_model_for_every_action():
    assert sorted(ACTIONS) == sorted(path.stem for path in (GOLDEN / "models").iterdir())
    assert {name.split("_")[0] for name in ACTIONS} == set(AGENTS) == set(RUNS)
    assert set(CHECKPOINTS) == set(AGENTS)


@pytest.mark.parametrize("name", ACTIONS)
def test_an_old_model_acts_as_it_did(name, tmp_path):
    agent = load(name)
    seen = observations(agent.observation_space)
    actions = agent.predict(seen, deterministic=True)[0]
    np.testing.assert_allclose(actions, ACTIONS[name], **TOLERANCE)
    agent.save(tmp_path / "again")  # and under today's names
    again = type(agent).load(tmp_path / "again", device="cpu")
    np.testing.assert_array_equal(again.predict(seen, deterministic=True)[0], actions)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pipps_rbf", "totalprop.RBFPolicy"),
        ("pipps_linear", "totalprop.LinearPolicy"),
        ("dreamer_vector", "totalprop.DreamerPolicy"),
        ("daappo_tanh", "totalprop.TanhMeanPolicy"),
    ],
)
def test_files_name_our_classes_by_stable_names(name, expected, tmp_path):
    load(name).save(tmp_path / "again")
    text = safe_file.zipfile.ZipFile(tmp_path / "again.zip").read("data").decode()
    assert f'"{expected}"' in text
    assert '"$class": "agents.' not in text


def test_old_models_keep_their_settings():
    relu = load("daappo_relu")
    assert relu.policy_kwargs["activation_fn"] is nn.ReLU
    assert any(isinstance(module, nn.ReLU) for module in relu.policy.modules())
    assert load("pipps_angle").angle_dims == (1,)
    for name, halfway in [("daappo_relu", 5e-4), ("dreamer_schedule", 5e-4), ("pipps_angle", 0.02)]:
        assert load(name).lr_schedule(0.5) == pytest.approx(halfway)
    assert relu.clip_range(0.75) == pytest.approx(0.2)  # from 0.3 to 0.1 in half of the time


def test_an_old_replay_loads():
    agent = AGENTS["dreamer"].cls.load(
        GOLDEN / "models" / "dreamer_vector.zip", env=gym.make("Pendulum-v1"), device="cpu"
    )
    agent.load_replay_buffer(GOLDEN / "replay.npz")
    assert len(agent.replay_buffer) == 61


@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_resumes(name, tmp_path, capsys):
    shutil.copytree(GOLDEN / "runs" / name, tmp_path / name)
    train.main(["--resume", str(tmp_path / name)])
    assert "after 6" in capsys.readouterr().out  # from the checkpoint, not from step 0
    assert (tmp_path / name / "summary.json").is_file()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_old_checkpoints_of_the_callback_resume(name, tmp_path):
    folder = shutil.copytree(GOLDEN / "checkpoints" / name, tmp_path / name)
    env_id = "totalprop/CartPoleSwingUp-v0"
    env = make_vec_env(lambda: Rewindable(gym.make(env_id)), 2)
    env = VecNormalize(env) if name == "daappo" else env
    checkpoints = Checkpoints(folder)
    agent = checkpoints.load(AGENTS[name].cls, env, "cpu")
    actions = agent.predict(observations(agent.observation_space), deterministic=True)[0]
    np.testing.assert_allclose(actions, CHECKPOINTS[name], **TOLERANCE)
    updates = agent._n_updates
    checkpoints.restore(agent)
    assert agent.n_cut_episodes == 0
    if name == "daappo":
        assert env.obs_rms.count == pytest.approx(2 + 64, abs=1e-3)  # and the first observations
    agent.learn(64, callback=checkpoints, reset_num_timesteps=False)
    assert agent.num_timesteps == 128
    assert agent._n_updates > updates
    if name == "dreamer":  # 64 entries of each environment, and the first ones of 3 episodes
        assert len(agent.replay_buffer) == 2 * 67


@pytest.mark.parametrize(
    ("name", "expected"), [("daappo", "return -1012.62"), ("pipps", "cost 29.79")]
)
def test_an_old_finished_run_is_evaluated(name, expected, tmp_path, capsys):
    folder = shutil.copytree(GOLDEN / "finished" / name, tmp_path / name)
    evaluate.main([str(folder), "--episodes", "2", "--no-gif"])
    quantity, number = expected.split()
    found = float(capsys.readouterr().out.split(f"{quantity} ")[1].split()[0])
    assert found == pytest.approx(float(number), rel=1e-3)


def test_an_old_finished_run_is_finished_and_can_be_extended(tmp_path, capsys):
    folder = shutil.copytree(GOLDEN / "finished" / "pipps", tmp_path / "pipps")
    with pytest.raises(SystemExit):
        train.main(["--resume", str(folder)])
    assert "is finished (60 steps)" in capsys.readouterr().err
    train.main(["--resume", str(folder), "--total-timesteps", "90"])
    assert "after 60" in capsys.readouterr().out
    assert json.loads((folder / "evaluations.json").read_text())["timesteps"] == [30, 60, 90]
