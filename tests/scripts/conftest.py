"""What the tests of several scripts share."""

import pytest

from tests.scripts import forked
from totalprop.scripts.studies import sweep


@pytest.fixture
def sweep_by_fork(tmp_path, monkeypatch):
    """A sweep's runs, with `--jobs 1`, are forked; another test starts them as a user does."""

    def run(command, *, stdout, **_):
        assert command[1:3] == ["-m", "totalprop.scripts.train"]
        done = forked.run("totalprop.scripts.train", command[3:], tmp_path)
        stdout.write(done.stdout + done.stderr)
        return done

    monkeypatch.setattr(sweep.subprocess, "run", run)
