"""Learned models of the environment. This package imports no other package of the project.

Nothing is imported before it is asked for: the latent model does not load the GPs and SciPy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from totalprop.world_models.gp import GaussianProcess

__all__ = ["GaussianProcess"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("totalprop.world_models.gp"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
