"""The cart-pole swing-up of PILCO and PIPPS as a Gymnasium environment.

This module holds the equations of motion, their integrator, the two costs of PIPPS and the noisy
environment. Rendering is in cartpole_render.py. The simulation is not differentiable: agents learn
a model, and use only `CartPoleSwingUpEnv.cost` and `saturating_cost`,
`CartPoleSwingUpEnv.initial_distribution` and what the class declares of its observations.

The state is [x, theta, x_dot, theta_dot] in m, rad, m/s and rad/s. The pole is upright at theta = 0
and hangs down at theta = pi. Positive theta leans left: the tip is at (x - l sin theta, l cos
theta). The angle is never wrapped.
"""

import math
from typing import Any, Literal

import gymnasium as gym
import numpy as np

from totalprop.envs.arrays import library_of
from totalprop.envs.cartpole_render import draw
from totalprop.envs.validation import check_choice, check_number

CONTROL_STEP = 0.1  # s of constant force: 10 Hz, Parmas et al. 2018, Sec. 4.2
SUBSTEPS = 10
FORCE_LIMIT = 10.0  # N
# [x, theta, x_dot, theta_dot]; Parmas et al. 2018, Sec. 4.2.1: 0.01 m, 1 deg, 0.1 m/s, 10 deg/s.
BASE_NOISE_STD = (0.01, math.pi / 180, 0.1, 10 * math.pi / 180)


def cartpole_derivatives(
    state: np.ndarray,
    force: float | np.ndarray,
    *,
    pole_length: float = 0.5,
    cart_mass: float = 0.5,
    pole_mass: float = 0.5,
    friction: float = 0.1,
    gravity: float = 9.82,
) -> np.ndarray:
    """Compute the time derivative of the cart-pole state.

    The pole is a uniform rod on a frictionless hinge. With F = u - b ẋ and D = 4(M+m) - 3 m cos²θ:
        ẍ = (-2 m l θ̇² sin θ + 3 m g sin θ cos θ + 4 F) / D
        θ̈ = (-3 m l θ̇² sin θ cos θ + 6 (M+m) g sin θ + 6 F cos θ) / (l D)
    Plant and constants are those of Deisenroth & Rasmussen 2011 (PILCO, reference code
    dynamics_cp.m), also used by Parmas et al. 2018, Sec. 4.2. Differs from PILCO: its angle is
    ours + pi (0 when hanging).

    Args:
        state: [..., 4] x, theta, x_dot, theta_dot.
        force: [...] u in N, broadcastable to the leading axes of the state.
        pole_length: l, in m; the centre of mass is at l/2.
        cart_mass: M, in kg.
        pole_mass: m, in kg.
        friction: b, between cart and ground, in N/(m/s).
        gravity: g, in m/s².

    Returns:
        [..., 4] x_dot, theta_dot, x_ddot, theta_ddot.
    """
    state = np.asarray(state, dtype=np.float64)
    theta, x_dot, theta_dot = state[..., 1], state[..., 2], state[..., 3]
    sin, cos = np.sin(theta), np.cos(theta)
    mass = cart_mass + pole_mass
    pull = force - friction * x_dot
    spin = pole_mass * pole_length * theta_dot**2 * sin
    denominator = 4 * mass - 3 * pole_mass * cos**2
    x_ddot = (-2 * spin + 3 * pole_mass * gravity * sin * cos + 4 * pull) / denominator
    theta_ddot = (-3 * spin * cos + 6 * mass * gravity * sin + 6 * pull * cos) / (
        pole_length * denominator
    )
    derivative = np.empty((*np.shape(x_ddot), 4))  # np.stack makes env.step 3x slower
    derivative[..., 0], derivative[..., 1] = x_dot, theta_dot
    derivative[..., 2], derivative[..., 3] = x_ddot, theta_ddot
    return derivative


def integrate(
    state: np.ndarray,
    force: float | np.ndarray,
    *,
    integrator: Literal["rk4", "euler"] = "rk4",
    duration: float = CONTROL_STEP,
    substeps: int = SUBSTEPS,
    **plant: float,
) -> np.ndarray:
    """Integrate the equations of motion over `duration` seconds of constant force.

    After one control step from rest at 10 N, "rk4" (classical Runge-Kutta) is within 3e-6 of the
    exact solution, while "euler" (explicit) is off by 0.13 rad/s. "euler" is supported because the
    PIPPS demo released by Parmas & Seno 2022 uses it.

    Args:
        state: [..., 4] x, theta, x_dot, theta_dot.
        force: [...] in N.
        integrator: "rk4" or "euler".
        duration: in s.
        substeps: number of integration steps of equal length.
        **plant: constants for `cartpole_derivatives`.

    Returns:
        [..., 4] final state, float64.

    Raises:
        ValueError: the integrator is unknown.
    """
    check_choice("integrator", integrator, ("rk4", "euler"))
    h = duration / substeps
    state = np.asarray(state, dtype=np.float64)
    for _ in range(substeps):
        k1 = cartpole_derivatives(state, force, **plant)
        if integrator == "euler":
            state = state + h * k1
            continue
        k2 = cartpole_derivatives(state + h / 2 * k1, force, **plant)
        k3 = cartpole_derivatives(state + h / 2 * k2, force, **plant)
        k4 = cartpole_derivatives(state + h * k3, force, **plant)
        state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return state


class CartPoleSwingUpEnv(gym.Env[np.ndarray, np.ndarray]):
    """Swing up a pole and balance it, with noisy observations; reward = -cost(true next state).

    The task of Parmas et al. 2018, Sec. 4.2.1. Registered as `totalprop/CartPoleSwingUp-v0`, which
    truncates after 30 steps (3 s). Episodes never terminate, and the track is infinite. The
    undiscounted return lies in [-30, 0]. The registered reward threshold, -15, is INFERRED: the
    papers count a run as a success if its final return passes a threshold, but do not state its
    value. -15 lies between doing nothing (-26 to -30) and the best known open-loop plans (-8 to
    -10).

    Observations are the state plus white Gaussian noise, including the first one after a reset.
    Actions in [-1, 1] are scaled to +-10 N; actions out of range are clipped. The `info` of reset
    and step holds the true "state" ([4] float64, after the step), its "cost" and its "tip_distance"
    (m). All randomness comes from `np_random`, so the seed passed to `reset` determines everything.

    Args:
        cost: "angle" or "tip", see `cost`.
        noise: multiplier k >= 0 of the VARIANCE of the observation noise: std = sqrt(k) * [0.01 m,
            1 deg, 0.1 m/s, 10 deg/s]. Parmas et al. 2018 use k in {0.01, 1, 4, 9, 16}.
        integrator: "rk4" or "euler", see `integrate`.
        pole_length: l > 0 in m, used by the plant and by the cost.
        tip_width: w > 0 in m of the tip cost; 0.25 in PILCO, 0.5 in the released PIPPS demo.
        mirrored_tip: place the tip at x + l sin theta in the tip cost, mirrored about the cart, as
            in the released PIPPS demo. Use it only to reproduce that code. The angle cost and
            `tip_distance` ignore it.
        initial_std: standard deviation >= 0 of the true initial state, which is drawn from
            N([0, pi, 0, 0], initial_std² I); 0.02 in the PIPPS demo, 0.1 in PILCO.
        render_mode: None or "rgb_array".

    Attributes:
        integrated_dims: pairs (position, velocity) of an observation's entries.
        time_step: s between two observations.

    Raises:
        ValueError: an argument is out of range.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    integrated_dims, time_step = ((0, 2), (1, 3)), CONTROL_STEP
    observation_names = ("cart [m]", "pole [rad]", "cart [m/s]", "pole [rad/s]")  # for figures

    def __init__(
        self,
        *,
        cost: Literal["angle", "tip"] = "angle",
        noise: float = 1.0,
        integrator: Literal["rk4", "euler"] = "rk4",
        pole_length: float = 0.5,
        tip_width: float = 0.25,
        mirrored_tip: bool = False,
        initial_std: float = 0.02,
        render_mode: Literal["rgb_array"] | None = None,
    ) -> None:
        check_choice("cost", cost, ("angle", "tip"))
        check_choice("integrator", integrator, ("rk4", "euler"))
        check_choice("mirrored_tip", mirrored_tip, (False, True))
        check_choice("render_mode", render_mode, (None, "rgb_array"))
        self.cost_name, self.integrator = cost, integrator
        self.mirrored_tip, self.render_mode = mirrored_tip, render_mode
        self.noise = check_number("noise", noise, "the variance multiplier k >= 0, e.g. 1.0")
        self.pole_length = check_number(
            "pole_length", pole_length, "a length > 0 in metres, e.g. 0.5", positive=True
        )
        self.tip_width = check_number(
            "tip_width", tip_width, "a width > 0 in metres, e.g. 0.25", positive=True
        )
        self.initial_std = check_number(
            "initial_std", initial_std, "a standard deviation >= 0, e.g. 0.02"
        )
        self.noise_std = math.sqrt(self.noise) * np.array(BASE_NOISE_STD)

        self.action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
        # The state is unbounded, but Gymnasium's checker warns about infinite bounds.
        largest = float(np.finfo(np.float32).max)
        self.observation_space = gym.spaces.Box(-largest, largest, (4,), np.float32)
        self._state: np.ndarray | None = None
        self._force = 0.0
        self._steps = 0

    @property
    def initial_distribution(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean [4] and standard deviation [4] of the TRUE initial state, float64.

        The distribution is Gaussian with independent coordinates, without observation noise.
        Model-based agents look up this attribute by name, to sample the particles they start from.
        """
        return np.array([0.0, math.pi, 0.0, 0.0]), np.full(4, self.initial_std)

    def cost(self, state: Any) -> Any:
        """Compute the cost in [0, 1) of a state, 1 - exp(-½ δ²); differentiable for torch tensors.

        "angle": δ² = x² + θ². Only θ = 0 counts as upright, not θ = 2 pi.
        "tip":   δ² = d² / w² with d = `tip_distance`.
        Parmas et al. 2018, Sec. 4.2.1 (Angle Cost and Tip Cost); the Tip Cost is from Deisenroth &
        Rasmussen 2011 (PILCO). Differs from Parmas et al. 2018, Sec. 4.2, which omits the ½; the
        released code of both papers has it.

        Args:
            state: [..., 4] true state, a numpy array or a torch tensor.

        Returns:
            [...] of the same library.
        """
        xp = library_of(state)
        x, theta = state[..., 0], state[..., 1]
        if self.cost_name == "angle":
            delta_squared = x**2 + theta**2
        else:
            d_squared = self._tip_distance_squared(state, mirrored=self.mirrored_tip)
            delta_squared = d_squared / self.tip_width**2
        return 1 - xp.exp(-0.5 * delta_squared)

    @property
    def saturating_cost(self) -> dict[str, np.ndarray]:
        """The same cost as a quadratic form, 1 - exp(-½ (z - t)ᵀ W (z - t)).

        z = (state, sin a, cos a) with the angles a = A state. Agents that integrate the cost over a
        Gaussian state look up this attribute by name.

        Returns:
            "target" t, "weights" W and "angles" A; [4], [4, 4] and [0, 4] of the angle cost, [6],
            [6, 6] and [1, 4] of the tip cost.
        """
        if self.cost_name == "angle":
            return {
                "target": np.zeros(4),
                "weights": np.diag([1.0, 1.0, 0.0, 0.0]),
                "angles": np.zeros((0, 4)),
            }
        reach = self.pole_length if self.mirrored_tip else -self.pole_length
        weights = np.zeros((6, 6))
        across = np.array([1.0, 0.0, 0.0, 0.0, reach, 0.0])  # the tip's x
        weights += np.outer(across, across)
        weights[5, 5] += self.pole_length**2
        return {
            "target": np.array([0.0, 0.0, 0.0, 0.0, 0.0, 1.0]),
            "weights": weights / self.tip_width**2,
            "angles": np.array([[0.0, 1.0, 0.0, 0.0]]),
        }

    def tip_distance(self, state: Any) -> Any:
        """Compute the distance d in m of the pole's tip from its target, upright at x = 0.

        d² = (x - l sin θ)² + l² (1 - cos θ)² of the physical tip, whatever `mirrored_tip` is.
        Differentiable for torch tensors except at d = 0.

        Args:
            state: [..., 4] true state, a numpy array or a torch tensor.

        Returns:
            [...] of the same library.
        """
        return library_of(state).sqrt(self._tip_distance_squared(state, mirrored=False))

    def _tip_distance_squared(self, state: Any, *, mirrored: bool) -> Any:
        xp = library_of(state)
        x, theta = state[..., 0], state[..., 1]
        reach = self.pole_length * xp.sin(theta)
        across = x + reach if mirrored else x - reach
        return across**2 + (self.pole_length * (1 - xp.cos(theta))) ** 2

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode.

        Args:
            seed: seed of `np_random`; None continues the current generator.
            options: may hold "state", the exact true state [4] to start from.

        Returns:
            Noisy observation, [4] float32, and info (see the class).

        Raises:
            ValueError: "state" is not 4 finite numbers.
        """
        super().reset(seed=seed)
        if options is not None and "state" in options:
            state = np.array(options["state"], dtype=np.float64)
            if state.shape != (4,) or not np.isfinite(state).all():
                raise ValueError(
                    f"options['state']={options['state']!r} is not a start state: "
                    "pass 4 finite numbers [x, theta, x_dot, theta_dot]."
                )
        else:
            mean, std = self.initial_distribution
            state = mean + std * self.np_random.standard_normal(4)
        self._state, self._force, self._steps = state, 0.0, 0
        return self._observe(state), self._info(state)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Apply a force for 0.1 s.

        Args:
            action: [1] force as a fraction of 10 N, clipped to [-1, 1].

        Returns:
            Noisy observation, [4] float32; reward, -cost(true next state); terminated, False;
            truncated, False (the registered TimeLimit sets it); and info (see the class).

        Raises:
            ValueError: the action is not one finite number.
        """
        fraction = np.asarray(action, dtype=np.float64)
        if fraction.size != 1 or not np.isfinite(fraction).all():
            raise ValueError(f"action={action!r} is not one finite number: pass [u], -1 <= u <= 1.")
        force = FORCE_LIMIT * min(max(fraction.item(), -1.0), 1.0)
        state = integrate(
            self._started(), force, integrator=self.integrator, pole_length=self.pole_length
        )
        self._state, self._force, self._steps = state, force, self._steps + 1
        info = self._info(state)
        return self._observe(state), -info["cost"], False, False, info

    def render(self) -> np.ndarray | None:
        """Render the true state as [320, 480, 3] uint8; returns None without a render mode."""
        if self.render_mode is None:
            gym.logger.warn('render() returns None: make the env with render_mode="rgb_array".')
            return None
        state = self._started()
        return draw(
            state,
            pole_length=self.pole_length,
            force=self._force,
            captions=(
                f"step {self._steps}   {self._steps * CONTROL_STEP:.1f} s",
                f"{self._force:+.1f} N",
                f"cost {float(self.cost(state)):.3f}",
            ),
        )

    def get_state(self) -> dict[str, Any]:
        """The state of the episode, see `envs.rewind.HasState`."""
        return {"state": self._state, "force": self._force, "steps": self._steps}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore a state that `get_state` returned."""
        self._state, self._force, self._steps = state["state"], state["force"], state["steps"]

    def _started(self) -> np.ndarray:
        if self._state is None:
            raise gym.error.ResetNeeded("No episode has started: call reset() first.")
        return self._state

    def _observe(self, state: np.ndarray) -> np.ndarray:
        return (state + self.noise_std * self.np_random.standard_normal(4)).astype(np.float32)

    def _info(self, state: np.ndarray) -> dict[str, Any]:
        return {
            "state": state.copy(),
            "cost": float(self.cost(state)),
            "tip_distance": float(self.tip_distance(state)),
        }
