"""The DeepMind Control Suite (Tassa et al. 2018) as Gymnasium environments, on vectors or pixels.

This module holds the names of the tasks, and the environment, which adds action repeat and pixels
to shimmy's compatibility layer. The OpenGL backend is chosen in mujoco_backend.py. dm_control is
not imported before the first environment is made.
"""

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from numbers import Integral, Real
from typing import Any, Literal

import gymnasium as gym
import numpy as np

from totalprop.envs.mujoco_backend import (
    check_not_forked,
    check_rendering,
    load_dm_control,
    rendering_failed,
)
from totalprop.envs.rewind import set_simulation_state, simulation_state
from totalprop.envs.validation import check_choice

_TASKS = {
    "acrobot": ("swingup", "swingup_sparse"),
    "ball_in_cup": ("catch",),
    "cartpole": (
        *("balance", "balance_sparse", "swingup", "swingup_sparse"),
        *("two_poles", "three_poles"),
    ),
    "cheetah": ("run",),
    "dog": ("stand", "walk", "trot", "run", "fetch"),
    "finger": ("spin", "turn_easy", "turn_hard"),
    "fish": ("upright", "swim"),
    "hopper": ("stand", "hop"),
    "humanoid": ("stand", "walk", "run", "run_pure_state"),
    "humanoid_CMU": ("stand", "walk", "run"),
    "lqr": ("lqr_2_1", "lqr_6_2"),
    "manipulator": ("bring_ball", "bring_peg", "insert_ball", "insert_peg"),
    "pendulum": ("swingup",),
    "point_mass": ("easy", "hard"),
    "quadruped": ("walk", "run", "escape", "fetch"),
    "reacher": ("easy", "hard"),
    "stacker": ("stack_2", "stack_4"),
    "swimmer": ("swimmer6", "swimmer15"),
    "walker": ("stand", "walk", "run"),
}
# (domain, task) in the order of dm_control.suite.ALL_TASKS.
TASKS = tuple((domain, task) for domain, tasks in _TASKS.items() for task in tasks)
# Further swimmers of `suite.swimmer.swimmer(n)`, which suite.load does not know: task -> links.
SWIMMERS = {f"swimmer{n}": n for n in (3, 5, 7)}
FAST = {"shadow": False, "reflection": False}  # MuJoCo's flags for render="fast"


class DMControlEnv(gym.Env[np.ndarray, np.ndarray]):
    """One task of the suite, registered as `dmc/<domain>-<task>-v0`, e.g. `dmc/walker-walk-v0`.

    Each decision repeats its action for `action_repeat` control steps and sums their rewards (each
    in [0, 1], except in lqr), so the default episode of 1000 control steps has 500 decisions. The
    time limit truncates; an episode terminates only if the task ends it (discount 0). `info` is
    empty.

    Vector observations concatenate all entries of the task's observation, as float32 in
    dm_control's order. Pixel observations are [size, size, 3] uint8, rendered after the last
    control step. Actions have the task's bounds and are clipped to them.

    `reset(seed=s)` starts the same trajectory as dm_control with `random=s`, bit for bit. In
    dm_control the model of lqr is random; here it is always that of `random=0`, so that copies of
    the environment agree. Pixels are reproducible with the same OpenGL library, but differ between
    libraries. Workers that render must not be forked from a process that has rendered.

    Differs from shimmy's DmControlCompatibilityV0, which it wraps: observations are one flat
    float32 vector, actions are clipped, stepping a finished episode raises ResetNeeded instead of
    silently resetting, and `render_fps` is right.

    Args:
        domain: name in `TASKS`.
        task: name in `TASKS`; for domain "swimmer" also in `SWIMMERS`.
        observation: "vector" or "pixels".
        action_repeat: control steps per decision.
        size: height and width of pixel observations.
        camera: index or name; None is 0, or 2 for quadruped (Hafner et al. 2020, Dreamer's code).
        render: "suite" renders with the suite's own look. "fast" omits anti-aliasing, shadows and
            reflections, which is 9 to 30 times faster in software. It may lose objects thinner than
            a pixel (the string of ball_in_cup), and policies do not transfer between the two.
        render_size: height and width of `render()`.
        time_limit: in s of simulated time; None is the task's own (lqr has none).
        render_mode: None or "rgb_array".

    Attributes:
        dm_env: the wrapped dm_control environment; `dm_env.physics` is the simulation.

    Raises:
        ValueError: an argument is out of range.
        ImportError: dm_control, mujoco or shimmy is missing.
        RuntimeError: pixels are requested, but MuJoCo cannot render.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"]}

    def __init__(
        self,
        domain: str,
        task: str,
        *,
        observation: Literal["vector", "pixels"] = "vector",
        action_repeat: int = 2,
        size: int = 64,
        camera: int | str | None = None,
        render: Literal["suite", "fast"] = "suite",
        render_size: tuple[int, int] = (240, 320),
        time_limit: float | None = None,
        render_mode: Literal["rgb_array"] | None = None,
    ) -> None:
        check_choice("observation", observation, ("vector", "pixels"))
        check_choice("render", render, ("suite", "fast"))
        check_choice("render_mode", render_mode, (None, "rgb_array"))
        self.action_repeat = _check_count("action_repeat", action_repeat, "control steps")
        self.size = _check_count("size", size, "pixels")
        if not isinstance(render_size, tuple | list) or len(render_size) != 2:
            raise ValueError(f"render_size={render_size!r} is not a size: pass (height, width).")
        height, width = (_check_count("render_size", side, "pixels") for side in render_size)
        self.render_size = (height, width)
        self.observation_kind, self.render_style = observation, render
        self._name = f"{domain}-{task}"
        self.render_mode = render_mode

        suite, _, wrapper = load_dm_control()
        if observation == "pixels":
            check_rendering()
        # lqr draws its model from `random`; every reset replaces that generator, see reset().
        task_kwargs: dict[str, Any] = {"random": 0}
        if time_limit is not None:
            task_kwargs["time_limit"] = _check_seconds("time_limit", time_limit)
        with _quiet_absl():
            if domain == "swimmer" and task in SWIMMERS:
                self.dm_env = suite.swimmer.swimmer(SWIMMERS[task], **task_kwargs)
            else:
                self.dm_env = suite.load(domain, task, task_kwargs=task_kwargs)
        self._env = wrapper(self.dm_env)
        self._cameras: dict[tuple[int, int], Any] = {}
        self._camera = self._camera_index(camera, 2 if domain == "quadruped" else 0)
        self._prepare_drawing()
        self._seeded = self._running = False

        # shimmy writes a wrong rate into a dict that all its instances share.
        seconds = self.dm_env.control_timestep() * self.action_repeat
        self.metadata = {**type(self).metadata, "render_fps": 1 / seconds}
        bounds = self.dm_env.action_spec()
        self._low = np.broadcast_to(bounds.minimum, bounds.shape).astype(np.float64)
        self._high = np.broadcast_to(bounds.maximum, bounds.shape).astype(np.float64)
        self.action_space = gym.spaces.Box(
            self._low.astype(np.float32), self._high.astype(np.float32), dtype=np.float32
        )
        if observation == "pixels":
            self.observation_space = gym.spaces.Box(0, 255, (self.size, self.size, 3), np.uint8)
        else:
            entries = self.dm_env.observation_spec().values()
            length = sum(math.prod(entry.shape) for entry in entries)
            self.observation_space = gym.spaces.Box(-math.inf, math.inf, (length,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode.

        Args:
            seed: seed of the task's generator, any integer >= 0; None continues the generator.
            options: unused.

        Returns:
            The observation (see the class) and an empty info.
        """
        super().reset(seed=seed)
        if seed is None and not self._seeded:
            seed = int(self.np_random.integers(2**32))
        elif seed is not None and seed >= 2**32:  # RandomState takes 32 bits
            seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        physics = self.dm_env.physics
        # quadruped-escape would create an OpenGL context at every reset, even without rendering.
        physics._make_rendering_contexts = lambda: None
        try:
            entries, _ = self._env.reset(seed=seed)
        finally:
            del physics._make_rendering_contexts
        self._seeded = self._running = True
        return self._observe(entries), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Repeat the action for `action_repeat` control steps, or until the episode ends.

        Args:
            action: [A], clipped to the bounds of `action_space`.

        Returns:
            The observation, the summed reward, terminated, truncated, and an empty info.

        Raises:
            ValueError: the action is not A finite numbers.
            gymnasium.error.ResetNeeded: no episode is running.
        """
        control = np.asarray(action, dtype=np.float64)
        if control.shape != self._low.shape or not np.isfinite(control).all():
            raise ValueError(
                f"action={action!r} is not an array of {self._low.size} finite numbers: "
                f"pass shape {self._low.shape}, within action_space."
            )
        if not self._running:
            raise gym.error.ResetNeeded("The episode is over or never began: call reset() first.")
        control = np.clip(control, self._low, self._high)
        total, terminated, truncated = 0.0, False, False
        for _ in range(self.action_repeat):
            entries, reward, terminated, truncated, _ = self._env.step(control)
            total += float(reward)
            if terminated or truncated:
                self._running = False
                break
        return self._observe(entries), total, terminated, truncated, {}

    def render(self) -> np.ndarray | None:
        """Render the state as [*render_size, 3] uint8; returns None without a render mode."""
        if self.render_mode is None:
            gym.logger.warn('render() returns None: make the env with render_mode="rgb_array".')
            return None
        return self._draw(*self.render_size)

    def close(self) -> None:
        """End the episode and free the OpenGL context; `reset` starts a new episode."""
        # physics.free() would free the simulation too, but SB3's checker resets an environment
        # after closing it.
        self._running = False
        self._cameras.clear()
        if self.dm_env.physics._contexts:
            self.dm_env.physics._free_rendering_contexts()

    def get_state(self) -> dict[str, Any]:
        """The state of the episode, see `envs.rewind.HasState`."""
        flags = {"seeded": self._seeded, "running": self._running}
        return {"task": self._name, **flags, **simulation_state(self.dm_env)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore a state that `get_state` returned.

        Raises:
            ValueError: the state belongs to another task.
        """
        if state["task"] != self._name:
            raise ValueError(
                f"The snapshot is of {state['task']}, the environment is {self._name}: "
                f"restore it into dmc/{state['task']}-v0."
            )
        set_simulation_state(self.dm_env, state)
        self._seeded, self._running = state["seeded"], state["running"]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cameras": {}}  # cameras cannot be copied; made on demand

    def _observe(self, entries: Mapping[str, np.ndarray]) -> np.ndarray:
        if self.observation_kind == "pixels":
            return self._draw(self.size, self.size)
        # Some entries are 0-dimensional. A spaces.Dict would sort the entries.
        return np.concatenate([np.ravel(entry) for entry in entries.values()]).astype(np.float32)

    def _draw(self, height: int, width: int) -> np.ndarray:
        camera = self._cameras.get((height, width))
        if camera is None:  # cameras are kept, since a new scene costs as much as a fast frame
            check_rendering()
            check_not_forked()
            _, mujoco, _ = load_dm_control()
            try:
                camera = mujoco.Camera(self.dm_env.physics, height, width, self._camera)
            except Exception as error:
                raise rendering_failed(error) from error
            self._cameras[height, width] = camera
        flags = FAST if self.render_style == "fast" else None
        return camera.render(render_flag_overrides=flags).copy()  # removes negative strides

    def _prepare_drawing(self) -> None:
        # MuJoCo reads these only once, when the OpenGL context is created.
        visual = self.dm_env.physics.model.vis
        height, width = self.render_size
        visual.global_.offheight = max(visual.global_.offheight, height, self.size)
        visual.global_.offwidth = max(visual.global_.offwidth, width, self.size)
        if self.render_style == "fast":
            visual.quality.offsamples = 0

    def _camera_index(self, camera: Any, default: int) -> int:
        model = self.dm_env.physics.model
        names = [model.id2name(index, "camera") for index in range(model.ncam)]
        if camera is None:
            return default
        if isinstance(camera, str) and camera in names:
            return names.index(camera)
        if _is_integer(camera) and -1 <= camera < len(names):
            return int(camera)
        raise ValueError(
            f"camera={camera!r} is unknown: pass one of {names}, its index, or -1 (free camera)."
        )


@contextlib.contextmanager
def _quiet_absl() -> Iterator[None]:
    # mujoco 3.17 warns about dm_control's cheetah.xml.
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_count(name: str, value: Any, unit: str) -> int:
    if not _is_integer(value) or value < 1:
        raise ValueError(f"{name}={value!r} is out of range: pass a whole number >= 1 of {unit}.")
    return int(value)


def _check_seconds(name: str, value: Any) -> float:
    if not isinstance(value, Real) or isinstance(value, bool) or not float(value) > 0:
        raise ValueError(f"{name}={value!r} is out of range: pass seconds > 0, or None.")
    return float(value)
