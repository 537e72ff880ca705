"""`sweep --tune`: a search on a known function, its end, its continuation, and what is refused.

Runs are not trained here, except in the last test: an executor writes what they would leave, a
return of -(log10 learning rate + 3)² - (gamma is not 0.9), and the seed as noise.
"""

import csv
import itertools
import json
import math
from pathlib import Path

import pytest

from totalprop.scripts.studies import executors, sweep, tune
from totalprop.scripts.studies.executors import Trial

optuna = pytest.importorskip("optuna")
SPACE = "--vary learning-rate --values 1e-5..1e-1:log --vary gamma --values 0.5 0.9 0.99"


def final_return(run):
    flags = dict(itertools.pairwise(run.arguments))
    exponent = math.log10(float(flags["--learning-rate"]))
    noise = 0.01 * (int(flags["--seed"]) - 100.5)
    return -((exponent + 3) ** 2) - (flags["--gamma"] != "0.9") + noise


class Trained:
    """An executor that records the runs and finishes them, `jobs` at a time; some fail."""

    def __init__(self, fail=lambda name: False, stop_after=math.inf):
        self.names, self.fail, self.stop_after = [], fail, stop_after

    def __call__(self, trials, jobs):
        waiting, running = iter(trials), []
        while running := running + list(itertools.islice(waiting, jobs - len(running))):
            run = running.pop(0)
            if len(self.names) == self.stop_after:
                raise KeyboardInterrupt
            self.names.append(run.name)
            if not (failed := self.fail(run.name)):
                run.folder.mkdir(parents=True, exist_ok=True)
                (run.folder / "config.json").write_text(json.dumps({"agent": run.arguments[0]}))
                summary = {"final_return": final_return(run)}
                (run.folder / "summary.json").write_text(json.dumps(summary))
            yield run, not failed


@pytest.fixture
def search(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(executor, number, words="", flags=""):
        monkeypatch.setattr(sweep, "chosen", lambda **_: executor)
        words = f"daappo {SPACE} --seeds 100 101 --out out --jobs 3 --tune {number} {words}"
        sweep.main([*words.split(), *(["--", *flags.split()] if flags else [])])
        with open("out/trials.csv") as file:
            return list(csv.DictReader(file))

    return run


def test_it_finds_the_optimum_of_a_known_function(search, capsys):
    rows = search(Trained(), 60)
    best = rows[0]
    assert len(rows) == 60 and best["gamma"] == "0.9"
    assert abs(math.log10(float(best["learning-rate"])) + 3) < 0.2  # of a range of 4
    each = [float(best[f"return_seed{seed}"]) for seed in (100, 101)]
    assert each[1] - each[0] == pytest.approx(0.01) and sum(each) / 2 == float(best["mean_return"])
    values = [float(row["mean_return"]) for row in rows]
    assert values == sorted(values, reverse=True)
    proposed = {int(row["trial"]): float(row["mean_return"]) for row in rows}
    first, last = ([proposed[n] for n in span] for span in (range(20), range(40, 60)))
    assert sum(last) > sum(first)  # it uses what it has learned
    out = capsys.readouterr().out
    assert "--vary config --values out/best.json --seeds 0 1 2 3" in out
    assert json.loads(Path("out/best.json").read_text())["agent"] == "daappo"


def test_a_stopped_search_continues_and_repeats_nothing(search):
    first, second, third = Trained(stop_after=7), Trained(), Trained()
    with pytest.raises(SystemExit, match="130"):  # Ctrl-C
        search(first, 8)
    assert len(search(second, 8)) == 8
    names = [f"trial{n:03d}_seed{seed}" for n in range(8) for seed in (100, 101)]
    # The fourth proposal's first run is finished, and it is told as such with its second.
    assert sorted({*first.names, *second.names}) == names
    assert set(first.names) & set(second.names) <= {"trial003_seed100"}
    assert len(search(third, 10)) == 10
    assert sorted(third.names) == [f"trial{n:03d}_seed{s}" for n in (8, 9) for s in (100, 101)]
    rates = [row["learning-rate"] for row in search(Trained(), 10)]
    assert len(set(rates)) == 10  # a sampler that began anew would propose the first ones again


def test_a_failed_run_fails_its_proposal_alone(search, capsys):
    rows = search(Trained(fail=lambda name: name == "trial001_seed101"), 5)
    assert sorted(int(row["trial"]) for row in rows) == [0, 2, 3, 4]
    assert "trial 1: failed, see" in capsys.readouterr().out
    assert "4 proposals, 1 failed" in Path("out/table.md").read_text()


def test_ranges_are_whole_or_not_and_linear_or_not(tmp_path):
    from totalprop.scripts.studies.grid import Grid

    axes = {"a": ["1..9"], "b": ["0.5..1"], "c": ["1e-5..1e-2:log"], "d": ["1..2", "3"]}
    found = tune.space_of(Grid(["daappo"], axes, [100], [])).distributions
    kinds = optuna.distributions
    assert found["a"] == kinds.IntDistribution(1, 9)
    assert found["b"] == kinds.FloatDistribution(0.5, 1.0)
    assert found["c"] == kinds.FloatDistribution(1e-5, 1e-2, log=True)
    assert found["d"] == kinds.CategoricalDistribution(("1..2", "3"))


@pytest.mark.parametrize(
    ("words", "flags", "message"),
    [
        ("--seeds 7 100", "", "seeds that no report uses, from 100 on, got 7"),
        ("--tune 0", "", "--tune must be at least 1, got 0"),
        ("--slurm local", "", "--tune needs each result before it proposes more"),
        ("--address auto --jobs 0", "", "--jobs must be at least 1"),
        ("--watch x", "", "--watch and --beside are for a sweep's report"),
        ("--vary batch-size --values 9..1", "", "9..1 is not a range"),
        ("--vary batch-size --values 8..x", "", "8..x is not a range"),
        ("--vary n-steps --values 0..9:log", "", "0..9:log is not a range"),
        ("--vary lam --values 0.5..1.5", "", "lam"),
        ("--vary lamb --values 0.5..1", "", "lamb"),
    ],
)
def test_what_is_no_search_is_refused_before_any_run(search, words, flags, message, capsys):
    executor = Trained()
    with pytest.raises(SystemExit) as stop:
        search(executor, 3, words, flags)
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not executor.names


def test_another_space_needs_another_folder(search, capsys):
    search(Trained(), 2)
    with pytest.raises(SystemExit):
        search(Trained(), 2, flags="--total-timesteps 500")
    assert "choose another --out" in capsys.readouterr().err


@pytest.mark.parametrize("executor", [executors.in_threads, executors.on_ray])
def test_a_run_may_depend_on_earlier_ones(executor, tmp_path):
    """With one at a time, a run is asked for after the result of the one before is known."""
    told = []

    def finished():
        for n in range(3):
            assert len(told) == n
            run = Trial(f"t{n}", "runs", (), str(tmp_path))
            run.folder.mkdir(parents=True)
            (run.folder / "summary.json").write_text("{}")
            yield run

    for run, succeeded in executor(finished(), 1):
        told.append((run.name, succeeded))
    assert told == [("t0", True), ("t1", True), ("t2", True)]


@pytest.mark.timeout(300)
def test_it_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "chosen", lambda **_: executors.in_threads)
    words = "daappo --tune 2 --vary gamma --values 0.9..0.99 --seeds 100 --out out --jobs 1"
    run = "--env-id Pendulum-v1 --total-timesteps 64 --n-steps 32 --eval-episodes 2 --batch-size 32"
    sweep.main([*words.split(), "--", *run.split()])
    with open("out/trials.csv") as file:
        rows = list(csv.DictReader(file))
    config = json.loads(Path("out/best.json").read_text())
    assert len(rows) == 2 and config["arguments"]["gamma"] == float(rows[0]["gamma"])
