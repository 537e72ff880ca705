"""Heess et al. 2015 (SVG): the learning curves of its variants.

Of the paper we have the appendix, and from its abstract what the SVG's specification quotes: no
published numbers.
"""

from __future__ import annotations

from totalprop.scripts.reproduce import readers
from totalprop.scripts.reproduce.intervals import difference_of_means, mean_of
from totalprop.scripts.reproduce.protocol import Claim, Data, Missing, Reproduction, Scale, Step
from totalprop.scripts.reproduce.verdicts import Part, Rule

VARIANTS = ("1-er", "1", "0", "inf", "dpg")
PRESETS = ("", "-swimmer5", "-swimmer7", "-cartpole", "-reacher", "-hopper", "-cheetah", "-walker")
TASKS = {preset.removeprefix("-") or "swimmer3": f"svg2015{preset}" for preset in PRESETS}


def _step(task: str, variants: tuple[str, ...], steps: int) -> Step:
    return Step(
        task, "sweep", ("svg", "--vary", "variant", "--values", *variants), "results.json",
        trains=True,
        flags=("--preset", TASKS[task], "--total-timesteps", str(steps),
               "--eval-every", str(steps // 20)),
    )  # fmt: skip


def _learns(data: Data) -> list[Part]:
    """Whether the last evaluation is above the first, by variant and task."""
    parts = []
    for task in readers.present(data, list(TASKS)):
        for variant in ("1-er", "1"):
            last, first = (
                readers.seeds(data, task, variant, quantity)
                for quantity in ("final return", "first return")
            )
            parts.append(mean_of(f"SVG({variant}) on {task}, end - start", last - first))
    return parts


def _replay(data: Data) -> list[Part]:
    found = []
    for task in readers.present(data, list(TASKS)):
        own = [[readers.seeds(data, task, v, "average return")] for v in ("1-er", "1")]
        found.append(difference_of_means(f"SVG(1)-ER - SVG(1) on {task}", *own))
    if not found:
        raise Missing("no runs")
    return found


SVG_FIG = Reproduction(
    title="learning curves of the variants of SVG",
    source="Heess et al. 2015 (SVG), abstract and App. D",
    scales={
        "small": Scale(
            (_step("cartpole", ("1-er", "1", "0", "dpg"), 30_000),), 2.0,
            "one task of the control suite, 3 seeds, 30,000 decisions, no search over settings",
            (0, 1, 2),
        ),
        "paper": Scale(
            tuple(_step(task, VARIANTS, 1_000_000) for task in TASKS), 3000.0,
            "tasks of the control suite, since the paper's are not public; step sizes, numbers of "
            "updates, σ and V_max, which the paper searched, are the defaults",
            tuple(range(5)),
        ),
    },
    claims=(
        Claim(
            "simultaneous", "SVG(1) learns models, value functions and policies simultaneously in "
            "continuous domains.", "Abstract",
            "difference of the mean returns at the end and at the first evaluation, above 0 for "
            "SVG(1) with and without replay, on every task that was run",
            Rule(), _learns,
        ),
        Claim(
            "replay", "Ours, not the paper's: replay of past experience, the reason for "
            "SVG(1)-ER, makes SVG(1) more data-efficient.",
            "compared with App. D's variants",
            "difference of the average returns of training, above 0 in more than half of the tasks",
            Rule(needs="most"), _replay,
        ),
    ),
    numbers=(),
    raw=lambda data: readers.sweeps_raw(data, list(TASKS), ["average return", "final return"]),
    figures={"figure": lambda data: readers.sweeps_figure(data, list(TASKS))},
)  # fmt: skip

ENTRIES = {"svg-fig": SVG_FIG}
