"""Nauman & Cygan 2022 (all-action policy gradients): Table 1, and Fig. 1 and 3 to 7."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from totalprop.scripts.reproduce import readers
from totalprop.scripts.reproduce.intervals import difference_of_means, known, undecided
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

PAPER = "Nauman & Cygan 2022"
TASKS = (
    "cartpole-swingup", "ball_in_cup-catch", "reacher-easy", "finger-spin", "cheetah-run",
    "walker-walk",
)  # fmt: skip
SMALL_TASKS = ("cartpole-swingup", "ball_in_cup-catch", "walker-walk")

# ---------------------------------------------------------------------------- Table 1

# Table 1: Markov chain variance, and policy-dependent variance
PUBLISHED_VARIANCE = {
    "cartpole-swingup": (0.006, 5.736),
    "ball_in_cup-catch": (0.026, 0.819),
    "reacher-easy": (2.269, 3.565),
    "finger-spin": (0.026, 0.122),
    "cheetah-run": (0.006, 1.615),
    "walker-walk": (0.081, 11.786),
}
TOTALS = ("Markov chain variance", "Policy-dependent variance")


def published_share(task: str) -> float:
    """The policy's share of the variance, of the numbers in Table 1."""
    chain, policy = PUBLISHED_VARIANCE[task]
    return policy / (chain + policy)


def _share(data: Data, task: str) -> Part:
    record = read_json(data[task])
    if "intervals" not in record:
        raise Missing(f"{task} was measured without intervals")
    low, high = record["intervals"]["policy_share"]
    return known(task, record["policy_share"], (low, high))


def _shares(data: Data) -> list[Part]:
    return [_share(data, task) for task in readers.present(data, TASKS)]


def _text(data: Data, task: str, name: str) -> str:
    record = read_json(data[task])
    low, high = record["intervals"][name]
    return f"{record[name]:.3g} ({low:.3g} to {high:.3g})"


def _shares_figure(data: Data) -> Figure:
    figure = Figure(figsize=(7.5, 3.8), layout="constrained")
    axis = figure.subplots()
    tasks = readers.present(data, TASKS)
    for x, task in enumerate(tasks):
        part = _share(data, task)
        axis.plot([x - 0.1] * 2, part.interval(0.95), color="k", lw=1.5)
        axis.plot(x - 0.1, part.estimate, "o", color="k", label="ours, 95 %" if not x else None)
        axis.plot(x + 0.1, published_share(task), "D", color="#D55E00",
                  label="published" if not x else None)  # fmt: skip
    for level in (0.0, 0.5, 1.0):
        axis.axhline(level, color="0.8", lw=0.8, zorder=0)
    axis.set_xticks(range(len(tasks)), tasks, fontsize="small")
    axis.set_ylabel("policy's share of the gradient's variance")
    axis.legend(frameon=False)
    return figure


def _variance_steps(
    tasks: Sequence[str], *, trajectories: int, steps: int, rollouts: int, horizon: int
) -> tuple[Step, ...]:
    sizes = {"trajectories": trajectories, "steps": steps, "rollouts": rollouts,
             "horizon": horizon, "updates": 20}  # fmt: skip
    flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    return tuple(
        Step(
            task, "variance",
            ("--env-id", f"dmc/{task}-v0", *flags, "--json", "{out}/variance.json"),
            "variance.json", resumes=False,
        )
        for task in tasks
    )  # fmt: skip


DAA_TABLE1 = Reproduction(
    title="how much of the policy gradient's variance is the policy's",
    source=f"{PAPER}, Sec. 3, Table 1",
    scales={
        "small": Scale(
            _variance_steps(TASKS, trajectories=60, steps=40, rollouts=2, horizon=25), 1.0,
            "60 trajectories of 40 steps and 2 rollouts of 25 steps per action instead of 1100 of "
            "100 and 100 rollouts",
        ),
        "paper": Scale(
            _variance_steps(TASKS, trajectories=1100, steps=100, rollouts=100, horizon=50), 5000.0,
            "the length of the rollouts is ours; the paper does not state it",
        ),
    },
    claims=(
        Claim(
            "share", "The policy is responsible for most of the variance (around 90 % on average) "
            "in the tested environments.", "Sec. 3",
            "the policy's share, above 0.5 in every task that was measured", Rule(low=0.5),
            _shares,
        ),
    ),
    numbers=tuple(
        Number(f"{task}: {name[0].lower() + name[1:]}", f"{PUBLISHED_VARIANCE[task][i]:g}",
               lambda data, task=task, name=name: _text(data, task, name))  # type: ignore[misc]
        for task in TASKS for i, name in enumerate(TOTALS)
    ) + tuple(
        Number(f"{task}: policy's share", f"{published_share(task):.3f}",
               lambda data, task=task: _text(data, task, "policy_share"))  # type: ignore[misc]
        for task in TASKS
    ),
    raw=lambda data: {task: read_json(data[task]) for task in TASKS if task in data},
    figures={"figure": _shares_figure},
)  # fmt: skip

# ---------------------------------------------------------------------------- learning curves

LEARNED = "average return"  # over all evaluations of a run: how high the curve is
SMALL_FLAGS = (
    "--preset", "recommended", "--env-arg", "action_repeat=4", "--total-timesteps", "80000",
    "--eval-every", "5000", "--eval-episodes", "5",
)  # fmt: skip
PAPER_FLAGS = ("--preset", "daa2022", "--total-timesteps", "1000000", "--eval-every", "10000")
SMALL_DIFFERS = (
    "three tasks instead of six, 3 seeds, 80,000 decisions, and the preset `recommended`: "
    "observations, rewards and advantages normalised, a baseline of the other actions of a state, "
    "a dynamics model of 256 units that predicts normalised changes, bootstrapped time limits, and "
    "no clipping of the values"
)
PAPER_DIFFERS = "1,000,000 decisions, as in the paper's revision of 2023; this one does not say"


def _sweep(
    name: str, task: str, scale: str, vary: str, values: Sequence[str], *flags: str,
    committed: str = "",
) -> Step:  # fmt: skip
    own = SMALL_FLAGS if scale == "small" else PAPER_FLAGS
    return Step(
        f"{task}_{name}" if name else task, "sweep",
        ("daappo", "--vary", vary, "--values", *values), "results.json", trains=True,
        committed=committed, flags=(*own, "--env-id", f"dmc/{task}-v0", *flags),
    )  # fmt: skip


def _scales(
    steps: Callable[[str, str], Sequence[Step]], *, small: Sequence[str], hours: float,
    paper_hours: float, seeds: int, differs: str = SMALL_DIFFERS,
) -> dict[str, Scale]:  # fmt: skip
    """Both scales of learning curves; `steps` are those of a task at a scale."""
    return {
        "small": Scale(tuple(s for task in small for s in steps(task, "small")), hours, differs,
                       (0, 1, 2)),
        "paper": Scale(tuple(s for task in TASKS for s in steps(task, "paper")), paper_hours,
                       PAPER_DIFFERS, tuple(range(seeds))),
    }  # fmt: skip


def _higher(
    data: Data, first: tuple[str, str], second: tuple[str, str], quantity: str = LEARNED
) -> list[Part]:
    """A part per task: (step's suffix, label) of both; tasks without runs are left out."""
    parts = []
    for task in TASKS:
        steps = [f"{task}_{suffix}" if suffix else task for suffix, _ in (first, second)]
        if all(step in data for step in steps):
            own = [
                [readers.seeds(data, step, label, quantity)]
                for step, (_, label) in zip(steps, (first, second))
            ]
            parts.append(difference_of_means(task, *own))
    if not parts:
        raise Missing("no task has runs")
    return parts


MOST = Rule(needs="most")
MORE = "difference of the average returns of training, above 0 in more than half of the tasks"


def _steps_of(suffixes: Sequence[str]) -> list[str]:
    return [f"{task}_{suffix}" if suffix else task for task in TASKS for suffix in suffixes]


def _curves(
    suffixes: Sequence[str], labels: Sequence[str] = ()
) -> dict[str, Callable[[Data], Figure]]:
    return {"figure": lambda data: readers.sweeps_figure(data, _steps_of(suffixes), labels)}


def _raw(suffixes: Sequence[str]) -> Callable[[Data], object]:
    return lambda data: readers.sweeps_raw(data, _steps_of(suffixes), [LEARNED, "final return"])


def _fig1_steps(task: str, scale: str) -> list[Step]:
    committed = f"daa_ppo/{task}/results.json" if scale == "small" else ""
    return [
        _sweep("ppo", task, scale, "action-source", ["none"], "--n-steps", "1024",
               committed=committed),
        _sweep("states", task, scale, "action-source", ["none"], "--n-steps", "2048"),
        _sweep("actions", task, scale, "action-source", ["rewind"], "--n-steps", "1024",
               "--n-extra-actions", "1"),
    ]  # fmt: skip


PPO, TWICE, ALL_ACTION = ("ppo", "none"), ("states", "none"), ("actions", "rewind")
DAA_FIG1 = Reproduction(
    title="a second action per state against twice the states",
    source=f"{PAPER}, Sec. 3, Fig. 1",
    scales=_scales(_fig1_steps, small=SMALL_TASKS, hours=2.0, paper_hours=3000.0, seeds=20),
    claims=(
        Claim(
            "actions", "A second action per state, valued by environment rollouts (T = 1024, "
            "N = 2), learns better than PPO (T = 1024).", "Sec. 3, Fig. 1", MORE, MOST,
            lambda data: _higher(data, ALL_ACTION, PPO),
        ),
        Claim(
            "actions-states", "It also learns better than PPO with twice the states (T = 2048).",
            "Sec. 3, Fig. 1", MORE, MOST, lambda data: _higher(data, ALL_ACTION, TWICE),
        ),
    ),
    numbers=(),
    raw=_raw(["ppo", "states", "actions"]),
    figures=_curves(["ppo", "states", "actions"], ["none", "rewind"]),
)  # fmt: skip

# Average return over 1,000,000 decisions, 15 seeds; the 2022 paper prints none.
OTHER_PAPER = "Nauman & Cygan 2023, App. D"
AVERAGES = {
    "cartpole-swingup": ("617 ± 46", "707 ± 44", "677 ± 18", "702 ± 38"),
    "ball_in_cup-catch": ("831 ± 20", "898 ± 8", "770 ± 30", "888 ± 8"),
    "reacher-easy": ("649 ± 66", "815 ± 39", "316 ± 72", "729 ± 74"),
    "finger-spin": ("280 ± 14", "266 ± 12", "245 ± 12", "248 ± 14"),
    "cheetah-run": ("185 ± 10", "316 ± 14", "135 ± 7", "284 ± 14"),
    "walker-walk": ("377 ± 14", "686 ± 18", "340 ± 14", "576 ± 19"),
}
SOURCES = ("none", "dynamics", "q", "states")


def _average(task: str, label: str) -> Callable[[Data], str]:
    def text(data: Data) -> str:
        own = readers.seeds(data, task, label, LEARNED)
        return f"{own.mean():.0f} ± {own.std(ddof=1) / len(own) ** 0.5:.0f} ({len(own)} seeds)"

    return text


def _fig3_steps(sources: Sequence[str]) -> Callable[[str, str], list[Step]]:
    return lambda task, scale: [
        _sweep("", task, scale, "action-source", sources,
               committed=f"daa_ppo/{task}/results.json" if scale == "small" else "")
    ]  # fmt: skip


def _averages(labels: Sequence[str]) -> tuple[Number, ...]:
    return tuple(
        Number(f"{task}: average return, `{label}` (published: {OTHER_PAPER})",
               AVERAGES[task][SOURCES.index(label)],
               _average(task, label))
        for task in TASKS for label in labels
    )  # fmt: skip


DAA_FIG3 = Reproduction(
    title="DAA-PPO, QAA-PPO and PPO",
    source=f"{PAPER}, Sec. 5.1, Fig. 3",
    scales=_scales(_fig3_steps(["none", "dynamics", "q"]), small=SMALL_TASKS, hours=2.0,
                   paper_hours=3000.0, seeds=25),
    claims=(
        Claim(
            "daa-ppo", "DAA-PPO performs better than PPO on the majority of the tasks.",
            "Sec. 5.1, Fig. 3", MORE, MOST,
            lambda data: _higher(data, ("", "dynamics"), ("", "none")),
        ),
        Claim(
            "daa-qaa", "DAA-PPO performs better than QAA-PPO on the majority of the tasks.",
            "Sec. 5.1, Fig. 3", MORE, MOST,
            lambda data: _higher(data, ("", "dynamics"), ("", "q")),
        ),
    ),
    numbers=_averages(["none", "dynamics", "q"]),
    raw=_raw([""]),
    figures=_curves([""], ["none", "dynamics", "q"]),
)  # fmt: skip


def _comparable(data: Data) -> list[Part]:
    """DAA less simulated states; of a task that neither has learned, nothing follows."""
    found = _higher(data, ("", "dynamics"), ("", "states"))
    return [
        part
        if _has_learned(data, part.what)
        else undecided(f"{part.what}: neither learned", part.estimate)
        for part in found
    ]


def _has_learned(data: Data, task: str) -> bool:
    """Whether one of the two is higher in training than in its first evaluation."""
    return any(
        readers.seeds(data, task, label, LEARNED).mean()
        > readers.seeds(data, task, label, "first return").mean() + MARGIN
        for label in ("dynamics", "states")
    )


MARGIN = 50.0  # of 1000
DAA_FIG4 = Reproduction(
    title="simulated actions against simulated states",
    source=f"{PAPER}, Sec. 5.2, Fig. 4",
    scales=_scales(_fig3_steps(["dynamics", "states"]), small=SMALL_TASKS, hours=2.0,
                   paper_hours=3000.0, seeds=25),
    claims=(
        Claim(
            "comparable", "DAA is comparable to simulated states or better, on all tasks.",
            "Sec. 5.2, Fig. 4",
            "difference of the average returns of training, above -50 (of 1000) in every task",
            Rule(low=-MARGIN), _comparable,
        ),
    ),
    numbers=_averages(["dynamics", "states"]),
    raw=_raw([""]),
    figures=_curves([""], ["dynamics", "states"]),
)  # fmt: skip

ONE_TASK = ("cartpole-swingup",)
ONE_DIFFERS = SMALL_DIFFERS.replace("three tasks instead of six", "one task instead of several")
COUNTS = {"small": ("4", "16"), "paper": ("4", "8", "16", "32", "64")}
DAA_FIG5 = Reproduction(
    title="more simulated actions per state",
    source=f"{PAPER}, App. B, Fig. 5",
    scales=_scales(
        lambda task, scale: [_sweep("", task, scale, "n-extra-actions", COUNTS[scale])],
        small=ONE_TASK, hours=1.0, paper_hours=5000.0, seeds=20, differs=ONE_DIFFERS,
    ),
    claims=(
        Claim(
            "more", "N = 4 is conservative: more simulated actions (16) learn better.",
            "App. B, Fig. 5", MORE, MOST, lambda data: _higher(data, ("", "16"), ("", "4")),
        ),
    ),
    numbers=(),
    raw=_raw([""]),
    figures=_curves([""]),
)  # fmt: skip
DEPTHS = {"small": ("8", "32"), "paper": ("4", "8", "16", "32")}
DAA_FIG6 = Reproduction(
    title="longer simulations of each action",
    source=f"{PAPER}, App. B, Fig. 6",
    scales=_scales(
        lambda task, scale: [_sweep("", task, scale, "simulation-horizon", DEPTHS[scale])],
        small=ONE_TASK, hours=1.0, paper_hours=5000.0, seeds=20,
        differs=f"{ONE_DIFFERS}; the depths are ours, since the figure's legend is that of Fig. 5",
    ),
    claims=(
        Claim(
            "shorter", "A larger simulation horizon (32 against 8) degrades DAA-PPO.",
            "App. B, Fig. 6", MORE, MOST, lambda data: _higher(data, ("", "8"), ("", "32")),
        ),
    ),
    numbers=(),
    raw=_raw([""]),
    figures=_curves([""]),
)  # fmt: skip


def _fig7_steps(task: str, scale: str) -> list[Step]:
    return [
        _sweep(source, task, scale, "normalize-advantage", ["true", "false"],
               "--action-source", source)
        for source in ("dynamics", "none")
    ]  # fmt: skip


DAA_FIG7 = Reproduction(
    title="advantage normalisation",
    source=f"{PAPER}, App. B, Fig. 7",
    scales=_scales(_fig7_steps, small=ONE_TASK, hours=1.0, paper_hours=3000.0, seeds=15,
                   differs=ONE_DIFFERS),
    claims=(
        Claim(
            "boosts", "Advantage normalisation further boosts DAA-PPO.", "App. B, Fig. 7", MORE,
            MOST, lambda data: _higher(data, ("dynamics", "true"), ("dynamics", "false")),
        ),
        Claim(
            "still-better", "With it DAA-PPO is better than PPO.", "App. B, Fig. 7", MORE, MOST,
            lambda data: _higher(data, ("dynamics", "true"), ("none", "true")),
        ),
    ),
    numbers=(),
    raw=_raw(["dynamics", "none"]),
    figures=_curves(["dynamics", "none"]),
)  # fmt: skip

ENTRIES = {
    "daa-table1": DAA_TABLE1,
    "daa-fig1": DAA_FIG1,
    "daa-fig3": DAA_FIG3,
    "daa-fig4": DAA_FIG4,
    "daa-fig5": DAA_FIG5,
    "daa-fig6": DAA_FIG6,
    "daa-fig7": DAA_FIG7,
}
