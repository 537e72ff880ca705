"""An environment or renderer that hangs ends the process, with a sentence, instead of the night."""

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
    """Ends the process when one call takes longer than the limit.

    From a thread of its own and without cleaning up: a driver that hangs holds everything else.

    Args:
        limit: seconds; 0 switches it off.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._entered: dict[int, tuple[str, float]] = {}
        if limit > 0:
            threading.Thread(target=self._watch, daemon=True).start()

    @contextlib.contextmanager
    def watching(self, what: str) -> Iterator[None]:
        """The call inside is watched."""
        key = threading.get_ident()
        before = self._entered.get(key)
        self._entered[key] = what, time.monotonic()
        try:
            yield
        finally:
            if before is None:
                del self._entered[key]
            else:
                self._entered[key] = before

    def _watch(self) -> None:
        while True:
            time.sleep(min(1.0, self.limit / 4))
            for what, entered in list(self._entered.values()):
                if time.monotonic() - entered > self.limit:
                    print(
                        f"\nerror: {what} has not returned for {self.limit:g} s; the run goes on "
                        "from its last checkpoint with --resume (--step-timeout sets the limit)",
                        file=sys.stderr,
                        flush=True,
                    )
                    os._exit(HUNG)


REWINDING = (
    "snapshot", "restore", "extra_step", "get_snapshot_values", "set_snapshot_values"
)  # fmt: skip


class Watched(gym.Wrapper):
    """An environment whose step, reset and render are watched, and what `Rewindable` adds."""

    def __init__(self, env: gym.Env[Any, Any], watchdog: Watchdog) -> None:
        super().__init__(env)
        self._watchdog = watchdog
        for name in REWINDING:
            if hasattr(env, name):  # only then: callers ask whether it is there
                setattr(self, name, self._watched(name))

    def _watched(self, name: str) -> Callable[..., Any]:
        method = self.env.get_wrapper_attr(name)

        def call(*args: Any) -> Any:
            with self._watchdog.watching(f"env.{name}"):
                return method(*args)

        return call

    def step(self, action: Any) -> Any:
        """As in the environment."""
        with self._watchdog.watching("env.step"):
            return self.env.step(action)

    def reset(self, **kwargs: Any) -> Any:
        """As in the environment."""
        with self._watchdog.watching("env.reset"):
            return self.env.reset(**kwargs)

    def render(self) -> Any:
        """As in the environment."""
        with self._watchdog.watching("env.render"):
            return self.env.render()
