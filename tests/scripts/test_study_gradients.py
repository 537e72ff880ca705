"""The benchmark of gradients: its problems against closed forms, and its statistics by hand."""

import contextlib
import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.scripts import forked
from totalprop import estimators
from totalprop.estimators import make
from totalprop.scripts.studies import gradients
from totalprop.scripts.studies.agent_problems import SKETCHED, Sketch, agent_problem
from totalprop.scripts.studies.gradients import Point, Truth
from totalprop.scripts.studies.problems import KINDS, PROBLEMS

CASES = [(name, horizon) for name, problem in PROBLEMS.items() for horizon in problem.horizons]


def test_there_are_more_than_100_points_of_every_kind():
    assert 4 * len(CASES) >= 100
    assert {problem.kind for problem in PROBLEMS.values()} == set(KINDS) - {"agent"}


@pytest.mark.parametrize(("name", "horizon"), CASES)
def test_every_estimator_computes_a_finite_gradient(name, horizon):
    problem, noise = PROBLEMS[name], PROBLEMS[name].draw(min(horizon, 20), 30, 0)
    for one in estimators.names():
        g = problem.gradient(make(one), noise)
        assert g.shape == (len(problem.theta),) and g.isfinite().all(), one


@pytest.mark.parametrize(("name", "horizon"), [c for c in CASES if PROBLEMS[c[0]].exact])
def test_closed_forms_are_the_means_of_lr(name, horizon):
    """40 batches of 1000 samples, within 4 SE."""
    problem = PROBLEMS[name]
    g = torch.stack(
        [problem.gradient(make("lr"), problem.draw(horizon, 1000, s)) for s in range(40)]
    )
    assert ((g.mean(0) - problem.exact(horizon)).abs() < 4 * g.std(0) / 40**0.5).all()


@pytest.mark.parametrize("name", [n for n, p in PROBLEMS.items() if p.kind != "stiff"])
def test_rp_is_right_where_nothing_jumps_and_wrong_where_something_does(name):
    """20 batches of 2000 samples at a short horizon of each problem, beside LR.

    On the stiff ones RP is right in the mean, over more samples than there are here.
    """
    problem = PROBLEMS[name]
    horizon = sorted(problem.horizons)[min(1, len(problem.horizons) - 1)]
    horizon = min(horizon, 20)
    noise = [problem.draw(horizon, 2000, seed) for seed in range(20)]
    rp, lr = (torch.stack([problem.gradient(make(e), z) for z in noise]) for e in ("rp", "lr"))
    difference = rp - lr
    z = difference.mean(0) / (difference.std(0) / 20**0.5)
    if problem.kind == "jump":
        assert z.abs().max() > 5
    else:
        assert z.abs().max() < 4


def test_the_probes_are_per_sample_gradients_of_the_parameters():
    """`tp` weighs what the probe says: k by hand from per-sample gradients of RP and LR."""
    problem, noise = PROBLEMS["quadratic"], PROBLEMS["quadratic"].draw(1, 50, 3)
    found = problem.gradient(make("tp"), noise)
    mean, std = torch.tensor(problem.theta[:4]).double(), math.exp(problem.theta[4])
    x, cost = mean + std * noise[0], None
    cost = 0.5 * x.square().sum(1)
    advantage = (cost - (cost.sum() - cost) / 49).unsqueeze(1)
    rp = torch.cat((x, (x * noise[0] * std).sum(1, keepdim=True)), 1)
    score = torch.cat((noise[0] / std, (noise[0].square() - 1).sum(1, keepdim=True)), 1)
    lr = advantage * score
    v_rp, v_lr = rp.var(0).sum(), lr.var(0).sum()
    k = v_rp / (v_rp + v_lr)
    torch.testing.assert_close(found, (k * lr + (1 - k) * rp).mean(0))


TRAINED = {
    "pipps": ["--n-particles", "20", "--gradient-steps", "1", "--total-timesteps", "30"],
    "dreamer": [
        "--preset", "laptop", "--horizon", "4", "--total-timesteps", "120",
        "--learning-starts", "60", "--sequence-length", "8", "--batch-size", "4",
        "--imagination-starts", "8", "--gradient-steps", "1",
    ],
}  # fmt: skip


@pytest.fixture(scope="module", params=TRAINED)
def trained(request, tmp_path_factory):
    """The folder of a short run on the cart-pole."""
    runs = tmp_path_factory.mktemp("runs")
    command = [request.param, *TRAINED[request.param], "--env-id", "totalprop/CartPoleSwingUp-v0"]
    command += ["--runs", str(runs), "--name", request.param, "--threads", "1", "--no-progress"]
    done = forked.run("totalprop.scripts.train", command)
    assert done.returncode == 0, done.stderr
    return runs / request.param


@pytest.fixture(scope="module")
def agent(trained):
    return agent_problem(trained)


def test_agents_have_the_same_gradient_under_every_unbiased_estimator(agent):
    """30 repeats with 50 samples: in no direction further than 5 SE from LR."""
    horizon = agent.horizons[0]
    g = {
        name: torch.stack(
            [agent.gradient(make(name), agent.draw(horizon, 50, seed)) for seed in range(30)]
        )
        for name in ("rp", "lr", "tpx", "tps")
    }
    assert g["lr"].shape == (30, SKETCHED) and len(g["lr"].unique(dim=0)) == 30
    for name in ("rp", "tpx", "tps"):
        difference = g[name] - g["lr"]
        error = difference.std(0) / 30**0.5
        assert (difference.mean(0).abs() < 5 * error).all(), name
    again = agent.gradient(make("lr"), agent.draw(horizon, 50, 0))
    torch.testing.assert_close(again, g["lr"][0], rtol=0, atol=0)


def test_rp_of_an_agent_is_the_derivative_of_its_objective(agent):
    """Central differences in the directions of the sketch."""
    noise = agent.draw(agent.horizons[0], 20, 0)
    found = agent.gradient(make("rp"), noise)
    parameters = agent.parameters
    rows = agent._sketch._rows.double()
    start = torch.nn.utils.parameters_to_vector(parameters).detach().double()
    eps = 1e-3
    for i in (0, 63):
        ends = []
        for sign in (1, -1):
            moved = (start + sign * eps * rows[i]).to(parameters[0].dtype)
            torch.nn.utils.vector_to_parameters(moved, parameters)
            ends.append(float(agent.loss(noise)))
        torch.nn.utils.vector_to_parameters(start.to(parameters[0].dtype), parameters)
        assert float(found[i]) == pytest.approx((ends[0] - ends[1]) / (2 * eps), rel=0.02, abs=1e-4)


def test_a_sketch_keeps_distances():
    generator = torch.Generator().manual_seed(1)
    few = torch.randn(64, generator=generator)
    many = torch.randn(9, 5000, generator=generator).double()
    assert torch.equal(Sketch([few])([few]), few.double())
    sketch = Sketch([many[0]])
    ratio = torch.stack([sketch([g]).square().sum() / g.square().sum() for g in many])
    assert (ratio - 1).abs().max() < 4 * (2 / 64) ** 0.5  # four standard deviations
    both = sketch([many[0] + many[1]])
    torch.testing.assert_close(both, sketch([many[0]]) + sketch([many[1]]))


def test_the_folder_of_a_run_is_a_problem(trained, agent, tmp_path, capsys):
    zeros = np.zeros(SKETCHED)
    keys = [(str(trained), horizon) for horizon in agent.horizons]
    gradients.write_truths(tmp_path, {key: Truth(zeros, zeros, "nothing") for key in keys})
    command = [
        "--out", str(tmp_path), "--jobs", "1", "--problems", str(trained), "--samples", "20",
        "--repeats", "2", "--estimators", "rp", "safe",
    ]  # fmt: skip
    gradients.main(command)
    with open(tmp_path / "gradients.csv") as file:
        header = file.readline()
        rows = list(csv.DictReader(file))
    assert {int(row["horizon"]) for row in rows} == set(agent.horizons)
    assert {len(row["gradients"].split()) for row in rows} == {2 * SKETCHED}
    assert f"{len(keys)} points" in capsys.readouterr().out
    # Its gradients and truths are of that agent, and not of what the run becomes.
    (digest,) = json.loads(header[1:])["agents"].values()
    path = tmp_path / "gradients.csv"
    path.write_text(path.read_text().replace(digest, "of_another"))
    with pytest.raises(SystemExit):
        gradients.main(command)
    assert "measured with another agent of" in capsys.readouterr().err


def run(tmp_path, *flags):
    gradients.main([
        "--out", str(tmp_path), "--jobs", "1", "--problems", "quadratic", "step-cost",
        "--samples", "50", "100", "--repeats", "4", "--estimators", "rp", "lr", "safe",
        *flags,
    ])  # fmt: skip
    with open(tmp_path / "gradients.csv") as file:
        settings = json.loads(file.readline()[1:])
        return settings, list(csv.DictReader(file))


def test_a_study_measures_what_is_missing_and_reports(tmp_path, capsys):
    settings, rows = run(tmp_path)
    assert len(rows) == (1 + 3) * 2 * 3
    assert {len(row["gradients"].split()) for row in rows} == {4 * 5, 4 * 1}
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out and "| `safe` |" in table
    assert (tmp_path / "errors.png").stat().st_size > 10_000
    truths = json.loads((tmp_path / "truths.json").read_text())["truths"]
    assert {record["source"] for record in truths} == {"closed form"}
    again, same = run(tmp_path)
    assert (again, same) == (settings, rows)
    settings, more = run(tmp_path, "--estimators", "tp", "aobg-0.3")
    assert len(settings["runs"]) == 2 and [r for r in more if r["run"] == "0"] == rows
    assert {r["estimator"] for r in more if r["run"] == "1"} == {"tp", "aobg-0.3"}
    with pytest.raises(SystemExit):
        run(tmp_path, "--repeats", "6")
    assert "was measured with repeats 4, not 6" in capsys.readouterr().err


def test_no_worker_survives_a_killed_study(tmp_path):
    command = [sys.executable, "-m", "totalprop", "study", "gradients", "--jobs", "1"]
    command += ["--problems", "regulator", "--out", str(tmp_path)]
    study = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    try:
        assert " of 12 points" in study.stderr.readline()
        study.kill()
        study.wait()
        for _ in range(100):
            if not _members(study.pid):
                return
            time.sleep(0.1)
        raise AssertionError(f"still running: {_members(study.pid)}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(study.pid, signal.SIGKILL)


def _members(group):
    """Command lines of the living processes of a group."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, of = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(of) == group and state != "Z":
                found.append((entry / "cmdline").read_text())
    return found


def test_points_have_the_same_noise_for_all_estimators_and_their_own():
    point = Point("quadratic", 1, 50)
    first = gradients.gradients_at(point, ["rp", "lr"], 4, 0)
    alone = gradients.gradients_at(point, ["lr"], 4, 0)
    np.testing.assert_array_equal(first["lr"][0], alone["lr"][0])
    other = gradients.gradients_at(point, ["lr"], 4, 1)
    assert (other["lr"][0] != alone["lr"][0]).all()
    assert len(np.unique(alone["lr"][0][:, 0])) == 4


@pytest.mark.parametrize("name", ["inventory", "quadratic"])
def test_tolerances_share_their_gradients_and_change_none(name):
    problem = PROBLEMS[name]
    point = Point(name, problem.horizons[0], 50)
    family = ["aobg-0.03", "aobg-0.3", "aobg-3", "aobg-30"]
    found = gradients.gradients_at(point, ["rp", *family], 2, 0)
    assert list(found) == ["rp", *family]
    for one in family:
        g, ms = found[one]
        for r in range(2):
            noise = problem.draw(point.horizon, 50, gradients._seed_of(point, 0, r))
            alone = problem.gradient(gradients.estimator_named(one), noise)
            np.testing.assert_allclose(g[r], alone, rtol=1e-12)
        assert ms == found[family[0]][1] > 0
    assert len({found[one][0].tobytes() for one in family}) > 1


def test_the_truth_of_a_jump_is_of_lr_and_of_a_smooth_problem_of_tpx(monkeypatch):
    monkeypatch.setattr(gradients, "PARTS", 3)
    monkeypatch.setattr(gradients, "MANY", 100)
    for name, source in (("inventory", "lr"), ("pendulum", "tpx"), ("ramp-1e4", "lr")):
        horizon = PROBLEMS[name].horizons[0]
        truth = gradients.true_gradient(name, horizon)
        assert truth.source == f"{source}, 300 samples" and (truth.error > 0).all()
        noise = [PROBLEMS[name].draw(horizon, 100, 10**6 + i) for i in range(3)]
        parts = [PROBLEMS[name].gradient(make(source, cross_fit=True), z).numpy() for z in noise]
        np.testing.assert_allclose(truth.gradient, np.mean(parts, 0))


def test_errors_by_hand():
    truth = Truth(np.array([1.0, -2.0]), np.array([0.0, 0.0]), "closed form")
    g = {
        "rp": np.array([[1.0, -2.5], [1.0, -1.5]]),
        "lr": np.array([[2.0, -2.0], [0.0, -2.0]]),
        "safe": np.array([[1.0, -2.0], [1.0, 0.0]]),
        "tp": np.array([[1.0, 2.0], [1.0, 2.1]]),
    }
    found = gradients.errors_at(Point("quadratic", 1, 50), g, truth)
    expected = {"rp": 0.5, "lr": 1.0, "safe": math.sqrt(2), "tp": math.sqrt(16.405)}
    assert found.rmse == pytest.approx(expected)
    assert found.rival == "rp" and found.ratio[0] == pytest.approx(math.sqrt(2) / 0.5)
    assert found.ratio[1] <= found.ratio[0] <= found.ratio[2]
    assert found.wrong_sign == ["tp"]


def test_an_error_of_the_truth_is_taken_off_but_never_variance():
    truth = Truth(np.array([0.0]), np.array([0.3]), "lr")
    g = np.array([[1.0], [-1.0], [1.0], [-1.0]])
    assert gradients.squared_errors(g, truth).mean() == pytest.approx(1.0)
    biased = g + 2
    spread = g.var(ddof=1)
    expected = 5.0 - min(0.09, 5.0 - spread)
    assert gradients.squared_errors(biased, truth).mean() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--problems", "chess"], "got chess"),
        (["--estimators", "tqx"], "did you mean 'tpx'"),
        (["--estimators", "tpx+lux"], "unknown leg 'lux': did you mean 'lax'"),
        (["--estimators", "tpx+lax"], "tpx+lax needs a critic: choose --problems that are runs"),
        (["--repeats", "1"], "--repeats must be at least 2, got 1"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
    ],
)
def test_wrong_flags_are_refused(flags, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as left:
        gradients.main(["--out", str(tmp_path), *flags])
    assert left.value.code == 2 and message in capsys.readouterr().err


def test_a_name_may_have_a_leg():
    assert gradients.estimator_named("lr+first-order") == make("lr", legs="first-order")


def test_a_kind_stands_for_its_problems():
    chosen = gradients.parse(["--problems", "chaos", "queue"]).problems
    assert chosen == [n for n, p in PROBLEMS.items() if p.kind == "chaos" or n == "queue"]
