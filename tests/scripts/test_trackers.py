"""`--track`: what Weights & Biases, MLflow and Trackio get, also of runs that are killed.

The libraries are the real ones, which write to this machine's disk.
"""

import csv
import dataclasses
import importlib.util
import json
import math
import multiprocessing
import os
import shlex
import signal
import time

import numpy as np
import pytest
from matplotlib.figure import Figure as MatplotlibFigure
from stable_baselines3.common.logger import Figure, Logger

from tests.scripts.tracked_runs import PROJECT, read
from totalprop.agents.core.metrics import PICTURE, QUIET
from totalprop.agents.persistence import checkpoint, safe_file
from totalprop.scripts import train
from totalprop.scripts.reliability import kill_test
from totalprop.scripts.run import report, trackers
from totalprop.scripts.run.arguments import parse
from totalprop.scripts.run.errors import UserError
from totalprop.scripts.run.folder import RunFolder

TINY = ["daappo", "--env-id", "Pendulum-v1", "--n-steps", "32", "--batch-size", "32"]
TINY += ["--eval-episodes", "2", "--eval-max-steps", "20", "--threads", "1", "--no-progress"]
TINY += ["--no-tensorboard", "--checkpoint-seconds", "0", "--total-timesteps", "128"]
REASONS = {
    "wandb": "not installed (the extra `wandb`)",
    "mlflow": "not installed (the extra `mlflow`)",
    "trackio": "not installed: it needs pillow below 13, which constraints.txt does not have",
}
TRACKERS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            any(importlib.util.find_spec(module) is None for module in trackers.NEEDED[name]),
            reason=reason,
        ),
    )
    for name, reason in REASONS.items()
]


@pytest.fixture(scope="module", autouse=True)
def _on_this_machine(tmp_path_factory):
    """Trackio reads its folder once, when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setattr(report, "record_gif", lambda *_, **__: None)
        yield


def _killed(arguments, at):
    """In a process of its own: train, and die a second after the row of step `at` was sent."""
    checkpoint.MAX_TIME_FRACTION = math.inf  # a checkpoint before each rollout
    report.record_gif = lambda *_, **__: None
    write = trackers.Tracker.write

    def write_and_die(self, values, excluded, step):
        write(self, values, excluded, step)
        if step == at:
            time.sleep(1.0)  # Trackio writes every half second
            os.kill(os.getpid(), signal.SIGKILL)

    trackers.Tracker.write = write_and_die
    train.main(arguments)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The folder of all runs: MLflow takes seconds to make a database."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module", params=TRACKERS)
def killed(request, root):
    """(tracker, folder) of a run that was killed after a row, resumed, and that has finished."""
    name = f"killed_{request.param}"
    command = [*TINY, "--track", request.param, "--track-project", PROJECT, "--runs", str(root)]
    process = multiprocessing.get_context("forkserver").Process(
        target=_killed, args=([*command, "--name", name], 96)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    train.main(["--resume", str(root / name)])
    return request.param, root / name


def table(folder):
    """Column -> (step, value) of each row of progress.csv."""
    found = {}
    with open(folder / "progress.csv", newline="") as file:
        for row in csv.DictReader(file):
            for key, value in row.items():
                if value:
                    pair = (int(row["time/total_timesteps"]), float(value))
                    found.setdefault(key, []).append(pair)
    return found


@pytest.mark.slow
def test_a_killed_run_goes_on_as_one_run_with_every_row(killed):
    tracker, folder = killed
    (stored,) = read(tracker, folder)
    assert (stored.name, stored.status) == (folder.name, "finished")
    expected = table(folder)
    assert expected.keys() == stored.scalars.keys()
    assert {step for step, _ in expected["train/loss"]} >= {64, 96, 128}
    for key, pairs in expected.items():
        found = stored.scalars[key]
        if key.startswith("time/"):  # of the process that sent the row
            found, pairs = ([(step, 0) for step, _ in rows] for rows in (found, pairs))
        found, pairs = (  # single precision, of which progress.csv has all digits
            sorted((step, np.float32(value)) for step, value in rows) for rows in (found, pairs)
        )
        if tracker == "mlflow":
            assert found == pairs, key
        else:  # may have rows twice, which were on their way
            assert set(found) == set(pairs), key
            assert all(found.count(row) <= 2 * pairs.count(row) for row in found), key


@pytest.mark.slow
def test_a_tracker_has_all_settings_and_the_command(killed):
    tracker, folder = killed
    (stored,) = read(tracker, folder)
    config = json.loads((folder / "config.json").read_text())
    expected = {
        name: config[name] for name in ("agent", "preset", "env_id", "commit")
    } | config["arguments"] | {
        name: config["options"][name] for name in ("total_timesteps", "eval_episodes", "threads")
    }  # fmt: skip
    words = shlex.split(stored.config["command"])
    assert words[:3] == ["totalprop", "train", "daappo"] and "--n-steps" in words
    for name, value in expected.items():
        if tracker == "mlflow":
            assert stored.config[name] == str(value), name
        else:
            assert stored.config[name] == value, name


@pytest.mark.slow
def test_a_finished_run_has_its_learning_curve(killed):
    tracker, folder = killed
    (stored,) = read(tracker, folder)
    assert "learning_curve" in stored.pictures


@pytest.mark.slow
def test_tracking_changes_no_bit(killed, tmp_path):
    train.main([*TINY, "--runs", str(tmp_path), "--name", "run"])
    found = kill_test.differences("daappo", tmp_path / "run", killed[1])
    found = [place for place in found if "tensorboard_log" not in place]  # where pictures are drawn
    assert found == ["/checkpoint/also/tracker is in one only"]


@pytest.fixture
def job():
    def make(tracker):
        return parse([*TINY, "--track", tracker, "--track-project", PROJECT], "")

    return make


@pytest.fixture
def folder_of(root):
    return lambda job: RunFolder.create(root, "run", job.config())


def log(tracker, step, **values):
    logger = Logger(None, [tracker])
    for name, (value, excluded) in values.items():
        logger.record(name.replace("__", "/"), value, excluded)
    logger.dump(step)


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_gets_what_any_format_gets(name, job, folder_of):
    folder = folder_of(job(name))
    figure = Figure(MatplotlibFigure(figsize=(2, 2)), close=True)
    with trackers.start(job(name), folder, "totalprop train daappo") as tracker:
        log(
            tracker, 30, train__k=(0.5, None), k__step_01=(0.25, QUIET), z__step_01=(2, PICTURE),
            time__total_timesteps=(30, "tensorboard"), train__x=(math.nan, None),
            figures__k=(figure, PICTURE),
        )  # fmt: skip
    (stored,) = read(name, folder.path)
    assert math.isnan(stored.scalars.pop("train/x")[0][1])
    assert stored.scalars == {
        "train/k": [(30, 0.5)],
        "k/step_01": [(30, 0.25)],
        "z/step_01": [(30, 2)],
        "time/total_timesteps": [(30, 30)],
    }
    assert stored.pictures == {"figures/k": [30]}


@pytest.mark.parametrize("name", TRACKERS)
@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError, "failed"), (SystemExit, "interrupted"), (KeyboardInterrupt, "interrupted")],
)
def test_a_tracker_is_told_how_a_run_ended_and_a_resumed_one_finishes(
    name, error, status, job, folder_of
):
    folder = folder_of(job(name))
    tracker = trackers.start(job(name), folder, "")
    log(tracker, 1, x=(1.0, None))
    tracker.__exit__(error, error(), None)
    assert [stored.status for stored in read(name, folder.path)] == [status]
    if status == "interrupted":
        return
    longer = dataclasses.replace(
        job(name), options=dataclasses.replace(job(name).options, total_timesteps=999)
    )  # MLflow would not have total_timesteps changed
    with trackers.resume(longer, folder, "") as tracker:
        log(tracker, 1, x=(1.0, None))
        log(tracker, 2, x=(2.0, None))
    (stored,) = read(name, folder.path)
    assert (stored.status, stored.scalars) == ("finished", {"x": [(1, 1.0), (2, 2.0)]})


@pytest.mark.parametrize("name", TRACKERS)
def test_a_failing_tracker_is_one_sentence_and_gets_its_rows_later(
    name, job, folder_of, capsys, monkeypatch
):
    folder = folder_of(job(name))
    backend, sent = trackers.BACKENDS[name], []

    def fail(self, row, send=backend.log):
        sent.append(row.step)
        if len(sent) in (2, 3):
            raise ConnectionError("no route to host")
        send(self, row)

    monkeypatch.setattr(backend, "log", fail)
    with trackers.start(job(name), folder, "") as tracker:
        for step in (1, 2, 3):  # the third row waits, too
            log(tracker, step, x=(float(step), None))
        assert sent == [1, 2]
        monkeypatch.setattr(trackers.time, "monotonic", lambda now=time.monotonic: now() + 1e3)
        for step in (4, 5):
            log(tracker, step, x=(float(step), None))
    (stored,) = read(name, folder.path)
    assert stored.scalars == {"x": [(step, float(step)) for step in (1, 2, 3, 4, 5)]}
    error = capsys.readouterr().err
    assert error.count("failed (no route to host): training continues") == 1


def test_a_run_ends_well_whatever_its_tracker_does(tmp_path, capsys, monkeypatch):
    class Broken:
        id, delay = "broken", 0.0

        def __init__(self, run):
            pass

        def log(self, row):
            raise ConnectionError("no route to host")

        def end(self, status, files):
            raise ConnectionError("no route to host")

    monkeypatch.setitem(trackers.BACKENDS, "mlflow", Broken)
    monkeypatch.setitem(trackers.NEEDED, "mlflow", ())
    train.main([*TINY, "--track", "mlflow", "--runs", str(tmp_path), "--name", "run"])
    error = capsys.readouterr().err
    assert error.count("no route to host") == 1
    assert "--track mlflow failed (no route to host): training continues" in error
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_tracker_that_cannot_be_opened_is_one_sentence_and_leaves_nothing(
    tmp_path, capsys, monkeypatch
):
    command = [*TINY, "--track", "wandb", "--runs", str(tmp_path), "--name", "run"]
    for needed, words in (
        (
            ("no_such_library",),
            "--track wandb needs no_such_library: pip install 'totalprop[wandb]'",
        ),
        ((), "--track wandb failed: no key"),
    ):
        monkeypatch.setitem(trackers.NEEDED, "wandb", needed)

        def refuse(run):
            raise RuntimeError("no\nkey")

        monkeypatch.setitem(trackers.BACKENDS, "wandb", refuse)
        with pytest.raises(SystemExit) as stop:
            train.main(command)
        error = capsys.readouterr().err
        assert stop.value.code == 1 and error == f"error: {words}\n"
        assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_does_not_need_its_tracker(job, folder_of, capsys, monkeypatch):
    folder = folder_of(job("wandb"))
    (folder.path / "tracker.json").write_text('{"id": "a", "command": "", "step": 5, "number": 1}')
    monkeypatch.setitem(trackers.NEEDED, "wandb", ("no_such_library",))
    with trackers.resume(job("wandb"), folder, "") as tracker:
        log(tracker, 6, x=(1.0, None))
    error = capsys.readouterr().err
    assert error.count("needs no_such_library") == 1 and "training continues" in error


@pytest.mark.parametrize(
    "text",
    ['{"id": "../a", "step": 1, "number": 1}', '{"id": "a", "step": "1", "number": 1}', "{}"],
)
def test_a_damaged_record_is_one_sentence(text, job, folder_of):
    folder = folder_of(job("wandb"))
    (folder.path / "tracker.json").write_text(text)
    with pytest.raises(UserError, match=r"tracker.json does not hold .*; delete it to track"):
        trackers.resume(job("wandb"), folder, "")


def test_settings_of_another_run_start_no_tracking(job, folder_of):
    folder = folder_of(job("wandb"))
    assert parse(["--config", str(folder.path)], "").options.track == "none"
    assert parse(["--config", str(folder.path), "--track", "mlflow"], "").options.track == "mlflow"


def test_rows_of_one_step_are_told_apart(job, folder_of, monkeypatch):
    """An evaluation and a rollout log at the same step; the process dies between the two."""
    sent = []

    class Memory:
        id, delay = "memory", 0.0

        def __init__(self, run):
            pass

        def log(self, row):
            sent.append((row.step, *row.scalars))

        def end(self, status, files):
            pass

    monkeypatch.setitem(trackers.BACKENDS, "wandb", Memory)
    monkeypatch.setitem(trackers.NEEDED, "wandb", ())
    folder = folder_of(job("wandb"))
    first = trackers.start(job("wandb"), folder, "")
    log(first, 10, a=(1, None))
    state = first.state_dict()
    log(first, 10, b=(1, None))
    second = trackers.resume(job("wandb"), folder, "")
    second.load_state_dict(state)
    log(second, 10, b=(1, None))  # was sent
    log(second, 10, c=(1, None))
    log(second, 20, a=(1, None))
    assert sent == [(10, "a"), (10, "b"), (10, "c"), (20, "a")]


def test_rows_that_were_on_their_way_are_sent_again(job, folder_of, monkeypatch, capsys):
    """Of the process that is killed, the library had lost the second row, and could not send."""
    sent, fails = [], []

    class Late:
        id, delay = "late", 30.0

        def __init__(self, run):
            pass

        def log(self, row):
            if fails:
                raise ConnectionError
            sent.append((row.step, row.scalars["a"]))

    monkeypatch.setitem(trackers.BACKENDS, "wandb", Late)
    monkeypatch.setitem(trackers.NEEDED, "wandb", ())
    folder = folder_of(job("wandb"))
    first = trackers.start(job("wandb"), folder, "")
    log(first, 10, a=(1.0, None))
    with monkeypatch.context() as patch:
        patch.setattr(trackers.time, "monotonic", lambda now=time.monotonic: now() + 40)
        log(first, 20, a=(math.nan, None))
    record = json.loads((folder.path / "tracker.json").read_text())
    assert (record["step"], record["number"]) == (10, 1)
    fails.append(True)
    log(first, 30, a=(3.0, None))
    state = first.state_dict()
    log(first, 40, a=(4.0, None))
    assert [step for step, _ in sent] == [10, 20]
    fails.clear()
    safe_file.write(folder.path / "state.zip", "state", state)  # as checkpoints do
    second = trackers.resume(job("wandb"), folder, "")
    second.load_state_dict(safe_file.read(folder.path / "state.zip", "state"))
    log(second, 40, a=(4.0, None))
    assert [step for step, _ in sent[2:]] == [20, 30, 40]
    assert math.isnan(sent[2][1]) and [value for _, value in sent[3:]] == [3.0, 4.0]
    assert "failed (ConnectionError)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_tracks_its_runs(root, tmp_path, sweep_by_fork, monkeypatch):
    pytest.importorskip("mlflow", reason=REASONS["mlflow"])
    sweep_by_fork()
    out, runs = str(tmp_path / "out"), str(root)
    flags = [word for word in TINY[1:] if word not in ("--no-tensorboard", "--no-progress")]
    command = ["sweep", "daappo", "--vary", "gamma", "--values", "0.9", "--seeds", "0", "1"]
    command += ["--out", out, "--runs", runs, "--jobs", "2", "--", *flags]
    monkeypatch.setattr("sys.argv", [*command, "--track", "mlflow", "--track-project", PROJECT])
    from totalprop.scripts.studies import sweep

    sweep.main()
    for name in ("0.9_seed0", "0.9_seed1"):
        (stored,) = read("mlflow", root / name)
        assert stored.status == "finished" and stored.config["gamma"] == "0.9"
