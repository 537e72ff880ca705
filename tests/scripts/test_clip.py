"""The study of the clip of k: what its numbers are made of."""

import pytest
import torch

from totalprop.scripts.bench.pipps import random_problem
from totalprop.scripts.studies import clip


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(clip, "STEPS", 2)


@pytest.mark.usefixtures("few_steps")
def test_the_numbers_by_hand(monkeypatch):
    source = torch.Generator().manual_seed(0)
    found = {name: torch.randn(5, 3, generator=source) for name in clip.ESTIMATORS}
    found["tpx-unclipped"] *= 2
    k = {"tpx": torch.tensor([0.0, 1.0]), "tpx-unclipped": torch.tensor([-0.1, 0.5, 1.2, 1.0])}
    monkeypatch.setattr(clip, "gradients", lambda name, *rest: (found[name], k[name]))
    row = clip.compare(None, None, 6, 5)
    variances = {name: float(g.var(0).sum()) for name, g in found.items()}
    assert row["tpx"] == pytest.approx(variances["tpx"])
    assert row["ratio"] == pytest.approx(variances["tpx-unclipped"] / variances["tpx"])
    assert row["ratio"] > 1 and row["ratio 95 %"][0] < row["ratio"] < row["ratio 95 %"][1]
    assert row["k outside"] == 0.5


@pytest.mark.usefixtures("few_steps")
def test_all_estimators_see_the_same_noise(monkeypatch):
    """With k fixed by one rule for both, the gradients are the same numbers."""
    model, policy = random_problem(8)
    asked, make = [], clip.make
    monkeypatch.setattr(clip, "make", lambda name: asked.append(name) or make("lr"))
    (g, k), (other, _) = (clip.gradients(name, model, policy, 6, 3) for name in clip.ESTIMATORS)
    assert asked == [clip.ESTIMATORS[0]] * 3 + [clip.ESTIMATORS[1]] * 3
    assert torch.equal(g, other) and g.shape[0] == 3 and k.shape == (3, 2, 4)
    assert not torch.equal(g[0], g[1]) and (k == 1).all()
