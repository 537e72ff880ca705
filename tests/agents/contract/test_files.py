"""`save` and `load`, and parameters that are taken out and set."""

import copy
import io
import re
import warnings
import zipfile

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import given as given_any
from hypothesis import strategies as st
from stable_baselines3 import PPO
from stable_baselines3.common.utils import ConstantSchedule, LinearSchedule
from stable_baselines3.common.vec_env import VecNormalize

from tests.agents.contract.conftest import Maker
from tests.agents.contract.environments import CountingEnv, OtherSpaces, vector
from tests.agents.contract.probes import assert_same, assert_same_agents, parameters
from tests.agents.persistence import hostile_files
from totalprop import estimators
from totalprop.agents import AGENTS
from totalprop.agents.persistence.checkpoint import Checkpoints

# What is kept of a trained agent


def replay_sizes(agent):
    return agent.replay_buffer.size(), len(agent.replay_buffer)


def test_a_replay_has_a_file_of_its_own(make, trained, tmp_path):
    """With stable-baselines3's names, in agents whose replay is theirs; a suffix is appended."""
    if not hasattr(make.cls, "save_replay_buffer"):
        pytest.skip("it has no replay")
    with pytest.raises(ValueError, match="there is no replay yet"):
        make().save_replay_buffer(tmp_path / "replay")
    trained.save_replay_buffer(str(tmp_path / "new" / "replay"))
    [path] = (tmp_path / "new").iterdir()
    assert path.stem == "replay" and path.suffix
    for name in ("replay", path.name):
        agent = make()
        agent.load_replay_buffer(str(tmp_path / "new" / name))
        assert replay_sizes(agent) == replay_sizes(trained)
    before = replay_sizes(agent)[0]
    agent.learn(14, reset_num_timesteps=False)
    assert agent.replay_buffer.size() >= before + 14 and agent._n_updates > 0
    with pytest.raises(ValueError, match="truncate_last_traj"):
        agent.load_replay_buffer(path, truncate_last_traj=False)
    with pytest.raises(FileNotFoundError):
        agent.load_replay_buffer(tmp_path / "none")
    (tmp_path / "other").write_bytes(b"0" * 100)
    before = replay_sizes(agent)
    with pytest.raises(ValueError, match=r"other"):
        agent.load_replay_buffer(tmp_path / "other")
    assert replay_sizes(agent) == before
    loaded = make.cls.load(path_of_agent(trained, tmp_path), device="cpu")
    with pytest.raises(ValueError, match="set an environment first"):
        loaded.load_replay_buffer(path)


def path_of_agent(agent, folder):
    agent.save(folder / "agent")
    return folder / "agent.zip"


def actions(agent, observations):
    return agent.predict(observations, deterministic=True)[0]


def test_a_loaded_agent_is_the_same(make, trained, file, observations):
    loaded = make.cls.load(file, device="cpu")
    assert_same_agents(loaded, trained)
    np.testing.assert_array_equal(actions(loaded, observations), actions(trained, observations))
    for name in make.arguments():
        if name not in ("policy", "device"):
            assert getattr(loaded, name) == getattr(trained, name), name
    assert loaded.policy_class is trained.policy_class
    assert loaded.observation_space == trained.observation_space
    assert loaded.action_space == trained.action_space
    assert list(loaded.ep_info_buffer) == list(trained.ep_info_buffer)


def test_the_environment_may_be_an_id_wherever_it_is_set(make, file, monkeypatch):
    spec = gym.envs.registration.EnvSpec("Counting-v0", CountingEnv)
    monkeypatch.setitem(gym.registry, "Counting-v0", spec)
    agent = make.cls.load(file, env="Counting-v0", device="cpu")
    assert isinstance(agent.get_env().envs[0].unwrapped, CountingEnv)
    before = agent.get_env()
    agent.set_env("Counting-v0")
    assert agent.get_env() is not before
    assert isinstance(agent.get_env().envs[0].unwrapped, CountingEnv)


def test_the_window_of_averages_may_be_another(make, trained, file):
    loaded = make.cls.load(file, device="cpu", stats_window_size=1)
    assert list(loaded.ep_info_buffer) == list(trained.ep_info_buffer)[-1:]
    assert loaded.ep_success_buffer.maxlen == 1
    words = r"stats_window_size must be at least 1.*, got 0.*here stats_window_size"
    with pytest.raises(ValueError, match=words):
        make.cls.load(file, device="cpu", stats_window_size=0)


def test_an_untrained_agent_is_saved_too(make, observations, tmp_path):
    agent = make(learning_rate=0.0123)
    agent.save(tmp_path / "agent")
    loaded = make.cls.load(tmp_path / "agent", device="cpu")
    assert_same_agents(loaded, agent)
    np.testing.assert_array_equal(actions(loaded, observations), actions(agent, observations))
    assert loaded.learning_rate == 0.0123 and loaded.get_env() is None


def test_saving_after_a_stop_within_an_episode(make, tmp_path, observations):
    agent = make().learn(100, callback=lambda values, _: values["self"].num_timesteps < 10)
    agent.save(tmp_path / "agent")
    loaded = make.cls.load(tmp_path / "agent", env=CountingEnv(), device="cpu")
    assert loaded.num_timesteps == 10
    np.testing.assert_array_equal(actions(loaded, observations), actions(agent, observations))
    assert loaded.learn(14, reset_num_timesteps=False).num_timesteps >= 24


@pytest.mark.parametrize("kind", ["str", "Path", "suffix", "stream"])
def test_a_file_is_a_path_with_or_without_suffix_or_a_stream(make, trained, kind, tmp_path):
    path = {"str": str(tmp_path / "agent"), "suffix": tmp_path / "agent.zip"}.get(
        kind, io.BytesIO() if kind == "stream" else tmp_path / "new" / "folder" / "agent"
    )
    trained.save(path)
    if kind == "stream":
        path.seek(0)
    assert_same_agents(make.cls.load(path, device="cpu"), trained)


def test_without_an_environment_it_predicts_but_does_not_learn(make, file, observations):
    loaded = make.cls.load(file, device="cpu")
    actions(loaded, observations)
    with pytest.raises(AssertionError):
        loaded.learn(7)
    loaded.set_env(CountingEnv())
    before = parameters(loaded)
    loaded.learn(21)
    assert loaded.num_timesteps == 21 and not torch.equal(parameters(loaded), before)


def test_learning_continues_after_load_on_another_number_of_environments(make, file, trained):
    found = []
    for _ in range(2):
        loaded = make.cls.load(file, env=vector(7, 4), device="cpu")
        assert loaded.n_envs == 2
        loaded.learn(28, reset_num_timesteps=False)
        assert loaded.num_timesteps >= 56 and loaded._n_updates > trained._n_updates
        found.append(loaded)
    assert_same_agents(*found)  # load seeds from the seed


def test_arguments_given_to_load_replace_the_files(make, file):
    loaded = make.cls.load(file, env=CountingEnv(), device="cpu", learning_rate=0.0321, verbose=0)
    assert loaded.learning_rate == 0.0321 and loaded.lr_schedule(1.0) == 0.0321
    with pytest.raises(ValueError, match="bogus passed to load: the agent has no such argument"):
        make.cls.load(file, device="cpu", bogus=3)
    with pytest.raises(ValueError, match="arguments that fit it, here env, learning_rate"):
        make.cls.load(file, env=CountingEnv(), device="cpu", learning_rate=-1.0)


def test_objects_are_in_the_file_or_asked_for(make, tmp_path):
    """An estimator is; a schedule that is a function is not, and must be passed again."""
    changes = {"learning_rate": lambda p: 0.1 * p}
    if make.takes("estimator"):  # one with a closed-form gradient has none
        changes["estimator"] = estimators.make("tpx", baseline=estimators.baselines.none)
    agent = make(**changes)
    agent.save(tmp_path / "agent")
    with pytest.raises(ValueError, match=r"learning_rate was a function.*pass it again"):
        make.cls.load(tmp_path / "agent", env=CountingEnv(), device="cpu")
    schedule = {"learning_rate": lambda p: 0.1 * p}
    loaded = make.cls.load(tmp_path / "agent", CountingEnv(), "cpu", custom_objects=schedule)
    assert getattr(loaded, "estimator", None) == changes.get("estimator")
    assert loaded.learning_rate(0.5) == 0.05
    loaded.learn(14)


def test_attributes_can_be_left_out(make):
    agent = make()
    names = set(agent.file_values()["attributes"])
    assert "seed" in names and not {"env", "policy", "_logger"} & names
    assert "seed" not in agent.file_values(exclude=["seed"])["attributes"]


# Files that do not fit


def test_a_missing_file(make):
    with pytest.raises(FileNotFoundError, match=r"no/such/file\.zip does not exist"):
        make.cls.load("no/such/file")


@pytest.mark.parametrize("other", AGENTS)
def test_a_file_of_another_agent_is_one_clear_sentence(make, file, other):
    cls = Maker(other).cls
    if other == make.name:
        return
    with pytest.raises(ValueError, match=rf"^cannot load .*agent.zip as a {cls.__name__}") as error:
        cls.load(file)
    assert f"expected a file written by {cls.__name__}.save" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_of_another_library_is_not_unpickled(make, tmp_path):
    PPO("MlpPolicy", "Pendulum-v1", n_steps=4, batch_size=4, device="cpu").save(tmp_path / "ppo")
    with pytest.raises(ValueError, match="cannot load") as error:
        make.cls.load(tmp_path / "ppo")
    assert "\n" not in str(error.value)


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 9), st.floats(), st.text(max_size=3),
    st.sampled_from([[], {}, [5, 5], [[1.0]], {"a": None}, 2**70, {"$number": ["<f8", 0.5]}]),
)  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given_any(data=st.data())
def test_a_file_with_any_other_value_is_refused_or_an_agent_that_works(
    make, file, tmp_path, monkeypatch, data
):
    """One member of the document is another JSON value: an attribute, a size, a moment's name."""
    monkeypatch.chdir(tmp_path)  # tensorboard_log is a value, too
    document, tensors = hostile_files.take_apart(file)
    node = document["values"]
    while True:
        keys = sorted(node) if isinstance(node, dict) else range(len(node))
        key = data.draw(st.sampled_from(keys))
        if not (isinstance(node[key], dict | list) and node[key]) or data.draw(st.booleans()):
            break
        node = node[key]
    node[key] = data.draw(VALUES)
    hostile_files.put_together(tmp_path / "other.zip", document, tensors)
    try:
        agent = make.cls.load(tmp_path / "other.zip", env=CountingEnv(), device="cpu")
    except ValueError as error:
        text = str(error)
        assert text.startswith("cannot load") and "\n" not in text and len(text) < 700
        return
    agent.predict(agent.observation_space.sample())
    takes_long = getattr(agent, "replay_ratio", 0) > 100
    if agent.n_envs == 1 and key not in ("compile", "_needs_cost_fn") and not takes_long:
        try:
            agent.learn(14, reset_num_timesteps=False)
        except FloatingPointError:  # a step size of 9 is one
            return
    agent.save(tmp_path / "again")
    make.cls.load(tmp_path / "again", device="cpu")


def test_what_could_not_be_loaded_is_not_saved(make, trained, tmp_path):
    """Neither networks nor what optimisers keep; the older file and checkpoint remain."""
    agent = make().learn(21)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.init_callback(agent)
    for name, state in trained.get_parameters().items():
        agent.set_parameters(copy.deepcopy(trained.get_parameters()))
        agent.save(tmp_path / "agent")
        checkpoints.save()
        before = (tmp_path / "agent.zip").read_bytes(), checkpoints.paths()
        values = agent.get_parameters()[name]
        if "param_groups" in state:
            values = values["state"].get(0, {})
        tensors = [x for x in values.values() if x.is_floating_point() and x.dim() and len(x)]
        if not tensors:
            continue
        with torch.no_grad():
            tensors[-1].view(-1)[0] = np.inf
        for save in (checkpoints.save, lambda: agent.save(tmp_path / "agent")):
            with pytest.raises(FloatingPointError, match=f"in '{name}' holds a NaN or infinity"):
                save()
        assert before == ((tmp_path / "agent.zip").read_bytes(), checkpoints.paths())
        make.cls.load(tmp_path / "agent", device="cpu")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_one_clear_sentence(make, file, share, tmp_path):
    content = file.read_bytes()
    (tmp_path / "cut.zip").write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"cannot load .*cut\.zip") as error:
        make.cls.load(tmp_path / "cut.zip")
    assert "\n" not in str(error.value)


def test_an_environment_with_other_spaces_is_refused(make, file):
    with pytest.raises(ValueError, match=r"spaces do not match.* that fit it, here env"):
        make.cls.load(file, env=OtherSpaces())


def test_a_failed_save_leaves_the_file_that_was_there(make, trained, tmp_path, monkeypatch):
    trained.save(tmp_path / "agent")
    before = (tmp_path / "agent.zip").read_bytes()

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        make().save(tmp_path / "agent")
    assert (tmp_path / "agent.zip").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["agent.zip"]


# Parameters


@pytest.mark.parametrize("source", ["agent", "file"])
def test_setting_parameters_makes_agents_equal(make, trained, file, observations, source):
    other = make(seed=1).learn(14)
    assert not np.array_equal(actions(other, observations), actions(trained, observations))
    given = copy.deepcopy(trained.get_parameters()) if source == "agent" else file
    other.set_parameters(given)
    assert_same(other.get_parameters(), trained.get_parameters())
    np.testing.assert_array_equal(actions(other, observations), actions(trained, observations))
    other.learn(7, reset_num_timesteps=False)


def test_agents_do_not_share_what_was_set(make):
    agent, other = make().learn(21), make(seed=1)
    other.set_parameters(agent.get_parameters())
    before = copy.deepcopy(agent.get_parameters())
    other.learn(21)
    assert_same(agent.get_parameters(), before)


def test_parameters_that_do_not_fit_change_nothing(make, trained):
    """Names, shapes, types and values are checked before the first is set."""
    agent, good = make(seed=1), trained.get_parameters()
    before = parameters(agent)
    optional = getattr(agent.policy, "OPTIONAL_BUFFERS", ())
    name, weight = next(
        (k, v) for k, v in good["policy"].items() if v.is_floating_point() and k not in optional
    )
    wrong = {
        "parameters of": {"policy": good["policy"]} if len(good) > 1 else {},
        "expected": {**good, "policy2": {}},
        "lacks": {**good, "policy": {k: v for k, v in good["policy"].items() if k != name}},
        "the file has": {**good, "policy": {**good["policy"], "stray": weight}},
        r"is \[.*\] in the file, \[": {**good, "policy": {**good["policy"], name: weight[..., :0]}},
        "is torch.float16 in the file": {
            **good, "policy": {**good["policy"], name: weight.half()}
        },
        "holds a NaN": {**good, "policy": {**good["policy"], name: weight * float("nan")}},
        "is not a state dict": {**good, "policy": [weight]},
    }  # fmt: skip
    for words, given in wrong.items():
        with pytest.raises(ValueError, match=words):
            agent.set_parameters(given)
        assert torch.equal(parameters(agent), before), words


def test_some_of_the_parameters_can_be_set(make, trained):
    agent = make(seed=1)
    agent.set_parameters({"policy": trained.get_parameters()["policy"]}, exact_match=False)
    assert torch.equal(parameters(agent), parameters(trained))


def test_vec_normalize_is_carried_along_or_refused(make, file):
    """By the constructor, by `load` and by `set_env` alike, before any step is taken."""

    def normalised():
        return VecNormalize(vector(7))

    agent = make()
    try:
        taken = make(normalised())
    except ValueError as error:
        assert "VecNormalize" in str(error)  # noqa: PT017
        with pytest.raises(ValueError, match="VecNormalize"):
            make.cls.load(file, env=normalised())
        with pytest.raises(ValueError, match="VecNormalize"):
            agent.set_env(normalised())
        return
    assert taken.get_vec_normalize_env() is taken.get_env()
    taken.learn(14)
    make.cls.load(file, env=normalised(), device="cpu").learn(14)
    agent.set_env(normalised())
    agent.learn(14)


def test_what_other_agents_need_is_ignored(make, file):
    """rl_zoo3 and models on the Hugging Face Hub pass the same custom_objects to every agent."""
    zoo = {
        "learning_rate": 0.0,
        "lr_schedule": lambda _: 0.0,
        "clip_range": lambda _: 0.0,
        "some_other_agents_argument": 3,
    }
    loaded = make.cls.load(file, env=CountingEnv(), custom_objects=zoo)
    assert loaded.learning_rate == 0.0 and not hasattr(loaded, "some_other_agents_argument")
    with pytest.raises(ValueError, match="learnin_rate passed to load: the agent has no such"):
        make.cls.load(file, learnin_rate=0.0)


def test_learning_without_an_environment_is_one_sentence(make, file):
    with pytest.raises(ValueError, match=r"no environment to learn in: pass one to load") as error:
        make.cls.load(file).learn(7)
    assert isinstance(error.value, AssertionError)  # which stable-baselines3 raises


@pytest.mark.parametrize("schedule", [ConstantSchedule(0.01), LinearSchedule(0.02, 0.01, 0.5)])
def test_schedules_of_stable_baselines3_are_kept_as_themselves(make, tmp_path, schedule):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(learning_rate=schedule).save(tmp_path / "agent")
    loaded = make.cls.load(tmp_path / "agent", env=CountingEnv())
    assert type(loaded.learning_rate) is type(schedule)
    for progress in (1.0, 0.8, 0.3, 0.0):
        assert loaded.lr_schedule(progress) == schedule(progress)


def test_a_schedule_that_is_a_function_is_a_warning_at_save(make, tmp_path):
    agent = make(learning_rate=lambda progress: 0.01 * progress)
    with pytest.warns(UserWarning, match=r"does not hold learning_rate, a function: pass it to"):
        agent.save(tmp_path / "agent")


def test_a_file_says_what_it_was_written_with(file):
    """As in stable-baselines3, for whoever has to find out why a file does not load."""
    with zipfile.ZipFile(file) as archive:
        text = archive.read("system_info.txt").decode()
    assert "Python" in text and "PyTorch" in text


def test_parameters_of_another_shape_are_the_error_that_users_of_pytorch_catch(make, trained):
    """A ValueError like all of ours, and the RuntimeError that stable-baselines3 lets through."""
    parameters = copy.deepcopy(trained.get_parameters())
    name = next(iter(parameters["policy"]))
    parameters["policy"][name] = torch.zeros(3, 2, 1)
    for kind in (ValueError, RuntimeError):
        with pytest.raises(kind, match=re.escape(f"'{name}' in 'policy' is [3, 2, 1]")):
            make().set_parameters(parameters)


def test_observations_that_learn_does_not_need_are_checked_or_dropped(make, file, tmp_path):
    """What is loaded can be saved, and what is saved can be loaded."""
    document, tensors = hostile_files.take_apart(file)
    document["values"]["attributes"]["_last_original_obs"] = [3]
    hostile_files.put_together(tmp_path / "other.zip", document, tensors)
    agent = make.cls.load(tmp_path / "other.zip", env=CountingEnv(), device="cpu")
    agent.learn(7, reset_num_timesteps=False).save(tmp_path / "again")
    make.cls.load(tmp_path / "again", device="cpu")
    with pytest.raises(ValueError, match="its _last_original_obs is not one observation"):
        make.cls.load(tmp_path / "other.zip", device="cpu")


class Reports(gym.Wrapper):
    """Says how an episode went with an array, a tensor or NumPy's number."""

    kinds = (np.array, torch.tensor, np.bool_, np.float32, lambda _: None, lambda _: "yes")

    def step(self, action):
        *rest, info = self.env.step(action)
        kind = self.kinds[(self.unwrapped.episode - 1) % len(self.kinds)]
        # In the middle of an episode it means nothing yet.
        return (*rest, {**info, "is_success": kind(info.get("is_success", np.nan))})


def test_successes_are_kept_as_numbers_whatever_reports_them(make, tmp_path):
    agent = make(make.see(Reports(CountingEnv()))).learn(42)
    agent.save(tmp_path / "agent.zip")
    loaded = make.cls.load(tmp_path / "agent.zip", device="cpu")
    assert list(loaded.ep_success_buffer) == [0, 1, 0, 1]  # the last two say nothing
    assert all(type(x) is float for x in loaded.ep_success_buffer)


def test_steps_may_be_a_whole_number_written_as_a_float(make, tmp_path):
    agent = make().learn(2.1e1)
    agent.save(tmp_path / "agent.zip")
    loaded = make.cls.load(tmp_path / "agent.zip", device="cpu")
    assert_same(loaded.num_timesteps, make().learn(21).num_timesteps)
    for steps in (20.5, np.nan, np.inf, "20", None):
        with pytest.raises(ValueError, match=r"total_timesteps must be a whole number, got "):
            agent.learn(steps)


def test_what_is_set_on_an_agent_from_outside_is_left_out_with_a_warning(make, tmp_path):
    agent = make().learn(14)
    agent.note, agent.best_return = "mine", 1.0
    with pytest.warns(UserWarning, match="does not hold best_return, note, set on the agent from"):
        agent.save(tmp_path / "agent.zip")
    loaded = make.cls.load(tmp_path / "agent.zip", device="cpu")
    assert not hasattr(loaded, "note") and loaded.num_timesteps == agent.num_timesteps


def test_a_subclass_with_arguments_of_its_own_is_saved(make, tmp_path):
    class Mine(make.cls):
        def __init__(self, gain):
            super().__init__(env=make.see(CountingEnv()), **make.arguments())
            self.gain = gain

    agent = Mine(2.0).learn(14, Checkpoints(tmp_path / "checkpoints"))
    agent.save(tmp_path / "agent.zip")
    assert (tmp_path / "agent.zip").exists() and Checkpoints(tmp_path / "checkpoints").paths()


def test_what_a_subclass_sets_in_its_constructor_is_kept(make, tmp_path):
    class Mine(make.cls):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.note = ""

    agent = Mine(env=make.see(CountingEnv()), **make.arguments())
    agent.note = "mine"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agent.save(tmp_path / "agent.zip")
    assert Mine.load(tmp_path / "agent.zip", device="cpu").note == "mine"
