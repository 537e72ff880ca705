"""Every Python block of the README runs as printed, in a fresh namespace and an empty folder.

A block whose info string contains `no-run` (```python no-run) is only compiled. The comment
`<!-- readme-test: A -> B -->` before a block has A replaced by B here: training for
seconds instead of minutes; PIPPS takes 5 gradient steps per trial where a block does not say how
many. Every training command of the README and of `scripts.train`'s help is parsed, not run.
"""

import re
import shlex
from pathlib import Path

import pytest

from totalprop import PIPPS
from totalprop.scripts import train
from totalprop.scripts.run import arguments as train_arguments

README = Path(__file__).parents[1] / "README.md"
CHANGE = r"(?:^<!-- readme-test: (?P<old>.+?) -> (?P<new>.+?) -->\n)?"
FENCE = re.compile(CHANGE + r"^```python\b([^\n]*)\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE)


def python_blocks(text: str) -> list[tuple[int, str, str]]:
    """Returns (line number of the first line of code, rest of the info string, code)."""
    blocks = []
    for match in FENCE.finditer(text):
        code, line = match[4], text.count("\n", 0, match.start(4)) + 1
        if match["old"]:
            assert match["old"] in code, f"line {line}: '{match['old']}' is not in the block"
            code = code.replace(match["old"], match["new"])
        blocks.append((line, match[3], code))
    return blocks


BLOCKS = python_blocks(README.read_text(encoding="utf-8")) if README.exists() else []


def test_readme_has_python_blocks():
    assert BLOCKS, f"{README.name} has no ```python block"


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"line{block[0]}")
def test_readme_block_runs(block, tmp_path, monkeypatch):
    first_line, info, source = block
    # The blank lines make a traceback point at the line of the README.
    code = compile("\n" * (first_line - 1) + source, str(README), "exec")
    if "no-run" in info:
        return
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PIPPS.__init__.__kwdefaults__, "gradient_steps", 5)
    exec(code, {"__name__": "__main__"})


def test_blocks_are_found_with_their_line_and_info():
    text = "a\n```python\nx = 1\n```\n```bash\nls\n```\n\n```python no-run\ny\nz\n```\n"
    assert python_blocks(text) == [(3, "", "x = 1\n"), (10, " no-run", "y\nz\n")]


def test_a_block_can_be_shortened_for_the_test():
    text = "<!-- readme-test: n=450 -> n=30 -->\n```python\nlearn(n=450)\n```\n"
    assert python_blocks(text) == [(3, "", "learn(n=30)\n")]


def training_commands(text: str) -> list[list[str]]:
    """The arguments of `make train` and `totalprop train`, lines joined at their ends."""
    commands = []
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("make train ARGS="):
            line = shlex.split(line, comments=True)[2].removeprefix("ARGS=")
        elif line.startswith("totalprop train "):
            line = line.removeprefix("totalprop train ")
        else:
            continue
        commands.append(shlex.split(line, comments=True))
    return commands


COMMANDS = training_commands(README.read_text(encoding="utf-8") + (train.__doc__ or ""))


def test_training_commands_are_found():
    text = 'make train ARGS="pipps \\\n  --seed 3"   # x\ntotalprop train dreamer  # y\nls\n'
    assert training_commands(text) == [["pipps", "--seed", "3"], ["dreamer"]]
    assert len(COMMANDS) > 12


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_training_command_is_understood(command):
    if command[0] == "--resume":
        train_arguments.parse_resume(command)
    elif "--help" in command:
        with pytest.raises(SystemExit, match=r"^0$"):
            train_arguments.parse(command, usage="")
    else:
        train_arguments.parse(command, usage="")
