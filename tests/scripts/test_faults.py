"""Faults during training: a one-line error, an exit code, and a checkpoint to resume from."""

import csv
import signal
import subprocess
import sys
import textwrap
import time

import gymnasium as gym
import numpy as np
import pytest
import torch

from tests.scripts import forked
from totalprop.agents import DAAPPO, DreamerTPX
from totalprop.agents.dreamer.presets import PRESETS
from totalprop.scripts import train
from totalprop.scripts.reliability import kill_test
from totalprop.scripts.run.environments import make_env
from totalprop.scripts.run.watchdog import HUNG, Watchdog

BROKEN = textwrap.dedent("""
    import time
    import gymnasium as gym
    import numpy as np

    class Broken(gym.Env):
        observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
        action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
        fault, at, steps, is_put_back = "", 45, 0, False

        def __init__(self, fault="", render_mode=None):
            self.fault, self.render_mode, self.t = fault, render_mode, 0

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.t = 0
            return np.zeros(2, np.float32), {}

        def step(self, action):
            Broken.steps += 1
            self.t += 1
            observation, reward = np.full(2, self.t / 10, np.float32), 0.5
            if Broken.steps >= self.at:
                if self.fault == "raises":
                    raise KeyError("the motor is on fire")
                if self.fault == "shape":
                    observation = np.zeros(3, np.float32)
                if self.fault == "nan":
                    observation[0] = np.nan
                if self.fault == "reward":
                    reward = float("inf")
                if self.fault == "hangs" or (self.fault == "extra" and self.is_put_back):
                    time.sleep(60)
            return observation, reward, False, self.t >= 10, {}

        def get_state(self):
            return {"t": self.t}

        def set_state(self, state):
            self.t, self.is_put_back = state["t"], True

    gym.register("Broken-v0", Broken, disable_env_checker=True)
""")
TINY = ["pipps", "--gradient-steps", "1", "--n-particles", "6", "--gp-evaluations", "2"]
COMMON = ["--threads", "1", "--no-progress", "--no-tensorboard", "--eval-episodes", "2"]
COMMON += ["--env-id", "broken_env:Broken-v0", "--checkpoint-seconds", "0"]
TINY += [*COMMON, "--horizon", "3"]


@pytest.fixture
def broken(tmp_path, monkeypatch):
    (tmp_path / "broken_env.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(tmp_path)  # a forked process has its parent's path
    return tmp_path


@pytest.mark.parametrize(
    ("fault", "words", "code"),
    [
        ("raises", "KeyError: 'the motor is on fire'", 1),
        ("shape", "(3,)", 1),
        ("nan", "non-finite number(s) in the observation", 1),  # an evaluation is first to see it
        ("reward", "non-finite reward at step", 1),
        ("hangs", "env.step has not returned for 1 s", HUNG),
    ],
)
def test_a_broken_environment(fault, words, code, broken):
    command = [*TINY, "--total-timesteps", "100", "--step-timeout", "1"]
    command += ["--env-arg", f"fault={fault}", "--runs", str(broken), "--name", "run"]
    done = forked.run("totalprop.scripts.train", command)
    assert done.returncode == code
    error = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and words in error[0] and "Traceback" not in done.stderr
    assert list((broken / "run" / "checkpoints").glob("checkpoint_*"))


def test_an_extra_step_that_hangs(broken):
    command = ["daappo", "--action-source", "rewind"]
    command += ["--n-steps", "10", "--batch-size", "10", "--n-epochs", "1", "--n-extra-actions"]
    command += ["1", "--simulation-horizon", "2", *COMMON, "--env-arg", "fault=extra"]
    command += ["--total-timesteps", "100", "--runs", str(broken), "--step-timeout", "1"]
    done = forked.run("totalprop.scripts.train", command)
    assert done.returncode == HUNG
    assert "env.extra_step has not returned for 1 s" in done.stderr


def test_a_process_that_is_stopped_for_longer_than_the_limit_goes_on():
    """Its step takes 1 s of 2; then it is stopped for 4 s."""
    code = (
        "import time; from totalprop.scripts.run.watchdog import Watchdog\n"
        "with Watchdog(2.0).watching('env.step'):\n"
        "    print('begun', flush=True); time.sleep(1.0)\n"
        "time.sleep(0.5); print('ended')"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(4.0)
    process.send_signal(signal.SIGCONT)
    assert process.communicate()[0] == "ended\n" and process.returncode == 0


def test_everything_that_rewinding_calls_is_watched(monkeypatch):
    env = make_env("totalprop/CartPoleSwingUp-v0", {}, seed=0, step_timeout=100)
    seen, watching = [], Watchdog.watching
    monkeypatch.setattr(
        Watchdog, "watching", lambda self, what: seen.append(what) or watching(self, what)
    )
    env.reset()
    (start,) = env.env_method("snapshot")
    env.env_method("extra_step", np.zeros(1, np.float32))
    env.env_method("restore", start)
    assert seen == [f"env.{name}" for name in ("reset", "snapshot", "extra_step", "restore")]
    plain = make_env("InvertedPendulum-v5", {}, seed=0, step_timeout=100)
    with pytest.raises(AttributeError):  # so a checkpoint knows that it cannot be restored
        plain.env_method("snapshot")


class OutOfMemory(torch.OutOfMemoryError):
    pass


SHORT_DREAMER = [*kill_test.small_run("dreamer", total_timesteps=120), *kill_test.COMMON]
SHORT_DREAMER += ["--learning-rate-schedule", "linear"]


@pytest.fixture(scope="module")
def quiet_run(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    train.main([*SHORT_DREAMER, "--runs", str(runs), "--name", "quiet"])
    return runs / "quiet"


def test_a_falling_step_size_is_logged(quiet_run):
    with open(quiet_run / "progress.csv", newline="") as file:
        rates = [row["train/learning_rate"] for row in csv.DictReader(file)]
    rates = [float(rate) for rate in rates if rate]  # evaluations have separate rows
    assert rates == sorted(rates, reverse=True) and 0 < rates[-1] < rates[0]
    assert rates[0] == PRESETS["recommended"]["learning_rate"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "--batch-size"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (EOFError(), "EOFError"),
        (RuntimeError("kernel matrix of 3 points"), "kernel matrix"),
    ],
)
def test_a_fault_while_learning_is_one_sentence_and_the_run_goes_on(
    error, words, quiet_run, tmp_path, capsys, monkeypatch
):
    calls = []

    def fail(agent, *steps, learn=DreamerTPX.train):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return learn(agent, *steps)

    with monkeypatch.context() as patch:
        patch.setattr(DreamerTPX, "train", fail)
        with pytest.raises(SystemExit) as stop:
            train.main([*SHORT_DREAMER, "--runs", str(tmp_path), "--name", "failed"])
    output = capsys.readouterr().err
    assert stop.value.code == 1 and words in output and "Traceback" not in output
    train.main(["--resume", str(tmp_path / "failed")])
    assert kill_test.differences("dreamer", quiet_run, tmp_path / "failed") == []


@pytest.mark.parametrize(
    ("agent", "flag"), [("dreamer", "--buffer-size"), ("daappo", "--dynamics-buffer-size")]
)
def test_a_buffer_larger_than_the_memory_leaves_nothing(agent, flag, tmp_path, capsys):
    command = [agent, "--env-id", "Pendulum-v1", flag, str(10**14)]
    command += ["--no-progress", "--no-tensorboard", "--threads", "1", "--runs", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        train.main(command)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.startswith("error: out of memory: ")
    assert error.count("\n") == 1 and flag in error
    assert "--resume" not in error and "TRACEBACK" not in error
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_had_begun_is_kept_when_memory_runs_out(tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise MemoryError("no more")

    monkeypatch.setattr(DreamerTPX, "train", fail)
    command = [*kill_test.small_run("dreamer"), *kill_test.COMMON, "--runs", str(tmp_path)]
    with pytest.raises(SystemExit):
        train.main([*command, "--name", "run"])
    assert "out of memory: no more" in capsys.readouterr().err
    assert list((tmp_path / "run" / "checkpoints").iterdir())


TINY_DREAMER = {
    "learning_starts": 20, "sequence_length": 6, "batch_size": 3, "imagination_starts": 4,
    "horizon": 3, "train_freq": 10, "gradient_steps": 2, "buffer_size": 100, "device": "cpu",
    "policy_kwargs": {"stoch": 3, "deter": 5, "hidden": 5, "width": 5},
}  # fmt: skip


def test_tensorboard_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", "events.out")

    monkeypatch.setattr("stable_baselines3.common.logger.SummaryWriter", refuse)
    command = [*kill_test.small_run("pipps"), "--tensorboard", "--runs", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        train.main(command)
    assert stop.value.code == 1 and "Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
def test_a_gradient_that_is_not_finite(nonfinite):
    agent = DreamerTPX("DreamerPolicy", "Pendulum-v1", nonfinite=nonfinite, **TINY_DREAMER)
    agent.learn(20)
    with torch.no_grad():
        next(agent.policy.critic.parameters())[0, 0] = np.inf
    if nonfinite == "stop":
        with pytest.raises(FloatingPointError, match=r"gradient was not finite at step 30, update"):
            agent.learn(20, reset_num_timesteps=False)
    else:
        agent.learn(20, reset_num_timesteps=False)
        assert agent.num_timesteps == 40


def test_a_ppo_that_diverges_stops():
    env = gym.make("Pendulum-v1")
    agent = DAAPPO("MlpPolicy", env, action_source="none", n_steps=32, batch_size=16, device="cpu")
    agent.learn(32)
    with torch.no_grad():
        agent.policy.value_net.bias.fill_(torch.nan)
    with pytest.raises((FloatingPointError, ValueError), match=r"not finite|nan|invalid"):
        agent.learn(32, reset_num_timesteps=False)
