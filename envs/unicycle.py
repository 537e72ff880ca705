"""The robotic unicycle of PILCO and PIPPS as a Gymnasium environment.

This module holds the equations of motion, their integrator, the cost of PILCO and the noisy
environment. Rendering is in unicycle_render.py. The simulation is not differentiable: agents learn
a model, and use only `UnicycleEnv.cost` and `saturating_cost`, `UnicycleEnv.initial_distribution`
and what `UnicycleEnv` declares of its observations.

A wheel rolls without slip on a floor. Its axle carries a frame, and on top of the frame a
turntable spins about the frame's long axis. One motor turns the wheel against the frame and
balances forwards and backwards; the other spins the turntable and thereby turns the robot. Sideways
balance is possible by turning alone: the robot has to steer into the direction in which it falls.

The state has 12 entries: the rates of roll, yaw, wheel, pitch and turntable in rad/s; the contact
point x, y in m; roll, yaw, wheel, pitch and turntable in rad. Upright is roll = pitch = 0. Positive
roll leans left, positive pitch leans forwards, positive yaw turns left; the robot faces x at yaw =
0. An agent sees 10 entries, see `body_view`. Angles are never wrapped.
"""

import math
from typing import Any, Literal

import gymnasium as gym
import numpy as np

from totalprop.envs.arrays import library_of
from totalprop.envs.unicycle_render import draw
from totalprop.envs.validation import check_choice, check_number

SUBSTEP = 0.01  # s
RATE_LIMIT = 100.0  # rad/s of roll, yaw, wheel and pitch: above, the robot has fallen
WHEEL_TORQUE, TURNTABLE_TORQUE = 50.0, 10.0  # Nm at an action of 1
# Masses in kg, lengths in m and moments of inertia in kg m² of PILCO's dynamics_unicycle.m.
WHEEL_MASS, FRAME_MASS, TURNTABLE_MASS = 1.0, 23.5, 10.0
WHEEL_RADIUS = 0.225
FRAME_HEIGHT, TURNTABLE_HEIGHT = 0.54, 0.81  # of the centres of mass, above the axle
WHEEL_AXLE_INERTIA, WHEEL_INERTIA = 0.0484, 0.0242  # about the axle; about a diameter
FRAME_INERTIA = (0.4608, 0.8292, 0.4248)  # about the axes ahead, wheel's axle, and long
TURNTABLE_AXLE_INERTIA, TURNTABLE_INERTIA = 0.2, 1.3  # about its axle; about a diameter
COST_WHEEL_RADIUS = 0.22  # PILCO's settings_unicycle.m; the plant has 0.225
# Of rates (rad/s), then of positions (m) and angles (rad): PILCO's settings_unicycle.m.
BASE_NOISE_STD = (0.01,) * 5 + (0.003,) * 7
INITIAL_STD = (0.02,) * 5 + (0.1,) * 2 + (0.02,) * 5
_X, _Y, _ROLL, _YAW, _PITCH = 5, 6, 7, 8, 10  # entries of a state
_Vector = tuple[Any, ...]  # three arrays of one shape


def unicycle_derivatives(
    state: np.ndarray,
    torques: np.ndarray,
    *,
    reference_inertia: bool = True,
    gravity: float = 9.82,
) -> np.ndarray:
    """Compute the time derivative of the unicycle's state, by Kane's method.

    The rates u = (θ̇, φ̇, ψ̇w, ψ̇f, ψ̇t) of roll, yaw, wheel, pitch and turntable are independent. With
    the velocities v = Jv u of the centres of mass and the angular velocities ω = Jω u,
        Σ m Jvᵀ (Jv u̇ + J̇v u + g k) + Jωᵀ (I (Jω u̇ + J̇ω u) + ω × I ω) = (0, 0, U, -U, V)
    over wheel, frame and turntable, where k points up. The wheel rolls: its velocity is that of its
    centre about the contact point, which moves by ẋ = rw cos φ ψ̇w, ẏ = rw sin φ ψ̇w.

    Plant and constants are those of PILCO (Deisenroth et al. 2015; reference code
    dynamics_unicycle.m), also used by Parmas et al. 2018, Sec. 4.2. That code is these equations
    with one difference: in I (Jω u̇ + J̇ω u) the frame's moment of inertia about the wheel's axle is
    that of the WHEEL, 0.0484 instead of 0.8292 kg m², while ω × I ω has the frame's own. Published
    results of the unicycle were presumably made with it.

    Args:
        state: [..., 12], see the module.
        torques: [..., 2] of turntable V and wheel U in Nm, broadcastable to the state's axes.
        reference_inertia: True: as in the reference code; False: the frame's own moment of inertia.
            The energy is conserved without torques in both cases, in the first one with the lighter
            frame.
        gravity: g, in m/s².

    Returns:
        [..., 12] time derivative, float64. It is infinite or meaningless at a roll of ±pi/2, where
        the robot lies on its side and yaw and wheel turn about the same axis.
    """
    state = np.asarray(state, dtype=np.float64)
    torques = np.asarray(torques, dtype=np.float64)
    roll_rate, yaw_rate, wheel_rate, pitch_rate, table_rate = np.moveaxis(state[..., :5], -1, 0)
    s, c = np.sin(state[..., _ROLL]), np.cos(state[..., _ROLL])
    sp, cp = np.sin(state[..., _PITCH]), np.cos(state[..., _PITCH])
    rw = WHEEL_RADIUS
    # Vectors have components along the wheel's axes (ahead, axle, up), which turn with yaw and
    # roll, or along the frame's (ahead, axle, long), which turn with the pitch, too.
    turning = (-roll_rate, -yaw_rate * s, yaw_rate * c)  # of the wheel's axes
    rolling = wheel_rate + turning[1]  # of the wheel about its axle
    frame_spin = (
        -roll_rate * cp - yaw_rate * c * sp,
        pitch_rate + turning[1],
        -roll_rate * sp + yaw_rate * c * cp,
    )
    # d/dt of the components at constant rates
    turn_change = (0, -c * roll_rate * yaw_rate, -s * roll_rate * yaw_rate)
    frame_change = (
        sp * pitch_rate * roll_rate - yaw_rate * (c * cp * pitch_rate - s * sp * roll_rate),
        turn_change[1],
        -cp * pitch_rate * roll_rate - yaw_rate * (c * sp * pitch_rate + s * cp * roll_rate),
    )

    # One row for each component of each velocity and angular velocity.
    inertias: list[float] = []
    jacobian = np.zeros((*s.shape, 17, 5))  # by the rates: roll, yaw, wheel, pitch, turntable
    forces = np.empty((*s.shape, 17))  # that constant rates need

    def add(inertia: float, by_rate: dict[int, Any], change: Any, force: Any) -> None:
        """Add a component: its derivatives by rates and by time, and what turning axes need."""
        row = len(inertias)
        inertias.append(inertia)
        for rate, value in by_rate.items():
            jacobian[..., row, rate] = value
        forces[..., row] = inertia * change + force

    # The wheel's centre, whose velocity has no component up, and the wheel.
    m, ahead, sideways = WHEEL_MASS, rw * rolling, rw * roll_rate
    add(m, {1: -rw * s, 2: rw}, rw * turn_change[1], -m * turning[2] * sideways)
    add(m, {0: rw}, 0, m * (turning[2] * ahead - gravity * s))
    inertia = (WHEEL_INERTIA, WHEEL_AXLE_INERTIA, WHEEL_INERTIA)
    gyro = _gyroscopic(turning, inertia, (turning[0], rolling, turning[2]))
    for i, by_rate in enumerate(({0: -1}, {1: -s, 2: 1}, {1: c})):
        add(inertia[i], by_rate, turn_change[i], gyro[i])

    for m, height in ((FRAME_MASS, FRAME_HEIGHT), (TURNTABLE_MASS, TURNTABLE_HEIGHT)):
        arm = rw * cp + height
        velocity = (
            cp * ahead + height * frame_spin[1],
            sideways - height * frame_spin[0],
            sp * ahead,
        )
        turn = _cross(frame_spin, velocity)
        change = turn_change[1] * arm - sp * pitch_rate * ahead
        add(m, {1: -s * arm, 2: rw * cp, 3: height}, change, m * (turn[0] - gravity * c * sp))
        by_rate = {0: rw + height * cp, 1: height * c * sp}
        add(m, by_rate, -height * frame_change[0], m * (turn[1] - gravity * s))
        change = turn_change[1] * rw * sp + cp * pitch_rate * ahead
        add(m, {1: -rw * s * sp, 2: rw * sp}, change, m * (turn[2] + gravity * c * cp))

    by_rates = ({0: -cp, 1: -c * sp}, {1: -s, 3: 1}, {0: -sp, 1: c * cp})
    accelerated = list(FRAME_INERTIA)
    if reference_inertia:
        accelerated[1] = WHEEL_AXLE_INERTIA
    gyro = _gyroscopic(frame_spin, FRAME_INERTIA, frame_spin)
    for i, by_rate in enumerate(by_rates):
        add(accelerated[i], by_rate, frame_change[i], gyro[i])
    inertia = (TURNTABLE_INERTIA, TURNTABLE_INERTIA, TURNTABLE_AXLE_INERTIA)
    gyro = _gyroscopic(frame_spin, inertia, (*frame_spin[:2], frame_spin[2] + table_rate))
    for i, by_rate in enumerate((*by_rates[:2], {**by_rates[2], 4: 1})):
        add(inertia[i], by_rate, frame_change[i], gyro[i])

    push = np.zeros((*np.broadcast_shapes(s.shape, torques.shape[:-1]), 5))
    push[..., 2], push[..., 3] = torques[..., 1], -torques[..., 1]
    push[..., 4] = torques[..., 0]
    transposed = np.swapaxes(jacobian, -1, -2)
    push -= (transposed @ forces[..., None])[..., 0]
    mass = (transposed * np.array(inertias)) @ jacobian
    derivative = np.empty((*push.shape[:-1], 12))
    derivative[..., :5] = np.linalg.solve(mass, push[..., None])[..., 0]
    derivative[..., _X] = rw * np.cos(state[..., _YAW]) * wheel_rate
    derivative[..., _Y] = rw * np.sin(state[..., _YAW]) * wheel_rate
    derivative[..., 7:] = state[..., :5]
    return derivative


def integrate(
    state: np.ndarray,
    torques: np.ndarray,
    *,
    duration: float,
    substeps: int | None = None,
    **plant: Any,
) -> np.ndarray:
    """Integrate the equations of motion over `duration` seconds of constant torques.

    Classical Runge-Kutta. After 0.1 s from states with rates of up to 6 rad/s and angles of up to
    0.8 rad, at torques up to their limits, it is within 1e-4 of the exact solution (median 1e-6).

    Args:
        state: [..., 12], see the module.
        torques: [..., 2] of turntable and wheel, in Nm.
        duration: in s.
        substeps: number of integration steps of equal length; None: of at most 0.01 s each.
        **plant: options of `unicycle_derivatives`.

    Returns:
        [..., 12] final state, float64.
    """
    if substeps is None:
        substeps = _substeps(duration)
    h = duration / substeps
    state = np.asarray(state, dtype=np.float64)
    for _ in range(substeps):
        k1 = unicycle_derivatives(state, torques, **plant)
        k2 = unicycle_derivatives(state + h / 2 * k1, torques, **plant)
        k3 = unicycle_derivatives(state + h / 2 * k2, torques, **plant)
        k4 = unicycle_derivatives(state + h * k3, torques, **plant)
        state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return state


def body_view(state: np.ndarray) -> np.ndarray:
    """Compute what the robot perceives of a state: where it is, seen from its contact point.

    (xc, yc) = -R(φ) (x, y) with R = [[cos φ, sin φ], [-sin φ, cos φ]]: where the origin is, as seen
    from the robot. The angles of wheel and turntable are left out, since nothing depends on
    them. As in PILCO, augment_unicycle.m.

    Args:
        state: [..., 12], see the module.

    Returns:
        [..., 10] rates of roll, yaw, wheel, pitch and turntable (rad/s); origin ahead and to the
        left (m); roll, yaw and pitch (rad).
    """
    state = np.asarray(state, dtype=np.float64)
    x, y, yaw = state[..., _X], state[..., _Y], state[..., _YAW]
    sin, cos = np.sin(yaw), np.cos(yaw)
    view = np.empty((*state.shape[:-1], 10))
    view[..., :5] = state[..., :5]
    view[..., 5], view[..., 6] = -(cos * x + sin * y), sin * x - cos * y
    view[..., 7], view[..., 8], view[..., 9] = state[..., _ROLL], yaw, state[..., _PITCH]
    return view


class UnicycleEnv(gym.Env[np.ndarray, np.ndarray]):
    """Balance a robotic unicycle near the origin, with noisy observations; reward = -cost.

    The task of Deisenroth et al. 2015 and, as `totalprop/Unicycle-v0`, of Parmas et al. 2018, Sec.
    4.2: 20 steps at 10 Hz. `totalprop/UnicyclePILCO-v0` is that of PILCO's reference code: 67 steps
    of 0.15 s. Without control the robot falls within 6 to 15 steps of 0.1 s.

    An episode terminates when the robot has fallen: |roll| or |pitch| > pi/2 after a step. A robot
    on its side rolls around the rim of its wheel, ever faster towards |roll| = pi/2; it has fallen,
    too, where roll, yaw, wheel or pitch would turn by more than 100 rad/s, and its state is the
    last one before. The reward of a step is -cost(true next state), and that of a fall counts
    `fall_cost` for each step that is left, too, so that the undiscounted return lies in [-20, 0],
    and an early fall never pays. Differs from PILCO: its reference code drops the step on which the
    robot falls, and counts nothing for those that are left.

    The papers do not state the noise of Parmas et al. 2018 ("set to a low value"), nor from which
    return on a run counts as a success; so there is no reward threshold.

    Observation, [10] float32: `body_view` of the state plus Gaussian noise. The cost is of the
    state without it. Action, [2] float32: torques of turntable and wheel, as fractions of 10 and 50
    Nm, clipped to [-1, 1]. Positive torques turn the turntable left and the wheel forwards, and the
    frame the other way.

    info: "state", a copy of the true state [12]; "cost", of that state alone, without `fall_cost`.

    The generator `np_random` draws everything random, so the seed of `reset` determines everything.

    Args:
        reference_inertia: True: the plant of PILCO's reference code, in which the frame has the
            wheel's moment of inertia about the axle; False: its own, see `unicycle_derivatives`.
        control_step: time in s for which an action is held; 0.1 in PIPPS, 0.15 in PILCO.
        episode_steps: steps of an episode, which `fall_cost` is counted up to; the time limit of
            the registered ids is theirs, and has to be changed with it.
        fall_cost: cost >= 0 of each step that a fall leaves out. The cost of a robot on the floor
            is near 1; 0: none, as in the reference code.
        noise: multiplier k >= 0 of the VARIANCE of the observation noise: std = sqrt(k) * 0.01
            rad/s for rates and 0.003 m or rad for positions and angles. It is added to x, y and yaw
            before the origin is seen from the robot.
        initial_scale: factor >= 0 on the standard deviations of the true initial state, whose mean
            is 0: 0.02 for rates (rad/s) and angles (rad), and 0.1 m for x and y.
        render_mode: None or "rgb_array".

    Attributes:
        invariant_dims: entries of an observation that no change depends on: the yaw.
        integrated_dims: pairs (position, velocity) of an observation's entries: roll, yaw, pitch.
        time_step: s between two observations, `control_step`.

    Raises:
        ValueError: an argument is out of range.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_names = (  # for figures
        "roll [rad/s]", "yaw [rad/s]", "wheel [rad/s]", "pitch [rad/s]", "turntable [rad/s]",
        "origin ahead [m]", "origin left [m]", "roll [rad]", "yaw [rad]", "pitch [rad]",
    )  # fmt: skip
    invariant_dims, integrated_dims = (8,), ((7, 0), (8, 1), (9, 3))

    def __init__(
        self,
        *,
        reference_inertia: bool = True,
        control_step: float = 0.1,
        episode_steps: int = 20,
        fall_cost: float = 1.0,
        noise: float = 1.0,
        initial_scale: float = 1.0,
        render_mode: Literal["rgb_array"] | None = None,
    ) -> None:
        check_choice("reference_inertia", reference_inertia, (False, True))
        check_choice("render_mode", render_mode, (None, "rgb_array"))
        self.reference_inertia, self.render_mode = reference_inertia, render_mode
        self.control_step = self.time_step = check_number(
            "control_step", control_step, "a time > 0 in seconds, e.g. 0.1", positive=True
        )
        if type(episode_steps) is not int or episode_steps < 1:
            raise ValueError(
                f"episode_steps={episode_steps!r} is out of range: pass a number >= 1, e.g. 20."
            )
        self.episode_steps = episode_steps
        self.fall_cost = check_number(
            "fall_cost", fall_cost, "the cost >= 0 of a step that a fall leaves out, e.g. 1.0"
        )
        self.noise = check_number("noise", noise, "the variance multiplier k >= 0, e.g. 1.0")
        self.noise_std = math.sqrt(self.noise) * np.array(BASE_NOISE_STD)
        self.initial_scale = check_number("initial_scale", initial_scale, "a factor >= 0, e.g. 1.0")
        self.metadata = {**self.metadata, "render_fps": max(1, round(1 / self.control_step))}

        self.action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        # The state is unbounded, but Gymnasium's checker warns about infinite bounds.
        largest = float(np.finfo(np.float32).max)
        self.observation_space = gym.spaces.Box(-largest, largest, (10,), np.float32)
        self._state: np.ndarray | None = None
        self._torques = np.zeros(2)
        self._path = np.zeros((1, 2))
        self._steps, self._fallen = 0, False

    @property
    def initial_distribution(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean [10] and standard deviation [10] of `body_view` of the TRUE initial state, float64.

        It is exactly Gaussian with independent coordinates, without observation noise: x and y vary
        alike, so they do from whatever direction they are seen. PILCO's reference code samples 1000
        starts to estimate it. Model-based agents look up this attribute by name, to sample the
        particles they start from.
        """
        std = self.initial_scale * np.array(INITIAL_STD)
        return np.zeros(10), np.delete(std, (9, 11))

    def cost(self, view: Any) -> Any:
        """Compute the cost in [0, 1) of a `body_view`, 1 - exp(-½ δ²); differentiable in torch.

            δ² = 8 dz² + ½ dx² + ½ dy² + (φ / 4π)²
            dz = rw (cos θ - 1) + r/2 (cos(θ + ψ) - 1) + r/2 (cos(ψ - θ) - 1)
            dx = xc - r sin ψ,   dy = yc - (r + rw) sin θ
        of roll θ, yaw φ and pitch ψ: how far the turntable is from where it is when the robot
        stands upright at the origin. PILCO's reference code, loss_unicycle.m, with its rw = 0.22 m
        (the plant has 0.225 m) and r = 0.81 m. Its loss.tex has no factors 8 and ½.

        Args:
            view: [..., 10] true state as `body_view` gives it, a numpy array or a torch tensor.

        Returns:
            [...] of the same library.
        """
        xp = library_of(view)
        ahead, left, roll = view[..., 5], view[..., 6], view[..., 7]
        yaw, pitch = view[..., 8], view[..., 9]
        rw, r = COST_WHEEL_RADIUS, TURNTABLE_HEIGHT
        dz = rw * (xp.cos(roll) - 1) + r / 2 * (xp.cos(roll + pitch) + xp.cos(pitch - roll) - 2)
        dx, dy = ahead - r * xp.sin(pitch), left - (r + rw) * xp.sin(roll)
        delta_squared = 8 * dz**2 + dx**2 / 2 + dy**2 / 2 + (yaw / (4 * math.pi)) ** 2
        return 1 - xp.exp(-0.5 * delta_squared)

    @property
    def saturating_cost(self) -> dict[str, np.ndarray]:
        """The same cost as a quadratic form, 1 - exp(-½ (z - t)ᵀ W (z - t)).

        z = (view, sin a, cos a) with the angles a = A view: roll, pitch + roll, roll - pitch and
        pitch. Agents that integrate the cost over a Gaussian view look up this attribute by name.

        Returns:
            "target" t [18], "weights" W [18, 18] and "angles" A [4, 10].
        """
        angles = np.zeros((4, 10))
        angles[:3, 7] = 1  # roll
        angles[1:, 9] = 1, -1, 1  # pitch
        sines, cosines = 10, 14
        rw, r = COST_WHEEL_RADIUS, TURNTABLE_HEIGHT
        rows = np.zeros((4, 18))  # of the root of W
        rows[0, cosines : cosines + 3] = math.sqrt(8) * np.array([rw, r / 2, r / 2])
        rows[1, 5], rows[1, sines + 3] = math.sqrt(0.5), -math.sqrt(0.5) * r
        rows[2, 6], rows[2, sines] = math.sqrt(0.5), -math.sqrt(0.5) * (r + rw)
        rows[3, 8] = 1 / (4 * math.pi)
        target = np.zeros(18)
        target[cosines:] = 1
        return {"target": target, "weights": rows.T @ rows, "angles": angles}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode.

        Args:
            seed: seed of `np_random`; None continues the current generator.
            options: may hold "state", the exact true state [12] to start from.

        Returns:
            Noisy observation, [10] float32, and info (see the class).

        Raises:
            ValueError: "state" is not 12 finite numbers, or of a robot that has fallen.
        """
        super().reset(seed=seed)
        if options is not None and "state" in options:
            state = np.array(options["state"], dtype=np.float64)
            if state.shape != (12,) or not np.isfinite(state).all() or _has_fallen(state):
                raise ValueError(
                    f"options['state']={options['state']!r} is not a start state: pass 12 finite "
                    "numbers [5 rates, x, y, roll, yaw, wheel, pitch, turntable], with roll and "
                    "pitch within (-pi/2, pi/2)."
                )
        else:
            std = self.initial_scale * np.array(INITIAL_STD)
            state = std * self.np_random.standard_normal(12)
        self._state, self._torques, self._steps = state, np.zeros(2), 0
        self._fallen = False
        self._path = state[None, [_X, _Y]]
        return self._observe(state), self._info(state)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Apply torques for `control_step` seconds; a robot that has fallen stays where it is.

        Args:
            action: [2] torques of turntable and wheel as fractions of 10 and 50 Nm, clipped to
                [-1, 1].

        Returns:
            Noisy observation, [10] float32; reward (see the class); terminated, whether the robot
            has fallen; truncated, False (the registered TimeLimit sets it); and info.

        Raises:
            ValueError: the action is not two finite numbers.
        """
        fractions = np.asarray(action, dtype=np.float64)
        if fractions.shape != (2,) or not np.isfinite(fractions).all():
            raise ValueError(
                f"action={action!r} is not two finite numbers: pass [turntable, wheel], each "
                "between -1 and 1."
            )
        state = self._started()
        torques = np.clip(fractions, -1, 1) * (TURNTABLE_TORQUE, WHEEL_TORQUE)
        had_fallen = self._fallen
        if not had_fallen:
            state, self._fallen = self._move(state, torques)
        self._state, self._torques, self._steps = state, torques, self._steps + 1
        self._path = np.concatenate((self._path, state[None, [_X, _Y]]))[-1000:]
        info = self._info(state)
        cost = info["cost"]
        if self._fallen and not had_fallen:
            cost += self.fall_cost * max(self.episode_steps - self._steps, 0)
        return self._observe(state), -cost, self._fallen, False, info

    def render(self) -> np.ndarray | None:
        """Render the true state as [320, 480, 3] uint8; returns None without a render mode."""
        if self.render_mode is None:
            gym.logger.warn('render() returns None: make the env with render_mode="rgb_array".')
            return None
        state = self._started()
        table, wheel = self._torques
        return draw(
            state,
            path=self._path,
            torques=(table / TURNTABLE_TORQUE, wheel / WHEEL_TORQUE),
            captions=(
                f"step {self._steps}   {self._steps * self.control_step:.1f} s",
                f"wheel {wheel:+.0f} Nm   turntable {table:+.1f} Nm",
                f"cost {self._cost(state):.3f}",
            ),
        )

    def get_state(self) -> dict[str, Any]:
        """The state of the episode, see `envs.rewind.HasState`."""
        return {
            "state": self._state,
            "torques": self._torques,
            "path": self._path,
            "steps": self._steps,
            "fallen": self._fallen,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore a state that `get_state` returned."""
        self._state, self._torques = state["state"], state["torques"]
        self._path, self._steps = state["path"], state["steps"]
        self._fallen = state["fallen"]

    def _move(self, state: np.ndarray, torques: np.ndarray) -> tuple[np.ndarray, bool]:
        """The state after a control step, and whether the robot has fallen.

        The whole step, although it may have fallen on the way: a model that learns from steps is to
        see steps of one length.
        """
        substeps = _substeps(self.control_step)
        for _ in range(substeps):
            with np.errstate(all="ignore"):  # what overflows is not below the limit
                state_next = integrate(
                    state,
                    torques,
                    duration=self.control_step / substeps,
                    substeps=1,
                    reference_inertia=self.reference_inertia,
                )
            if not (np.abs(state_next[:4]) < RATE_LIMIT).all():
                return state, True
            state = state_next
        return state, _has_fallen(state)

    def _started(self) -> np.ndarray:
        if self._state is None:
            raise gym.error.ResetNeeded("No episode has started: call reset() first.")
        return self._state

    def _observe(self, state: np.ndarray) -> np.ndarray:
        noise = self.noise_std * self.np_random.standard_normal(12)
        return body_view(state + noise).astype(np.float32)

    def _cost(self, state: np.ndarray) -> float:
        return float(self.cost(body_view(state)))

    def _info(self, state: np.ndarray) -> dict[str, Any]:
        return {"state": state.copy(), "cost": self._cost(state)}


def _has_fallen(state: np.ndarray) -> bool:
    return bool(abs(state[_ROLL]) > math.pi / 2 or abs(state[_PITCH]) > math.pi / 2)


def _substeps(duration: float) -> int:
    return max(1, math.ceil(duration / SUBSTEP - 1e-9))


def _cross(a: _Vector, b: _Vector) -> _Vector:
    # np.cross is slower than all the rest together.
    return (a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0])


def _gyroscopic(turning: _Vector, inertia: tuple[float, ...], spin: _Vector) -> _Vector:
    """What turning axes do to the angular momentum I ω of a body that is diagonal along them."""
    return _cross(turning, tuple(i * w for i, w in zip(inertia, spin, strict=True)))
