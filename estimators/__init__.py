"""Policy-gradient estimators as a plug-in for any PyTorch model.

>>> sample, credit = make("tpx")(mean, std, noise, credit)      # instead of mean + std * noise
>>> loss = assign_credit(cost(sample), credit).mean()           # every cost downstream is credited

Read `node.py` first, then `weights.py`. Nothing here imports another package of this project.
"""

from estimators import baselines, diagnostics, legs, weights
from estimators.gradient import PolicyGradient, gradient
from estimators.node import assign_credit, infer_noise
from estimators.probes import ControlProbe, DenseJacobian, ParameterProbe
from estimators.registry import Estimator, make, names, register, unknown_name

__all__ = [
    "ControlProbe",
    "DenseJacobian",
    "Estimator",
    "ParameterProbe",
    "PolicyGradient",
    "assign_credit",
    "baselines",
    "diagnostics",
    "gradient",
    "infer_noise",
    "legs",
    "make",
    "names",
    "register",
    "unknown_name",
    "weights",
]
