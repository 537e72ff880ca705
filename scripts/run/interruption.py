"""Protection of a run: a lock against a second process, and a clean stop on signals."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout

from totalprop.agents.persistence import checkpoint
from totalprop.agents.persistence.checkpoint import Checkpoints, TrainingStopped
from totalprop.scripts.run.errors import UserError

REPEAT = 2.0  # s until the round is interrupted again, if something has caught the first attempt


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


def is_trained_now(folder: Path) -> bool:
    """Whether another process holds the run's lock."""
    try:
        with FileLock(folder / ".lock").acquire(timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # a folder that may only be read
        return False


@contextlib.contextmanager
def stopping_on_signals(checkpoints: Checkpoints) -> Iterator[list[int]]:
    """Raise TrainingStopped within seconds of SIGINT or SIGTERM, wherever the run is.

    If the current round ends within `checkpoint.GRACE`, it is kept in a new checkpoint. Otherwise
    the round is interrupted, be it in a rollout, a policy search or an evaluation, and the newest
    checkpoint is of its beginning or earlier: schedulers kill a process soon after their first
    signal. A second signal stops the run at once.

    Args:
        checkpoints: the run's checkpoints.
    Yields:
        The list of the signals received so far.
    """
    received: list[int] = []
    is_over, is_late = threading.Event(), threading.Event()
    main = threading.main_thread().ident

    def handle(number: int, frame: FrameType | None) -> None:
        if is_late.is_set():  # sent by `insist`
            is_late.clear()
            if not checkpoints.is_saving and not is_over.is_set():
                raise TrainingStopped
            return
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt
        checkpoints.request_stop()
        threading.Thread(target=insist, args=(number,), daemon=True).start()
        print(
            f"\nstopping, with a checkpoint if this iteration ends within {checkpoint.GRACE:g} s, "
            "else at the last one (the resumed run repeats what follows it); signal again to stop "
            "now",
            file=sys.stderr,
            flush=True,
        )

    def insist(number: int) -> None:
        wait = checkpoint.GRACE
        while not is_over.wait(wait):
            is_late.set()
            signal.pthread_kill(main, number)  # type: ignore[arg-type]  # also ends a system call
            wait = REPEAT

    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        before = {number: signal.signal(number, handle) for number in numbers}
    except ValueError:  # not the main thread: the caller handles signals
        before = {}
    try:
        yield received
    finally:
        is_over.set()
        for number, handler in before.items():
            signal.signal(number, handler)
