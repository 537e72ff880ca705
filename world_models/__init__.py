"""Learned models of the environment. This package imports no other package of the project."""

from totalprop.world_models.gp import GaussianProcess

__all__ = ["GaussianProcess"]
