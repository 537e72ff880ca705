"""Whatever a run observes, it trains, is resumed, exported and evaluated from the command line."""

import json

import pytest

from totalprop.agents import DAAPPO
from totalprop.scripts import evaluate, export, train

ENVIRONMENTS = """
import gymnasium as gym
import numpy as np
from gymnasium import spaces

KINDS = {
    "vector": spaces.Box(-5, 5, (3,), np.float32),
    "image": spaces.Box(0, 255, (40, 36, 3), np.uint8),
    "choice": spaces.Discrete(4),
}

class Env(gym.Env):
    action_space = spaces.Discrete(3)

    def __init__(self, kinds):
        parts = {kind: KINDS[kind] for kind in kinds.split("+")}
        self.observation_space = spaces.Dict(parts) if len(parts) > 1 else parts[kinds]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.t = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.t += 1
        return self.observation_space.sample(), float(action == 1), False, self.t >= 10, {}

gym.register("Kinds-v0", Env)
"""
COMMON = ["--env-id", "kinds_env:Kinds-v0", "--threads", "1", "--no-progress", "--no-tensorboard"]
COMMON += ["--total-timesteps", "64", "--eval-every", "64", "--eval-episodes", "2"]
AGENTS = {
    "daappo": ["--action-source", "none", "--n-steps", "32", "--batch-size", "16"],
    "dreamer": [
        *("--preset", "laptop", "--learning-starts", "32", "--sequence-length", "8"),
        *("--batch-size", "4", "--imagination-starts", "8", "--gradient-steps", "1"),
    ],
}
POLICIES = {"vector": "MlpPolicy", "choice": "MlpPolicy", "image": "CnnPolicy"}


@pytest.fixture(autouse=True)
def _kinds_env(tmp_path, monkeypatch):
    (tmp_path / "kinds_env.py").write_text(ENVIRONMENTS)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("kinds", ["vector", "image", "choice", "image+vector+choice"])
@pytest.mark.parametrize("agent", list(AGENTS))
def test_a_run_from_start_to_deployment(agent, kinds, tmp_path, capsys):
    policy = POLICIES.get(kinds, "MultiInputPolicy")
    command = [agent, *AGENTS[agent], *COMMON, "--env-arg", f"kinds={kinds}"]
    if agent == "daappo":
        command += ["--policy", policy]
    train.main([*command, "--runs", str(tmp_path), "--name", "run"])
    run, imports = tmp_path / "run", ["--import", "kinds_env"]
    train.main(["--resume", str(run), "--total-timesteps", "96", *imports])
    assert "    96 real steps: return" in capsys.readouterr().out
    export.main([str(run), "--steps", "12", *imports])
    evaluate.main([str(run), "--episodes", "2", "--no-gif", *imports])
    out = capsys.readouterr().out
    assert out.count("largest difference") == 2 and "over 2 episodes" in out


def test_images_and_choices_are_not_normalised(tmp_path):
    command = ["daappo", *AGENTS["daappo"], *COMMON, "--normalize", "both"]
    for kinds, scaled in (("image+vector+choice", {"vector"}), ("image+choice", set())):
        flags = ["--env-arg", f"kinds={kinds}", "--policy", "MultiInputPolicy"]
        train.main([*command, *flags, "--runs", str(tmp_path), "--name", kinds])
        statistics = json.loads((tmp_path / kinds / "vec_normalize.json").read_text())
        assert (statistics["observation"] or {}).keys() == scaled
        assert statistics["return"]["count"] > 1
        agent = DAAPPO.load(tmp_path / kinds / "model.zip", device="cpu")
        assert "NatureCNN" in str(agent.policy.features_extractor.extractors["image"])
