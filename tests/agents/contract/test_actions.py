"""The contract again, for choices instead of numbers as actions, of every agent that takes them."""

# ruff: noqa: F401  (what is imported is collected here, with this module's fixtures)

import copy

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from tests.agents.contract.conftest import TRAINED, Maker, taken
from tests.agents.contract.environments import HIGH, LOW, CountingEnv
from tests.agents.contract.probes import assert_same
from tests.agents.contract.test_checkpoints import (
    quiet,
    test_a_checkpoint_of_another_agent_is_refused,
    test_a_damaged_checkpoint_is_skipped,
    test_a_full_disk_leaves_the_checkpoint_before,
    test_a_new_run_keeps_the_segments_of_the_last_checkpoint_before_it,
    test_a_stopped_and_resumed_run_ends_bit_identical_to_an_uninterrupted_one,
    test_another_number_of_environments_is_refused,
    test_environments_that_cannot_be_rewound_begin_new_episodes_and_are_counted,
    test_scalars_that_the_logger_had_not_written_are_restored,
    test_the_newest_checkpoint_is_the_last_written,
)
from tests.agents.contract.test_files import (
    test_a_file_is_a_path_with_or_without_suffix_or_a_stream,
    test_a_loaded_agent_is_the_same,
    test_an_untrained_agent_is_saved_too,
    test_parameters_that_do_not_fit_change_nothing,
    test_setting_parameters_makes_agents_equal,
)
from tests.agents.contract.test_learning import (
    test_episodes_are_counted,
    test_events_come_in_stable_baselines3s_order,
    test_function_and_list_callbacks,
    test_nothing_is_learned_from_no_steps,
    test_parameters_move_and_stay_finite,
)
from tests.agents.contract.test_predict import (
    test_prediction_needs_no_gradient_and_changes_nothing,
    test_the_state_of_one_step_is_taken_by_the_next,
)
from tests.agents.contract.test_seeds import (
    test_another_agent_made_in_between_changes_nothing,
    test_no_seed_differs,
    test_same_seed_same_bits_and_another_seed_others,
)


class Chosen(gym.ActionWrapper):
    """Chooses among values of the environment's numbers, spread evenly from bound to bound."""

    action_space: spaces.Space

    def action(self, action):
        assert self.action_space.contains(action)
        assert np.asarray(action).dtype == self.action_space.dtype
        numbers = self.action_space.nvec if self.several else self.action_space.n
        share = (np.asarray(action) - self.action_space.start) / (np.asarray(numbers) - 1)
        return (LOW + share * (HIGH - LOW)).astype(np.float32)


class One(Chosen):
    """One choice of 3, counted from -1."""

    several = False
    action_space = spaces.Discrete(3, start=-1)


class Several(Chosen):
    """A choice of 5 and one of 2."""

    several = True
    action_space = spaces.MultiDiscrete([5, 2], dtype=np.int32)


CHOSEN = {"discrete": One, "multidiscrete": Several}


TAKEN = taken(CHOSEN)


def test_dreamer_takes_all_of_them():
    assert {kind for name, kind in TAKEN if name == "dreamer"} == set(CHOSEN)


@pytest.fixture(scope="session", params=TAKEN, ids="-".join)
def make(request):
    name, kind = request.param
    return Maker(name, CHOSEN[kind])


@pytest.fixture(scope="session")
def trained(make):
    agent = make().learn(TRAINED)
    before = copy.deepcopy(agent.get_parameters())
    yield agent
    assert_same(agent.get_parameters(), before)


@pytest.fixture(scope="session")
def file(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("trained") / "agent.zip"
    trained.save(path)
    return path


@pytest.mark.parametrize("deterministic", [True, False])
def test_predictions_are_actions_of_the_space(trained, observations, deterministic):
    space = trained.action_space
    one, _ = trained.predict(observations[0], deterministic=deterministic)
    many, _ = trained.predict(observations, deterministic=deterministic)
    assert one.shape == space.shape and many.shape == (20, *space.shape)
    assert one.dtype == many.dtype == space.dtype
    assert space.contains(one) and all(space.contains(action) for action in many)
