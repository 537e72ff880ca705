"""Interleaved timing, so that a temporary slowdown of the machine affects all tasks alike."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from totalprop.scripts.run.progress import counted


def interleaved_medians(
    tasks: dict[str, Callable[[], object]], repeats: int, *, device: str = "cpu", warm_up: int = 1
) -> dict[str, float]:
    """Measure the median seconds of each task.

    Args:
        tasks: name -> function to time.
        repeats: rounds; in each round, every task is called once.
        device: device to synchronise with before and after every call.
        warm_up: calls of each task before the first round.
    Returns:
        Name -> median seconds.
    """

    def wait() -> None:
        if device != "cpu":
            torch.cuda.synchronize(device)

    for task in tasks.values():
        for _ in range(warm_up):
            task()
    times: dict[str, list[float]] = {name: [] for name in tasks}
    with counted(repeats, "repeats") as advance:
        for _ in range(repeats):
            for name, task in tasks.items():
                wait()
                start = time.perf_counter()
                task()
                wait()
                times[name].append(time.perf_counter() - start)
            advance()
    return {name: float(np.median(values)) for name, values in times.items()}
