"""A watchdog that ends the process, with an error message, if the environment or renderer hangs."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym

HUNG = 3  # exit code


class Watchdog:
    """Ends the process when a watched call takes longer than a limit.

    It does so from a separate thread and without cleaning up, since a driver that hangs would block
    the clean-up too. Time in which the whole process is stopped (Ctrl-Z) does not count.

    Args:
        limit: seconds; 0 disables the watchdog.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._entered: dict[int, tuple[str, float]] = {}
        self._awake = 0.0  # seconds that the watching thread has seen
        if limit > 0:
            threading.Thread(target=self._watch, daemon=True).start()

    @contextlib.contextmanager
    def watching(self, what: str) -> Iterator[None]:
        """Watch the body of the `with` statement.

        Args:
            what: name of the call, for the error message.
        """
        key = threading.get_ident()
        before = self._entered.get(key)
        self._entered[key] = what, self._awake
        try:
            yield
        finally:
            if before is None:
                del self._entered[key]
            else:
                self._entered[key] = before

    def _watch(self) -> None:
        interval = min(1.0, self.limit / 4)
        while True:
            before = time.monotonic()
            time.sleep(interval)
            self._awake += min(time.monotonic() - before, 2 * interval)
            for what, entered in list(self._entered.values()):
                if self._awake - entered > self.limit:
                    print(
                        f"\nerror: {what} has not returned for {self.limit:g} s; continue the run "
                        "from its last checkpoint with --resume (--step-timeout sets the limit)",
                        file=sys.stderr,
                        flush=True,
                    )
                    os._exit(HUNG)


REWINDING = ("snapshot", "restore", "extra_step")


class Watched(gym.Wrapper):
    """An environment whose step, reset, render and `Rewindable` methods are watched."""

    def __init__(self, env: gym.Env[Any, Any], watchdog: Watchdog) -> None:
        super().__init__(env)
        self._watchdog = watchdog
        for name in REWINDING:
            if hasattr(env, name):  # callers test for these methods
                setattr(self, name, self._watched(name))

    def _watched(self, name: str) -> Callable[..., Any]:
        method = self.env.get_wrapper_attr(name)

        def call(*args: Any) -> Any:
            with self._watchdog.watching(f"env.{name}"):
                return method(*args)

        return call

    def step(self, action: Any) -> Any:
        """Step the environment."""
        with self._watchdog.watching("env.step"):
            return self.env.step(action)

    def reset(self, **kwargs: Any) -> Any:
        """Reset the environment."""
        with self._watchdog.watching("env.reset"):
            return self.env.reset(**kwargs)

    def render(self) -> Any:
        """Render the environment."""
        with self._watchdog.watching("env.render"):
            return self.env.render()
