"""PILCO: policy search by moment matching. Read agent.py, then propagation.py."""

from totalprop.agents.core.entry import AgentEntry
from totalprop.agents.pilco.agent import PILCO
from totalprop.agents.pilco.presets import PRESETS, RUNS

ENTRY = AgentEntry(
    PILCO,
    run={"env_id": "totalprop/CartPoleSwingUp-v0", "total_timesteps": 450, "threads": 1},
    presets=PRESETS,
    preset_runs=RUNS,
    policy_flags=("n_centres",),
    quantity="cost",  # of an episode, as in its papers
    named_by=("policy",),
    small_run={
        "total_timesteps": 300, "gradient_steps": 3, "horizon": 8, "n_centres": 5,
        "gp_evaluations": 20,
    },
    kill_test_factor=4,
    long_run={"total_timesteps": 300_000, "max_points": 60, "gradient_steps": 20},
)  # fmt: skip

__all__ = ["ENTRY", "PILCO"]
