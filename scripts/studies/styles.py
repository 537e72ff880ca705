"""Colours and dashes of lines: an estimator looks the same in every picture.

Colours are those of Okabe and Ito, which the colour-blind tell apart, without the yellow, which is
faint on white.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from totalprop.scripts.studies.estimator_names import LEG

COLORS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
GREY = "#808080"

Styles = Mapping[str, Mapping[str, Any]]  # colour and dashes of each label

# A family has one colour. Rules that choose one k for the whole graph are red.
ESTIMATORS = {
    "rp": ("#E69F00", "-"),
    "rp-cut": ("#E69F00", "--"),
    "lr": ("#56B4E9", "-"),
    "lr-first-order": ("#56B4E9", "--"),
    "tp": ("#009E73", "-"),
    "tps": ("#009E73", "--"),
    "tp-guarded": ("#009E73", ":"),
    "tpx": ("#CC79A7", "-"),
    "tpx-scalar": ("#CC79A7", "--"),
    "tpx-unclipped": ("#CC79A7", ":"),
    "tpx-guarded": ("#CC79A7", "-."),
    "ivw-h": ("#0072B2", "-"),
    "tpx-ivw-scalar": ("#0072B2", "--"),
    "tpx-ivw": ("#0072B2", ":"),
    "tpg": ("#000000", "-"),
    "tpg-guarded": ("#000000", "--"),
    "safe": ("#D55E00", "-"),
    "aobg": ("#D55E00", "--"),
    "ddcg": ("#D55E00", ":"),
    "ivw": ("#D55E00", "-."),
    "gr": (GREY, "-"),  # PIPPS's RP through Gaussian resampling
}
MARKERS = {"rp": "v", "lr": "^", "tp": "s", "tpx": "D", "tpg": "o"}


def style_of(estimator: str) -> dict[str, Any]:
    """Colour and dashes of an estimator; with a leg of its own, tp+biw, the rule's, dashed."""
    rule, _, leg = estimator.partition(LEG)
    color, dashes = ESTIMATORS.get(rule, (GREY, "-."))
    return {"color": color, "ls": "--" if leg else dashes}


def styles_of(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour and dashes of each label; what is no estimator has colours that no estimator has."""
    labels = list(dict.fromkeys(labels))
    found = {
        label: style_of(label.lower())
        for label in labels
        if label.lower().partition(LEG)[0] in ESTIMATORS
    }
    taken = {style["color"] for style in found.values()}
    free = [color for color in COLORS if color not in taken] or COLORS
    others = [label for label in labels if label not in found]
    for i, label in enumerate(others):
        dashes = DASHES[i // len(free) % len(DASHES)]
        found[label] = {"color": free[i % len(free)], "ls": dashes}
    return {label: found[label] for label in labels}
