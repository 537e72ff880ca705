"""Runs that learn from a Minari dataset (--offline): the dataset, and where they are evaluated."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from typing import TYPE_CHECKING, Any

import gymnasium as gym
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

import totalprop.envs  # noqa: F401  (registers our environments)
from totalprop.agents import AGENTS
from totalprop.agents.core.datasets import SpacesOnly, check_spaces, open_dataset
from totalprop.agents.core.processes import Processes
from totalprop.scripts.run.environments import make_env
from totalprop.scripts.run.errors import UserError
from totalprop.scripts.run.job import Job

if TYPE_CHECKING:
    from minari import MinariDataset


def dataset_of(job: Job, processes: Processes) -> MinariDataset | None:
    """The dataset that a run learns from, which is downloaded if it has to be; None if it acts.

    Raises:
        UserError: the agent cannot learn from one, or it cannot be read.
    """
    if not job.options.offline:
        return None
    able = [name for name, entry in AGENTS.items() if hasattr(entry.cls, "learn_offline")]
    if job.agent not in able:
        raise UserError(f"{job.agent} learns by acting; --offline is for {', '.join(able)}")
    if processes.size > 1:
        raise UserError(
            f"--offline learns in one process, torchrun started {processes.size}: start it without"
        )
    try:
        return open_dataset(job.options.offline)
    except ValueError as error:
        raise UserError(f"--offline: {error}") from error


def with_environment(job: Job, dataset: MinariDataset) -> Job:
    """The job with the environment that it is evaluated in: its own, or the dataset's.

    Where the dataset's cannot be made, a sentence says so, and there is none.

    Raises:
        UserError: --env-id names one that cannot be made, or that is not of the dataset's spaces.
    """
    env_id, env_args = job.options.env_id, job.env_args
    if env_id:
        _check(dataset, env_id, env_args)
        return job
    try:
        env_id, own = environment_of(dataset)
        env_args = {**own, **env_args}
        _check(dataset, env_id, env_args)
    except UserError as error:
        print(f"no evaluations: {error}", file=sys.stderr)
        env_id, env_args = "", {}
    options = dataclasses.replace(job.options, env_id=env_id)
    return dataclasses.replace(job, options=options, env_args=env_args)


def environments(job: Job, dataset: MinariDataset | None) -> tuple[VecEnv, VecEnv | None]:
    """The environments for training and evaluation.

    With a dataset, something stands in for that of training, and there may be none for evaluation.
    """
    if dataset is None:
        return job.environments()
    env = job.normalised(DummyVecEnv([lambda: SpacesOnly(dataset)]))
    return env, job.evaluation_environment() if job.options.env_id else None


def environment_of(dataset: MinariDataset) -> tuple[str, dict[str, Any]]:
    """Id and arguments of the environment that a dataset names, if it is one that is registered.

    Differs from Minari's `recover_environment`: no module is imported that a dataset names, since
    a dataset may be a stranger's.

    Raises:
        UserError: it names none, or one that is not registered, or wrappers around it.
    """
    # That for evaluation, where there is one. Minari has no other access without making it.
    spec = getattr(dataset, "_eval_env_spec", None) or dataset.env_spec
    if spec is None:
        raise UserError(f"the dataset '{dataset.id}' names no environment; pass --env-id")
    if (known := gym.registry.get(spec.id)) is None:
        module = str(spec.entry_point).partition(":")[0].partition(".")[0]
        raise UserError(
            f"the environment of the dataset '{dataset.id}', {spec.id}, is not registered; if you "
            f"know and trust its module, pass --env-id {module}:{spec.id}"
        )
    if spec.additional_wrappers != known.additional_wrappers:
        names = ", ".join(wrapper.name for wrapper in spec.additional_wrappers) or "none"
        raise UserError(
            f"the environment of the dataset '{dataset.id}', {spec.id}, was in other wrappers than "
            f"it is registered with ({names}); register one that is in them, and pass --env-id"
        )
    arguments = {
        name: value
        for name, value in spec.kwargs.items()
        if name != "render_mode" and known.kwargs.get(name) != value
    }
    if spec.max_episode_steps != known.max_episode_steps:
        arguments["max_episode_steps"] = spec.max_episode_steps or -1  # no limit
    return spec.id, arguments


def _check(dataset: MinariDataset, env_id: str, env_args: dict[str, Any]) -> None:
    with contextlib.closing(make_env(env_id, env_args, seed=None)) as env:
        try:
            check_spaces(dataset, env, f"the environment '{env_id}'")
        except ValueError as error:
            raise UserError(str(error)) from error
