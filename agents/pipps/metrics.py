"""What PIPPS writes to its logger after each trial: scalars, and figures for TensorBoard."""

from __future__ import annotations
