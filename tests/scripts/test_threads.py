"""Threads: what the process owns, how they wait, what a run records; and what a run says."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
from tqdm import tqdm

from totalprop.agents import DAAPPO
from totalprop.agents.persistence import checkpoint
from totalprop.envs import mujoco_backend
from totalprop.scripts import train
from totalprop.scripts.run import threads
from totalprop.scripts.run.arguments import read_settings
from totalprop.scripts.studies import variance

PERIOD = {"cpu/cpu.cfs_period_us": "100000"}
FILES = {
    "no limit": ({}, math.inf),
    "version 2, none": ({"cpu.max": "max 100000\n"}, math.inf),
    "version 2, half a core": ({"cpu.max": "50000 100000\n"}, 1),
    "version 2, 2.5 cores": ({"cpu.max": "250000 100000\n"}, 3),
    "version 1, none": (
        {"cpu/cpu.cfs_quota_us": "-1", **PERIOD},
        math.inf,
    ),
    "version 1, 2 cores": (
        {"cpu/cpu.cfs_quota_us": "200000", **PERIOD},
        2,
    ),
    "damaged": ({"cpu.max": "a"}, math.inf),
}


@pytest.mark.parametrize("case", list(FILES))
@pytest.mark.parametrize("affinity", [1, 2, 8])
def test_owned_cores_are_those_of_affinity_and_quota(case, affinity, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)), raising=False)
    files, quota = FILES[case]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads.owned_cores(tmp_path) == min(affinity, quota)


def test_the_command_waits_passively_before_torch_is_imported():
    code = (
        "import sys, os, importlib; import totalprop.scripts.cli as cli\n"
        "cli.import_module = lambda name: sys.exit("
        "'torch' in sys.modules or os.environ['OMP_WAIT_POLICY'] != 'passive')\n"
        "cli.main(['doctor'])"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_a_run_records_its_threads_but_is_repeated_with_the_machine_s(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "learn", lambda *_, **__: None)
    monkeypatch.setattr(train, "owned_cores", lambda: 1)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    train.main(["daappo", "--env-id", "Pendulum-v1", "--threads", "0", "--runs", str(tmp_path),
                "--name", "run"])  # fmt: skip
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["options"]["threads"] == 1  # bits depend on it: a resumed run has the same
    assert "threads" not in read_settings(tmp_path / "run")


def test_more_threads_than_cores_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main(["pipps", "--threads", "100000", "--runs", str(tmp_path)])
    assert "--threads must be at most " in capsys.readouterr().err


@pytest.mark.parametrize("signals", [1, 2])
def test_an_interrupted_bar_draws_no_more(signals, tmp_path, monkeypatch):
    """Its thread would go on while Python shuts down, which ended in a traceback of rich's."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    seen = []

    def interrupt(agent, *_):
        seen.extend(tqdm._instances)
        for _ in range(signals):
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(20)

    monkeypatch.setattr(DAAPPO, "train", interrupt)
    monkeypatch.setattr(checkpoint, "GRACE", 0.1)
    command = ["daappo", "--env-id", "Pendulum-v1", "--threads", "1", "--runs", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        train.main([*command, "--n-steps", "16", "--batch-size", "16", "--no-tensorboard"])
    assert stop.value.code == 130
    assert len(seen) == 1 and not seen[0]._prog.live.is_started


def test_flags_without_an_effect_are_named_at_the_start(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "learn", lambda *_, **__: None)
    command = ["dreamer", "--env-id", "Pendulum-v1", "--device", "cpu", "--runs", str(tmp_path)]
    command += ["--deter", "8", "--hidden", "8", "--width", "8", "--stoch", "4"]
    train.main([*command, "--cuda-graph", "--learning-starts", "900", "--eval-every", "100"])
    error = capsys.readouterr().err
    assert "--cuda-graph has no effect on cpu" in error
    assert "first evaluation is after about 900 steps" in error and "--eval-every 100" in error
    train.main([*command, "--learning-starts", "900", "--eval-every", "900"])
    assert capsys.readouterr().err == ""


def test_variance_names_the_tool_for_another_agent(tmp_path, capsys):
    config = {"env_id": "Pendulum-v1", "env_args": {}, "arguments": {}, "agent": "dreamer"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        variance.main([str(tmp_path)])
    assert "is a run of dreamer, and variance decomposes DAAPPO's" in capsys.readouterr().err


def test_a_probe_that_cannot_start_stops_nothing(monkeypatch):
    def busy(*_, **__):
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(mujoco_backend.subprocess, "run", busy)
    with pytest.warns(UserWarning, match="MUJOCO_GL=egl .* set MUJOCO_GL=egl to use it without"):
        assert not mujoco_backend.draws("egl")
