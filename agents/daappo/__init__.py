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
)

__all__ = ["DAAPPO", "ENTRY"]
