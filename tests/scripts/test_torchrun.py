"""Runs of two processes: what they write, and that a killed one resumes in the same bits."""

import json
import math
import os
import subprocess
import sys

import pytest

from tests.processes import together
from totalprop.agents import AGENTS
from totalprop.agents.core.processes import Processes
from totalprop.agents.persistence import checkpoint, safe_file
from totalprop.agents.persistence.checkpoint import Checkpoints
from totalprop.scripts import train
from totalprop.scripts.reliability import kill_test
from totalprop.scripts.run.arguments import parse
from totalprop.scripts.run.errors import UserError
from totalprop.scripts.run.folder import RunFolder
from totalprop.scripts.run.job import Job
from totalprop.scripts.run.torchrun import check_agent

SHARED = ["--eval-episodes", "2", "--checkpoint-seconds", "0", "--no-tensorboard", "--seed", "3"]
DREAMER = [
    "dreamer", "--preset", "recommended", "--env-id", "totalprop/CartPoleSwingUp-v0",
    "--total-timesteps", "120", "--learning-starts", "40", "--sequence-length", "6",
    "--batch-size", "4", "--imagination-starts", "8", "--replay-ratio", "2.5", "--horizon", "3",
    "--train-freq", "20", "--eval-every", "50", "--eval-max-steps", "20", "--buffer-size", "80",
    "--size", "s", *(f"--{name}=8" for name in ("stoch", "deter", "hidden", "width")), *SHARED,
]  # fmt: skip
DAAPPO = [
    "daappo", "--env-id", "Pendulum-v1", "--env-arg", "max_episode_steps=15", "--total-timesteps",
    "128", "--n-steps", "16", "--batch-size", "16", "--n-epochs", "2", "--normalize", "both",
    "--dynamics-width", "8", *SHARED,
]  # fmt: skip
RUNS = {"dreamer": DREAMER, "daappo": DAAPPO}
KILLED = 9  # exit code
AT = 3  # the checkpoint that only the first process still writes


def begin(group, arguments):
    checkpoint.MAX_TIME_FRACTION = math.inf
    train.train(parse(arguments, ""), Processes(group))


def begin_and_die(group, arguments):
    """The second process dies before it writes the last checkpoint, the first one after it."""
    save, count = Checkpoints.save, 0

    def counted(self):
        nonlocal count
        count += 1
        if count == AT and group.rank() == 1:
            os._exit(KILLED)
        save(self)
        if count == AT:
            os._exit(KILLED)

    Checkpoints.save = counted
    begin(group, arguments)


def resume(group, path):
    checkpoint.MAX_TIME_FRACTION = math.inf
    train.resume(path, processes=Processes(group))


def final_states(agent, folder):
    """What the newest checkpoint of each process holds."""
    found = []
    for place in (folder, folder / "rank_1"):
        path = Checkpoints(place).paths()[-1]
        state = safe_file.read(path, f"{AGENTS[agent].cls.__name__} checkpoint")
        state["training"] |= kill_test._joined(state["training"], place)
        state.pop("files")
        found.append(state)
    return found


@pytest.mark.parametrize("agent", RUNS)
def test_a_killed_run_of_two_processes_resumes_in_the_same_bits(agent, tmp_path):
    folders = [tmp_path / name for name in ("quiet", "killed")]
    quiet, killed = ([*RUNS[agent], "--runs", str(tmp_path), "--name", f.name] for f in folders)
    together(begin, quiet)
    together(begin_and_die, killed, code=KILLED)
    newest = [Checkpoints(folders[1] / "checkpoints" / x).newest_number() for x in ("", "rank_1")]
    assert newest == [AT, AT - 1]
    together(resume, folders[1])
    assert kill_test.differences(agent, *folders) == []
    first, second = (final_states(agent, f / "checkpoints") for f in folders)
    found: list[str] = []
    kill_test._compare(first[1], second[1], "", found)
    assert found == []
    parameters = [state["agent"]["parameters"] for state in first]
    kill_test._compare(*parameters, "", found)
    assert found == []  # both processes hold one agent
    kill_test._compare(*(state["training"] for state in first), "", found)
    assert found  # which has seen different things
    with pytest.raises(UserError, match="a run of 2 process"):
        train.resume(folders[1])
    job = Job.read(RunFolder(folders[0]))  # as `diagnose` does, in one process
    alone = Checkpoints(folders[0] / "checkpoints").load(AGENTS[agent].cls, job.environments()[0])
    assert alone is not None and alone.group is None and alone.num_timesteps >= 120


def test_torchrun_trains_one_agent(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "totalprop", "train", *DAAPPO, "--runs", str(tmp_path), "--name", "run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Training daappo") == 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["threads"] == 1


def test_agents_of_one_process_are_refused():
    class Two:
        def size(self):
            return 2

    with pytest.raises(UserError, match=r"pipps learns in one process: .* dreamer, daappo"):
        check_agent("pipps", Processes(Two()))
