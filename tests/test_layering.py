"""The arrows between the root packages, checked on the source text (nothing is imported)."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"estimators", "world_models", "envs", "agents", "scripts", "tests"}
SIBLINGS = {  # package -> the packages of ours that it may import besides itself
    "estimators": set(),
    "world_models": set(),
    "envs": set(),
    "agents": {"estimators", "world_models"},
    "scripts": {"estimators", "world_models", "envs", "agents"},
}
THIRD_PARTY = {  # package -> what it may import at module level; absent: anything
    "estimators": {"torch", "numpy"},
    "world_models": {"torch", "numpy", "scipy"},
}
VAGUE_NAMES = {"utils.py", "helpers.py", "common.py", "base.py"}
MAX_LINES = 400


def imports(tree: ast.Module) -> Iterator[tuple[str, int, bool]]:
    """Yields (absolute root name, line, runs when the module is imported) of every import.

    `import_module("x")` and `__import__("x")` count when x is a literal; relative imports stay
    inside their package and are left out.
    """

    def walk(node: ast.AST, at_import: bool) -> Iterator[tuple[str, int, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield alias.name.split(".")[0], child.lineno, at_import
            elif isinstance(child, ast.ImportFrom) and child.level == 0 and child.module:
                yield child.module.split(".")[0], child.lineno, at_import
            elif isinstance(child, ast.Call) and child.args:
                function, name = child.func, child.args[0]
                called = getattr(function, "attr", getattr(function, "id", ""))
                if called in {"import_module", "__import__"} and isinstance(name, ast.Constant):
                    yield str(name.value).split(".")[0], child.lineno, at_import
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            type_checking = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from walk(child, at_import and not is_function and not type_checking)

    yield from walk(tree, at_import=True)


def offences(path: str, text: str) -> list[str]:
    """What the module at `path` (relative to the repository, with /) does against the rules."""
    package, file_name = path.split("/")[0], path.split("/")[-1]
    found = []
    if file_name in VAGUE_NAMES:
        found.append(f"{path}: name the file after what it holds")
    if package not in SIBLINGS:  # tests may import anything and be long
        return found
    if (n_lines := len(text.splitlines())) > MAX_LINES:
        found.append(f"{path}: {n_lines} lines, at most {MAX_LINES}: split it by concept")
    may_import = SIBLINGS[package] | {package}
    for name, line, at_import in imports(ast.parse(text, filename=path)):
        if name in OURS and name not in may_import:
            found.append(f"{path}:{line}: {package} must not import {name}")
        third_party = name not in OURS and name not in sys.stdlib_module_names
        if at_import and third_party and name not in THIRD_PARTY.get(package, {name}):
            found.append(f"{path}:{line}: {package} must not import {name} at module level")
    return found


def modules() -> list[str]:
    """Paths, relative to the repository, of every Python file of ours."""
    folders = (path for name in OURS for path in (ROOT / name).rglob("*.py"))
    return sorted(path.relative_to(ROOT).as_posix() for path in folders)


@pytest.mark.parametrize("path", modules())
def test_module_keeps_the_rules(path):
    assert offences(path, (ROOT / path).read_text(encoding="utf-8")) == []


def test_every_package_is_covered():
    assert {path.split("/")[0] for path in modules()} == OURS


def test_no_relative_import_leaves_its_package():
    # A flat layout has no common parent, so one dot more than the depth is an error at run time.
    for path in modules():
        depth = path.count("/")
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= depth, f"{path}:{node.lineno}: relative import leaves it"


@pytest.mark.parametrize(
    ("path", "text", "complaint"),
    [
        ("estimators/new.py", "import agents.svg", "must not import agents"),
        ("world_models/new.py", "from estimators import make", "must not import estimators"),
        (
            "envs/new.py",
            "def f():\n    from world_models import gp",
            "must not import world_models",
        ),
        ("agents/new.py", "import torch\nimport envs as e", "agents/new.py:2: agents must not"),
        ("agents/new.py", "import importlib\nimportlib.import_module('envs.x')", "import envs"),
        ("scripts/new.py", "from tests.lqr import gain", "must not import tests"),
        ("agents/new.py", "from scripts.train import main", "must not import scripts"),
        ("estimators/new.py", "import gymnasium", "gymnasium at module level"),
        ("estimators/new.py", "from scipy import special", "scipy at module level"),
        ("estimators/new.py", "class A:\n    import scipy", "scipy at module level"),
        ("world_models/new.py", "try:\n    import gpytorch\nexcept ImportError: ...", "gpytorch"),
        ("agents/utils.py", "", "name the file"),
        ("agents/new.py", "x = 1\n" * (MAX_LINES + 1), "split it by concept"),
    ],
)
def test_an_offence_is_found(path, text, complaint):
    found = offences(path, text)
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("estimators/new.py", "import math\nimport torch.nn as nn\nfrom estimators.node import x"),
        ("estimators/new.py", "from . import node\nfrom .node import x"),
        ("estimators/new.py", "def f():\n    import scipy"),
        ("world_models/new.py", "from scipy.linalg import solve"),
        ("agents/new.py", "import stable_baselines3\nfrom estimators import make"),
        ("envs/new.py", "import gymnasium"),
        ("scripts/new.py", "import envs, agents, estimators, world_models"),
        ("agents/new.py", "x = 1\n" * MAX_LINES),
        ("tests/new.py", "import scripts\n" * (MAX_LINES + 1)),
    ],
)
def test_what_is_allowed_passes(path, text):
    assert offences(path, text) == []
