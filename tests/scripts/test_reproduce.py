"""Reproductions: the rule of the verdicts, their intervals, the commands, and every claim."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from totalprop.estimators import make
from totalprop.scripts.commands import REPRODUCTIONS, parser_of
from totalprop.scripts.reproduce import command, intervals, many_actions, svg, tpx
from totalprop.scripts.reproduce.command import ENTRIES, folder_of, judged, parts_of
from totalprop.scripts.reproduce.protocol import Data, Missing
from totalprop.scripts.reproduce.verdicts import LEVEL, Part, Rule, Verdict, decide
from totalprop.scripts.run.arguments import parse as parse_train
from totalprop.scripts.studies import chaos, dreamer, pipps_table
from totalprop.scripts.studies.chaos_report import Measured
from totalprop.scripts.studies.grid import read_grid
from totalprop.scripts.studies.measurements import Measurements, write_measurements
from totalprop.scripts.studies.policy_line import estimator_named

ROOT = Path(__file__).parents[2]
REPRODUCED, NOT, OPEN = Verdict.REPRODUCED, Verdict.NOT_REPRODUCED, Verdict.NOT_DECIDABLE

# ---------------------------------------------------------------------------- verdicts


def part(low, high, wide=0.0):
    """A part with that 95 % interval, wider by `wide` on both sides at higher levels."""
    return Part(
        "",
        (low + high) / 2,
        lambda level: (low, high) if level == LEVEL else (low - wide, high + wide),
    )


@pytest.mark.parametrize(
    ("rule", "ends", "verdict"),
    [
        (Rule(), (0.1, 2), REPRODUCED), (Rule(), (-2, -0.1), NOT), (Rule(), (-1, 1), OPEN),
        (Rule(), (0, 1), OPEN), (Rule(low=1), (0.5, 2), OPEN), (Rule(low=1), (1.1, 2), REPRODUCED),
        (Rule(-1, 1), (-0.5, 0.9), REPRODUCED), (Rule(-1, 1), (1.1, 3), NOT),
        (Rule(-1, 1), (-3, -1.1), NOT), (Rule(-1, 1), (0.5, 1.5), OPEN),
        (Rule(-1, 1), (-2, 2), OPEN), (Rule(), (math.nan, math.nan), OPEN),
        (Rule(), (-math.inf, math.inf), OPEN),
    ],
)  # fmt: skip
def test_an_interval_inside_reproduces_and_outside_contradicts(rule, ends, verdict):
    assert decide([part(*ends)], rule) is verdict


YES, NO, MAYBE = part(1, 2), part(-2, -1), part(-1, 1)


@pytest.mark.parametrize(
    ("needs", "parts", "verdict"),
    [
        ("all", [YES, YES], REPRODUCED), ("all", [YES, MAYBE], OPEN), ("all", [YES, NO], NOT),
        ("all", [], Verdict.NOT_MEASURED), ("most", [], Verdict.NOT_MEASURED),
        ("most", [YES, YES, NO], REPRODUCED), ("most", [YES, MAYBE, MAYBE], OPEN),
        ("most", [YES, YES, NO, NO], NOT),  # half are no majority
        ("most", [YES, NO, MAYBE], OPEN), ("most", [NO, NO, YES], NOT),
    ],
)  # fmt: skip
def test_a_claim_of_all_needs_all_parts_and_one_of_most_more_than_half(needs, parts, verdict):
    assert decide(parts, Rule(needs=needs)) is verdict


def test_chance_contradicts_a_claim_of_many_parts_no_more_often_than_one_of_one():
    """One of two parts lies outside at 95 %, but not at 97.5 %."""
    assert decide([YES, part(-2, -0.1, wide=0.2)], Rule()) is OPEN
    assert decide([part(-2, -0.1, wide=0.2)], Rule()) is NOT
    levels = []

    def interval(level):
        levels.append(level)
        return 1.0, 2.0

    decide([Part("", 1.5, interval)] * 5, Rule())
    assert sorted(set(levels)) == pytest.approx([0.95, 0.99])


# ---------------------------------------------------------------------------- intervals


def test_the_ratio_of_variances_is_that_of_the_scales():
    """A gradient 100 times another has 10⁴ times its variance, without any of the repeats, too."""
    g = np.random.default_rng(0).standard_normal(20)
    own = intervals.ratio_of_variances("", [(100 * g, g), (1e200 * g, 1e200 * g)])
    assert own.estimate == pytest.approx(2)  # the mean of 4 and 0
    assert own.interval(0.95) == pytest.approx((2, 2))
    loose = intervals.ratio_of_variances("", [(100 * g, g)], paired=False)
    low, high = loose.interval(0.95)
    assert low < 3.8 and high > 4.2 and loose.estimate == pytest.approx(4)


def test_the_interval_of_a_ratio_is_the_jackknifes():
    """By hand, for three repeats: variances without each of them, and t with two degrees."""
    a, b = np.array([0.0, 1.0, 3.0]), np.array([2.0, 3.0, 1.5])
    without = [
        math.log10(np.delete(a, i).var(ddof=1)) - math.log10(np.delete(b, i).var(ddof=1))
        for i in range(3)
    ]
    error = math.sqrt(2 / 3 * np.square(np.array(without) - np.mean(without)).sum())
    half = stats.t.ppf(0.975, 2) * error
    estimate = math.log10(a.var(ddof=1) / b.var(ddof=1))
    own = intervals.ratio_of_variances("", [(a, b)])
    further = intervals.UNSEEN  # of both: one of three repeats makes more than half of either
    assert own.interval(0.95) == pytest.approx(
        (estimate - half - further, estimate + half + further)
    )


@pytest.mark.parametrize(("tail", "least"), [(0.0, 0.92), (0.5, 0.9), (1.0, 0.8), (1.5, 0.8)])
def test_the_interval_of_a_ratio_covers_as_often_as_it_says(tail, least):
    """Of 300 ratios at 4 points, 30 repeats each, one side e^(sZ) times a normal number.

    The bootstrap covers the truth in 93, 88, 51 and 11 of 100.
    """
    generator, covered = np.random.default_rng(1), 0
    truth = math.log10(math.exp(2 * tail**2))
    for _ in range(300):
        scale = np.exp(tail * generator.standard_normal((4, 30)))
        pairs = [
            (own, generator.standard_normal(30))
            for own in scale * generator.standard_normal((4, 30))
        ]
        low, high = intervals.ratio_of_variances("", pairs, paired=False).interval(0.95)
        covered += low < truth < high
    assert covered / 300 > least


def test_the_difference_of_means_of_one_task_is_welchs():
    a, b = np.array([3.0, 4.0, 8.0]), np.array([1.0, 2.0, 2.5, 1.5])
    own = intervals.difference_of_means("", [a], [b])
    expected = stats.ttest_ind(a, b, equal_var=False)
    for level in (0.95, 0.99):
        assert own.interval(level) == pytest.approx(tuple(expected.confidence_interval(level)))
    assert own.estimate == pytest.approx(a.mean() - b.mean())


def test_tasks_are_averaged_and_their_errors_with_them():
    """Twice the same task: the same difference, and an error smaller by √2, with more freedom."""
    a, b = np.array([3.0, 4.0, 8.0]), np.array([1.0, 2.0, 3.0])
    once = intervals.difference_of_means("", [a], [b])
    twice = intervals.difference_of_means("", [a, a], [b, b])
    assert twice.estimate == pytest.approx(once.estimate)
    error = math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 3)
    freedom = error**4 / ((a.var(ddof=1) ** 2 + b.var(ddof=1) ** 2) / 9 / 2)
    half = stats.t.ppf(0.975, 2 * freedom) * error / math.sqrt(2)
    assert twice.interval(0.95)[1] - twice.estimate == pytest.approx(half)


def test_one_seed_decides_nothing():
    own = intervals.difference_of_means("", [np.array([900.0])], [np.array([1.0])])
    assert decide([own], Rule()) is OPEN


def test_the_mean_has_students_interval():
    x = np.array([3.0, 5.0, 4.5, 9.0])
    expected = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert intervals.mean_of("", x).interval(0.95) == pytest.approx(tuple(expected))


def test_the_difference_of_rates_is_newcombes():
    """Newcombe 1998, Table II, (a): 56/70 - 48/80, method 10: 0.0524 to 0.3339."""
    own = intervals.difference_of_rates("", (56, 70), (48, 80))
    assert own.interval(0.95) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert own.estimate == pytest.approx(0.2)


def test_a_known_interval_widens_as_a_normal_one():
    own = intervals.known("", 1.0, (0.0, 3.0))
    assert own.interval(0.95) == pytest.approx((0, 3))
    ratio = stats.norm.ppf(0.995) / stats.norm.ppf(0.975)
    assert own.interval(0.99) == pytest.approx((1 - ratio, 1 + 2 * ratio))


# ---------------------------------------------------------------------------- commands

STEPS = [
    pytest.param(name, scale, step, id=f"{name}-{scale}-{step.name}")
    for name, entry in ENTRIES.items()
    for scale, own in entry.scales.items()
    for step in own.steps
]


def options_of(name, scale="small", **changes):
    words = [name, "--scale", scale, "--out", "OUT", "--runs", "RUNS"]
    options = command.parse(words)
    for key, value in changes.items():
        setattr(options, key, value)
    return options


@pytest.mark.parametrize(("name", "scale", "step"), STEPS)
def test_every_step_is_a_command_that_is_understood(name, scale, step):
    own = ENTRIES[name].scales[scale]
    words = command.command_of(step, options_of(name, scale), own, [])
    n = len(step.command.split())
    assert words[:n] == step.command.split() and not any("{" in word for word in words)
    split = words.index("--") if "--" in words else len(words)
    options, flags = parser_of(step.command).parse_args(words[n:split]), words[split + 1 :]
    where = options.json.parent if step.command in ("variance", "bench") else options.out
    assert where == folder_of(Path("OUT"), name, scale) / step.name
    if step.command == "sweep":
        settings = list(read_grid(options, flags).settings().values())
        for setting in {id(own): own for own in (settings[0], settings[-1])}.values():
            parse_train(setting.command(0), usage="")  # 50 ms each
        assert options.seeds == list(step.seeds or own.seeds) and options.runs.parent == Path(
            "RUNS"
        )
    for estimator in getattr(options, "estimators", None) or []:
        if step.command != "sweep":
            estimator_named(estimator)
        elif estimator != "gr":
            make(estimator)
    assert step.trains == (step.command in ("sweep", "study dreamer", "study pipps-table"))


def test_a_diagnosis_reads_the_run_that_its_training_leaves():
    scale = ENTRIES["tpx-fig7"].scales["small"]
    steps = {step.name: step for step in scale.steps}
    for name in tpx.SMALL_MODELS:
        training, diagnosis = steps[f"train_{name}"], steps[name]
        assert training.prepares == name
        options = options_of("tpx-fig7")
        words = command.command_of(training, options, scale, [])
        run = parser_of("sweep").parse_args(words[1 : words.index("--")])
        ((seed,), (estimator,)) = run.seeds, run.estimators
        where = command.command_of(diagnosis, options, scale, [])[1]
        assert Path(where) == run.runs / f"{estimator}_seed{seed}"
        assert "--save-replay" in words


def test_names_are_those_of_the_command_line_and_keys_differ():
    assert tuple(ENTRIES) == REPRODUCTIONS
    for entry in ENTRIES.values():
        assert set(entry.scales) == {"small", "paper"} and entry.claims and entry.figures
        keys = [claim.key for claim in entry.claims]
        assert len(set(keys)) == len(keys)
        for scale in entry.scales.values():
            names = [step.name for step in scale.steps]
            assert len(set(names)) == len(names)
            assert {step.prepares for step in scale.steps} <= {"", *names}


def test_the_published_shares_are_those_that_the_text_sums_up():
    """Sec. 3: "the policy is responsible for around 90% of SPG variance"."""
    shares = [many_actions.published_share(task) for task in many_actions.TASKS]
    assert np.mean(shares) == pytest.approx(0.9, abs=0.005)


# ---------------------------------------------------------------------------- claims


def verdicts(name, data):
    return {claim["key"]: claim["verdict"] for claim in judged(ENTRIES[name], data)}


def sweep_file(path, levels, **more):
    """A sweep's results.json: label -> mean return, with 4 seeds about it."""
    results = {}
    for label, level in levels.items():
        for seed, shift in enumerate(more.get("spread", 1) * np.array([-4.0, -1.0, 1.0, 4.0])):
            value = level + shift
            entry = {"returns": [more.get("first", 0.0) + shift, value, value]}
            entry |= {"final_return": value, "final_cost": value, "timesteps": [1, 2, 3]}
            entry["seconds"] = more.get("seconds", {}).get(label, 10.0) + shift / 10
            results.setdefault(label, {})[str(seed)] = entry
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"command": "totalprop sweep", "commit": "x", "results": results}))
    return path


CURVES = [  # name, step's suffix and label of what is better, and of what is worse, by claim
    ("daa-fig1", {"actions": [("actions", "rewind"), ("ppo", "none")],
                  "actions-states": [("actions", "rewind"), ("states", "none")]}),
    ("daa-fig3", {"daa-ppo": [("", "dynamics"), ("", "none")],
                  "daa-qaa": [("", "dynamics"), ("", "q")]}),
    ("daa-fig4", {"comparable": [("", "dynamics"), ("", "states")]}),
    ("daa-fig5", {"more": [("", "16"), ("", "4")]}),
    ("daa-fig6", {"shorter": [("", "8"), ("", "32")]}),
    ("daa-fig7", {"boosts": [("dynamics", "true"), ("dynamics", "false")],
                  "still-better": [("dynamics", "true"), ("none", "true")]}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "claims"), CURVES, ids=[name for name, _ in CURVES])
@pytest.mark.parametrize(
    ("gap", "verdict"), [(100.0, REPRODUCED), (-100.0, NOT)], ids=["better", "worse"]
)
def test_learning_curves_decide_which_is_better(name, claims, gap, verdict, tmp_path):
    levels = {}
    for better, worse in claims.values():
        levels[better], levels[worse] = 400 + gap, 400.0
    data = Data()
    for task in ("cartpole-swingup", "walker-walk"):
        for suffix in {suffix for suffix, _ in levels}:
            step = f"{task}_{suffix}" if suffix else task
            own = {label: level for (s, label), level in levels.items() if s == suffix}
            data[step] = sweep_file(tmp_path / step / "results.json", own)
    assert verdicts(name, data) == dict.fromkeys(claims, verdict.value)
    assert set(verdicts(name, Data()).values()) == {"not measured"}
    raw = ENTRIES[name].raw(data)
    (label, _), *_ = raw[
        "cartpole-swingup" if "cartpole-swingup" in raw else next(iter(raw))
    ].items()
    assert label in {label for _, label in levels}


def test_svg_learns_if_its_returns_rise(tmp_path):
    rising = Data(cartpole=sweep_file(tmp_path / "a.json", {"1-er": 500, "1": 300}))
    assert verdicts("svg-fig", rising) == {"simultaneous": "reproduced", "replay": "reproduced"}
    falling = Data(cartpole=sweep_file(tmp_path / "b.json", {"1-er": 100, "1": 300}, first=600.0))
    assert verdicts("svg-fig", falling) == dict.fromkeys(
        ("simultaneous", "replay"), "not reproduced"
    )
    assert set(svg.TASKS) >= {"swimmer3", "cartpole", "walker"}


def test_learning_rates_decide_who_is_robust(tmp_path):
    def data(rp, lr, tp, tpx, seconds):
        return Data({
            f"rate_{rate}": sweep_file(
                tmp_path / f"{rp}_{rate}" / "results.json",
                {"rp": rp, "lr": lr, "tp": tp, "tpx-unclipped": tpx}, seconds=seconds,
                spread=0.2,
            )
            for rate in ("0.01", "0.03")
        })  # fmt: skip

    as_published = data(40, 9, 2, 2, {"tp": 20.0})
    assert set(verdicts("tpx-fig8", as_published).values()) == {"reproduced"}
    other = data(2, 30, 20, 9, {"tpx-unclipped": 20.0})
    assert set(verdicts("tpx-fig8", other).values()) == {"not reproduced"}
    pictures = ENTRIES["tpx-fig8"].figures
    assert len(pictures["robustness"](as_published).axes[0].get_lines()) >= 5
    one_rate = Data(list(as_published.items())[:1])
    assert len(parts_of(ENTRIES["tpx-fig8"].claims[0], one_rate)) == 4


def rates_file(path, successes, n):
    """A file of `study pipps-table`: cell -> successes of n runs."""
    rows = [
        {**cell._asdict(), "seed": seed, "costs": [30.0, 7.0 if seed < k else 29.0]}
        for cell, k in successes.items()
        for seed in range(n)
    ]
    path.write_text(json.dumps({"flags": [], "runs": rows}))
    return Data(rates=path)


@pytest.mark.parametrize("is_as_published", [True, False])
def test_success_rates_decide_the_tables(is_as_published, tmp_path):
    """The published numbers support the claims that are made of them; their opposites do not."""
    rates = {
        pipps_table.Cell(*place, method): rate if is_as_published else 1 - rate
        for place, row in pipps_table.PUBLISHED.items()
        for method, rate in row.items()
    }
    if not is_as_published:
        rates[pipps_table.Cell("unicycle", 1.0, "TP")] = 0.3  # else it still matches PILCO
        rates[pipps_table.Cell("unicycle", 1.0, "PILCO")] = 0.9
    n = pipps_table.PUBLISHED_RUNS
    data = rates_file(
        tmp_path / "results.json", {cell: round(n * x) for cell, x in rates.items()}, n
    )
    found = verdicts("pipps-table2", data) | verdicts("pipps-table1", data)
    wanted = dict.fromkeys(found, "reproduced" if is_as_published else "not reproduced")
    assert found == wanted
    (beside,) = [
        n for n in ENTRIES["pipps-table2"].numbers if n.what == "success of TP, angle, k = 16"
    ]
    assert beside.published == "0.40" and beside.ours(data) == (
        "0.40 (40/100)" if is_as_published else "0.60 (60/100)"
    )


def scores_file(path, levels):
    """A file of `study dreamer`: (H, gradient) -> mean score, on each task and three seeds."""
    rows = [
        {"task": task, "horizon": h, "gate": "blocked", "gradient": g, "seed": seed,
         "score": level + 0.01 * seed}
        for task in dreamer.TASKS for (h, g), level in levels.items() for seed in range(3)
    ]  # fmt: skip
    rows += [{**row, "gate": "open", "score": 1 - row["score"]} for row in rows]  # of the study
    path.write_text(json.dumps({"flags": [], "runs": rows}))
    return Data(training=path)


@pytest.mark.parametrize(
    ("rp", "lr", "tpx", "found"),
    [  # scores at H of 15 and 60, and the verdicts on long, short and both horizons
        ((0.8, 0.1), (0.1, 0.8), (0.8, 0.8), [REPRODUCED] * 3),
        ((0.8, 0.8), (0.8, 0.8), (0.2, 0.2), [NOT] * 3),
        ((0.0, 0.0), (0.0, 0.0), (0.0, 0.0), [NOT] * 3),  # nobody learns
        ((0.9, 0.9), (0.9, 0.9), (1.0, 1.0), [NOT, NOT, REPRODUCED]),  # nobody performs poorly
    ],
)
def test_scores_decide_the_profiles(rp, lr, tpx, found, tmp_path):
    levels = {
        (h, name): own[i]
        for i, h in enumerate((15, 60))
        for name, own in (("rp", rp), ("lr, latent", lr), ("tpx", tpx))
    }
    data = scores_file(tmp_path / "results.json", levels)
    keys = ("long-horizon", "short-horizon", "both-horizons")
    assert verdicts("tpx-fig6", data) == {key: own.value for key, own in zip(keys, found)}
    assert len(ENTRIES["tpx-fig6"].figures["figure"](data).axes) == 2


def test_the_suite_decides_the_profiles_at_the_papers_scale(tmp_path):
    data = Data()
    for task in tpx.SUITE[:2]:
        for horizon in (15, 60):
            levels = {"rp": 900 - 10 * horizon, "lr": 14 * horizon - 50, "tpx-unclipped": 790}
            path = tmp_path / f"{task}_{horizon}.json"
            data[f"{task}_h{horizon}"] = sweep_file(path, levels)
    assert set(verdicts("tpx-fig6", data).values()) == {"reproduced"}
    data["time"] = ROOT / "results" / "bench" / "dreamer.json"
    times = [number.ours(data) for number in ENTRIES["tpx-fig6"].numbers]
    assert times == ["0.94 (2 threads)", "0.99 (2 threads)"]
    assert "time" not in ENTRIES["tpx-fig6"].raw(data)
    with pytest.raises(Missing):
        ENTRIES["tpx-fig6"].figures["figure"](Data(time=data["time"]))


def diagnosis(path, snr):
    """A file of `diagnose`: estimator -> H -> mean ratio, of 12 states about it."""
    spread = np.linspace(0.9, 1.1, 12)
    results = {
        name: {
            str(h): {"snr": (level * spread).tolist(), "esnr": level} for h, level in own.items()
        }
        for name, own in snr.items()
    }
    path.write_text(json.dumps({"results": results}))
    return path


def test_signal_to_noise_ratios_decide_fig_7(tmp_path):
    as_published = {"rp": {5: 10, 60: 0.5}, "lr": {5: 1, 60: 5}, "tps": {5: 10, 60: 6},
                    "tpx": {5: 10, 60: 6}}  # fmt: skip
    data = Data(pendulum_3000=diagnosis(tmp_path / "a.json", as_published))
    data["balance_repeat8"] = diagnosis(tmp_path / "b.json", as_published)
    assert set(verdicts("tpx-fig7", data).values()) == {"reproduced"}
    reverse = {"rp": {5: 1, 60: 9}, "lr": {5: 9, 60: 1}, "tps": {5: 9, 60: 9},
               "tpx": {5: 1, 60: 1}}  # fmt: skip
    data["balance_repeat8"] = diagnosis(tmp_path / "c.json", reverse)
    data["pendulum_3000"] = diagnosis(tmp_path / "d.json", reverse)
    assert set(verdicts("tpx-fig7", data).values()) == {"not reproduced"}
    normalised = ENTRIES["tpx-fig7"].raw(data)["normalised ESNR"]
    assert normalised["lr"] == {5: pytest.approx(1), 60: pytest.approx(1 / 9)}


def test_a_model_without_an_estimator_or_a_horizon_is_left_out(tmp_path):
    data = Data(
        pendulum_3000=diagnosis(tmp_path / "a.json", {"rp": {5: 1, 60: 4}, "tpx": {5: 1, 60: 8}}),
        balance_repeat8=diagnosis(tmp_path / "b.json", {"rp": {5: 1}, "tpx": {5: 4}, "lr": {5: 1}}),
    )
    parts = parts_of(ENTRIES["tpx-fig7"].claims[0], data)
    found = {p.what: p.estimate for p in parts}
    assert found == {
        "tpx / rp at H = 5": pytest.approx(np.log10(4) / 2),  # the mean over both models
        "tpx / rp at H = 60": pytest.approx(np.log10(2)),
        "tpx / lr at H = 5": pytest.approx(np.log10(4)),
    }


def test_signal_to_noise_ratios_decide_the_ablation(tmp_path):
    names = ("tpx", "tpx-scalar", "tpx-ivw", "tpx-ivw-scalar")

    def found(*levels):
        snr = {name: {5: level, 60: level / 2} for name, level in zip(names, levels)}
        return verdicts(
            "tpx-ablation", Data(pendulum_1500=diagnosis(tmp_path / f"{levels}.json", snr))
        )

    assert found(10, 5, 10, 5) == {"vector-k": "reproduced", "covariance": "reproduced"}
    assert found(5, 10, 20, 40) == {"vector-k": "not reproduced", "covariance": "not reproduced"}


def test_the_policys_share_decides_table_1(tmp_path):
    def record(share, low, high):
        path = tmp_path / f"{share}.json"
        rows = {"policy_share": share, "intervals": {"policy_share": [low, high]}}
        path.write_text(json.dumps(rows))
        return path

    mostly, hardly = record(0.9, 0.7, 1.1), record(0.2, 0.1, 0.3)
    data = Data({"cartpole-swingup": mostly, "walker-walk": mostly})
    assert verdicts("daa-table1", data) == {"share": "reproduced"}
    data["walker-walk"] = hardly
    assert verdicts("daa-table1", data) == {"share": "not reproduced"}
    (tmp_path / "old.json").write_text('{"policy_share": 0.9}')
    assert verdicts("daa-table1", Data({"cartpole-swingup": tmp_path / "old.json"})) == {
        "share": "not measured"
    }


def chaos_file(path, study, scale):
    """A file of `totalprop chaos` whose gradients have the standard deviations of `scale`."""
    g = np.random.default_rng(0).standard_normal(30)
    seconds = chaos.SECOND_BETAS if study == "double" else [None]
    keys, settings = chaos.KEYS[study], {"study": study, "samples": 9}
    file = Measurements(path, settings, keys=keys, values=chaos.NUMBERS, command="totalprop chaos")
    file.rows = {
        (*map(str, betas), e): [*chaos.cells(Measured(scale(e, *betas) * g, 1.0)), "0"]
        for second in seconds
        for b in chaos.GRIDS[study]
        for betas in [(b,) if second is None else (b, second)]
        for e in tpx.FIG3
    }
    file.write()
    return path


def test_variances_decide_fig_3(tmp_path):
    def as_published(estimator, b, second=1.5):
        rp, lr = (1e-3, 1.0) if b < 2.5 else (1e9, 1.0)
        other = {1.5: 1e-4, 2.5: 10.0, 3.5: 1e3}[second]
        tp = min(rp, 0.01 if b in (2.45, 2.5) else lr) if second == 1.5 else max(other, 1.0)
        both = tp if second == 1.5 else min(rp, 0.01 if b in (2.45, 2.5) else lr)
        return {"rp": 10.0 if b == 2.45 else rp, "lr": lr, "tp": tp, "tpx": both}[estimator]

    def data(scale):
        return Data({
            study: chaos_file(tmp_path / f"{study}.csv", study, scale) for study in chaos.GRIDS
        })  # fmt: skip

    assert set(verdicts("tpx-fig3", data(as_published)).values()) == {"reproduced"}

    def other(estimator, b, second=1.5):  # RP best in chaos, LR where it is stable, TPX as TP
        rp = 1.0 if b > 2.5 else 1e3
        tp = 100.0 * second
        return {"rp": rp, "lr": 30.0, "tp": tp, "tpx": 1e4 if second == 1.5 else tp}[estimator]

    assert set(verdicts("tpx-fig3", data(other)).values()) == {"not reproduced"}


def landscape_file(path, growth, distance):
    """A line whose value is a parabola, and estimators with a growth and a distance from it."""
    deltas = np.linspace(0, 6, 7)
    rows = []
    for delta in deltas:
        rows.append([delta, "value", delta**2, 1.0, 1.0, 0])
        for name in growth:
            variance = 1e-6 * growth[name] ** (delta / 6)
            rows.append([delta, name, 2 * delta + distance[name], variance, 1.0, 0])
    columns = (*command.pipps.pipps_landscape.KEYS, *command.pipps.pipps_landscape.NUMBERS, "run")
    settings = {"particles": 1000, "seed": 0, "direction": 0, "runs": []}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_measurements(path, settings, columns, rows)
    return path


@pytest.mark.parametrize(
    ("growth", "distance", "verdict"),
    [
        ({"rp": 1e6, "lr+biw": 10, "tp+biw": 100}, {"rp": 9, "lr+biw": 0.1, "tp+biw": 0.2},
         "reproduced"),
        ({"rp": 10, "lr+biw": 1e3, "tp+biw": 10}, {"rp": 0.1, "lr+biw": 1, "tp+biw": 0.1},
         "not reproduced"),
    ],
)  # fmt: skip
def test_lines_decide_the_curse_of_chaos(growth, distance, verdict, tmp_path):
    data = Data(landscape=landscape_file(tmp_path / "l.csv", growth, distance))
    assert set(verdicts("pipps-fig2", data).values()) == {"not measured"}  # it was chosen
    for d in (0, 1, 2):
        own = {name: x * (1 + 0.1 * d) for name, x in growth.items()}
        data[f"direction_{d}"] = landscape_file(tmp_path / f"{d}.csv", own, distance)
    assert set(verdicts("pipps-fig2", data).values()) == {verdict}


@pytest.mark.parametrize(("better", "verdict"), [(True, "reproduced"), (False, "not reproduced")])
def test_variances_by_particles_decide_fig_3_of_pipps(better, verdict, tmp_path):
    g = np.random.default_rng(0).standard_normal(30)
    scales = {"rp": 1e4, "lr": 10.0, "lr+biw": 3.0, "tp+biw": 1.0}
    if not better:
        scales = {"rp": 0.5, "lr": 1.0, "lr+biw": 3.0, "tp+biw": 10.0}
    module = command.pipps.pipps_particles
    rows = [
        [delta, n, name, 1.0, " ".join(f"{x:.8g}" for x in scale * g), 0]
        for delta in (0, 6) for n in (25, 50) for name, scale in scales.items()
    ]  # fmt: skip
    path = tmp_path / "particles.csv"
    write_measurements(
        path, {"repeats": 30, "runs": []}, (*module.KEYS, *module.NUMBERS, "run"), rows
    )
    assert set(verdicts("pipps-fig3", Data(particles=path)).values()) == {verdict}
    save = ENTRIES["pipps-fig3"].numbers[0].ours(Data(particles=path))
    assert save.startswith("89% (P = 25)" if better else "-1011% (P = 25)")


# ---------------------------------------------------------------------------- the command

TINY = ["--", "--total-timesteps", "60", "--gradient-steps", "1", "--gp-evaluations", "5"]


def test_a_reproduction_trains_decides_and_goes_on(tmp_path, capsys, sweep_by_fork, monkeypatch):
    """In seconds: the smallest runs say nothing, and the report says that."""
    sweep_by_fork()
    monkeypatch.setattr(command, "current_commit", lambda: "abc")  # it starts git
    steps = tpx._fig8_steps(("tp", "tpx-unclipped"), ("0.03",), "--n-particles", "20")
    entry = ENTRIES["tpx-fig8"]
    small = entry.scales["small"]._replace(steps=steps, seeds=(0,))
    monkeypatch.setitem(ENTRIES, "tpx-fig8", entry._replace(scales={"small": small}))
    out, runs = tmp_path / "out", tmp_path / "runs"
    words = ["tpx-fig8", "--out", str(out), "--runs", str(runs), "--jobs", "1"]
    command.main([*words, *TINY])
    text = capsys.readouterr().out
    assert "rate_0.03: totalprop sweep pipps --estimators tp tpx-unclipped --seeds 0" in text
    folder = out / "tpx-fig8"
    for name in ("figure", "robustness"):
        assert (folder / f"{name}.png").stat().st_size > 10_000
        assert (folder / f"{name}.svg").read_text().startswith("<?xml")
    record = json.loads((folder / "verdicts.json").read_text())
    found = {claim["key"]: claim for claim in record["claims"]}
    assert found["outperform"]["verdict"] == "not measured"  # without RP and LR
    assert found["matches"]["verdict"] == "not decidable at this scale"
    assert found["matches"]["parts"][0]["interval"] == [None, None]  # of one seed
    raw = json.loads((folder / "numbers.json").read_text())
    assert set(raw["raw"]["rate_0.03"]) == {"tp", "tpx-unclipped"}
    page = (folder / "table.md").read_text()
    assert page in text and "| TPX matches TP. | App. B | **not decidable at this scale** |" in page
    # Another seed: the runs that are there are not trained again.
    before = {path: path.stat().st_mtime_ns for path in runs.glob("*/*/summary.json")}
    assert len(before) == 2
    command.main([*words, "--seeds", "0", "1", *TINY])
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert len(list(runs.glob("*/*/summary.json"))) == 4
    # Stopped before the sweep's own report: the runs that are finished are reported, and no more.
    (folder / "rate_0.03" / "results.json").unlink()
    command.main([*words, "--report-only", "--seeds", "0", "1", "2", *TINY])
    assert len(list(runs.glob("*/*/summary.json"))) == 4
    record = json.loads((folder / "verdicts.json").read_text())
    assert record["missing"] == ["2 of 6 runs of rate_0.03"]
    command.main([*words, "--seeds", "0", "1", *TINY])
    capsys.readouterr()
    command.main(["tpx-fig8", "--list", "--out", str(out)])
    listed, record = capsys.readouterr().out, json.loads((folder / "verdicts.json").read_text())
    for claim in record["claims"]:
        assert f"  {claim['verdict']}: {claim['claim']}\n" in listed


def test_without_a_name_all_are_listed(tmp_path, capsys):
    command.main(["--out", str(tmp_path)])
    listed = capsys.readouterr().out
    for name, entry in ENTRIES.items():
        assert f"{name}: {entry.title}" in listed
        for claim in entry.claims:
            assert f"not measured: {claim.text}" in listed


def test_committed_measurements_are_read_and_not_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_run", lambda *_: pytest.fail("measured"))
    options = ["daa-fig4", "--from", str(ROOT / "results"), "--out", str(tmp_path)]
    command.main(options)
    assert "Not measured yet" not in (tmp_path / "daa-fig4" / "table.md").read_text()
    record = json.loads((tmp_path / "daa-fig4" / "verdicts.json").read_text())
    assert [part["what"] for part in record["claims"][0]["parts"]] == [
        many_actions.TASKS[i] for i in (0, 1, 5)
    ]


def committed(source, name):
    """A copy of a committed results.json of DAAPPO in a folder laid out as results/."""
    path = source / "daa_ppo" / name / "results.json"
    path.parent.mkdir(parents=True)
    path.write_text((ROOT / "results" / "daa_ppo" / name / "results.json").read_text())
    return path


def edited(path, change):
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def test_what_a_kept_file_lacks_is_trained_and_it_is_not_touched(tmp_path, monkeypatch):
    path = committed(tmp_path / "kept", "walker-walk")
    edited(path, lambda record: record["results"]["states"].pop("2"))
    before, started = path.read_text(), []

    def run(step, words):
        own = tmp_path / "out" / "daa-fig4" / step.name / "results.json"
        started.append((step.name, own.exists() and own.read_text() == before))
        return True

    monkeypatch.setattr(command, "_run", run)
    command.main(["daa-fig4", "--from", str(tmp_path / "kept"), "--out", str(tmp_path / "out")])
    tasks = ("cartpole-swingup", "ball_in_cup-catch", "walker-walk")
    assert started == [(task, task == "walker-walk") for task in tasks]
    assert path.read_text() == before
    # Another seed of what is whole.
    started.clear()
    whole = ["--from", str(ROOT / "results"), "--out", str(tmp_path / "more")]
    command.main(["daa-fig4", *whole, "--seeds", "0", "1", "2"])
    assert not started
    command.main(["daa-fig4", *whole, "--seeds", "0", "1", "2", "3"])
    assert [name for name, _ in started] == list(tasks)


def test_a_report_of_a_part_says_so_wherever_its_verdicts_are(tmp_path, capsys):
    path = committed(tmp_path / "kept", "cartpole-swingup")
    edited(path, lambda record: record["results"]["none"].pop("2"))
    words = ["daa-fig3", "--from", str(tmp_path / "kept"), "--out", str(tmp_path), "--report-only"]
    command.main(words)
    missing = ["1 of 9 runs of cartpole-swingup", "ball_in_cup-catch", "walker-walk"]
    record = json.loads((tmp_path / "daa-fig3" / "verdicts.json").read_text())
    assert record["missing"] == missing
    page = (tmp_path / "daa-fig3" / "table.md").read_text()
    assert f"Not measured yet: {', '.join(missing)}." in page
    claim = record["claims"][0]
    assert f"| Sec. 5.1, Fig. 3 | **{claim['verdict']} so far** |" in page
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(f"without --report-only measures what is missing: {', '.join(missing)}")
    command.main(["daa-fig3", "--list", "--out", str(tmp_path)])
    assert f"  {claim['verdict']} so far: {claim['claim']}\n" in capsys.readouterr().out


def test_runs_of_a_study_are_counted(tmp_path):
    words = ["pipps-table2", "--from", str(tmp_path), "--out", str(tmp_path), "--report-only"]
    rows = [
        {"task": "angle", "noise": 1.0, "method": "TP", "seed": seed, "costs": [9.0],
         "commit": "x"}
        for seed in (0, 1, 99)
    ]  # fmt: skip
    path = tmp_path / "pipps" / "success" / "results.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"flags": ["--scale", "small"], "runs": rows}))
    command.main(words)
    record = json.loads((tmp_path / "pipps-table2" / "verdicts.json").read_text())
    assert record["missing"] == ["138 of 140 runs of rates"]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("daa-fig3", lambda record: record.update(
            command=record["command"].replace("80000", "300000")), "total_timesteps=300000 of"),
        ("daa-fig3", lambda record: record.pop("command"), "was not written by a sweep"),
        ("daa-fig3", lambda record: record.update(results=[1]), "was not written by a sweep"),
    ],
)  # fmt: skip
def test_a_kept_file_of_another_protocol_is_refused(name, change, message, tmp_path, capsys):
    edited(committed(tmp_path / "kept", "walker-walk"), change)
    words = [name, "--from", str(tmp_path / "kept"), "--out", str(tmp_path / "out")]
    for more in ([], ["--report-only"]):
        with pytest.raises(SystemExit, match="1"):
            command.main([*words, *more])
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tpx-fig7", "--seeds", "3"], "the seeds of tpx-fig7 are part of its protocol"),
        (["daa-fig4", "--", "--gamma", "0.9"], "has runs with gamma=0.99 of dynamics, not 0.9"),
    ],
)
def test_what_would_have_no_effect_is_refused(words, message, tmp_path, monkeypatch, capsys):
    """It would be in the table, as the command that measured it."""
    monkeypatch.setattr(command, "_run", lambda *_: pytest.fail("measured"))
    given = ["--from", str(ROOT / "results"), "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        command.main([words[0], *given, *words[1:]])
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_runs_that_fail_are_named_at_the_end_and_the_others_reported(tmp_path, monkeypatch, capsys):
    def main(arguments):
        if "dmc/walker-walk-v0" in arguments:
            raise SystemExit("error: 1 of the runs failed; the report covers the others")

    monkeypatch.setattr(command, "import_module", lambda name: SimpleNamespace(main=main))
    kept = tmp_path / "kept"
    committed(kept, "cartpole-swingup")
    with pytest.raises(SystemExit, match="not all runs of walker-walk succeeded"):
        command.main(["daa-fig3", "--from", str(kept), "--out", str(tmp_path / "out")])
    assert "error: 1 of the runs failed" in capsys.readouterr().err
    record = json.loads((tmp_path / "out" / "daa-fig3" / "verdicts.json").read_text())
    assert record["missing"] == ["ball_in_cup-catch", "walker-walk"]


@pytest.mark.parametrize(
    ("name", "file", "rows"),
    [
        ("pipps-fig3", "pipps/particles/particles.csv", 5),
        ("pipps-fig3", "pipps/particles/particles.csv", 14),
        ("pipps-fig2", "pipps/landscape/landscape.csv", 40),
        ("tpx-fig3", "chaos/double.csv", 14),
    ],
)
def test_a_study_that_was_stopped_midway_has_a_report(name, file, rows, tmp_path):
    lines = (ROOT / "results" / file).read_text().splitlines()
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(lines[: 2 + rows]) + "\n")
    command.main([name, "--from", str(tmp_path), "--out", str(tmp_path), "--report-only"])
    assert "not measured" in (tmp_path / name / "table.md").read_text()


def test_a_reproduction_that_was_stopped_at_the_start_has_a_report(tmp_path):
    """Of a training that only prepares what is measured."""
    (step, *_) = [s for s in ENTRIES["tpx-fig7"].scales["small"].steps if s.prepares]
    path = tmp_path / "tpx-fig7" / step.name / step.file
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    command.main(["tpx-fig7", "--out", str(tmp_path), "--report-only"])
    assert json.loads((tmp_path / "tpx-fig7" / "numbers.json").read_text())["raw"] is None


def test_a_report_says_what_it_is_made_without(tmp_path):
    command.main(["tpx-fig7", "--from", str(ROOT / "results"), "--out", str(tmp_path),
                  "--report-only"])  # fmt: skip
    page = (tmp_path / "tpx-fig7" / "table.md").read_text()
    assert "Not measured yet: pendulum_1500, pendulum_3000." in page


COMMITTED = sorted((ROOT / "results" / "reproduce").glob("*/verdicts.json"))


def test_there_are_committed_verdicts():
    found = [
        claim["verdict"]
        for path in COMMITTED if path.parent.name != "tpx-fig3"
        for claim in json.loads(path.read_text())["claims"]
    ]  # fmt: skip
    assert found.count("reproduced") >= 5


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_committed_verdicts_follow_from_committed_numbers(path):
    record = json.loads(path.read_text())
    sources = json.loads(path.with_name("numbers.json").read_text())["from"]
    data = Data({step: ROOT / source for step, source in sources.items()})
    assert judged(ENTRIES[record["name"]], data) == record["claims"]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_the_gallery_shows_the_committed_verdicts(path):
    page = (ROOT / "docs" / "reproduce.md").read_text()
    assert f"../results/reproduce/{path.parent.name}/figure.png" in page
    record = json.loads(path.read_text())
    for claim, verdict in zip(record["claims"], command.shown_verdicts(record).values()):
        assert f"| {claim['claim']} | **{verdict}** |" in page


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["tpx-fig33"], 2, "invalid choice: 'tpx-fig33'"),
        (["tpx-fig3", "--scale", "huge"], 2, "invalid choice: 'huge'"),
        (
            ["pipps-fig2", "--from", str(ROOT / "results" / "pipps")],
            1,
            "holds nothing of pipps-fig2 at this scale, such as pipps/landscape/landscape.csv",
        ),
        (["tpx-fig8", "--from", str(ROOT / "results")], 1, "of which no measurements are kept"),
        (["tpx-fig3", "--from", "nowhere"], 2, "--from nowhere is no folder"),
        (["tpx-fig3", "--seeds", "0"], 2, "tpx-fig3 trains nothing, so it takes no --seeds"),
        (["tpx-fig3", "--", "--gamma", "1"], 2, "takes no flags after --"),
        (["daa-fig3", "--jobs", "0"], 2, "--jobs must be at least 1, got 0"),
        (["daa-fig3", "--seeds", "-1"], 2, "--seeds must be at least 0 and below 2^32, got -1"),
        (["daa-fig3", "--report-only"], 1, "nothing was measured"),
    ],
)
def test_what_is_wrong_is_one_sentence(words, code, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        command.main(words)
    assert left.value.code == code and message in capsys.readouterr().err


def test_a_file_of_something_else_is_named(tmp_path, capsys):
    (tmp_path / "tpx-fig3").mkdir()
    (tmp_path / "tpx-fig3" / "verdicts.json").write_text('{"claims": [1]}')
    with pytest.raises(SystemExit, match="1"):
        command.main(["--out", str(tmp_path)])
    assert "was not written by totalprop reproduce" in capsys.readouterr().err


def test_missing_is_said_of_a_step_that_was_not_run():
    with pytest.raises(Missing, match="rates has not been run"):
        Data()["rates"]
