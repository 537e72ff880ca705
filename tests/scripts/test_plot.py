"""Any runs in one picture: what is read, how lines are labelled, and what is drawn."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from totalprop import estimators
from totalprop.scripts.run import arguments
from totalprop.scripts.run.errors import UserError
from totalprop.scripts.studies import plot, styles
from totalprop.scripts.studies.learning_curves import (
    Curve,
    draw,
    draw_success,
    figure_of,
    profile_figure,
    together,
)
from totalprop.scripts.studies.styles import styles_of

STEPS = [100, 200, 300]


def run_folder(path, *flags, agent="dreamer", levels=(1.0, 2.0, 3.0)):
    """A folder as `totalprop train` leaves it, with two episodes per evaluation."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(arguments.parse([agent, *flags], usage="").config())
    record = {"timesteps": STEPS[: len(levels)], "returns": [[x - 1, x + 1] for x in levels]}
    (path / "evaluations.json").write_text(json.dumps(record))
    return path


SWEEP = "totalprop sweep dreamer --estimators rp tpx --seeds 0 --out x -- --env-id Pendulum-v1"


def sweep_file(path, results, command=SWEEP):
    path.mkdir(parents=True)
    record = {"command": command, "commit": "abc", "results": results}
    (path / "results.json").write_text(json.dumps(record))
    return path


def entries(*levels):
    return {
        str(i): {"timesteps": STEPS, "returns": [x, x + 1, x + 2]} for i, x in enumerate(levels)
    }


def curve(values=(1.0, 2.0, 3.0), label="a", seed="0", times=STEPS, task="T", **changes):
    times, values = np.array(times), np.array(values, dtype=float)
    changes = {"quantity": "return", "action_repeat": 1, **changes}
    return Curve(label, task, seed, times=times, values=values, **changes)


def lines_of(paths, **options):
    curves, legend, hidden = plot.labelled(plot.read(paths), **options)
    return list(dict.fromkeys(c.label for c in curves)), legend, hidden


# ---------------------------------------------------------------------------- reading


def test_a_run_folder_holds_the_means_of_its_evaluations(tmp_path):
    suite = ["--env-id", "dm_control/walker-walk-v0", "--env-arg", "action_repeat=4"]
    path = run_folder(tmp_path / "a", *suite, "--seed", "7", levels=(5.0, 6.0))
    [(found, settings, _)] = plot.read([path])
    assert (found.task, found.seed, found.action_repeat) == ("dmc/walker-walk-v0", "7", 4)
    assert found.values.tolist() == [5, 6] and found.x("frames").tolist() == [400, 800]
    assert settings["agent"] == "dreamer" and "seed" not in settings
    other = run_folder(tmp_path / "b", "--env-id", "dmc/walker-walk-v0")
    assert plot.read([other])[0].curve.action_repeat == 2  # the suite's default


def test_costs_count_trials_and_success_is_the_environments(tmp_path):
    found = plot.read([run_folder(tmp_path / "a", agent="pipps", levels=(-20.0, -9.0))])[0].curve
    assert (found.quantity, found.threshold) == ("cost", 15)
    assert found.times.tolist() == [1, 2] and found.values.tolist() == [20, 9]
    assert plot.read([tmp_path / "a"], threshold=8.0)[0].curve.threshold == 8


def test_sweeps_peers_and_studies_are_read(tmp_path):
    sweep = sweep_file(tmp_path / "sweep", {"rp": entries(0, 1), "tpx": entries(2, 3)})
    peer, study = tmp_path / "peer.json", tmp_path / "study"
    settings = {"env_id": "Pendulum-v1", "env_args": {}, "total_timesteps": 300}
    peer.write_text(json.dumps({"settings": settings, "results": {"sac": entries(4)}}))
    study.mkdir()
    rows = [
        {"task": "tip", "noise": k, "method": "TP", "seed": 0, "costs": [20, 9]} for k in (1, 16)
    ]
    (study / "results.json").write_text(json.dumps({"flags": [], "runs": rows}))
    assert [run.curve.values[0] for run in plot.read([sweep])] == [0, 1, 2, 3]
    assert {run.curve.task for run in plot.read([sweep, peer])} == {"Pendulum-v1"}
    assert lines_of([sweep, peer]) == (
        ["dreamer, rp", "dreamer, tpx", "sac"], "agent, estimator", []
    )  # fmt: skip
    assert lines_of([study]) == (["1", "16"], "noise", [])
    assert plot.read([study])[0].curve.action_repeat is None


def test_a_folder_is_searched_one_level_down_for_runs_and_sweeps(tmp_path):
    for seed in ("0", "1"):
        run_folder(tmp_path / "runs" / f"r{seed}", "--seed", seed)
    sweep_file(tmp_path / "all" / "a", {"rp": entries(0)})
    sweep_file(tmp_path / "all" / "b", {"rp": entries(0)})
    assert len(plot.read([tmp_path / "runs"])) == 2
    assert lines_of([tmp_path / "all"]) == (["a", "b"], "source", [])


def test_an_unfinished_run_is_drawn_and_one_without_evaluations_left_out(tmp_path, capsys):
    a, b = run_folder(tmp_path / "a"), run_folder(tmp_path / "b")
    (b / "evaluations.json").unlink()
    assert len(plot.read([a, b])) == 1
    assert "b has not been evaluated yet and is left out" in capsys.readouterr().err
    with pytest.raises(UserError, match="none of the runs has been evaluated yet"):
        plot.read([b])


@pytest.mark.parametrize(
    "text",
    [
        '{"rows": []}',
        '{"results": {"rp": {"5": {"esnr": 1.0}}}}',
        '{"command": "totalprop sweep", "results": []}',
        '{"command": "totalprop bench", "results": {"rp": {}}}',
        '{"runs": [{"seed": 0}]}',
        '{"runs": [{"timesteps": [1, 2], "returns": [1]}]}',
        '{"runs": [{"timesteps": [2, 1], "returns": [1, 2]}]}',
        '{"runs": [{"timesteps": [1], "returns": ["x"]}]}',
        '{"runs": [3]}',
    ],
)
def test_a_file_without_curves_is_one_sentence(text, tmp_path, capsys):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(SystemExit, match="1"):
        plot.main([str(path), "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert f"{path} holds no learning curves" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_command_that_is_not_known_any_more_is_one_sentence(tmp_path):
    sweep_file(tmp_path / "a", {"rp": entries(0)}, SWEEP.replace("dreamer", "x"))
    with pytest.raises(UserError, match=r"this version does not know: unknown agent 'x'"):
        plot.read([tmp_path / "a"])


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_a_path_without_runs_is_one_sentence(name, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"{name} holds no learning curves: pass folders of"):
        plot.read([tmp_path / name])


# ---------------------------------------------------------------------------- labels


def test_labels_are_what_differs_and_seeds_share_a_line(tmp_path):
    paths = [
        run_folder(tmp_path / f"{name}{seed}", "--estimator", name, "--seed", seed)
        for name in ("rp", "tpx") for seed in ("0", "1")
    ]  # fmt: skip
    assert lines_of(paths) == (["rp", "tpx"], "estimator", [])
    assert lines_of(paths[:2]) == (["rp"], "estimator", [])
    paths.append(run_folder(tmp_path / "h", "--estimator", "tpx", "--horizon", "7"))
    labels, legend, _ = lines_of(paths)
    assert legend == "estimator, horizon" and labels[-1] == "tpx, 7" and len(labels) == 3


def test_what_the_labels_leave_out_is_said(tmp_path):
    paths = [
        run_folder(tmp_path / "a", "--estimator", "rp", "--horizon", "7"),
        run_folder(tmp_path / "b", "--estimator", "tpx", "--horizon", "8"),
    ]
    assert lines_of(paths) == (["rp", "tpx"], "estimator", ["horizon"])


def test_what_differs_between_tasks_alone_is_no_label(tmp_path):
    paths = [
        run_folder(tmp_path / name, "--env-id", f"dmc/{name}-v0", "--env-arg", f"action_repeat={n}")
        for name, n in (("walker-walk", 2), ("cartpole-swingup", 4))
    ]
    assert lines_of(paths)[0] == ["tpx"]


def test_a_sweep_is_labelled_by_its_flag_whatever_that_is(tmp_path):
    command = "totalprop sweep daappo --vary total-timesteps --values 100 200 --seeds 0 --out x"
    path = sweep_file(tmp_path / "a", {"100": entries(0), "200": entries(0)}, command)
    assert lines_of([path]) == (["100", "200"], "total-timesteps", [])


def test_own_labels_are_one_per_line(tmp_path, capsys):
    path = sweep_file(tmp_path / "a", {"rp": entries(0), "tpx": entries(1)})
    assert lines_of([path], names=["RP", "ours"])[0] == ["RP", "ours"]
    with pytest.raises(SystemExit, match="2"):
        plot.main([str(path), "--labels", "RP", "--out", str(tmp_path / "out")])
    assert "--labels has 1 names for 2 lines" in (error := capsys.readouterr().err)
    assert "in this order: rp; tpx" in error


def test_success_is_what_a_run_recorded_where_its_environment_is_not_registered(tmp_path):
    flags = ["--env-id", "my_module:Own-v0"]
    path = run_folder(tmp_path / "a", *flags, agent="pipps", levels=(-30.0, -12.0))
    assert plot.read([path])[0].curve.threshold is None
    (path / "summary.json").write_text('{"success_threshold": 20.0}')
    assert plot.read([path])[0].curve.threshold == 20
    assert plot.read([path], threshold=10.0)[0].curve.threshold == 10
    entry = {"timesteps": STEPS, "costs": [30, 20, 9], "success_threshold": 20.0}
    command = SWEEP.replace("dreamer", "pipps").replace("Pendulum-v1", "my_module:Own-v0")
    sweep = sweep_file(tmp_path / "sweep", {"rp": {"0": entry}}, command)
    assert plot.read([sweep])[0].curve.threshold == 20


def test_the_same_run_twice_is_refused(tmp_path):
    paths = [run_folder(tmp_path / name) for name in ("a", "b")]
    found = plot.read(paths)
    with pytest.raises(UserError, match=r"seed 0 of 'tpx' in .* is there twice") as refused:
        plot.labelled(found)
    assert all(str(path) in str(refused.value) for path in paths)


# ---------------------------------------------------------------------------- pictures


def test_an_estimator_looks_the_same_in_every_picture_and_like_no_other():
    names = [name for name in estimators.names() if name in styles.ESTIMATORS]
    assert {"rp", "lr", "tp", "tps", "tpx", "tpg", "safe", "aobg", "ddcg", "ivw-h"} <= {*names}
    looks = styles_of(names)
    assert len({tuple(look.values()) for look in looks.values()}) == len(names)
    assert styles_of(["TPX", "tpx, 3"])["TPX"] == looks["tpx"] == styles_of(["tpx"])["tpx"]
    assert styles_of(["tpx+biw"])["tpx+biw"] == {**looks["tpx"], "ls": "--"}
    mixed = styles_of(["tpx", *"abcdefgh"])  # others take no estimator's colour
    assert all(mixed[name]["color"] != mixed["tpx"]["color"] for name in "abcdefgh")
    assert len({tuple(look.values()) for look in mixed.values()}) == 9


@pytest.mark.parametrize(("seeds", "bands"), [(1, 0), (3, 0), (4, 1), (6, 1)])
def test_each_seed_is_a_line_and_only_four_have_an_interval(seeds, bands):
    axis = Figure().subplots()
    curves = [curve((i, i + 1, i**2), seed=str(i)) for i in range(seeds)]
    draw(axis, curves, styles_of(["a"]))
    assert len(axis.lines) == seeds + 1 and len(axis.collections) == bands
    middle = axis.lines[-1].get_ydata()
    kept = range(seeds // 4, seeds - seeds // 4)
    np.testing.assert_allclose(middle, [np.mean([f(i) for i in kept]) for f in (
        lambda i: i, lambda i: i + 1, lambda i: i**2
    )])  # fmt: skip


def test_the_thick_line_is_only_where_all_seeds_are():
    early, late = curve((0, 2, 4)), curve((6, 6), times=[150, 250], seed="1")
    x, values = together([early, late])
    assert x.tolist() == [150, 200, 250] and values.tolist() == [[1, 2, 3], [6, 6, 6]]
    axis = Figure().subplots()
    draw(axis, [curve(times=[1, 2, 3]), curve(seed="1")], styles_of(["a"]))
    assert len(axis.lines) == 2  # two seeds that never meet have no mean


@pytest.mark.parametrize(
    ("repeats", "unit", "above"),
    [((4, 4), "decisions", 1), ((4, 2), "decisions", 0), ((1, 1), "decisions", 0),
     ((None, None), "decisions", 0), ((4, 4), "frames", 0)],
)  # fmt: skip
def test_frames_are_above_the_decisions_if_they_are_known_and_one_scale(repeats, unit, above):
    axis = Figure().subplots()
    curves = [curve(seed=str(i), action_repeat=r) for i, r in enumerate(repeats)]
    draw(axis, curves, styles_of(["a"]), unit)
    assert len(axis.child_axes) == above and axis.get_xlabel() == unit
    assert axis.lines[0].get_xdata()[-1] == (1200 if unit == "frames" else 300)


def test_success_is_counted_by_trial_with_wilsons_interval():
    trials = {"times": [1, 2], "quantity": "cost", "threshold": 15.0}
    curves = [curve((20, 9), **trials), curve((20, 16), seed="1", **trials)]
    axis = Figure().subplots()
    draw_success(axis, curves, styles_of(["a"]))
    assert axis.lines[0].get_ydata().tolist() == [0, 0.5]
    _, at_the_end = axis.collections[0].get_segments()
    np.testing.assert_allclose(at_the_end[:, 1], [0.0945, 0.9055], atol=1e-4)


def test_a_picture_has_a_panel_per_task_and_one_for_success():
    trials = {"times": [1, 2, 3], "quantity": "cost", "threshold": 15.0}
    curves = [curve(), curve(task="U", label="b"), curve(task="V", **trials)]
    figure = figure_of(curves, "estimator", further=[lambda axis: axis.set_title("more")])
    shown = [axis.get_title() for axis in figure.axes if axis.get_visible()]
    assert shown == ["T", "U", "V", "V: success", "more"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a (1)", "b (1)"]
    assert legend.get_title().get_text() == "estimator (seeds)"


def test_profiles_have_bands_where_each_task_has_several_runs():
    tasks = [np.array([0.1, 0.5]), np.array([0.5, 0.7])]
    figure = profile_figure({"a": tasks, "b": [own[:1] for own in tasks]}, "estimator")
    wide, *narrow = figure.axes
    assert len(wide.lines) == 2 and len(wide.collections) == 1
    assert [axis.get_title() for axis in narrow] == list(plot.AGGREGATES)
    assert all(len(axis.lines) == 2 and len(axis.patches) == 1 for axis in narrow)


def test_scores_are_of_the_tasks_that_all_lines_have():
    curves = [
        curve((0, 250), times=[1, 2], task="dmc/x"),
        curve((0, 750, 0), task="dmc/x", label="b", times=[1, 2, 3]),
        curve((0, 500), times=[1, 2], task="dmc/y"),
    ]
    lines, tasks = plot.normalised(curves, None)
    assert tasks == ["dmc/x"] and {k: v[0].tolist() for k, v in lines.items()} == {
        "a": [0.25], "b": [0.0]
    }  # fmt: skip
    assert plot.normalised(curves, (250, 500))[0]["a"][0].tolist() == [0]
    with pytest.raises(UserError, match="no task has runs of all lines"):
        plot.normalised(curves[1:], None)
    with pytest.raises(UserError, match="range of the returns of T is unknown: give --normalise"):
        plot.normalised([curve()], None)


def test_the_command_writes_pictures_and_prints_a_table(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = {"rp": entries(0, 1, 2, 3), "tpx": entries(4, 5)}
    command = SWEEP.replace("Pendulum-v1", "dm_control/walker-walk-v0")
    sweep_file(tmp_path / "results" / "walk", results, command)
    plot.main(["results/walk", "--profile", "--x", "frames"])
    out = capsys.readouterr().out
    head = "| dmc/walker-walk-v0 | "
    assert f"{head}rp | 4 | 600 frames | 3.50 | 2.00 to 5.00 | 2.0, 3.0, 4.0, 5.0 |\n" in out
    assert f"{head}tpx | 2 | 600 frames | 6.50 |  | 6.0, 7.0 |\n" in out
    names = [f"{name}.{kind}" for name in ("learning_curves", "profile") for kind in ("png", "svg")]
    assert out.splitlines()[-1] == f"written to plots/walk: {', '.join(names)}"
    for name in names:
        start = (tmp_path / "plots" / "walk" / name).read_bytes()[:100]
        assert start.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")


def test_costs_and_returns_have_tables_of_their_own(tmp_path, capsys):
    returns = sweep_file(tmp_path / "ppo", {"rp": entries(5)})
    entry = {"costs": [30, 20, 9], "success_threshold": 20.0}
    command = SWEEP.replace("dreamer", "pipps").replace("Pendulum-v1", "my_module:Own-v0")
    costs = sweep_file(tmp_path / "pipps", {"rp": {"0": entry}}, command)
    plot.main([str(returns), str(costs), "--out", str(tmp_path / "out")])
    of_returns, of_costs = capsys.readouterr().out.split("\n\n")[:2]
    assert "| mean of the returns | 95 % | each seed |\n" in of_returns
    assert of_returns.endswith("| 7.00 |  | 7.0 |")
    assert "| mean of the costs | 95 % | each seed | success |\n" in of_costs
    assert "| 3 evaluations | 9.00 |  | 9.0 | 1/1 (0.21 to 1.00) |" in of_costs


def test_other_runs_are_written_to_another_folder():
    def name(*paths):
        return plot._name_of([Path(path) for path in paths])

    assert name("runs") == name("runs/") == "runs"
    assert name("runs/a", "runs/b") == name("runs/b", "runs/a") == "a_b"
    assert name("x/dreamer/h15", "x/svg/h15") == "dreamer_svg"
    assert name("runs", "runs/a") == "a_runs"
    assert name(*(f"runs/{'long' * 5}{i}" for i in range(9))) == f"{'long' * 5}0_and_8_more"


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--normalise", "0", "1"], "add --profile"),
        (["--profile", "--normalise", "5", "5"], "two different numbers, got 5.0 5.0"),
        (["--profile", "--normalise", "0", "nan"], "two different numbers, got 0.0 nan"),
    ],
)
def test_wrong_bounds_are_refused_before_anything_is_read(flags, complaint, capsys):
    with pytest.raises(SystemExit, match="2"):
        plot.main(["missing", *flags])
    assert complaint in capsys.readouterr().err


def test_frames_of_unknown_length_are_refused(tmp_path, capsys):
    path = tmp_path / "results.json"
    row = {"task": "balance", "seed": 0, "timesteps": STEPS, "returns": [1, 2, 3]}
    path.write_text(json.dumps({"runs": [row]}))
    with pytest.raises(SystemExit, match="2"):
        plot.main([str(path), "--x", "frames"])
    assert "frames of a decision in balance are unknown" in capsys.readouterr().err


def test_returns_have_no_success_panel_though_the_environment_has_a_threshold(tmp_path):
    command = "totalprop sweep dreamer --estimators rp --seeds 0 --out x -- --env-id CartPole-v1"
    sweep_file(tmp_path / "a", {"rp": entries(0)}, command)
    curves, legend, _ = plot.labelled(plot.read([tmp_path / "a"], threshold=3.0))
    assert [curve.threshold for curve in curves] == [None]
    assert len(figure_of(curves, legend).axes) == 1
