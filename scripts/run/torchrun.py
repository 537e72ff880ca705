"""The processes of a run that torchrun starts: how they find each other, and who writes what."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from totalprop.agents import AGENTS
from totalprop.agents.core.algorithm import Algorithm
from totalprop.agents.core.processes import ALONE, Processes
from totalprop.agents.core.validation import constructor_hints
from totalprop.agents.persistence.checkpoint import Checkpoints
from totalprop.scripts.run.environments import import_flag
from totalprop.scripts.run.errors import UserError
from totalprop.scripts.run.folder import RunFolder
from totalprop.scripts.run.program import program

WAIT = timedelta(days=1)  # the first process evaluates alone; torchrun ends all if one dies


@contextlib.contextmanager
def processes_of_torchrun() -> Iterator[Processes]:
    """Join the processes that torchrun started, on gloo and, for tensors of a GPU, on NCCL.

    Without torchrun, or with one process, this process is alone.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["WORLD_SIZE"] == "1":
        yield ALONE
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=WAIT)
    processes = Processes(dist.group.WORLD)
    with contextlib.ExitStack() as stack:
        if processes.rank:  # the first one speaks for all
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield processes
    dist.destroy_process_group()


def check_agent(agent: str, processes: Processes) -> None:
    """Raise a UserError if several processes cannot learn this agent."""
    able = [name for name, entry in AGENTS.items() if "group" in constructor_hints(entry.cls)]
    if processes.size > 1 and agent not in able:
        raise UserError(
            f"{agent} learns in one process: start it without torchrun, or choose one of "
            f"{', '.join(able)}"
        )


def checkpoint_folder(folder: RunFolder, rank: int) -> Path:
    """Where a process writes its checkpoints; the first one's are those of the run."""
    return folder.checkpoints / f"rank_{rank}" if rank else folder.checkpoints


def check_size(folder: RunFolder, processes: Processes) -> None:
    """Raise a UserError if the run's checkpoints are of another number of processes."""
    size = 1 + len(list(folder.checkpoints.glob("rank_*")))
    if Checkpoints(folder.checkpoints).paths() and size != processes.size:
        raise UserError(
            f"{folder.path} is a run of {size} process(es), not of {processes.size}; continue "
            f"with: {resume_command(folder, size)}"
        )


def resume_command(folder: RunFolder, size: int) -> str:
    """What continues a run of so many processes on one machine."""
    start = f"torchrun --nproc-per-node {size}" if size > 1 else program("python")
    flag = import_flag(folder.read_config()["env_id"])
    return f"{start} -m totalprop train --resume {folder.quoted}{flag}"


def load_together(
    checkpoints: Checkpoints, cls: type[Algorithm], env: object, device: str, processes: Processes
) -> Algorithm | None:
    """Load the newest checkpoint that all processes have and can read; None if there is none."""
    replaced = {} if processes.group is None else {"group": processes.group}
    while True:
        checkpoints.forget_after(min(processes.objects(checkpoints.newest_number())))
        agent = checkpoints.load(cls, env, device, **replaced)  # type: ignore[arg-type]
        if len(set(processes.objects(checkpoints.newest_number()))) == 1:
            return agent
