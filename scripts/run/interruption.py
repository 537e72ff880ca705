"""Protection of a run: a lock against a second process, and a clean stop on signals."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout

from totalprop.agents.persistence.checkpoint import Checkpoints
from totalprop.scripts.run.errors import UserError


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's lock. The operating system releases it however the process ends.

    Raises:
        UserError: another process holds the lock.
    """
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{folder} is being trained by another process; wait for it, or stop it"
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def stopping_between_rollouts(checkpoints: Checkpoints) -> Iterator[list[int]]:
    """On SIGINT or SIGTERM, save a checkpoint before the next rollout and stop there.

    A second signal stops the run at once.

    Args:
        checkpoints: the run's checkpoints.
    Yields:
        The list of the signals received so far.
    """
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt
        checkpoints.request_stop()
        print(
            "\nstopping at the end of this iteration, with a checkpoint; signal again to stop now "
            "(the resumed run then repeats this iteration)",
            file=sys.stderr,
            flush=True,
        )

    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        before = {number: signal.signal(number, handle) for number in numbers}
    except ValueError:  # not the main thread: the caller handles signals
        before = {}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
