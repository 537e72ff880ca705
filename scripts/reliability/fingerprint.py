"""Hash the results of seeded runs, to verify that a code change leaves every bit the same.

totalprop fingerprint --out before.json        # on the old commit
totalprop fingerprint --compare before.json    # on the new commit; exit code 1 if bits differ

The hashes cover all parameters, optimiser states and generators; the names of attributes and log
keys are recorded too. Use the same CPU for both: on another CPU the same seed gives different bits.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Sequence
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

import totalprop.envs  # noqa: F401  (registers our environments)
import totalprop.estimators as estimators
from totalprop.agents import DAAPPO, PIPPS, DreamerTPX
from totalprop.envs.rewind import Rewindable

PENDULUM, CARTPOLE = "Pendulum-v1", "totalprop/CartPoleSwingUp-v0"
STEPS = 90  # environment steps in each run


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


def _biw() -> estimators.Estimator:
    return estimators.make("tp", legs=(estimators.legs.biw,), baseline=estimators.baselines.none)


SETTINGS: dict[str, Callable[[], Any]] = {
    **{f"pipps {name}": partial(_pipps, estimator=name)
       for name in ("rp", "lr", "tp", "tps", "tpx", "tpg", "ivw", "gr", "rp-fs", "gr-fs")},
    "pipps biw leg": lambda: _pipps(leg="biw"),
    "pipps cross_fit": lambda: _pipps(cross_fit=True),
    "pipps Estimator": lambda: _pipps(estimator=_biw()),
    "pipps rmsprop2018": lambda: _pipps(optimizer="rmsprop2018", learning_rate=5e-4),
    "pipps linear": lambda: _pipps(policy="LinearPolicy"),
    "pipps angle": lambda: _pipps(angle_dims=(1,)),
    "pipps rewards": lambda: _pipps(PENDULUM, max_points=40),
    "pipps cost_fn": lambda: _pipps(PENDULUM, cost_fn=lambda x: x.square().sum(-1)),
    "pipps two envs": lambda: _pipps(make_vec_env(CARTPOLE, 2), noise_multiplier=4.0),
    "pipps schedule": lambda: _pipps(learning_rate=LinearSchedule(0.03, 0.0, 1.0)),
    **{f"dreamer {name}": partial(_dreamer, estimator=name)
       for name in ("rp", "lr", "tp", "tps", "tpx", "tpg", "ivw")},
    "dreamer critic": lambda: _dreamer(baseline="critic"),
    "dreamer open": lambda: _dreamer(stop_grad_actor_input=False, entropy_scale=0.1),
    "dreamer discount": lambda: _dreamer(discount_head=True, imagination_starts=7),
    "dreamer disk": lambda: _dreamer(storage="disk", free_nats_per_step=True),
    "dreamer pixels": lambda: _dreamer(_Pictures()),
    "dreamer two envs": lambda: _dreamer(make_vec_env(PENDULUM, 2), nonfinite="skip"),
    "dreamer schedule": lambda: _dreamer(learning_rate=LinearSchedule(1e-3, 0.0, 1.0)),
    **{f"daappo {name}": partial(_daappo, action_source=name)
       for name in ("none", "dynamics", "q", "states")},
    "daappo rewind": lambda: _daappo(Rewindable(gym.make(CARTPOLE)), action_source="rewind"),
    "daappo tpx": lambda: _daappo(estimator="tpx", normalize_advantage=False),
    "daappo rp q": lambda: _daappo(action_source="q", estimator="rp", n_q=1),
    "daappo others": lambda: _daappo(extra_baseline="leave-one-out", clip_range_vf=0.2),
    "daappo matched": lambda: _daappo(real_advantage="matched_horizon", timeout_bootstrap=False),
    "daappo clips": lambda: _daappo(action_source="none", separate_grad_clip=True),
    "daappo growing": lambda: _daappo(grow_fraction=0.8, dynamics_warmup=32),
    "daappo tanh": lambda: _daappo(policy="TanhMeanPolicy", dynamics_target="next"),
    "daappo normalised": lambda: _daappo(VecNormalize(make_vec_env(PENDULUM, 2))),
}  # fmt: skip


class _Keys(KVWriter):
    def __init__(self) -> None:
        self.keys: set[str] = set()

    def write(
        self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0
    ) -> None:
        self.keys |= set(key_values)

    def close(self) -> None:
        """Do nothing; there is nothing to close."""


def fingerprint(make: Callable[[], Any]) -> dict[str, str]:
    """Train a new agent and hash its parameters, optimiser states, generators and key names.

    Args:
        make: () -> a seeded agent.
    Returns:
        Name -> hash or list of names.
    """
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  (stable-baselines3 draws from it)
    agent, keys = make(), _Keys()
    agent.set_logger(Logger(None, [keys]))
    agent.learn(STEPS)
    found = {f"parameters {k}": _hash(v) for k, v in _leaves(agent.get_parameters())}
    with tempfile.TemporaryDirectory() as folder:
        state = agent.state_dict(Path(folder))
        files = sorted(
            re.sub(r"_[0-9a-f]{8}\.zip$", "", path.name) for path in Path(folder).iterdir()
        )
    tokenless = re.compile(r"_[0-9a-f]{8}\.zip")
    found |= {
        f"training {k}": _hash(tokenless.sub("", v) if isinstance(v, str) else v)
        for k, v in _leaves(state)
    }
    found["segments"] = " ".join(files)
    found["attributes"] = " ".join(sorted(vars(agent)))
    found["file keys"] = " ".join(sorted(agent.file_values()["attributes"]))
    found["log keys"] = " ".join(sorted(keys.keys))
    found["counters"] = f"{agent.num_timesteps} {agent._n_updates}"
    found["torch generator"] = _hash(torch.get_rng_state())
    found["numpy generator"] = _hash(np.random.get_state(legacy=False)["state"]["key"])  # noqa: NPY002
    return found


def _leaves(value: Any, name: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [leaf for k, v in value.items() for leaf in _leaves(v, f"{name}.{k}")]
    if isinstance(value, list | tuple):
        return [leaf for k, v in enumerate(value) for leaf in _leaves(v, f"{name}.{k}")]
    return [(name, value)]


def _hash(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous().numpy()
    data = value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--out", type=Path, help="write the hashes to this file")
    wanted.add_argument("--compare", type=Path, help="compare with the hashes in this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = {}
    for name, make in SETTINGS.items():
        found[name] = fingerprint(make)
        print(f"{name}: {len(found[name])} hashes", flush=True)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{options.out}: {len(found)} runs")
        return
    before = json.loads(options.compare.read_text())
    differences = [
        f"{name}: {what}"
        for name in sorted({*before, *found})
        for what in sorted({*before.get(name, {}), *found.get(name, {})})
        if before.get(name, {}).get(what) != found.get(name, {}).get(what)
    ]
    print("\n".join(differences) or f"{len(found)} runs end in the same bits")
    raise SystemExit(1 if differences else 0)


if __name__ == "__main__":
    main()
