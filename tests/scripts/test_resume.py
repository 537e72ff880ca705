"""A run that is killed, stopped or extended resumes as if nothing had happened."""

import contextlib
import json
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import time

import pytest
from stable_baselines3.common.logger import Logger

from tests.scripts import forked
from totalprop.agents import AGENTS, PIPPS
from totalprop.agents.core import evaluation as run_evaluation
from totalprop.agents.persistence import checkpoint
from totalprop.agents.persistence.checkpoint import Checkpoints
from totalprop.agents.pipps import agent as pipps_agent
from totalprop.envs.cartpole import CartPoleSwingUpEnv
from totalprop.scripts import train
from totalprop.scripts.reliability import kill_test
from totalprop.scripts.run import report
from totalprop.scripts.run.interruption import locked
from totalprop.scripts.run.log import ResumableCSV, make_logger

TINY = ["pipps", "--gradient-steps", "2", "--n-particles", "6", "--gp-evaluations", "3"]
TINY += ["--threads", "1", "--no-progress", "--no-tensorboard", "--eval-episodes", "2"]
TINY += ["--checkpoint-seconds", "0"]
LONG = [*TINY, "--total-timesteps", "120"]


@pytest.fixture(autouse=True)
def _without_gif(monkeypatch):
    """It takes longer than such a run."""
    monkeypatch.setattr(report, "record_gif", lambda *_, **__: None)


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """An undisturbed run of LONG."""
    folder = tmp_path_factory.mktemp("runs")
    train.main([*LONG, "--runs", str(folder), "--name", "quiet"])
    return folder / "quiet"


@pytest.mark.parametrize("agent", list(AGENTS))
def test_killed_runs_end_bit_for_bit_as_quiet_ones(agent, tmp_path):
    """A short version of `totalprop kill-test`, whose results are in results/reliability."""
    record = kill_test.kill_test(
        agent, tmp_path, kills=2, kills_in_checkpoints=1, seed=1, length=0.4
    )
    assert record["differences"] == []
    assert record["kills"] >= 2


def test_the_comparison_notices_a_difference(tmp_path):
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        command = ["--total-timesteps", "60", "--seed", seed, "--runs", str(tmp_path)]
        train.main([*TINY, *command, "--name", name])
    assert kill_test.differences("pipps", tmp_path / "a", tmp_path / "b") == []
    found = kill_test.differences("pipps", tmp_path / "a", tmp_path / "c")
    for part in ("/model/parameters/policy", "/generators/torch", "/evaluations", "/progress"):
        assert any(part in difference for difference in found), part


def test_a_finished_run_says_so_and_can_be_given_more_steps(tmp_path, capsys):
    train.main([*TINY, "--total-timesteps", "60", "--runs", str(tmp_path), "--name", "short"])
    train.main([*TINY, "--total-timesteps", "120", "--runs", str(tmp_path), "--name", "long"])
    short = tmp_path / "short"
    with pytest.raises(SystemExit) as stop:
        train.main(["--resume", str(short)])
    error = capsys.readouterr().err
    assert stop.value.code == 1 and "is finished (60 steps)" in error and error.count("\n") == 1
    train.main(["--resume", str(short), "--total-timesteps", "120"])
    assert "Resuming" in capsys.readouterr().out
    assert kill_test.differences("pipps", tmp_path / "long", short) == []
    assert json.loads((short / "config.json").read_text())["options"]["total_timesteps"] == 120


def test_fewer_steps_than_a_run_was_to_do_are_refused(tmp_path, capsys):
    train.main([*TINY, "--total-timesteps", "120", "--runs", str(tmp_path), "--name", "run"])
    (tmp_path / "run" / "summary.json").unlink()  # as if killed shortly before its end
    for steps in ("-1", "0", "30", "119"):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            train.main(["--resume", str(tmp_path / "run"), "--total-timesteps", steps])
        error = capsys.readouterr().err
        assert stop.value.code == 1 and error.count("\n") == 1
        assert f"is a run of 120 steps, but --total-timesteps is {steps}; pass more" in error
    for total in ("120", "150"):
        train.main(["--resume", str(tmp_path / "run"), "--total-timesteps", total])
        assert (tmp_path / "run" / "summary.json").exists()


def test_a_finished_run_without_its_checkpoints_is_not_trained_anew(tmp_path, capsys):
    """Its model would be overwritten by one that begins at 0."""
    train.main([*TINY, "--total-timesteps", "60", "--runs", str(tmp_path), "--name", "run"])
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = (tmp_path / "run" / "model.zip").read_bytes()
    with pytest.raises(SystemExit, match="1"):
        train.main(["--resume", str(tmp_path / "run"), "--total-timesteps", "120"])
    assert "its checkpoints are gone" in capsys.readouterr().err
    assert (tmp_path / "run" / "model.zip").read_bytes() == before


def test_no_run_folder(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--resume", str(tmp_path)])
    assert stop.value.code == 1 and "is not a run folder" in capsys.readouterr().err


def test_a_second_process_on_a_run_is_refused(tmp_path, capsys):
    train.main([*TINY, "--total-timesteps", "30", "--runs", str(tmp_path), "--name", "run"])
    capsys.readouterr()
    with locked(tmp_path / "run"):
        command = ["--resume", str(tmp_path / "run"), "--total-timesteps", "60"]
        second = forked.run("totalprop.scripts.train", command)
    assert second.returncode == 1
    assert "is being trained by another process" in second.stderr
    assert second.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("number", "module"), [(signal.SIGINT, ""), (signal.SIGTERM, ""), (signal.SIGINT, "ast:")]
)
def test_a_signal_checkpoints_and_says_how_to_go_on(
    number, module, quiet, tmp_path, capsys, monkeypatch
):
    sent = []

    def send(agent, show_progress, improve=PIPPS._improve_policy):
        improve(agent, show_progress)
        if agent.num_timesteps == 60 and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)

    monkeypatch.setattr(PIPPS, "_improve_policy", send)
    env_id = f"{module}totalprop/CartPoleSwingUp-v0"
    with pytest.raises(SystemExit) as stop:
        train.main([*LONG, "--env-id", env_id, "--runs", str(tmp_path), "--name", "stopped"])
    assert stop.value.code == 128 + number
    sentence, _, command = capsys.readouterr().err.partition("; continue with: ")
    assert sentence.endswith("stopped after 60 of 120 steps")
    words = shlex.split(command)
    assert words[1:] == [
        *("-m", "totalprop", "train", "--resume", str(tmp_path / "stopped")),
        *(["--import", "ast"] if module else []),
    ]
    train.main(words[4:])
    assert kill_test.differences("pipps", quiet, tmp_path / "stopped") == []


class Stuck:
    """Replaces a method: at one of its calls a signal arrives, and it does not return any more."""

    def __init__(self, method, call, number):
        self.method, self.left, self.number = method, call, number

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)
            while True:
                with contextlib.suppress(Exception):  # as an environment's author might
                    time.sleep(60)
        return self.method(*args, **kwargs)


PLACES = {  # of 120 steps: the call within which the signal comes, and the newest checkpoint
    "rollout": (CartPoleSwingUpEnv, "step", 200, 30),  # the evaluation before it takes 150
    "evaluation": (run_evaluation, "evaluate", 2, 30),
    "search": (pipps_agent, "optimise_policy", 2, 30),
    "first round": (pipps_agent, "optimise_policy", 1, 0),
}


@pytest.mark.parametrize("place", list(PLACES))
def test_a_signal_ends_whatever_has_no_end(place, quiet, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(checkpoint, "GRACE", 0.1)
    monkeypatch.setattr(checkpoint, "MAX_TIME_FRACTION", math.inf)
    owner, name, call, step = PLACES[place]
    with monkeypatch.context() as patch:
        stuck = Stuck(getattr(owner, name), call, signal.SIGTERM)
        method = stuck if owner is not CartPoleSwingUpEnv else lambda *args: stuck(*args)
        patch.setattr(owner, name, method)
        with pytest.raises(SystemExit) as stop:
            train.main([*LONG, "--runs", str(tmp_path), "--name", "stopped"])
    assert stop.value.code == 128 + signal.SIGTERM
    error = capsys.readouterr().err
    assert f"stopped after {step} of 120 steps; continue with:" in error
    train.main(["--resume", str(tmp_path / "stopped")])
    assert kill_test.differences("pipps", quiet, tmp_path / "stopped") == []


def test_a_process_in_an_endless_evaluation_ends_within_ten_seconds_of_a_signal(tmp_path):
    command = ["daappo", "--env-id", "Pendulum-v1", "--env-arg", "max_episode_steps=-1"]
    command += ["--n-steps", "16", "--batch-size", "16", "--total-timesteps", "64", *TINY[7:]]
    command += ["--eval-max-steps", "1000000000", "--runs", str(tmp_path), "--name", "run"]
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=train.main, args=(command,))
    process.start()
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    while checkpoints.newest_step() < 0:
        assert process.is_alive()
        time.sleep(0.05)
    time.sleep(3.0)  # the evaluation has begun
    sent = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    process.join(20)
    assert time.monotonic() - sent < 10
    assert process.exitcode == 128 + signal.SIGTERM and checkpoints.newest_step() >= 0


def test_the_table_of_a_resumed_run_has_neither_gaps_nor_doubles(tmp_path):
    def log(table, *rows):
        logger = Logger(None, [table])
        for row in rows:
            for key, value in row.items():
                logger.record(key, value)
            logger.dump(0)

    path = tmp_path / "progress.csv"
    first = ResumableCSV(path)
    log(first, {"a": 1, "b": "x, y"}, {"a": 2})
    state = first.state_dict()
    log(first, {"a": 3, "c": 9.5})  # after the checkpoint, so it is written again
    with open(path, "a") as file:
        file.write("4,")  # killed while writing a row
    second = ResumableCSV(path)
    assert "9.5" in path.read_text()  # nothing is dropped before the state is loaded
    second.load_state_dict(state)
    log(second, {"a": 3, "d": 1})
    assert path.read_text() == 'a,b,d\n1,"x, y",\n2,,\n3,,1\n'


def test_weights_have_a_table_of_their_own_which_resumes_alike(tmp_path):
    def log(logger, *rows):
        for step, row in rows:
            for key, value in row.items():
                logger.record(key, value)
            logger.record("time/total_timesteps", step)
            logger.dump(step)

    def read(name):
        return (tmp_path / name).read_text()

    logger, tables = make_logger(tmp_path, tensorboard=False)
    log(logger, (10, {"train/k": 0.5, "k/step_01": 1.0, "k/step_02": 0.0}), (10, {"eval/x": 3}))
    assert read("k.csv") == "k/step_01,k/step_02,time/total_timesteps\n1.0,0.0,10\n"
    state = {name: table.state_dict() for name, table in tables.items()}
    log(logger, (20, {"train/k": 0.2, "k/step_01": 0.4, "k/action_00": 0.2}))
    with open(tmp_path / "k.csv", "a") as file:
        file.write("0.1,")  # killed while writing a row
    logger, tables = make_logger(tmp_path, tensorboard=False, first_step=10)
    for name, table in tables.items():
        table.load_state_dict(state[name])
    log(logger, (20, {"train/k": 0.3, "k/step_01": 0.6, "k/step_02": 0.0}))
    assert read("k.csv") == "k/step_01,k/step_02,time/total_timesteps\n1.0,0.0,10\n0.6,0.0,20\n"
    assert read("progress.csv") == (
        "time/total_timesteps,train/k,eval/x\n10,0.5,\n10,,3\n20,0.3,\n"
    )


def test_a_checkpoint_before_the_first_row_needs_no_table(tmp_path):
    path = tmp_path / "progress.csv"
    state = ResumableCSV(path).state_dict()
    table = ResumableCSV(path)
    table.load_state_dict(state)  # killed before the file existed
    path.write_text("a,b\n1,")  # or while writing its first row
    table.load_state_dict(state)
    table.write({"a": 5}, {"a": ()})
    assert path.read_text() == "a\n5\n"


def test_tensorboard_hides_what_is_written_again(tmp_path):
    """What was logged at the checkpoint's own step stays: it is not written again."""
    event_file_loader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    for first_step, values in ((0, {1: 1.0, 2: 2.0, 3: 3.0}), (2, {3: 30.0, 4: 4.0})):
        logger, _ = make_logger(tmp_path, tensorboard=True, first_step=first_step)
        for step, value in values.items():
            logger.record("x", value)
            logger.dump(step)
        logger.close()
    events = event_file_loader.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("x")] == [(1, 1), (2, 2), (3, 30), (4, 4)]


def test_a_run_that_cannot_go_on_stays_finished(tmp_path, capsys):
    train.main([*TINY, "--total-timesteps", "60", "--runs", str(tmp_path), "--name", "run"])
    run = tmp_path / "run"
    before = [(run / name).read_text() for name in ("summary.json", "config.json")]
    for path in (run / "checkpoints").glob("*.zip"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(SystemExit):
        train.main(["--resume", str(run), "--total-timesteps", "120"])
    assert "can be read" in capsys.readouterr().err
    assert [(run / name).read_text() for name in ("summary.json", "config.json")] == before


def test_a_lost_table_does_not_stop_a_run(tmp_path, capsys):
    train.main([*TINY, "--total-timesteps", "60", "--runs", str(tmp_path), "--name", "run"])
    table = tmp_path / "run" / "progress.csv"
    table.unlink()
    train.main(["--resume", str(tmp_path / "run"), "--total-timesteps", "120"])
    assert "progress.csv is gone" in capsys.readouterr().out
    assert "time/total_timesteps" in table.read_text()


def test_a_run_needs_no_seed(tmp_path):
    command = ["--total-timesteps", "30", "--seed", "None", "--runs", str(tmp_path)]
    train.main([*TINY, *command, "--name", "run"])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["arguments"]["seed"] is None
