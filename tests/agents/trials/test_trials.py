"""What agents that learn from trials do at the end of one, whichever searches the policy."""

import pytest
from stable_baselines3.common.callbacks import CheckpointCallback

from tests.agents.contract.conftest import Maker
from tests.agents.contract.environments import LENGTH, RETURN, CountingEnv, vector
from tests.agents.contract.probes import logged


@pytest.fixture(params=["pipps", "pilco"])
def make(request):
    return Maker(request.param)


def test_a_checkpoint_at_the_end_of_a_trial_has_the_trial(make, tmp_path):
    """It lacks the search that follows, with which the loaded agent then begins."""
    agent = make().learn(2 * LENGTH, callback=CheckpointCallback(LENGTH, str(tmp_path)))
    for trials in (1, 2):
        path = tmp_path / f"rl_model_{trials * LENGTH}_steps"
        loaded = make.cls.load(path, env=CountingEnv(first=trials), device="cpu")
        assert (loaded._n_trials, loaded.world_model.n_points) == (trials, trials * LENGTH)
        assert loaded._n_updates == agent._n_updates * (trials - 1) // 2
        loaded.learn(LENGTH, reset_num_timesteps=False)
        assert loaded._n_updates == agent._n_updates * (trials + 1) // 2


def test_the_return_is_of_whole_trials(make):
    agent = make()
    dumps = logged(agent)
    agent.learn(2 * LENGTH + 3)
    returns = [values.get("rollout/ep_rew") for values, _ in dumps]
    assert returns == [RETURN, RETURN, None]


def test_the_return_is_the_mean_of_first_episodes_over_environments(make):
    agent = make(vector(LENGTH, 4))  # of which the second begins another episode
    dumps = logged(agent)
    agent.learn(2 * LENGTH)
    assert [values.get("rollout/ep_rew") for values, _ in dumps] == [(RETURN - 1 - 2 - 3 - 4) / 2]
