"""Files written before every module moved (tests/golden/) load, act and resume."""

import json
import shutil
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from totalprop.agents import AGENTS
from totalprop.agents.persistence import safe_file
from totalprop.scripts import train

GOLDEN = Path(__file__).parents[2] / "golden"
ACTIONS = json.loads((GOLDEN / "actions.json").read_text())
RUNS = sorted(path.name for path in (GOLDEN / "runs").iterdir())


def observations(space):
    """The observations that the golden actions answer."""
    if len(space.shape) == 1:
        return np.linspace(-1, 1, 3 * space.shape[0]).reshape(3, -1).astype(space.dtype)
    return (np.arange(3 * np.prod(space.shape)) % 251).reshape(3, *space.shape).astype(np.uint8)


def load(name):
    return AGENTS[name.split("_")[0]].cls.load(GOLDEN / "models" / f"{name}.zip", device="cpu")


def test_there_is_a_model_for_every_action():
    assert sorted(ACTIONS) == sorted(path.stem for path in (GOLDEN / "models").iterdir())
    assert {name.split("_")[0] for name in ACTIONS} == set(AGENTS) == set(RUNS)


@pytest.mark.parametrize("name", ACTIONS)
def test_an_old_model_acts_as_it_did(name, tmp_path):
    agent = load(name)
    seen = observations(agent.observation_space)
    actions = agent.predict(seen, deterministic=True)[0]
    np.testing.assert_allclose(actions, ACTIONS[name], rtol=1e-3, atol=1e-4)
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
