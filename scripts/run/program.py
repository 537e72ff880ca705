"""This program: how it is called, and of which commit it is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path


def program(name: str) -> str:
    """How to call python or a program installed with it: by name if on PATH, else by path."""
    path = Path(sys.executable).with_name(name)
    if shutil.which(name) == str(path):
        return name
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def current_commit() -> str:
    """Short hash of the current commit, to be recorded with results.

    "-dirty" is appended if code was changed. "unknown" outside a checkout or without git.
    """

    def git(*arguments: str) -> str:
        command, here = ["git", *arguments], Path(__file__).parents[1]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=here)
        except (OSError, subprocess.CalledProcessError):
            return ""
        return done.stdout.strip()

    commit = git("rev-parse", "--short", "HEAD")
    is_changed = commit and git("status", "--porcelain", "--", "*.py", "constraints.txt")
    return commit + "-dirty" * bool(is_changed) or "unknown"
