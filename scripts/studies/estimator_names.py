"""Names of estimators with a leg of their own, as the studies take them: lr+biw, tpx+lax."""

from __future__ import annotations

from totalprop.estimators import Estimator, make

LEG = "+"  # before the leg


def estimator_with_leg(name: str) -> Estimator:
    """A registered estimator, with a leg of its own after a plus if there is one.

    Raises:
        ValueError: there is none of that name.
    """
    rule, _, leg = name.partition(LEG)
    return make(rule, legs=leg) if leg else make(rule)
