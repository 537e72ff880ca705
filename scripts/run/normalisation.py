"""VecNormalize on the command line: wrap environments, and store its statistics as JSON."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from totalprop.agents.persistence.safe_file import shown, write_text
from totalprop.scripts.run.errors import UserError
from totalprop.scripts.run.folder import RunFolder, read_json

Normalised = Literal["none", "observations", "rewards", "both"]
ObsRMS = RunningMeanStd | dict[str, RunningMeanStd]  # of a dictionary, of each entry


def normalise(env: VecEnv, what: Normalised, *, gamma: float) -> VecEnv:
    """Wrap an environment in VecNormalize, which uses running statistics.

    Args:
        env: the training environment.
        what: what to normalise. Of observations those that are numbers, as stable-baselines3's
            policies scale images and encode choices. Rewards are divided by the standard deviation
            of the discounted return. "none" returns `env` itself.
        gamma: discount of that return.
    """
    if what == "none":
        return env
    space, keys = env.observation_space, None
    are_scaled = _is_scaled(space)
    if isinstance(space, spaces.Dict):
        keys = [name for name, part in space.items() if _is_scaled(part)] or None
        are_scaled = keys is not None
    return VecNormalize(
        env, norm_obs=what != "rewards" and are_scaled, norm_obs_keys=keys,
        norm_reward=what != "observations", gamma=gamma,
    )  # fmt: skip


def _is_scaled(space: spaces.Space) -> bool:
    return isinstance(space, spaces.Box) and not is_image_space(space)


def normalise_like(env: VecEnv, statistics: VecNormalize | Path | None) -> VecEnv:
    """Normalise the observations of an evaluation environment as in training; keep rewards raw.

    Args:
        env: the evaluation environment.
        statistics: the training environment's VecNormalize, or a file from `save_statistics`. None
            returns `env` itself.
    Raises:
        UserError: the file cannot be read, or is not such a file.
    """
    if statistics is None:
        return env
    if isinstance(statistics, Path):
        record = read_json(statistics)
        try:
            norm_obs = record["norm_obs"]
            if not isinstance(norm_obs, bool):
                raise ValueError(f"norm_obs must be true or false, got {shown(norm_obs)}")
            read = _observation_from_json
            obs_rms = read(record["observation"], env.observation_space) if norm_obs else None
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{statistics} does not hold statistics of VecNormalize ({type(error).__name__}: "
                f"{error}), which the policy needs to normalise its observations"
            ) from error
    else:
        norm_obs = statistics.norm_obs
        obs_rms = statistics.obs_rms if norm_obs else None
    keys = list(obs_rms) if isinstance(obs_rms, dict) else None
    made = VecNormalize(
        env, training=False, norm_obs=norm_obs, norm_obs_keys=keys, norm_reward=False
    )
    if obs_rms is not None:
        copied: Any = copy.deepcopy(obs_rms)
        made.obs_rms = copied
    return made


def statistics_of(folder: RunFolder, config: dict[str, Any], *, best: bool = False) -> Path | None:
    """The file with the VecNormalize statistics of a run, or of its best agent; None without."""
    what = (config.get("options") or {}).get("normalize", "none")
    if what not in get_args(Normalised):
        choices = ", ".join(get_args(Normalised))
        raise UserError(f"{folder.config}: normalize must be one of {choices}, got {shown(what)}")
    if what == "none":
        return None
    return folder.best_vec_normalize if best else folder.vec_normalize


def save_agent(agent: BaseAlgorithm, model: Path, statistics: Path) -> None:
    """Save an agent and, if it learns in a VecNormalize, that one's statistics."""
    agent.save(model)
    normalised = agent.get_vec_normalize_env()
    if normalised is not None:
        save_statistics(normalised, statistics)


def save_statistics(env: VecNormalize, path: Path) -> None:
    """Write the statistics that `normalise_like` reads."""
    record = {"norm_obs": env.norm_obs, "norm_reward": env.norm_reward}
    observation = _observation_to_json(env.obs_rms) if env.norm_obs else None
    parts = {"observation": observation, "return": _to_json(env.ret_rms)}
    write_text(path, json.dumps({**record, **parts}) + "\n")


def _observation_to_json(rms: ObsRMS) -> dict[str, Any]:
    if isinstance(rms, dict):
        return {name: _to_json(part) for name, part in rms.items()}
    return _to_json(rms)


def _observation_from_json(record: Any, space: spaces.Space) -> ObsRMS:
    if not isinstance(space, spaces.Dict):
        return _from_json(record, space.shape)
    return {name: _from_json(part, space[name].shape) for name, part in record.items()}


def _to_json(rms: RunningMeanStd) -> dict[str, Any]:
    mean, var = np.asarray(rms.mean), np.asarray(rms.var)
    return {"mean": mean.tolist(), "var": var.tolist(), "count": float(rms.count)}


def _from_json(record: Any, shape: tuple[int, ...] | None) -> RunningMeanStd:
    rms = RunningMeanStd()
    rms.mean, rms.var = (np.array(record[name], dtype=np.float64) for name in ("mean", "var"))
    rms.count = float(record["count"])
    if rms.mean.shape != shape or rms.var.shape != shape:
        raise ValueError(f"mean and var must be of shape {shape}")
    if not (np.isfinite([rms.mean, rms.var]).all() and (rms.var >= 0).all()):
        raise ValueError("mean and var must be finite, and var not below 0")
    return rms
