"""The command `totalprop` and its subcommands."""

import importlib
import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import totalprop
from totalprop.agents import AGENTS
from totalprop.scripts import cli
from totalprop.scripts.flag_types import Parser


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_a_help(command, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["totalprop"])
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main([*command.split(), "--help"])
    assert len(capsys.readouterr().out) > 200


HELPS = [["--help"], ["study", "--help"], *([*name.split(), "--help"] for name in cli.COMMANDS)]


@pytest.mark.parametrize("arguments", HELPS, ids=" ".join)
def test_a_help_does_not_load_pytorch(arguments):
    code = (
        "import sys; from totalprop.scripts.cli import main\n"
        f"try: main({arguments})\n"
        "except SystemExit: print(sorted({'torch', 'gymnasium', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("\n[]\n"), done.stderr


@pytest.mark.parametrize("name", [n for n, c in cli.COMMANDS.items() if c.add_flags])
def test_a_help_is_that_of_the_command_itself(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"totalprop {name}"])
    module = importlib.import_module(f"totalprop.scripts.{cli.COMMANDS[name].module}")
    texts = []
    for main in (lambda a: cli.main([*name.split(), *a]), module.main):
        with pytest.raises(SystemExit, match=r"^0$"):
            main(["--help"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and inspect.getdoc(module).splitlines()[0] in texts[0]


@pytest.mark.parametrize(
    ("default", "told"),
    [(10_000, "10000"), (0, "0"), (0.1, "0.1"), (6.0, "6"), ([2, 5], "2 5"), (Path("a/b"), "a/b")],
)
def test_a_help_tells_the_default(default, told):
    parser = Parser()
    parser.add_argument("--steps", default=default, help="steps")
    assert parser.format_help().endswith(f"steps (default: {told})\n")


@pytest.mark.parametrize("default", [None, False, [], ""], ids=repr)
@pytest.mark.parametrize("text", ["steps", "steps (default: all)"])
def test_a_help_says_nothing_of_a_default_that_stands_for_another(default, text):
    parser = Parser()
    parser.add_argument("--steps", default=default, help=text)
    assert parser.format_help().endswith(f"  {text}\n")


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in cli.COMMANDS)


@pytest.mark.parametrize("arguments", [["study"], ["study", "--help"]], ids=" ".join)
def test_studies_are_listed(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == (0 if arguments[1:] else 2)
    own = [name for name in cli.COMMANDS if name.startswith("study ")]
    assert own and all(f" {name.split()[1]} " in capsys.readouterr().out for name in own[:1])


def test_an_unknown_study_suggests_the_nearest(capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        cli.main(["study", "dreamr"])
    assert "did you mean 'study dreamer'?" in capsys.readouterr().err


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


def test_the_bounds_that_a_help_names_are_those_of_the_code(capsys):
    """commands.py cannot import them: their modules load PyTorch."""
    from totalprop.agents.core.evaluation import MAX_STEPS
    from totalprop.scripts.commands import parser_of
    from totalprop.scripts.run.video import MAX_VIDEO_STEPS

    parser = parser_of("evaluate")
    assert parser.get_default("max_steps") == MAX_STEPS
    text = parser.format_help()
    assert f"default: {MAX_STEPS}" in " ".join(text.split())
    assert f"a GIF shows {MAX_VIDEO_STEPS} at most" in " ".join(text.split())


@pytest.mark.parametrize("agent", AGENTS)
def test_the_help_of_an_agent_loads_no_more_than_its_signature_needs(agent):
    """PyTorch and stable-baselines3, of whose classes it is made; neither plots nor SciPy."""
    code = (
        "import sys; from totalprop.scripts.cli import main\n"
        f"try: main(['train', '{agent}', '--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('scipy', 'matplotlib.figure', 'mujoco') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_a_reader_that_has_seen_enough_ends_a_command_quietly():
    code = (
        "from totalprop.scripts import cli\nfrom totalprop.scripts.reproduce import command\n"
        "command.main = lambda arguments: print('x\\n' * 10**6)\n"
        "cli.main(['reproduce'])"
    )
    command = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert command.stdout.readline() == b"x\n"
    command.stdout.close()
    assert command.stderr.read() == b"" and command.wait() == 141
    command.stderr.close()


def test_a_broken_pipe_of_another_process_is_an_error(monkeypatch):
    from totalprop.scripts.reproduce import command

    def fail(arguments):
        raise BrokenPipeError("a worker's")

    monkeypatch.setattr(command, "main", fail)
    with pytest.raises(BrokenPipeError, match="a worker's"):
        cli.main(["reproduce"])


def test_a_command_says_a_warning_without_a_line_of_source(tmp_path):
    words = [
        "train",
        "pipps",
        "--total-timesteps",
        "5",
        "--n-centres",
        "3",
        "--gradient-steps",
        "1",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "totalprop", *words, "--eval-episodes", "2", "--no-tensorboard"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (said,) = [line for line in done.stderr.splitlines() if "less than one trial" in line]
    assert said.startswith("warning: --total-timesteps 5 are less than one trial, of 30 steps")
    assert "warnings.warn" not in done.stderr


def test_the_version_is_that_of_the_metadata(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"totalprop {totalprop.__version__}\n"
    assert totalprop.__version__ == importlib.metadata.version("totalprop")
