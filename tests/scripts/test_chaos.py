"""The chaotic-RNN study: claims of Parmas et al. 2023, Sec. 5 and Fig. 3, and the script."""

import csv

import numpy as np
import pytest
import torch

from totalprop.estimators import baselines, make, names
from totalprop.scripts.run.errors import UserError
from totalprop.scripts.studies import chaos, chaos_report, measurements
from totalprop.scripts.studies.chaotic_rnn import START, STD, W, draw_noise, gradients

SMALL = ("--samples", "20", "--repeats", "3", "--horizon", "5", "--estimators", "rp", "tp", "tpg")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def measure(name, betas, noise):
    return chaos_report.Measured(gradients(make(name), betas, noise)[:, 0].numpy(), 0.0)


def test_tpx_ignores_a_chaotic_parallel_path_and_tp_does_not():
    # 12 repeats: the relative standard error of a variance is about 0.4, so 1e-4 is significant.
    noise = draw_noise((1.5, 3.5), repeats=12, samples=200, horizon=100, seed=0)
    tpx, tp = (measure(name, (1.5, 3.5), noise) for name in ("tpx", "tp"))
    assert tpx.variance < 1e-4 * tp.variance


def test_tp_beats_both_its_legs_at_the_edge_of_chaos():
    noise = draw_noise((2.45,), repeats=20, samples=200, horizon=100, seed=0)
    tp, rp, lr = (measure(name, (2.45,), noise) for name in ("tp", "rp", "lr"))
    rows = np.random.default_rng(0).integers(20, size=(1000, 20))
    assert np.quantile(lr.g[rows].var(1) / tp.g[rows].var(1), 0.01) > 5
    # A few exploded samples make up rp's variance (here thousands of times tp's), so a bootstrap
    # that misses them is meaningless. The estimate is low because this sample has only a few.
    assert rp.variance > 100 * tp.variance


def test_repeats_side_by_side_equal_one_at_a_time():
    noise = draw_noise((2.0, 2.4), repeats=3, samples=20, horizon=10, seed=0)
    for name in names():
        together = gradients(make(name), (2.0, 2.4), noise)
        alone = torch.cat([gradients(make(name), (2.0, 2.4), one[None]) for one in noise])
        torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)


def test_rp_is_the_derivative_of_the_simulated_loss():
    betas, h = (1.7, 2.2), 1e-6
    noise = draw_noise(betas, repeats=1, samples=10, horizon=8, seed=0)
    weight = torch.tensor(W, dtype=torch.float64)

    def loss(betas):
        x = noise.new_tensor(START).expand(2, 10, 2)  # [C, N, 2]
        beta = noise.new_tensor(betas)[:, None, None]
        for noise_t in noise[0]:
            x = torch.sigmoid(beta * (x @ weight.T)) + STD * noise_t.reshape(10, 2, 2).movedim(1, 0)
        return float(x.square().sum((0, 2)).mean() / 2)

    g = gradients(make("rp"), betas, noise)[0]
    for i in range(2):
        plus, minus = ([b + s * h * (i == j) for j, b in enumerate(betas)] for s in (1, -1))
        assert float(g[i]) == pytest.approx((loss(plus) - loss(minus)) / (2 * h), rel=1e-5)


def test_the_probe_gives_the_per_sample_gradients():
    # Without a baseline a sample's gradient is that of a batch of one; ivw needs all of them.
    noise, betas = draw_noise((1.9, 2.3), repeats=1, samples=20, horizon=8, seed=0), (1.9, 2.3)
    each = noise.transpose(0, 2)  # [20, 8, 1, 4]: every sample is a repeat
    rp, lr = (gradients(make(e, baseline=baselines.none), betas, each) for e in ("rp", "lr"))
    v_rp, v_lr = rp.var(0).sum(), lr.var(0).sum()
    k = v_rp / (v_rp + v_lr)
    ivw = gradients(make("ivw", baseline=baselines.none), betas, noise)[0]
    torch.testing.assert_close(ivw, k * lr.mean(0) + (1 - k) * rp.mean(0))


def test_noise_is_reproducible_and_other_for_other_points_and_repeats():
    sizes = {"repeats": 2, "samples": 4, "horizon": 3}
    a = draw_noise((2.0,), **sizes, seed=0)
    assert torch.equal(a, draw_noise((2.0,), **sizes, seed=0))
    assert not torch.equal(a[0], a[1])
    assert not torch.equal(a, draw_noise((2.1,), **sizes, seed=0))
    assert not torch.equal(a, draw_noise((2.0,), **sizes, seed=1))


def test_relative_standard_error_of_a_variance():
    g = np.random.default_rng(0).normal(size=4000)
    assert chaos_report.Measured(g, 0).relative_se == pytest.approx((2 / 3999) ** 0.5, rel=0.1)
    alone = np.zeros(40)
    alone[3] = 1e200  # all of the variance is due to one repeat
    assert chaos_report.Measured(alone, 0).relative_se == pytest.approx(1, rel=0.1)


def test_worse_than_the_best_is_told_from_noise():
    draws = np.random.default_rng(0)
    other, ours = draws.normal(size=(2, 400))
    point = {"tp": chaos_report.Measured(other, 0), "lr": chaos_report.Measured(9 * other, 0)}
    worse = chaos_report.compare({**point, "tpg": chaos_report.Measured(2 * ours, 0)})
    assert worse.best == "tp" and worse.verdict == "> 1.1"
    # Paired: the same gradients have a ratio of exactly 1, whatever the noise.
    assert chaos_report.compare({**point, "tpg": point["tp"]}).interval == (1, 1)


@pytest.mark.parametrize("study", ["single", "double"])
def test_end_to_end_and_resumption_adds_nothing(study, tmp_path, monkeypatch, capsys):
    command = ["--study", study, "--betas", "1.5", "2.4", "--second-betas", "3", *SMALL]
    command += ["--out", str(tmp_path)]
    chaos.main(command)
    assert "worst tpg / best other" in capsys.readouterr().out
    first = (tmp_path / f"{study}.csv").read_text()
    header, *lines = first.splitlines()
    rows = list(csv.DictReader(lines))
    assert header.startswith("# {") and '"repeats": 3' in header
    assert [(row["beta_1"], row["estimator"]) for row in rows] == [
        (beta, name) for beta in ("1.5", "2.4") for name in ("rp", "tp", "tpg")
    ]
    for row in rows:
        g = np.array(row["g"].split(), float)
        assert len(g) == 3 and float(row["variance"]) == pytest.approx(g.var(ddof=1), rel=1e-3)
    assert (tmp_path / f"{study}.png").stat().st_size > 10_000
    assert f"## {study}" in (tmp_path / "table.md").read_text()

    def never(*_):
        raise AssertionError("a finished point was measured again")

    monkeypatch.setattr(chaos, "gradients", never)
    chaos.main(command)
    assert (tmp_path / f"{study}.csv").read_text() == first


@pytest.fixture
def no_report(monkeypatch):
    monkeypatch.setattr(chaos, "report", lambda out: None)


def test_redo_measures_one_estimator_again(tmp_path, monkeypatch, no_report):
    command = ["--betas", "1.5", *SMALL, "--out", str(tmp_path)]
    chaos.main(command)
    measured = []
    monkeypatch.setattr(
        chaos, "gradients", lambda e, *args: measured.append(e) or gradients(e, *args)
    )
    chaos.main([*command, "--redo", "tpg"])
    assert measured == [make("rp"), make("tpg")]  # the first call is not timed


def test_redo_measures_what_is_not_among_the_estimators(tmp_path, no_report):
    command = ["--betas", "1.5", *SMALL, "--out", str(tmp_path)]
    chaos.main(command)
    chaos.main(["--betas", "1.5", *SMALL[:-4], "--estimators", "rp", "--out", str(tmp_path),
                "--redo", "tpg", "lr"])  # fmt: skip
    settings, study = chaos.read(tmp_path / "single.csv")
    assert {name: m.run for name, m in study[(1.5,)].items()} == {
        "rp": 0,
        "lr": 1,
        "tp": 0,
        "tpg": 1,
    }
    assert len(settings["runs"]) == 2


def test_rows_keep_the_command_and_commit_that_measured_them(tmp_path, monkeypatch, capsys):
    command = [*SMALL, "--out", str(tmp_path), "--betas", "1.5"]
    monkeypatch.setattr(measurements, "current_commit", lambda: "0ld0ne")
    chaos.main(command)
    page = capsys.readouterr().out
    assert "horizon 5, seed 0), commit 0ld0ne" in page and "Measured by" not in page
    monkeypatch.setattr(measurements, "current_commit", lambda: "n3w0ne")
    chaos.main([*command, "2.4", "--redo", "tpg"])
    settings, study = chaos.read(tmp_path / "single.csv")
    assert [run["commit"] for run in settings["runs"]] == ["0ld0ne", "n3w0ne"]
    assert settings["runs"][0]["command"].endswith("--betas 1.5")
    runs = {betas: {name: m.run for name, m in point.items()} for betas, point in study.items()}
    assert runs == {(1.5,): {"rp": 0, "tp": 0, "tpg": 1}, (2.4,): {"rp": 1, "tp": 1, "tpg": 1}}
    page = (tmp_path / "table.md").read_text()
    assert "--betas 1.5`, commit 0ld0ne: rp at 1, tp at 1 point(s)" in page
    assert "--redo tpg`, commit n3w0ne: rp at 1, tp at 1, tpg at 2 point(s)" in page


@pytest.mark.parametrize(("cut", "told"), [(40, "could not convert"), (None, "without g")])
def test_a_damaged_file_says_so(cut, told, tmp_path, capsys, no_report):
    chaos.main(["--betas", "1.5", *SMALL, "--out", str(tmp_path)])
    path = tmp_path / "single.csv"
    header, names_, row, *_ = path.read_text().splitlines()
    first, run = row.rsplit(",", 1)
    g = "" if cut is None else "0.1 nonsense"
    path.write_text("\n".join([header, names_, f"{first.rsplit(',', 1)[0]},{g},{run}"]) + "\n")
    with pytest.raises(UserError, match=f"cannot read .*{told}.*; delete it to measure again"):
        chaos.read(path)


def test_other_settings_do_not_mix(tmp_path, capsys, no_report):
    command = ["--betas", "1.5", *SMALL, "--out", str(tmp_path)]
    chaos.main(command)
    with pytest.raises(SystemExit) as stop:
        chaos.main([*command, "--repeats", "4"])
    assert stop.value.code == 1
    assert "repeats 3, not 4" in capsys.readouterr().err


def test_a_report_without_measurements_says_so(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        chaos.main(["--report-only", "--out", str(tmp_path)])
    assert stop.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("--estimators", "tpq"),
        ("--study", "triple"),
        ("--betas", "-1"),
        ("--betas", "nan"),
        ("--repeats", "1"),
        ("--samples", "many"),
        ("--nonsense",),
    ],
)
def test_wrong_arguments_end_with_one_sentence_and_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        chaos.main([*arguments])
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and shown.count("\n") == 1


def test_an_estimator_that_overflows_is_the_worst_not_the_best():
    rng = np.random.default_rng(0)
    good, better = (chaos_report.Measured(s * rng.normal(size=8), 0.0) for s in (2.0, 1.0))
    for bad in (np.inf, np.nan, 1e200):
        overflowed = chaos_report.Measured(np.array([bad, *range(7)]), 0.0)
        point = {"rp": overflowed, "tp": good, "tpg": better}
        found = chaos_report.compare(point)
        assert found.best == "tp" and found.ratio == better.variance / good.variance
        found = chaos_report.compare({"tp": good, "tpg": overflowed})
        assert found.ratio == np.inf and found.verdict == "> 1.1"
        study = {(4.0,): point, (3.0,): {"rp": overflowed, "tpg": better}}
        assert any(
            "worst tpg / best other = 0." in line for line in chaos_report.summary("one", study)
        )
        chaos_report.figure_of(study)


def test_without_tpg_nothing_is_compared_with_it():
    study = {
        (beta,): {
            name: chaos_report.Measured(np.arange(1.0, 6) * beta, 0.1) for name in ("rp", "lr")
        }
        for beta in (2.0, 3.0)
    }
    settings = {
        "samples": 5,
        "repeats": 5,
        "horizon": 5,
        "seed": 0,
        "runs": [{"command": "c", "commit": "1", "torch": "2"}],
    }
    text = chaos_report.table("single", settings, study)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert "tpg" not in text and len({row.count("|") for row in rows}) == 1
    (axis,) = chaos_report.figure_of(study).axes
    assert axis.get_xlabel() == "$\\beta$"
