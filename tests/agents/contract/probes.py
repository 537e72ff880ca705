"""What the contract's tests look with: callbacks, a logger, and comparison bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter, Logger


class Trace(BaseCallback):
    """The order of events, and the steps done when each rollout began; may stop the run."""

    def __init__(self, stop_at: int | None = None, stop_with: Any = False) -> None:
        super().__init__()
        self.events: list[str] = []
        self.begun: list[int] = []
        self.stop_at, self.stop_with = stop_at, stop_with

    def _init_callback(self) -> None:
        self.events.append("init")

    def _on_training_start(self) -> None:
        self.events.append("start")

    def _on_rollout_start(self) -> None:
        self.events.append("rollout+")
        self.begun.append(self.num_timesteps)

    def _on_step(self) -> bool:
        self.events.append("step")
        return self.stop_with if self.num_timesteps == self.stop_at else True

    def _on_rollout_end(self) -> None:
        self.events.append("rollout-")

    def _on_training_end(self) -> None:
        self.events.append("end")


class Memory(KVWriter):
    """Keeps what is logged: one (values, step) per dump."""

    def __init__(self) -> None:
        self.dumps: list[tuple[dict[str, Any], int]] = []

    def write(self, key_values: dict, key_excluded: dict, step: int = 0) -> None:
        self.dumps.append((dict(key_values), step))

    def close(self) -> None:
        pass


def logged(agent: BaseAlgorithm) -> list[tuple[dict[str, Any], int]]:
    """What the agent will log from now on, as (values, step) per dump."""
    memory = Memory()
    agent.set_logger(Logger(None, [memory]))
    return memory.dumps


def parameters(agent: BaseAlgorithm) -> torch.Tensor:
    """The policy's, as one vector."""
    return torch.nn.utils.parameters_to_vector(agent.policy.parameters()).detach().clone()


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Nested states are equal, bit for bit."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for i, (x, y) in enumerate(zip(found, expected, strict=True)):
            assert_same(x, y, f"{where}/{i}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, np.ndarray):
        np.testing.assert_array_equal(found, expected, where)
    else:
        assert found == expected, where


def assert_same_agents(found: BaseAlgorithm, expected: BaseAlgorithm) -> None:
    """Parameters of all networks and states of all optimisers, and the counters."""
    assert_same(found.get_parameters(), expected.get_parameters())
    assert found.num_timesteps == expected.num_timesteps
    assert found._n_updates == expected._n_updates
