"""The study of gradients: its runs, their scores, and the report."""

import json

import numpy as np
import pytest

from totalprop.scripts.run.arguments import parse
from totalprop.scripts.studies import dreamer
from totalprop.scripts.studies.dreamer import GATES, GRADIENTS, TASKS, Cell

ALL = [
    Cell(task, horizon, gate, gradient)
    for task in TASKS for horizon in (15, 60) for gate in GATES for gradient in GRADIENTS
]  # fmt: skip


@pytest.mark.parametrize("cell", ALL, ids=lambda cell: cell.name(0))
def test_every_cell_is_a_command_of_train_that_says_what_its_name_says(cell):
    job = parse(cell.command(3, ["--learning-starts", "50"]), usage="")
    flags = job.flags()
    assert (job.agent, job.preset, flags["seed"]) == ("dreamer", "recommended", 3)
    assert flags["horizon"] == cell.horizon and flags["learning_starts"] == 50
    assert flags["horizon"] * flags["imagination_starts"] == 256 * 15
    if cell.gradient != "lr, action":
        assert flags["stop_grad_actor_input"] == (cell.gate == "blocked")
    assert flags["estimator"] == cell.gradient.split(",")[0]
    assert flags["node"] == ("action" if cell.gradient == "lr, action" else "latent")
    assert (flags["credit"] == "own") == (cell.gradient == "lr, action")
    assert flags["baseline"] == ("critic" if cell.gradient == "lr, action" else "leave-one-out")


def test_names_are_names_of_folders_and_differ():
    """LR at the action has one run for both gates, which are one to it."""
    names = [cell.name(seed) for cell in ALL for seed in (0, 1)]
    assert len(names) == 2 * len(ALL) and len(set(names)) == 2 * 3 * 2 * (4 * 2 + 1)
    by_name = {cell.name(0): cell.command(0, []) for cell in ALL}
    assert all(by_name[cell.name(0)] == cell.command(0, []) for cell in ALL)
    assert not any(set(name) & set(" ,/") for name in names)


def test_a_score_is_the_last_third_between_random_and_best():
    _, random, best = TASKS["balance"]
    half = (random + best) / 2
    assert dreamer.score("balance", np.array([0.0, 0, 0, 0, half, half])) == pytest.approx(0.5)
    assert dreamer.score("balance", np.array([best])) == 1
    assert dreamer.score("balance", np.full(9, random)) == 0


def test_the_report_covers_what_is_finished(tmp_path, capsys):
    """Two gradients with two seeds on one task, one run of which is not finished."""
    runs, out = tmp_path / "runs", tmp_path / "out"
    _, random, best = TASKS["pendulum"]
    for gradient, seed, level in (("rp", 0, 0.2), ("rp", 1, 0.4), ("tpx", 0, 1.0), ("tpx", 1, 0)):
        folder = runs / Cell("pendulum", 15, "open", gradient).name(seed)
        folder.mkdir(parents=True)
        value = random + level * (best - random)
        record = {"timesteps": [500, 1000], "returns": [[random] * 2, [value - 1, value + 1]]}
        (folder / "evaluations.json").write_text(json.dumps(record))
        job = parse(Cell("pendulum", 15, "open", gradient).command(seed, []), usage="")
        (folder / "config.json").write_text(json.dumps({**json.loads(job.config()), "commit": "a"}))
        if (gradient, seed) != ("tpx", 1):
            (folder / "summary.json").write_text("{}")
    command = ["--out", str(out), "--runs", str(runs), "--seeds", "0", "1", "--report-only"]
    dreamer.main(command)
    rows = json.loads((out / "results.json").read_text())["runs"]
    assert [(row["gradient"], row["seed"], row["score"]) for row in rows] == [
        ("rp", 0, pytest.approx(0.2)), ("rp", 1, pytest.approx(0.4)), ("tpx", 0, pytest.approx(1)),
    ]  # fmt: skip
    table = (out / "table.md").read_text()
    assert "| 15 | open | `rp` | 0.20, 0.40 | 0.30 |  |" in table  # no interval of so few
    assert "| 15 | open | `tpx` | 1.00 | 1.00 |  |" in table
    assert (out / "profiles.png").stat().st_size > 10_000
    # Folders of runs with other flags are not this study's.
    with pytest.raises(SystemExit):
        dreamer.main([*command, "--", "--gamma", "0.9"])
    assert "is a run with gamma=0.98, not 0.9" in capsys.readouterr().err
    # On another machine, where there are no folders, the rows count as finished.
    command[command.index(str(runs))] = str(tmp_path / "elsewhere")
    dreamer.main(command)
    assert json.loads((out / "results.json").read_text())["runs"] == rows
    with pytest.raises(SystemExit, match="1"):
        dreamer.main([*command, "--", "--gamma", "0.9"])
    assert "holds runs with the flags of the defaults" in capsys.readouterr().err
    # Nor are they lost where others are asked for.
    command[command.index("--seeds") + 1 : command.index("--report-only")] = ["7"]
    dreamer.main(command)
    assert json.loads((out / "results.json").read_text())["runs"] == rows


@pytest.mark.parametrize("flag", ["--tasks", "--gates", "--gradients"])
def test_unknown_names_are_refused(flag, capsys):
    with pytest.raises(SystemExit) as error:
        dreamer.main(["--out", "x", "--seeds", "0", flag, "chess"])
    assert error.value.code == 2 and "got chess" in capsys.readouterr().err


def test_the_defaults_of_the_flags_are_all_there_is():
    options = dreamer.parser_of("study dreamer").parse_args(["--out", "x", "--seeds", "0"])
    assert options.tasks == list(TASKS) and options.gates == list(GATES)
    assert options.gradients == list(GRADIENTS)
