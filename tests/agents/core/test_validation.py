"""What constructors accept is read from their annotations, for every agent and its policies."""

import inspect
import math
import re
import types
import typing
from typing import Annotated, Literal

import numpy as np
import pytest
from docstring_parser import parse as parse_docstring

from totalprop.agents import AGENTS
from totalprop.agents.core.validation import (
    RANGES,
    Above,
    AtLeast,
    Finite,
    Within,
    ZeroOrAtLeast,
    check_values,
    constructor_hints,
    expectation,
)

CLASSES = {entry.cls.__name__: entry.cls for entry in AGENTS.values()}
CLASSES |= {
    policy.__name__: policy
    for entry in AGENTS.values()
    for policy in entry.cls.policy_aliases.values()
    if not policy.__module__.startswith("stable_baselines3.")
}
# Numbers without a range: SB3 passes them on as they are.
UNBOUNDED = {"verbose", "seed"}
OUTSIDE = {
    AtLeast: lambda r: [r.low - 1],
    Above: lambda r: [r.low, r.low - 1],
    Within: lambda r: [r.low - 0.1, r.high + 0.1, *([r.high] if r.open_above else [])],
    ZeroOrAtLeast: lambda r: [r.low - 1, -1],
    Finite: lambda r: [],
}


def members(hint):
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def ranged():
    """(class, argument, number's type, range) of every annotation with a range."""
    for cls in CLASSES.values():
        for name, hint in constructor_hints(cls).items():
            for member in members(hint):
                if typing.get_origin(member) is Annotated:
                    kind, found = typing.get_args(member)
                    yield pytest.param(cls, name, kind, found, id=f"{cls.__name__}-{name}")


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_every_number_has_a_range(cls):
    bare = {name for name, h in constructor_hints(cls).items() if {int, float} & set(members(h))}
    assert bare <= UNBOUNDED


@pytest.mark.parametrize(("cls", "name", "kind", "found"), ranged())
def test_a_number_outside_its_range_is_one_sentence(cls, name, kind, found):
    assert type(found) in RANGES
    for value in [
        *OUTSIDE[type(found)](found),
        math.nan,
        math.inf,
        "1",
        True,
        np.array([1.0, 2.0]),
    ]:
        note = ", a finite number" if isinstance(value, float) and not np.isfinite(value) else ""
        sentence = f"{name} must be {found}" + (", a whole number" if kind is int else note)
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}, got ") as error:
            check_values(cls, **{name: value})
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("cls", "name", "kind", "found"), ranged())
def test_its_default_and_numpy_numbers_are_inside(cls, name, kind, found):
    default = inspect.signature(cls.__init__).parameters[name].default
    check_values(cls, **{name: default})
    if default is not None:
        check_values(cls, **{name: (np.int64 if kind is int else np.float32)(default)})


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_choices_and_switches_are_checked(cls):
    for name, hint in constructor_hints(cls).items():
        if typing.get_origin(hint) is Literal:
            for choice in typing.get_args(hint):
                check_values(cls, **{name: choice})
            with pytest.raises(ValueError, match=rf"^{name} must be one of .*, got 'mine'$"):
                check_values(cls, **{name: "mine"})
        elif hint is bool and not name.startswith("_"):
            with pytest.raises(ValueError, match=f"^{name} must be True or False, got 'no'$"):
                check_values(cls, **{name: "no"})


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (Annotated[float, Above(0)] | None, [None, 1e-9, 1], [0, -1, "1"]),
        (Annotated[float, Within(0, 1, open_above=True)], [0, 0.99], [1, 1.1, -0.1]),
        (Annotated[float, Within(0, 1, open_below=True)], [0.01, 1], [0, -0.1, 1.1]),
        (Annotated[int, ZeroOrAtLeast(3)], [0, 3, 4], [1, 2, -1, 3.0]),
        (Annotated[float, Finite()], [-5, 0.0], [math.inf, None]),
        (Annotated[float, Above(0)] | typing.Callable[[float], float], [abs, 0.1], [0, None]),
        (typing.Callable[[float], float] | None, [abs, None], [1]),
        (str | bool, ["a", True, object()], []),
    ],
)  # fmt: skip
def test_expectation(hint, good, bad):
    assert [expectation(hint, value) for value in good] == [""] * len(good)
    assert all(expectation(hint, value) for value in bad)


def test_a_subclass_keeps_the_ranges_of_what_it_passes_on():
    class Base:
        def __init__(self, horizon: Annotated[int, AtLeast(2)] = 2) -> None: ...

    class Mine(Base):
        def __init__(self, *args: object, extra: Annotated[int, AtLeast(1)] = 1, **kw: object):
            super().__init__(*args, **kw)

    assert {"horizon", "extra"} <= set(constructor_hints(Mine))
    with pytest.raises(ValueError, match="horizon must be at least 2"):
        check_values(Mine, horizon=1)


@pytest.mark.parametrize("cls", [c for c in CLASSES.values() if "__init__" in vars(c)])
def test_every_argument_has_one_docstring_entry(cls):
    names = [n for n in inspect.signature(cls.__init__).parameters if n[0] != "_" and n != "self"]
    entries = parse_docstring(cls.__doc__).params
    assert sorted(p.arg_name for p in entries) == sorted(names)
    # Two arguments on one line: the second would stand in the first one's help.
    texts = {p.arg_name: p.description or "" for p in entries}
    assert all(texts.values())
    double = {n for n, text in texts.items() if re.search(rf"\. ({'|'.join(names)}): ", text)}
    assert not double


def test_annotations_that_only_type_checkers_know_are_left_out():
    class Mine:
        def __init__(self, horizon: "Annotated[int, AtLeast(2)]", other: "Nowhere" = 0): ...  # noqa: F821

    assert set(constructor_hints(Mine)) == {"horizon"}
    with pytest.raises(ValueError, match="horizon must be at least 2"):
        check_values(Mine, horizon=1)
