"""Checks of DreamerTPX's constructor arguments, and the settings they become."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.vec_env import VecEnv

from totalprop import estimators
from totalprop.agents.core.validation import (
    check_common,
    is_above,
    is_whole,
    is_within,
    try_estimator,
)
from totalprop.agents.dreamer.imagination import ImaginationSettings
from totalprop.agents.dreamer.update import UpdateSettings
from totalprop.world_models.latent.model import ModelLossSettings
from totalprop.world_models.latent.networks import IMAGE_SIZE

if TYPE_CHECKING:
    from totalprop.agents.dreamer.agent import DreamerTPX

BASELINES = {
    "leave-one-out": estimators.baselines.leave_one_out,
    "critic": estimators.baselines.critic,
}
NO_VEC_NORMALIZE = (
    "DreamerTPX learns to reconstruct raw observations, whose scale VecNormalize keeps changing; "
    "pass the environment without VecNormalize"
)
WHOLE = {  # name: least value
    "horizon": 2, "batch_size": 1, "sequence_length": 2, "imagination_starts": 0, "buffer_size": 2,
    "learning_starts": 1, "train_freq": 1, "gradient_steps": 1,
}  # fmt: skip
ABOVE_ZERO = ("model_learning_rate", "adam_eps", "max_grad_norm", "discount_scale")
AT_LEAST_ZERO = ("exploration_noise", "entropy_scale", "kl_scale", "free_nats")


def check_arguments(agent: DreamerTPX) -> None:
    """One sentence per wrong value, before any work is done."""
    check_common(agent)
    checks = [
        (name, (value := getattr(agent, name)), is_whole(value, least),
         f"at least {least}, a whole number") for name, least in WHOLE.items()
    ]  # fmt: skip
    starts = agent.imagination_starts  # one trajectory has no baseline, two no regression
    checks.append(("imagination_starts", starts, starts not in (1, 2), "0 for all, or at least 3"))
    for name in ABOVE_ZERO:
        value = getattr(agent, name)
        checks.append((name, value, is_above(value, 0), "above 0"))
    for name in AT_LEAST_ZERO:
        value = getattr(agent, name)
        checks.append((name, value, is_within(value, 0), "at least 0"))
    for name in ("gamma", "lam"):
        value = getattr(agent, name)
        checks.append((name, value, is_within(value, 0, 1), "in [0, 1]"))
    for name, choices in (
        ("baseline", list(BASELINES)),
        ("storage", ["ram", "disk", "device"]),
        ("nonfinite", ["stop", "skip"]),
    ):
        value = getattr(agent, name)
        checks.append((name, value, value in choices, f"one of {', '.join(choices)}"))
    if not callable(agent.learning_rate):
        rate = agent.learning_rate
        checks.append(("learning_rate", rate, is_above(rate, 0), "above 0"))
    for name, value, is_good, expected in checks:
        if not is_good:
            raise ValueError(f"{name} must be {expected}, got {value!r}")
    if "discount_head" in agent.policy_kwargs:
        raise ValueError("discount_head belongs to DreamerTPX: pass it there, not in policy_kwargs")
    _check_estimator(agent)
    _check_spaces(agent)


def _check_estimator(agent: DreamerTPX) -> None:
    is_object = isinstance(agent.estimator, estimators.Estimator)
    if is_object and agent.baseline != "leave-one-out":
        raise ValueError(
            "an Estimator brings its own baseline: pass baseline to estimators.make(...), not to "
            "DreamerTPX"
        )
    entries = agent.sequence_length - agent.discount_head  # as DreamerUpdate.possible_starts
    starts = possible = agent.batch_size * entries
    if agent.imagination_starts > 0:
        starts = min(agent.imagination_starts, possible)
    try_estimator(resolve(agent), [starts], has_value=True)


def resolve(agent: DreamerTPX) -> estimators.Estimator:
    """The estimator, with the agent's baseline where that is not the default."""
    if agent.baseline == "leave-one-out":
        return estimators.make(agent.estimator)
    return estimators.make(agent.estimator, baseline=BASELINES[agent.baseline])


def _check_spaces(agent: DreamerTPX) -> None:
    space = agent.observation_space
    if not isinstance(space, spaces.Box):
        raise ValueError(
            f"DreamerTPX needs a Box observation space, an image or a vector, got {space}; "
            "wrap the environment in gymnasium.wrappers.FlattenObservation"
        )
    is_picture = len(space.shape) > 2 or (len(space.shape) == 2 and space.dtype == np.uint8)
    if is_picture and not is_image_space(space):
        raise ValueError(
            f"images must be uint8 in [0, 255] of shape [height, width, channels], got {space}; "
            "if it is a vector, wrap the environment in gymnasium.wrappers.FlattenObservation"
        )
    if is_image_space(space) and space.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(
            f"images must be {IMAGE_SIZE}x{IMAGE_SIZE}, got {space.shape} (channel first); wrap "
            "the environment in gymnasium.wrappers.ResizeObservation(env, "
            f"({IMAGE_SIZE}, {IMAGE_SIZE}))"
        )
    if agent.get_vec_normalize_env() is not None:
        raise ValueError(NO_VEC_NORMALIZE)
    if agent.env is not None:
        _check_sequences(agent, agent.env)
    assert np.isfinite(agent.action_space.low).all()  # type: ignore[attr-defined]


def _check_sequences(agent: DreamerTPX, env: VecEnv) -> None:
    """Windows of `sequence_length` entries must come about, and must not be lost again."""
    length = agent.sequence_length
    # Where an episode ends in the ring, half of it and more still belongs to one episode.
    if agent.buffer_size // env.num_envs < 2 * length:
        raise ValueError(
            f"buffer_size must hold two sequences of every environment, at least "
            f"2 x {length} x {env.num_envs}, got {agent.buffer_size}"
        )
    if not env.has_attr("_max_episode_steps"):  # of gymnasium's TimeLimit
        return
    longest = 1 + max(env.get_attr("_max_episode_steps"))
    if longest < length:
        raise ValueError(
            f"sequence_length must be at most {longest}, the observations of an episode of "
            f"{longest - 1} steps (the environment's time limit), got {length}"
        )


def update_settings(agent: DreamerTPX) -> UpdateSettings:
    """The agent's arguments as the settings of a gradient step."""
    return UpdateSettings(
        estimator=resolve(agent),
        imagination=ImaginationSettings(
            agent.gamma,
            agent.lam,
            agent.stop_grad_actor_input,
            agent.discount_weights,
            agent.entropy_scale,
        ),
        model=ModelLossSettings(
            agent.kl_scale, agent.free_nats, agent.free_nats_per_step, agent.gamma,
            agent.discount_scale,
        ),
        horizon=agent.horizon,
        imagination_starts=agent.imagination_starts,
        learning_rate=agent.lr_schedule(1.0),
        model_learning_rate=agent.model_learning_rate,
        adam_eps=agent.adam_eps,
        max_grad_norm=agent.max_grad_norm,
        bf16=agent.bf16,
        compile=agent.compile,
        cuda_graph=agent.cuda_graph and agent.device.type == "cuda",  # or a model could not move
    )  # fmt: skip
