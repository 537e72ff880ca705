"""Every estimator has a page that says what it needs, what it costs and when it fails."""

import re
from pathlib import Path

import pytest
import torch

from totalprop.estimators import Rollout, gradient, make, registry

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "estimators"
NAMES = list(registry._REGISTRY)  # this project's own, without installed plug-ins
PAGES = {name: FOLDER / f"{name}.md" for name in NAMES}


def rows(page: str) -> dict[str, str]:
    """The table at the top of a page."""
    return dict(re.findall(r"^\| ([^|]+?) \| (.+?) \|$", page, re.MULTILINE))


def test_every_page_is_of_a_registered_estimator():
    pages = {path.stem for path in FOLDER.glob("*.md")}
    assert pages == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_an_estimator_has_a_page_with_its_parts(name):
    page = PAGES[name].read_text(encoding="utf-8")
    assert page.startswith(f"# `{name}`\n")
    headings = re.findall(r"^## (.+)$", page, re.MULTILINE)
    assert headings == ["When to take it", "When it fails"]
    fails = page.partition("## When it fails")[2]
    code, output = re.search(
        r"^```python\n(.*?)^```\n\n```text\n(.*?)^```", fails, re.S | re.M
    ).groups()
    assert f'"{name}"' in code and re.search(r"\d", output)
    assert "**What *k*, *z* and the signal-to-noise ratio say.**" in fails


@pytest.mark.parametrize("name", NAMES)
def test_a_page_cites_the_source_that_the_registry_names(name):
    said = rows(PAGES[name].read_text(encoding="utf-8"))["source"]
    assert set(re.findall(r"[\w.]+", make(name).source)) <= set(re.findall(r"[\w.]+", said))


@pytest.mark.parametrize("name", NAMES)
def test_a_page_says_which_probe_and_which_path_are_needed(name):
    said, estimator = rows(PAGES[name].read_text(encoding="utf-8"))["needs"], make(name)
    wanted = {"none": "", "all": "a probe over all parameters", "subset": "a probe over a subset"}
    assert ("probe" in said) == (estimator.probe != "none") and wanted[estimator.probe] in said
    assert ("a differentiable rollout" in said) == estimator.needs_pathwise
    assert ("`gradient`" in said) == estimator.several_passes


@pytest.mark.parametrize("name", NAMES)
def test_a_page_counts_the_backward_passes(name):
    theta, calls = torch.zeros(1, requires_grad=True), []

    def rollout(estimator, tap):
        calls.append(estimator)
        r = Rollout(estimator)
        noise = torch.linspace(-1, 1, 16).unsqueeze(-1)
        mean = theta.expand(16, 1)
        x = r.sample(mean, torch.ones_like(mean), noise=noise, probe=lambda g: g[0], tap=tap)
        return r.cost(x.square().sum(-1)).mean()

    gradient(rollout, [theta], make(name), samples=16)
    said = rows(PAGES[name].read_text(encoding="utf-8"))["backward passes"]
    assert re.match(r"\d+", said)[0] == str(len(calls))


def test_the_overview_links_every_page():
    text = (ROOT / "docs" / "estimators.md").read_text(encoding="utf-8")
    for name in NAMES:
        assert f"[`{name}`](estimators/{name}.md)" in text
        assert re.search(rf"^estimators/{name}$", text, re.MULTILINE)  # in the table of contents
