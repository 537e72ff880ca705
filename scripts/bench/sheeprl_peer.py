"""One gradient update of sheeprl 0.8.4's DreamerV1, called outside its training script.

Our Dreamer's speed is compared with it. It calls sheeprl's own `train` (world model, actor, critic)
on one synthetic batch, with the networks, optimisers and constants of the default `exp=dreamer_v1`,
for pixels and continuous actions only. Environments, replay, metrics and log folders are left out.
"""

from __future__ import annotations

import contextlib
import getpass
import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from totalprop.agents.core.memory import keep_freed_memory

VERSION = "0.8.4"
MISSING = (
    f"totalprop bench dreamer compares with sheeprl {VERSION}: pip install 'sheeprl=={VERSION}'"
)


def start_update(*, keep_memory: bool = False, **kwargs: Any) -> Callable[[], None]:
    """Run `make_update` in a separate process, whose allocator has its default settings.

    Args:
        keep_memory: use our allocator settings instead, which apply to a whole process.
        kwargs: arguments of `make_update`.
    Returns:
        A function that runs one update and returns when it is done.
    Raises:
        ImportError: sheeprl is missing, or has another version.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    settings = (torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32, keep_memory)
    arguments = (theirs, *settings, kwargs)
    context.Process(target=_serve, args=arguments, daemon=True).start()
    problem = ours.recv()
    if problem is not None:
        raise ImportError(problem)

    def update() -> None:
        ours.send(None)
        ours.recv()

    return update


def _serve(
    connection: Connection, threads: int, tf32: bool, keep_memory: bool, kwargs: dict[str, Any]
) -> None:
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = tf32
    if keep_memory:
        keep_freed_memory()
    try:
        update = make_update(**kwargs)
    except ImportError as error:
        connection.send(str(error))
        return
    connection.send(None)
    with contextlib.suppress(EOFError):  # the parent process has closed the pipe
        while True:
            connection.recv()
            update()
            if kwargs.get("device", "cpu") != "cpu":
                torch.cuda.synchronize(kwargs["device"])
            connection.send(None)


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
    try:
        import sheeprl
    except ImportError as error:
        raise ImportError(MISSING) from error
    if sheeprl.__version__ != VERSION:
        raise ImportError(f"{MISSING} (found {sheeprl.__version__})")
    import hydra
    from gymnasium.spaces import Box
    from gymnasium.spaces import Dict as DictSpace
    from lightning.fabric import Fabric
    from omegaconf import OmegaConf
    from sheeprl.algos.dreamer_v1.agent import build_agent
    from sheeprl.algos.dreamer_v1.dreamer_v1 import train
    from sheeprl.utils.utils import dotdict

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
