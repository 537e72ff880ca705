"""One gradient update of sheeprl 0.8.4's DreamerV1, called outside its training script.

Our Dreamer's speed is compared with it. It calls sheeprl's own `train` (world model, actor, critic)
on one synthetic batch, with the networks, optimisers and constants of the default `exp=dreamer_v1`,
for pixels and continuous actions only. Environments, replay, metrics and log folders are left out.

sheeprl's dependencies contradict ours, so it has a virtual environment of its own, made by
`make bench-peer`, unless it is installed here (as by `make gpu`, without most of them). What runs
there (`python -m totalprop.scripts.bench.sheeprl_peer SETTINGS`) needs nothing beyond sheeprl.
"""

from __future__ import annotations

import getpass
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from totalprop.agents.core.memory import keep_freed_memory

VERSION = "0.8.4"
ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-peer" / "bin" / "python"
READY = "ready"
MISSING = f"left out: sheeprl {VERSION}, which 'make bench-peer' installs into .venv-peer"


def interpreter() -> Path | None:
    """The Python that has sheeprl: that of `make bench-peer`, else this one; None if neither."""
    if PYTHON.exists():
        return PYTHON
    return Path(sys.executable) if importlib.util.find_spec("sheeprl") else None


def start_update(*, keep_memory: bool = False, **kwargs: Any) -> Callable[[], None]:
    """Run `make_update` in a process of sheeprl's environment, whose allocator has its defaults.

    The process ends with this one.

    Args:
        keep_memory: use our allocator settings instead, which apply to a whole process.
        kwargs: arguments of `make_update`.
    Returns:
        A function that runs one update and returns when it is done.
    Raises:
        ImportError: there is no such environment, or it holds another version.
    """
    if (python := interpreter()) is None:
        raise ImportError(MISSING)
    settings = {
        "threads": torch.get_num_threads(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "keep_memory": keep_memory,
        "update": kwargs,
    }
    process = subprocess.Popen(
        [str(python), "-m", "totalprop.scripts.bench.sheeprl_peer", json.dumps(settings)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    requests, answers = process.stdin, process.stdout

    def answer() -> str:
        line = answers.readline()
        if not line:
            raise RuntimeError(f"sheeprl's process ended with exit code {process.wait()}")
        return line.strip()

    if (found := answer()) != READY:
        raise ImportError(found)

    def update() -> None:
        print(file=requests, flush=True)
        answer()

    return update


def serve(settings: dict[str, Any]) -> None:
    """Make an update, answer, and run it for every line that comes in until there are no more."""
    # What sheeprl prints must not be taken for an answer.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    torch.set_num_threads(settings["threads"])
    torch.backends.cuda.matmul.allow_tf32 = settings["tf32"]
    if settings["keep_memory"]:
        keep_freed_memory()
    try:
        update = make_update(**settings["update"])
    except ImportError as error:
        print(error, file=answers, flush=True)
        return
    print(READY, file=answers, flush=True)
    for _ in sys.stdin:
        update()
        device = settings["update"].get("device", "cpu")
        if device != "cpu":
            torch.cuda.synchronize(device)
        print(file=answers, flush=True)


def make_update(
    *,
    batch: int = 50,
    length: int = 50,
    horizon: int = 15,
    actions: int = 6,
    device: str = "cpu",
    compile: bool = False,
) -> Callable[[], None]:
    """Make a function that runs one full update of sheeprl's DreamerV1, always on the same batch.

    Threads and matrix-product precision are those of the caller, so that both sides of a comparison
    are equal; sheeprl's command line would set `float32_matmul_precision` to "high".

    Args:
        batch: B, the number of sequences.
        length: T, the steps per sequence.
        horizon: H, the number of imagined steps.
        actions: A, the dimension of the actions.
        device: "cpu" or "cuda[:index]". On a GPU, the update returns before the device is done.
        compile: whether to enable `algo.compile`. The first update then compiles for minutes.
    Returns:
        The update. It changes the networks and optimisers, but not the batch.
    Raises:
        ImportError: sheeprl is missing, or has another version.
    """
    with _quiet(), torch.random.fork_rng():
        torch.manual_seed(0)
        train, arguments, config = build(horizon, actions, device, compile)
        data = _synthetic_batch(batch, length, actions, arguments["fabric"].device)

    def update() -> None:
        with _quiet():
            train(**arguments, data=data, aggregator=None, cfg=config)

    return update


def build(
    horizon: int, actions: int, device: str, compile: bool
) -> tuple[Callable[..., None], dict[str, Any], Any]:
    """Build sheeprl's `train`, its arguments (fabric, networks, optimisers) and its config."""
    # Otherwise sheeprl creates a cache in the home folder. This path is PyTorch's own default.
    default = os.path.join(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", default)
    import hydra
    import sheeprl
    from gymnasium.spaces import Box
    from gymnasium.spaces import Dict as DictSpace
    from lightning.fabric import Fabric
    from omegaconf import OmegaConf
    from sheeprl.algos.dreamer_v1.agent import build_agent
    from sheeprl.algos.dreamer_v1.dreamer_v1 import train
    from sheeprl.utils.utils import dotdict

    if sheeprl.__version__ != VERSION:
        raise ImportError(f"{MISSING} (found {sheeprl.__version__})")
    overrides = ["exp=dreamer_v1", f"algo.horizon={horizon}", f"algo.compile.enabled={compile}"]
    with hydra.initialize_config_module("sheeprl.configs", version_base="1.3"):
        composed = hydra.compose("config", overrides=overrides)
    config = dotdict(OmegaConf.to_container(composed, resolve=True, throw_on_missing=True))

    where = torch.device(device)
    devices = 1 if where.index is None else [where.index]
    fabric = Fabric(accelerator=where.type, devices=devices, precision=config.fabric.precision)
    fabric.launch()
    space = DictSpace({"rgb": Box(0, 255, (3, 64, 64), np.uint8)})
    world_model, actor, critic, _ = build_agent(fabric, (actions,), True, config, space)
    arguments = {"fabric": fabric, "world_model": world_model, "actor": actor, "critic": critic}
    for name in ("world_model", "actor", "critic"):
        settings, weights = config.algo[name].optimizer, arguments[name].parameters()
        optimizer = hydra.utils.instantiate(settings, params=weights, _convert_="all")
        arguments[f"{name.split('_')[0]}_optimizer"] = fabric.setup_optimizers(optimizer)
    return train, arguments, config


def _synthetic_batch(
    batch: int, length: int, actions: int, device: torch.device
) -> dict[str, Tensor]:
    """Make a batch like those of sheeprl's `sample_batches`, all float32.

    Images are [T, B, 3, 64, 64] from 0 to 255, actions [T, B, A], the rest [T, B, 1]. No episode
    ends. `train` sets `is_first` of the first steps, in the same way on every call.
    """
    lead = (length, batch)
    data = {name: torch.zeros(*lead, 1) for name in ("terminated", "truncated", "is_first")}
    data["rgb"] = torch.randint(0, 256, (*lead, 3, 64, 64)).float()
    data["actions"] = torch.rand(*lead, actions) * 2 - 1
    data["rewards"] = torch.rand(*lead, 1)
    return {name: value.to(device) for name, value in data.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings, and disable argument checks of `torch.distributions`, as sheeprl does."""
    checks = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Distribution.set_default_validate_args(checks)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
