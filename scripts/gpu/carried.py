"""The packages that a GPU machine without a network lacks, carried there as wheels.

    make gpu-wheels        # where there is a network: fills .gpu-wheels
    make gpu               # on the GPU machine, with that folder: installs it, and runs

The machine brings Python, pip, PyTorch, and what usually comes with it: NumPy, SciPy, Matplotlib,
TensorBoard, pytest, Lightning. This module needs nothing but Python and pip.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Their versions are those of constraints.txt, or of constraints-peer.txt.
OURS = (
    "gymnasium", "farama-notifications", "stable-baselines3", "tyro", "typeguard",
    "docstring-parser", "shimmy", "dm-control", "dm-env", "dm-tree", "importlib-resources",
    "mujoco", "glfw", "pyopengl",
)  # fmt: skip
PEER = ("sheeprl", "hydra-core", "omegaconf", "antlr4-python3-runtime", "python-dotenv")
SOURCE_ONLY = ("antlr4-python3-runtime",)  # without a wheel; pure Python
# Folders that are cut out of a wheel.
CUT = {
    "dm-control": ("dm_control/locomotion/", "dm_control/blender/", "dm_control/suite/dog_assets/"),
    "mujoco": ("mujoco/experimental/",),
}
LEFT_OUT = (
    "dm-control without locomotion, Blender's exporter and the dog's meshes: no task but dmc/dog",
    "mujoco without its experimental studio",
    "labmaze: only dm-control's locomotion needs it",
    "moviepy, imageio-ffmpeg, pygame-ce: sheeprl's videos and games; its update needs none",
    "PyTorch, NumPy, SciPy, Matplotlib, TensorBoard, pytest, Lightning: the machine's own",
)
PLATFORMS = ("2_28", "2_27", "2_24", "2_17")  # of glibc, from the newest
OPENGL = ("libEGL.so.1", "libOpenGL.so.0", "libGLdispatch.so.0")  # what MuJoCo's EGL renderer loads
# Imported by the command; those of the machine included.
NEEDED = (
    "torch", "numpy", "scipy", "matplotlib", "imageio", "tqdm", "rich", "safetensors", "filelock",
    "tensorboard", "yaml", "pytest", "pytest_timeout", "hypothesis", "gymnasium",
    "stable_baselines3", "tyro", "docstring_parser", "shimmy", "dm_control", "mujoco", "OpenGL",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    fill = commands.add_parser("gather", help="download the wheels into a folder")
    fill.add_argument("folder", type=Path)
    fill.add_argument("--python", default="3.12", help="the GPU machine's Python (default: 3.12)")
    fill.add_argument("--limit", type=float, default=64.0, help="MiB to stay below (default: 64)")
    put = commands.add_parser("install", help="install the wheels of a folder, without a network")
    put.add_argument("folder", type=Path)
    put.add_argument("environment", type=Path, help="virtual environment to make")
    options = parser.parse_args(arguments)
    try:
        if options.command == "gather":
            gather(options.folder, options.python, options.limit)
        else:
            install(options.folder, options.environment)
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


# --------------------------------------------------------------------------------------------------
# where there is a network
# --------------------------------------------------------------------------------------------------


def gather(folder: Path, python: str, limit: float) -> None:
    """Fill a folder with the wheels for x86-64 Linux, and OpenGL's loaders; print their sizes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    ours, peers = (
        pinned("constraints.txt", OURS, python),
        pinned("constraints-peer.txt", PEER, python),
    )
    wanted = [*ours, *peers]
    wheels = [pin for pin in wanted if not pin.startswith(SOURCE_ONLY)]
    platforms = [f"--platform=manylinux_{glibc}_x86_64" for glibc in PLATFORMS]
    target = [f"--python-version={python}", "--implementation=cp", *platforms]
    target += ["--platform=manylinux2014_x86_64", "--platform=manylinux1_x86_64"]
    print(f"Downloading {len(wanted)} wheels for Python {python} into {folder} ...", flush=True)
    _pip("download", "--no-deps", "--only-binary=:all:", *target, f"--dest={folder}", *wheels)
    sources = [pin for pin in wanted if pin not in wheels]
    _pip("wheel", "--no-deps", f"--wheel-dir={folder}", *sources)
    for name, folders in CUT.items():
        (wheel,) = folder.glob(f"{name.replace('-', '_')}-*.whl")
        cut(wheel, folders)
    for library in OPENGL:
        if (path := find_library(library)) is not None:
            (folder / "opengl").mkdir(exist_ok=True)
            shutil.copyfile(path, folder / "opengl" / library)
        else:
            print(
                f"not carried: {library}, which `apt install libegl1 libopengl0` would bring here"
            )
    files = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: -p.stat().st_size)
    for path in files:
        print(f"{path.stat().st_size / 2**20:7.2f} MiB  {path.relative_to(folder)}")
    size = sum(path.stat().st_size for path in files) / 2**20
    print(f"{size:7.2f} MiB  in all, of {limit:g}\nLeft out:")
    print("\n".join(f"  {line}" for line in LEFT_OUT))
    if size > limit:
        raise RuntimeError(f"{folder} holds {size:.1f} MiB, more than the {limit:g} MiB of --limit")
    print(f"Take {folder} to the GPU machine, beside this Makefile; `make gpu` installs it there.")


def pinned(file: str, names: Sequence[str], python: str) -> list[str]:
    """name==version of packages, from a file of constraints, for a version of Python."""
    wanted, found = tuple(map(int, python.split("."))), {}
    for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
        match = re.fullmatch(r'([\w.-]+)==([\w.]+)(?:; python_version (<|>=) "([\d.]+)")?', line)
        if match is None:
            continue
        name, version, side, bound = match.groups()
        is_older = bound is not None and wanted < tuple(map(int, bound.split(".")))
        if side is None or is_older == (side == "<"):
            found[name] = version
    if missing := [name for name in names if name not in found]:
        raise RuntimeError(f"{file} has no version of {', '.join(missing)}; add one")
    return [f"{name}=={found[name]}" for name in names]


def cut(wheel: Path, folders: Sequence[str]) -> None:
    """Remove folders from a wheel, and from its list of files."""
    smaller = wheel.with_suffix(".smaller")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            if entry.filename.startswith(tuple(folders)):
                continue
            data = old.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                lines = data.decode().splitlines(keepends=True)
                kept = [line for line in lines if not line.startswith(tuple(folders))]
                data = "".join(kept).encode()
            new.writestr(entry, data)
    smaller.replace(wheel)


def find_library(name: str) -> Path | None:
    """Where the system's linker finds a library; None if it does not."""
    try:
        done = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    found = re.search(rf"^\s*{re.escape(name)} \(.*x86-64.*\) => (.*)$", done.stdout, re.MULTILINE)
    return Path(found[1]) if found else None


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    subprocess.run(command, check=True)


# --------------------------------------------------------------------------------------------------
# where there is none
# --------------------------------------------------------------------------------------------------


def install(folder: Path, environment: Path) -> None:
    """Make a virtual environment of the wheels that also sees this Python's packages.

    `venv --system-site-packages` would not do: where Python is a virtual environment itself, it
    shows the packages of the Python below. Nor is pip installed into it, which takes longer than
    all the wheels.
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise RuntimeError(f"{folder} holds no wheels; `make gpu-wheels` fills it, with a network")
    own = [sys.executable, "-m", "venv", "--clear", "--without-pip", str(environment)]
    subprocess.run(own, check=True)
    python = environment / "bin" / "python"
    ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip())
    # The paths are of modules, too: Debian's python3 has its packages in dist-packages.
    parents = [*site.getsitepackages(), sysconfig.get_path("purelib"), site.getusersitepackages()]
    lines = [f"import site; site.addsitedir({path!r})" for path in dict.fromkeys(parents)]
    (packages / "parent.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _pip(
        "--isolated", "install", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir",
        "--root-user-action=ignore", "--upgrade", f"--target={packages}", *map(str, wheels),
    )  # fmt: skip
    test = f"import importlib.util as u; print(*(n for n in {NEEDED!r} if u.find_spec(n) is None))"
    done = subprocess.run([str(python), "-c", test], check=True, capture_output=True, text=True)
    if missing := done.stdout.split():
        raise RuntimeError(
            f"neither {sys.executable} nor {folder} has {', '.join(missing)}; add the packages to "
            "scripts/gpu/carried.py, or install them"
        )


def opengl_environment(folder: Path, scratch: Path) -> dict[str, str]:
    """Variables with which MuJoCo finds OpenGL's loaders, and NVIDIA's driver, if it would not.

    Args:
        folder: of the wheels; "opengl" in it holds the loaders.
        scratch: where the driver's description is written, if the machine has none.
    """
    found, loaders = {}, folder.resolve() / "opengl"
    if loaders.is_dir() and not all(map(_loads, OPENGL)):
        found["LD_LIBRARY_PATH"] = str(loaders)
    driver = next((name for name in _drivers() if _loads(name)), None)
    places = (Path("/usr/share/glvnd/egl_vendor.d"), Path("/etc/glvnd/egl_vendor.d"))
    is_described = any(path for place in places for path in place.glob("*nvidia*.json"))
    if driver is not None and not is_described:
        path = scratch / "nvidia.json"
        description = {"file_format_version": "1.0.0", "ICD": {"library_path": driver}}
        path.write_text(json.dumps(description), encoding="utf-8")
        found["__EGL_VENDOR_LIBRARY_FILENAMES"] = str(path)
    return found


def _drivers() -> Iterator[str]:
    name = "libEGL_nvidia.so.0"
    yield name
    for folder in ("lib64", "lib"):  # where container runtimes mount the driver
        yield f"/usr/local/nvidia/{folder}/{name}"


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
