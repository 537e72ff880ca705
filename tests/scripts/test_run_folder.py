"""The commit that a run records, and folders that several runs create at once."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import gymnasium as gym
import numpy as np
import pytest

from totalprop.envs.cartpole import CartPoleSwingUpEnv
from totalprop.scripts.run import environments, program
from totalprop.scripts.run.environments import make_evaluation_env, renders
from totalprop.scripts.run.folder import RunFolder
from totalprop.scripts.run.program import current_commit


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_record_tells_changed_code_from_committed_code(tmp_path, monkeypatch):
    def git(*arguments):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)

    code = tmp_path / "scripts" / "program.py"
    code.parent.mkdir()
    code.write_text("old")
    monkeypatch.setattr(program, "__file__", str(code))
    assert current_commit() == "unknown"
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    commit = git("rev-parse", "--short", "HEAD").stdout.strip()
    (tmp_path / "results.json").write_text("what a sweep writes does not count")
    assert current_commit() == commit
    code.write_text("new")
    assert current_commit() == f"{commit}-dirty"


def test_without_git_the_commit_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert current_commit() == "unknown"


def test_runs_created_at_once_with_one_name_are_numbered(tmp_path):
    together = threading.Barrier(12)

    def create(number):
        together.wait()
        return RunFolder.create(tmp_path, "run", f"{number}").path

    with ThreadPoolExecutor(12) as pool:
        paths = list(pool.map(create, range(12)))
    assert {path.name for path in paths} == {"run", *(f"run_{n}" for n in range(2, 13))}
    assert [(path / "config.json").read_text() for path in paths] == [f"{n}" for n in range(12)]
    assert len(list(tmp_path.iterdir())) == 12  # no temporary folder is left


@pytest.mark.parametrize(
    "values",
    [{"noise": 4}, {"tag": "4"}, {"tag": "None", "on": True, "x": None}, {"cost": "tip"},
     {"tag": "true", "b": "null"},
     {"a": [1, "b c"], "b": (0.5, 1e-9)}, {"a": "it's", "b": "", "c": {"d": "1.0"}}],
)  # fmt: skip
def test_flags_of_an_environments_arguments_are_read_as_they_were(values):
    flags = environments.env_arg_flags(values)
    found = environments.parse_env_args(tuple(flag.removeprefix("--env-arg=") for flag in flags))
    assert found == values and [*map(type, found.values())] == [*map(type, values.values())]


def test_what_killed_runs_left_is_swept(tmp_path):
    """Folders that are being created may be those of a living process, unless they are old."""
    old, new, other = (tmp_path / name for name in (".run.a", ".run.b", ".run.c"))
    for path in (old, new, other):
        path.mkdir()
        (path / "config.json").write_text("{}")
    (other / "model.zip").write_text("a user's")
    for path in (old, other):
        os.utime(path, (time.time() - 7200,) * 2)
    folder = RunFolder.create(tmp_path, "run", "{}")
    assert not old.exists() and new.exists() and (other / "model.zip").exists()
    left = [folder.path / name for name in (".model.zip.123.tmp", ".evaluations.json.7.tmp")]
    kept = [folder.path / name for name in (".notes.tmp", "model.zip.123.tmp", "config.json")]
    for path in (*left, *kept):
        path.write_text("{}")
    folder.sweep()
    assert not any(path.exists() for path in left) and all(path.exists() for path in kept)


def test_a_run_folder_is_readable_by_whom_its_parent_is(tmp_path):
    tmp_path.chmod(0o755)
    assert RunFolder.create(tmp_path, "run", "{}").path.stat().st_mode & 0o777 == 0o755


class Shown(CartPoleSwingUpEnv):
    metadata = {"render_modes": ["rgb_array"]}


class Hidden(CartPoleSwingUpEnv):
    metadata = {"render_modes": []}


@pytest.mark.parametrize("cls", [Shown, Hidden])
@pytest.mark.parametrize("module", ["", "my_module:"])
def test_an_environment_is_found_by_its_module_and_id(cls, module, monkeypatch):
    monkeypatch.setitem(gym.registry, "Own-v0", gym.envs.registration.EnvSpec("Own-v0", cls))
    assert renders(f"{module}Own-v0") == (cls is Shown)


def test_runs_are_evaluated_from_start_states_of_their_own():
    envs = [make_evaluation_env("Pendulum-v1", {}, seed=seed) for seed in (0, 1, 2, 3)]
    starts = np.concatenate([env.reset() for env in envs])
    assert len(np.unique(starts, axis=0)) == len(starts) == 20
