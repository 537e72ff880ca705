"""PIPPS: policy search in a Gaussian-process model. Read agent.py, then particles.py."""

from totalprop.agents.core.entry import AgentEntry
from totalprop.agents.pipps.agent import PIPPS
from totalprop.agents.pipps.presets import PRESETS, RUNS

ENTRY = AgentEntry(
    PIPPS,
    run={"env_id": "totalprop/CartPoleSwingUp-v0", "total_timesteps": 450, "threads": 1},
    presets=PRESETS,
    preset_runs=RUNS,
    policy_flags=("n_centres",),
    quantity="cost",  # of an episode, as in its papers
    small_run={
        "total_timesteps": 300, "gradient_steps": 5, "n_particles": 20, "gp_evaluations": 20,
    },
    kill_test_factor=4,
    long_run={"total_timesteps": 300_000, "max_points": 90},
)  # fmt: skip

__all__ = ["ENTRY", "PIPPS"]
