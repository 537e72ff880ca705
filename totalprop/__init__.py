"""Model-based reinforcement-learning agents with interchangeable policy-gradient estimators.

>>> model = totalprop.PIPPS("RBFPolicy", "totalprop/CartPoleSwingUp-v0", estimator="tpx").learn(450)
>>> r = totalprop.Rollout("tpx"); x = r.sample(mean, std); loss = r.cost(cost(x)).mean()
>>> print(totalprop.check(rollout))

The packages in this folder are links to the folders at the root of the repository. Names are
imported on first use, so `totalprop.estimators` needs neither Gymnasium nor stable-baselines3.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import totalprop.agents as agents
    import totalprop.envs as envs
    import totalprop.estimators as estimators
    import totalprop.world_models as world_models
    from totalprop.agents import AGENTS, DAAPPO, PILCO, PIPPS, SVG, DreamerTPX
    from totalprop.estimators import Rollout, check

__all__ = [
    "AGENTS",
    "DAAPPO",
    "PILCO",
    "PIPPS",
    "SVG",
    "DreamerTPX",
    "Rollout",
    "agents",
    "check",
    "envs",
    "estimators",
    "world_models",
]

_PACKAGES = ("agents", "envs", "estimators", "world_models")
_OF_ESTIMATORS = ("Rollout", "check")


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("totalprop")
    if name in _PACKAGES:
        return import_module(f"totalprop.{name}")
    if name in _OF_ESTIMATORS:
        return getattr(import_module("totalprop.estimators"), name)
    agents = import_module("totalprop.agents")
    if name == "AGENTS" or name in agents.AGENTS.class_names.values():
        import_module("totalprop.envs")  # registers our environments, which agents make by id
        return getattr(agents, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
