"""Choice of the OpenGL backend that MuJoCo renders with, and errors that explain what is missing.

MuJoCo and dm_control read MUJOCO_GL once, when they are imported, and a wrong value makes the
import itself fail. They are therefore never imported directly, but through `load_dm_control`.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import platform
import subprocess
import sys
import warnings
from typing import Any

OFF = "off"  # the value of MUJOCO_GL that disables rendering
PROBE_TIMEOUT = 30.0  # s; a working probe takes half a second
_REMEDY = (
    "run `apt install libegl1 libgl1` (or `libosmesa6`), unset MUJOCO_GL and start Python again"
)
_PROBE = """
import mujoco
model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><geom size='1'/></worldbody></mujoco>")
data = mujoco.MjData(model)
with mujoco.Renderer(model, 8, 8) as renderer:
    renderer.update_scene(data)
    renderer.render()
"""


def choose_backend() -> str:
    """Unless MUJOCO_GL is set, set it to EGL or OSMesa, whichever works first.

    The choice is kept in os.environ, so that child processes inherit it. If neither works it is
    "off": simulation still works, and `check_rendering` suggests a fix. On macOS and Windows, which
    have a single backend, nothing is set. Nor can anything be chosen once dm_control is imported.

    Returns:
        The backend as MUJOCO_GL names it; "" for the default of the platform.
    """
    loaded = sys.modules.get("dm_control._render")
    if loaded is not None:
        return str(loaded.BACKEND or OFF)
    if os.environ.get("MUJOCO_GL"):
        return os.environ["MUJOCO_GL"]
    if platform.system() != "Linux":
        return ""
    backend = next((name for name in ("egl", "osmesa") if draws(name)), OFF)
    os.environ["MUJOCO_GL"] = backend
    return backend


def draws(backend: str) -> bool:
    """Whether a backend can render a frame, tried in a subprocess since drivers crash or hang."""
    command = [sys.executable, "-c", _PROBE]
    environment = {**os.environ, "MUJOCO_GL": backend}
    quiet = subprocess.DEVNULL
    try:
        done = subprocess.run(
            command, env=environment, timeout=PROBE_TIMEOUT, stdin=quiet, stdout=quiet, stderr=quiet
        )
    except subprocess.TimeoutExpired:
        return False
    except OSError as error:  # EAGAIN: too many processes; simulation needs no renderer
        warnings.warn(
            f"cannot start a process to try MUJOCO_GL={backend} ({error.strerror}): MuJoCo will "
            f"not render; set MUJOCO_GL={backend} to use it without trying",
            stacklevel=2,
        )
        return False
    return done.returncode == 0


def load_dm_control() -> tuple[Any, Any, Any]:
    """Import dm_control and shimmy with a working backend.

    Returns:
        The modules dm_control.suite and dm_control.mujoco, and shimmy's compatibility class.

    Raises:
        ImportError: a package is missing.
        RuntimeError: a package fails to load, most often because of MUJOCO_GL.
    """
    for package in ("dm_control", "mujoco", "shimmy"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(
                f"The dmc/ environments require {package}: run `pip install 'totalprop[dmc]'`."
            )
    backend = choose_backend()
    _load_triton_first()
    try:
        with warnings.catch_warnings():  # their imports switch on every DeprecationWarning
            from dm_control import mujoco, suite
            from shimmy.dm_control_compatibility import DmControlCompatibilityV0
    # PyOpenGL raises an AttributeError if its library is missing.
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        raise RuntimeError(
            f"dm_control does not load with MUJOCO_GL={backend!r} ({error}): unset MUJOCO_GL to "
            "choose automatically, or run `pip install 'totalprop[dmc]'` for compatible versions."
        ) from error
    return suite, mujoco, DmControlCompatibilityV0


def check_rendering() -> None:
    """Raise a RuntimeError that suggests a fix if MuJoCo cannot render."""
    backend = choose_backend()
    if backend.lower() in (OFF, "disable", "disabled", "false", "0"):
        raise RuntimeError(f"MuJoCo cannot render here (MUJOCO_GL={backend!r}): {_REMEDY}.")
    display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if backend == "glfw" and platform.system() == "Linux" and not display:
        # A second attempt would abort the process without an exception.
        raise RuntimeError(
            "MuJoCo cannot render with GLFW, which needs a display: make a dmc/ environment before "
            "you import dm_control or shimmy, or start Python with MUJOCO_GL=egl."
        )


def check_not_forked() -> None:
    """Raise a RuntimeError if rendering would hang. Call this before creating a context."""
    if _first_drawing_process() != os.getpid():
        raise RuntimeError(
            "OpenGL hangs in a process forked from one that has rendered: start workers with "
            "'forkserver' or 'spawn' (start_method= in stable-baselines3, context= in gymnasium)."
        )


def rendering_failed(error: Exception) -> RuntimeError:
    """Make the error for a context that cannot be created, to be raised from `error`."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return RuntimeError(
        f"MuJoCo cannot render with MUJOCO_GL={choose_backend()!r} ({reason}): {_REMEDY}."
    )


def _load_triton_first() -> None:
    """Import Triton where PyTorch, which is loaded, would import it later.

    Mesa's renderer loads an LLVM as soon as dm_control is imported. Triton, which holds another,
    then crashes when PyTorch makes its first optimiser. The other way round both work.
    """
    if "torch" in sys.modules and importlib.util.find_spec("triton") is not None:
        with contextlib.suppress(Exception):  # a broken Triton is PyTorch's to report
            importlib.import_module("triton")


@functools.cache
def _first_drawing_process() -> int:
    return os.getpid()  # cached: a forked child inherits its parent's answer
