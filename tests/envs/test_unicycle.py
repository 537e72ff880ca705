"""The unicycle, against closed forms, Kane's equations in the lab frame, and golden numbers.

Golden accelerations: PILCO's reference code dynamics_unicycle.m, and the same with the frame's own
moment of inertia about the wheel's axle.
"""

import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from totalprop import envs
from totalprop.envs.rewind import can_rewind, restore, snapshot
from totalprop.envs.unicycle import UnicycleEnv, body_view, integrate, unicycle_derivatives

ENV_ID = "totalprop/Unicycle-v0"
MW, MF, MT, RW, RF, R = 1.0, 23.5, 10.0, 0.225, 0.54, 0.81
CW, AW, AF, BF, CF, CT, AT, G = 0.0484, 0.0242, 0.4248, 0.4608, 0.8292, 0.2, 1.3, 9.82
GOLDEN_STATE = [0.1, 0.2, 0.3, 0.4, 0.5, 0, 0, 0.05, 0.1, 0, 0.07, 0]
GOLDEN = {
    True: [0.52172685, -2.17106812, -5.74797568, 2.55797862, 7.24602322],
    False: [0.52172685, -2.17106812, -4.17356056, 1.95235541, 7.24602322],
}
BOTH = pytest.mark.parametrize("reference", [True, False])
STEADY = np.zeros(2, dtype=np.float32)


def named(**entries):
    """A state at rest at the origin, but for these entries."""
    names = ["d_roll", "d_yaw", "d_wheel", "d_pitch", "d_table", "x", "y"]
    names += ["roll", "yaw", "wheel", "pitch", "table"]
    state = np.zeros(12)
    for name, value in entries.items():
        state[names.index(name)] = value
    return state


def random_states(count, seed=0):
    scale = np.array([2, 2, 6, 2, 6, 1, 1, 0.8, 3, 3, 0.8, 3])
    return np.random.default_rng(seed).uniform(-scale, scale, (count, 12))


def random_torques(count, seed=1):
    return np.random.default_rng(seed).uniform(-1, 1, (count, 2)) * [10, 50]


# Kane's equations with vectors in the lab frame: an independent reference


def axes(roll, yaw, pitch):
    """Of the wheel: e1 (ahead), e2 (axle), e3 (up); of the frame: d (long), p (ahead)."""
    zero = torch.zeros_like(roll)
    s, c, sy, cy = roll.sin(), roll.cos(), yaw.sin(), yaw.cos()
    e1 = torch.stack((cy, sy, zero))
    e2 = torch.stack((-sy * c, cy * c, -s))
    e3 = torch.stack((-sy * s, cy * s, c))
    d = pitch.sin() * e1 + pitch.cos() * e3
    return e1, e2, e3, d, pitch.cos() * e1 - pitch.sin() * e3


def velocities(angles, u):
    """[6, 3] velocities of the centres of wheel, frame, turntable; their angular velocities."""
    e1, e2, e3, d, _ = axes(*angles)
    turn = u[1] * torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64) - u[0] * e1
    wheel, frame = turn + u[2] * e2, turn + u[3] * e2
    centre = torch.linalg.cross(wheel, RW * e3)
    others = [centre + torch.linalg.cross(frame, height * d) for height in (RF, R)]
    return torch.stack((centre, *others, wheel, frame, frame + u[4] * d))


def inertias(angles, frame_axle):
    """[3, 3, 3] moments of inertia of wheel, frame and turntable."""
    e1, e2, e3, d, p = axes(*angles)
    wheel = AW * (torch.outer(e1, e1) + torch.outer(e3, e3)) + CW * torch.outer(e2, e2)
    frame = AF * torch.outer(d, d) + BF * torch.outer(p, p) + frame_axle * torch.outer(e2, e2)
    table = CT * torch.outer(d, d) + AT * (torch.outer(p, p) + torch.outer(e2, e2))
    return torch.stack((wheel, frame, table))


def kane(state, torques, reference):
    """The five accelerations, from Jacobians of the velocities by automatic differentiation."""
    state = torch.tensor(state)
    u, angles = state[:5], state[[7, 8, 10]]
    jacobian = torch.func.jacrev(velocities, argnums=1)(angles, u)  # [6, 3, 5]
    rates = u[[0, 1, 3]]
    _, change = torch.func.jvp(lambda q: velocities(q, u), (angles,), (rates,))
    spins = velocities(angles, u)[3:]
    heavy = inertias(angles, CF)
    accelerated = inertias(angles, CW) if reference else heavy
    up = torch.tensor([0.0, 0.0, G], dtype=torch.float64)
    mass, force = torch.zeros(5, 5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    for body, m in enumerate((MW, MF, MT)):
        jv, jw = jacobian[body], jacobian[3 + body]
        mass += m * jv.T @ jv + jw.T @ accelerated[body] @ jw
        gyro = torch.linalg.cross(spins[body], heavy[body] @ spins[body])
        force -= jv.T @ (m * (change[body] + up))
        force -= jw.T @ (accelerated[body] @ change[3 + body] + gyro)
    force += torch.tensor([0, 0, torques[1], -torques[1], torques[0]], dtype=torch.float64)
    return torch.linalg.solve(mass, force).numpy()


def energy(state, reference):
    state = torch.tensor(state)
    u, angles = state[:5], state[[7, 8, 10]]
    moving = velocities(angles, u)
    e3, d = axes(*angles)[2:4]
    moments = inertias(angles, CW if reference else CF)
    heights = RW * e3[2] + torch.tensor([0.0, RF, R], dtype=torch.float64) * d[2]
    masses = torch.tensor([MW, MF, MT], dtype=torch.float64)
    kinetic = (masses * moving[:3].square().sum(-1)).sum()
    kinetic += torch.einsum("bi,bij,bj->", moving[3:], moments, moving[3:])
    return float(kinetic / 2 + G * (masses * heights).sum())


@BOTH
def test_golden_accelerations(reference):
    derivative = unicycle_derivatives(
        np.array(GOLDEN_STATE), np.array([1.0, 2.0]), reference_inertia=reference
    )
    np.testing.assert_allclose(derivative[:5], GOLDEN[reference], rtol=0, atol=1e-8)


@BOTH
def test_accelerations_equal_kanes_equations_in_the_lab_frame(reference):
    states, torques = random_states(30), random_torques(30)
    found = unicycle_derivatives(states, torques, reference_inertia=reference)[:, :5]
    expected = [kane(z, t, reference) for z, t in zip(states, torques, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-8)


@BOTH
def test_energy_is_conserved_without_torques_with_its_own_inertia(reference):
    states = random_states(5, seed=2)
    states[:, [7, 10]] *= 0.3  # none falls within 0.3 s
    ends = integrate(states, np.zeros(2), duration=0.3, substeps=100, reference_inertia=reference)
    assert np.abs(ends[:, [7, 10]]).max() < 1.5

    def change(with_reference):
        return [
            energy(end, with_reference) - energy(start, with_reference)
            for start, end in zip(states, ends, strict=True)
        ]

    assert np.abs(change(reference)).max() < 1e-4  # of about 300 J
    assert np.abs(change(not reference)).max() > 1e-2  # the other inertia's is not


def test_torques_do_work_on_what_they_turn():
    # dE/dt = U (wheel - pitch) + V turntable, by a central difference along the flow.
    state, (table, wheel), h = random_states(1)[0], (3.0, -20.0), 1e-5
    derivative = unicycle_derivatives(state, np.array([table, wheel]))
    slope = (energy(state + h * derivative, True) - energy(state - h * derivative, True)) / (2 * h)
    assert slope == pytest.approx(wheel * (state[2] - state[3]) + table * state[4], rel=1e-6)


@BOTH
def test_planar_motion_is_that_of_a_wheeled_pendulum(reference):
    # a ẅ + b cos ψ ψ̈ - b sin ψ ψ̇² = U;  b cos ψ ẅ + c ψ̈ - g h sin ψ = -U
    moment = MF * RF + MT * R
    a, b = CW + (MW + MF + MT) * RW**2, RW * moment
    c = (CW if reference else CF) + AT + MF * RF**2 + MT * R**2
    for pitch, rate, torque in [(0.3, 0.0, 0.0), (-0.7, 2.0, 30.0), (0.0, -1.0, -50.0)]:
        left = np.array([[a, b * math.cos(pitch)], [b * math.cos(pitch), c]])
        right = [torque + b * math.sin(pitch) * rate**2, G * moment * math.sin(pitch) - torque]
        expected = np.linalg.solve(left, right)
        state = named(pitch=pitch, d_pitch=rate, d_wheel=1.5, yaw=0.4)
        found = unicycle_derivatives(state, np.array([0, torque]), reference_inertia=reference)
        np.testing.assert_allclose(found[[2, 3]], expected, rtol=1e-10)
        np.testing.assert_allclose(found[[0, 1, 4]], 0, atol=1e-12)


def test_turntable_turns_the_robot_the_other_way():
    # Upright: (Aw + Af) φ̈ = -V, Ct (φ̈ + ψ̈t) = V.
    found = unicycle_derivatives(named(), np.array([4.0, 0.0]))
    yaw = -4.0 / (AW + AF)
    np.testing.assert_allclose(found[:5], [0, yaw, 0, 0, 4.0 / CT - yaw], atol=1e-12)


def test_sideways_the_robot_falls_as_a_rigid_body_about_the_contact_point():
    inertia = AW + BF + AT + MW * RW**2 + MF * (RW + RF) ** 2 + MT * (RW + R) ** 2
    moment = MW * RW + MF * (RW + RF) + MT * (RW + R)
    for roll in (0.2, -0.9):
        found = unicycle_derivatives(named(roll=roll), np.zeros(2))
        # Not about a fixed point: the centres move on circles about the contact point.
        np.testing.assert_allclose(found[0], G * moment * math.sin(roll) / inertia, rtol=1e-10)
        np.testing.assert_allclose(found[1:5], 0, atol=1e-12)


def test_upright_at_rest_nothing_moves():
    np.testing.assert_allclose(unicycle_derivatives(named(), np.zeros(2)), 0, atol=1e-12)


def test_wheel_rolls_without_slip():
    # The wheel's point on the floor is at rest, so its centre moves by ω × rw e3; compared with a
    # central difference of the centre, contact + rw e3, along the flow.
    h = 1e-6
    for state in random_states(10, seed=3):
        derivative = unicycle_derivatives(state, np.zeros(2))

        def centre(z):
            return np.array([*z[5:7], 0.0]) + RW * axes(*torch.tensor(z)[[7, 8, 10]])[2].numpy()

        moved = (centre(state + h * derivative) - centre(state - h * derivative)) / (2 * h)
        rolling = velocities(torch.tensor(state)[[7, 8, 10]], torch.tensor(state)[:5])[0]
        np.testing.assert_allclose(moved, rolling.numpy(), atol=1e-8)
        assert math.hypot(*derivative[5:7]) == pytest.approx(RW * abs(state[2]), rel=1e-12)
        np.testing.assert_array_equal(derivative[7:], state[:5])


def test_mirrored_robots_move_as_mirrored():
    mirror = np.array([-1, -1, 1, 1, -1, 1, -1, -1, -1, 1, 1, -1])
    states, torques = random_states(20), random_torques(20)
    found = unicycle_derivatives(states * mirror, torques * [-1, 1])
    np.testing.assert_allclose(found, unicycle_derivatives(states, torques) * mirror, atol=1e-9)


def test_nothing_but_the_path_depends_on_place_yaw_and_the_angles_of_the_discs():
    states, torques = random_states(20), random_torques(20)
    others = states.copy()
    others[:, [5, 6, 8, 9, 11]] = np.random.default_rng(5).normal(size=(20, 5))
    found = unicycle_derivatives(others, torques)
    kept = [0, 1, 2, 3, 4, 7, 8, 9, 10, 11]
    np.testing.assert_allclose(
        found[:, kept], unicycle_derivatives(states, torques)[:, kept], atol=1e-9
    )


def test_rk4_is_as_precise_as_it_says():
    # N = 200 states; the reference has 16 times as many substeps.
    states, torques = random_states(200), random_torques(200)
    exact = integrate(states, torques, duration=0.1, substeps=160)
    error = np.abs(integrate(states, torques, duration=0.1) - exact).max(1)
    assert error.max() < 1.2e-4 and np.median(error) < 2e-6
    # Fourth order: half the step, a sixteenth of the error.
    finer = np.abs(integrate(states, torques, duration=0.1, substeps=20) - exact).max(1)
    assert 12 < np.median(error / finer) < 20


def test_plant_is_batched_over_leading_axes():
    states, torques = random_states(6).reshape(2, 3, 12), random_torques(3)
    batched = integrate(states, torques, duration=0.1)
    for i in range(2):
        for j in range(3):
            one = integrate(states[i, j], torques[j], duration=0.1)
            np.testing.assert_allclose(batched[i, j], one, atol=1e-11)
    assert unicycle_derivatives(states[0, 0], torques).shape == (3, 12)


@BOTH
def test_env_step_holds_the_torques_for_a_control_step(reference):
    for seconds in (0.1, 0.15, 0.004):
        env = UnicycleEnv(reference_inertia=reference, control_step=seconds)
        state = named(roll=0.05, d_table=1.0, x=0.2)
        env.reset(seed=0, options={"state": state})
        *_, info = env.step(np.array([0.5, -0.2], dtype=np.float64))
        expected = integrate(
            state, np.array([5.0, -10.0]), duration=seconds, reference_inertia=reference
        )
        np.testing.assert_allclose(info["state"], expected, rtol=0, atol=1e-12)


# What an agent sees


def test_the_origin_is_seen_from_the_robot():
    # At (1, 2) the origin lies behind and to the right of a robot that faces x; turned left by 90
    # degrees it faces y, with the origin behind by 2 and to the left by 1.
    for yaw, expected in [(0.0, (-1, -2)), (math.pi / 2, (-2, 1)), (math.pi, (1, 2))]:
        view = body_view(named(x=1.0, y=2.0, yaw=yaw))
        np.testing.assert_allclose(view[5:7], expected, atol=1e-12)
    state = random_states(1)[0]
    np.testing.assert_array_equal(body_view(state)[:5], state[:5])
    np.testing.assert_array_equal(body_view(state)[7:], state[[7, 8, 10]])


def test_a_rotated_world_looks_the_same_but_for_the_yaw():
    env = UnicycleEnv(noise=0.0)
    start, turn = random_states(1, seed=4)[0] * 0.5, 1.1
    rotated = start.copy()
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    rotated[5:7], rotated[8] = rotation @ start[5:7], start[8] + turn
    changes = []
    for state in (start, rotated):
        env.reset(seed=0, options={"state": state})
        *_, info = env.step(np.array([0.3, 0.4]))
        changes.append(body_view(info["state"]) - body_view(state))
    np.testing.assert_allclose(*changes, atol=1e-10)
    assert env.invariant_dims == (8,)
    assert env.observation_names[8] == "yaw [rad]"
    assert len(env.observation_names) == 10


def test_noise_multiplies_the_variance_and_is_white():
    # N = 4000 resets at the origin, seed 0, k = 4, so std = 2 x base. SE(mean) = std/sqrt(N),
    # SE(std) = std/sqrt(2N), SE(correlation) = 1/sqrt(N); every tolerance is 4 SE.
    count, env = 4000, UnicycleEnv(noise=4.0)
    env.reset(seed=0)
    start = {"state": named(yaw=0.7)}
    sample = np.array([env.reset(options=start)[0] for _ in range(count)]) - body_view(
        named(yaw=0.7)
    )
    std = 2 * np.array([0.01] * 5 + [0.003] * 5)
    assert (np.abs(sample.mean(0)) < 4 * std / math.sqrt(count)).all()
    assert (np.abs(sample.std(0) / std - 1) < 4 / math.sqrt(2 * count)).all()
    z = sample / std
    across = z.T @ z / count
    assert np.abs(across - np.diag(np.diag(across))).max() < 4 / math.sqrt(count)
    assert np.abs((z[1:] * z[:-1]).mean(0)).max() < 4 / math.sqrt(count)


def test_noise_of_the_yaw_moves_the_distant_origin():
    # 100 m ahead, 0.003 rad are 0.3 m to the side. N = 2000, seed 0, 4 SE.
    env, count = UnicycleEnv(), 2000
    env.reset(seed=0)
    start = {"state": named(x=-100.0)}
    sample = np.array([env.reset(options=start)[0][6] for _ in range(count)])
    assert sample.std() == pytest.approx(0.3, rel=4 / math.sqrt(2 * count))


def test_initial_views_follow_initial_distribution():
    # N = 5000, seed 1; 4 SE as above. Views are Gaussian: so is the fourth moment, SE sqrt(96/N).
    count, env = 5000, UnicycleEnv(initial_scale=3.0)
    mean, std = env.initial_distribution
    assert mean.dtype == std.dtype == np.float64
    np.testing.assert_array_equal(mean, np.zeros(10))
    np.testing.assert_allclose(std, 3 * np.array([0.02] * 5 + [0.1] * 2 + [0.02] * 3))
    env.reset(seed=1)
    z = np.array([body_view(env.reset()[1]["state"]) for _ in range(count)]) / std
    assert np.abs(z.mean(0)).max() < 4 / math.sqrt(count)
    assert np.abs(z.std(0) - 1).max() < 4 / math.sqrt(2 * count)
    assert np.abs(np.corrcoef(z.T) - np.eye(10)).max() < 4 / math.sqrt(count)
    assert np.abs((z**4).mean(0) - 3).max() < 4 * math.sqrt(96 / count)


# The cost


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        ({7: 0.3, 9: 0.2}, 0.04374478),
        ({5: 0.5, 6: -0.2, 7: 0.1, 8: 0.4, 9: -0.1}, 0.1024805),
        ({7: 1.5}, 0.9803243),
        ({}, 0.0),
    ],
)
def test_cost_values(view, expected):
    state = np.zeros(10)
    state[list(view)] = list(view.values())
    assert UnicycleEnv().cost(state) == pytest.approx(expected, abs=1e-7)
    state[:5] = 3.0  # rates cost nothing
    assert UnicycleEnv().cost(state) == pytest.approx(expected, abs=1e-7)


def test_cost_is_that_of_pilcos_quadratic_form():
    # 1 - exp(-½ (z - t)ᵀ W (z - t)) of the state and the sines and cosines that loss_unicycle.m
    # appends: those of roll, pitch - roll, pitch + roll and pitch.
    views = body_view(random_states(50))
    roll, yaw, pitch = views[:, 7], views[:, 8], views[:, 9]
    z = np.stack(
        [views[:, 5], views[:, 6], yaw, np.cos(roll), np.cos(pitch - roll), np.cos(pitch + roll),
         np.sin(roll), np.sin(pitch)], axis=-1
    )  # fmt: skip
    target = np.array([0, 0, 0, 1, 1, 1, 0, 0])
    rw, r = 0.22, 0.81
    height = np.array([0, 0, 0, rw, r / 2, r / 2, 0, 0])
    ahead, left = np.eye(8)[0] - r * np.eye(8)[7], np.eye(8)[1] - (r + rw) * np.eye(8)[6]
    w = 8 * np.outer(height, height) + 0.5 * np.outer(ahead, ahead) + 0.5 * np.outer(left, left)
    w[2, 2] += 1 / (4 * math.pi) ** 2
    form = np.einsum("ni,ij,nj->n", z - target, w, z - target)
    np.testing.assert_allclose(UnicycleEnv().cost(views), 1 - np.exp(-form / 2), atol=1e-14)


def test_torch_and_numpy_costs_agree_and_torch_differentiates():
    env = UnicycleEnv()
    views = body_view(random_states(24)).reshape(2, 12, 10)
    tensor = torch.tensor(views)
    assert env.cost(views).shape == env.cost(tensor).shape == (2, 12)
    np.testing.assert_allclose(env.cost(tensor).numpy(), env.cost(views), rtol=0, atol=1e-14)
    near = torch.tensor(views[0] * 0.2, requires_grad=True)
    assert torch.autograd.gradcheck(env.cost, (near,))
    assert env.cost(tensor.float()).dtype == torch.float32


def test_reward_is_minus_the_cost_of_the_true_next_state():
    env = UnicycleEnv(noise=16.0)
    env.reset(seed=3)
    for _ in range(3):
        observation, reward, terminated, truncated, info = env.step(np.array([0.1, 0.1]))
        assert reward == -info["cost"] == -env.cost(body_view(info["state"]))
        assert reward != -env.cost(observation.astype(np.float64))
        assert (terminated, truncated) == (False, False)
        assert isinstance(reward, float)


# Falls


def fall(**kwargs):
    """Rewards, and the last step's info, of a robot that leans forwards and does nothing."""
    env = UnicycleEnv(**kwargs)
    env.reset(seed=0, options={"state": named(pitch=0.4)})
    rewards = []
    while True:
        _, reward, terminated, truncated, info = env.step(STEADY)
        rewards.append(reward)
        assert not truncated
        if terminated:
            return env, rewards, info


def test_a_turntable_may_turn_as_fast_as_it_likes():
    env = UnicycleEnv(noise=0.0)
    env.reset(seed=0, options={"state": named(d_table=200.0)})
    assert not env.step(np.zeros(2))[2]


def test_a_fall_terminates_and_costs_each_step_that_is_left():
    env, rewards, info = fall()
    steps = len(rewards)
    assert 3 < steps < 10
    # The whole step in which it falls, as PILCO's reference code simulates it.
    state = named(pitch=0.4)
    for _ in range(steps):
        assert abs(state[10]) <= math.pi / 2
        state = integrate(state, np.zeros(2), duration=0.1)
    assert state[10] > math.pi / 2
    np.testing.assert_allclose(info["state"], state, atol=1e-12)
    assert rewards[-1] == pytest.approx(-info["cost"] - (20 - steps), abs=1e-12)
    assert -20 < sum(rewards) < -(20 - steps)
    # It stays where it fell, and is charged for the steps left only once.
    _, reward, terminated, _, later = env.step(np.ones(2))
    assert terminated
    assert reward == -info["cost"]
    np.testing.assert_array_equal(later["state"], info["state"])
    env.reset(seed=0)
    assert not env.step(STEADY)[2]


@pytest.mark.parametrize(
    ("kwargs", "left"),
    [
        ({"fall_cost": 0.0}, lambda steps: 0),
        ({"fall_cost": 2.0}, lambda steps: 2 * (20 - steps)),
        ({"episode_steps": 67}, lambda steps: 67 - steps),
        ({"episode_steps": 2}, lambda steps: 0),
    ],
)
def test_fall_cost_is_what_the_user_says(kwargs, left):
    _, rewards, info = fall(**kwargs)
    assert rewards[-1] == pytest.approx(-info["cost"] - left(len(rewards)), abs=1e-12)
    assert rewards[:-1] == fall()[1][:-1]


def test_falling_to_the_side_terminates_with_states_that_are_finite():
    # Near roll = ±pi/2 a robot rolls around the rim of its wheel faster than can be integrated.
    env, generator = UnicycleEnv(), np.random.default_rng(0)
    env.reset(seed=0)
    at_limit = 0
    for _ in range(60):
        sign = generator.choice([-1, 1])
        start = named(roll=sign * generator.uniform(1.2, 1.5), d_yaw=generator.normal(0, 2))
        env.reset(options={"state": start})
        for _ in range(20):
            observation, reward, terminated, _, info = env.step(generator.uniform(-1, 1, 2))
            assert np.isfinite(observation).all() and -20 <= reward <= 0
            assert np.abs(info["state"][:4]).max() < 100
            if terminated:
                break
        assert terminated
        at_limit += int(np.abs(info["state"][[7, 10]]).max() < math.pi / 2)
    assert at_limit > 3


def test_without_control_it_falls_within_the_episode():
    env = gym.make(ENV_ID)
    env.reset(seed=0)
    lengths = []
    for _ in range(30):
        env.reset()
        lengths.append(next(i for i in range(1, 21) if env.step(STEADY)[2]))
    assert min(lengths) >= 5
    assert max(lengths) <= 16


def test_a_linear_controller_balances_forwards_and_backwards():
    # An LQR of the planar motion at rest, linearised by differences; sideways nothing moves.
    kept, h = [2, 3, 5, 9], 1e-5

    def after(change, torque):
        d_wheel, d_pitch, ahead, pitch = change
        state = named(d_wheel=d_wheel, d_pitch=d_pitch, x=-ahead, pitch=pitch)
        return body_view(integrate(state, np.array([0, 50 * torque]), duration=0.1))[kept]

    a = [(after(h * e, 0) - after(-h * e, 0)) / (2 * h) for e in np.eye(4)]
    a, b = np.stack(a, 1), ((after(np.zeros(4), h) - after(np.zeros(4), -h)) / (2 * h))[:, None]
    p = np.eye(4)
    for _ in range(500):
        gain = np.linalg.solve(b.T @ p @ b + 10, b.T @ p @ a)
        p = a.T @ p @ (a - b @ gain) + np.diag([0.1, 1, 1, 10])
    env = UnicycleEnv()
    observation, _ = env.reset(seed=0, options={"state": named(pitch=0.1)})
    for _ in range(100):
        action = np.array([0.0, -(gain @ observation[kept]).item()])
        observation, _, terminated, _, info = env.step(action)
        assert not terminated
    assert info["cost"] < 0.01


# Seeds and snapshots


def rollout(env, actions, seed=None):
    """All numbers of an episode, as one flat array."""
    observation, info = env.reset(seed=seed)
    numbers = [*observation, *info["state"]]
    for action in actions:
        observation, reward, _, _, info = env.step(action)
        numbers += [*observation, reward, *info["state"], info["cost"]]
    return np.array(numbers)


def test_seed_fixes_everything_and_nothing_global_matters():
    actions = np.random.default_rng(0).uniform(-0.1, 0.1, (4, 2))
    first, second = UnicycleEnv(), UnicycleEnv()
    np.random.seed(0)
    one = np.concatenate([rollout(first, actions, seed=7), rollout(first, actions)])
    np.random.seed(1)
    global_state = np.random.get_state()[1].copy()
    two = np.concatenate([rollout(second, actions, seed=7), rollout(second, actions)])
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(global_state, np.random.get_state()[1])
    assert not np.array_equal(one[: one.size // 2], one[one.size // 2 :])
    assert (rollout(second, actions, seed=8)[:22] != one[:22]).all()


def test_a_restored_snapshot_continues_identically():
    env = gym.make(ENV_ID, render_mode="rgb_array")
    assert can_rewind(env)
    env.reset(seed=0)
    env.step(np.array([0.5, 0.2], dtype=np.float32))
    start = snapshot(env)

    def rest():
        observations = []
        while True:
            observation, reward, terminated, truncated, _ = env.step(np.array([-0.3, 0.1]))
            observations.append([*observation, reward, terminated, truncated])
            if terminated or truncated:
                return np.array(observations), env.render()

    once, picture_once = rest()
    restore(env, start)
    again, picture_again = rest()
    np.testing.assert_array_equal(once, again)
    np.testing.assert_array_equal(picture_once, picture_again)
    other = gym.make(ENV_ID, render_mode="rgb_array")  # not reset
    restore(other, start)
    np.testing.assert_array_equal(other.step(np.array([-0.3, 0.1]))[0], once[0, :10].astype("f4"))


# The Gymnasium contract


@pytest.mark.parametrize(
    ("id", "steps", "seconds"), [(ENV_ID, 20, 0.1), ("totalprop/UnicyclePILCO-v0", 67, 0.15)]
)
def test_registered_tasks(id, steps, seconds):
    env = gym.make(id)
    inner = env.unwrapped
    assert env.spec.max_episode_steps == inner.episode_steps == steps
    assert inner.control_step == seconds
    assert inner.metadata["render_fps"] == round(1 / seconds)
    assert UnicycleEnv.metadata == {"render_modes": ["rgb_array"], "render_fps": 10}
    env = gym.make(id, initial_scale=0.0)  # upright at rest
    env.reset(seed=0)
    ends = [env.step(STEADY)[2:4] for _ in range(steps)]
    assert ends == [(False, False)] * (steps - 1) + [(False, True)]


def test_defaults_are_those_of_the_task():
    env = UnicycleEnv()
    np.testing.assert_allclose(env.noise_std, [0.01] * 5 + [0.003] * 7)
    assert (env.reference_inertia, env.control_step, env.episode_steps) == (True, 0.1, 20)
    assert (env.fall_cost, env.initial_scale, env.render_mode) == (1.0, 1.0, None)
    assert env.action_space == gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
    assert env.observation_space.shape == (10,)


@pytest.mark.parametrize("kwargs", [{}, {"reference_inertia": False, "control_step": 0.15}])
def test_both_checkers_are_silent(kwargs):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gymnasium_check_env(gym.make(ENV_ID, render_mode="rgb_array", **kwargs).unwrapped)
        sb3_check_env(UnicycleEnv(render_mode="rgb_array", **kwargs), skip_render_check=False)
    assert [str(warning.message) for warning in caught] == []


def test_out_of_range_actions_are_clipped():
    env = UnicycleEnv()
    inside = rollout(env, [[1.0, -1.0]], seed=0)
    np.testing.assert_array_equal(inside, rollout(env, [[3.0, -50.0]], seed=0))


@pytest.mark.parametrize("action", [[np.nan, 0], [0, np.inf], [0.1], [], [[0.1, 0.2]]])
def test_bad_actions_are_refused_in_one_sentence(action):
    env = UnicycleEnv()
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"^action=.* is not two finite numbers: pass \[t.*\.$"):
        env.step(np.array(action))


def test_reset_starts_from_an_exact_state_and_copies_it():
    env = UnicycleEnv(noise=0.0)
    start = random_states(1)[0] * 0.1
    observation, info = env.reset(seed=0, options={"state": start})
    np.testing.assert_array_equal(observation, body_view(start).astype(np.float32))
    kept = start.copy()
    start[:] = 9.0
    info["state"][:] = 9.0
    *_, info = env.step(STEADY)
    np.testing.assert_allclose(
        info["state"], integrate(kept, np.zeros(2), duration=0.1), atol=1e-12
    )


@pytest.mark.parametrize(
    "state", [[0.0] * 10, [np.nan] * 12, [[0.0] * 12], named(roll=1.6), named(pitch=-1.6)]
)
def test_bad_start_states_are_refused(state):
    with pytest.raises(ValueError, match=r"is not a start state: pass 12 finite numbers"):
        UnicycleEnv().reset(seed=0, options={"state": state})


def test_step_before_reset_is_refused():
    with pytest.raises(gym.error.ResetNeeded, match=r"call reset\(\) first"):
        UnicycleEnv().step(STEADY)


NOISE, FACTOR = "pass the variance multiplier k >= 0, e.g. 1.0.", "pass a factor >= 0, e.g. 1.0."
TIME, STEPS = "pass a time > 0 in seconds, e.g. 0.1.", "pass a number >= 1, e.g. 20."
FALL = "pass the cost >= 0 of a step that a fall leaves out, e.g. 1.0."


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"reference_inertia": 1}, "reference_inertia=1 is unknown: pass False or True."),
        ({"render_mode": "human"}, "render_mode='human' is unknown: pass None or 'rgb_array'."),
        ({"noise": -1.0}, f"noise=-1.0 is out of range: {NOISE}"),
        ({"initial_scale": "wide"}, f"initial_scale='wide' is out of range: {FACTOR}"),
        ({"control_step": 0}, f"control_step=0 is out of range: {TIME}"),
        ({"control_step": math.inf}, f"control_step=inf is out of range: {TIME}"),
        ({"episode_steps": 0}, f"episode_steps=0 is out of range: {STEPS}"),
        ({"episode_steps": 20.0}, f"episode_steps=20.0 is out of range: {STEPS}"),
        ({"fall_cost": -0.5}, f"fall_cost=-0.5 is out of range: {FALL}"),
    ],
)
def test_constructor_errors_say_value_expectation_and_remedy(kwargs, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        UnicycleEnv(**kwargs)


def test_importing_the_unicycle_imports_neither_torch_nor_pillow():
    code = (
        "import sys, totalprop.envs.unicycle; sys.exit(bool({'torch', 'PIL'} & set(sys.modules)))"
    )
    root = str(Path(envs.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


# Rendering


def picture(state, actions=()):
    env = UnicycleEnv(render_mode="rgb_array")
    env.reset(seed=0, options={"state": state})
    for action in actions:
        env.step(np.array(action))
    return env.render()


def where(image, colour, *, below=40):
    """Rows and columns of the pixels of a colour, without the captions."""
    near = np.abs(image.astype(int) - colour).sum(-1) < 30
    near[:below] = False
    return np.nonzero(near)


ORANGE, RED, GREEN = (224, 123, 40), (209, 52, 75), (46, 158, 107)


def test_picture_is_a_contiguous_rgb_array():
    image = picture(named())
    assert image.shape == (320, 480, 3)
    assert image.dtype == np.uint8
    assert image.flags["C_CONTIGUOUS"] and image.flags["WRITEABLE"]


def test_leaning_shows_in_the_picture():
    # The camera stands behind the robot's right side: left and ahead are to the picture's sides.
    columns = {
        name: where(picture(state), ORANGE)[1].mean()
        for name, state in {
            "left": named(roll=0.5),
            "right": named(roll=-0.5),
            "ahead": named(pitch=0.5),
            "back": named(pitch=-0.5),
        }.items()
    }
    assert columns["left"] + 20 < columns["right"]
    assert columns["back"] + 20 < columns["ahead"]
    upright, fallen = where(picture(named()), ORANGE), where(picture(named(pitch=1.5)), ORANGE)
    assert upright[0].mean() + 40 < fallen[0].mean()  # rows count downwards


def test_wheel_and_turntable_are_seen_to_turn():
    still = picture(named())
    for changed in (named(wheel=0.5), named(table=0.5)):
        assert (picture(changed) != still).any()


def test_camera_follows_a_robot_that_runs_away():
    for x in (-40.0, 1e6):
        rows, columns = where(picture(named(x=x, y=x)), ORANGE)
        assert rows.size > 300
        assert 100 < columns.min() <= columns.max() < 380
        assert not where(picture(named(x=x)), GREEN)[0].size  # the target is out of sight


def test_path_of_the_contact_point_is_drawn_on_the_floor():
    env = UnicycleEnv(render_mode="rgb_array")
    env.reset(seed=0, options={"state": named(d_wheel=4.0, d_pitch=-0.5)})
    for _ in range(3):
        env.step(STEADY)
    moved = env.render()
    env.set_state({**env.get_state(), "path": np.zeros((0, 2))})
    rows, columns = np.nonzero((moved != env.render()).any(-1))
    assert rows.size > 100
    assert columns.max() - columns.min() > 40 > rows.max() - rows.min()  # ahead, to the right
    assert rows.min() > 200  # on the floor


def test_torques_are_drawn_as_arrows():
    still = where(picture(named(), [(0.0, 0.0)]), RED)[0].size
    turning = where(picture(named(), [(1.0, 0.0)]), RED)[0]
    driving = where(picture(named(), [(0.0, 0.5)]), RED)[0]
    assert turning.size > still + 100 and driving.size > still + 50
    assert turning.mean() + 50 < driving.mean()  # around the turntable, and around the wheel


def test_render_without_a_mode_warns_and_draws_nothing():
    env = UnicycleEnv()
    env.reset(seed=0)
    with pytest.warns(UserWarning, match='render_mode="rgb_array"'):
        assert env.render() is None


def test_missing_pillow_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"requires Pillow: run `pip install pillow`\.$"):
        picture(named())
