"""Progress of long work: a bar on a terminal, elsewhere lines that become rarer."""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator

from stable_baselines3.common.callbacks import BaseCallback
from tqdm import tqdm

from totalprop.scripts.run.threads import owned_cores

FIRST = 10.0  # s until the first line; each next one takes twice as long as the one before
LONGEST = 600.0  # s between two lines at most


@contextlib.contextmanager
def said(describe: Callable[[], str]) -> Iterator[None]:
    """While the body runs, print how far it is: after 10 s, 30 s, 70 s, ..., to standard error.

    On a terminal, nothing is printed if bars show it.

    Args:
        describe: called in another thread; the text of a line.
    """
    is_over = threading.Event()

    def speak() -> None:
        wait = FIRST
        while not is_over.wait(wait):
            print(describe(), file=sys.stderr, flush=True)
            wait = min(2 * wait, LONGEST)

    threading.Thread(target=speak, daemon=True).start()
    try:
        yield
    finally:
        is_over.set()


@contextlib.contextmanager
def counted(total: int, what: str) -> Iterator[Callable[[], None]]:
    """Show how much of some work is done.

    Args:
        total: parts of the work.
        what: their name, in the plural.
    Yields:
        A function to be called after each part.
    """
    done = 0
    is_drawn = sys.stderr.isatty()
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=total, desc=what, leave=False, disable=not is_drawn))
        if not is_drawn:
            stack.enter_context(said(lambda: f"{done} of {total} {what}"))

        def advance() -> None:
            nonlocal done
            done += 1
            bar.update()

        yield advance


class Pace(BaseCallback):
    """Callback that says once when a run has become much slower; first in the list of callbacks.

    The time of a round is compared with the median of the `WINDOW` rounds before it. Rounds in
    which nothing is learned do not count, nor do evaluations and checkpoints.
    """

    SLOWER, WINDOW, LEAST = 5.0, 3, 10.0  # LEAST: s that a round takes which is worth a sentence

    def __init__(self) -> None:
        super().__init__()
        self._began: float | None = None
        self._n_updates, self._steps = 0, 0
        self._paces: list[float] = []  # s per step
        self._is_said = False

    def _on_step(self) -> bool:
        if self._began is None:
            self._began = time.monotonic()
            self._steps = self.num_timesteps - self.training_env.num_envs
        return True

    def _on_rollout_start(self) -> None:
        updates, began = self.model._n_updates, self._began
        self._began = None
        has_learned, self._n_updates = updates > self._n_updates, updates
        if began is None or not has_learned:
            return
        seconds = time.monotonic() - began
        self._add(seconds, seconds / (self.num_timesteps - self._steps))

    def _add(self, seconds: float, pace: float) -> None:
        before, self._paces = self._paces, [*self._paces, pace][-self.WINDOW :]
        if self._is_said or len(before) < self.WINDOW or seconds < self.LEAST:
            return
        if pace > self.SLOWER * (usual := statistics.median(before)):
            self._is_said = True
            print(
                f"a step takes {pace:.2g} s, {pace / usual:.0f} times as long as before (load "
                f"{os.getloadavg()[0]:.1f} on {owned_cores()} cores): if other processes use the "
                "cores, --threads 1 suffers least",
                file=sys.stderr,
                flush=True,
            )
