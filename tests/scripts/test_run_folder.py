"""The commit that a run records."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from totalprop.scripts.run import folder as run_folder
from totalprop.scripts.run.folder import current_commit


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_record_tells_changed_code_from_committed_code(tmp_path, monkeypatch):
    def git(*arguments):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)

    code = tmp_path / "scripts" / "run_folder.py"
    code.parent.mkdir()
    code.write_text("old")
    monkeypatch.setattr(run_folder, "__file__", str(code))
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
