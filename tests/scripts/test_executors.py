"""Where a sweep's runs start, and what becomes of them when processes are killed.

Runs are commands of the shell here, except in the slow test; each appends a line to `started` when
it starts, and writes summary.json when it is finished.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import cloudpickle
import pytest

from totalprop.scripts.reliability.kill_sweep import kill_sweep
from totalprop.scripts.run.errors import UserError
from totalprop.scripts.studies import executors, live
from totalprop.scripts.studies.executors import Trial

FINISH = "echo {} > summary.json"


@pytest.fixture
def trial_of(tmp_path, monkeypatch):
    """Makes trials that run shell commands in their folders."""

    def command(self):
        return ["sh", "-c", f"cd {self.folder}; echo $$ >> started; {self.arguments[0]}"]

    monkeypatch.setattr(Trial, "_command", command)

    def make(script, name="a"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        return Trial(name, "runs", (script,), str(tmp_path))

    return make


def starts(trial):
    path = trial.folder / "started"
    return len(path.read_text().split()) if path.exists() else 0


def parent_of_first(trial):
    """The process that started the run's first one."""
    run = (trial.folder / "started").read_text().split()[0]
    return int(subprocess.check_output(["ps", "-o", "ppid=", "-p", run], text=True))


def wait_until(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "nothing has happened for 120 s"
        time.sleep(0.05)


@pytest.mark.usefixtures("_interruptible")
def test_a_killed_run_is_started_again_and_a_failed_one_is_not(trial_of):
    killed_once = trial_of(f"[ -e second ] || {{ touch second; kill -9 $$; }}; {FINISH}", "a")
    terminated_once = trial_of(f"[ -e second ] || {{ touch second; exit 143; }}; {FINISH}", "b")
    failed, interrupted = trial_of("exit 1", "c"), trial_of("kill -INT $$", "d")
    always_killed = trial_of("kill -9 $$", "e")
    trials = [killed_once, terminated_once, failed, interrupted, always_killed]
    found = {trial.name: done for trial, done in executors.in_threads(trials, 2)}
    assert found == {"a": True, "b": True, "c": False, "d": False, "e": False}
    assert [starts(trial) for trial in trials] == [2, 2, 1, 1, executors.ATTEMPTS]


def test_a_run_whose_parent_was_killed_is_waited_for(trial_of, tmp_path):
    trial = trial_of(f"while [ ! -e go ]; do sleep 0.05; done; {FINISH}")
    code = (
        "import sys; from totalprop.scripts.studies.executors import Trial\n"
        f"Trial._command = lambda self: {trial._command()!r}\n"
        f"Trial('a', 'runs', (), {str(tmp_path)!r})()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    wait_until(lambda: starts(trial))
    parent.kill()
    parent.wait()
    assert trial.is_running  # the orphan
    results = []
    second = threading.Thread(target=lambda: results.append(trial()))
    second.start()
    second.join(0.3)
    assert second.is_alive()
    (trial.folder / "go").touch()
    second.join(60)
    assert results == [True] and starts(trial) == 1 and not trial.is_running


def test_jobs_bound_the_runs_at_a_time(trial_of, tmp_path):
    script = f"echo + >> {tmp_path}/events; sleep 0.1; echo - >> {tmp_path}/events; {FINISH}"
    trials = [trial_of(script, str(i)) for i in range(6)]
    assert all(done for _, done in executors.in_threads(trials, 2))
    level = most = 0
    for event in (tmp_path / "events").read_text().split():
        level += 1 if event == "+" else -1
        most = max(most, level)
    assert most == 2


def test_the_table_shows_what_runs_and_what_failed(trial_of):
    trials = [trial_of("", name) for name in ("done", "failed", "running", "waiting")]
    running = trials[2]
    (running.folder / "evaluations.json").write_text('{"timesteps": [2400], "returns": [[1, 2]]}')
    (running.folder / "config.json").write_text('{"options": {"total_timesteps": 9600}}')
    with open(running.log, "a") as log:
        executors.fcntl.flock(log, executors.fcntl.LOCK_EX)
        drawn = live.table(trials, {"done": True, "failed": False}, len(trials))
    columns = [list(column.cells) for column in drawn.columns]
    assert columns[0] == ["failed", "running"]
    assert columns[2][1] == "2,400 of 9,600" and columns[3][1] == "1.5"
    assert drawn.caption == "1 of 4 runs done, 1 running, 1 failed"


def test_a_run_is_resumed_with_the_module_of_its_environment(tmp_path):
    trial = Trial("a", "runs", ("pipps", "--seed", "3"), str(tmp_path))
    command = trial._command()
    assert command[3:8] == ["pipps", "--runs", "runs", "--name", "a"]
    assert command[-2:] == ["--seed", "3"]
    trial.folder.mkdir(parents=True)
    (trial.folder / "config.json").write_text(json.dumps({"env_id": "mine:Env-v0"}))
    assert trial._command()[3:] == ["--resume", "runs/a", "--import", "mine"]


@pytest.mark.parametrize(
    ("flags", "hidden", "message"),
    [
        ({"address": "auto"}, "ray", r"need ray: pip install 'totalprop\[ray\]'"),
        ({"cpus": 0.5}, "ray", r"need ray: pip install 'totalprop\[ray\]'"),
        ({"slurm": "slurm"}, "submitit", r"--slurm needs submitit: .*'totalprop\[slurm\]'"),
    ],
)
def test_what_is_not_installed_is_one_sentence(flags, hidden, message, monkeypatch):
    find = executors.importlib.util.find_spec
    monkeypatch.setattr(
        executors.importlib.util, "find_spec", lambda name: None if name == hidden else find(name)
    )
    with pytest.raises(UserError, match=message):
        executors.chosen(**flags)


def test_threads_stand_in_for_ray(monkeypatch):
    monkeypatch.setattr(executors.importlib.util, "find_spec", lambda name: None)
    assert executors.chosen() is executors.in_threads


@pytest.fixture
def _by_value():
    """Workers get the patched `Trial`."""
    from ray import cloudpickle as of_ray

    for pickler in (cloudpickle, of_ray):
        pickler.register_pickle_by_value(executors)
    yield
    for pickler in (cloudpickle, of_ray):
        pickler.unregister_pickle_by_value(executors)


@pytest.mark.usefixtures("_by_value")
def test_a_worker_of_ray_that_is_killed_is_replaced(trial_of, tmp_path):
    """Its run waits to be killed the first time; of its children, Ray kills what it finds."""
    victim = trial_of(f"[ $(wc -l < started) -gt 1 ] || exec sleep 600; {FINISH}", "victim")
    others = [trial_of(FINISH, str(i)) for i in range(11)]
    found = {}
    for trial, done in executors.on_ray([victim, *others], 2, cpus=0.5):
        found[trial.name] = done
        if len(found) == 2:
            wait_until(lambda: starts(victim))
            os.kill(parent_of_first(victim), signal.SIGKILL)
            run = (victim.folder / "started").read_text().split()[0]
            subprocess.run(["kill", "-9", run], stderr=subprocess.DEVNULL, check=False)
    assert found == {trial.name: True for trial in [victim, *others]}
    assert [starts(trial) for trial in [victim, *others]] == [2] + [1] * 11


def test_more_than_a_machine_has_is_one_sentence(trial_of):
    with pytest.raises(UserError, match=r"--gpus-per-run must be at most .*, got 1000"):
        list(executors.on_ray([trial_of("")], 1, gpus=1000))


@pytest.mark.usefixtures("_by_value")
def test_a_preempted_job_is_requeued(trial_of, tmp_path):
    first = f"[ $(wc -l < started) -gt 1 ] || exec sleep 600; {FINISH}"
    trials = [trial_of(first, "preempted"), trial_of(FINISH, "b"), trial_of("exit 1", "c")]
    found = {}

    def preempt():
        wait_until(lambda: starts(trials[0]))
        os.kill(parent_of_first(trials[0]), signal.SIGUSR2)

    thread = threading.Thread(target=preempt)
    thread.start()
    for trial, done in executors.on_slurm(trials, 2, cluster="local"):
        found[trial.name] = done
    thread.join()
    assert found == {"preempted": True, "b": True, "c": False}
    assert [starts(trial) for trial in trials] == [2, 1, 1]


def test_slurm_that_is_not_there_or_knows_no_such_parameter_is_one_sentence(trial_of):
    with pytest.raises(UserError, match="--slurm: "):
        list(executors.on_slurm([trial_of("")], 1, parameters={"partition": "gpu"}))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_sweep_on_ray_survives_kills_of_workers_runs_and_driver(tmp_path):
    """As `totalprop kill-sweep`, whose results are in results/reliability."""
    record = kill_sweep("daappo", tmp_path, 12, {"worker": 2, "run": 2, "driver": 1}, seed=1)
    assert record["differences"] == record["trained_twice"] == []
    assert len(record["kinds_of_kills_and_finished_runs"]) >= 3
