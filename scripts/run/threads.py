"""CPU threads: how many cores the process owns, and threads that wait without using one.

OpenMP's threads spin while they wait for each other. Beside one other busy process they take turns
with the thread that they wait for: two spinning threads made a PIPPS gradient 13 times slower (4.9
instead of 0.38 s on two busy cores), two that sleep did not. This module imports no PyTorch, since
OpenMP reads the environment when it is loaded.
"""

from __future__ import annotations

import math
import os
from pathlib import Path


def wait_passively() -> None:
    """Make OpenMP's threads sleep while they wait; call it before PyTorch is imported."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # GNU's and LLVM's OpenMP
    os.environ.setdefault("KMP_BLOCKTIME", "0")  # Intel's


def owned_cores(cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that the process may use: those of its affinity, and of its control group's quota."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    return max(1, math.ceil(min(count, _quota(cgroups))))


def _quota(cgroups: Path) -> float:
    """Cores' worth of time that the control group of the container or process has."""
    found = math.inf
    for folder in (cgroups, *_own_groups(cgroups)):
        try:  # version 2: "max 100000" or "150000 100000"
            quota, period = (folder / "cpu.max").read_text().split()
            found = min(found, math.inf if quota == "max" else int(quota) / int(period))
        except (OSError, ValueError, ZeroDivisionError):
            pass
        for sub in ("cpu", "cpu,cpuacct", "."):  # version 1; -1 is none
            try:
                quota = (folder / sub / "cpu.cfs_quota_us").read_text()
                period = (folder / sub / "cpu.cfs_period_us").read_text()
                found = min(found, int(quota) / int(period) if int(quota) > 0 else math.inf)
            except (OSError, ValueError, ZeroDivisionError):
                pass
    return found


def _own_groups(cgroups: Path) -> list[Path]:
    """Folders of the groups that /proc/self/cgroup names, where they are visible, and above."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        root = cgroups / controllers if controllers else cgroups
        if controllers in ("", "cpu", "cpu,cpuacct"):
            parts = Path(path.lstrip("/")).parts
            folders += [root.joinpath(*parts[: i + 1]) for i in range(len(parts))]
    return folders
