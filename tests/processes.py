"""A function in several processes of one group, forked from one that has imported everything."""

import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SIZE = 2


def together(function: Callable[..., Any], *arguments: Any, code: int = 0) -> list[Any]:
    """Call `function(group, *arguments)` in each of two processes, on gloo.

    Args:
        function: of a module, so that another process finds it.
        arguments: after the group.
        code: with which all of them have to exit.

    Returns:
        What each process returned, by rank; nothing if they were to fail.
    """
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_call, args=(folder, rank, function, arguments))
            for rank in range(SIZE)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
            process.kill()
        codes = [process.exitcode for process in processes]
        assert codes == [code] * SIZE, f"exit codes {codes}"
        paths = [Path(folder, f"{rank}.pt") for rank in range(SIZE)] if code == 0 else []
        return [torch.load(path, weights_only=False) for path in paths]


def _call(folder: str, rank: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/rendezvous"  # no port, so that no two tests can collide
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=SIZE)
    assert dist.group.WORLD is not None
    torch.save(function(dist.group.WORLD, *arguments), Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()
