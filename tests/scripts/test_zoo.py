"""RL-Zoo trains our agents and loads them; its package is not among those of the tests."""

import sys

import pytest
import yaml
from torch import nn

from totalprop.agents import AGENTS
from totalprop.scripts import zoo
from totalprop.scripts.run.errors import UserError

KNOWN = yaml.safe_load(zoo.SETTINGS.read_text())
PRESETS = {
    ("pipps", "totalprop/CartPoleSwingUp-v0"): "recommended",
    ("dreamer", "Pendulum-v1"): "laptop",
    ("dreamer", "dmc/walker-walk-v0"): "recommended",
    ("daappo", "dmc/cartpole-swingup-v0"): "recommended",
}


@pytest.mark.parametrize(("agent", "env_id"), [(a, e) for a, envs in KNOWN.items() for e in envs])
def test_the_settings_are_those_of_the_presets(agent, env_id):
    found = dict(KNOWN[agent][env_id])
    if isinstance(found["policy_kwargs"], str):  # RL-Zoo evaluates it, with nn in scope
        found["policy_kwargs"] = eval(found["policy_kwargs"], {"nn": nn})
    preset = dict(AGENTS[agent].presets[PRESETS[agent, env_id]])
    if preset.get("clip_range_vf", 0) is None:  # the default, which RL-Zoo takes for a mistake
        del preset["clip_range_vf"]
    assert found.items() >= preset.items()
    assert found.keys() - preset.keys() <= {"policy", "n_timesteps", "env_kwargs", "normalize"}


def test_without_rl_zoo_one_sentence_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rl_zoo3", None)
    with pytest.raises(SystemExit, match="1"):
        zoo.main(["train", "--algo", "pipps"])
    assert "RL-Zoo is not installed: pip install 'rl_zoo3>=2.9,<3'" in capsys.readouterr().err


def test_settings_are_given_where_train_has_none(tmp_path):
    assert zoo.settings(["train", "--algo=pipps"], tmp_path) == ["-conf", f"{tmp_path}/pipps.yml"]
    assert yaml.safe_load((tmp_path / "pipps.yml").read_text()) == KNOWN["pipps"]
    for own in (["-conf", "my.yml"], ["--help"]):
        assert zoo.settings(["train", "--algo", "pipps", *own], tmp_path) == []
    assert zoo.settings(["train", "--algo", "ppo", "-n", "9"], tmp_path) == []
    assert zoo.settings(["enjoy", "--algo", "pipps"], tmp_path) == []
    with pytest.raises(UserError, match=r"zoo.yml has no settings of svg: pass -conf FILE"):
        zoo.settings(["train", "--algo", "svg"], tmp_path)


def test_an_unknown_program_is_one_sentence(capsys):
    with pytest.raises(SystemExit, match="2"):
        zoo.main(["trayn"])
    assert "totalprop zoo has train and enjoy, not 'trayn'" in capsys.readouterr().err


def test_rl_zoo_trains_and_enjoys_an_agent(tmp_path, monkeypatch, capsys):
    pytest.importorskip("rl_zoo3")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    which = ["--algo", "pipps", "--env", "totalprop/CartPoleSwingUp-v0", "-f", "logs"]
    small = ["gradient_steps:2", "n_particles:20", "gp_evaluations:5"]
    zoo.main(["train", *which, "-n", "60", "--eval-freq", "-1", "-params", *small])
    assert "('horizon', 30)" in capsys.readouterr().out  # of zoo.yml
    zoo.main(["enjoy", *which, "--no-render", "-n", "31"])
    assert "Episode Reward" in capsys.readouterr().out
