"""The control suite, against dm_control, two environment checkers and a fake backend."""

import copy
import importlib.util
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
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.vec_env import DummyVecEnv

from totalprop import envs
from totalprop.envs import mujoco_backend
from totalprop.envs.dm_control import FAST, TASKS, DMControlEnv
from totalprop.envs.mujoco_backend import load_dm_control

pytest.importorskip("dm_control")
if importlib.util.find_spec("shimmy") is None:  # importing it here would fix the backend
    pytest.skip("needs shimmy", allow_module_level=True)


def make(name, **kwargs):
    return gym.make(f"dmc/{name}-v0", **kwargs)


def random_actions(env, count, seed=0):
    space = env.action_space
    low, high = np.maximum(space.low, -1), np.minimum(space.high, 1)  # lqr: +-1e10
    return np.random.default_rng(seed).uniform(low, high, (count, *space.shape)).astype(np.float32)


def rollout(env, actions, seed=None):
    """All numbers of the first steps of an episode, as one flat array."""
    numbers = [env.reset(seed=seed)[0].ravel()]
    for action in actions:
        observation, reward, *_ = env.step(action)
        numbers += [observation.ravel(), [reward]]
    return np.concatenate(numbers)


def run(code, **environment):
    """Run Python code in a fresh process with MUJOCO_GL as given, or unset."""
    inherited = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"}
    inherited["PYTHONPATH"] = str(Path(envs.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture(scope="module")
def drawing():
    try:
        mujoco_backend.check_rendering()
    except RuntimeError as error:
        pytest.skip(str(error))
    make("pendulum-swingup", observation="pixels", render="fast", size=8).close()


# Names and imports


def test_triton_is_imported_before_mesa_and_no_warnings_are_switched_on(tmp_path):
    """Mesa's LLVM before Triton's is a segmentation fault; shimmy shows every deprecation."""
    probe = "import sys; print('mesa first' if 'dm_control' in sys.modules else 'triton first')"
    (tmp_path / "triton.py").write_text(probe)
    code = (
        f"import sys, types, warnings; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from totalprop.envs.mujoco_backend import load_dm_control\n"
        "sys.modules['torch'] = types.ModuleType('torch')\n"
        "before = list(warnings.filters); load_dm_control(); print(warnings.filters == before)"
    )
    done = run(code, MUJOCO_GL="off")
    assert done.stdout.split("\n")[:2] == ["triton first", "True"], done.stderr


def test_tasks_are_those_of_the_suite_and_all_are_registered():
    suite, _, _ = load_dm_control()

    assert TASKS == suite.ALL_TASKS
    for domain, task in TASKS:
        assert gym.spec(f"dmc/{domain}-{task}-v0").kwargs == {"domain": domain, "task": task}


@pytest.mark.parametrize("links", [3, 5, 7])
def test_swimmers_that_the_suite_does_not_load(links):
    """They are those of `suite.swimmer.swimmer`, bit for bit."""
    suite, _, _ = load_dm_control()
    env = gym.make(f"dmc/swimmer-swimmer{links}-v0", action_repeat=1)
    theirs = suite.swimmer.swimmer(links, random=3)
    assert env.observation_space.shape == (4 * links + 1,)  # Heess et al.'s tasks have these links
    assert env.action_space.shape == (links - 1,)
    observation, _ = env.reset(seed=3)
    step = theirs.reset()
    action = np.linspace(-0.9, 0.7, links - 1).astype(np.float32)
    for _ in range(5):
        expected = np.concatenate([np.ravel(x) for x in step.observation.values()])
        np.testing.assert_array_equal(observation, expected.astype(np.float32))
        observation, reward, *_ = env.step(action)
        step = theirs.step(action)
        assert reward == step.reward


def test_importing_envs_imports_neither_dm_control_nor_mujoco():
    code = (
        "import sys, totalprop.envs.dm_control, totalprop.envs.mujoco_backend;"
        "sys.exit(bool({'dm_control', 'mujoco', 'shimmy'} & set(sys.modules)))"
    )
    assert run(code).returncode == 0


def test_spec_makes_the_environment_again_and_is_json():
    env = make("walker-walk", action_repeat=4)
    assert '"action_repeat": 4' in env.spec.to_json()
    assert gym.make(env.spec).unwrapped.action_repeat == 4


# The Gymnasium contract


def complaints(name, *, skip_render_check, **kwargs):
    """Warnings of both checkers, except those about infinite bounds."""
    env = make(name, **kwargs).unwrapped
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for check in (gymnasium_check_env, sb3_check_env):
            check(env, skip_render_check=skip_render_check)
    messages = [str(w.message) for w in caught if not issubclass(w.category, DeprecationWarning)]
    return [message for message in messages if "infinity" not in message]


@pytest.mark.parametrize("name", ["walker-walk", "finger-turn_easy", "pendulum-swingup"])
def test_both_checkers_accept_vectors(name):
    assert complaints(name, skip_render_check=True) == []


def test_both_checkers_accept_vectors_of_quadruped():
    # The task's bounds differ per joint, between 0.8 and 1.1, and are kept.
    messages = complaints("quadruped-walk", skip_render_check=True)
    assert all("symmetric and normalized" in message for message in messages)


@pytest.mark.usefixtures("drawing")
def test_both_checkers_accept_pixels():
    kwargs = {"observation": "pixels", "render": "fast", "render_mode": "rgb_array"}
    assert complaints("cartpole-swingup", skip_render_check=False, **kwargs) == []


def test_spaces_and_types():
    env = make("quadruped-walk")
    assert env.observation_space == gym.spaces.Box(-math.inf, math.inf, (78,), np.float32)
    assert env.action_space.dtype == np.float32
    bounds = env.unwrapped.dm_env.action_spec()
    np.testing.assert_array_equal(env.action_space.low, bounds.minimum.astype(np.float32))
    np.testing.assert_array_equal(env.action_space.high, bounds.maximum.astype(np.float32))
    assert env.reset(seed=0)[1] == {}
    *_, reward, terminated, truncated, info = env.step(env.action_space.high)
    assert (type(reward), type(terminated), type(truncated), info) == (float, bool, bool, {})


def test_a_reward_of_zero_is_a_float():
    env = make("cartpole-swingup_sparse")  # shimmy gives the integer 0
    env.reset(seed=0)
    assert repr(env.step(np.zeros(1, np.float32))[1]) == "0.0"


def test_render_fps_belongs_to_the_instance():
    walker = make("walker-walk", action_repeat=2)
    cartpole = make("cartpole-swingup", action_repeat=1)
    assert walker.metadata == {"render_modes": ["rgb_array"], "render_fps": pytest.approx(20)}
    assert cartpole.metadata["render_fps"] == pytest.approx(100)
    assert DMControlEnv.metadata == {"render_modes": ["rgb_array"]}


def test_action_repeat_is_readable_through_a_vec_env():
    vec_env = DummyVecEnv([lambda: make("cartpole-swingup", action_repeat=3)] * 2)
    assert vec_env.get_attr("action_repeat") == [3, 3]


# Seeds


@pytest.mark.parametrize("name", ["walker-walk", "finger-turn_easy", "quadruped-escape"])
def test_trajectory_is_that_of_dm_control_bit_for_bit(name):
    suite, _, _ = load_dm_control()

    env = make(name, action_repeat=1)
    reference = suite.load(
        *name.split("-"),
        task_kwargs={"random": 7},
        environment_kwargs={"flat_observation": True},
    )
    reference.physics._make_rendering_contexts = lambda: None  # escape would create one
    for seed in (7, None):  # the second episode continues the generator
        observation, _ = env.reset(seed=seed)
        step = reference.reset()
        for action in random_actions(env, 20):
            expected = step.observation["observations"].astype(np.float32)
            np.testing.assert_array_equal(observation, expected)
            bounds = reference.action_spec()
            step = reference.step(np.clip(action, bounds.minimum, bounds.maximum))
            observation, reward, *_ = env.step(action)
            assert reward == step.reward


@pytest.mark.parametrize("name", ["reacher-hard", "lqr-lqr_6_2"])
def test_seed_fixes_the_trajectory_in_one_env_and_in_fresh_ones(name):
    first, second = make(name), make(name)
    actions = random_actions(first, 20)
    one = rollout(first, actions, seed=5)
    np.testing.assert_array_equal(one, rollout(first, actions, seed=5))
    np.testing.assert_array_equal(one, rollout(second, actions, seed=5))
    np.testing.assert_array_equal(rollout(first, actions), rollout(second, actions))
    assert not np.array_equal(one, rollout(second, actions, seed=6))


def test_without_a_seed_fresh_environments_differ():
    for name in ("cartpole-swingup", "lqr-lqr_2_1"):
        assert not np.array_equal(make(name).reset()[0], make(name).reset()[0])


def test_seeds_may_have_more_than_32_bits():
    env = make("cartpole-swingup")
    starts = [env.reset(seed=seed)[0] for seed in (1, 2**32 + 1, 2**80 + 1)]
    np.testing.assert_array_equal(starts[1], env.reset(seed=2**32 + 1)[0])
    assert len({start.tobytes() for start in starts}) == 3


def test_a_copied_env_continues_identically():
    env = make("quadruped-run")
    rollout(env, random_actions(env, 5), seed=0)
    twin = copy.deepcopy(env)
    for action in random_actions(env, 5, seed=1):
        for left, right in zip(env.step(action), twin.step(action), strict=True):
            np.testing.assert_array_equal(left, right)
    np.testing.assert_array_equal(env.reset()[0], twin.reset()[0])


# Steps


def test_action_repeat_sums_rewards():
    single, triple = make("walker-walk", action_repeat=1), make("walker-walk", action_repeat=3)
    single.reset(seed=0)
    triple.reset(seed=0)
    for action in random_actions(single, 10):
        steps = [single.step(action) for _ in range(3)]
        observation, reward, *_ = triple.step(action)
        assert reward == sum(step[1] for step in steps)
        np.testing.assert_array_equal(observation, steps[-1][0])


def test_action_repeat_stops_at_the_end():
    env = make("cartpole-balance", action_repeat=2, time_limit=0.05)  # 5 control steps
    env.reset(seed=0)
    steps = [env.step(np.zeros(1, np.float32)) for _ in range(3)]
    assert [step[3] for step in steps] == [False, False, True]
    assert 0 < steps[2][1] <= 1 < steps[1][1]


def test_time_limit_truncates_after_500_decisions():
    env = make("cartpole-balance")
    for _ in range(2):
        env.reset(seed=0)
        ends = [env.step(np.zeros(1, np.float32))[2:4] for _ in range(500)]
        assert ends == [(False, False)] * 499 + [(False, True)]


def test_a_task_that_ends_itself_terminates():
    env = make("lqr-lqr_2_1").unwrapped
    env.reset(seed=0)
    physics = env.dm_env.physics
    physics.data.qpos[:], physics.data.qvel[:] = 0, 0
    physics.forward()
    assert env.step(np.zeros(1))[2:4] == (True, False)


def test_step_outside_an_episode_is_refused():
    env = make("cartpole-balance", time_limit=0.01).unwrapped
    with pytest.raises(gym.error.ResetNeeded, match=r"call reset\(\) first"):
        env.step(np.zeros(1))
    env.reset(seed=0)
    assert env.step(np.zeros(1))[3]
    with pytest.raises(gym.error.ResetNeeded, match=r"call reset\(\) first"):
        env.step(np.zeros(1))
    env.reset()
    env.step(np.zeros(1))


def test_out_of_range_actions_are_clipped_to_the_tasks_bounds():
    env = make("quadruped-walk").unwrapped
    space = env.action_space
    inside, outside = np.stack([space.low, space.high]), np.stack([space.low - 3, space.high * 9])
    np.testing.assert_array_equal(rollout(env, inside, seed=0), rollout(env, outside, seed=0))
    bounds = env.dm_env.action_spec()
    np.testing.assert_array_equal(env.dm_env.physics.data.ctrl, bounds.maximum)


@pytest.mark.parametrize("action", [[np.nan] * 6, [0, 0, 0, 0, 0, np.inf], 0.5, [0.0] * 5])
def test_bad_actions_are_refused_in_one_sentence(action):
    env = make("walker-walk").unwrapped
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"^action=.* 6 finite numbers: pass shape \(6,\).*\.$"):
        env.step(np.array(action))
    env.step(np.zeros(6))


def test_close_ends_the_episode_and_reset_starts_another():
    env, other = make("cartpole-balance").unwrapped, make("cartpole-balance")
    actions = random_actions(env, 5)
    rollout(env, actions, seed=0)
    rollout(other, actions, seed=0)
    env.close()
    env.close()
    with pytest.raises(gym.error.ResetNeeded):
        env.step(actions[0])
    np.testing.assert_array_equal(rollout(env, actions), rollout(other, actions))


def test_the_warning_about_cheetahs_mass_is_not_ours_to_show(capfd, caplog):
    make("cheetah-run")
    assert "settotalmass" not in caplog.text + capfd.readouterr().err


COUNT = "is out of range: pass a whole number >= 1 of"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"observation": "pixel"}, "observation='pixel' is unknown: pass 'vector' or 'pixels'."),
        ({"render": "quick"}, "render='quick' is unknown: pass 'suite' or 'fast'."),
        ({"render_mode": "human"}, "render_mode='human' is unknown: pass None or 'rgb_array'."),
        ({"action_repeat": 0}, f"action_repeat=0 {COUNT} control steps."),
        ({"action_repeat": 2.0}, f"action_repeat=2.0 {COUNT} control steps."),
        ({"size": 0}, f"size=0 {COUNT} pixels."),
        ({"size": True}, f"size=True {COUNT} pixels."),
        ({"render_size": 64}, "render_size=64 is not a size: pass (height, width)."),
        ({"render_size": (0, 64)}, f"render_size=0 {COUNT} pixels."),
        ({"time_limit": 0}, "time_limit=0 is out of range: pass seconds > 0, or None."),
        ({"time_limit": math.nan}, "time_limit=nan is out of range: pass seconds > 0, or None."),
        *(
            (
                {"camera": camera},
                f"camera={camera!r} is unknown: "
                "pass one of ['side', 'back'], its index, or -1 (free camera).",
            )
            for camera in ("front", 2, -2, 0.0)
        ),
    ],
)
def test_constructor_errors_say_value_expectation_and_remedy(kwargs, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        DMControlEnv("walker", "walk", **kwargs)


def test_an_unknown_task_is_gymnasiums_error():
    with pytest.raises(gym.error.NameNotFound, match="Did you mean: `walker-walk`"):
        make("walker-wlak")


# Rendering


@pytest.mark.usefixtures("drawing")
@pytest.mark.parametrize("style", ["suite", "fast"])
@pytest.mark.parametrize(("name", "camera"), [("cartpole-swingup", 0), ("quadruped-walk", 2)])
def test_pixels_are_the_suites_own_picture(name, camera, style):
    env = make(name, observation="pixels", render=style, render_mode="rgb_array").unwrapped
    env.reset(seed=0)
    for action in random_actions(env, 2):
        observation, *_ = env.step(action)
    flags = FAST if style == "fast" else None
    expected = env.dm_env.physics.render(64, 64, camera_id=camera, render_flag_overrides=flags)
    np.testing.assert_array_equal(observation, expected)
    assert env.observation_space == gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    assert env.dm_env.physics.model.vis.quality.offsamples == (0 if style == "fast" else 4)
    assert env.render().shape == (240, 320, 3)
    for frame in (observation, env.render()):
        assert frame.dtype == np.uint8
        assert frame.flags["C_CONTIGUOUS"] and frame.flags["OWNDATA"]
        assert frame.std() > 10


@pytest.mark.usefixtures("drawing")
def test_fast_shows_the_same_scene_without_its_shadows():
    frames = {}
    for style in ("suite", "fast"):
        env = make("walker-walk", observation="pixels", render=style)
        frames[style] = env.reset(seed=0)[0].astype(float)
    body = frames["suite"][..., 0] > 150  # the only orange object
    assert body.sum() > 50
    assert np.abs(frames["suite"] - frames["fast"]).mean(-1)[body].mean() < 30
    assert not np.array_equal(frames["suite"], frames["fast"])


@pytest.mark.usefixtures("drawing")
def test_cameras_have_names_and_pictures_any_size():
    kwargs = {"observation": "pixels", "render": "fast", "size": 490}
    by_name, by_index, default = (
        make("hopper-hop", camera=camera, **kwargs).reset(seed=0)[0] for camera in ("back", 1, None)
    )
    assert by_name.shape == (490, 490, 3)  # the suite's own buffer is 640 x 480
    np.testing.assert_array_equal(by_name, by_index)
    assert not np.array_equal(by_name, default)


@pytest.mark.usefixtures("drawing")
def test_a_vector_env_renders_without_disturbing_the_episode():
    seen = make("finger-spin", render_mode="rgb_array", render="fast", render_size=(40, 50))
    blind = make("finger-spin")
    actions = random_actions(seen, 5)
    one = [seen.reset(seed=0)[0]]
    for action in actions:
        assert seen.render().shape == (40, 50, 3)
        observation, reward, *_ = seen.step(action)
        one += [observation, [reward]]
    np.testing.assert_array_equal(np.concatenate(one), rollout(blind, actions, seed=0))


@pytest.mark.usefixtures("drawing")
def test_a_copied_and_a_reopened_pixel_env_draw_the_same():
    env = make("reacher-easy", observation="pixels", render="fast")
    env.reset(seed=0)
    twin = copy.deepcopy(env)
    action = np.ones(2, np.float32)
    frame, *_ = env.step(action)
    np.testing.assert_array_equal(frame, twin.step(action)[0])
    assert env.unwrapped.dm_env.physics._contexts
    env.close()  # frees the context; rendering again creates a new one
    assert not env.unwrapped.dm_env.physics._contexts
    env.reset(seed=0)
    np.testing.assert_array_equal(frame, env.step(action)[0])


def test_render_without_a_mode_warns_and_draws_nothing():
    env = make("cartpole-balance").unwrapped
    env.reset(seed=0)
    with pytest.warns(UserWarning, match='render_mode="rgb_array"'):
        assert env.render() is None


@pytest.mark.usefixtures("drawing")
def test_a_fork_of_a_process_that_has_drawn_is_refused(monkeypatch):
    env = make("cartpole-balance", observation="pixels").unwrapped
    monkeypatch.setattr(mujoco_backend, "_first_drawing_process", lambda: os.getpid() + 1)
    with pytest.raises(RuntimeError, match=r"OpenGL hangs .* 'forkserver' or 'spawn'"):
        env.reset(seed=0)


# The backend


@pytest.fixture
def unchosen(monkeypatch):
    """Pretend to be a Linux process that has neither imported dm_control nor set MUJOCO_GL."""
    monkeypatch.setitem(sys.modules, "dm_control._render", None)
    monkeypatch.setenv("MUJOCO_GL", "to be restored")
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setattr(mujoco_backend.platform, "system", lambda: "Linux")
    return monkeypatch


@pytest.mark.parametrize(
    ("working", "chosen", "tried"),
    [
        ({"egl", "osmesa"}, "egl", ["egl"]),
        ({"osmesa"}, "osmesa", ["egl", "osmesa"]),
        (set(), "off", ["egl", "osmesa"]),
    ],
)
def test_backend_is_the_first_that_draws_and_is_tried_once(unchosen, working, chosen, tried):
    attempts = []
    unchosen.setattr(
        mujoco_backend, "draws", lambda name: bool(attempts.append(name)) or name in working
    )
    assert mujoco_backend.choose_backend() == chosen
    assert os.environ["MUJOCO_GL"] == chosen
    assert mujoco_backend.choose_backend() == chosen
    assert attempts == tried


def test_a_backend_of_the_users_is_respected(unchosen):
    unchosen.setattr(mujoco_backend, "draws", lambda name: pytest.fail("probed"))
    unchosen.setenv("MUJOCO_GL", "osmesa")
    assert mujoco_backend.choose_backend() == "osmesa"


def test_other_systems_are_left_alone(unchosen):
    unchosen.setattr(mujoco_backend, "draws", lambda name: pytest.fail("probed"))
    unchosen.setattr(mujoco_backend.platform, "system", lambda: "Darwin")
    assert mujoco_backend.choose_backend() == ""
    assert "MUJOCO_GL" not in os.environ


def test_a_backend_that_fails_or_hangs_does_not_draw(monkeypatch):
    assert not mujoco_backend.draws("no such backend")
    monkeypatch.setattr(mujoco_backend, "PROBE_TIMEOUT", 0.01)
    assert not mujoco_backend.draws("egl")


def test_without_a_backend_vectors_work_and_drawing_names_the_remedy():
    code = """
import os, gymnasium
from totalprop.envs import mujoco_backend
mujoco_backend.draws = lambda name: False
env = gymnasium.make("dmc/quadruped-escape-v0", render_mode="rgb_array")
env.reset(seed=0)
env.step(env.action_space.sample())
print(os.environ["MUJOCO_GL"])
for draw in (env.render, lambda: gymnasium.make("dmc/cartpole-balance-v0", observation="pixels")):
    try:
        draw()
    except RuntimeError as error:
        print(error)
"""
    done = run(code)
    remedy = (
        "MuJoCo cannot render here (MUJOCO_GL='off'): run `apt install libegl1 libgl1` "
        "(or `libosmesa6`), unset MUJOCO_GL and start Python again."
    )
    assert done.stdout.splitlines() == ["off", remedy, remedy], done.stderr


def test_a_backend_that_breaks_the_import_is_named():
    done = run(
        "import gymnasium, totalprop.envs; gymnasium.make('dmc/walker-walk-v0')", MUJOCO_GL="bogus"
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: dm_control does not load with MUJOCO_GL='bogus'")
    assert "unset MUJOCO_GL" in last


def test_glfw_without_a_display_is_refused_before_it_aborts():
    code = """
import shimmy, gymnasium, totalprop.envs
env = gymnasium.make("dmc/quadruped-escape-v0", render_mode="rgb_array")
for _ in range(2):
    env.reset(seed=0)
    try:
        env.render()
    except RuntimeError as error:
        print(error)
"""
    done = run(code, MUJOCO_GL="glfw", DISPLAY="", WAYLAND_DISPLAY="")
    message = (
        "MuJoCo cannot render with GLFW, which needs a display: make a dmc/ environment before "
    )
    lines = done.stdout.splitlines()
    assert [line.startswith(message) for line in lines] == [True, True], done.stderr


def test_a_missing_package_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "shimmy", None)
    message = "The dmc/ environments require shimmy: run `pip install 'totalprop[dmc]'`."
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        make("walker-walk")
