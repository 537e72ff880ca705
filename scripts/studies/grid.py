"""The grid of a sweep: agents x values of flags x seeds, from flags or a YAML file."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from totalprop.agents import AGENTS
from totalprop.agents.persistence.safe_file import shown
from totalprop.scripts.commands import parser_of
from totalprop.scripts.flag_types import seed, split_flags
from totalprop.scripts.run.arguments import read_settings
from totalprop.scripts.run.environments import env_arg_flags
from totalprop.scripts.run.errors import UsageError

T = TypeVar("T")


class Setting(NamedTuple):
    """What several seeds are trained with.

    Attributes:
        label: its name in tables and in results.json.
        agent: the agent.
        values: flag of the grid, without dashes -> value.
        flags: flags of all runs.
    """

    label: str
    agent: str
    values: dict[str, str]
    flags: Sequence[str]

    def run_name(self, seed: int) -> str:
        """Name of a run's folder and log; slashes in values (paths, ids) are replaced."""
        return f"{self.label.replace('/', '_').replace(', ', '_')}_seed{seed}"

    def command(self, seed: int) -> list[str]:
        """Arguments of `totalprop train`."""
        flags = itertools.chain.from_iterable(map(_as_flag, self.values, self.values.values()))
        return [self.agent, *flags, "--seed", str(seed), *self.flags]


class Grid(NamedTuple):
    """The runs of a sweep.

    Attributes:
        agents: names of agents.
        axes: flag without dashes -> its values.
        seeds: seeds of each setting.
        flags: flags of all runs.
    """

    agents: Sequence[str]
    axes: Mapping[str, Sequence[str]]
    seeds: Sequence[int]
    flags: Sequence[str]

    @property
    def varied(self) -> str:
        """What tells the settings apart: a flag, if it is only one."""
        names = ["agent"] * (len(self.agents) > 1) + list(self.axes)
        return names[0] if len(names) == 1 else "setting"

    def settings(self) -> dict[str, Setting]:
        """Label -> setting, of every combination; a value alone is its label, if it can be.

        Files of --config are known by their folders and names.

        Raises:
            UsageError: two settings would have one label.
        """
        found: dict[str, Setting] = {}
        for agent, *values in itertools.product(self.agents, *self.axes.values()):
            own = dict(zip(self.axes, values))
            parts = dict(own)
            if "config" in own:
                parts["config"] = "/".join(Path(own["config"]).with_suffix("").parts[-2:])
            if len(self.agents) > 1 or not own:
                parts = {"agent": agent, **parts}
            label = ", ".join(f"{flag}={value}" for flag, value in parts.items())
            if len(parts) == 1:
                (label,) = parts.values()
            if label in found:
                raise UsageError(f"two files are called {label}: give them names that differ")
            found[label] = Setting(label, agent, own, self.flags)
        return found

    def joined(self, other: Grid) -> Grid:
        """With another one's values of the same axes, and its seeds."""
        axes = {flag: _union(values, other.axes[flag]) for flag, values in self.axes.items()}
        return self._replace(axes=axes, seeds=_union(self.seeds, other.seeds))

    def command(self) -> str:
        """The sweep's command without the seeds and what follows."""
        words = ["totalprop", "sweep", *self.agents]
        for name, values in self.axes.items():
            words += ["--estimators"] if name == "estimator" else ["--vary", name, "--values"]
            words += values
        return shlex.join(words)


def grid_of(command: str) -> Grid:
    """The grid of a sweep's command, as results.json quotes it.

    Raises:
        LookupError: it is not a sweep's.
        ValueError: it is not one of this version.
    """
    words = shlex.split(command)
    at = [i for i, word in enumerate(words) if word.rpartition(".")[2] == "sweep"]
    if not at:
        raise LookupError(f"{shown(command)} is no sweep")
    own, flags = split_flags(words[at[0] + 1 :])
    usage = io.StringIO()
    try:
        with contextlib.redirect_stderr(usage):
            options = parser_of("sweep").parse_args(own)
        return read_grid(options, flags)
    except SystemExit:
        reason = " ".join(usage.getvalue().rpartition("error: ")[2].split())
        raise ValueError(reason) from None
    except UsageError as error:
        raise ValueError(str(error)) from None


def _union(first: Sequence[T], then: Sequence[T]) -> list[T]:
    return list(dict.fromkeys((*first, *then)))


def read_grid(options: argparse.Namespace, flags: Sequence[str]) -> Grid:
    """The grid that a command line asks for.

    Args:
        options: agents, estimators, vary, values, seeds and grid, as parsed.
        flags: of all runs, after those of the file.
    Raises:
        UsageError: something is missing, or named twice.
    """
    names = options.vary or ["estimator"] * len(options.values)
    if len(names) != len(options.values):
        raise UsageError(
            f"each --vary FLAG needs its own --values, got {len(names)} and {len(options.values)}"
        )
    axes = list(zip(names, options.values))
    if options.estimators:
        axes.insert(0, ("estimator", options.estimators))
    agents, seeds, fixed = list(options.agents), list(options.seeds or []), list[str]()
    if options.grid is not None:
        settings = read_settings(options.grid)
        agents += _listed(options.grid, "agent", settings.pop("agent", []))
        try:
            seeds += map(seed, _listed(options.grid, "seed", settings.pop("seed", [])))
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"{options.grid}: seed {error}") from error
        for name, value in settings.items():
            flag = name.replace("_", "-")
            if name == "env_args" and isinstance(value, dict):
                fixed += env_arg_flags(value)
            elif isinstance(value, list):
                axes.append((flag, _listed(options.grid, name, value)))
            else:
                fixed += _as_flag(flag, *_listed(options.grid, name, value))
    for what, found in (("agent", agents), ("seed", seeds), ("flag", [name for name, _ in axes])):
        if len(set(found)) < len(found):
            raise UsageError(f"a grid names each {what} once, got {' '.join(map(str, found))}")
    for agent in agents:
        if agent not in AGENTS:
            raise UsageError(f"unknown agent {shown(agent)}; choose one of {', '.join(AGENTS)}")
    for flag in (*fixed, *flags):
        name = flag.partition("=")[0].removeprefix("--no-").removeprefix("--")
        if flag.startswith("--") and name in ("seed", *(axis for axis, _ in axes)):
            raise UsageError(
                f"{flag.partition('=')[0]} is different in the runs of the grid, so it cannot be a "
                "flag of all of them: leave it out"
            )
    if not agents or not seeds:
        raise UsageError("a sweep needs an agent and --seeds, or a --grid that names them")
    return Grid(agents, dict(axes), seeds, [*fixed, *flags])


def _listed(path: Path, name: str, value: Any) -> list[str]:
    """One value or a list of them, as they are typed on a command line."""
    values = value if isinstance(value, list) else [value]
    if not values and name not in ("agent", "seed"):
        raise UsageError(f"{path}: {name} has no values")
    for each in values:
        if not isinstance(each, str | int | float):
            raise UsageError(
                f"{path}: {name} must be a word, a number, true or false, or a list of them, got "
                f"{shown(each)}"
            )
    return [str(each).lower() if isinstance(each, bool) else str(each) for each in values]


def _as_flag(name: str, value: str) -> list[str]:
    """The words that set a flag; true and false are those of a switch."""
    if value in ("true", "false"):
        return [f"--{name}" if value == "true" else f"--no-{name}"]
    return [f"--{name}", value]
