"""The agents that are held to the contract: every one in `AGENTS`, at the small sizes below."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from tests.agents.contract import probes
from tests.agents.contract.environments import CountingEnv
from totalprop.agents import AGENTS
from totalprop.agents.core.algorithm import Algorithm
from totalprop.agents.core.validation import constructor_hints

# Name in AGENTS -> constructor arguments with which a few episodes take a fraction of a second.
# A policy search or update must come within 14 steps of one environment.
SIZES: dict[str, dict[str, Any]] = {
    "pipps": {
        "policy": "RBFPolicy", "policy_kwargs": {"n_centres": 4}, "n_particles": 6, "horizon": 7,
        "gradient_steps": 2, "gp_evaluations": 3, "termination": "ignore",
    },
    "pilco": {
        "policy": "RBFPolicy", "policy_kwargs": {"n_centres": 4}, "horizon": 7, "optimizer": "adam",
        "gradient_steps": 2, "gp_evaluations": 3, "termination": "ignore",
    },
    "dreamer": {
        "policy": "DreamerPolicy",
        "policy_kwargs": {"deter": 5, "hidden": 5, "width": 5, "stoch": 3, "conv_depth": 2},
        "sequence_length": 5, "batch_size": 3, "imagination_starts": 4, "horizon": 3,
        "learning_starts": 14, "train_freq": 7, "gradient_steps": 1, "buffer_size": 200,
    },
    "daappo": {
        "policy": "MlpPolicy", "policy_kwargs": {"net_arch": [8]}, "n_steps": 7, "batch_size": 7,
        "n_epochs": 1, "n_extra_actions": 2, "simulation_horizon": 2, "dynamics_width": 8,
        "dynamics_buffer_size": 200,
    },
    "svg": {
        "policy": "MlpPolicy", "policy_kwargs": {"net_arch": [8]}, "value_hidden": (8,),
        "model_hidden": (4,), "batch_size": 7, "policy_updates": 2, "value_updates": 2,
        "model_updates": 2, "buffer_size": 200, "horizon": 14, "learning_starts": 0,
    },
}  # fmt: skip

# Other agents of `AGENTS` that keep and save what the small ones do not: name, changed arguments.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dreamer-categorical": (
        "dreamer",
        {"hold_exponent": 1.2, "policy_kwargs": {
            **SIZES["dreamer"]["policy_kwargs"], "latent": "categorical", "classes": 4}},
    ),
    "pipps-options": (
        "pipps",
        {"speed_integration": "on", "integrated_dims": ((0, 1),), "time_step": 0.5,
         "kernel": "rbf+linear", "dropout": 0.5, "noise_stop": 2.0, "gradient_steps": 4},
    ),
    "svg-0": ("svg", {"variant": "0"}),
    "svg-inf": ("svg", {"variant": "inf"}),
}  # fmt: skip

# Test -> how the agent differs from stable-baselines3's, and why. The test must fail: whoever mends
# the agent strikes its line off.
EXCEPTIONS = {
    "test_a_stochastic_evaluation_does_not_change_what_is_learned[daappo]":
        "as PPO does, it draws its actions from the global generator",
    "test_another_agent_made_in_between_changes_nothing[daappo]":
        "as PPO does, it draws from the global generators",
    **dict.fromkeys(
        (f"test_observations_in_other_units_are_learned_from_alike[{name}-{units}]"
         for name in ("pipps", "pipps-options", "pilco") for units in ("larger", "smaller")),
        "Adam's steps on the policy's centres are in the observation's units; the GP has none",
    ),
    "test_observations_in_other_units_are_learned_from_alike[pipps-options-offset]":
        "a position that is integrated moves with its velocity, whose origin counts",
    **dict.fromkeys(
        (f"test_observations_in_other_units_are_learned_from_alike[{name}-{units}]"
         for name in ("dreamer", "dreamer-categorical") for units in ("larger", "smaller")),
        "as DreamerV1's, the reconstruction of raw observations weighs by their units",
    ),
}  # fmt: skip

TRAINED = 28  # steps of `trained`: four episodes


class Maker:
    """Makes one agent of `AGENTS` at its small sizes, or a variant of it.

    Attributes:
        name: on the command line. cls: the agent's class. see: wraps the environments that are
            made for it.
    """

    def __init__(self, name: str, see: Callable[[gym.Env], gym.Env] = lambda env: env) -> None:
        name, self.changes = VARIANTS.get(name, (name, {}))
        if name not in SIZES:
            pytest.fail(f"add small sizes of {name} to SIZES in {__file__}", pytrace=False)
        self.name, self.entry, self.see = name, AGENTS[name], see
        self.cls: type[Algorithm] = self.entry.cls

    def takes(self, argument: str) -> bool:
        """Whether the constructor has an argument that not every agent has."""
        return argument in constructor_hints(self.cls)

    def arguments(self, **changes: Any) -> dict[str, Any]:
        """Constructor arguments, without the environment."""
        sizes = copy.deepcopy({**SIZES[self.name], **self.changes})
        return {**sizes, "seed": 0, "device": "cpu", **changes}

    def __call__(self, env: Any = None, **changes: Any) -> Algorithm:
        """A new agent, on a CountingEnv unless another environment is given."""
        env = self.see(CountingEnv()) if env is None else env
        return self.cls(env=env, **self.arguments(**changes))


def taken(kinds: Mapping[str, Callable[[gym.Env], gym.Env]]) -> list[tuple[str, str]]:
    """Agents, and the kinds of environments that their constructors take.

    Args:
        kinds: name of a kind -> what wraps an environment to be of it.
    """
    found = []
    for name in AGENTS:
        for kind, see in kinds.items():
            with contextlib.suppress(ValueError, AssertionError):
                Maker(name, see)()
                found.append((name, kind))
    return found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent and item.name in EXCEPTIONS:
            item.add_marker(pytest.mark.xfail(reason=EXCEPTIONS[item.name], strict=True))


@pytest.fixture(scope="session", params=[*AGENTS, *VARIANTS])
def make(request: pytest.FixtureRequest) -> Maker:
    return Maker(request.param)


@pytest.fixture(scope="session")
def trained(make: Maker) -> Iterator[Algorithm]:
    """An agent that has learned; tests only read it."""
    agent = make().learn(TRAINED)
    before = copy.deepcopy(agent.get_parameters())
    yield agent
    probes.assert_same(agent.get_parameters(), before)
    assert agent.num_timesteps == TRAINED


@pytest.fixture(scope="session")
def file(trained: Algorithm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `trained.save` writes."""
    path = tmp_path_factory.mktemp("trained") / "agent.zip"
    trained.save(path)
    return path


@pytest.fixture(scope="session")
def observations() -> np.ndarray:
    """[20, 4] of a CountingEnv."""
    rng = np.random.default_rng(0)
    return rng.uniform([1, 0, -2, 0], [5, 7, 4, 1], (20, 4)).astype(np.float32)
