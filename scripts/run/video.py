"""GIFs of a policy."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from totalprop.agents.core import figures
from totalprop.agents.persistence.safe_file import in_one_line
from totalprop.envs.mujoco_backend import choose_backend
from totalprop.scripts.run.environments import make_env, registered_id, renders
from totalprop.scripts.run.errors import UserError

MAX_VIDEO_STEPS = 1000  # of an episode that is shown as a GIF; all its frames are in memory
WHOLE = "one episode"


def record_gif(
    env_id: str,
    env_args: dict[str, Any],
    agent: BaseAlgorithm,
    path: Path,
    *,
    seed: int,
    normalised: Callable[[VecEnv], VecEnv] = lambda env: env,
    max_steps: int = MAX_VIDEO_STEPS,
) -> tuple[str, float] | None:
    """Roll out the policy for one episode and save the rendered frames as a GIF.

    A picture is never worth an error: whatever an environment, a renderer or a file system raises
    is printed in one sentence.

    Args:
        env_id: Gymnasium id.
        env_args: keyword arguments of the environment.
        agent: whose policy is shown.
        path: the GIF.
        seed: seed of the environment.
        normalised: wraps the environment as in training.
        max_steps: steps after which the episode is cut, at most MAX_VIDEO_STEPS.
    Returns:
        What the GIF shows (WHOLE or a part) and its return, or None if there is no GIF.
    """
    env: VecEnv | None = None
    try:
        if not renders(env_id):
            print("no GIF: the environment does not render", file=sys.stderr)
            return None
        if "mujoco" in str(getattr(gym.registry.get(registered_id(env_id)), "entry_point", "")):
            choose_backend()  # without a display, Gymnasium's renderer would try GLFW first
        env = normalised(make_env(env_id, env_args, seed=seed, render=True))
        return _record_gif(agent, env, path, min(max_steps, MAX_VIDEO_STEPS))
    except Exception as error:
        print(f"no GIF: {in_one_line(error)}", file=sys.stderr)
        return None
    finally:
        if env is not None:
            with contextlib.suppress(Exception):
                env.close()


def _record_gif(agent: BaseAlgorithm, env: VecEnv, path: Path, max_steps: int) -> tuple[str, float]:
    fps = env.get_attr("metadata")[0].get("render_fps", 30)
    observations = env.reset()
    state, starts, total = None, np.ones(1, dtype=bool), 0.0
    frames = [env.get_images()[0]]
    for _ in range(max_steps):
        actions, state = agent.predict(observations, state, starts, deterministic=True)  # type: ignore[arg-type]
        observations, rewards, starts, _ = env.step(actions)
        total += float(rewards[0])
        if starts[0]:  # the environment would render the next episode's first frame
            break
        frames.append(env.get_images()[0])
    pictures = [np.asarray(frame) for frame in frames if frame is not None]
    if not pictures:
        raise UserError(
            "the environment rendered no frames: render() must return an array [height, width, 3]"
        )
    figures.save_gif(pictures, path, fps=fps)
    return WHOLE if starts[0] else f"the first {max_steps} steps of an episode", total
