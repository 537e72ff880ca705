"""What protects a run: a lock against a second process, and an orderly end on signals."""

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
    """Hold a run's lock; the system releases it when the process ends, however it ends."""
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
    """SIGINT and SIGTERM checkpoint before the next rollout; a second one ends the run at once.

    Yields:
        The signals received so far.
    """
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt
        checkpoints.request_stop()
        print(
            "\nstopping with a checkpoint at the end of this round; once more to stop at once "
            "(and repeat this round later)",
            file=sys.stderr,
            flush=True,
        )

    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        before = {number: signal.signal(number, handle) for number in numbers}
    except ValueError:  # not in the main thread: whoever runs us there handles signals
        before = {}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
