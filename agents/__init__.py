"""Agents with stable-baselines3's interface whose policy gradient is a plug-in."""

from agents.daa_ppo import DAAPPO
from agents.dreamer_tpx import DreamerTPX
from agents.pipps import PIPPS

__all__ = ["DAAPPO", "PIPPS", "DreamerTPX"]
