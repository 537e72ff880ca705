"""The registry: names, errors and plug-ins."""

from dataclasses import FrozenInstanceError
from importlib.metadata import EntryPoint, EntryPoints

import pytest
import torch

from totalprop import estimators
from totalprop.estimators import Estimator, make, mixing, register, registry
from totalprop.estimators.baselines import none
from totalprop.estimators.declarations import declared

MINE = Estimator(mixing.pathwise, source="a test")


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """Undo, after each test, what it registered."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


@pytest.fixture
def plugin(monkeypatch):
    """Another distribution that declares the entry point `plugged = test_registry_plugin:MINE`."""
    import sys
    from types import SimpleNamespace

    monkeypatch.setitem(sys.modules, "test_registry_plugin", SimpleNamespace(MINE=MINE, BAD=3))
    group = registry.ENTRY_POINT_GROUP

    def entry_points(**selected):
        declared = [
            EntryPoint("plugged", "test_registry_plugin:MINE", group),
            EntryPoint("broken", "test_registry_plugin:BAD", group),
            EntryPoint("other", "test_registry_plugin:MINE", "some.other.group"),
        ]
        return EntryPoints(declared).select(**selected)

    monkeypatch.setattr(registry, "entry_points", entry_points)


def test_the_papers_estimators_are_there():
    papers = {"rp", "lr", "tp", "tps", "tpx", "tpx-scalar", "tpx-ivw", "tpx-ivw-scalar", "ivw"}
    assert papers | {"tpg"} <= set(estimators.names())


@pytest.mark.parametrize("name", estimators.names())
def test_every_entry_has_a_source_and_is_made_by_name(name):
    estimator = make(name)
    assert isinstance(estimator, Estimator)
    assert estimator.source
    assert estimator.probe in {"none", "all", "subset"}


def test_make_changes_fields_of_a_copy():
    changed = make("tpx", baseline=none, cross_fit=True)
    assert changed.baseline is none
    assert changed.cross_fit
    assert changed.weight is mixing.tpx
    assert make("tpx").baseline is not none
    with pytest.raises(TypeError, match="nonsense"):
        make("tpx", nonsense=1)


@pytest.mark.parametrize("name", estimators.names())
@pytest.mark.parametrize("baseline", ["none", "mean", "leave-one-out", "leave_one_out", "critic"])
def test_baselines_are_taken_by_name(name, baseline):
    expected = getattr(estimators.baselines, baseline.replace("-", "_"))
    assert make(name, baseline=baseline).baseline is expected
    assert make(name, baseline=expected).baseline is expected


@pytest.mark.parametrize("name", [name for name in estimators.names() if name != "rp-cut"])
def test_legs_are_taken_by_name(name):
    score, biw = estimators.legs.score, estimators.legs.biw
    for given in ("biw", ["biw"], biw, (biw,)):
        assert make(name, legs=given).legs == (biw,)
    if not declared(make(name).weight, "several_legs"):
        with pytest.raises(ValueError, match="takes one score leg, got 2; use estimator 'tpx'"):
            make(name, legs=("score", "biw"))
    else:
        assert make(name, legs=("score", biw)).legs == (score, biw)


WRONG_OPTIONS = [
    ({"baseline": "critc"}, ValueError, "unknown baseline 'critc': did you mean 'critic'"),
    ({"baseline": None}, TypeError, "a baseline is one of none, mean, .* got None"),
    ({"legs": "bwi"}, ValueError, "unknown leg 'bwi': did you mean 'biw'"),
    (
        {"legs": (3,)},
        TypeError,
        "a leg is one of score, .* mvd, or a function, got 3",
    ),
    ({"legs": ()}, ValueError, "legs is a tuple of functions, got"),
    ({"probe": "some"}, ValueError, "probe is 'none', 'all' or 'subset', got 'some'"),
    ({"leg": "biw"}, TypeError, "no option 'leg': choose among .*legs"),
]


@pytest.mark.parametrize("name", estimators.names())
@pytest.mark.parametrize(("changes", "kind", "message"), WRONG_OPTIONS)
def test_a_wrong_option_is_refused_where_it_is_given(name, changes, kind, message):
    with pytest.raises(kind, match=message) as caught:
        make(name, **changes)
    assert "\n" not in str(caught.value)


def test_the_fields_of_an_estimator_are_checked():
    with pytest.raises(ValueError, match=r"legs is a tuple of functions.*estimators\.make takes"):
        Estimator(mixing.tpx, legs="biw")
    with pytest.raises(ValueError, match="weight and baseline are functions"):
        Estimator(mixing.tpx, baseline="mean")


def test_an_estimator_passes_through():
    assert make(MINE) == MINE
    assert make(MINE, cross_fit=True).cross_fit
    with pytest.raises(FrozenInstanceError):
        MINE.cross_fit = True


@pytest.mark.parametrize(
    ("typed", "meant"), [("tpx-iwv", "tpx-ivw"), ("tpxx", "tpx"), ("rpp", "rp")]
)
def test_unknown_name_suggests_the_nearest(typed, meant):
    with pytest.raises(ValueError, match=f"unknown estimator '{typed}'.*did you mean '{meant}'"):
        make(typed)


def test_unknown_name_lists_all_when_none_is_near():
    with pytest.raises(ValueError, match="choose one of rp, lr") as caught:
        make("something else")
    assert "did you mean" not in str(caught.value)


def test_registered_estimator_is_made_by_name():
    register("mine", MINE)
    assert make("mine") is not None
    assert make("mine").source == "a test"
    assert "mine" in estimators.names()


def test_a_name_is_given_to_another_estimator_on_request():
    register("mine", make("lr"))
    with pytest.raises(ValueError, match=r"'mine' is already .* or pass replace=True"):
        register("mine", MINE)
    register("mine", MINE, replace=True)
    assert make("mine") is MINE


def test_register_refuses_duplicates_and_wrong_types():
    with pytest.raises(ValueError, match="'tpx' is already registered"):
        register("tpx", MINE)
    with pytest.raises(TypeError, match="expected an Estimator, got function"):
        register("mine", mixing.tpx)
    assert "mine" not in estimators.names()


@pytest.mark.usefixtures("plugin")
def test_entry_point_plugin_is_found():
    assert "plugged" in estimators.names()
    assert "other" not in estimators.names()
    assert make("plugged", cross_fit=True).source == "a test"
    assert make("plugged") == MINE  # the second time, from the registry
    assert estimators.names().count("plugged") == 1


@pytest.mark.usefixtures("plugin")
def test_entry_point_that_names_no_estimator_is_refused():
    with pytest.raises(TypeError, match="expected an Estimator, got int"):
        make("broken")


@pytest.mark.usefixtures("plugin")
def test_ours_win_over_a_plugin_of_the_same_name(monkeypatch):
    register("plugged", Estimator(mixing.tpx, source="ours"))
    assert make("plugged").source == "ours"


def test_a_whole_graph_estimator_has_no_node():
    mean = torch.zeros(3, 1)
    with pytest.raises(ValueError, match=r"estimators\.gradient"):
        make("ivw")(mean, mean + 1, mean, torch.zeros(3))
