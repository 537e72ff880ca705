"""Environments in worker processes (SubprocVecEnv): say which of them died."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

P = ParamSpec("P")
Result = TypeVar("Result")


def explain_dead_workers(learn: Callable[P, Result]) -> Callable[P, Result]:
    """Decorator of an agent's `learn`: replaces the bare EOFError that a dead worker causes.

    Raises:
        RuntimeError: worker processes have ended; the message says which, and their exit codes.
    """

    @functools.wraps(learn)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Result:
        try:
            return learn(*args, **kwargs)
        except (EOFError, ConnectionError) as error:
            ended = _ended_workers(args[0].env)  # type: ignore[attr-defined]
            if not ended:
                raise
            raise RuntimeError(
                f"environment process(es) {', '.join(ended)} died; a negative exit code is the "
                "signal (-9: often the system's, out of memory), else the worker's traceback is "
                "above. Make the environments again and resume from a checkpoint"
            ) from error

    return wrapped


def _ended_workers(env: VecEnv | None) -> list[str]:
    """Describe each worker that has ended, like "2 of 4 (exit code -9)"."""
    vec_env = None if env is None else env.unwrapped
    if not isinstance(vec_env, SubprocVecEnv):
        return []
    for process in vec_env.processes:
        process.join(timeout=0.2)  # the pipe closes a moment before the process ends
    return [
        f"{i} of {len(vec_env.processes)} (exit code {process.exitcode})"
        for i, process in enumerate(vec_env.processes)
        if process.exitcode is not None
    ]
