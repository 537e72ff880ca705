"""Gymnasium's vector environments behind stable-baselines3's interface.

stable-baselines3 returns, where an episode ends, the first observation of the next one, and the
last one in the info. Gymnasium has three ways to reset, of which one is this; in the other two the
environments that ended are reset here, through `reset_mask`.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, VectorEnv
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn


class GymnasiumVecEnv(VecEnv):
    """A `gymnasium.vector.VectorEnv` as a VecEnv. Its environments cannot be called one by one.

    Args:
        venv: in any of Gymnasium's autoreset modes.

    Raises:
        ValueError: its autoreset mode is not known.
    """

    def __init__(self, venv: VectorEnv) -> None:
        mode = venv.metadata.get("autoreset_mode")
        if not isinstance(mode, AutoresetMode):
            raise ValueError(
                "a vector environment must say how it resets, in metadata['autoreset_mode'], one "
                f"of gymnasium.vector.AutoresetMode, got {mode!r}"
            )
        self.venv, self.mode = venv, mode
        super().__init__(venv.num_envs, venv.single_observation_space, venv.single_action_space)

    def reset(self) -> VecEnvObs:
        """Begin an episode in every environment."""
        # Of several environments, Gymnasium counts on from the first one's, as `VecEnv.seed` does.
        options = self._options[0]
        if any(own.keys() != options.keys() or not _equal(own, options) for own in self._options):
            raise ValueError("a vector environment takes the same options for all environments")
        observations, infos = self.venv.reset(seed=self._seeds[0], options=options or None)
        self.reset_infos = self._of_each(infos)
        self._reset_seeds()
        self._reset_options()
        return observations

    def step_async(self, actions: np.ndarray) -> None:
        """Keep the actions for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Take the step.

        Raises:
            ValueError: the environment ignores `reset_mask`, where it is needed.
        """
        observations, rewards, terminated, truncated, infos = self.venv.step(self._actions)
        dones = terminated | truncated
        found = self._of_each(infos)
        ended = [i for i, done in enumerate(dones) if done]
        is_same = self.mode is AutoresetMode.SAME_STEP
        last = {i: found[i].pop("final_obs") if is_same else _row(observations, i) for i in ended}
        if is_same:
            for i in ended:
                self.reset_infos[i], found[i] = found[i], found[i].pop("final_info", {})
        elif ended:
            observations = self._reset(dones, observations)
        for i in ended:
            found[i]["terminal_observation"] = last[i]
            found[i]["TimeLimit.truncated"] = bool(truncated[i] and not terminated[i])
        return observations, rewards.astype(np.float32), dones, found

    def _reset(self, dones: np.ndarray, before: Any) -> Any:
        """Reset the environments that ended; the observations of all."""
        before = copy.deepcopy(before)
        after, infos = self.venv.reset(options={"reset_mask": dones})
        for i, info in enumerate(self._of_each(infos)):
            if dones[i]:
                self.reset_infos[i] = info
            elif not _equal(_row(before, i), _row(after, i)):
                raise ValueError(
                    "the vector environment resets all its environments where one ends, because it "
                    "ignores reset_mask: make it with autoreset_mode=AutoresetMode.SAME_STEP, or "
                    "with gymnasium.make_vec(..., vectorization_mode='sync')"
                )
        return after

    def _of_each(self, infos: dict[str, Any]) -> list[dict[str, Any]]:
        """Gymnasium's dictionary of arrays, as a dictionary for each environment."""

        def of(i: int, infos: dict[str, Any]) -> dict[str, Any]:
            own = {}
            for name, values in infos.items():
                if name.startswith("_") or not infos.get(f"_{name}", np.ones(i + 1, bool))[i]:
                    continue
                own[name] = of(i, values) if isinstance(values, dict) else values[i]
            return own

        return [of(i, infos) for i in range(self.num_envs)]

    def close(self) -> None:
        """Close all environments."""
        self.venv.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The attribute of each environment in this process, or that of the vector environment.

        Workers of an AsyncVectorEnv are not asked: they would die if they did not have it.
        """
        envs = getattr(self.venv.unwrapped, "envs", None)
        return [
            getattr(self.venv, attr_name) if envs is None else envs[i].get_wrapper_attr(attr_name)
            for i in self._get_indices(indices)
        ]

    def is_out_of_reach(self, attr_name: str) -> bool:
        """Whether workers of an AsyncVectorEnv have an attribute, which `get_attr` cannot read."""
        workers = self.venv.unwrapped
        if not isinstance(workers, AsyncVectorEnv):
            return False
        return all(workers.call("has_wrapper_attr", attr_name))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Not possible, see `env_method`."""
        self.env_method("set_attr")

    def env_method(
        self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any
    ) -> list[Any]:
        """Not possible.

        Raises:
            AttributeError: always.
        """
        raise AttributeError(
            f"{method_name}: the environments of a gymnasium.vector.VectorEnv cannot be called one "
            "by one; pass stable-baselines3's DummyVecEnv or SubprocVecEnv"
        )

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """Whether each environment in this process is wrapped; False where it is out of reach."""
        envs = getattr(self.venv.unwrapped, "envs", None)
        indices = self._get_indices(indices)
        return [envs is not None and is_wrapped(envs[i], wrapper_class) for i in indices]


def _row(observations: Any, i: int) -> Any:
    """A copy of one environment's observation."""
    if isinstance(observations, dict):
        return {name: _row(part, i) for name, part in observations.items()}
    return np.array(observations[i])


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return all(_equal(part, b[name]) for name, part in a.items())
    return bool(np.array_equal(a, b, equal_nan=np.asarray(a).dtype.kind == "f"))
