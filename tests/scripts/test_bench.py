"""The benchmarks of PIPPS, PILCO and SVG: peers of ours, and rows of ratios."""

import math

import pytest
import torch

from tests.agents.pilco.test_propagation import make
from totalprop.agents.pilco.propagation import MomentModel, predict, saturating
from totalprop.agents.trials.controllers import RBFPolicy
from totalprop.agents.trials.saturating_cost import SaturatingCost
from totalprop.scripts.bench import dreamer as bench_dreamer
from totalprop.scripts.bench import pilco as bench_pilco
from totalprop.scripts.bench import pipps as bench
from totalprop.scripts.bench import svg as bench_svg
from totalprop.scripts.bench import timing
from totalprop.scripts.bench.pilco_peer import make_gradient
from totalprop.world_models.moment_matching import Gaussian

TIP = SaturatingCost([0.2, 0.0, -0.1, 0.0, 1.0], [1.0, 0.0, 0.5, 2.0, 2.0], angles=[[0, 1, 0]])
ANGLE = SaturatingCost([0.2, 0.0, -0.1], [1.0, 0.5, 0.5])


@pytest.mark.parametrize("cost", [TIP, ANGLE], ids=["tip", "angle"])
@pytest.mark.parametrize("angle_dims", [(), (1,)])
@pytest.mark.parametrize("controls", [1, 2])
def test_the_peer_of_pilco_computes_its_cost_and_gradient(controls, angle_dims, cost):
    """From other formulas, in all of which nothing is shared: to round-off, over ten steps."""
    pytest.importorskip("gpytorch")
    dynamics, policy = make(RBFPolicy, controls, angle_dims)
    dynamics.gp.prior_mean = "data"
    start = Gaussian(torch.tensor([0.1, 3.0, 0.0]).double(), 0.01 * torch.eye(3).double())
    loss, gradient = make_gradient(dynamics, policy, start, cost, horizon=10)()
    own = predict(MomentModel(dynamics, start, saturating(cost)), policy, 10).loss
    expected = torch.autograd.grad(own, list(policy.parameters()))
    torch.testing.assert_close(loss, own.detach(), rtol=1e-10, atol=0)
    for part, whole in zip(gradient, expected, strict=True):
        assert whole.norm() > 1e-6
        assert (part - whole).norm() < 1e-8 * whole.norm()


def test_bench_of_pilco_gives_ratios(monkeypatch):
    pytest.importorskip("gpytorch")
    row = bench_pilco.bench_pilco(12, 1, horizon=2)
    assert row.pop("gradient, relative difference") < 1e-8
    assert len(row) == 5 and all(math.isfinite(value) and value > 0 for value in row.values())
    assert row["GP data points"] == row["of them used"] == 12


def test_bench_of_pilco_without_gpytorch_says_so(monkeypatch, capsys):
    monkeypatch.setattr(bench_pilco, "make_gradient", lambda *args, **kwargs: None)
    assert len(bench_pilco.bench_pilco(12, 1, horizon=2)) == 4
    assert "GPyTorch is not installed" in capsys.readouterr().out


def test_bench_of_svg_gives_ratios(monkeypatch):
    small = {"policy_kwargs": {"net_arch": [8]}, "value_hidden": (8,), "model_hidden": (4, 4)}
    preset = bench_svg.AGENTS["svg"].presets["svg2015"]
    monkeypatch.setitem(bench_svg.AGENTS["svg"].presets, "svg2015", {**preset, **small})
    row = bench_svg.bench_svg(1, updates=1)
    assert len(row) == 4 and all(value > 0 for value in row.values())


@pytest.mark.parametrize(("what", "points"), [("pipps", [30, 150, 450]), ("pilco", [30, 150, 300])])
def test_points_have_a_default_for_each_benchmark(what, points, monkeypatch):
    timed = []
    monkeypatch.setattr(bench, f"bench_{what}", lambda n, repeats: timed.append(n) or {"n": n})
    bench.main([what, "--threads", "1"])
    assert timed == points


def test_a_row_of_pipps_has_the_peer_and_every_ratio():
    pytest.importorskip("gpytorch")
    row = bench.bench_pipps(8, 1)
    assert {"seconds (rp)", "tpx / rp"} <= row.keys() and any("GPyTorch" in name for name in row)
    assert all(math.isfinite(value) for value in row.values())


def test_medians_are_of_rounds_that_take_turns(monkeypatch):
    clock, order = [0.0], []

    def task(name, *seconds):
        left = iter(seconds)

        def run():
            order.append(name)
            clock[0] += next(left)

        return run

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    tasks = {"a": task("a", 50.0, 1.0, 9.0, 2.0), "b": task("b", 50.0, 4.0, 5.0, 30.0)}
    assert timing.interleaved_medians(tasks, 3) == {"a": 2.0, "b": 5.0}  # the first is a warm-up
    assert order == ["a", "b", "a", "b", "a", "b", "a", "b"]


def test_ratios_of_the_dreamers_benchmark(monkeypatch):
    """Others' seconds over those of rp, and the work of an update over its seconds."""
    monkeypatch.setattr(bench_dreamer, "make_update", lambda *args, **how: None)
    monkeypatch.setattr(bench_dreamer.sheeprl_peer, "start_update", lambda **how: None)
    monkeypatch.setattr(bench_dreamer, "keep_freed_memory", lambda: None)
    seconds = {"rp H=15": 2.0, "rp H=60": 8.0, "sheeprl": 6.0, "sheeprl, our allocator": 3.0}

    def medians(tasks, repeats, **how):
        return {name: seconds.get(name, 5.0) for name in tasks}

    monkeypatch.setattr(bench_dreamer, "interleaved_medians", medians)
    row = bench_dreamer.bench_dreamer(1, batch=4, length=5)
    assert row["seconds (rp, H=60)"] == 8.0 and row["tpx / rp at H=15"] == 2.5
    assert row["tpx / rp at H=60"] == 0.625 and row["sheeprl / rp H=15"] == 3.0
    assert row["sheeprl, our allocator / rp H=15"] == 1.5
    work = 6 * 4 * 5 * (bench_dreamer.FRAME_MACS + 15 * bench_dreamer.STEP_MACS)
    assert row["TFLOP/s"] == pytest.approx(work / 2.0 / 1e12)
