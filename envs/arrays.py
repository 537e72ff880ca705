"""One text of a formula for numpy arrays and torch tensors."""

import importlib
from typing import Any

import numpy as np


def library_of(values: Any) -> Any:
    """The module whose `sin`, `exp`, ... take these values: numpy for an array, else torch."""
    # envs does not depend on torch; a caller that passes a tensor has imported it already.
    return np if isinstance(values, np.ndarray) else importlib.import_module("torch")
