"""`AGENTS`: a package and a line in the registry are all that an agent needs."""

import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback

import totalprop
from totalprop import agents
from totalprop.agents import AGENTS
from totalprop.agents.core.algorithm import Algorithm
from totalprop.agents.core.entry import AgentEntry
from totalprop.scripts import train
from totalprop.scripts.bench import checkpoint as bench_checkpoint
from totalprop.scripts.reliability import kill_test, soak
from totalprop.scripts.run import entry_runs, report
from totalprop.scripts.run.arguments import parse
from totalprop.scripts.studies import sweep

ROOT = Path(__file__).parents[2]


class Fake(Algorithm, PPO):
    """PPO under another name.

    Args:
        policy: "MlpPolicy".
        learning_rate: Adam's step size.
        n_steps: steps of a rollout.
    """

    def __init__(
        self, policy: str = "MlpPolicy", env=None, learning_rate: float = 3e-4, *,
        n_steps: int = 16, seed: int | None = None, device: str = "auto",
        policy_kwargs: dict | None = None, verbose: int = 0, _init_setup_model: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(
            policy, env, learning_rate, n_steps, batch_size=n_steps, n_epochs=1, seed=seed,
            device=device, policy_kwargs=policy_kwargs, verbose=verbose,
            _init_setup_model=_init_setup_model,
        )  # fmt: skip


class Counter(BaseCallback):
    """A callback with a state."""

    count = 0

    def _on_step(self):
        self.count += 1
        return True

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def write_sketch(agent, folder):
    (folder / "sketch.txt").write_text(type(agent).__name__)
    return [folder / "sketch.txt"]


COUNTERS = []
CART_POLE = "totalprop/CartPoleSwingUp-v0"
RUN = {"total_timesteps": 32, "eval_episodes": 2, "eval_every": 32, "env_id": CART_POLE}


@pytest.fixture
def fake(monkeypatch):
    """A package totalprop.agents.fake, and its line in the registry."""

    def callbacks(total_timesteps):
        assert total_timesteps == 32
        COUNTERS.append(Counter())
        return {"counter": COUNTERS[-1]}

    package = types.ModuleType("totalprop.agents.fake")
    package.Fake = Fake
    package.ENTRY = AgentEntry(
        Fake,
        run={"env_id": CART_POLE, "total_timesteps": 32},
        presets={"short": {"n_steps": 8}},
        quantity="cost",
        named_by=("n_steps",),
        callbacks=callbacks,
        pictures=write_sketch,
        small_run=RUN,
        kill_test_factor=3,
        long_run={"preset": "short", "env_arg": ["noise=4"], "total_timesteps": 1000},
    )
    monkeypatch.setitem(sys.modules, "totalprop.agents.fake", package)
    monkeypatch.setitem(AGENTS.class_names, "fake", "Fake")
    return "fake"


def test_a_new_agent_is_listed_and_has_its_public_name(fake):
    assert "fake" in AGENTS and AGENTS["fake"].cls is agents.Fake is totalprop.Fake is Fake


def test_a_new_agent_is_trained_resumed_and_drawn(fake, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "record_gif", lambda *_, **__: None)  # as slow as all the rest
    command = entry_runs.command(fake, RUN)
    command += ["--threads", "1", "--no-progress", "--checkpoint-seconds", "0"]
    train.main([*command, "--preset", "short", "--runs", str(tmp_path)])
    out = capsys.readouterr().out
    assert f"Training fake (8) on {CART_POLE}" in out and "sketch.txt" in out
    folder = tmp_path / "fake_CartPoleSwingUp-v0_8_seed0"
    assert (folder / "sketch.txt").read_text() == "Fake" and COUNTERS[-1].count == 32
    assert "final_cost" in json.loads((folder / "summary.json").read_text())
    assert Fake.load(folder / "model.zip", device="cpu").num_timesteps == 32
    (folder / "summary.json").unlink()
    train.main(["--resume", str(folder)])
    assert "after 32 steps" in capsys.readouterr().out and COUNTERS[-1].count == 32


@pytest.mark.parametrize("main", [sweep.main, kill_test.main, soak.main])
def test_scripts_offer_a_new_agent(fake, main, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert re.search(r"\{.*fake.*\}", capsys.readouterr().out)


def test_the_new_agents_runs_are_those_of_its_entry(fake):
    command = kill_test.small_run(fake, total_timesteps=96)
    assert command[:3] == ["fake", "--total-timesteps", "96"] and "--eval-every" in command
    assert soak.long_run(fake) == [
        "fake", "--preset", "short", "--env-arg", "noise=4", "--total-timesteps", "1000"
    ]  # fmt: skip
    agent = entry_runs.untrained(fake, AGENTS[fake].long_run)
    assert type(agent) is Fake and agent.n_steps == 8
    assert fake not in bench_checkpoint.TRAINED  # measured in its long run


@pytest.mark.parametrize("agent", AGENTS)
@pytest.mark.parametrize("kind", ["small_run", "long_run"])
def test_the_runs_of_an_entry_are_command_lines(agent, kind):
    entry = AGENTS[agent]
    options = getattr(entry, kind)
    job = parse(entry_runs.command(agent, options), usage="")
    assert job.agent == agent and job.options.total_timesteps == options["total_timesteps"]
    assert all(name in job.arguments for name in entry.named_by)
    assert not entry.rewinds(job.arguments)


def test_make_installs_the_control_suite_for_the_agents_that_train_in_it():
    line = "print-dmc:\n\t@echo '$(DMC_AGENTS)'\n"
    command = ["make", "-s", "-f", "Makefile", "-f", "-", "print-dmc"]
    done = subprocess.run(command, input=line, capture_output=True, text=True, cwd=ROOT)
    expected = {name for name in AGENTS if AGENTS[name].run["env_id"].startswith("dmc/")}
    assert set(done.stdout.split()) == expected, done.stderr


def test_the_readme_has_every_agent():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, cls in AGENTS.class_names.items():
        assert f"`{cls}`" in text, f"README's table of agents lacks {name}"
