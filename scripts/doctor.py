"""Check this machine and installation: one line per thing, with a remedy where one is needed.

totalprop doctor            # exit code 0 if everything that training needs is there
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ENOUGH_DISK = 2 * 2**30  # bytes; a run with videos and checkpoints of a pixel replay takes more


class Finding(NamedTuple):
    """One line of the report."""

    state: str  # "ok", "note" (an optional part is missing), "BAD"
    what: str
    remedy: str = ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    options = parser.parse_args(arguments)
    findings = examine(options.runs)
    for state, what, remedy in findings:
        print(f"{state:>4}  {what}" + (f"\n      -> {remedy}" if remedy else ""))
    bad = sum(state == "BAD" for state, *_ in findings)
    print(f"{bad} thing(s) to repair" if bad else "everything that training needs is here")
    raise SystemExit(1 if bad else 0)


def examine(runs: Path) -> list[Finding]:
    """All checks, in the order of the report; none of them raises."""
    checks: dict[str, Callable[[], list[Finding]]] = {
        "python": python,
        "packages": packages,
        "gpu": gpu,
        "rendering": rendering,
        "pictures": pictures,
        "disk": lambda: disk(runs),
        "runs_folder": lambda: runs_folder(runs),
        "cores": cores,
    }
    found = []
    for name, check in checks.items():
        try:
            found += check()
        except Exception as error:  # a doctor does not faint
            text = " ".join(str(error).split())
            found.append(Finding("BAD", f"{name}: {type(error).__name__}: {text}"))
    return found


def python() -> list[Finding]:
    """The interpreter."""
    what = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    return [Finding("ok", what)]


def packages(installed: Callable[[str], str | None] | None = None) -> list[Finding]:
    """Versions, and those known not to work together."""
    version = installed or _version
    found = []
    needed = ("torch", "gymnasium", "stable-baselines3", "safetensors", "tensorboard", "tyro")
    for name in needed:
        found.append(
            Finding("ok", f"{name} {version(name)}")
            if version(name)
            else Finding("BAD", f"{name} is missing", "pip install -c constraints.txt -e .")
        )
    suite, mujoco, shimmy = version("dm-control"), version("mujoco"), version("shimmy")
    remedy = "pip install -c constraints.txt -e '.[dmc]' (Python 3.10 to 3.12)"
    if not (suite and mujoco and shimmy):
        found.append(Finding("note", "no DeepMind Control Suite: the dmc/ tasks are off", remedy))
    elif int(mujoco.split(".")[0]) >= 4:
        what = f"dm_control {suite} with mujoco {mujoco}: they are known not to work together"
        found.append(Finding("BAD", what, remedy))
    else:
        found.append(Finding("ok", f"dm_control {suite}, mujoco {mujoco}, shimmy {shimmy}"))
    return found


def gpu() -> list[Finding]:
    """CUDA, if there is any."""
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") is None:
            return [Finding("ok", "no NVIDIA GPU: training runs on the CPU")]
        remedy = "install PyTorch's CUDA build: https://pytorch.org/get-started"
        return [Finding("note", "PyTorch sees no GPU, though nvidia-smi is here", remedy)]
    name, memory = torch.cuda.get_device_name(), torch.cuda.mem_get_info()
    torch.zeros(1, device="cuda").add_(1).item()
    free = f"{memory[0] / 1e9:.1f} of {memory[1] / 1e9:.1f} GB free"
    return [Finding("ok", f"CUDA {torch.version.cuda}: {name}, {free}")]


def rendering() -> list[Finding]:
    """What MuJoCo draws with: pixels and videos of the control suite."""
    if importlib.util.find_spec("dm_control") is None:
        return []
    from totalprop.envs.mujoco_backend import check_rendering, choose_backend, draws

    chosen = os.environ.get("MUJOCO_GL", "")
    try:
        backend = choose_backend()
        check_rendering()
    except RuntimeError as error:
        return [Finding("note", "state vectors work, pixels and videos do not", str(error))]
    if chosen and not draws(chosen):
        what = f"MUJOCO_GL={chosen} is set, but nothing can be drawn with it"
        return [Finding("BAD", what, "unset MUJOCO_GL: a backend that draws is then chosen")]
    return [Finding("ok", f"MuJoCo draws with {backend or 'the system'}")]


def pictures() -> list[Finding]:
    """What learning curves and GIFs need."""
    missing = [name for name in ("matplotlib", "PIL", "imageio") if not _has(name)]
    if missing:
        what = f"missing for pictures: {', '.join(missing)}"
        return [Finding("note", what, "pip install -c constraints.txt -e .")]
    return [Finding("ok", "learning curves and GIFs can be drawn")]


def disk(runs: Path) -> list[Finding]:
    """Room for runs and for scratch files."""
    found = []
    for name, folder in (("runs", _existing(runs)), ("temporary files", tempfile.gettempdir())):
        free = shutil.disk_usage(folder).free
        what = f"{free / 1e9:.1f} GB free for {name} ({folder})"
        is_enough = free >= ENOUGH_DISK
        remedy = "" if is_enough else "make room, or choose another place: --runs FOLDER, TMPDIR"
        found.append(Finding("ok" if is_enough else "BAD", what, remedy))
    return found


def runs_folder(runs: Path) -> list[Finding]:
    """Whether runs can be written."""
    folder = _existing(runs)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        what = f"{folder} cannot be written ({error.strerror})"
        return [Finding("BAD", what, "choose another folder: --runs FOLDER")]
    return [Finding("ok", f"{folder} can be written")]


def cores() -> list[Finding]:
    """Cores, and settings that take them away."""
    import torch

    count, threads = os.cpu_count() or 1, torch.get_num_threads()
    what = f"{count} cores, PyTorch uses {threads}"
    if threads < count and os.environ.get("OMP_NUM_THREADS"):
        remedy = "OMP_NUM_THREADS limits it; --threads N sets it for one run"
        return [Finding("note", what, remedy)]
    return [Finding("ok", what)]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


if __name__ == "__main__":
    main()
