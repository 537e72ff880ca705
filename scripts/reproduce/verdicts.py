"""Verdicts on a paper's claims: each is computed from numbers and intervals by a stated rule.

A claim is broken into parts, each a number that the claim says something about, such as log10 of a
ratio of variances, with an interval. The rule of a claim says which values agree with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Literal, NamedTuple

LEVEL = 0.95
Interval = tuple[float, float]


class Verdict(str, Enum):
    """What the data say of a claim."""

    REPRODUCED = "reproduced"
    NOT_REPRODUCED = "not reproduced"
    NOT_DECIDABLE = "not decidable at this scale"
    NOT_MEASURED = "not measured"


class Part(NamedTuple):
    """One number that a claim says something about.

    Attributes:
        what: names it.
        estimate: its value.
        interval: level -> the two ends of its interval.
    """

    what: str
    estimate: float
    interval: Callable[[float], Interval]


class Rule(NamedTuple):
    """Which values of a part agree with a claim: those above `low` and below `high`.

    Attributes:
        low: infinite if the claim has no lower bound.
        high: infinite if it has no upper one.
        needs: whether the claim is about all parts, or about more than half of them.
    """

    low: float = 0.0
    high: float = float("inf")
    needs: Literal["all", "most"] = "all"

    def of_interval(self, ends: Interval) -> Verdict:
        """The verdict on one part: by whether its interval lies inside, outside or across."""
        if not all(end == end for end in ends):
            return Verdict.NOT_DECIDABLE
        if self.low < ends[0] and ends[1] < self.high:
            return Verdict.REPRODUCED
        if ends[1] < self.low or self.high < ends[0]:
            return Verdict.NOT_REPRODUCED
        return Verdict.NOT_DECIDABLE

    def __str__(self) -> str:
        if self.high == float("inf"):
            values = f"above {self.low:g}"
        elif self.low == -float("inf"):
            values = f"below {self.high:g}"
        else:
            values = f"between {self.low:g} and {self.high:g}"
        return f"{values}, {self.needs} parts"


def decide(parts: Sequence[Part], rule: Rule) -> Verdict:
    """The verdict on a claim.

    Reproduced if the 95 % intervals of all parts (of more than half of them) lie within the rule's
    bounds. Not reproduced if that is contradicted: the interval of a part (of at least half of
    them) lies outside. A claim of many parts would be contradicted by chance, so that these
    intervals are of level 1 - 0.05 / n for n parts (Bonferroni). All else is not decidable.
    """
    n = len(parts)
    if not n:
        return Verdict.NOT_MEASURED
    agree = sum(rule.of_interval(p.interval(LEVEL)) is Verdict.REPRODUCED for p in parts)
    wide = 1 - (1 - LEVEL) / n
    against = sum(rule.of_interval(p.interval(wide)) is Verdict.NOT_REPRODUCED for p in parts)
    if agree == n if rule.needs == "all" else agree > n / 2:
        return Verdict.REPRODUCED
    if against >= (1 if rule.needs == "all" else n / 2):
        return Verdict.NOT_REPRODUCED
    return Verdict.NOT_DECIDABLE
