"""Parmas et al. 2023 (TPX): Fig. 3, 6 and 7, App. B and the ablation of App. D."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from totalprop.scripts.reproduce import readers
from totalprop.scripts.reproduce.intervals import (
    bootstrapped,
    difference_of_means,
    difference_of_rates,
    ratio_of_variances,
    undecided,
)
from totalprop.scripts.reproduce.protocol import (
    Claim,
    Data,
    Missing,
    Number,
    Reproduction,
    Scale,
    Step,
)
from totalprop.scripts.reproduce.verdicts import Part, Rule
from totalprop.scripts.run.folder import read_json
from totalprop.scripts.studies.chaos import GRIDS, SECOND_BETAS
from totalprop.scripts.studies.chaos_report import Study
from totalprop.scripts.studies.dreamer import profiles
from totalprop.scripts.studies.learning_curves import profile_figure
from totalprop.scripts.studies.pipps_table import TASKS as PIPPS_TASKS
from totalprop.scripts.studies.styles import MARKERS, style_of

PAPER = "Parmas et al. 2023 (TPX)"
HALF_A_DECADE, TWOFOLD = 0.5, math.log10(2)
ALMOST_STABLE, EDGE, ALMOST_CHAOTIC = 2.3, 2.5, 2.7  # β

# ---------------------------------------------------------------------------- Fig. 3

STABLE = [b for b in GRIDS["double"] if b <= 2.2]
FIG3 = ("rp", "lr", "tp", "tpx")


def _pair(
    study: Study, betas: tuple[float, ...], first: str, second: str
) -> tuple[np.ndarray, np.ndarray]:
    return study[betas][first].g, study[betas][second].g


def _double(data: Data, first: str, second: str, at: Sequence[tuple[float, float]]) -> list[Part]:
    study = readers.chaos(data["double"])
    return [
        ratio_of_variances(
            f"{first} / {second} at β₁ = {betas[0]:g}, β₂ = {betas[1]:g}",
            [_pair(study, betas, first, second)],
        )
        for betas in at
    ]


def _unaffected(data: Data) -> list[Part]:
    study = readers.chaos(data["double"])
    return [
        ratio_of_variances(
            f"tpx at β₁ = {b:g}: β₂ = {other:g} / β₂ = 1.5",
            [(study[b, other]["tpx"].g, study[b, 1.5]["tpx"].g)],
            paired=False,
        )
        for other in SECOND_BETAS[1:]
        for b in STABLE
    ]


def _opposite(data: Data) -> list[Part]:
    study, parts = readers.chaos(data["single"]), []
    for b in GRIDS["single"]:
        names = ("lr", "rp") if b < ALMOST_STABLE else ("rp", "lr")
        if not ALMOST_STABLE <= b <= ALMOST_CHAOTIC:
            both = _pair(study, (b,), *names)
            parts.append(ratio_of_variances(f"{' / '.join(names)} at β = {b:g}", [both]))
    return parts


def _edge(data: Data) -> list[Part]:
    study = readers.chaos(data["single"])
    return [
        ratio_of_variances(f"{name} / tp at β = {EDGE:g}", [_pair(study, (EDGE,), name, "tp")])
        for name in ("rp", "lr")
    ]


def _fig3_raw(data: Data) -> dict[str, Any]:
    return {
        step: {
            "variance": {
                " ".join(f"{b:g}" for b in betas): {e: m.variance for e, m in point.items()}
                for betas, point in readers.chaos(data[step]).items()
            }
        }
        for step in ("double", "single")
        if step in data
    }


def _fig3_figure(data: Data) -> Figure:
    study = readers.chaos(data["double"])
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    for axis, second in zip(figure.subplots(1, len(SECOND_BETAS), sharey=True), SECOND_BETAS):
        points = sorted(betas for betas in study if betas[1] == second)
        for name in FIG3:
            y = [study[betas][name].variance for betas in points]
            style = {"ms": 4, "marker": MARKERS[name], **style_of(name)}
            axis.plot([b for b, _ in points], y, label=name, **style)
        axis.axvline(2.5, color="0.85", lw=4, zorder=0)
        axis.set(title=f"$\\beta_2 = {second:g}$", xlabel="$\\beta_1$", yscale="log")
        axis.set_ylim(1e-8, 1e6)
        axis.grid(alpha=0.25)
    figure.axes[0].set_ylabel("variance of $dL/d\\beta_1$")
    figure.axes[0].legend(frameon=False)
    return figure


def _chaos_step(study: str, *arguments: str) -> Step:
    own = ("--study", study, "--estimators", *FIG3, *arguments, "--out", "{out}")
    return Step(study, "chaos", own, f"{study}.csv", committed=f"chaos/{study}.csv")


FIG3_STEPS = (_chaos_step("double"), _chaos_step("single"))
FIG3_DIFFERS = (
    "the paper states neither H nor the number of samples and repeats; ours are 100, 1000 and 40; "
    "k of TPX is clipped to [0, 1]"
)
TPX_FIG3 = Reproduction(
    title="gradient variance of two parallel chaotic networks",
    source=f"{PAPER}, Sec. 5, Fig. 3",
    scales={
        "small": Scale(FIG3_STEPS, 0.1, FIG3_DIFFERS),
        "paper": Scale(FIG3_STEPS, 0.1, FIG3_DIFFERS),
    },
    claims=(
        Claim(
            "tp-poor", "With β₂ = 2.5 or 3.5, TP is poor where β₁ is in the stable region, since "
            "the inaccurate gradients of path 2 force weight on LR; TPX is not.", "Sec. 5",
            "log10 of the ratio of variances, above 1 (tenfold) at every β₁ up to 2.2",
            Rule(low=1.0),
            lambda data: _double(
                data, "tp", "tpx", list(itertools.product(STABLE, SECOND_BETAS[1:]))
            ),
        ),
        Claim(
            "tpx-unaffected", "TPX is not affected by the other path.", "Sec. 5",
            "log10 of TPX's variance with a chaotic path 2 over that with a stable one, within "
            "±0.5 (threefold) at every β₁ up to 2.2",
            Rule(-HALF_A_DECADE, HALF_A_DECADE), _unaffected,
        ),
        Claim(
            "similar", "With β₂ = 1.5, the other path being stable, TP and TPX perform similarly.",
            "Sec. 5", "log10 of the ratio of variances within ±0.5 (threefold) at every β₁",
            Rule(-HALF_A_DECADE, HALF_A_DECADE),
            lambda data: _double(data, "tpx", "tp", [(b, 1.5) for b in GRIDS["double"]]),
        ),
        Claim(
            "opposite", "In the well-behaved region RP is accurate and LR less so; in the chaotic "
            "one RP's variance explodes and LR is robust.", "Sec. 5",
            "log10 of the ratio of variances, the worse over the better, above 0 at every β of one "
            "chain below 2.3 and above 2.7",
            Rule(), _opposite,
        ),
        Claim(
            "edge", "At the edge of chaos TP outperforms both LR and RP by orders of magnitude.",
            "Sec. 5, from Parmas & Seno 2022",
            "log10 of the ratio of variances, above 2 (a hundredfold, as Sec. 3 says) at β = 2.5 "
            "of one chain, where Sec. 5 sees the transition",
            Rule(low=2.0), _edge,
        ),
    ),
    numbers=(
        Number(
            "gain of TP over the better of RP and LR at the edge, at most",
            "over 100 times (Sec. 3)",
            lambda data: "{:.0f} times".format(
                max(
                    min(point["rp"].variance, point["lr"].variance) / point["tp"].variance
                    for point in readers.chaos(data["single"]).values()
                )
            ),
        ),
    ),
    raw=_fig3_raw,
    figures={"figure": _fig3_figure},
)  # fmt: skip

# ---------------------------------------------------------------------------- Fig. 6


def _blocked(data: Data) -> list[dict[str, Any]]:
    """The runs of the study as DreamerV1 is; it may hold others, too."""
    return [row for row in readers.rows(data["training"]) if row["gate"] == "blocked"]


def _scores(data: Data, horizon: int, gradient: str) -> dict[str, np.ndarray]:
    """Task -> [seeds] scores, 0 for random actions (at the paper's scale for 0) and 1 at best.

    Raises:
        Missing: there are none.
    """
    found: dict[str, Any] = {}
    if "training" in data:  # the study, at the small scale
        for row in _blocked(data):
            if (row["horizon"], row["gradient"]) == (horizon, gradient):
                found.setdefault(row["task"], []).append(row["score"])
    else:
        label = "tpx-unclipped" if gradient == "tpx" else gradient.partition(",")[0]
        found = _finals(data, horizon, label)
    if not found:
        raise Missing(f"no runs of {gradient} at H = {horizon}")
    return {task: np.array(own) for task, own in found.items()}


def _better(data: Data, horizon: int, first: str, second: str, factor: float = 1.0) -> Part:
    """The mean score of the first, times the factor, less that of the second."""
    a, b = (_scores(data, horizon, gradient) for gradient in (first, second))
    tasks = [task for task in a if task in b]
    if not tasks:
        raise Missing(f"no task with {first} and {second} at H = {horizon}")
    scale = "" if factor == 1 else f"{factor:g} "
    what = f"{scale}{first} - {second} at H = {horizon}, mean over {', '.join(tasks)}"
    return difference_of_means(what, [factor * a[t] for t in tasks], [b[t] for t in tasks])


def _well(data: Data, horizon: int) -> Part:
    """TPX's mean score less that of a policy half as good as the best."""
    own = list(_scores(data, horizon, "tpx").values())
    half = [np.full(2, GOOD)] * len(own)
    return difference_of_means(f"tpx - {GOOD:g} at H = {horizon}", own, half)


def _poor_beside_tpx(horizon: int, gradient: str) -> Callable[[Data], list[Part]]:
    return lambda data: [
        _better(data, horizon, "tpx", gradient, factor=0.5), _well(data, horizon)
    ]  # fmt: skip


def _both_horizons(data: Data) -> list[Part]:
    return [
        _better(data, 15, "tpx", "rp"), _better(data, 60, "tpx", "lr, latent"),
        _well(data, 15), _well(data, 60),
    ]  # fmt: skip


def _time(data: Data, horizon: int) -> str:
    (row,) = read_json(data["time"])["rows"]
    return f"{row[f'tpx / rp at H={horizon}']:.2f} ({read_json(data['time'])['threads']} threads)"


def _fig6_raw(data: Data) -> Any:
    if "training" in data:
        return _blocked(data)
    steps = [step for step in data if step != "time"]
    return readers.sweeps_raw(data, steps, ["final return", "average return", "seconds"])


def _finals(data: Data, horizon: int, estimator: str) -> dict[str, Any]:
    """Task -> [seeds] final returns over 1000, of the sweeps over the suite."""
    return {
        task: readers.seeds(data, step, estimator, "final return") / 1000
        for task in SUITE
        if (step := f"{task}_h{horizon}") in data
    }


def _fig6_figure(data: Data) -> Figure:
    if "training" in data:
        return profiles(_blocked(data))
    lines = {
        f"{estimator}, H = {horizon}": list(own.values())
        for horizon in (15, 60)
        for estimator in ("rp", "lr", "tps", "tpx-unclipped")
        if (own := _finals(data, horizon, estimator))
    }
    if not lines:
        raise Missing("no runs")
    return profile_figure(lines, "estimator")


TIME = Step(
    "time", "bench", ("dreamer", "--json", "{out}/dreamer.json"), "dreamer.json",
    committed="bench/dreamer.json", resumes=False,
)  # fmt: skip
SUITE = (
    "cartpole-swingup", "cartpole-swingup_sparse", "cheetah-run", "cartpole-balance",
    "walker-walk", "walker-run", "finger-spin", "reacher-easy",
)  # fmt: skip
FIG6_PAPER = tuple(
    Step(
        f"{task}_h{horizon}",
        "sweep",
        ("dreamer", "--estimators", "rp", "lr", "tps", "tpx-unclipped"),
        "results.json",
        trains=True,
        flags=(
            "--preset", "tpx2023", "--env-id", f"dmc/{task}-v0",
            "--env-arg", "observation=pixels", "--env-arg", "action_repeat=2",
            "--horizon", str(horizon), "--total-timesteps", "500000", "--eval-every", "10000",
        ),
    )
    for task in SUITE
    for horizon in (15, 60)
)  # fmt: skip
GOOD = 0.5  # of the best known policy's score
POORLY = "half of TPX's mean score less the other one's, and TPX's less 0.5, above 0"
TPX_FIG6 = Reproduction(
    title="performance profiles of Dreamer at H = 15 and H = 60",
    source=f"{PAPER}, Sec. 6.2, Fig. 6",
    scales={
        "small": Scale(
            (
                Step(
                    "training", "study dreamer",
                    ("--gates", "blocked", "--gradients", "rp", "lr, latent", "tpx"),
                    "results.json", committed="dreamer/gradients/results.json", trains=True,
                ),
                TIME,
            ),
            12.0,
            "three tasks from state vectors instead of eight from pixels, 4000 to 10,000 "
            "decisions, 3 seeds instead of 4; the preset `recommended` (scaled returns, γ of 0.98, "
            "slow copies of critic and actor) with an entropy scale of 0.003 instead of 0; 256 "
            "imagined trajectories at H = 15 and 64 at H = 60 instead of 2500; k of TPX is clipped "
            "to [0, 1]; scores are means of the last third of the evaluations",
            (0, 1, 2),
        ),
        "paper": Scale((*FIG6_PAPER, TIME), 20_000.0, "", (0, 1, 2, 3)),
    },
    claims=(
        Claim(
            "long-horizon", "At H = 60 Dreamer (RP) performs poorly and TPX well.", "Sec. 6.2",
            POORLY, Rule(), _poor_beside_tpx(60, "rp"),
        ),
        Claim(
            "short-horizon", "At H = 15 LR performs poorly and TPX well.", "Sec. 6.2",
            POORLY, Rule(), _poor_beside_tpx(15, "lr, latent"),
        ),
        Claim(
            "both-horizons", "TPX performs well at both horizons: at H = 15 no worse than Dreamer "
            "(RP), at H = 60 no worse than LR.", "Sec. 6.2",
            "difference of mean scores, and of TPX's from 0.5, above -0.1", Rule(low=-0.1),
            _both_horizons,
        ),
    ),
    numbers=(
        Number("time of TPX in units of Dreamer's, H = 15", "1.14", lambda data: _time(data, 15)),
        Number("the same, H = 60", "1.4", lambda data: _time(data, 60)),
    ),
    raw=_fig6_raw,
    figures={"figure": _fig6_figure},
)  # fmt: skip


# ---------------------------------------------------------------------------- Fig. 7, App. D


def _snr(data: Data, steps: Sequence[str], horizon: int, names: Sequence[str]) -> list[np.ndarray]:
    """[starts, estimators] signal-to-noise ratios, of each model that has them all."""
    found = []
    for step in readers.present(data, steps):
        results = read_json(data[step])["results"]
        own = [results.get(name, {}).get(str(horizon)) for name in names]
        if all(own):
            found.append(np.array([each["snr"] for each in own]).T)
    return found


def _esnr(first: str, second: str, horizon: int, snr: Sequence[np.ndarray]) -> Part:
    """log10 of the ratio of two ESNR (Eq. 19), its mean over the models."""

    def statistic(groups: Sequence[np.ndarray]) -> float:
        ratios = np.array([np.maximum(own.mean(0), 1e-12) for own in groups])
        return float(np.log10(ratios[:, 0] / ratios[:, 1]).mean())

    return bootstrapped(f"{first} / {second} at H = {horizon}", snr, statistic)


def _horizons(data: Data, steps: Sequence[str]) -> list[int]:
    found: set[int] = set()
    for step in readers.present(data, steps):
        for by_horizon in read_json(data[step])["results"].values():
            found |= set(map(int, by_horizon))
    return sorted(found)


def _esnr_parts(data: Data, steps: Sequence[str], first: str, second: str) -> list[Part]:
    """A part per horizon that some model has."""
    return [
        _esnr(first, second, h, snr)
        for h in _horizons(data, steps)
        if (snr := _snr(data, steps, h, (first, second)))
    ]


def _one(parts: Sequence[Part], at: int) -> Part:
    if not parts:
        raise Missing("no model with both estimators")
    return parts[at]


def _esnr_over_all(data: Data, steps: Sequence[str], first: str, second: str) -> list[Part]:
    """One part: the mean over models and horizons."""
    groups = [
        (model, h) for h in _horizons(data, steps) for model in readers.present(data, steps)
        if _snr(data, [model], h, (first, second))
    ]  # fmt: skip
    if not groups:
        raise Missing("no model with both estimators")
    # The starts of a model are the same at all horizons: they are drawn together.
    by_model: dict[str, list[np.ndarray]] = {}
    for model, h in groups:
        by_model.setdefault(model, []).append(_snr(data, [model], h, (first, second))[0])
    stacked = [np.stack(own, axis=1) for own in by_model.values()]  # [starts, horizons, 2]

    def statistic(rows: Sequence[np.ndarray]) -> float:
        ratios = [np.maximum(own.mean(0), 1e-12) for own in rows]
        return float(np.mean([np.log10(r[:, 0] / r[:, 1]).mean() for r in ratios]))

    return [bootstrapped(f"{first} / {second}, mean over models and horizons", stacked, statistic)]


def _normalised(data: Data, steps: Sequence[str]) -> dict[str, dict[int, float]]:
    """Estimator -> H -> ESNR over the largest of the model, its mean over the models (Fig. 7)."""
    found: dict[str, dict[int, list[float]]] = {}
    for step in readers.present(data, steps):
        results = read_json(data[step])["results"]
        for h in map(str, _horizons(data, [step])):
            best = max(own[h]["esnr"] for own in results.values())
            for name, own in results.items():
                found.setdefault(name, {}).setdefault(int(h), []).append(own[h]["esnr"] / best)
    return {
        name: {h: float(np.mean(x)) for h, x in sorted(own.items())} for name, own in found.items()
    }


def _esnr_figure(data: Data, steps: Sequence[str]) -> Figure:
    models = readers.present(data, steps)
    figure = Figure(figsize=(3.6 * (1 + len(models)), 3.8), layout="constrained")
    first, *others = figure.subplots(1, 1 + len(models))
    ticks = _horizons(data, steps)
    lines = _normalised(data, steps)
    drawn = [(first, "normalised, mean over the models", lines)]
    for axis, step in zip(others, models):
        results = read_json(data[step])["results"]
        own = {n: {int(h): x["esnr"] for h, x in by.items()} for n, by in results.items()}
        drawn.append((axis, step, own))
    for axis, title, own in drawn:
        for i, name in enumerate(lines):
            # Estimators that coincide remain visible: later ones are thinner.
            style = {**style_of(name), "marker": MARKERS.get(name), "lw": 4 - 0.6 * i}
            style["ms"] = 9 - 1.2 * i
            by_horizon = own.get(name, {})
            axis.plot(list(by_horizon), list(by_horizon.values()), label=name, **style)
        axis.set(title=title, xlabel="imagination horizon", xscale="log")
        axis.set_xticks(ticks, [str(h) for h in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
        if axis is not first:
            axis.set_yscale("log")
    first.set(ylabel="ESNR in units of the best one's", ylim=(-0.03, 1.05))
    others[0].set_ylabel("ESNR")
    first.legend(frameon=False, fontsize="small", loc="center left")
    return figure


def _diagnoses(
    name: str, run: str, flags: Sequence[str], estimators: Sequence[str], sizes: Sequence[str],
    *, seed: int = 0, committed: str = "",
) -> tuple[Step, Step]:  # fmt: skip
    """A training with RP, which is Dreamer's, and the accuracy of gradients on what it learned."""
    training = Step(
        f"train_{name}", "sweep", ("dreamer", "--estimators", "rp"), "results.json", trains=True,
        flags=(*flags, "--save-replay"), runs=run, seeds=(seed,), prepares=name,
    )  # fmt: skip
    diagnosis = Step(
        name, "diagnose",
        ("{runs}/" + f"{run}/rp_seed{seed}", "--estimators", *estimators, *sizes, "--threads", "1",
         "--stop-grad-actor-input", "--out", "{out}"),
        "results.json", committed=committed, resumes=False,
    )  # fmt: skip
    return training, diagnosis


LAPTOP = ("--preset", "laptop")
SMALL_MODELS: dict[str, tuple[int, tuple[str, ...], str]] = {  # seed, flags, committed
    "pendulum_1500": (0, (*LAPTOP, "--env-id", "Pendulum-v1", "--total-timesteps", "1500"), ""),
    "pendulum_3000": (0, (*LAPTOP, "--env-id", "Pendulum-v1", "--total-timesteps", "3000"), ""),
    "balance_repeat8": (
        1,
        (*LAPTOP, "--env-id", "dmc/cartpole-balance-v0", "--env-arg", "action_repeat=8",
         "--learning-rate-schedule", "linear", "--total-timesteps", "12000"),
        "dreamer/diagnosis_balance_r8/blocked/results.json",
    ),
    "balance_repeat2": (
        1,
        (*LAPTOP, "--env-id", "dmc/cartpole-balance-v0", "--total-timesteps", "12000"),
        "dreamer/diagnosis/results.json",
    ),
}  # fmt: skip
SMALL_SIZES = ("--trajectories", "64")
PAPER_SIZES = ("--horizons", "2", "5", "10", "15", "30", "60", "--starts", "50", "--repeats", "50",
               "--trajectories", "2500")  # fmt: skip
STAGES = (100_000, 250_000, 500_000)  # decisions: 200 to 1000 episodes
PAPER_MODELS = {
    f"{task}_{stage}": (
        0,
        ("--preset", "tpx2023", "--env-id", f"dmc/{task}-v0", "--env-arg", "observation=pixels",
         "--env-arg", "action_repeat=2", "--total-timesteps", str(stage)),
        "",
    )
    for task in SUITE
    for stage in STAGES
}  # fmt: skip


def _models(estimators: Sequence[str], is_ablation: bool) -> dict[str, Scale]:
    scales = {}
    for scale, models, sizes in (
        ("small", SMALL_MODELS, SMALL_SIZES),
        ("paper", PAPER_MODELS, PAPER_SIZES),
    ):
        if scale == "small" and is_ablation:
            models = {name: own for name, own in models.items() if name.startswith("pendulum")}
        steps: list[Step] = []
        for name, (seed, flags, committed) in models.items():
            steps += _diagnoses(
                name, f"dreamer_{name}", flags, estimators, sizes, seed=seed, committed=committed
            )
        differs = (
            f"{len(models)} models of {'one task' if is_ablation else 'two tasks'} from state "
            "vectors (preset `laptop`) instead of eight from pixels; 10 states x 10 gradients of "
            "64 trajectories instead of 50 x 50 of 2500; without the entropy bonus; k of TPX is "
            "clipped to [0, 1]"
        )
        if scale == "small":
            hours = 0.4 if is_ablation else 2.0
        else:
            hours = 8000.0
            differs = (
                "without the entropy bonus; the stages are ours; k of TPX is clipped to [0, 1]"
            )
        scales[scale] = Scale(tuple(steps), hours, differs)
    return scales


MODELS = (*SMALL_MODELS, *PAPER_MODELS)
EQUAL = -math.log10(1 / 0.9)  # "best" may be equal within a tenth
TPX_FIG7 = Reproduction(
    title="signal-to-noise ratio of Dreamer's gradients by horizon",
    source=f"{PAPER}, Sec. 6.2 and App. C.2, Fig. 7",
    scales=_models(("rp", "lr", "tps", "tpx", "tpg"), is_ablation=False),
    claims=(
        Claim(
            "tpx-best", "TPX has the best ESNR at all horizons.", "Sec. 6.2",
            "log10 of the ratio of ESNR, mean over the models, above -0.046 (equal within a "
            "tenth) at every horizon",
            Rule(low=EQUAL),
            lambda data: [
                part for other in ("rp", "lr") for part in _esnr_parts(data, MODELS, "tpx", other)
            ],
        ),
        Claim(
            "short-horizon", "At a low H, LR performs poorly and RP well.", "Sec. 6.2",
            "log10 of the ratio of ESNR, mean over the models, above 0 at the lowest H", Rule(),
            lambda data: [_one(_esnr_parts(data, MODELS, "rp", "lr"), 0)],
        ),
        Claim(
            "long-horizon", "At a high H, RP performs poorly and LR well.", "Sec. 6.2",
            "log10 of the ratio of ESNR, mean over the models, above 0 at the highest H", Rule(),
            lambda data: [_one(_esnr_parts(data, MODELS, "lr", "rp"), -1)],
        ),
        Claim(
            "similar-to-tp", "TPX is similar to TP (here TPS).", "Sec. 6.2",
            "log10 of the ratio of ESNR within ±0.3 (twofold) at every horizon",
            Rule(-TWOFOLD, TWOFOLD), lambda data: _esnr_parts(data, MODELS, "tpx", "tps"),
        ),
    ),
    numbers=(),
    raw=lambda data: {"normalised ESNR": _normalised(data, MODELS)},
    figures={"figure": lambda data: _esnr_figure(data, MODELS)},
)  # fmt: skip
TPX_ABLATION = Reproduction(
    title="TPX without covariances, and with one k for all coordinates",
    source=f"{PAPER}, App. D, Fig. 28",
    scales=_models(("tpx", "tpx-scalar", "tpx-ivw", "tpx-ivw-scalar"), is_ablation=True),
    claims=(
        Claim(
            "vector-k", "A k for each coordinate is important for the accuracy.", "App. D",
            "log10 of the ratio of ESNR, mean over models and horizons, above 0", Rule(),
            lambda data: [
                *_esnr_over_all(data, MODELS, "tpx", "tpx-scalar"),
                *_esnr_over_all(data, MODELS, "tpx-ivw", "tpx-ivw-scalar"),
            ],
        ),
        Claim(
            "covariance", "The covariance terms have little effect in Dreamer.", "App. D",
            "log10 of the ratio of ESNR, mean over models and horizons, within ±0.1 (a quarter)",
            Rule(-0.1, 0.1), lambda data: _esnr_over_all(data, MODELS, "tpx", "tpx-ivw"),
        ),
    ),
    numbers=(),
    raw=lambda data: {"normalised ESNR": _normalised(data, MODELS)},
    figures={"figure": lambda data: _esnr_figure(data, MODELS)},
)  # fmt: skip

# ---------------------------------------------------------------------------- Fig. 8, App. B.2

RATES = ("0.002", "0.005", "0.01", "0.03", "0.06", "0.12")
FIG8 = ("rp", "lr", "tp", "tpx-unclipped")
THRESHOLD = PIPPS_TASKS["tip"].threshold


def _cost(data: Data, rate: str, estimator: str) -> np.ndarray:
    return readers.seeds(data, f"rate_{rate}", estimator, "final cost")


def _rates(data: Data) -> list[str]:
    found = readers.present(data, [f"rate_{rate}" for rate in RATES])
    return [step.removeprefix("rate_") for step in found]


def _outperform(data: Data) -> list[Part]:
    return [
        difference_of_means(
            f"{worse} - {better} at {rate}",
            [_cost(data, rate, worse)], [_cost(data, rate, better)],
        )
        for rate in _rates(data) for better in ("tp", "tpx-unclipped") for worse in ("rp", "lr")
    ]  # fmt: skip


def _matches(data: Data) -> list[Part]:
    own = [[_cost(data, rate, e) for rate in _rates(data)] for e in ("tpx-unclipped", "tp")]
    part = difference_of_means("tpx - tp, mean over the learning rates", *own)
    if min(np.mean(costs) for costs in own) > THRESHOLD:  # alike in learning nothing
        part = undecided(f"{part.what}: neither learned", part.estimate)
    return [part]


def _successes(data: Data, estimator: str) -> tuple[int, int]:
    costs = np.concatenate([_cost(data, rate, estimator) for rate in _rates(data)])
    return int((costs < THRESHOLD).sum()), len(costs)


def _faster(data: Data) -> list[Part]:
    def logs(estimator: str) -> list[np.ndarray]:
        steps = [f"rate_{rate}" for rate in _rates(data)]
        return [np.log10(readers.seeds(data, step, estimator, "seconds")) for step in steps]

    return [difference_of_means("log10 seconds, tp - tpx", logs("tp"), logs("tpx-unclipped"))]


def _fig8_figure(data: Data) -> Figure:
    return readers.sweeps_figure(data, [f"rate_{rate}" for rate in _rates(data)])


def _fig8_robustness(data: Data) -> Figure:
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axis = figure.subplots()
    for i, name in enumerate(sorted(read_json(data[f"rate_{_rates(data)[0]}"])["results"])):
        found = [(float(rate), _cost(data, rate, name)) for rate in _rates(data)]
        x = [rate * 1.04**i for rate, _ in found]
        y, error = ([f(c) for _, c in found] for f in (np.mean, _standard_error))
        style = style_of(name.removesuffix("-unclipped"))
        axis.errorbar(x, y, error, label=name, capsize=3, **style)
    axis.axhline(THRESHOLD, color="0.5", ls=":", lw=1)
    axis.set(xscale="log", xlabel="learning rate", ylabel="final cost, mean ± SE (Tip Cost)")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    return figure


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0


def _fig8_steps(estimators: Sequence[str], rates: Sequence[str], *flags: str) -> tuple[Step, ...]:
    return tuple(
        Step(
            f"rate_{rate}", "sweep", ("pipps", "--estimators", *estimators), "results.json",
            trains=True,
            flags=("--preset", "tpx2023", "--learning-rate", rate, "--total-timesteps", "450",
                   *flags),
        )
        for rate in rates
    )  # fmt: skip


TPX_FIG8 = Reproduction(
    title="PIPPS on the cart-pole with the Tip Cost, by learning rate",
    source=f"{PAPER}, App. B, Fig. 8 to 14",
    scales={
        "small": Scale(
            _fig8_steps(FIG8, ("0.01", "0.03", "0.06"), "--n-particles", "100",
                        "--gradient-steps", "100"),
            3.5,
            "three learning rates, 3 seeds instead of 50, 100 particles and 100 gradient steps "
            "instead of 300 and 250",
            (0, 1, 2),
        ),
        "paper": Scale(
            _fig8_steps(
                (*FIG8, "gr", "tpx-scalar", "tpx-ivw", "tpx-ivw-scalar"), RATES
            ),
            400.0,
            "the threshold of success is inferred from a figure's axis",
            tuple(range(50)),
        ),
    },
    claims=(
        Claim(
            "outperform", "TP and TPX outperform RP and LR at all learning rates.", "App. B",
            "difference of mean final costs, above 0 at every rate", Rule(), _outperform,
        ),
        Claim(
            "matches", "TPX matches TP.", "App. B",
            "difference of mean final costs (of 30 at most) within ±1", Rule(-1.0, 1.0), _matches,
        ),
        Claim(
            "reliable", "LR is more reliable than RP: it has a higher success rate.", "App. B",
            "difference of success rates over all learning rates, above 0", Rule(),
            lambda data: [
                difference_of_rates("lr - rp", _successes(data, "lr"), _successes(data, "rp"))
            ],
        ),
        Claim(
            "faster", "TPX computes faster than TP.", "App. B, Fig. 8c",
            "log10 of the ratio of a run's seconds, above 0", Rule(), _faster,
        ),
    ),
    numbers=(),
    raw=lambda data: readers.sweeps_raw(
        data, [f"rate_{rate}" for rate in RATES], ["final cost", "seconds"]
    ),
    figures={"figure": _fig8_figure, "robustness": _fig8_robustness},
)  # fmt: skip

ENTRIES = {
    "tpx-fig3": TPX_FIG3,
    "tpx-fig6": TPX_FIG6,
    "tpx-fig7": TPX_FIG7,
    "tpx-fig8": TPX_FIG8,
    "tpx-ablation": TPX_ABLATION,
}
