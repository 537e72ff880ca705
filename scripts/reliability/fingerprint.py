"""Hash the results of seeded runs, to verify that a code change leaves every bit the same.

totalprop fingerprint --out before.json        # on the old commit
totalprop fingerprint --compare before.json    # on the new commit; exit code 1 if bits differ
totalprop fingerprint --compare before.json --only dreamer    # only settings named like this

Every entry gets a hash of its own: what `save` and a checkpoint write (parameters, optimisers,
attributes, rows of the replay), what was logged except wall-clock times, and all generators. Use
the same CPU for both: on another CPU the same seed gives different bits.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

import totalprop.envs  # noqa: F401  (registers our environments)
import totalprop.estimators as estimators
from totalprop.agents import DAAPPO, PIPPS, DreamerTPX
from totalprop.agents.persistence import safe_file
from totalprop.agents.persistence.checkpoint import Checkpoints
from totalprop.agents.persistence.safe_file import write_text
from totalprop.envs.rewind import Rewindable
from totalprop.scripts.commands import parser_of

FORMAT = 2  # of the JSON file; 1 had no "format" and hashed less
PENDULUM, CARTPOLE = "Pendulum-v1", "totalprop/CartPoleSwingUp-v0"
STEPS = 90  # environment steps in each run
Make = Callable[[], Any]

# Entries whose values depend on the clock, or on where the temporary folder is.
VARIES = re.compile(r"time/|\.start_time$|ep_info_buffer\.\d+\.t$|\.pretrained_world_model$")
TOKEN = re.compile(r"_[0-9a-f]{8}(?=\.zip)")  # random, in the names of segments
# In the repr of a function its address, in that of an estimator the paper it cites.
PROSE = re.compile(r" at 0x[0-9a-f]+|, source='[^']*'")


# ----------------------------------------------------------------------------------------
# the agents
# ----------------------------------------------------------------------------------------


def _pipps(env: Any = CARTPOLE, policy: str = "RBFPolicy", **changes: Any) -> PIPPS:
    kwargs = {"n_centres": 5} if policy == "RBFPolicy" else {}
    sizes: dict[str, Any] = {
        "n_particles": 20, "horizon": 4, "gradient_steps": 8, "gp_evaluations": 10,
        "policy_kwargs": kwargs,
    }  # fmt: skip
    return PIPPS(policy, env, seed=3, device="cpu", **{**sizes, **changes})


def _dreamer(env: Any = PENDULUM, **changes: Any) -> DreamerTPX:
    sizes: dict[str, Any] = {
        "learning_starts": 30, "train_freq": 20, "gradient_steps": 2, "batch_size": 3,
        "sequence_length": 6, "horizon": 4, "buffer_size": 2000,
        "policy_kwargs": {"stoch": 4, "deter": 8, "hidden": 8, "width": 8, "conv_depth": 2},
    }  # fmt: skip
    return DreamerTPX("DreamerPolicy", env, seed=3, device="cpu", **{**sizes, **changes})


_CATEGORICAL = {
    "latent": "categorical", "stoch": 3, "classes": 4, "deter": 8, "hidden": 8, "width": 8,
}  # fmt: skip
# What the preset switches on; its sizes would take minutes.
_RECOMMENDED: dict[str, Any] = {
    "slow_critic_rate": 0.02, "slow_actor_rate": 0.02, "scale_returns": True, "replay_ratio": 2.0,
    "policy_kwargs": {
        "stoch": 4, "deter": 8, "hidden": 8, "width": 8, "layer_norm": True, "init_std": 1.0,
        "reward_head": "two-hot", "critic_head": "two-hot",
    },
}  # fmt: skip


def _pretrained() -> DreamerTPX:
    with tempfile.TemporaryDirectory() as folder:
        _dreamer().learn(STEPS).save(Path(folder) / "model.zip")
        return _dreamer(pretrained_world_model=folder)


def _daappo(env: Any = PENDULUM, policy: str = "MlpPolicy", **changes: Any) -> DAAPPO:
    sizes: dict[str, Any] = {
        "n_steps": 32, "batch_size": 16, "n_epochs": 2, "dynamics_width": 8,
        "n_extra_actions": 3, "simulation_horizon": 3, "dynamics_batch_size": 16,
        "policy_kwargs": {"net_arch": [8]},
    }  # fmt: skip
    return DAAPPO(policy, env, seed=3, device="cpu", **{**sizes, **changes})


class _Pictures(gym.ObservationWrapper):
    """Pendulum with 64x64 images that are cheap to compute."""

    def __init__(self) -> None:
        super().__init__(gym.make(PENDULUM))
        self.observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        """Encode the three observations as one uniform colour."""
        colour = np.clip(128 + 60 * observation, 0, 255).astype(np.uint8)
        return np.broadcast_to(colour, (64, 64, 3)).copy()


def _rewindable(env_id: str) -> Any:
    """An environment whose episodes continue when a checkpoint is resumed."""
    return make_vec_env(lambda **_: Rewindable(gym.make(env_id)), 2)


def _biw() -> estimators.Estimator:
    return estimators.make("tp", legs=(estimators.legs.biw,), baseline=estimators.baselines.none)


# ----------------------------------------------------------------------------------------
# the runs
# ----------------------------------------------------------------------------------------


class _Log(KVWriter):
    """All that is logged: per name the steps and values, without values that are not numbers."""

    def __init__(self) -> None:
        self.values: dict[str, list[Any]] = {}

    def write(
        self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0
    ) -> None:
        for name, value in key_values.items():
            is_number = isinstance(value, int | float | np.number)
            entry = float(value) if is_number else type(value).__name__
            self.values.setdefault(name, []).append((step, entry))

    def close(self) -> None:
        """Do nothing; there is nothing to close."""


def _learn(agent: Any, log: _Log, **how: Any) -> Any:
    agent.set_logger(Logger(None, [log]))
    agent.learn(STEPS, **how)
    agent.logger.dump(agent.num_timesteps)  # what was recorded since the last dump
    return agent


class Run:
    """Make an agent and train it."""

    def __init__(self, make: Make) -> None:
        self.make = make

    def __call__(self, log: _Log, folder: Path) -> Any:
        """The trained agent."""
        return _learn(self.make(), log)


class Loaded(Run):
    """Train, save, load in new environments, train on."""

    def __call__(self, log: _Log, folder: Path) -> Any:
        """The loaded agent."""
        agent = super().__call__(log, folder)
        agent.save(folder / "model.zip")
        agent = type(agent).load(folder / "model.zip", env=self.make().env, device="cpu")
        return _learn(agent, log, reset_num_timesteps=False)


class Resumed(Run):
    """Train to a checkpoint, resume it in new environments."""

    def __call__(self, log: _Log, folder: Path) -> Any:
        """The resumed agent."""
        first = _learn(self.make(), log, callback=Checkpoints(folder))
        checkpoints = Checkpoints(folder)
        agent: Any = checkpoints.load(type(first), self.make().env, "cpu")
        checkpoints.restore(agent)
        return _learn(agent, log, callback=checkpoints, reset_num_timesteps=False)


SETTINGS: dict[str, Make | Run] = {
    **{f"pipps {name}": partial(_pipps, estimator=name)
       for name in ("rp", "lr", "tp", "tps", "tpx", "tpg", "ivw", "gr", "rp-fs", "gr-fs")},
    "pipps biw leg": lambda: _pipps(leg="biw"),
    "pipps cross_fit": lambda: _pipps(cross_fit=True),
    "pipps Estimator": lambda: _pipps(estimator=_biw()),
    "pipps rmsprop2018": lambda: _pipps(optimizer="rmsprop2018", learning_rate=5e-4),
    "pipps momentum": lambda: _pipps(optimizer="rmsprop2018", learning_rate=1e-3, momentum=0.5),
    "pipps quasi-newton": lambda: _pipps(estimator="rp-fs", optimizer="quasi-newton"),
    "pipps mean model": lambda: _pipps(model_uncertainty=False, adam_eps=1e-3),
    "pipps two random trials": lambda: _pipps(random_trials=2),
    "pipps linear": lambda: _pipps(policy="LinearPolicy"),
    "pipps angle": lambda: _pipps(angle_dims=(1,)),
    "pipps rewards": lambda: _pipps(PENDULUM, max_points=40),
    "pipps cost_fn": lambda: _pipps(PENDULUM, cost_fn=lambda x: x.square().sum(-1)),
    "pipps two envs": lambda: _pipps(make_vec_env(CARTPOLE, 2), noise_multiplier=4.0),
    "pipps schedule": lambda: _pipps(learning_rate=LinearSchedule(0.03, 0.0, 1.0)),
    "pipps integrated": lambda: _pipps(speed_integration="on", kernel="rbf+linear"),
    "pipps dropout": lambda: _pipps(dropout=0.25, noise_stop=2.0, gradient_steps=60),
    "pipps loaded": Loaded(_pipps),
    "pipps resumed": Resumed(lambda: _pipps(_rewindable(CARTPOLE))),
    **{f"dreamer {name}": partial(_dreamer, estimator=name)
       for name in ("rp", "lr", "tp", "tps", "tpx", "tpg", "ivw")},
    "dreamer critic": lambda: _dreamer(baseline="critic"),
    "dreamer open": lambda: _dreamer(stop_grad_actor_input=False, entropy_scale=0.1),
    "dreamer discount": lambda: _dreamer(discount_head=True, imagination_starts=7),
    "dreamer unweighted": lambda: _dreamer(discount_weights=False, kl_scale=0.5, lam=0.8),
    "dreamer disk": lambda: _dreamer(storage="disk", free_nats_per_step=True),
    "dreamer device": lambda: _dreamer(storage="device", exploration_noise=0.0),
    "dreamer full ring": lambda: _dreamer(buffer_size=40),
    "dreamer pixels": lambda: _dreamer(_Pictures()),
    "dreamer two envs": lambda: _dreamer(make_vec_env(PENDULUM, 2), nonfinite="skip"),
    "dreamer schedule": lambda: _dreamer(learning_rate=LinearSchedule(1e-3, 0.0, 1.0)),
    "dreamer bf16": lambda: _dreamer(bf16=True),
    **{f"dreamer {node} {name}": partial(_dreamer, node=node, estimator=name)
       for node, name in (("action", "lr"), ("action", "tps"), ("both", "tpx"))},
    **{f"dreamer choices {name}": partial(_dreamer, "CartPole-v1", estimator=name)
       for name in ("lr", "tpx")},
    **{f"dreamer categorical {name}": partial(_dreamer, estimator=name, policy_kwargs=_CATEGORICAL)
       for name in ("rp", "tpx", "tpg")},
    "dreamer recommended": lambda: _dreamer(**_RECOMMENDED),
    "dreamer recommended resumed": Resumed(lambda: _dreamer(_rewindable(CARTPOLE), **_RECOMMENDED)),
    "dreamer pretrained": _pretrained,
    "dreamer loaded": Loaded(_dreamer),
    "dreamer resumed": Resumed(lambda: _dreamer(_rewindable(CARTPOLE))),
    "dreamer resumed, episodes cut": Resumed(lambda: _dreamer(storage="disk")),
    **{f"daappo {name}": partial(_daappo, action_source=name)
       for name in ("none", "dynamics", "q", "states")},
    "daappo rewind": lambda: _daappo(Rewindable(gym.make(CARTPOLE)), action_source="rewind"),
    "daappo tpx": lambda: _daappo(estimator="tpx", normalize_advantage=False),
    "daappo rp q": lambda: _daappo(action_source="q", estimator="rp", n_q=1),
    "daappo tpx q": lambda: _daappo(action_source="q", estimator="tpx", n_q=3),
    "daappo others": lambda: _daappo(extra_baseline="leave-one-out", clip_range_vf=0.2),
    "daappo matched": lambda: _daappo(real_advantage="matched_horizon", timeout_bootstrap=False),
    "daappo clips": lambda: _daappo(action_source="none", separate_grad_clip=True),
    "daappo clips model": lambda: _daappo(separate_grad_clip=True, ent_coef=0.01, target_kl=0.01),
    "daappo growing": lambda: _daappo(grow_fraction=0.8, dynamics_warmup=32),
    "daappo tanh": lambda: _daappo(policy="TanhMeanPolicy", dynamics_target="next"),
    "daappo raw": lambda: _daappo(
        dynamics_normalise=False, dynamics_activation="leaky_relu", dynamics_target="next",
        dynamics_steps=3, dynamics_buffer_size=50,
    ),
    "daappo warm-up q": lambda: _daappo(action_source="q", dynamics_warmup=40),
    "daappo relu": lambda: _daappo(policy_kwargs={"net_arch": [8], "activation_fn": nn.ReLU}),
    "daappo schedules": lambda: _daappo(
        learning_rate=LinearSchedule(1e-3, 0.0, 1.0), clip_range=LinearSchedule(0.3, 0.1, 0.5)
    ),
    "daappo normalised": lambda: _daappo(VecNormalize(make_vec_env(PENDULUM, 2))),
    "daappo loaded": Loaded(_daappo),
    "daappo resumed": Resumed(lambda: _daappo(VecNormalize(_rewindable(CARTPOLE)))),
    "daappo rewind resumed": Resumed(
        lambda: _daappo(VecNormalize(_rewindable(CARTPOLE)), action_source="rewind")
    ),
}  # fmt: skip


# ----------------------------------------------------------------------------------------
# hashes
# ----------------------------------------------------------------------------------------


def fingerprint(setting: Make | Run) -> dict[str, str]:
    """Train a new agent and hash its state, file, log and all generators.

    Args:
        setting: () -> a seeded agent, or how to train one.
    Returns:
        Path of the entry -> hash; "attributes.NAME" -> nothing more, for each name the agent has.
    """
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (stable-baselines3 draws from it)
    torch.manual_seed(0)
    run, log = setting if isinstance(setting, Run) else Run(setting), _Log()
    with tempfile.TemporaryDirectory() as run_folder, tempfile.TemporaryDirectory() as folder:
        agent = run(log, Path(run_folder))
        found: dict[str, Any] = {
            "file": agent.file_values(),
            "training": agent.state_dict(Path(folder)),
            "segments": _contents(Path(folder)),
            "checkpoints": _contents(Path(run_folder), "checkpoint_*.zip"),
            "log": log.values,
            "generators": {
                "python": random.getstate(),
                "numpy": np.random.get_state(),  # noqa: NPY002
                "torch": torch.get_rng_state(),
            },
        }
    hashes = {
        name: "varies" if VARIES.search(name) else _hash(value)
        for part, values in found.items()
        for name, value in _leaves(values, part)
    }
    return {**hashes, **{f"attributes.{name}": "a name" for name in vars(agent)}}


def _contents(folder: Path, pattern: str = "*.zip") -> dict[str, Any]:
    """What is in the files, whose bytes hold times and random names."""
    return {TOKEN.sub("", path.name): safe_file.read(path) for path in folder.glob(pattern)}


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The entries of nested containers, each with its path; a list of numbers is one entry."""
    if isinstance(value, dict) and value:
        for key, entry in value.items():
            yield from _leaves(entry, f"{name}.{key}")
    elif isinstance(value, list | tuple | deque) and not _is_plain(value):
        for index, entry in enumerate(value):
            yield from _leaves(entry, f"{name}.{index}")
    else:
        yield name, value


def _is_plain(value: Any) -> bool:
    """Whether `repr` says all of it."""
    if isinstance(value, list | tuple | deque):
        return all(_is_plain(entry) for entry in value)
    return value is None or isinstance(value, bool | int | float | str)


def _hash(value: Any) -> str:
    """Hash of a tensor or array with its type and shape, of a class's name, or of the repr."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        raw = value.reshape(-1).view(torch.uint8).numpy().tobytes()  # NumPy has no bfloat16
        data = f"{value.dtype} {tuple(value.shape)} ".encode() + raw
    elif isinstance(value, np.ndarray | np.generic):
        data = f"{value.dtype} {value.shape} ".encode() + value.tobytes()
    elif isinstance(value, type):
        data = value.__name__.encode()  # modules move
    else:
        data = TOKEN.sub("", PROSE.sub("", repr(value))).encode()
    return hashlib.sha256(data).hexdigest()[:16]


# ----------------------------------------------------------------------------------------
# comparison
# ----------------------------------------------------------------------------------------


def _machine() -> str:
    cpu = torch.backends.cpu.get_cpu_capability()
    return f"PyTorch {torch.__version__}, NumPy {np.__version__}, {cpu}"


def differences(before: dict[str, Any], after: dict[str, Any], shown: int = 5) -> list[str]:
    """What differs between two files: up to three lines for each run, with the first entries.

    Raises:
        ValueError: the files are of different formats.
    """
    if before.get("format") != FORMAT:
        raise ValueError(
            f"the file has format {before.get('format', 1)} and this is format {FORMAT}: other "
            "things were hashed; write the file again, with this script on the commit before"
        )
    lines = []
    for name in sorted({*before["runs"], *after["runs"]}):
        old, new = before["runs"].get(name), after["runs"].get(name)
        if old is None or new is None:
            lines.append(f"{name}: only {'after' if old is None else 'before'}")
            continue
        kinds = {
            "differ": [key for key in old if key in new and old[key] != new[key]],
            "only before": [key for key in old if key not in new],
            "only after": [key for key in new if key not in old],
        }
        for kind, keys in kinds.items():
            if keys:
                rest = f" and {len(keys) - shown} more" if len(keys) > shown else ""
                lines.append(f"{name}, {kind}: {', '.join(sorted(keys)[:shown])}{rest}")
    if lines and before["machine"] != after["machine"]:
        lines.append(f"before: {before['machine']}; after: {after['machine']}")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = parser_of("fingerprint")
    options = parser.parse_args(arguments)
    names = [name for name in SETTINGS if options.only in name]
    if not names:
        parser.error(f"--only: no setting contains {options.only!r}")
    before = None
    if options.compare:
        try:  # now, not after all the runs
            before = json.loads(options.compare.read_text())
            differences(before, before)
        except (OSError, ValueError) as error:
            print(f"error: {options.compare}: {error}", file=sys.stderr)
            raise SystemExit(2) from error
    torch.set_num_threads(1)
    after: dict[str, Any] = {"format": FORMAT, "machine": _machine(), "runs": {}}
    for name in names:
        after["runs"][name] = fingerprint(SETTINGS[name])
        print(f"{name}: {len(after['runs'][name])} hashes", flush=True)
    if before is None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.out, json.dumps(after, indent=1) + "\n")
        print(f"{options.out}: {len(names)} runs")
        return
    before["runs"] = {k: v for k, v in before["runs"].items() if options.only in k}
    lines = differences(before, after)
    print("\n".join(lines) or f"{len(names)} runs end in the same bits")
    raise SystemExit(1 if lines else 0)


if __name__ == "__main__":
    main()
