"""The commands, end to end with tiny settings, and with wrong input."""

import contextlib
import csv
import dataclasses
import io
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from totalprop.agents import AGENTS, PIPPS
from totalprop.envs.cartpole import CartPoleSwingUpEnv
from totalprop.scripts import evaluate, train
from totalprop.scripts.run import program
from totalprop.scripts.run import report as run_report
from totalprop.scripts.run.errors import UserError
from totalprop.scripts.run.folder import RunFolder
from totalprop.scripts.studies import executors, sweep

TINY = ["pipps", "--total-timesteps", "60", "--gradient-steps", "3", "--n-particles", "20"]
TINY += ["--eval-episodes", "5", "--threads", "1", "--no-progress"]


def run(tmp_path, *extra, name="run"):
    train.main([*TINY, "--runs", str(tmp_path), "--name", name, *extra])
    return tmp_path / name


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that several tests read: its folder, and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        folder = run(tmp_path_factory.mktemp("runs"))
    return SimpleNamespace(folder=folder, output=output.getvalue())


@pytest.fixture
def copied(finished, tmp_path):
    """The same run, to be changed."""
    return shutil.copytree(finished.folder, tmp_path / "run")


def test_a_run_leaves_everything_and_says_so(finished):
    folder, output = finished.folder, finished.output
    names = {path.name for path in folder.iterdir()}
    expected = {"config.json", "model.zip", "progress.csv", "evaluations.json", "summary.json"}
    assert expected | {"learning_curve.png", "rollout.gif"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert "NO SUCCESS: cost" in output and str(folder) in output and "Next:" in output
    assert "progress.csv, TensorBoard.\n" in output and "tensorboard --logdir" in output
    evaluations = json.loads((folder / "evaluations.json").read_text())
    assert evaluations["timesteps"] == [30, 60]
    assert [len(returns) for returns in evaluations["returns"]] == [5, 5]
    assert json.loads((folder / "config.json").read_text())["arguments"]["n_particles"] == 20


def test_a_run_without_tensorboard_does_not_speak_of_it(tmp_path, capsys):
    folder = run(tmp_path, "--no-tensorboard")
    output = capsys.readouterr().out
    assert "progress.csv.\nNext: " in output and f"totalprop plot {folder}" in output
    assert "tensorboard" not in output.replace(str(folder), "").lower()


def test_what_pipps_prints_is_costs_from_beginning_to_end(finished):
    mean = -np.mean(json.loads((finished.folder / "evaluations.json").read_text())["returns"], 1)
    lines = [line for line in finished.output.splitlines() if "real steps" in line]
    assert [float(line.split("cost")[1].split()[0]) for line in lines] == mean.round(2).tolist()
    assert f"NO SUCCESS: cost {mean[-1]:.2f} ±" in finished.output
    assert "return" not in finished.output


def test_the_gif_shows_one_episode(finished):
    from PIL import Image

    with Image.open(finished.folder / "rollout.gif") as gif:
        assert gif.n_frames == 30  # the start, and every step except the last, which has reset
        assert gif.info["duration"] == 100  # ms: 10 Hz


def test_evaluate_loads_the_run(copied, capsys):
    evaluate.main([str(copied), "--episodes", "4"])
    output = capsys.readouterr().out
    assert "over 4 episodes" in output
    assert (copied / "evaluation.gif").stat().st_size > 1000
    evaluate.main([str(copied), "--episodes", "4", "--no-gif"])
    again = capsys.readouterr().out
    assert output.splitlines()[0] == again.splitlines()[0]  # same seed, same returns


def test_the_best_model_is_the_one_that_was_evaluated(finished, tmp_path):
    """It is the last one of a run that ends there."""
    record = json.loads((finished.folder / "evaluations.json").read_text())
    best = int(np.argmax(np.mean(record["returns"], axis=1)))
    ended = run(tmp_path, "--total-timesteps", str(record["timesteps"][best]))
    found, expected = (
        PIPPS.load(path, device="cpu").policy.state_dict()
        for path in (finished.folder / "best_model.zip", ended / "model.zip")
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_the_best_model_is_evaluated_while_the_run_goes_on(copied, capsys):
    for name in ("model.zip", "summary.json"):
        (copied / name).unlink()
    evaluate.main([str(copied), "--best", "--episodes", "2"])
    assert "over 2 episodes" in capsys.readouterr().out
    # That of the last agent is another file.
    assert (copied / "best_evaluation.gif").exists() and not (copied / "evaluation.gif").exists()


@pytest.mark.parametrize(
    ("flags", "missing", "said"),
    [
        ([], ["model.zip", "summary.json"], ["has not finished", "--resume", "or pass --best"]),
        (["--best"], ["best_model.zip", "summary.json"], ["no evaluation yet", "--resume"]),
        (["--best"], ["best_model.zip"], ["was never evaluated", "omit --best"]),
    ],
)
def test_a_missing_model_is_one_sentence(flags, missing, said, copied, capsys):
    for name in missing:
        (copied / name).unlink()
    with pytest.raises(SystemExit):
        evaluate.main([str(copied), *flags, "--no-gif"])
    error = capsys.readouterr().err
    assert all(part in error for part in said) and error.count("\n") == 1


def test_a_missing_model_of_normalised_observations_is_the_same_sentence(copied, capsys):
    config = json.loads((copied / "config.json").read_text())
    config["options"]["normalize"] = "observations"
    (copied / "config.json").write_text(json.dumps(config))
    for name in ("model.zip", "summary.json"):
        (copied / name).unlink()
    with pytest.raises(SystemExit):
        evaluate.main([str(copied), "--no-gif"])
    assert "has not finished" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["missing/a.gif", "a.jpeg2", "file/a.gif"])
def test_evaluate_looks_at_the_picture_s_folder_first(
    path, finished, tmp_path, capsys, monkeypatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(evaluate, "evaluate_agent", None)  # the rollouts would be wasted
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(finished.folder), "--gif", str(tmp_path / path)])
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.startswith("error: ") and error.count("\n") == 1
    assert path in error


def test_the_same_command_twice_gives_the_same_numbers(finished, tmp_path):
    first, second = finished.folder, run(tmp_path)
    assert (first / "evaluations.json").read_bytes() == (second / "evaluations.json").read_bytes()
    other = run(tmp_path, "--seed", "6", name="c")
    assert (first / "evaluations.json").read_bytes() != (other / "evaluations.json").read_bytes()


def test_a_taken_name_is_not_overwritten(copied, tmp_path):
    before = (tmp_path / "run" / "evaluations.json").read_bytes()
    run(tmp_path, "--seed", "9")
    assert (tmp_path / "run" / "evaluations.json").read_bytes() == before
    assert (tmp_path / "run_2" / "model.zip").exists()


def test_preset_sets_what_is_not_given(tmp_path):
    folder = run(tmp_path, "--preset", "pipps2018", "--momentum", "0.5")
    arguments = json.loads((folder / "config.json").read_text())["arguments"]
    assert arguments["optimizer"] == "rmsprop2018" and arguments["leg"] == "biw"
    assert arguments["momentum"] == 0.5 and arguments["gradient_steps"] == 3


def test_help_teaches_every_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        train.main(["pipps", "--help"])
    assert caught.value.code == 0
    output = capsys.readouterr().out
    for word in ("--estimator", "Simulated particles N", "--env-arg", "--preset", "450"):
        assert word in output


WRONG = [
    (["--estimator", "tpxx"], 1, "did you mean 'tpx'"),
    (["--estimator", ""], 1, "unknown estimator"),
    (["--env-id", "totalprop/CartPoleSwingUp"], 2, "did you mean 'totalprop/CartPoleSwingUp-v0'"),
    (["--env-id", "CartPoleSwingup-v0"], 2, "did you mean 'totalprop/CartPoleSwingUp-v0'"),
    (["--env-id", "pendulum-v1"], 2, "did you mean 'Pendulum-v1'"),
    (["--env-id", "walker-walk-v0"], 2, "did you mean 'dm"),
    (["--env-id", "Arm-v0"], 2, "is named with its module, 'arm:Arm-v0'"),
    (["--env-id", "sub/arm.py:Arm-v0"], 2, "'arm:Arm-v0', from the folder of arm.py"),
    (["--env-id", "arm.py:Arm-v0"], 2, "must name a module, and not a file"),
    (["--env-id", "CartPole-v1"], 2, "needs continuous actions (a Box), got one of 2 choices"),
    (["--env-arg", "cost=tipp"], 1, "tip"),
    (["--env-arg", "noise=-1"], 1, "noise"),
    (["--env-arg", "noise"], 2, "NAME=VALUE"),
    (["--env-arg", "nonsense=1"], 1, "nonsense"),
    (["--n-particles", "2"], 1, "--n-particles must be at least 3, a whole number, got 2"),
    (["--horizon", "0"], 1, "horizon must be at least 1"),
    (["--learning-rate", "-1"], 1, "--learning-rate must be at least 0"),
    (["--learning-rate", "nan"], 1, "--learning-rate must be at least 0"),
    (["--total-timesteps", "0"], 1, "--total-timesteps must be at least 1"),
    (["--eval-episodes", "1"], 1, "--eval-episodes must be at least 2"),
    (["--angle-dims", "7"], 1, "--angle-dims must be entries of the observation"),
    (["--policy", "MlpPolicy"], 1, "MlpPolicy"),
    (["--optimizer", "quasi-newton"], 1, "rp-fs"),
    (["--preset", "tpx2024"], 2, "unknown preset 'tpx2024'"),
    (["--optimizer", "sgd"], 2, "sgd"),
    (["--n-particles", "many"], 2, "many"),
    (["--no-such-flag"], 2, "no-such-flag"),
    (["--seed", "-1"], 1, "seed must be at least 0 and below 2^32, got -1"),
    (["--config"], 2, "--config needs a run's folder"),
]


@pytest.mark.parametrize(("flags", "code", "text"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_input_is_one_sentence_and_leaves_nothing(tmp_path, capsys, flags, code, text):
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, *flags)
    captured = capsys.readouterr()
    assert caught.value.code == code
    assert text in captured.err + captured.out
    assert "Traceback" not in captured.err
    assert list(tmp_path.iterdir()) == []


def test_unknown_agent(capsys):
    with pytest.raises(SystemExit) as caught:
        train.main(["dreamerr"])
    assert caught.value.code == 2
    assert "unknown agent 'dreamerr'" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 truncated"])
def test_a_file_that_is_no_model_is_one_sentence(copied, capsys, content):
    (copied / "model.zip").write_bytes(content)
    with pytest.raises(SystemExit) as caught:
        evaluate.main([str(copied)])
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert "cannot load" in error and "Traceback" not in error


def test_evaluate_says_what_is_missing(tmp_path, capsys):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SystemExit):
            evaluate.main([str(path)])
        assert "is not a run folder" in capsys.readouterr().err


def test_an_environment_that_renders_nothing_is_said_to(copied, capsys, monkeypatch):
    monkeypatch.setattr(CartPoleSwingUpEnv, "render", lambda self: None)
    evaluate.main([str(copied), "--episodes", "2"])
    assert "no GIF: the environment rendered no frames" in capsys.readouterr().err


class FatalError(Exception):
    """MuJoCo's; it is no RuntimeError."""


def no_picture(*args, **kwargs):
    raise FatalError("no renderer")


@pytest.mark.parametrize("place", ["render", "learning_curve", "pictures"])
def test_a_missing_picture_does_not_lose_the_run(place, tmp_path, capsys, monkeypatch):
    what = {"learning_curve": "learning curve", "pictures": "picture of the agent"}
    if place == "learning_curve":
        monkeypatch.setattr(run_report.figures, place, no_picture)
    elif place == "pictures":
        entry = dataclasses.replace(AGENTS["pipps"], pictures=no_picture)
        monkeypatch.setattr(run_report, "AGENTS", {"pipps": entry})
    else:
        monkeypatch.setattr(CartPoleSwingUpEnv, "render", no_picture)
    folder = run(tmp_path)
    captured = capsys.readouterr()
    assert f"no {what.get(place, 'GIF')}: no renderer\n" in captured.err
    assert "NO SUCCESS" in captured.out and (folder / "model.zip").exists()
    assert (folder / "summary.json").exists()


def test_evaluate_prints_returns_although_there_is_no_picture(copied, capsys, monkeypatch):
    monkeypatch.setattr(CartPoleSwingUpEnv, "render", no_picture)
    evaluate.main([str(copied), "--episodes", "2"])
    captured = capsys.readouterr()
    assert "over 2 episodes" in captured.out and captured.err == "no GIF: no renderer\n"
    monkeypatch.undo()
    (copied / "evaluation.gif").mkdir()  # cannot be written
    evaluate.main([str(copied), "--episodes", "2"])
    captured = capsys.readouterr()
    assert "over 2 episodes" in captured.out and captured.err.startswith("no GIF: [Errno ")


def test_evaluations_and_pictures_of_an_endless_episode_end(copied, capsys):
    config = json.loads((copied / "config.json").read_text())
    config["env_args"]["max_episode_steps"] = -1  # Gymnasium's word for no time limit
    (copied / "config.json").write_text(json.dumps(config))
    evaluate.main([str(copied), "--episodes", "2", "--max-steps", "50"])
    output = capsys.readouterr().out
    assert "over 2 episodes" in output and "mean length 50 steps" in output
    assert "2 of 2 evaluation episodes had not ended after 50 steps" in output
    assert "(--max-steps)" in output and "GIF of the first 50 steps of an episode" in output


def test_every_evaluation_is_a_row_of_progress(finished):
    folder = finished.folder
    with open(folder / "progress.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["eval/mean_reward"]]
    found = {int(row["time/total_timesteps"]): float(row["eval/mean_reward"]) for row in rows}
    evaluations = json.loads((folder / "evaluations.json").read_text())
    means = [np.mean(returns) for returns in evaluations["returns"]]
    assert list(found) == evaluations["timesteps"] == [30, 60]
    assert list(found.values()) == pytest.approx(means, rel=1e-5)


def test_weights_of_single_nodes_are_rows_of_k_csv_alone(finished):
    with open(finished.folder / "progress.csv", newline="") as file:
        progress = list(csv.DictReader(file))
    with open(finished.folder / "k.csv", newline="") as file:
        weights = list(csv.DictReader(file))
    assert "train/k" in progress[0] and not any(key.startswith("k/") for key in progress[0])
    means = {
        row["time/total_timesteps"]: float(row["train/k"]) for row in progress if row["train/k"]
    }
    assert [row.pop("time/total_timesteps") for row in weights] == list(means)
    for row, mean in zip(weights, means.values()):
        assert {key.split("_")[0] for key in row} == {"k/step", "k/coordinate"}
        steps = [float(value) for key, value in row.items() if key.startswith("k/step")]
        assert np.mean(steps) == pytest.approx(mean, rel=1e-5)


def test_a_column_of_either_table_is_watched(finished, tmp_path):
    for column in ("train/k", "k/step_01"):
        found = sweep._watched(RunFolder(finished.folder), column)
        assert found["timesteps"] == [30, 60] and np.isfinite(found["values"]).all()
    with pytest.raises(UserError, match=r"k.csv has no column 'k/step_1'; close to it: k/step_"):
        sweep._watched(RunFolder(finished.folder), "k/step_1")
    older = tmp_path / "older"  # had all columns in one table
    older.mkdir()
    (older / "progress.csv").write_text("k/step_01,time/total_timesteps\n0.5,30\n")
    assert sweep._watched(RunFolder(older), "k/step_01") == {"timesteps": [30], "values": [0.5]}


def test_what_is_to_be_typed_next_runs_from_here(tmp_path, monkeypatch):
    venv = tmp_path / ".venv" / "bin"
    monkeypatch.setattr(program.sys, "executable", str(venv / "python"))
    monkeypatch.setattr(program.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert program.program("python") == str(venv / "python")
    monkeypatch.chdir(tmp_path)
    assert program.program("tensorboard") == ".venv/bin/tensorboard"
    monkeypatch.setattr(program.shutil, "which", lambda name: str(venv / name))
    assert program.program("python") == "python"


def test_sweep_runs_reports_and_goes_on(tmp_path, monkeypatch, sweep_by_fork):
    command = ["sweep", "pipps", "--estimators", "tpx", "--out", str(tmp_path / "out"), "--jobs"]
    command += ["2", "--runs", str(tmp_path / "runs"), "--seeds", "0"]
    flags = ["--", *TINY[1:7], "--eval-episodes", "5"]
    monkeypatch.setattr("sys.argv", [*command, *flags])
    sweep.main()
    sweep_by_fork()
    monkeypatch.setattr("sys.argv", [*command, "1", "2", *flags])
    sweep.main()
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert {e: sorted(seeds) for e, seeds in results.items()} == {"tpx": ["0", "1", "2"]}
    assert len(results["tpx"]["0"]["costs"]) == 2
    assert (tmp_path / "out" / "table.md").read_text().count("0/3") == 3
    stamp = (tmp_path / "runs" / "tpx_seed0" / "model.zip").stat().st_mtime_ns
    (tmp_path / "runs" / "tpx_seed1" / "summary.json").unlink()  # as if it had been killed
    sweep.main()
    assert (tmp_path / "runs" / "tpx_seed0" / "model.zip").stat().st_mtime_ns == stamp
    assert "Resuming" in (tmp_path / "runs" / "tpx_seed1.log").read_text()
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["results"]["tpx"].keys() == {"0", "1", "2"}
    assert f"--runs {tmp_path / 'runs'}" in found["command"]
    assert (
        found["commit"]
        == json.loads((tmp_path / "runs" / "tpx_seed0" / "config.json").read_text())["commit"]
    )


def test_a_sweep_over_environments(tmp_path, monkeypatch, sweep_by_fork):
    sweep_by_fork()
    name = "totalprop/CartPoleSwingUp-v0"
    command = ["sweep", "pipps", "--vary", "env-id", "--values", name, "--seeds", "0"]
    command += ["--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs"), "--jobs", "1"]
    monkeypatch.setattr("sys.argv", [*command, "--", *TINY[1:7], "--eval-episodes", "5"])
    sweep.main()
    assert sorted(path.name for path in (tmp_path / "runs").glob("*_seed*")) == [
        "totalprop_CartPoleSwingUp-v0_seed0", "totalprop_CartPoleSwingUp-v0_seed0.log"
    ]  # fmt: skip
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert list(results) == [name]


def test_a_sweep_takes_no_runs_of_other_flags(finished, tmp_path, capsys, monkeypatch):
    shutil.copytree(finished.folder, tmp_path / "runs" / "tpx_seed0")
    command = ["sweep", "pipps", "--estimators", "tpx", "--seeds", "0"]
    command += ["--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs"), "--report-only"]
    monkeypatch.setattr("sys.argv", [*command, "--", *TINY[1:]])
    sweep.main()
    for flags, name, found, wanted in (
        (["--horizon", "7"], "horizon", 30, 7),
        (["--env-arg", "noise=4"], "env_args", {}, {"noise": 4}),
        (["--total-timesteps", "90"], "total_timesteps", 60, 90),
    ):
        monkeypatch.setattr("sys.argv", [*command, "--", *TINY[1:], *flags])
        with pytest.raises(SystemExit, match=r"^1$"):
            sweep.main()
        error = capsys.readouterr().err
        assert f"is a run with {name}={found!r}, not {wanted!r}; choose another folder" in error


def test_a_sweep_says_that_a_run_failed(finished, tmp_path, monkeypatch, capsys):
    command = ["sweep", "pipps", "--estimators", "tpx", "--seeds", "0", "1", "--jobs", "1"]
    command += ["--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")]
    shutil.copytree(finished.folder, tmp_path / "runs" / "tpx_seed0")
    monkeypatch.setattr(executors.subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=1))
    monkeypatch.setattr(sweep, "chosen", lambda **_: executors.in_threads)
    monkeypatch.setattr("sys.argv", [*command, "--", *TINY[1:]])
    with pytest.raises(SystemExit, match=r"^error: 1 of the runs failed"):
        sweep.main()
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert results["tpx"].keys() == {"0"}
    monkeypatch.setattr("sys.argv", [*command, "--jobs", "0", "--", *TINY[1:]])
    with pytest.raises(SystemExit):
        sweep.main()
    assert "--jobs must be at least 1, got 0" in capsys.readouterr().err
