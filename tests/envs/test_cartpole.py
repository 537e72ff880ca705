"""The cart-pole, against closed forms, golden numbers and two environment checkers.

Golden numbers of the plant: DOP853 at 1e-12, with angle 0 hanging DOWN: theta_up = theta_down - pi.
"""

import copy
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
from totalprop.envs.cartpole import CartPoleSwingUpEnv, cartpole_derivatives, integrate

ENV_ID = "totalprop/CartPoleSwingUp-v0"
HANGING = np.array([0.0, math.pi, 0.0, 0.0])
BASE_STD = np.array([0.01, math.radians(1), 0.1, math.radians(10)])
MASS_CART, MASS_POLE, GRAVITY = 0.5, 0.5, 9.82

# (start DOWN, force in N, pole length in m, time in s, end DOWN)
GOLDEN = [
    ([0, 0, 0, 0], 10, 0.5, 0.1, [0.07795541, -0.22770666, 1.51529939, -4.29564438]),
    ([0, 0, 0, 0], 10, 0.5, 0.5, [1.35022818, -1.53561634, 4.85895363, 1.37005016]),
    ([0.1, 0.3, -0.2, 0.5], -4, 0.5, 0.1, [0.05845268, 0.36510282, -0.62309998, 0.74479776]),
    ([0.1, 0.3, -0.2, 0.5], -4, 0.5, 0.5, [-0.47491451, 0.4325052, -2.00652955, -0.67204675]),
    ([0, math.pi - 0.1, 0, 0], 0, 0.5, 0.5, [-0.10420323, 1.89786566, -0.24715749, -6.4140077]),
    ([0, 0, 0, 0], 10, 0.6, 0.1, [0.07827829, -0.19144374, 1.53003297, -3.6524672]),
]


def up(state_down):
    return np.asarray(state_down, dtype=np.float64) - np.array([0.0, math.pi, 0.0, 0.0])


def random_states(count, seed=0):
    scale = np.array([1.0, 4.0, 3.0, 8.0])
    return np.random.default_rng(seed).uniform(-scale, scale, (count, 4))


def rollout(env, actions, seed=None):
    """All numbers of an episode, as one flat array."""
    observation, info = env.reset(seed=seed)
    numbers = [*observation, *info["state"]]
    for action in actions:
        observation, reward, _, _, info = env.step(np.array([action], dtype=np.float32))
        numbers += [*observation, reward, *info["state"], info["cost"], info["tip_distance"]]
    return np.array(numbers)


# The plant


@pytest.mark.parametrize(("start", "force", "length", "time", "end"), GOLDEN)
def test_rk4_matches_the_golden_numbers(start, force, length, time, end):
    steps = round(time / 0.1)
    state = up(start)
    for _ in range(steps):
        state = integrate(state, force, pole_length=length)
    assert np.abs(state - up(end)).max() < 3e-6


def test_euler_and_coarse_rk4_have_the_known_errors():
    start, force, _, _, end = GOLDEN[0]

    def error(**how):
        return np.abs(integrate(up(start), force, **how) - up(end)).max()

    assert error(integrator="euler") == pytest.approx(0.134, abs=5e-4)
    assert error(integrator="rk4") == pytest.approx(8e-7, rel=0.1)
    assert error(integrator="rk4", substeps=2) == pytest.approx(8e-4, rel=0.1)


def test_env_step_is_ten_rk4_or_euler_substeps_of_ten_newtons():
    start, _, _, _, end = GOLDEN[0]
    for integrator, low, high in [("rk4", 0.0, 3e-6), ("euler", 0.1, 0.2)]:
        env = CartPoleSwingUpEnv(integrator=integrator)
        env.reset(seed=0, options={"state": up(start)})
        *_, info = env.step(np.array([1.0], dtype=np.float32))
        assert low <= np.abs(info["state"] - up(end)).max() < high
    env = CartPoleSwingUpEnv(pole_length=0.6)
    env.reset(seed=0, options={"state": up(GOLDEN[5][0])})
    *_, info = env.step(np.array([1.0], dtype=np.float32))
    assert np.abs(info["state"] - up(GOLDEN[5][4])).max() < 3e-6


def energy(state, length):
    x_dot, cos, theta_dot = state[..., 2], np.cos(state[..., 1]), state[..., 3]
    return (
        (MASS_CART + MASS_POLE) * x_dot**2 / 2
        + MASS_POLE * length**2 * theta_dot**2 / 6
        - MASS_POLE * length * x_dot * theta_dot * cos / 2
        + MASS_POLE * GRAVITY * length * cos / 2
    )


@pytest.mark.parametrize("length", [0.5, 0.6])
def test_energy_is_conserved_without_force_and_friction(length):
    states = random_states(100)
    before = energy(states, length)
    for _ in range(10):  # 1 s at 1 ms
        states = integrate(states, 0.0, substeps=100, pole_length=length, friction=0.0)
    assert np.abs(energy(states, length) - before).max() < 1e-6


def test_friction_removes_energy():
    # dE/dt = -b x_dot², compared with a central difference along the flow.
    state, h = np.array([0.3, 2.0, 1.5, -3.0]), 1e-4
    derivative = cartpole_derivatives(state, 0.0)
    slope = (energy(state + h * derivative, 0.5) - energy(state - h * derivative, 0.5)) / (2 * h)
    assert slope == pytest.approx(-0.1 * 1.5**2, abs=1e-5)


@pytest.mark.parametrize("length", [0.5, 0.6])
def test_up_convention_equals_pilcos_down_convention_and_the_lagrangian(length):
    states = random_states(1000)
    force = np.linspace(-10, 10, 1000)
    theta, x_dot, theta_dot = states[:, 1] + math.pi, states[:, 2], states[:, 3]
    m, total, sin, cos = MASS_POLE, MASS_CART + MASS_POLE, np.sin(theta), np.cos(theta)
    pull = force - 0.1 * x_dot
    d = 4 * total - 3 * m * cos**2
    x_ddot = (2 * m * length * theta_dot**2 * sin + 3 * m * GRAVITY * sin * cos + 4 * pull) / d
    theta_ddot = (
        -3 * m * length * theta_dot**2 * sin * cos - 6 * total * GRAVITY * sin - 6 * pull * cos
    ) / (length * d)

    derivative = cartpole_derivatives(states, force, pole_length=length)

    expected = np.stack([x_dot, theta_dot, x_ddot, theta_ddot], axis=-1)
    np.testing.assert_allclose(derivative, expected, rtol=0, atol=1e-10)
    a, alpha = derivative[:, 2], derivative[:, 3]
    inertia = m * length / 2 * (alpha * cos - theta_dot**2 * sin)
    np.testing.assert_allclose(total * a + inertia, pull, rtol=0, atol=1e-10)
    torque = 2 * length * alpha + 3 * a * cos + 3 * GRAVITY * sin
    np.testing.assert_allclose(torque, 0, rtol=0, atol=1e-10)


def test_plant_is_batched_over_leading_axes():
    states = random_states(6).reshape(2, 3, 4)
    force = np.array([1.0, -2.0, 3.0])
    batched = integrate(states, force)
    for i in range(2):
        for j in range(3):
            np.testing.assert_allclose(batched[i, j], integrate(states[i, j], force[j]), atol=1e-13)
    assert cartpole_derivatives(states[0, 0], force).shape == (3, 4)


def test_push_right_from_rest_leaves_the_tip_behind_on_the_left():
    env = CartPoleSwingUpEnv(noise=0.0, initial_std=0.0)
    env.reset(seed=0)
    *_, info = env.step(np.array([0.5], dtype=np.float32))
    x, theta = info["state"][:2]
    assert x > 0
    assert math.sin(theta) > 0
    tip = x - 0.5 * math.sin(theta)
    assert tip < x
    expected = math.hypot(tip, 0.5 * (1 - math.cos(theta)))
    assert info["tip_distance"] == pytest.approx(expected, abs=1e-12)


# Costs


@pytest.mark.parametrize(
    ("kwargs", "hanging", "tilted"),
    [
        ({"cost": "tip", "tip_width": 0.25}, 0.999665, 0.62148),
        ({"cost": "tip", "tip_width": 0.5}, 0.864665, 0.215628),
        ({"cost": "angle"}, 0.992808, 0.062933),
    ],
)
def test_cost_unit_values(kwargs, hanging, tilted):
    env = CartPoleSwingUpEnv(**kwargs)
    assert env.cost(HANGING) == pytest.approx(hanging, abs=1e-6)
    assert env.cost(up([0.2, math.pi - 0.3, 1.0, -2.0])) == pytest.approx(tilted, abs=1e-6)
    assert env.cost(np.zeros(4)) == 0


def test_angle_cost_has_one_winding_and_tip_cost_has_all():
    turned = np.array([0.0, 2 * math.pi, 0.0, 0.0])
    assert CartPoleSwingUpEnv(cost="angle").cost(turned) > 0.99
    assert CartPoleSwingUpEnv(cost="tip").cost(turned) < 1e-12


def test_mirrored_tip_mirrors_the_angle_in_the_tip_cost_alone():
    right, mirrored = (CartPoleSwingUpEnv(cost="tip", mirrored_tip=flag) for flag in (False, True))
    states = random_states(50)
    reflected = states * np.array([1.0, -1.0, 1.0, 1.0])
    np.testing.assert_allclose(mirrored.cost(states), right.cost(reflected), rtol=0, atol=1e-15)
    assert np.abs(mirrored.cost(states) - right.cost(states)).max() > 0.05
    np.testing.assert_array_equal(mirrored.tip_distance(states), right.tip_distance(states))
    # x = 0.2, theta = 0.3: by hand, (0.2 ± 0.5 sin 0.3)² + 0.25 (1 - cos 0.3)², w = 0.25.
    state = np.array([0.2, 0.3, 0.0, 0.0])
    drop = 0.25 * (1 - math.cos(0.3)) ** 2
    for env, sign in ((right, -1), (mirrored, 1)):
        squared = (0.2 + sign * 0.5 * math.sin(0.3)) ** 2 + drop
        assert env.cost(state) == pytest.approx(1 - math.exp(-8 * squared), abs=1e-12)


@pytest.mark.parametrize(
    ("kwargs", "total"),
    [
        ({"cost": "tip", "tip_width": 0.25}, 29.99),
        ({"cost": "tip", "tip_width": 0.5}, 25.94),
        ({"cost": "angle"}, 29.78),
    ],
)
def test_doing_nothing_costs_what_it_should(kwargs, total):
    env = CartPoleSwingUpEnv(noise=0.0, initial_std=0.0, **kwargs)
    env.reset(seed=0)
    rewards = [env.step(np.zeros(1, dtype=np.float32))[1] for _ in range(30)]
    assert -sum(rewards) == pytest.approx(total, abs=5e-3)


def test_reward_is_minus_the_cost_of_the_true_next_state():
    env = CartPoleSwingUpEnv(noise=16.0)
    env.reset(seed=3)
    for action in np.linspace(-1, 1, 10):
        observation, reward, terminated, truncated, info = env.step(np.array([action]))
        assert reward == -info["cost"] == -env.cost(info["state"])
        assert reward != -env.cost(observation.astype(np.float64))
        assert (terminated, truncated) == (False, False)
        assert info["tip_distance"] == env.tip_distance(info["state"])
        assert isinstance(reward, float) and isinstance(info["tip_distance"], float)


@pytest.mark.parametrize(
    "kwargs", [{"cost": "angle"}, {"cost": "tip"}, {"cost": "tip", "mirrored_tip": True}]
)
def test_torch_and_numpy_costs_agree_and_torch_differentiates(kwargs):
    env = CartPoleSwingUpEnv(**kwargs)
    states = random_states(24).reshape(2, 12, 4)
    tensor = torch.tensor(states)
    for function in (env.cost, env.tip_distance):
        assert function(states).shape == function(tensor).shape == (2, 12)
        np.testing.assert_allclose(function(tensor).numpy(), function(states), rtol=0, atol=1e-14)
        near = torch.tensor(random_states(5) * 0.2, requires_grad=True)
        assert torch.autograd.gradcheck(function, (near,))
    assert env.cost(tensor.float()).dtype == torch.float32
    target = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    env.cost(target).backward()
    assert torch.equal(target.grad, torch.zeros(4, dtype=torch.float64))


# Noise and seeds


def residuals(env, count):
    """Observation minus true state: [count, 4] at resets and [count, 4] at steps."""
    env.reset(seed=0)
    at_reset, at_step = np.empty((count, 4)), np.empty((count, 4))
    for i in range(count):
        observation, info = env.reset()
        at_reset[i] = observation - info["state"]
        observation, *_, info = env.step(np.array([0.3], dtype=np.float32))
        at_step[i] = observation - info["state"]
    return at_reset, at_step


def test_noise_multiplies_the_variance_and_is_white():
    # N = 5000, seed 0, k = 4, so std = 2 x base. SE(mean) = std/sqrt(N), SE(std) = std/sqrt(2N),
    # SE(correlation) = 1/sqrt(N); every tolerance is 4 SE.
    count = 5000
    std = 2 * BASE_STD
    for sample in residuals(CartPoleSwingUpEnv(noise=4.0), count):
        assert (np.abs(sample.mean(0)) < 4 * std / math.sqrt(count)).all()
        assert (np.abs(sample.std(0) / std - 1) < 4 / math.sqrt(2 * count)).all()
        z = sample / std
        across = z.T @ z / count - np.diag(np.diag(z.T @ z / count))
        assert np.abs(across).max() < 4 / math.sqrt(count)
        along = (z[1:] * z[:-1]).mean(0)
        assert np.abs(along).max() < 4 / math.sqrt(count)


def test_noise_zero_shows_the_state():
    for sample in residuals(CartPoleSwingUpEnv(noise=0.0), 20):
        assert np.abs(sample).max() < 1e-6  # float32


def test_initial_state_follows_initial_distribution():
    # N = 5000, seed 1; 4 SE as above.
    count = 5000
    env = CartPoleSwingUpEnv(initial_std=0.1, noise=9.0)
    mean, std = env.initial_distribution
    assert mean.dtype == std.dtype == np.float64
    np.testing.assert_array_equal(mean, HANGING)
    np.testing.assert_array_equal(std, np.full(4, 0.1))
    env.reset(seed=1)
    z = np.array([env.reset()[1]["state"] for _ in range(count)])
    z = (z - mean) / std
    assert np.abs(z.mean(0)).max() < 4 / math.sqrt(count)
    assert np.abs(z.std(0) - 1).max() < 4 / math.sqrt(2 * count)
    correlation = np.corrcoef(z.T) - np.eye(4)
    assert np.abs(correlation).max() < 4 / math.sqrt(count)


def test_defaults_are_those_of_the_task():
    env = CartPoleSwingUpEnv()
    np.testing.assert_allclose(env.noise_std, BASE_STD, rtol=1e-12)
    np.testing.assert_array_equal(env.initial_distribution[1], np.full(4, 0.02))
    assert (env.cost_name, env.integrator, env.tip_width) == ("angle", "rk4", 0.25)
    assert (env.pole_length, env.mirrored_tip, env.render_mode) == (0.5, False, None)
    assert env.action_space == gym.spaces.Box(-1.0, 1.0, (1,), np.float32)


def test_seed_fixes_everything_and_nothing_global_matters():
    actions = np.random.default_rng(0).uniform(-1, 1, 30)
    first, second = CartPoleSwingUpEnv(), CartPoleSwingUpEnv()
    np.random.seed(0)
    torch.manual_seed(0)
    one = np.concatenate([rollout(first, actions, seed=7), rollout(first, actions)])
    np.random.seed(1)
    torch.manual_seed(1)
    global_state = np.random.get_state()[1].copy()
    two = np.concatenate([rollout(second, actions, seed=7), rollout(second, actions)])
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(global_state, np.random.get_state()[1])
    assert not np.array_equal(one[: one.size // 2], one[one.size // 2 :])
    other = rollout(second, actions, seed=8)
    # Observations (noise) and states must both depend on the seed.
    assert (other[:8] != one[:8]).all()


def test_observation_noise_depends_on_the_seed_alone():
    start = {"state": HANGING}
    env = CartPoleSwingUpEnv()
    a, b, c = (env.reset(seed=seed, options=start)[0] for seed in (5, 5, 6))
    np.testing.assert_array_equal(a, b)
    assert (a != c).all()


def test_copied_env_continues_identically():
    env = CartPoleSwingUpEnv()
    rollout(env, [0.1, 0.2], seed=0)
    twin = copy.deepcopy(env)
    action = np.array([0.7], dtype=np.float32)
    for left, right in zip(env.step(action)[:2], twin.step(action)[:2], strict=True):
        np.testing.assert_array_equal(left, right)


# The Gymnasium contract


def test_make_truncates_after_thirty_steps_and_never_terminates():
    env = gym.make(ENV_ID)
    assert env.spec.reward_threshold == -15.0
    env.reset(seed=0)
    ends = [env.step(np.ones(1, dtype=np.float32))[2:4] for _ in range(30)]
    assert ends == [(False, False)] * 29 + [(False, True)]


@pytest.mark.parametrize("kwargs", [{}, {"cost": "tip", "integrator": "euler", "noise": 16.0}])
def test_both_checkers_are_silent(kwargs):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gymnasium_check_env(gym.make(ENV_ID, render_mode="rgb_array", **kwargs).unwrapped)
        sb3_check_env(
            CartPoleSwingUpEnv(render_mode="rgb_array", **kwargs), skip_render_check=False
        )
    assert [str(warning.message) for warning in caught] == []


def test_out_of_range_actions_are_clipped():
    env = CartPoleSwingUpEnv()
    inside, outside = rollout(env, [1.0, -1.0], seed=0), rollout(env, [3.0, -50.0], seed=0)
    np.testing.assert_array_equal(inside, outside)


@pytest.mark.parametrize("action", [[np.nan], [np.inf], [0.1, 0.2], []])
def test_bad_actions_are_refused_in_one_sentence(action):
    env = CartPoleSwingUpEnv()
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"^action=.* is not one finite number: pass \[u\].*\.$"):
        env.step(np.array(action))


def test_reset_starts_from_an_exact_state_and_copies_it():
    env = CartPoleSwingUpEnv(noise=0.0)
    start = np.array([0.1, 0.2, 0.3, 0.4])
    observation, info = env.reset(seed=0, options={"state": start})
    np.testing.assert_array_equal(observation, start.astype(np.float32))
    start[:] = 9.0
    info["state"][:] = 9.0
    *_, info = env.step(np.zeros(1, dtype=np.float32))
    expected = integrate(np.array([0.1, 0.2, 0.3, 0.4]), 0.0)
    np.testing.assert_array_equal(info["state"], expected)
    assert info["state"].dtype == np.float64


@pytest.mark.parametrize("state", [[0.0, 1.0], [0.0, np.nan, 0.0, 0.0], [[0.0, 1.0, 2.0, 3.0]]])
def test_bad_start_states_are_refused(state):
    with pytest.raises(ValueError, match=r"is not a start state: pass 4 finite numbers"):
        CartPoleSwingUpEnv().reset(seed=0, options={"state": state})


def test_step_before_reset_is_refused():
    with pytest.raises(gym.error.ResetNeeded, match=r"call reset\(\) first"):
        CartPoleSwingUpEnv().step(np.zeros(1))


WIDTH, LENGTH = "pass a width > 0 in metres, e.g. 0.25.", "pass a length > 0 in metres, e.g. 0.5."
NOISE, STD = "pass the variance multiplier k >= 0, e.g. 1.0.", "pass a standard deviation >= 0"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"cost": "Tip"}, "cost='Tip' is unknown: pass 'angle' or 'tip'."),
        ({"cost": None}, "cost=None is unknown: pass 'angle' or 'tip'."),
        ({"integrator": "ode45"}, "integrator='ode45' is unknown: pass 'rk4' or 'euler'."),
        ({"mirrored_tip": 1}, "mirrored_tip=1 is unknown: pass False or True."),
        ({"render_mode": "human"}, "render_mode='human' is unknown: pass None or 'rgb_array'."),
        ({"noise": -1.0}, f"noise=-1.0 is out of range: {NOISE}"),
        ({"noise": math.inf}, f"noise=inf is out of range: {NOISE}"),
        ({"noise": "low"}, f"noise='low' is out of range: {NOISE}"),
        ({"noise": True}, f"noise=True is out of range: {NOISE}"),
        ({"pole_length": 0.0}, f"pole_length=0.0 is out of range: {LENGTH}"),
        ({"pole_length": math.nan}, f"pole_length=nan is out of range: {LENGTH}"),
        ({"tip_width": -0.25}, f"tip_width=-0.25 is out of range: {WIDTH}"),
        ({"tip_width": 0}, f"tip_width=0 is out of range: {WIDTH}"),
        ({"initial_std": -0.1}, f"initial_std=-0.1 is out of range: {STD}, e.g. 0.02."),
    ],
)
def test_constructor_errors_say_value_expectation_and_remedy(kwargs, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        CartPoleSwingUpEnv(**kwargs)


def test_integrate_refuses_an_unknown_integrator():
    with pytest.raises(ValueError, match="integrator='rk45' is unknown"):
        integrate(HANGING, 0.0, integrator="rk45")


def test_importing_envs_imports_neither_torch_nor_pillow():
    code = (
        "import sys, totalprop.envs.cartpole; sys.exit(bool({'torch', 'PIL'} & set(sys.modules)))"
    )
    root = str(Path(envs.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


# Rendering


def picture(state, action=None):
    env = CartPoleSwingUpEnv(render_mode="rgb_array")
    env.reset(seed=0, options={"state": state})
    if action is not None:
        env.step(np.array([action], dtype=np.float32))
    return env.render()


def orange(image):
    """Rows and columns of the pixels of the pole."""
    return np.nonzero(np.abs(image.astype(int) - [224, 123, 40]).sum(-1) < 30)


def test_picture_is_a_contiguous_rgb_array_and_differs_up_and_down():
    down, upright = picture(HANGING), picture(np.zeros(4))
    for image in (down, upright):
        assert image.shape == (320, 480, 3)
        assert image.dtype == np.uint8
        assert image.flags["C_CONTIGUOUS"]
        assert image.flags["WRITEABLE"]
    assert CartPoleSwingUpEnv.metadata == {"render_modes": ["rgb_array"], "render_fps": 10}
    assert orange(upright)[0].mean() + 50 < orange(down)[0].mean()  # rows count downwards


def test_positive_theta_leans_left_in_the_picture_as_in_the_cost():
    left, right = picture(np.array([0, 0.5, 0, 0])), picture(np.array([0, -0.5, 0, 0]))
    assert orange(left)[1].mean() < 230 < 250 < orange(right)[1].mean()


def test_camera_follows_a_cart_that_runs_away():
    for x in (-40.0, 1e9):
        rows, columns = orange(picture(np.array([x, math.pi, 0, 0])))
        assert rows.size > 300
        assert 20 < columns.min() <= columns.max() < 460


def test_force_arrow_points_where_the_force_does():
    for action, side in ((1.0, 1), (-1.0, -1)):
        image = picture(np.zeros(4), action).astype(int)
        columns = np.nonzero(np.abs(image[100:] - [209, 52, 75]).sum(-1) < 20)[1]
        assert columns.size > 100
        assert (side * (columns - 240) > 0).all()


def test_render_without_a_mode_warns_and_draws_nothing():
    env = CartPoleSwingUpEnv()
    env.reset(seed=0)
    with pytest.warns(UserWarning, match='render_mode="rgb_array"'):
        assert env.render() is None
    env.close()
    env.close()


def test_missing_pillow_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"requires Pillow: run `pip install pillow`\.$"):
        picture(HANGING)
