"""Figures: what is on them."""

import numpy as np
import pytest

from totalprop.agents.core import figures


@pytest.mark.parametrize(("n", "ticks"), [(1, 1), (16, 16), (30, 15), (40, 14), (1024, 16)])
def test_a_figure_of_k_has_few_enough_ticks_to_read(n, ticks):
    found = figures.weights(np.zeros((5, n))).axes[0].get_yticks()
    assert len(found) == ticks and found[0] == 0 and found[-1] < n
