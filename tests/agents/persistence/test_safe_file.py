"""Files without code: values survive a round trip, and a hostile file executes nothing."""

import os
import random
import time
from collections import deque
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule

import totalprop.envs  # noqa: F401
from tests.agents.persistence import hostile_files
from totalprop import estimators
from totalprop.agents import DAAPPO, PIPPS, DreamerTPX
from totalprop.agents.persistence import safe_file

SMALL_DREAMER = {"policy_kwargs": {"stoch": 3, "deter": 5, "hidden": 5, "width": 5}}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "model.zip"
    hostile_files.good_agent().save(path)
    return path


@pytest.fixture(scope="module")
def hostile(good, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    return folder / "owned", hostile_files.make_all(good, folder, folder / "owned")


def test_hostile_and_broken_files_are_one_sentence_each_and_execute_nothing(hostile):
    proof, files = hostile
    assert len(files) >= 90
    for name, (path, words) in files.items():
        with pytest.raises(ValueError, match=words) as error:
            PIPPS.load(path, device="cpu")
        text = str(error.value)
        assert text.startswith("cannot load") and "\n" not in text and len(text) < 700, name
        assert not proof.exists(), name
        assert not (path.parent.parent / "escape").exists(), name


STATUS = Path("/proc/self/status")


def peak_of(function):
    """MB that a call takes at its peak, beside what was in use."""

    def read(name):
        line = next(x for x in STATUS.read_text().splitlines() if x.startswith(name))
        return int(line.split()[1]) / 1e3

    Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS
    before = read("VmRSS")
    function()
    return read("VmHWM") - before


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="reads Linux's /proc")
def test_no_file_takes_much_more_memory_than_its_size_or_much_time(hostile, tmp_path):
    """Each of these took gigabytes: a tensor used often, sizes in settings, 64 MB of `{}`."""
    ppo = DAAPPO("MlpPolicy", "Pendulum-v1", n_steps=16, batch_size=16, device="cpu")
    ppo.save(tmp_path / "ppo.zip")
    dreamer = DreamerTPX("DreamerPolicy", "Pendulum-v1", device="cpu", **SMALL_DREAMER)
    dreamer.save(tmp_path / "dreamer.zip")
    files = [(PIPPS, path) for path, _ in hostile[1].values()]
    for cls, name, kwargs in (
        (DAAPPO, "ppo", {"net_arch": [9000, 9000]}), (DAAPPO, "ppo", {"net_arch": [1] * 10**5}),
        (DreamerTPX, "dreamer", {"deter": 20000}), (DreamerTPX, "dreamer", {"width": 30000}),
    ):  # fmt: skip
        document, tensors = hostile_files.take_apart(tmp_path / f"{name}.zip")
        document["values"]["attributes"]["policy_kwargs"] = kwargs
        files.append((cls, tmp_path / f"{len(files)}.zip"))
        hostile_files.put_together(files[-1][1], document, tensors)
    document, tensors = hostile_files.take_apart(tmp_path / "ppo.zip")
    tensors["large"] = torch.zeros(2_500_000)
    document["values"]["attributes"]["_last_obs"] = [{"$array": "large"}] * 700
    files.append((DAAPPO, tmp_path / "aliases.zip"))
    hostile_files.put_together(files[-1][1], document, tensors)
    for cls, path in files:

        def load(cls=cls, path=path):
            with pytest.raises(ValueError, match="cannot load"):
                cls.load(path, device="cpu")

        started = time.process_time()
        assert peak_of(load) < 60 + 4 * path.stat().st_size / 1e6, path.name
        assert time.process_time() - started < 10, path.name


def test_a_pipe_a_device_and_a_folder_are_one_sentence(tmp_path):
    os.mkfifo(tmp_path / "pipe.zip")
    (tmp_path / "folder.zip").mkdir()
    for path, words in (
        (tmp_path / "pipe.zip", "a pipe, not a file"), (Path("/dev/zero"), "a device, not a file"),
        (tmp_path / "folder.zip", "a folder, not a file"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            PIPPS.load(path)


def test_what_could_not_be_read_is_not_written(tmp_path):
    safe_file.write(tmp_path / "file", "test", {"value": 1})
    with pytest.raises(ValueError, match="values, more than any model needs"):
        safe_file.write(tmp_path / "file", "test", {"value": [0] * safe_file.MAX_VALUES})
    assert safe_file.read(tmp_path / "file", "test") == {"value": 1}


def test_the_payload_would_have_been_executed_by_unpickling(tmp_path):
    import pickle

    proof = tmp_path / "owned"
    pickle.loads(pickle.dumps(hostile_files.Payload(proof)))
    assert proof.read_text() == "owned"


FUZZ = {"deadline": None, "suppress_health_check": list(HealthCheck)}


def check_damaged(good, path, data):
    """Bytes changed, cut or inserted: a ValueError, or an agent with finite weights."""
    content = bytearray(good.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["change", "cut", "insert"]))
        if kind == "change":
            content[place] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del content[place : place + data.draw(st.integers(1, 64))]
        else:
            content[place:place] = data.draw(st.binary(min_size=1, max_size=16))
    path.write_bytes(bytes(content))
    try:
        agent = PIPPS.load(path, device="cpu")
    except ValueError:
        return
    assert all(torch.isfinite(p).all() for p in agent.policy.parameters())


def check_repaired(good, path, data):
    """The same inside: an entry of the JSON document replaced, under a valid checksum."""
    document, tensors = hostile_files.take_apart(good)
    for _ in range(data.draw(st.integers(1, 3))):
        node, parent, key = document["values"], None, None
        while isinstance(node, dict | list) and len(node):
            parent = node
            key = data.draw(
                st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node)))
            )
            node = parent[key]
            if data.draw(st.integers(0, 5)) == 0:
                break
        if parent is not None:
            parent[key] = data.draw(JSON)
    hostile_files.put_together(path, document, tensors)
    try:
        PIPPS.load(path, device="cpu")
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(-2, 2) | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3)
    | st.dictionaries(st.sampled_from(["$tensor", "$array", "$box", "$class", "$items", "a"]), x,
                      max_size=2),
    max_leaves=5,
)  # fmt: skip


@settings(max_examples=60, **FUZZ)
@given(data=st.data())
def test_damage_anywhere_is_noticed_or_harmless(good, data):
    check_damaged(good, good.with_name("damaged.zip"), data)


@settings(max_examples=60, **FUZZ)
@given(data=st.data())
def test_a_document_with_other_entries_is_refused_or_harmless(good, data):
    check_repaired(good, good.with_name("repaired.zip"), data)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("check", [check_damaged, check_repaired])
def test_fuzzing_for_minutes(check, good):
    @settings(max_examples=int(os.environ.get("FUZZ_EXAMPLES", "10000")), database=None, **FUZZ)
    @given(data=st.data())
    def fuzz(data):
        check(good, good.with_name("fuzzed.zip"), data)

    fuzz()


VALUES = {
    "nothing": None, "truth": True, "whole": 2**200, "real": 0.1, "infinite": float("inf"),
    "text": "ä\n$", "list": [1, [2.5, "x"]], "tuple": (1, (2,), ()),
    "numbers": {3: "a", (1, 2): "b"},
    "dollar": {"$tensor": 1}, "deque": deque([{"r": 1.0}], maxlen=7),
    "array": np.arange(6, dtype=np.uint32).reshape(2, 3), "single": np.float32(0.1),
    "count": np.int64(5), "flag": np.bool_(True), "scalar": np.array(2.5),
    "empty": np.zeros((0, 3)),
    "backwards": np.arange(4)[::-1], "tensor": torch.arange(4.0).view(2, 2).T,
    "half": torch.ones(3, dtype=torch.bfloat16), "device": torch.device("cpu"),
    "box": spaces.Box(-1, np.array([1, np.inf], np.float32)),
    "discrete": spaces.Discrete(3, start=1),
    "several": spaces.Dict({"a": spaces.MultiBinary(4), "b": spaces.MultiDiscrete([2, 3])}),
    "python": random.Random(0).getstate(), "class": torch.nn.Tanh,
    "estimator": estimators.make("tpx"),
    "changed": estimators.make("tpx", legs=(estimators.legs.biw,), cross_fit=True,
                               baseline=estimators.baselines.critic),
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_values_come_out_as_they_went_in(name, tmp_path):
    value = VALUES[name]
    safe_file.write(tmp_path / "file", "test", {"value": value})
    found = safe_file.read(tmp_path / "file", "test")["value"]
    if isinstance(value, np.ndarray | np.generic):
        assert type(found) is type(value) and found.dtype == value.dtype
        np.testing.assert_array_equal(found, value)
    elif isinstance(value, torch.Tensor):
        assert found.dtype == value.dtype and torch.equal(found, value)
    elif isinstance(value, deque):
        assert found == value and found.maxlen == value.maxlen
    else:
        assert found == value and type(found) is type(value)


def test_schedules(tmp_path):
    schedules = {
        "constant": FloatSchedule(ConstantSchedule(0.2)),
        "linear": FloatSchedule(LinearSchedule(1.0, 0.1, 0.5)),
        "function": FloatSchedule(lambda p: p),
    }
    safe_file.write(tmp_path / "file", "test", schedules)
    found = safe_file.read(tmp_path / "file", "test")
    assert found["constant"] == 0.2 and found["linear"](0.8) == schedules["linear"](0.8)
    assert isinstance(found["function"], safe_file.NotInFile)


@pytest.mark.parametrize("value", [lambda x: x, object(), random.Random(0), np.array([None])])
def test_what_has_no_plain_form_is_named_not_stored(value, tmp_path):
    safe_file.write(tmp_path / "file", "test", {"value": value})
    found = safe_file.read(tmp_path / "file", "test")["value"]
    assert isinstance(found, safe_file.NotInFile) and type(value).__name__ in found.kind


def test_stable_baselines3_reads_the_document(good):
    data, parameters, _ = load_from_zip_file(good)
    assert data["format"] == safe_file.FORMAT and data["values"]["attributes"]["horizon"] == 30
    assert parameters == {}


def test_a_failed_write_leaves_the_old_file_and_no_other(good, tmp_path, monkeypatch):
    agent = hostile_files.good_agent()
    path = tmp_path / "model.zip"
    agent.save(path)
    before = path.read_bytes()

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        agent.learn(30, reset_num_timesteps=False).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    PIPPS.load(path, device="cpu")


def test_a_user_policy_is_passed_again(tmp_path):
    from totalprop.agents.trials.controllers import RBFPolicy

    class Mine(RBFPolicy):
        pass

    env = gym.make("totalprop/CartPoleSwingUp-v0")
    PIPPS(Mine, env, device="cpu").save(tmp_path / "mine")
    with pytest.raises(ValueError, match=r"policy_class was a .*Mine, which files do not hold"):
        PIPPS.load(tmp_path / "mine", env)
    loaded = PIPPS.load(tmp_path / "mine", env, "cpu", custom_objects={"policy_class": Mine})
    assert isinstance(loaded.policy, Mine)


GOLDEN = Path(__file__).parent / "golden"  # one file per format, written by the version that had it


def test_a_file_of_format_2_loads():
    """Written by hostile_files.good_agent, at the commit that introduced the format."""
    agent = PIPPS.load(GOLDEN / "format_2.zip", device="cpu")
    assert agent.num_timesteps == 60 and len(agent.dynamics.inputs) == 60
    action, _ = agent.predict(np.array([0.1, 0.2, 0.3, 0.4], np.float32))
    np.testing.assert_allclose(action, [0.00670946], rtol=1e-5)


def test_a_file_of_format_1_says_what_reads_it():
    with pytest.raises(ValueError, match=r"before format 2 \(up to commit edf8eef\)"):
        PIPPS.load(GOLDEN / "format_1.zip", device="cpu")
