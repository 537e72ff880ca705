"""DAAPPO: PPO with many actions per state. Read agent.py, then sources.py and loss.py."""

from totalprop.agents.core.entry import AgentEntry
from totalprop.agents.daappo.agent import DAAPPO
from totalprop.agents.daappo.presets import PRESETS, RUNS

ENTRY = AgentEntry(
    DAAPPO,
    run={
        "env_id": "dmc/cartpole-swingup-v0",
        "normalize": "both",
        "total_timesteps": 100_000,
        "eval_episodes": 5,
        "eval_every": 5_000,
    },
    presets=PRESETS,
    preset_runs=RUNS,
    policy_flags=("net_arch", "activation_fn", "ortho_init", "log_std_init"),
    named_by=("action_source", "estimator"),
    rewinds=lambda arguments: arguments.get("action_source") == "rewind",
    small_run={
        "total_timesteps": 1200, "n_steps": 60, "batch_size": 30, "dynamics_width": 16,
        "n_extra_actions": 2, "simulation_horizon": 2, "eval_every": 120, "n_epochs": 2,
        "dynamics_buffer_size": 500, "normalize": "both",
        "env_id": "totalprop/CartPoleSwingUp-v0",
    },
    kill_test_factor=8,
    long_run={
        "preset": "recommended", "env_id": "dm_control/cartpole-swingup-v0",
        "env_arg": ["action_repeat=4"], "total_timesteps": 10_000_000,
        "dynamics_buffer_size": 10_000, "eval_every": 10_000,
    },
)  # fmt: skip

__all__ = ["DAAPPO", "ENTRY"]
