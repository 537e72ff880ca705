"""PIPPS: policy search in a Gaussian-process model. Read agent.py, then particles.py."""

from totalprop.agents.core.entry import AgentEntry
from totalprop.agents.pipps.agent import PIPPS
from totalprop.agents.pipps.presets import PRESETS

ENTRY = AgentEntry(
    PIPPS,
    run={"env_id": "totalprop/CartPoleSwingUp-v0", "total_timesteps": 450},
    presets=PRESETS,
    policy_flags=("n_centres",),
    quantity="cost",  # of an episode, as in its papers
)

__all__ = ["ENTRY", "PIPPS"]
