"""Policy-gradient estimators as a plug-in for any PyTorch model.

>>> sample, credit = make("tpx")(mean, std, noise, credit)      # instead of mean + std * noise
>>> loss = assign_credit(cost(sample), credit).mean()           # every cost downstream is credited

Read `node.py` first, then `mixing.py`. This package imports no other package of the project.
"""

import totalprop.estimators.analysis.diagnostics as diagnostics
import totalprop.estimators.baselines as baselines
import totalprop.estimators.legs as legs
import totalprop.estimators.mixing as mixing
import totalprop.estimators.surrogates as surrogates
from totalprop.estimators.declarations import unknown_name
from totalprop.estimators.gradient import PolicyGradient, gradient
from totalprop.estimators.node import Estimator, assign_credit, infer_noise
from totalprop.estimators.probes import ControlProbe, DenseJacobian, ParameterProbe
from totalprop.estimators.registry import make, names, register

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
    "mixing",
    "names",
    "register",
    "surrogates",
    "unknown_name",
]
