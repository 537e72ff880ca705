"""The study of success rates: its runs, its resuming, and its statistics by hand."""

import json

import pytest

from totalprop.scripts.commands import PIPPS_METHODS, PIPPS_TASKS
from totalprop.scripts.run.arguments import parse
from totalprop.scripts.studies import pipps_table
from totalprop.scripts.studies.pipps_table import METHODS, PUBLISHED, SCALES, TASKS, Cell

ALL = [
    Cell(*place, method)
    for place in (("angle", 0.01), ("angle", 16.0), ("tip", 1.0), ("unicycle", 1.0))
    for method in METHODS
]


@pytest.mark.parametrize("cell", ALL, ids=lambda cell: cell.name(0))
def test_every_cell_is_a_command_of_train_that_says_what_its_name_says(cell):
    jobs = {
        scale: parse(cell.command(3, SCALES[scale], ["--gp-evaluations", "7"]), usage="")
        for scale in SCALES
    }
    for job in jobs.values():
        flags = job.flags()
        assert flags["seed"] == 3 and flags["gp_evaluations"] == 7
        assert (job.agent == "pilco") == (cell.method == "PILCO")
        assert job.env_args["noise"] == cell.noise
        assert job.env_args.get("cost") == (None if cell.task == "unicycle" else cell.task)
        assert flags["angle_dims"] == ((1,) if cell.task == "tip" else ())
        assert flags["horizon"] == (20 if cell.task == "unicycle" else 30)
        assert flags["random_trials"] == (5 if cell.task == "unicycle" else 1)
        if job.agent == "pipps":
            rule = cell.method.partition("-s")[0].partition("+")[0].lower()
            assert flags["estimator"] == rule and flags["leg"] == "biw"
            assert flags["model_uncertainty"] == (cell.method != "TP-sf")
            assert flags["noise_multiplier"] == (100 if cell.method == "TP+sn" else 1)
    flags = jobs["small"].flags()
    if cell.method != "PILCO":  # App. B.1 of Parmas et al. 2023: RP's best step size, and TP's
        rate = 0.01 if cell.method in ("RP", "GR") else 0.03
        assert (flags["optimizer"], flags["learning_rate"]) == ("adam", rate)
        sizes = (300, 250) if cell.task == "tip" else (100, 100)
        assert (flags["n_particles"], flags["gradient_steps"]) == sizes
    flags = jobs["paper"].flags()
    assert flags["total_timesteps"] == (700 if cell.task == "unicycle" else 450)
    if cell.method != "PILCO":  # Sec. 4.2
        assert (flags["n_particles"], flags["gradient_steps"]) == (300, 600)
        assert (flags["optimizer"], flags["learning_rate"]) == ("rmsprop2018", 5e-4)


def test_names_differ_and_are_names_of_folders():
    names = [cell.name(seed) for cell in ALL for seed in (0, 1)]
    assert len(set(names)) == 2 * len(ALL) and not any(set(name) & set(" /") for name in names)
    assert tuple(METHODS) == PIPPS_METHODS and tuple(TASKS) == PIPPS_TASKS


def test_the_published_numbers_are_those_of_the_tables():
    """A few by hand, and the sums over the rows and columns of Table 2."""
    assert PUBLISHED["angle", 1.0]["TP"] == 0.99 and PUBLISHED["angle", 1.0]["TP-sf"] == 0.93
    assert PUBLISHED["angle", 0.01]["TP+sn"] == 0.96 and PUBLISHED["unicycle", 1.0]["GR"] == 0.96
    rows = {key: sum(list(row.values())[:7]) for key, row in PUBLISHED.items()}
    assert rows == pytest.approx({
        ("angle", 0.01): 4.57, ("angle", 1.0): 5.31, ("angle", 4.0): 4.28, ("angle", 9.0): 3.13,
        ("angle", 16.0): 1.07, ("tip", 0.01): 3.71, ("tip", 1.0): 2.90, ("unicycle", 1.0): 5.10,
    })  # fmt: skip
    columns = {"PILCO": 4.40, "RP": 3.15, "GR": 3.71, "LR": 4.42, "TP": 5.01}
    for method, total in columns.items():
        found = sum(row[method] for (task, _), row in PUBLISHED.items() if task != "unicycle")
        assert found == pytest.approx(total)


SMALL = ["--tasks", "angle", "--noise", "1", "--methods", "PILCO", "TP", "--jobs", "1"]
FLAGS = ["--", "--total-timesteps", "60", "--gradient-steps", "1", "--gp-evaluations", "5"]


def test_a_killed_study_goes_on_where_it_stopped(tmp_path, capsys, sweep_by_fork):
    sweep_by_fork()
    out, runs = tmp_path / "out", tmp_path / "runs"
    command = ["--out", str(out), "--runs", str(runs), *SMALL]
    pipps_table.main([*command, "--seeds", "0", *FLAGS])
    rows = json.loads((out / "results.json").read_text())["runs"]
    assert [(row["method"], row["seed"], len(row["costs"])) for row in rows] == [
        ("PILCO", 0, 2), ("TP", 0, 2),
    ]  # fmt: skip
    assert all(20 < cost <= 30 for row in rows for cost in row["costs"])
    table = (out / "table.md").read_text()
    assert "| angle | 1 | TP | 0/1 | 0.00 | 0.00 to 0.79 | 0.99 | 0.95 to 1.00 |" in table
    assert table in capsys.readouterr().out
    assert (out / "success.png").stat().st_size > 10_000
    # Another seed: the runs that are there are not trained again.
    before = {path: path.stat().st_mtime_ns for path in runs.glob("*/summary.json")}
    pipps_table.main([*command, "--seeds", "0", "1", *FLAGS])
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert len(json.loads((out / "results.json").read_text())["runs"]) == 4
    # On another machine, results.json is enough.
    command[command.index(str(runs))] = str(tmp_path / "elsewhere")
    pipps_table.main([*command, "--seeds", "0", "1", *FLAGS])
    assert not (tmp_path / "elsewhere").exists()
    pipps_table.main([*command, "--seeds", "7", "--report-only", *FLAGS])
    assert len(json.loads((out / "results.json").read_text())["runs"]) == 4
    assert "4 of 6 runs" in (out / "table.md").read_text()
    # Other flags are other runs.
    command[command.index(str(tmp_path / "elsewhere"))] = str(runs)
    with pytest.raises(SystemExit, match="1"):
        pipps_table.main([*command, "--seeds", "0", *FLAGS, "--max-points", "40"])
    assert "is a run with max_points=0, not 40" in capsys.readouterr().err


def finals():
    return {
        Cell("angle", 1.0, "TP"): [7.0, 8.0, 9.0, 14.0, 16.0],
        Cell("angle", 1.0, "TPX"): [7.0] * 5,
        Cell("unicycle", 1.0, "RP"): [5.0, 9.0, 12.0],
    }


def test_the_table_counts_by_each_tasks_threshold():
    lines = pipps_table.table(finals(), ["--scale", "small"], ["abc"], 15).splitlines()
    assert "`totalprop study pipps-table --scale small`, commit abc; 13 of 15 runs" in lines[2]
    assert lines[-3:] == [
        "| angle | 1 | TP | 4/5 | 0.80 | 0.38 to 0.96 | 0.99 | 0.95 to 1.00 | 9.0 | 3/5, 5/5 |",
        "| angle | 1 | TPX | 5/5 | 1.00 | 0.57 to 1.00 |  |  | 7.0 | 5/5, 5/5 |",
        "| unicycle | 1 | RP | 2/3 | 0.67 | 0.21 to 0.94 | 0.80 | 0.71 to 0.87 | 9.0 | 1/3, 3/3 |",
    ]


def test_scales_set_the_defaults_and_flags_override_them():
    small, paper = (pipps_table.parse(["--scale", scale]) for scale in SCALES)
    assert len(small.cells) * len(small.options.seeds) == 2 * 2 * 7 * 5
    assert len(paper.cells) == (2 * 5 + 1) * len(METHODS)
    own = pipps_table.parse(["--tasks", "unicycle", "tip", "--noise", "4", "--methods", "RP"])
    assert own.cells == [Cell("unicycle", 1.0, "RP"), Cell("tip", 4.0, "RP")]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "PPO"], "invalid choice: 'PPO'"),
        (["--tasks", "chess"], "invalid choice: 'chess'"),
        (["--noise", "-1"], "--noise must be at least 0, got -1"),
        (["--seeds", "-1"], "--seeds must be at least 0 and below 2^32, got -1"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
    ],
)
def test_wrong_flags_are_refused(flags, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as left:
        pipps_table.main(["--out", str(tmp_path), *flags])
    assert left.value.code == 2 and message in capsys.readouterr().err
