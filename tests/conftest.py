"""What holds for every test."""

import multiprocessing

import pytest

from totalprop.scripts.reliability.preload import PRELOAD

# Before anything forks: stable-baselines3's SubprocVecEnv uses the same server, and once that runs
# without these modules, every process forked from it imports them again, for seconds.
multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)


@pytest.fixture(autouse=True)
def _sb3_logs_into_a_folder_that_is_removed(tmp_path_factory, monkeypatch):
    """stable-baselines3 would leave its logs in /tmp for good."""
    monkeypatch.setenv("SB3_LOGDIR", str(tmp_path_factory.getbasetemp() / "sb3"))
