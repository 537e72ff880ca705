"""SVG: stochastic value gradients. Read agent.py, then gradients.py."""

from totalprop.agents.core.entry import AgentEntry
from totalprop.agents.svg.agent import SVG
from totalprop.agents.svg.presets import PRESETS, RUNS

ENTRY = AgentEntry(
    SVG,
    run={
        "env_id": "totalprop/CartPoleSwingUp-v0",
        "total_timesteps": 30_000,
        "eval_episodes": 5,
        "eval_every": 3_000,
    },
    presets=PRESETS,
    preset_runs=RUNS,
    policy_flags=("net_arch", "log_std_init", "learn_std"),
    named_by=("variant", "estimator"),
    small_run={
        "total_timesteps": 600, "learning_starts": 0, "value_updates": 10, "model_updates": 10,
        "policy_updates": 5, "batch_size": 32, "buffer_size": 300, "eval_every": 120,
        "env_id": "totalprop/CartPoleSwingUp-v0",
    },
    kill_test_factor=8,
    long_run={
        "env_id": "totalprop/CartPoleSwingUp-v0", "total_timesteps": 10_000_000,
        "buffer_size": 5_000, "eval_every": 10_000,
    },
)  # fmt: skip

__all__ = ["ENTRY", "SVG"]
