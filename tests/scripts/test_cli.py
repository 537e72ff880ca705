"""The command `totalprop` and its subcommands."""

import subprocess
import sys

import pytest

import totalprop
from totalprop.agents import AGENTS
from totalprop.scripts import cli


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_a_help(command, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["totalprop"])
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main([command, "--help"])
    assert len(capsys.readouterr().out) > 200


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in cli.COMMANDS)


def test_an_unknown_command_suggests_the_nearest(capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        cli.main(["trayn"])
    assert "did you mean 'train'?" in capsys.readouterr().err


def test_a_checkouts_short_names_are_the_same_classes():
    code = (
        "import agents, estimators, totalprop, envs;"
        "assert agents.DreamerTPX is totalprop.DreamerTPX and agents.AGENTS is totalprop.AGENTS;"
        "assert estimators.make is totalprop.estimators.make;"
        "assert estimators.Estimator is totalprop.estimators.Estimator"
    )
    root = f"{totalprop.__path__[0]}/.."
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.mark.parametrize("name", AGENTS)
def test_an_agent_loads_no_other(name):
    cls = AGENTS[name].cls
    others = [f"totalprop.agents.{other}" for other in AGENTS if other != name]
    code = (
        f"import sys; from totalprop.agents import {cls.__name__};"
        f"print([m for m in {others} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_the_dreamer_loads_nothing_of_gaussian_processes():
    code = (
        "import sys; from totalprop.agents import DreamerTPX;"
        "parts = ('agents.pipps', 'agents.trials', 'world_models.gp');"
        "print([m for m in sys.modules if m.startswith(tuple('totalprop.' + p for p in parts))]);"
        "from totalprop.world_models import GaussianProcess; print(GaussianProcess.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\nGaussianProcess\n", done.stderr
