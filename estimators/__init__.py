"""Policy-gradient estimators as a plug-in for any PyTorch model.

>>> r = Rollout("tpx")
>>> sample = r.sample(mean, std)          # instead of mean + std * noise
>>> loss = r.cost(cost(sample)).mean()    # for every cost

Read `node.py` first, then `mixing.py`. This package imports no other package of the project.
"""

import totalprop.estimators.analysis.diagnostics as diagnostics
import totalprop.estimators.baselines as baselines
import totalprop.estimators.legs as legs
import totalprop.estimators.mixing as mixing
import totalprop.estimators.surrogates as surrogates
from totalprop.estimators.analysis.check import Report, check
from totalprop.estimators.declarations import unknown_name
from totalprop.estimators.gradient import PolicyGradient, gradient
from totalprop.estimators.node import Estimator, assign_credit, infer_noise, own_and_carried
from totalprop.estimators.probes import ControlProbe, DenseJacobian, ParameterProbe
from totalprop.estimators.registry import make, names, register
from totalprop.estimators.rollout import Rollout

__all__ = [
    "ControlProbe",
    "DenseJacobian",
    "Estimator",
    "ParameterProbe",
    "PolicyGradient",
    "Report",
    "Rollout",
    "assign_credit",
    "baselines",
    "check",
    "diagnostics",
    "gradient",
    "infer_noise",
    "legs",
    "make",
    "mixing",
    "names",
    "own_and_carried",
    "register",
    "surrogates",
    "unknown_name",
]
