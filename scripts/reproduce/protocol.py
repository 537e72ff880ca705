"""What a reproduction consists of: studies and sweeps to run, and claims to read from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from totalprop.scripts.reproduce.verdicts import Part, Rule


class Missing(LookupError):
    """A number was not measured."""


class Data(dict[str, Path]):
    """Name of a step -> the file that holds its numbers, of the steps that have been made."""

    def __missing__(self, step: str) -> Path:
        raise Missing(f"{step} has not been run")


class Step(NamedTuple):
    """One command of totalprop that measures.

    Attributes:
        name: of its folder, in that of the reproduction.
        command: "chaos", "sweep", "study pipps-table", ...
        arguments: of it; {out} is the step's folder, {runs} that of all runs.
        file: in the step's folder, with the numbers.
        committed: the file of the same protocol in the checkout's results/.
        trains: whether the command trains seeds (it then gets --seeds, --jobs, --out and --runs,
            and flags of `totalprop train` after --).
        flags: of `totalprop train`.
        runs: folder of its runs in {runs}; by default the reproduction's and the step's name.
        seeds: of this step, instead of the scale's.
        prepares: the step that it is made for, and without which it is not needed.
        resumes: whether the command goes on where it was stopped; another is skipped if its file
            is there.
    """

    name: str
    command: str
    arguments: tuple[str, ...]
    file: str
    committed: str = ""
    trains: bool = False
    flags: tuple[str, ...] = ()
    runs: str = ""
    seeds: tuple[int, ...] = ()
    prepares: str = ""
    resumes: bool = True


class Scale(NamedTuple):
    """How much is measured.

    Attributes:
        steps: in their order.
        hours: of one core, a rough estimate.
        differs: how the protocol differs from the paper's; empty if it does not.
        seeds: of the steps that train.
    """

    steps: tuple[Step, ...]
    hours: float
    differs: str
    seeds: tuple[int, ...] = ()


class Claim(NamedTuple):
    """What a paper claims, and how data decide it.

    Attributes:
        key: its name in files.
        text: the claim, in our words.
        place: where the paper makes it.
        test: what the parts are, and which values agree, in words.
        rule: that decides.
        parts: of the data; raises `Missing`.
    """

    key: str
    text: str
    place: str
    test: str
    rule: Rule
    parts: Callable[[Data], Sequence[Part]]


class Number(NamedTuple):
    """A published number, and ours beside it.

    Attributes:
        what: it is.
        published: as printed.
        ours: from the data; raises `Missing`.
    """

    what: str
    published: str
    ours: Callable[[Data], str]


class Reproduction(NamedTuple):
    """A figure or table of a paper.

    Attributes:
        title: what it shows.
        source: paper and place.
        scales: "small" and "paper".
        claims: made of it.
        numbers: published ones.
        raw: of the data, what the claims were computed from, for numbers.json.
        figures: name -> picture; raises `Missing`.
    """

    title: str
    source: str
    scales: Mapping[str, Scale]
    claims: Sequence[Claim]
    numbers: Sequence[Number]
    raw: Callable[[Data], Any]
    figures: Mapping[str, Callable[[Data], Figure]]
