"""The arrows between modules, checked on the source text: nothing is imported.

Every import counts, wherever it stands: in a function, or under TYPE_CHECKING.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from totalprop.agents import registry

ROOT = Path(__file__).parents[1]
PACKAGES = ("agents", "envs", "estimators", "scripts", "world_models")
# Packages of agents; a new one may import what PIPPS may.
AGENTS = tuple(registry.AGENTS.class_names)
# What a part may import besides itself; the longest prefix of a module's name is its part.
PART_MAY_IMPORT = {
    "estimators": set(),
    "world_models": set(),
    "envs": set(),
    "agents": {"agents.core"},  # the registry, which finds the agents by their names
    "agents.persistence": {"estimators"},
    "agents.core": {"agents.persistence", "estimators"},
    "agents.trials": {"agents.core", "agents.persistence", "estimators", "world_models"},
    "agents.daappo": {"agents.core", "agents.persistence", "estimators", "world_models"},
    "agents.dreamer": {"agents.core", "agents.persistence", "estimators", "world_models"},
    "agents.svg": {
        "agents.core", "agents.persistence", "agents.trials", "estimators", "world_models",
    },
    "agents.pipps": {
        "agents.core", "agents.persistence", "agents.trials", "estimators", "world_models",
    },
    "scripts": {"agents", "envs", "estimators", "world_models"},
}  # fmt: skip
for agent in AGENTS:
    PART_MAY_IMPORT.setdefault(f"agents.{agent}", PART_MAY_IMPORT["agents.pipps"])
THIRD_PARTY = {  # package -> what it may import at module level; absent: anything
    "estimators": {"torch", "numpy"},
    "world_models": {"torch", "numpy", "scipy"},
}
VAGUE_NAMES = {"utils.py", "helpers.py", "common.py", "misc.py"}


def sources() -> dict[str, str]:
    """Module name without "totalprop." -> text, of every module of the packages."""
    found = {"totalprop": (ROOT / "totalprop" / "__init__.py").read_text(encoding="utf-8")}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    return found


SOURCES = sources()


def imported(text: str) -> Iterator[tuple[str, int, bool]]:
    """Yields (dotted name, line, runs when the module is imported) of every import.

    `from a import b` gives a.b as well as a. `import_module("x")` counts when x is a literal.
    """

    def walk(node: ast.AST, at_import: bool) -> Iterator[tuple[str, int, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, child.lineno, at_import) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0 and child.module, "imports are absolute"
                yield child.module, child.lineno, at_import
                for alias in child.names:
                    yield f"{child.module}.{alias.name}", child.lineno, at_import
            elif isinstance(child, ast.Call) and child.args:
                function, name = child.func, child.args[0]
                called = getattr(function, "attr", getattr(function, "id", ""))
                if called in {"import_module", "__import__"} and isinstance(name, ast.Constant):
                    yield str(name.value), child.lineno, at_import
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            type_checking = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from walk(child, at_import and not is_function and not type_checking)

    yield from walk(ast.parse(text), at_import=True)


def part_of(module: str) -> str:
    return max((p for p in PART_MAY_IMPORT if f"{module}.".startswith(f"{p}.")), key=len)


def offences(module: str, text: str) -> list[str]:
    """What a module does against the arrows."""
    own, package = part_of(module), module.split(".")[0]
    found = []
    for name, line, at_import in imported(text):
        if name.split(".")[0] in (*PACKAGES, "tests"):
            found.append(f"{module}:{line}: write totalprop.{name}: a short name is a second copy")
        elif name.startswith("totalprop."):
            target = name.removeprefix("totalprop.")
            if target.split(".")[0] not in PACKAGES:
                continue
            part = part_of(target)
            allowed = PART_MAY_IMPORT[own] | {own}
            if own == "agents" and part in {f"agents.{agent}" for agent in AGENTS}:
                continue  # public names
            if not any(f"{part}.".startswith(f"{a}.") for a in allowed):
                found.append(f"{module}:{line}: {own} must not import {part}")
        else:
            root = name.split(".")[0]
            is_foreign = root not in sys.stdlib_module_names and root != "totalprop"
            if at_import and is_foreign and root not in THIRD_PARTY.get(package, {root}):
                found.append(f"{module}:{line}: {package} must not import {root} at module level")
    return sorted(set(found))


def graph(texts: dict[str, str]) -> dict[str, set[str]]:
    """Module -> modules of ours that it imports, the packages they were named by included."""
    edges: dict[str, set[str]] = {}
    for module, text in texts.items():
        names = {n.removeprefix("totalprop.") for n, *_ in imported(text)}
        edges[module] = {n for n in names if n in texts}
    return edges


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or not."""

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            new = edges[todo.pop()] - seen
            seen |= new
            todo.extend(new)
        return seen

    reach = {module: reachable(module) for module in edges}
    groups = {
        tuple(sorted(n for n in edges if n in reach[m] and m in reach[n]))
        for m in edges
        if m in reach[m]
    }
    return sorted(map(list, groups))


@pytest.mark.parametrize("module", sorted(SOURCES.keys() - {"totalprop"}))
def test_module_keeps_the_arrows(module):
    assert offences(module, SOURCES[module]) == []


def test_there_is_no_import_circle():
    assert circles(graph(SOURCES)) == []


def test_no_file_has_a_vague_name():
    names = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert [path for path in names if path.name in VAGUE_NAMES] == []


def test_tests_write_the_full_names():
    for path in (ROOT / "tests").rglob("*.py"):
        for name, line, _ in imported(path.read_text(encoding="utf-8")):
            assert name.split(".")[0] not in PACKAGES, f"{path}:{line}: write totalprop.{name}"


def test_no_function_outside_an_agents_package_takes_that_agent():
    """An agent is handed around inside its own package; elsewhere it is an `Algorithm`."""
    classes = {cls: f"agents.{agent}" for agent, cls in registry.AGENTS.class_names.items()}
    for module, text in SOURCES.items():
        if not module.startswith("agents."):
            continue  # scripts are written for one agent, where they are
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                for argument in (*node.args.args, *node.args.kwonlyargs):
                    annotation = (
                        "" if argument.annotation is None else ast.unparse(argument.annotation)
                    )
                    for name, home in classes.items():
                        assert name not in annotation or module.startswith(home), (
                            f"{module}:{node.lineno}: {node.name} takes a {name}"
                        )


@pytest.mark.parametrize(
    ("module", "text", "complaint"),
    [
        ("estimators.new", "import totalprop.agents.svg", "must not import agents"),
        ("world_models.new", "from totalprop.estimators import make", "must not import estimators"),
        ("envs.new", "def f():\n    from totalprop.world_models import gp", "import world_models"),
        ("agents.core.new", "import torch\nimport totalprop.envs as e", "must not import envs"),
        (
            "agents.core.new",
            "import importlib\nimportlib.import_module('totalprop.envs.x')",
            "envs",
        ),
        ("agents.core.new", "from totalprop.agents.trials.controllers import x", "agents.trials"),
        (
            "agents.persistence.new",
            "from totalprop.agents.core.metrics import QUIET",
            "agents.core",
        ),
        ("agents.dreamer.new", "from totalprop.agents.pipps.agent import PIPPS", "agents.pipps"),
        (
            "agents.dreamer.new",
            "from totalprop.agents.trials.controllers import x",
            "agents.trials",
        ),
        ("agents.core.new", "from totalprop.scripts.train import main", "must not import scripts"),
        ("estimators.new", "import gymnasium", "gymnasium at module level"),
        ("world_models.new", "try:\n    import gpytorch\nexcept ImportError: ...", "gpytorch"),
        ("agents.core.new", "from estimators import make", "a short name is a second copy"),
        ("scripts.new", "if TYPE_CHECKING:\n    import agents.core.memory", "a second copy"),
    ],
)
def test_an_offence_is_found(module, text, complaint):
    assert complaint in "\n".join(offences(module, text))


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("estimators.new", "import torch.nn as nn\nfrom totalprop.estimators.node import x"),
        ("estimators.new", "def f():\n    import scipy"),
        ("world_models.new", "from scipy.linalg import solve"),
        ("agents.core.new", "import stable_baselines3\nfrom totalprop.estimators import make"),
        ("agents.pipps.new", "from totalprop.agents.trials.controllers import RBFPolicy"),
        ("envs.new", "import gymnasium"),
        ("scripts.new", "from totalprop import envs\nfrom totalprop.agents.dreamer.agent import x"),
    ],
)
def test_what_is_allowed_passes(module, text):
    assert offences(module, text) == []


def test_a_circle_is_found_under_type_checking_too():
    texts = {
        "agents.a": "from totalprop.agents.b import x",
        "agents.b": "if TYPE_CHECKING:\n    from totalprop.agents import a",
        "agents.c": "from totalprop.agents.a import x",
    }
    assert circles(graph(texts)) == [["agents.a", "agents.b"]]
