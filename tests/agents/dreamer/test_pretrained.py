"""`pretrained_world_model`: the file's model, all else fresh; wrong files are named."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from totalprop.agents import PIPPS, DreamerTPX

TINY = {
    "policy_kwargs": {"deter": 8, "hidden": 8, "width": 8, "stoch": 4},
    "sequence_length": 5,
    "batch_size": 3,
    "horizon": 3,
    "learning_starts": 20,
    "train_freq": 10,
    "gradient_steps": 1,
    "buffer_size": 500,
    "seed": 0,
    "device": "cpu",
}


class Walk(gym.Env):
    observation_space = spaces.Box(-9, 9, (2,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.time += 1
        return np.full(2, action[0], np.float32), 0.0, False, self.time == 10, {}


def make(**changes):
    return DreamerTPX("DreamerPolicy", Walk(), **{**TINY, **changes})


def weights(module):
    return torch.nn.utils.parameters_to_vector(module.parameters()).detach().clone()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    agent = make(seed=1).learn(60)
    agent.save(folder / "model.zip")
    return agent, folder


@pytest.mark.parametrize("name", ["", "model.zip", "model"])  # as `save` and `load` take them
def test_the_model_is_the_file_s_and_the_rest_is_fresh(trained, name):
    other, folder = trained
    agent = make(pretrained_world_model=str(folder / name))
    assert torch.equal(weights(agent.policy.model), weights(other.policy.model))
    fresh = make()
    for part in ("actor", "critic"):
        assert torch.equal(
            weights(getattr(agent.policy, part)), weights(getattr(fresh.policy, part))
        )
    before = weights(agent.policy.model)
    agent.learn(60)
    assert not torch.equal(weights(agent.policy.model), before)  # it keeps learning


def test_only_one_of_the_two_may_have_a_discount_head(trained, tmp_path):
    """Without one, what the other has is not used; a model that has one keeps its fresh head."""
    other, folder = trained
    agent = make(pretrained_world_model=str(folder), discount_head=False)
    assert torch.equal(weights(agent.policy.model.rssm), weights(other.policy.model.rssm))
    agent.save(tmp_path / "without")
    agent, fresh = make(pretrained_world_model=str(tmp_path / "without")), make()
    assert torch.equal(weights(agent.policy.model.rssm), weights(other.policy.model.rssm))
    head = weights(fresh.policy.model.discount_head)
    assert torch.equal(weights(agent.policy.model.discount_head), head)


def test_a_saved_agent_loads_when_the_file_is_gone(trained, tmp_path):
    _, folder = trained
    copy = tmp_path / "model.zip"
    copy.write_bytes((folder / "model.zip").read_bytes())
    agent = make(pretrained_world_model=str(copy)).learn(30)
    agent.save(tmp_path / "second.zip")
    copy.unlink()
    loaded = DreamerTPX.load(tmp_path / "second.zip")
    assert torch.equal(weights(loaded.policy), weights(agent.policy))


def test_wrong_files_are_one_sentence(trained, tmp_path):
    _, folder = trained
    (tmp_path / "text.zip").write_text("no model")
    PIPPS("RBFPolicy", Walk(), cost_fn=lambda s: s.sum(-1)).save(tmp_path / "pipps.zip")
    bigger = {"policy_kwargs": {**TINY["policy_kwargs"], "deter": 9}}
    cases = [
        (tmp_path / "absent", {}, "does not exist; pass a run folder"),
        (tmp_path / "text.zip", {}, "is not a saved DreamerTPX"),
        (tmp_path / "pipps.zip", {}, "it holds a PIPPS model, not a DreamerTPX"),
        (
            folder,
            bigger,
            r"\d+\] in the file, \[\d+.*use the environment, preset and policy_kwargs",
        ),
    ]
    for path, changes, message in cases:
        with pytest.raises(ValueError, match=message):
            make(pretrained_world_model=str(path), **changes)
