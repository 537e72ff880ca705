"""SVG's settings in its paper and our own, by name: constructor arguments, each number cited.

`SVG("MlpPolicy", env, **PRESETS["svg2015"])`, or `--preset svg2015` on the command line, where RUNS
sets the task.
"""

from __future__ import annotations

from typing import Any

# Heess et al. 2015, App. D: "truncate importance weights (using a maximum value of 5 [...])", with
# target copies every C = 50 updates (Alg. 4). Not in the paper: activations, step sizes, batch
# sizes, numbers of updates, σ and V_max, which it searched; here they are the constructor's.
_PAPER: dict[str, Any] = {
    "variant": "1-er",
    "estimator": "rp",
    "max_weight": 5.0,
    "target_interval": 50,
    "reward": "learned",
}


def _sizes(policy: tuple[int, int], value: tuple[int, int], model: int) -> dict[str, Any]:
    """A row of Table 1: hidden units of policy, value function, and model per state dimension."""
    return {
        "policy_kwargs": {"net_arch": list(policy)},
        "value_hidden": value,
        "model_hidden": (model, model),
    }


PRESETS: dict[str, dict[str, Any]] = {
    # Table 1 (sizes), App. D (discounts); the paper's own tasks are not public, see RUNS
    "svg2015": {**_PAPER, **_sizes((50, 50), (200, 100), 20), "gamma": 0.995},  # swimmer 3
    "svg2015-swimmer5": {**_PAPER, **_sizes((100, 100), (200, 100), 20), "gamma": 0.995},
    "svg2015-swimmer7": {**_PAPER, **_sizes((100, 100), (200, 100), 40), "gamma": 0.995},
    # The discount of cart-pole is not listed: the one that most tasks have.
    "svg2015-cartpole": {**_PAPER, **_sizes((100, 100), (200, 100), 20), "gamma": 0.98},
    # 20 for the reacher with 4 targets, which this is not
    "svg2015-reacher": {**_PAPER, **_sizes((100, 100), (400, 200), 40), "gamma": 0.98},
    "svg2015-hopper": {**_PAPER, **_sizes((100, 100), (400, 200), 50), "gamma": 0.95},  # monoped
    "svg2015-cheetah": {**_PAPER, **_sizes((100, 100), (400, 200), 40), "gamma": 0.98},
    # Walker is not in Table 1: cheetah's sizes.
    "svg2015-walker": {**_PAPER, **_sizes((100, 100), (400, 200), 40), "gamma": 0.98},
}
# The paper's XML files are not public: the nearest tasks of the DeepMind Control Suite.
_TASKS = {
    "svg2015": "swimmer-swimmer3",
    "svg2015-swimmer5": "swimmer-swimmer5",
    "svg2015-swimmer7": "swimmer-swimmer7",
    "svg2015-cartpole": "cartpole-swingup",
    "svg2015-reacher": "reacher-easy",
    "svg2015-hopper": "hopper-hop",
    "svg2015-cheetah": "cheetah-run",
    "svg2015-walker": "walker-walk",
}
RUNS: dict[str, dict[str, Any]] = {
    name: {"env_id": f"dmc/{task}-v0"} for name, task in _TASKS.items()
}
