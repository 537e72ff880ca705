"""A run folder that someone else made: it runs no code, and reaches no file outside it."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from totalprop.agents.core import figures
from totalprop.agents.persistence.safe_file import write_text
from totalprop.scripts import evaluate, train
from totalprop.scripts.run.arguments import parse
from totalprop.scripts.run.environments import import_flag
from totalprop.scripts.run.errors import UserError
from totalprop.scripts.run.folder import RunFolder
from totalprop.scripts.run.job import Job
from totalprop.scripts.run.log import ResumableCSV
from totalprop.scripts.run.normalisation import normalise_like, save_statistics
from totalprop.scripts.studies import diagnose, sweep, variance

GOLDEN = Path(__file__).parents[1] / "golden"
MODULE = """
from pathlib import Path
import gymnasium as gym
Path(__file__).with_name("proof").touch()
gym.register("Stranger-v0", entry_point="totalprop.envs.cartpole:CartPoleSwingUpEnv",
             max_episode_steps=30)
"""
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=2),
    max_leaves=5,
)
FUZZ = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def run(tmp_path):
    """A finished run of PIPPS."""
    return shutil.copytree(GOLDEN / "finished" / "pipps", tmp_path / "run")


@pytest.fixture
def stranger(run, tmp_path, monkeypatch):
    """Its environment needs a module, which leaves a proof of having been imported."""
    config = json.loads((run / "config.json").read_text())
    config["env_id"] = config["options"]["env_id"] = f"{tmp_path.name}_env:Stranger-v0"
    (run / "config.json").write_text(json.dumps(config))
    (tmp_path / f"{tmp_path.name}_env.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    return run


def error_of(capsys, main, *arguments):
    """The one line of a command that fails."""
    with pytest.raises(SystemExit) as stop:
        main([*map(str, arguments)])
    assert stop.value.code in (1, 2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 700
    return lines[0]


# Code


@pytest.mark.parametrize(
    "command",
    [
        (evaluate.main, "{run}"), (train.main, "--resume", "{run}"), (diagnose.main, "{run}"),
        (train.main, "--config", "{run}"), (variance.main, "{run}"),
        (train.main, "--config", "{run}/config.json"),
    ],
    ids=lambda command: command[0].__module__.rpartition(".")[2] + command[1][:8],
)  # fmt: skip
def test_a_module_that_only_the_folder_names_is_not_imported(command, stranger, tmp_path, capsys):
    arguments = [text.format(run=stranger) for text in command[1:]]
    name = f"{tmp_path.name}_env"
    assert error_of(capsys, command[0], *arguments).endswith(f"add --import {name}")
    assert "add --import" in error_of(capsys, command[0], *arguments, "--import", "numpy")
    assert not (tmp_path / "proof").exists()


def test_a_module_that_the_command_names_is_imported(stranger, tmp_path, capsys):
    flags = import_flag(f"{tmp_path.name}_env:Stranger-v0").split()
    evaluate.main([str(stranger), "--episodes", "2", "--no-gif", *flags])
    assert "over 2 episodes" in capsys.readouterr().out
    assert (tmp_path / "proof").exists()


def test_an_environment_of_the_command_line_replaces_the_files(stranger):
    job = parse(["--config", str(stranger), "--env-id", "totalprop/CartPoleSwingUp-v0"], usage="")
    assert job.options.env_id == "totalprop/CartPoleSwingUp-v0"


def test_a_setting_cannot_bring_a_flag_with_it(stranger, tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("agent: pipps\nangle_dims: [1, '--env-id=evil:Env-v0']\n")
    assert "angle_dims cannot be" in error_of(capsys, train.main, "--config", tmp_path / "a.yaml")


def test_no_module_is_imported_from_inside_the_folder(stranger, tmp_path, capsys, monkeypatch):
    name = f"{tmp_path.name}_env"
    shutil.move(tmp_path / f"{name}.py", stranger)
    monkeypatch.chdir(stranger)
    for command in ((evaluate.main, "."), (train.main, "--config", ".")):
        assert "no code is run" in error_of(capsys, *command, "--import", name)
    assert not (stranger / "proof").exists()


# Links, pipes and devices


@pytest.mark.parametrize(
    "name", ["config.json", "model.zip", "checkpoints", "evaluation.gif", ".lock", "progress.csv"]
)
def test_a_link_in_the_folder_is_refused_and_its_target_unchanged(name, run, tmp_path, capsys):
    target = tmp_path / "target"
    if (run / name).exists():
        shutil.move(run / name, target)
    else:
        target.write_text("precious")
    (run / name).symlink_to(target)
    before = target.read_bytes() if target.is_file() else sorted(target.iterdir())
    for command in ((evaluate.main, run), (train.main, "--resume", run, "--total-timesteps", 90)):
        assert f"{name} is a link" in error_of(capsys, *command)
    assert before == (target.read_bytes() if target.is_file() else sorted(target.iterdir()))


def test_the_folder_itself_may_be_a_link(run, tmp_path):
    (tmp_path / "scratch").symlink_to(run)
    assert RunFolder.open(tmp_path / "scratch").read_config()["agent"] == "pipps"


def test_a_pipe_in_the_folder_is_refused(run, capsys):
    (run / "model.zip").unlink()
    os.mkfifo(run / "model.zip")
    assert "neither a file nor a folder" in error_of(capsys, evaluate.main, run)


def test_pictures_replace_links_and_leave_their_targets(tmp_path):
    frames = [np.full((8, 8, 3), value, np.uint8) for value in (0, 255)]
    curve = figures.learning_curve(np.arange(2), np.zeros((2, 3)), xlabel="", ylabel="")
    for name, write in {
        "a.gif": lambda path: figures.save_gif(frames, path, fps=10),
        "a.png": lambda path: figures.save(curve, path, dpi=20),
        "a.json": lambda path: write_text(path, "{}"),
    }.items():
        target, link = tmp_path / f"target_{name}", tmp_path / name
        target.write_text("precious")
        link.symlink_to(target)
        # A stranger may guess the name of the temporary file.
        guess = tmp_path / f".{name}.{os.getpid()}.tmp"
        guess.symlink_to(target)
        write(link)
        assert target.read_text() == "precious" and not link.is_symlink(), name
        assert not guess.is_symlink() and link.stat().st_size > 1


def test_a_device_is_written_to_and_not_replaced(tmp_path):
    (tmp_path / "null").symlink_to("/dev/null")
    write_text(tmp_path / "null", "text")
    assert (tmp_path / "null").is_symlink() and Path("/dev/null").is_char_device()


# Values


def mutated(value, data):
    """JSON with one member replaced by any other value."""
    value = json.loads(json.dumps(value))
    node = value
    while True:
        key = data.draw(
            st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node)))
        )
        if not (isinstance(node[key], dict | list) and node[key]) or data.draw(st.booleans()):
            break
        node = node[key]
    node[key] = data.draw(JSON)
    return value


@pytest.mark.parametrize("agent", ["pipps", "dreamer", "daappo"])
@FUZZ
@given(data=st.data())
def test_any_config_is_a_run_or_one_sentence(agent, tmp_path, data):
    config = json.loads((GOLDEN / "runs" / agent / "config.json").read_text())
    text = json.dumps(mutated(config, data))
    (tmp_path / "config.json").write_text(text)
    try:
        job = Job.read(RunFolder.open(tmp_path))
        job.options.check()
        json.loads(job.config())
    except UserError as error:
        assert len(str(error)) < 500 and "\n" not in str(error)  # noqa: PT017
    try:
        parse(["--config", str(tmp_path)], usage="").options.check()
    except UserError as error:
        assert len(str(error)) < 500 and "\n" not in str(error)  # noqa: PT017
    except SystemExit as stop:
        assert stop.code == 2  # noqa: PT017


@FUZZ
@given(data=st.data())
def test_any_statistics_normalise_or_are_one_sentence(tmp_path, data):
    env = make_vec_env("Pendulum-v1", 1)
    path = tmp_path / "vec_normalize.json"
    save_statistics(VecNormalize(env), path)
    path.write_text(json.dumps(mutated(json.loads(path.read_text()), data)))
    try:
        made = normalise_like(env, path)
    except UserError as error:
        assert "does not hold statistics" in str(error) and "\n" not in str(error)  # noqa: PT017
    else:
        assert np.isfinite(made.reset()).all()


@pytest.mark.parametrize("entry", [
    {}, [], {"timesteps": 3, "returns": [[1.0]]}, {"timesteps": [1], "returns": []},
    {"timesteps": [1, 2], "returns": [[1.0], [1.0, 2.0]]}, {"timesteps": ["1"], "returns": [[1.0]]},
    {"timesteps": [1], "returns": [[None]]}, {"timesteps": [1], "returns": [[float("nan")]]},
])  # fmt: skip
def test_other_evaluations_are_one_sentence(entry, tmp_path):
    folder = RunFolder(tmp_path)
    folder.evaluations.write_text(json.dumps(entry))
    with pytest.raises(UserError, match=r"evaluations.json"):
        folder.read_evaluations()
    folder.evaluations.write_text('{"timesteps": [1, 2], "returns": [[1.0], [2]]}')
    steps, returns = folder.read_evaluations()
    assert steps == [1, 2] and returns.tolist() == [[1.0], [2.0]]


@pytest.mark.parametrize("text", ["", "a\n1\n2\n", "b,c\n1,2\n", "é\xff"])
def test_a_damaged_table_is_one_sentence(text, tmp_path):
    table = ResumableCSV(tmp_path / "progress.csv")
    table.path.write_bytes(text.encode("latin-1"))
    state = {"rows": 2, "keys": ["b"]}
    if text in ("", "b,c\n1,2\n"):  # fewer rows than the checkpoint knows
        table.load_state_dict(state)
        return
    with pytest.raises(UserError, match=r"progress.csv is damaged .*delete it to continue"):
        table.load_state_dict(state)


@pytest.mark.parametrize(
    "text", ["", "time/total_timesteps,x\n1,a\n", "x\n1\n", "time/total_timesteps,x\n,1\n"]
)
def test_a_sweep_on_a_damaged_table_is_one_sentence(text, tmp_path):
    (tmp_path / "progress.csv").write_text(text)
    with pytest.raises(UserError, match=r"progress.csv"):
        sweep._watched(RunFolder(tmp_path), "x")


@pytest.mark.parametrize("content", [b"[" * 10**6, b"[" + b"{}," * 10**7 + b"{}]", b"\xff", b"[]"])
def test_a_config_of_any_bytes_is_one_sentence(content, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes(content)
    assert "cannot read" in error_of(capsys, evaluate.main, tmp_path)
