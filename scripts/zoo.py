"""Run RL-Zoo (rl_zoo3) with our agents: its train and enjoy know them by their names.

totalprop zoo train --algo pipps --env totalprop/CartPoleSwingUp-v0
totalprop zoo enjoy --algo pipps --env totalprop/CartPoleSwingUp-v0 -f logs --no-render
totalprop zoo train --algo dreamer --env Pendulum-v1 --help     # RL-Zoo's own flags

Settings are those of zoo.yml, by agent and environment, unless -conf names another file. From
Python, `totalprop.scripts.zoo.register()` does the first part alone. RL-Zoo holds other packages
back (Pillow), so it needs an environment of its own: pip install -e '.[zoo]', without
constraints.txt. Its enjoy unpickles what lies in its log folder: open your own alone.
"""

from __future__ import annotations

import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from totalprop.agents import AGENTS
from totalprop.scripts.run.errors import UsageError, UserError, ending_with_a_sentence

PROGRAMS = ("train", "enjoy")  # those of RL-Zoo that make agents
SETTINGS = Path(__file__).with_suffix(".yml")  # agent -> environment -> as in a file of RL-Zoo


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; what follows the name of a program of RL-Zoo is passed on to it."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: totalprop zoo PROGRAM [...]\n\n{__doc__}")
        raise SystemExit(0 if arguments else 2)
    program = arguments[0]
    with ending_with_a_sentence():
        if program not in PROGRAMS:
            raise UsageError(f"totalprop zoo has {' and '.join(PROGRAMS)}, not '{program}'")
        register()
        with tempfile.TemporaryDirectory() as folder:
            sys.argv = [f"rl_zoo3 {program}", *arguments[1:], *settings(arguments, Path(folder))]
            getattr(import_module(f"rl_zoo3.{program}"), program)()


def register() -> None:
    """Add our agents to RL-Zoo's, and our environments to Gymnasium's."""
    try:
        import rl_zoo3
    except ImportError:
        raise UserError(
            "RL-Zoo is not installed: pip install 'rl_zoo3>=2.9,<3', in an environment of its own "
            "that was made without constraints.txt"
        ) from None
    import totalprop.envs  # noqa: F401

    rl_zoo3.ALGOS.update({name: entry.cls for name, entry in AGENTS.items()})


def settings(arguments: Sequence[str], folder: Path) -> list[str]:
    """-conf and a file with the settings of the agent that train is to use; [] where not needed."""
    import yaml

    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--algo", default="")
    parser.add_argument("-conf", "--conf-file", "-h", "--help", dest="other", nargs="?", const="")
    found = parser.parse_known_args(arguments[1:])[0]
    if arguments[0] != "train" or found.other is not None or found.algo not in AGENTS:
        return []
    known = yaml.safe_load(SETTINGS.read_text(encoding="utf-8"))
    if found.algo not in known:
        raise UserError(f"{SETTINGS.name} has no settings of {found.algo}: pass -conf FILE")
    path = folder / f"{found.algo}.yml"
    path.write_text(yaml.safe_dump(known[found.algo]), encoding="utf-8")
    return ["-conf", str(path)]


if __name__ == "__main__":
    main()
