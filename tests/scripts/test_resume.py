"""A run that is killed, stopped or extended resumes as if nothing had happened."""

import json
import os
import signal

import pytest
from stable_baselines3.common.logger import Logger

from tests.scripts import forked
from totalprop.agents import AGENTS, PIPPS
from totalprop.scripts import train
from totalprop.scripts.reliability import kill_test
from totalprop.scripts.run.interruption import locked
from totalprop.scripts.run.log import ResumableCSV, make_logger

TINY = ["pipps", "--gradient-steps", "2", "--n-particles", "6", "--gp-evaluations", "3"]
TINY += ["--threads", "1", "--no-progress", "--no-tensorboard", "--eval-episodes", "2"]
TINY += ["--checkpoint-seconds", "0"]


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_checkpoints_and_says_how_to_go_on(number, tmp_path, capsys, monkeypatch):
    quiet = [*TINY, "--total-timesteps", "120", "--runs", str(tmp_path)]
    train.main([*quiet, "--name", "quiet"])
    sent = []

    def send(agent, show_progress, improve=PIPPS._improve_policy):
        improve(agent, show_progress)
        if agent.num_timesteps == 60 and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)

    monkeypatch.setattr(PIPPS, "_improve_policy", send)
    with pytest.raises(SystemExit) as stop:
        train.main([*quiet, "--name", "stopped"])
    assert stop.value.code == 128 + number
    error = capsys.readouterr().err
    assert "stopped after 60 of 120 steps" in error and "--resume" in error
    train.main(["--resume", str(tmp_path / "stopped")])
    assert kill_test.differences("pipps", tmp_path / "quiet", tmp_path / "stopped") == []


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
    event_file_loader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    for first_step, values in ((0, {1: 1.0, 2: 2.0, 3: 3.0}), (3, {3: 30.0, 4: 4.0})):
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
