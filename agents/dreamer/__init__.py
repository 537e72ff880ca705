"""DreamerTPX: a latent world model with imagined policy gradients. Read agent.py, update.py."""

from totalprop.agents.core.entry import AgentEntry
from totalprop.agents.dreamer.agent import DreamerTPX
from totalprop.agents.dreamer.presets import PRESETS

ENTRY = AgentEntry(
    DreamerTPX,
    run={
        "env_id": "dmc/cartpole-balance-v0",
        "total_timesteps": 20_000,
        "eval_episodes": 5,
        "eval_every": 2_500,
    },
    presets=PRESETS,
    policy_flags=("stoch", "deter", "hidden", "width", "conv_depth", "vector_std"),
)

__all__ = ["ENTRY", "DreamerTPX"]
