"""For every test: what stable-baselines3 logs goes into pytest's folder, not into /tmp for good."""

import pytest


@pytest.fixture(autouse=True)
def _sb3_logs_into_a_folder_that_is_removed(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SB3_LOGDIR", str(tmp_path_factory.getbasetemp() / "sb3"))
