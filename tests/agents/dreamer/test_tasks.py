"""The tasks in `tasks`: their rewards and observations, where these are known."""

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from tests.agents.dreamer.tasks import AGENT, BLUE, EMPTY, RED, TASKS, Catch, Room


@pytest.mark.parametrize("name", TASKS)
def test_the_tasks_are_gymnasiums(name):
    check_env(TASKS[name](), skip_render_check=True)


@pytest.mark.parametrize(("wanted", "reward"), [(1, 1.0), (2, -1.0)])
def test_the_wanted_goal_gives_one_and_the_other_costs_one(wanted, reward):
    room = Room()
    room.reset(seed=0)
    room.at, room.red, room.blue = np.array([0, 0]), np.array([0, 2]), np.array([3, 3])
    room.direction, room.wanted = 3, wanted  # it looks north, red is in the east
    right, ahead = 1, 2
    seen, gained, *over, _ = room.step(ahead)  # into the wall
    assert gained == 0 and over == [False, False] and seen["time_left"] == np.float32(0.96)
    expected = np.full((4, 4), EMPTY)
    expected[0, 0], expected[0, 2], expected[3, 3] = AGENT, RED, BLUE
    assert np.array_equal(seen["cells"], expected) and seen["direction"] == 3
    assert room.step(right)[0]["direction"] == 0
    room.step(ahead)
    seen, gained, *over, _ = room.step(ahead)
    assert gained == reward and over == [True, False] and seen["cells"][0, 2] == AGENT


@pytest.mark.parametrize("shape", [(210, 160, 3), (84, 84)])
def test_a_ball_under_which_the_paddle_stands_is_caught(shape):
    catch = Catch(shape)
    catch.reset(seed=0)
    for at, reward in ((0.5, 1.0), (0.75, -1.0)):
        catch.x, catch.paddle = 0.5, at
        rewards = []
        while catch.y < 0.93 and not any(rewards):
            screen, gained, *_ = catch.step(1)
            rewards.append(gained)
        assert rewards == [0.0] * 8 + [reward]
    assert screen.shape == shape and 0.02 < (screen > 0).mean() < 0.05
