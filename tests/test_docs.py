"""What the README and the documentation show works as printed.

Every Python block runs, in a fresh namespace and an empty folder. A block whose info string has
`no-run` (```python no-run) is only compiled. Where a ```text block follows at once, it is what the
block prints, up to round-off. A block after `<!-- docs-test-file: name.py -->` is a module that the
others of its page can import. A comment `<!-- docs-test: A -> B -->` before a block
replaces A by B here, so that it takes seconds instead of minutes; several may follow each other.

Every command is parsed, not run. `totalprop train` has a parser for that; the flags of the others
are looked up in their help. Files that a page names or links exist.
"""

import ast
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from totalprop import PIPPS
from totalprop.estimators import registry
from totalprop.scripts import cli, commands, train
from totalprop.scripts.run import arguments as train_arguments
from totalprop.scripts.studies import grid

ROOT = Path(__file__).parents[1]
# docs/results is a link to results/, whose pages have no Python.
PAGES = [
    ROOT / "README.md",
    *(p for p in sorted(ROOT.glob("docs/**/*.md")) if "results" not in p.parts),
]
STUDIES = [*ROOT.glob("results/*/README.md"), ROOT / "CONTRIBUTING.md"]
CHANGES = r"((?:^<!-- docs-test: .+? -> .+? -->\n)*)"
FENCE = re.compile(CHANGES + r"^```python\b([^\n]*)\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE)


def python_blocks(text: str) -> list[tuple[int, str, str]]:
    """Returns (line number of the first line of code, rest of the info string, code)."""
    blocks = []
    for match in FENCE.finditer(text):
        code, line = match[3], text.count("\n", 0, match.start(3)) + 1
        for old, new in re.findall(r"<!-- docs-test: (.+?) -> (.+?) -->", match[1]):
            assert old in code, f"line {line}: '{old}' is not in the block"
            code = code.replace(old, new)
        blocks.append((line, match[2], code))
    return blocks


def printed_after(text: str, first_line: int) -> str | None:
    """What the block whose code begins in this line is said to print."""
    rest = "".join(text.splitlines(keepends=True)[first_line - 1 :])
    found = re.match(r".*?^```[ \t]*\n\n```text\n(.*?)^```", rest, re.DOTALL | re.MULTILINE)
    return found and found[1] if found and "```" not in rest[: found.start(1) - 13] else None


NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


def assert_same_output(found: str, expected: str) -> None:
    """The words are equal; numbers may differ by one in the last digit that is printed."""
    words = [" ".join(NUMBER.sub("#", text).split()) for text in (found, expected)]
    assert words[0] == words[1]
    for one, other in zip(NUMBER.findall(found), NUMBER.findall(expected), strict=True):
        mantissa, _, exponent = other.partition("e")
        digit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
        assert abs(float(one) - float(other)) <= 1.01 * digit, f"{one}, the page has {other}"


def files_of(text: str) -> dict[str, str]:
    """Modules that a page asks to be saved, by name."""
    saved = r"^<!-- docs-test-file: (\w+)\.py -->\n```python\n(.*?)^```[ \t]*$"
    return dict(re.findall(saved, text, re.DOTALL | re.MULTILINE))


BLOCKS = [
    pytest.param(page, *block, id=f"{page.relative_to(ROOT)}:{block[0]}")
    for page in PAGES
    for block in python_blocks(page.read_text(encoding="utf-8"))
]


@pytest.fixture
def _short_and_without_trace(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    for name, value in (("gradient_steps", 2), ("gp_evaluations", 5)):
        monkeypatch.setitem(PIPPS.__init__.__kwdefaults__, name, value)


@pytest.mark.usefixtures("_short_and_without_trace")
@pytest.mark.parametrize(("page", "first_line", "info", "source"), BLOCKS)
def test_block_runs(page, first_line, info, source, tmp_path, monkeypatch, capsys):
    # The blank lines make a traceback point at the line of the page.
    code = compile("\n" * (first_line - 1) + source, str(page), "exec")
    if "no-run" in info:
        return
    if "import minari" in source:
        pytest.importorskip("minari")  # which needs Python 3.11
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    for name, module in files_of(text).items():
        (tmp_path / f"{name}.py").write_text(module, encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, name, raising=False)
    exec(code, {"__name__": "__main__"})
    expected = printed_after(text, first_line)
    if expected is not None:
        assert_same_output(capsys.readouterr().out, expected)


def test_readme_has_python_blocks():
    assert any(block.values[0].name == "README.md" for block in BLOCKS)


def test_blocks_are_found_with_their_line_and_info():
    text = "a\n```python\nx = 1\n```\n```bash\nls\n```\n\n```python no-run\ny\nz\n```\n"
    assert python_blocks(text) == [(3, "", "x = 1\n"), (10, " no-run", "y\nz\n")]


def test_what_a_block_prints_is_compared():
    text = "```python\nx\n```\n\n```text\nx 1.50\n```\n```python\ny\n```\nthen\n```text\nz\n```\n"
    assert printed_after(text, 2) == "x 1.50\n"
    assert printed_after(text, 9) is None
    assert_same_output("x  1.51\n", "x 1.50\n")
    for wrong in ("x 1.53", "y 1.50", "x 1.50 2"):
        with pytest.raises(AssertionError):
            assert_same_output(wrong, "x 1.50\n")


def test_a_block_can_be_shortened_for_the_test():
    comments = "<!-- docs-test: n=450 -> n=30 -->\n<!-- docs-test: m -> k -->\n"
    assert python_blocks(f"{comments}```python\nm(n=450)\n```\n") == [(4, "", "k(n=30)\n")]


def commands_of(text: str) -> list[list[str]]:
    """The words of every `totalprop` command of shell blocks, lines joined at their ends.

    Also those of `make train` and `make bench`, and training commands within a line of the text.
    """
    commands = re.findall(r"`totalprop (train \w+ [^`]*--[^`]*)`", text)
    shell = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    for line in shell.replace("\\\n", " ").splitlines():
        if found := re.match(r"make (train|bench) ARGS=", line):
            words = shlex.split(line, comments=True)[2].removeprefix("ARGS=")
            commands.append(f"{found[1]} {words}")
        elif line.startswith("totalprop "):
            commands.append(line.removeprefix("totalprop "))
    return [shlex.split(command, comments=True) for command in commands]


TEXT = "\n".join(path.read_text(encoding="utf-8") for path in (*PAGES, *STUDIES))
COMMANDS = commands_of(f"{TEXT}\n```bash\n{train.__doc__}\n```\n")
TRAINING = [words[1:] for words in COMMANDS if words[0] == "train"]
YAML, GRID = re.findall(r"^```yaml\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
OTHERS = [words for words in COMMANDS if words[0] != "train"]


def test_commands_are_found():
    text = (
        '```bash\nmake train ARGS="pipps \\\n  --seed 3"   # x\ntotalprop train dreamer  # y\n```\n'
        "`totalprop train daappo --seed 1`, `totalprop train`\ntotalprop is\n"
        "```bash\ntotalprop doctor\n```\n"
    )
    assert commands_of(text) == [
        ["train", "daappo", "--seed", "1"],
        ["train", "pipps", "--seed", "3"],
        ["train", "dreamer"],
        ["doctor"],
    ]
    assert len(TRAINING) > 20
    assert {words[0] for words in OTHERS} >= {"sweep", "diagnose", "chaos", "bench"}


@pytest.mark.parametrize("command", TRAINING, ids=" ".join)
def test_training_command_is_understood(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if command[0] == "--config":  # the file it names: an example of the pages, or a run's
        path = Path(command[1])
        text = YAML if path.suffix == ".yaml" else train_arguments.parse(["pipps"], "").config()
        path = path if path.suffix else path / "config.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    if command[0] == "--resume":
        train_arguments.parse_resume(command)
    elif "--help" in command:
        with pytest.raises(SystemExit, match=r"^0$"):
            train_arguments.parse(command, usage="")
    else:
        train_arguments.parse(command, usage="")


@pytest.mark.parametrize("command", OTHERS, ids=" ".join)
def test_command_has_its_flags(command, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["totalprop"])
    own, *trained = " ".join(command).split(" -- ")
    name, *words = own.split()
    if name == cli.STUDY:
        name = f"{name} {words.pop(0)}"
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main([*name.split(), "--help"])
    known = re.findall(r"--[\w-]+", capsys.readouterr().out)
    assert {word for word in words if word.startswith("--")} <= set(known)
    for arguments in trained:  # of `totalprop sweep AGENT ... -- arguments`
        train_arguments.parse([words[0], *arguments.split()], usage="")


def test_the_documented_environment_is_trained_by_the_command(tmp_path):
    """In the folder of arm.py, which a console script does not look into by itself."""
    page = ROOT / "docs" / "own-environment.md"
    (tmp_path / "arm.py").write_text(files_of(page.read_text(encoding="utf-8"))["arm"])
    program = Path(sys.executable).with_name("totalprop")
    small = "--horizon 10 --n-particles 8 --gradient-steps 1 --gp-evaluations 2"
    words = f"train pipps --env-id arm:Arm-v0 {small} --total-timesteps 60 --no-tensorboard"
    for command in (f"{words} --name run", "evaluate runs/run --import arm --episodes 2"):
        done = subprocess.run(
            [program, *command.split()], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "Gym" not in done.stderr and "WARN" not in done.stderr
    assert (tmp_path / "runs" / "run" / "summary.json").exists()


def test_the_grid_of_a_sweep_is_understood(tmp_path):
    (tmp_path / "grid.yaml").write_text(GRID)
    words = ["--grid", str(tmp_path / "grid.yaml"), "--out", "out"]
    found = grid.read_grid(commands.parser_of("sweep").parse_args(words), [])
    assert found.varied == "setting" and len(found.settings()) * len(found.seeds) == 24
    for setting in found.settings().values():
        train_arguments.parse(setting.command(0), usage="")


@pytest.mark.parametrize("target", sorted(set(re.findall(r"^make ([\w-]+)", TEXT, re.MULTILINE))))
def test_make_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("path", [*PAGES, *STUDIES], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_a_page_names_exist(path):
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", text)
    missing = [link for link in links if not (path.parent / link).exists()]
    # docs/results is a symbolic link for Sphinx, which a repository's web pages do not follow.
    through = ROOT / "docs" / "results"
    missing += [x for x in links if Path(os.path.normpath(path.parent / x)).is_relative_to(through)]
    named = re.findall(r"`([\w.-]+(?:/[\w.-]+)+\.(?:py|md|json))`", text)
    missing += [name for name in named if not (ROOT / name).exists()]
    assert missing == []


def test_the_costs_of_daappo_are_those_recorded():
    root = Path(__file__).parents[1] / "results"
    (row,) = json.loads((root / "bench" / "ppo.json").read_text())["rows"]
    none, *costs = (value for name, value in row.items() if "over PPO's" in name)
    text = " ".join((root / "daa_ppo" / "README.md").read_text().split())
    found = re.findall(
        r"makes ([\d.]+) times .* `dynamics` costs ([\d.]+) times PPO, with `tpx` ([\d.]+), "
        r"`q` ([\d.]+), `states` ([\d.]+?)\. ",
        text,
    )
    assert found == [(f"{none:.2f}", *(f"{cost:.1f}" for cost in costs))]


def test_the_tables_of_recommended_are_the_raw_numbers():
    tables = runpy.run_path(str(ROOT / "results" / "dreamer" / "tables.py"))
    for document in tables["TABLES"]:
        assert document.read_text(encoding="utf-8") == tables["updated"](document)


def names_of(path: Path) -> set[str]:
    """Functions and classes of a module, and methods as Class.method."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
            inner = node.body if isinstance(node, ast.ClassDef) else []
            found |= {f"{node.name}.{f.name}" for f in inner if isinstance(f, ast.FunctionDef)}
    return found


API = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("docs/api/*.md"))
SOURCE = re.compile(r"\[`([\w.]+)`\]\(([\w./]+\.py)\)")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_that_a_page_links_exist(path):
    for name, target in SOURCE.findall(path.read_text(encoding="utf-8")):
        assert name in names_of(path.parent / target), f"{name} is not in {target}"
        module = (path.parent / target).resolve().relative_to(ROOT).with_suffix("")
        assert f"automodule:: totalprop.{'.'.join(module.parts)}\n" in API, f"docs/api: {module}"


def test_every_agent_links_its_functions():
    for path in sorted((ROOT / "docs" / "agents").glob("*.md")):
        if path.name != "index.md":
            assert len(SOURCE.findall(path.read_text(encoding="utf-8"))) >= 4
    assert "PIPPS.save" not in names_of(ROOT / "agents/pipps/agent.py")
