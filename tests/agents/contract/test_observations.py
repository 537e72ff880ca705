"""The contract again, for observations other than a vector, of every agent that takes them."""

# ruff: noqa: F401  (what is imported is collected here, with this module's fixtures)

import copy

import gymnasium as gym
import numpy as np
import pytest

from tests.agents.contract.conftest import TRAINED, Maker, taken
from tests.agents.contract.environments import SEEN, CountingEnv, Timed
from tests.agents.contract.probes import assert_same, assert_same_agents
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
from tests.agents.contract.test_seeds import (
    test_another_agent_made_in_between_changes_nothing,
    test_no_seed_differs,
    test_same_seed_same_bits_and_another_seed_others,
)

TAKEN = taken(SEEN)


def test_dreamer_takes_all_of_them():
    assert {kind for name, kind in TAKEN if name == "dreamer"} == set(SEEN)


@pytest.fixture(scope="session", params=TAKEN, ids="-".join)
def make(request):
    name, kind = request.param
    return Maker(name, SEEN[kind])


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


@pytest.fixture(scope="session")
def observations(make):
    """20 observations in a batch, as a VecEnv returns them."""
    rng, env = np.random.default_rng(0), make.see(CountingEnv())
    numbers = rng.uniform([1, 0, -2, 0], [5, 7, 4, 1], (20, 4)).astype(np.float32)
    seen = [env.observation(one) for one in numbers]
    if isinstance(seen[0], dict):
        return {name: np.stack([one[name] for one in seen]) for name in seen[0]}
    return np.stack(seen)


def test_predictions_of_one_and_of_many_agree(make, trained, observations):
    batch, _ = trained.predict(observations, deterministic=True)
    assert batch.shape == (20, 2) and len(np.unique(batch[:, 0])) > 1
    for i, expected in enumerate(batch):
        one = observations
        one = {k: v[i] for k, v in one.items()} if isinstance(one, dict) else one[i]
        found, _ = trained.predict(one, deterministic=True)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_an_image_in_0_to_1_is_refused_and_one_of_floats_to_255_taken(make, trained, observations):
    """A camera of one's own may scale its images, and the agent would see next to nothing."""
    parts = observations if isinstance(observations, dict) else {"": observations}
    images = {name for name, part in parts.items() if part.dtype == np.uint8}
    for name in images:

        def seen(image, name=name):
            return {**parts, name: image} if name else image

        floats = parts[name].astype(np.float32)
        with pytest.raises(ValueError, match=r"as numbers up to [01].*\(255 \* image\)"):
            trained.predict(seen(floats / 255))
        for image in (floats, 0 * floats):
            expected, _ = trained.predict(seen(image.astype(np.uint8)), deterministic=True)
            found, _ = trained.predict(seen(image), deterministic=True)
            np.testing.assert_array_equal(found, expected)
    assert bool(images) == (make.see is not Timed)


def test_an_environment_that_writes_into_one_array_is_learned_from_alike(make, trained):
    """Its terminal observations are copied before the next reset overwrites them."""

    class Reusing(gym.Wrapper):
        held = None

        def _own(self, observation):
            if not isinstance(observation, dict):
                return observation
            if self.held is None:
                self.held = {name: np.array(part) for name, part in observation.items()}
            for name, part in observation.items():
                self.held[name][...] = part
            return self.held

        def reset(self, **kwargs):
            observation, info = self.env.reset(**kwargs)
            return self._own(observation), info

        def step(self, action):
            observation, *rest = self.env.step(action)
            return (self._own(observation), *rest)

    agent = make(Reusing(make.see(CountingEnv()))).learn(TRAINED)
    assert_same_agents(agent, trained)
