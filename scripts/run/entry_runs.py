"""The runs that agents' entries name, `small_run` and `long_run`, as command lines and agents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from totalprop.agents.core.algorithm import Algorithm
from totalprop.scripts.run.arguments import parse


def command(agent: str, options: Mapping[str, Any]) -> list[str]:
    """Arguments of `totalprop train` for options by name; a list is the option several times."""
    found = [agent]
    for name, value in options.items():
        for each in value if isinstance(value, list | tuple) else [value]:
            found += [f"--{name.replace('_', '-')}", str(each)]
    return found


def untrained(agent: str, options: Mapping[str, Any]) -> Algorithm:
    """The agent that such a run begins with, in its environment."""
    job = parse(command(agent, options), usage="")
    env, eval_env = job.environments()
    eval_env.close()
    return job.algorithm(env)
