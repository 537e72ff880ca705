"""What the tests of several scripts share."""

import signal

import pytest

from tests.scripts import forked
from totalprop.scripts.studies import executors, sweep


@pytest.fixture
def _interruptible():
    """A process in the background may ignore SIGINT, and its children would, too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def sweep_by_fork(monkeypatch):
    """Called, it has a sweep's runs forked from threads; one test starts one as a user does."""

    def run(command, *, stdout, **_):
        assert command[1:3] == ["-m", "totalprop.scripts.train"]
        done = forked.run("totalprop.scripts.train", command[3:])
        stdout.write(done.stdout + done.stderr)
        return done

    def patch():
        monkeypatch.setattr(executors.subprocess, "run", run)
        monkeypatch.setattr(sweep, "chosen", lambda **_: executors.in_threads)

    return patch
