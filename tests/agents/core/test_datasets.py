"""Minari datasets, written by Minari itself: how they are found, opened, checked and read."""

import json
import sys
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from totalprop.agents.core.datasets import SpacesOnly, check_spaces, episodes, open_dataset

minari = pytest.importorskip("minari")  # which needs Python 3.11
from tests.datasets import buffer, store  # noqa: E402

VECTOR = SimpleNamespace(
    observation_space=spaces.Box(-1, 1, (2,), np.float32), action_space=spaces.Discrete(3)
)
NAME = "tests/two-v3"


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    (tmp_path / "datasets").mkdir()


def episode(steps=3, *, terminated=True, observations=None, rewards=None):
    seen = np.linspace(0, 1, 2 * steps + 2, dtype=np.float32).reshape(-1, 2)
    return buffer(
        list(seen if observations is None else observations),
        [t % 3 for t in range(steps)],
        [float(t) for t in range(steps)] if rewards is None else rewards,
        terminated=terminated,
    )


def changed(**arrays):
    """An episode that Minari writes although no environment gives it."""
    found = episode()
    for name, value in arrays.items():
        object.__setattr__(found, name, value)
    return found


@pytest.mark.parametrize("given", ["id", "folder", "data", "open"])
def test_a_dataset_is_found_by_its_id_and_by_its_folder(given, tmp_path):
    made = store(NAME, [episode(3), episode(2, terminated=False)], VECTOR)
    folder = tmp_path / "datasets" / "tests" / "two-v3"
    source = {"id": NAME, "folder": folder, "data": str(folder / "data"), "open": made}[given]
    found = open_dataset(source)
    assert found.id == NAME and (found.total_episodes, found.total_steps) == (2, 5)
    first, second = episodes(found)
    assert (first.terminated, second.terminated) == (True, False)
    assert np.array_equal(first.observations, episode(3).observations)
    assert first.actions.tolist() == [0, 1, 2] and first.rewards.tolist() == [0, 1, 2]
    assert len(second.observations) == 3 and len(second.actions) == 2


def test_a_part_of_a_dataset_is_read_as_that_part():
    made = store(NAME, [episode(3), episode(2), episode(4)], VECTOR)
    part = made.filter_episodes(lambda found: len(found) != 2)
    assert [len(found.rewards) for found in episodes(open_dataset(part))] == [3, 4]


def test_a_dataset_that_is_not_here_is_downloaded(monkeypatch):
    asked = []

    def download(name):
        asked.append(name)
        store(name, [episode()], VECTOR)

    monkeypatch.setattr(minari, "download_dataset", download)
    assert open_dataset("tests/far-v0").total_steps == 3
    assert open_dataset("tests/far-v0").total_steps == 3
    assert asked == ["tests/far-v0"]


def test_one_that_cannot_be_downloaded_is_a_sentence(monkeypatch, tmp_path):
    def download(name):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(minari, "download_dataset", download)
    with pytest.raises(ValueError, match=r"'far/away-v0' is not in .*: no network$"):
        open_dataset("far/away-v0")


@pytest.mark.parametrize("name", ["runs/replay.npz", "a/b", "", "a b-v0"])
def test_what_is_no_id_is_a_sentence(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="NAMESPACE/NAME-vVERSION"):
        open_dataset(name or "-")


def test_without_minari_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(ValueError, match=r"need Minari: pip install .*\[minari\]"):
        open_dataset(NAME)


def test_a_folder_without_a_dataset_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="holds no Minari dataset"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"minari_version": "9.9.9"}, "does not support"),
        ({"data_format": "tape"}, "tape"),
        ({"observation_space": None}, "lacks its observation_space"),
        ({"action_space": '{"type": "Telepathy"}'}, "deserialize_space"),
        ({"data_format": "arrow"}, "pyarrow|arrow"),
    ],
)
def test_a_dataset_that_cannot_be_read_is_a_sentence(change, message, tmp_path, monkeypatch):
    store(NAME, [episode()], VECTOR)
    path = tmp_path / "datasets" / NAME / "data" / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=f"cannot read the dataset .*({message})"):
        open_dataset(NAME)


def test_opening_a_dataset_does_not_run_what_it_names(tmp_path):
    """Minari makes the environment that a dataset names, where it lacks its spaces."""
    store(NAME, [episode()], VECTOR)
    path = tmp_path / "datasets" / NAME / "data" / "metadata.json"
    spec = json.loads(gym.spec("CartPole-v1").to_json())
    spec |= {"entry_point": "os:system", "kwargs": {"command": f"touch {tmp_path}/executed"}}
    metadata = json.loads(path.read_text()) | {"env_spec": json.dumps(spec)}
    path.write_text(json.dumps(metadata))
    assert len(list(episodes(open_dataset(NAME)))) == 1
    del metadata["action_space"]
    path.write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="lacks its action_space"):
        open_dataset(NAME)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(Exception, match="int"):  # of gym.make, which has called os.system
        minari.load_dataset(NAME)
    assert (tmp_path / "executed").exists()


NAN = [0.0, np.nan, 0.0]
BAD = {
    "a reward that is not finite": (changed(rewards=np.array(NAN)), "rewards .* first in number 1"),
    "an observation too few": (changed(observations=np.zeros((3, 2), "f4")), r"\[3, 2\], .*\[4, 2"),
    "another shape": (changed(observations=np.zeros((4, 3), "f4")), r"\[4, 3\], expected \[4, 2\]"),
    "an action too many": (changed(actions=np.zeros(4, int)), r"actions .*\[4\], expected \[3\]"),
    "steps after its end": (
        changed(terminations=np.array([False, True, False])), "step 1 of 3 terminates",
    ),
    "steps after a truncation": (
        changed(truncations=np.array([True, False, False])), "step 0 of 3",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("bad", "message"), BAD.values(), ids=BAD)
def test_what_no_episode_gives_is_a_sentence_with_its_number(bad, message):
    found = open_dataset(store(NAME, [episode(), bad], VECTOR))
    with pytest.raises(ValueError, match=message) as raised:
        list(episodes(found))
    assert f"episode 1 of the dataset '{NAME}'" in str(raised.value)


def test_an_episode_without_steps_is_a_sentence():
    """Minari writes none, but other programs do."""
    none = minari.EpisodeData(7, np.zeros((1, 2), "f4"), *[np.zeros(0)] * 4, {})
    dataset = SimpleNamespace(id=NAME, episode_indices=[7], iterate_episodes=lambda _: [none])
    with pytest.raises(ValueError, match=r"episode 7 .* has no steps"):
        list(episodes(dataset))


def test_an_entry_that_is_missing_is_a_sentence():
    own = spaces.Dict({"a": spaces.Box(0, 1, (1,)), "b": spaces.Box(0, 1, (1,))})
    of = SimpleNamespace(observation_space=own, action_space=spaces.Discrete(3))
    part = changed(observations={"a": np.zeros((4, 1), "f4")})
    with pytest.raises(ValueError, match="lack the entry 'b'"):
        list(episodes(store(NAME, [part], of)))


def test_an_episode_that_just_ends_is_truncated():
    none = np.zeros(3, bool)
    made = store(NAME, [changed(terminations=none, truncations=none)], VECTOR)
    assert [found.terminated for found in episodes(made)] == [False]


BOX, IMAGE = spaces.Box(-1, 1, (2,), np.float32), spaces.Box(0, 255, (64, 48, 3), np.uint8)
SPACES = [  # of observations: the dataset's, the agent's, whether they fit
    (BOX, spaces.Box(-5, 5, (2,), np.float64), True),
    (BOX, spaces.Box(-1, 1, (3,), np.float32), False),
    (BOX, spaces.Box(-1, 1, (2,), np.int32), False),
    (IMAGE, spaces.Box(0, 255, (3, 64, 48), np.uint8), True),
    (IMAGE, spaces.Box(0, 255, (64, 64, 3), np.uint8), False),
    (spaces.Discrete(3), spaces.Discrete(3), True),
    (spaces.Discrete(3), spaces.Discrete(3, start=1), False),
    (spaces.Dict({"a": BOX}), spaces.Dict({"a": BOX}), True),
    (spaces.Dict({"a": BOX}), spaces.Dict({"b": BOX}), False),
    (spaces.Dict({"a": BOX}), BOX, False),
]


@pytest.mark.parametrize(("own", "other", "fits"), SPACES)
def test_observations_have_to_be_of_one_space(own, other, fits):
    dataset = SimpleNamespace(id=NAME, observation_space=own, action_space=BOX)
    of = SimpleNamespace(observation_space=other, action_space=BOX)
    if fits:
        return check_spaces(dataset, of, "the agent")
    with pytest.raises(ValueError, match=r"the observations of the dataset '.*' are .*, those of "):
        check_spaces(dataset, of, "the agent")


def test_actions_have_to_have_the_same_bounds():
    dataset = SimpleNamespace(id=NAME, observation_space=BOX, action_space=spaces.Box(-1, 1, (1,)))
    of = SimpleNamespace(observation_space=BOX, action_space=spaces.Box(-2, 2, (1,)))
    with pytest.raises(ValueError, match=r"the actions .*Box\(-1.0.*the agent are Box\(-2.0"):
        check_spaces(dataset, of, "the agent")


def test_spaces_alone_cannot_be_acted_in():
    env = SpacesOnly(VECTOR)
    assert env.action_space == spaces.Discrete(3)
    for act in (env.reset, lambda: env.step(0)):
        with pytest.raises(RuntimeError, match="learn_offline"):
            act()
