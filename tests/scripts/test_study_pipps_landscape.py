"""The studies of PIPPS's gradient along a line of policies, on an agent trained for seconds."""

import csv
import json

import numpy as np
import pytest
import torch

from tests.scripts import forked
from totalprop.estimators import make
from totalprop.scripts.studies import measurements, pipps_landscape, pipps_particles
from totalprop.scripts.studies.chaos_report import Measured
from totalprop.scripts.studies.measurements import Measurements, read_measurements
from totalprop.scripts.studies.pipps_landscape import Landscape, box_at
from totalprop.scripts.studies.policy_line import PolicyLine, estimator_named


def train(runs, *flags):
    """The folder of a short run of pipps."""
    command = ["pipps", "--n-particles", "20", "--gradient-steps", "1", "--total-timesteps", "30"]
    command += ["--runs", str(runs), "--name", "pipps", "--threads", "1", "--no-progress", *flags]
    done = forked.run("totalprop.scripts.train", command)
    assert done.returncode == 0, done.stderr
    return runs / "pipps"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def line(trained):
    return PolicyLine(trained, direction=8)


def test_the_direction_is_a_unit_vector_of_its_own_seed(trained, line):
    assert line.direction.norm() == pytest.approx(1)
    torch.testing.assert_close(PolicyLine(trained, 8).direction, line.direction, rtol=0, atol=0)
    assert abs(float(PolicyLine(trained, 9).direction @ line.direction)) < 4 / 254**0.5
    start = [p.detach().clone() for p in line.policy.parameters()]
    line.move(1.5)
    moved = [(p - q).detach().flatten() for p, q in zip(line.policy.parameters(), start)]
    torch.testing.assert_close(torch.cat(moved), 1.5 * line.direction)
    line.move(0)
    assert all(torch.equal(p, q) for p, q in zip(line.policy.parameters(), start))


def test_rp_is_the_derivative_of_the_value_with_fixed_noise(line):
    noise, eps = line.draw(20, 0), 1e-5
    ends = []
    for sign in (1, -1):
        line.move(0.5 + sign * eps)
        ends.append(float(line.returns(noise).mean()))
    line.move(0.5)
    slope = (ends[0] - ends[1]) / (2 * eps)
    assert float(line.slope(make("rp"), noise)) == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("name", ["rp", "lr", "lr+biw", "tp+biw", "tpx", "tpg", "ivw"])
def test_the_gradients_of_particles_have_the_mean_of_all(line, name):
    line.move(1.0)
    noise, estimator = line.draw(20, 1), estimator_named(name)
    each = line.slopes(estimator, noise)
    assert each.shape == (20,) and each.std() > 0
    torch.testing.assert_close(each.mean(), line.slope(estimator, noise))


def test_names_have_legs_after_a_plus():
    assert estimator_named("lr+biw") == make("lr", legs="biw")
    assert estimator_named("tpx") == make("tpx")
    assert estimator_named("gr") == make("rp")
    for wrong in ("lr+bow", "gr+biw"):
        with pytest.raises(ValueError, match="unknown"):
            estimator_named(wrong)
    with pytest.raises(ValueError, match="need a critic"):
        estimator_named("tpx+lax")


def test_a_box_is_the_value_of_each_state(line):
    """Its middle is the mean of x_1; there V is simulated by hand."""
    line.move(0.0)
    box = box_at(line, 3, seed=4)
    noise, model = line.draw(4, 4), line.model
    centre = model.start_mean.unsqueeze(0)
    with torch.no_grad():
        found = model.dynamics.predict(centre, line.policy.controller()(centre))
        x1 = found.mean[0]
        x = x1.expand(4, -1)
        cost = model.cost(x, None)
        for z in noise.model[: line.horizon - 1]:
            found = model.dynamics.predict(x, line.policy.controller()(x))
            x = found.mean + (found.variance + model.dynamics.noise.square()).sqrt() * z
            cost = cost + model.cost(x, None)
    assert box.values[1, 1] == pytest.approx(float(cost.mean()))
    assert (box.first[1], box.second[1]) == pytest.approx(x1[:2].tolist())
    assert len(np.unique(box.values.round(9))) == 9


def test_a_run_with_several_starts_and_integrated_positions(tmp_path):
    """A box then is over the two velocities, which alone are predicted, from the first start."""
    run = train(tmp_path, "--speed-integration", "on", "--start-means", "0,0,0,0", "1,0,2,0")
    line = PolicyLine(run, direction=0)
    noise, model, control = line.draw(20, 0), line.model, line.policy.controller()
    assert line.slopes(make("tpx"), noise).shape == (20,)
    box = box_at(line, 3, seed=4)
    start = torch.zeros(1, 4, dtype=torch.float64)
    with torch.no_grad():
        found = model.dynamics.predict(start, control(start))
        x = model.dynamics.complete(start, found.mean).expand(4, -1)
        assert (box.first[1], box.second[1]) == pytest.approx(found.mean[0].tolist())
        cost = model.cost(x, None)
        for z in line.draw(4, 4).model[: line.horizon - 1]:
            found = model.dynamics.predict(x, control(x))
            std = (found.variance + model.dynamics.noise.square()).sqrt()
            moved = found.mean + std * z[:, model.dynamics.predicted_dims]
            x = model.dynamics.complete(x, moved)
            cost = cost + model.cost(x, None)
    assert box.values[1, 1] == pytest.approx(float(cost.mean()))
    landscape(run, tmp_path / "out")
    header = (tmp_path / "out" / "boxes.csv").read_text().splitlines()[0]
    assert json.loads(header[1:])["axes"] == ["cart [m/s]", "pole [rad/s]"]


def test_growth_and_differences_by_hand():
    delta, mean = np.array([0.0, 1, 3, 4]), np.array([1.0, 2, 8, 9])
    own = Landscape(delta, mean, np.array([0.5, 50.0, 5.0, 1.0]))
    assert own.growth() == (100.0, 1.0)
    np.testing.assert_allclose(pipps_landscape.central_differences(own), [7 / 3, 7 / 3])


def landscape(trained, out, *flags):
    pipps_landscape.main([
        "--run", str(trained), "--out", str(out), "--estimators", "rp", "lr+biw",
        "--particles", "20", "--points", "3", "--end", "1", "--box-points", "5", *flags,
    ])  # fmt: skip
    return (out / "landscape.csv").read_text()


def test_a_landscape_measures_what_is_missing_and_reports(trained, tmp_path, capsys, monkeypatch):
    first = landscape(trained, tmp_path)
    _, rows = read_measurements(tmp_path / "landscape.csv", ("delta", "quantity"))
    assert [(r["delta"], r["quantity"]) for r in rows] == [
        (delta, name) for delta in ("0", "0.5", "1") for name in ("value", "rp", "lr+biw")
    ]
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out and table.count("| `lr+biw` |") == 1
    assert (tmp_path / "landscape.png").stat().st_size > 10_000
    # The numbers of a row are those of the line.
    line = PolicyLine(trained, 8)
    line.move(0.5)
    own = line.slopes(make("rp"), line.draw(20, 0))
    [row] = [r for r in rows if (r["delta"], r["quantity"]) == ("0.5", "rp")]
    assert float(row["mean"]) == pytest.approx(float(own.mean()), rel=1e-5)
    assert float(row["variance"]) == pytest.approx(float(own.var()), rel=1e-5)
    # Nothing is measured twice, also by another command, which is recorded beside the first.
    with monkeypatch.context() as context:
        context.setattr(PolicyLine, "slopes", None)
        assert landscape(trained, tmp_path) == first
    again = landscape(trained, tmp_path, "--estimators", "rp", "lr+biw", "lr")
    assert again.splitlines()[2 : 2 + len(rows)] == first.splitlines()[2:]
    assert len(json.loads(again.splitlines()[0][1:])["runs"]) == 2
    # Another noise is another file.
    with pytest.raises(SystemExit, match="1"):
        landscape(trained, tmp_path, "--seed", "1")
    assert "was measured with seed 0, not 1" in capsys.readouterr().err


def particles(trained, out, *flags):
    pipps_particles.main([
        "--run", str(trained), "--out", str(out), "--estimators", "rp", "lr", "lr+biw", "gr",
        "--particles", "10", "20", "--repeats", "4", "--end", "1", *flags,
    ])  # fmt: skip
    with open(out / "particles.csv") as file:
        file.readline()
        return list(csv.DictReader(file))


def test_particles_are_new_in_every_repeat_and_the_same_for_all_estimators(
    trained, tmp_path, capsys, monkeypatch
):
    rows = particles(trained, tmp_path)
    assert len(rows) == 2 * 2 * 4
    assert all(len(set(row["gradients"].split())) == 4 for row in rows)
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out and table.count("divides `lr`'s by") == 2
    assert (tmp_path / "particles.png").stat().st_size > 10_000
    with monkeypatch.context() as context:
        context.setattr(PolicyLine, "slope", None)
        assert particles(trained, tmp_path) == rows
    line = PolicyLine(trained, 8)
    line.move(1.0)
    alone = pipps_particles.slopes_of(line, "lr", 10, 4, seed=0)
    [row] = [r for r in rows if [r[k] for k in pipps_particles.KEYS] == ["1", "10", "lr"]]
    np.testing.assert_allclose(np.array(row["gradients"].split(), float), alone, rtol=1e-6)
    assert alone != pipps_particles.slopes_of(line, "lr", 10, 4, seed=1)


def test_weighting_divides_variances():
    one, half = Measured(np.array([1.0, -1.0, 3.0]), 0.0), Measured(np.array([1.0, -1.0, 1.0]), 0.0)
    found = pipps_particles.weighting({"lr": {50: one}, "lr+biw": {50: half, 9: one}, "tp": {}})
    assert found == ["- Batch importance weighting divides `lr`'s by 3 (P = 50)."]


def test_measurements_say_which_run_added_a_row(tmp_path, monkeypatch):
    path, columns = tmp_path / "new" / "x.csv", {"keys": ("a",), "values": ("b",)}
    monkeypatch.setattr(measurements, "current_commit", lambda: "abc")
    first = Measurements(path, {"seed": 1}, **columns, command="one")
    first.add(("u",), ["1"])
    second = Measurements(path, {"seed": 1}, **columns, command="two")
    second.add(("v",), ["2"])
    settings, rows = read_measurements(path, ("a", "b", "run"))
    assert [tuple(row.values()) for row in rows] == [("u", "1", "0"), ("v", "2", "1")]
    assert [(run["command"], run["commit"]) for run in settings["runs"]] == [
        ("one", "abc"), ("two", "abc"),
    ]  # fmt: skip
    assert measurements.origin(settings).startswith("Measured by `one`, commit abc; `two`")


@pytest.mark.parametrize("text", ["", "# {}\na,b\n", "nonsense\n", '# {"runs": []}\na,c\n1,2\n'])
def test_a_broken_file_is_refused_with_a_sentence(tmp_path, text):
    path = tmp_path / "x.csv"
    path.write_text(text)
    with pytest.raises(measurements.UserError, match=r"cannot read .*; delete it"):
        read_measurements(path, ("a", "b"))


@pytest.mark.parametrize(
    ("study", "flags", "message"),
    [
        (pipps_landscape, ["--estimators", "tqx"], "did you mean 'tpx'"),
        (pipps_landscape, ["--estimators", "gr"], "see totalprop study pipps-particles"),
        (pipps_landscape, ["--particles", "5"], "--particles must be at least 6, got 5"),
        (pipps_landscape, ["--points", "2"], "--points must be at least 3, got 2"),
        (pipps_landscape, ["--box-points", "1"], "--box-points must be at least 2, got 1"),
        (pipps_landscape, ["--end", "0"], "--end must be above 0, got 0"),
        (pipps_particles, ["--estimators", "lr+bow"], "bow"),
        (pipps_particles, ["--particles", "50", "4"], "--particles must be at least 6, got 4"),
        (pipps_particles, ["--repeats", "2"], "--repeats must be at least 3, got 2"),
        (pipps_particles, ["--end", "inf"], "--end must be above 0, got inf"),
    ],
)
def test_wrong_flags_are_refused(study, flags, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as left:
        study.main(["--out", str(tmp_path), *flags])
    assert left.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("study", [pipps_landscape, pipps_particles])
def test_a_folder_without_a_run_is_refused(study, capsys, tmp_path):
    with pytest.raises(SystemExit) as left:
        study.main(["--out", str(tmp_path / "out"), "--run", str(tmp_path)])
    assert left.value.code == 1 and "--run must be the folder of a run" in capsys.readouterr().err
