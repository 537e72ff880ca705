"""DAAPPO's argument errors: one sentence with the value, what was expected and the remedy."""

from typing import get_args

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecMonitor, VecNormalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvWrapper

import totalprop.envs  # noqa: F401  (registers the cart-pole)
from totalprop import estimators
from totalprop.agents import DAAPPO
from totalprop.agents.core.validation import constructor_hints
from totalprop.agents.daappo.sources import SOURCES
from totalprop.envs.rewind import Rewindable

VECTOR = spaces.Box(-1, 1, (3,), np.float32)


class Still(gym.Env):
    """An environment of any spaces, which is never stepped."""

    def __init__(self, observation_space=VECTOR, action_space=VECTOR):
        self.observation_space, self.action_space = observation_space, action_space


def make(env=None, **changes):
    settings = {"n_steps": 8, "batch_size": 4, "dynamics_width": 4, "device": "cpu"}
    return DAAPPO("MlpPolicy", env or Still(), **{**settings, **changes})


WRONG = {
    "action_source": [("model", "one of none, dynamics, q, rewind, states, got 'model'")],
    "real_advantage": [("td", "one of gae, matched_horizon, got 'td'")],
    "dynamics_target": [("state", "one of next, delta, got 'state'")],
    "dynamics_activation": [("tanh", "one of relu, leaky_relu, got 'tanh'")],
    "n_extra_actions": [(0, "at least 1, a whole number, got 0"), (1.5, "whole number, got 1.5")],
    "simulation_horizon": [(0, "at least 1, a whole number, got 0")],
    "dynamics_width": [(0, "at least 1, a whole number, got 0")],
    "dynamics_batch_size": [(0, "at least 1, a whole number, got 0")],
    "dynamics_steps": [(-1, "at least 0, a whole number, got -1")],
    "dynamics_buffer_size": [(0, "at least 1, a whole number, got 0"), (1e4, "got 10000.0")],
    "dynamics_warmup": [(-1, "at least 0, a whole number, got -1")],
    "n_q": [(0, "at least 1, a whole number, got 0")],
    "q_learning_rate": [(0, "above 0, got 0")],
    "q_target": [("td", "one of return, advantage, got 'td'")],
    "value_clipping": [("min", "one of clipped, max, got 'min'")],
    "dynamics_learning_rate": [(0, "above 0, got 0"), (np.inf, "got inf"), (np.nan, "got nan")],
    "dynamics_eps": [(0, "above 0, got 0"), (-1.0, "above 0, got -1.0")],
    "grow_fraction": [(-0.1, r"in \[0, 1\], got -0.1"), (1.1, "got 1.1"), (np.nan, "got nan")],
}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [(name, *case) for name, cases in WRONG.items() for case in cases],
)
def test_a_wrong_value_is_named_with_what_was_expected(name, value, message):
    with pytest.raises(ValueError, match=f"{name} must be .*{message}") as error:
        make(**{name: value})
    assert "\n" not in str(error.value)


def test_every_source_is_a_choice_and_every_choice_a_source():
    choices = constructor_hints(DAAPPO)["action_source"]
    assert get_args(choices) == tuple(SOURCES)


LEAST = {
    "n_extra_actions": 1, "simulation_horizon": 1, "dynamics_width": 1, "dynamics_batch_size": 1,
    "dynamics_steps": 0, "dynamics_buffer_size": 1, "dynamics_warmup": 0, "n_q": 1,
    "grow_fraction": 0, "dynamics_learning_rate": 1e-9, "dynamics_eps": 1e-12,
}  # fmt: skip


@pytest.mark.parametrize("name", LEAST)
def test_the_least_value_is_allowed(name):
    assert getattr(make(**{name: LEAST[name]}), name) == LEAST[name]


def test_an_unknown_estimator_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="unknown estimator 'tpxx': did you mean 'tpx'"):
        make(estimator="tpxx")


@pytest.mark.parametrize("source", ["none", "states"])
@pytest.mark.parametrize("estimator", ["rp", "tpx", estimators.make("tpx")])
def test_a_pathwise_leg_needs_a_differentiable_source(source, estimator):
    message = "needs the advantage's gradient.*use estimator='lr', or action_source in dynamics, q"
    with pytest.raises(ValueError, match=message):
        make(action_source=source, estimator=estimator)


@pytest.mark.parametrize("name", estimators.names())
@pytest.mark.parametrize("source", ["dynamics", "q"])
def test_every_registered_estimator_works_or_says_why_not(name, source):
    estimator = estimators.make(name)
    if estimator.probe == "none" and not estimator.several_passes:
        assert make(estimator=name, action_source=source).estimator == name
    else:
        with pytest.raises(ValueError, match=f"'{name}' weighs in parameter space.*use 'lr', 'rp'"):
            make(estimator=name, action_source=source)


def test_composites_compare_actions_and_need_two_of_them():
    with pytest.raises(ValueError, match=r"'tpx' compares.*n_extra_actions must be at least 2"):
        make(estimator="tpx", n_extra_actions=1)
    for name in ("lr", "rp"):  # these do not
        assert make(estimator=name, n_extra_actions=1).n_extra_actions == 1


MATRIX, DISCRETE = spaces.Box(-1, 1, (2, 2), np.float32), spaces.Discrete(3)


OWN_EPOCHS = [{"separate_grad_clip": True}, {"value_clipping": "max"}]


@pytest.mark.parametrize("settings", [{}, *({"action_source": "none", **x} for x in OWN_EPOCHS)])
@pytest.mark.parametrize(
    ("name", "space"),
    [
        ("observation_space", DISCRETE),
        ("observation_space", MATRIX),
        ("action_space", DISCRETE),
        ("action_space", MATRIX),
    ],
)
def test_spaces_must_be_vectors(name, space, settings):
    # Of what asks for a vector, and of nothing else.
    own = f"leave {next(reversed(settings))} out$" if settings else "use action_source='none'$"
    remedy = "wrap the env" if name == "observation_space" else own
    with pytest.raises(ValueError, match=f"one vector as {name[:6]}.*got .*; {remedy}"):
        make(Still(**{name: space}), **settings)


def test_any_space_of_ppos_will_do_without_extra_actions():
    for space in (MATRIX, DISCRETE):
        make(Still(observation_space=space), action_source="none")
    make(Still(action_space=DISCRETE), action_source="none")


def test_rewinding_needs_an_environment_that_can():
    with pytest.raises(ValueError, match=r"extra_step; wrap it: totalprop\.envs\.rewind\."):
        make(action_source="rewind")


def test_the_wrapper_that_the_message_names_exists():
    from totalprop.envs import rewind

    with pytest.raises(ValueError, match="wrap it") as error:
        make(action_source="rewind")
    name = str(error.value).split("envs.rewind.")[1].split("(")[0]
    wrapper = getattr(rewind, name)
    assert all(callable(getattr(wrapper, x)) for x in ("snapshot", "restore", "extra_step"))


def test_errors_come_before_any_work(monkeypatch):
    monkeypatch.setattr("stable_baselines3.PPO._setup_model", lambda self: pytest.fail("worked"))
    with pytest.raises(ValueError, match="n_q must be"):
        make(n_q=0)


def test_load_checks_too(tmp_path):
    make().save(tmp_path / "agent")
    with pytest.raises(ValueError, match="n_extra_actions must be"):
        DAAPPO.load(tmp_path / "agent", n_extra_actions=0)


class Louder(VecEnvWrapper):
    """Multiplies observations by 10."""

    def reset(self):
        return 10 * self.venv.reset()

    def step_wait(self):
        observations, *rest = self.venv.step_wait()
        return 10 * observations, *rest


@pytest.mark.parametrize("source", ["rewind", "dynamics"])
def test_wrappers_whose_work_extra_actions_would_miss_are_refused(source):
    env = make_vec_env("totalprop/CartPoleSwingUp-v0", 1, wrapper_class=Rewindable)
    with pytest.raises(ValueError, match="do not know what Louder does"):
        make(Louder(VecNormalize(env)), action_source=source)
    make(VecMonitor(VecNormalize(env)), action_source=source)
    if source == "dynamics":  # sees what the wrapper shows
        make(Louder(env), action_source=source)
    else:
        with pytest.raises(ValueError, match="do not know what Louder does"):
            make(Louder(env), action_source=source)


@pytest.mark.parametrize(
    ("changes", "k"),
    [
        ({"estimator": estimators.make("lr"), "n_extra_actions": 1}, 1),
        ({"estimator": estimators.make("tpx", baseline=estimators.baselines.critic)}, 4),
        ({"estimator": estimators.make("tpx", cross_fit=True), "n_extra_actions": 2}, 2),
        ({"estimator": estimators.make("lr", legs=(estimators.legs.biw,))}, 4),
    ],
    ids=["one action", "critic", "halves", "leg"],
)
def test_what_cannot_estimate_is_refused_before_the_first_step(changes, k):
    with pytest.raises(ValueError, match=f"does not work with {k} extra action"):
        make(**changes)


@pytest.mark.parametrize("name", ["gamma", "dynamics_eps", "vf_coef", "learning_rate"])
def test_values_of_another_type_are_named(name):
    for value in ("0.9", None):
        with pytest.raises(ValueError, match=f"^{name} must be"):
            make(**{name: value})


def test_an_environment_is_needed():
    with pytest.raises(ValueError, match="DAAPPO needs an environment to learn in"):
        DAAPPO("MlpPolicy", None)
