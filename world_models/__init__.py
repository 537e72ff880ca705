"""Learned models of the environment. Nothing here imports another package of this project."""

from totalprop.world_models.gp import GaussianProcess

__all__ = ["GaussianProcess"]
