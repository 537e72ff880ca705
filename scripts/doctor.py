"""Check this machine and the installation, and suggest a fix for everything that fails.

totalprop doctor            # exit code 0 if everything needed for training is available

Every line of the report is "ok", a "note" (something optional is missing) or "BAD" (fix it first).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from totalprop.scripts.flag_types import Parser

ENOUGH_DISK = 2 * 2**30  # bytes; a run on pixels needs more, for the checkpoints of its replay


class Finding(NamedTuple):
    """One line of the report."""

    state: str  # "ok", "note" (something optional is missing) or "BAD"
    what: str
    remedy: str = ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("runs"),
        help="folder that runs are written to (default: runs)",
    )
    options = parser.parse_args(arguments)
    findings = examine(options.runs)
    for state, what, remedy in findings:
        print(f"{state:>4}  {what}" + (f"\n      -> {remedy}" if remedy else ""))
    bad = sum(state == "BAD" for state, *_ in findings)
    print(f"{bad} problem(s) to fix" if bad else "everything needed for training is available")
    raise SystemExit(1 if bad else 0)


def examine(runs: Path) -> list[Finding]:
    """Run all checks, in the order of the report. A check that raises is reported as BAD."""
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
        except Exception as error:  # report it, and run the other checks
            text = " ".join(str(error).split())
            found.append(Finding("BAD", f"{name}: {type(error).__name__}: {text}"))
    return found


def python() -> list[Finding]:
    """Report the interpreter and the platform."""
    what = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    return [Finding("ok", what)]


def packages(installed: Callable[[str], str | None] | None = None) -> list[Finding]:
    """Check that required packages are installed, in versions that work together."""
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
    remedy = "pip install 'totalprop[dmc]' (Python 3.10 to 3.12)"
    if not (suite and mujoco and shimmy):
        what = "the DeepMind Control Suite is not installed: dmc/ tasks are unavailable"
        found.append(Finding("note", what, remedy))
    elif int(mujoco.split(".")[0]) >= 4:
        what = f"dm_control {suite} is known not to work with mujoco {mujoco}"
        found.append(Finding("BAD", what, remedy))
    else:
        found.append(Finding("ok", f"dm_control {suite}, mujoco {mujoco}, shimmy {shimmy}"))
    return found


def gpu() -> list[Finding]:
    """Check that PyTorch can use the GPU, if there is one."""
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") is None:
            return [Finding("ok", "no NVIDIA GPU: training runs on the CPU")]
        remedy = "install PyTorch's CUDA build: https://pytorch.org/get-started"
        return [Finding("note", "PyTorch sees no GPU, though nvidia-smi is installed", remedy)]
    name, memory = torch.cuda.get_device_name(), torch.cuda.mem_get_info()
    torch.zeros(1, device="cuda").add_(1).item()
    free = f"{memory[0] / 1e9:.1f} of {memory[1] / 1e9:.1f} GB free"
    return [Finding("ok", f"CUDA {torch.version.cuda}: {name}, {free}")]


def rendering() -> list[Finding]:
    """Check that MuJoCo can render the control suite, for pixels and videos."""
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
        what = f"MUJOCO_GL={chosen} is set, but this backend cannot render here"
        return [Finding("BAD", what, "unset MUJOCO_GL: a backend that works is then chosen")]
    return [Finding("ok", f"MuJoCo renders with {backend or 'the default backend'}")]


def pictures() -> list[Finding]:
    """Check the packages that draw learning curves and GIFs."""
    missing = [name for name in ("matplotlib", "PIL", "imageio") if not _has(name)]
    if missing:
        what = f"missing for learning curves and GIFs: {', '.join(missing)}"
        return [Finding("note", what, "pip install -c constraints.txt -e .")]
    found = [Finding("ok", "learning curves and GIFs can be drawn")]
    if not _has("pygame"):
        what = "no GIFs of Gymnasium's classic control (Pendulum-v1, ...), which pygame draws"
        found.append(Finding("note", what, "pip install 'gymnasium[classic-control]'"))
    return found


def disk(runs: Path) -> list[Finding]:
    """Check the free disk space for runs and for temporary files."""
    found = []
    for name, folder in (("runs", _existing(runs)), ("temporary files", tempfile.gettempdir())):
        free = shutil.disk_usage(folder).free
        what = f"{free / 1e9:.1f} GB free for {name} ({folder})"
        is_enough = free >= ENOUGH_DISK
        remedy = "" if is_enough else "free some space, or use another disk: --runs FOLDER, TMPDIR"
        found.append(Finding("ok" if is_enough else "BAD", what, remedy))
    return found


def runs_folder(runs: Path) -> list[Finding]:
    """Check that the folder of the runs is writable."""
    folder = _existing(runs)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        what = f"{folder} is not writable ({error.strerror})"
        return [Finding("BAD", what, "choose another folder: --runs FOLDER")]
    return [Finding("ok", f"{folder} is writable")]


def cores() -> list[Finding]:
    """Report the CPU cores, and a setting that keeps PyTorch from using all of them."""
    import torch

    count, threads = os.cpu_count() or 1, torch.get_num_threads()
    what = f"{count} cores, of which PyTorch uses {threads}"
    if threads < count and os.environ.get("OMP_NUM_THREADS"):
        remedy = "OMP_NUM_THREADS limits PyTorch; --threads N overrides it for one run"
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
    """The folder itself, or its nearest parent that exists."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


if __name__ == "__main__":
    main()
