"""Arguments of policies on the command line and in config.json, where classes are names.

`AgentEntry.policy_flags` lists them; their types and defaults are those of the policies'
constructors.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_type_hints

from torch import nn

from totalprop.agents import AGENTS
from totalprop.agents.core.algorithm import Algorithm
from totalprop.agents.core.entry import AgentEntry
from totalprop.agents.core.validation import expectation
from totalprop.agents.persistence.safe_file import shown
from totalprop.scripts.run.errors import UserError

Activation = Literal["tanh", "relu", "leaky_relu", "elu", "gelu", "silu"]
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh, "relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "elu": nn.ELU, "gelu": nn.GELU,
    "silu": nn.SiLU,
}  # fmt: skip
NAMES = {activation: name for name, activation in ACTIVATIONS.items()}
# Arguments whose types in stable-baselines3 cannot be those of a flag: the flag's type and help.
SB3_FLAGS: dict[str, tuple[Any, str]] = {
    "net_arch": (
        tuple[str, ...] | None,
        "Hidden layers of policy and critic: 256 256, or pi=512,512 vf=1024,1024; None: 64 64.",
    ),
    "activation_fn": (Activation, "Activation of policy and critic."),
}


def policy_parameters(entry: AgentEntry) -> dict[str, tuple[type, inspect.Parameter]]:
    """Look up an agent's policy flags: name -> (policy class, parameter)."""
    found: dict[str, tuple[type, inspect.Parameter]] = {}
    for cls in entry.cls.policy_aliases.values():
        parameters = inspect.signature(cls.__init__).parameters
        for name in entry.policy_flags:
            if name in parameters:
                found.setdefault(name, (cls, parameters[name]))
    return found


def default_policy_kwargs(agent: str, preset: str = "") -> dict[str, Any]:
    """The policies' defaults, overridden by those of a preset, as JSON."""
    entry = AGENTS[agent]
    defaults = {name: p.default for name, (_, p) in policy_parameters(entry).items()}
    kwargs = {**defaults, **entry.presets.get(preset, {}).get("policy_kwargs", {})}
    return {name: NAMES.get(value, value) if isinstance(value, type) else value
            for name, value in kwargs.items()}  # fmt: skip


def policy_kwargs_from_json(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Convert JSON to the `policy_kwargs` that a constructor takes."""
    made = dict(kwargs)
    if "activation_fn" in made:
        made["activation_fn"] = ACTIVATIONS[made["activation_fn"]]
    return made


def check_policy_kwargs(agent: str, kwargs: Mapping[str, Any]) -> None:
    """Check policy_kwargs from a file as if they had been flags.

    Raises:
        UserError: one is unknown, or has a value that it cannot have.
    """
    known = policy_parameters(AGENTS[agent])
    for name, value in kwargs.items():
        if name not in known:
            raise UserError(f"{shown(name)} is not an argument of a policy of {agent}")
        if name == "net_arch" and value is not None:
            layers = value if isinstance(value, list | dict) else [value]
            words = to_words(layers) if not isinstance(layers, dict) else _words(layers)
            from_flag(name, words)
        elif expected := expectation(flag_type(name, known[name][0]), value, exact=True):
            raise UserError(f"{name} must be {expected}, got {shown(value)}")


def _words(layers: Mapping[str, Any]) -> tuple[str, ...]:
    """`to_words` of what may not be lists."""
    return to_words({k: v if isinstance(v, list) else [v] for k, v in layers.items()})


def accepted(cls: type[Algorithm], policy: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Select the arguments that a policy accepts.

    Raises:
        UserError: an argument that the policy does not accept differs from its default.
    """
    if policy not in cls.policy_aliases:
        return dict(kwargs)  # the agent's constructor raises, and lists the known policies
    parameters = inspect.signature(cls.policy_aliases[policy].__init__).parameters
    others = [inspect.signature(p.__init__).parameters for p in cls.policy_aliases.values()]
    for name in kwargs.keys() - parameters.keys():
        default = next((p[name].default for p in others if name in p), None)
        if kwargs[name] != default:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} is not an argument of {policy}; leave it out")
    return {name: value for name, value in kwargs.items() if name in parameters}


def to_flag(name: str, value: Any) -> Any:
    """Convert a JSON value to that of its flag."""
    return to_words(value) if name == "net_arch" and value is not None else value


def to_words(value: Mapping[str, Sequence[Any]] | Sequence[Any]) -> tuple[str, ...]:
    """Format a list, of lists, too, or a mapping to lists, for a flag.

    256 256, or [0,2] [1,3], or pi=512,512 vf=1024,1024.
    """
    if isinstance(value, Mapping):
        return tuple(f"{key}={','.join(map(str, items))}" for key, items in value.items())
    return tuple(
        f"[{','.join(map(str, item))}]" if isinstance(item, list | tuple) else str(item)
        for item in value
    )


def from_flag(name: str, value: Any) -> Any:
    """Convert the value of a flag to JSON.

    Raises:
        UserError: the layers are neither numbers nor pi=... vf=...
    """
    if name != "net_arch" or value is None:
        return value
    layers: dict[str, list[int]] = {}
    with contextlib.suppress(ValueError):
        for word in value:
            part, _, sizes = word.rpartition("=")
            layers.setdefault(part, []).extend(int(size) for size in sizes.split(","))
        is_positive = all(size > 0 for sizes in layers.values() for size in sizes)
        if is_positive and (set(layers) == {""} or {"pi"} <= set(layers) <= {"pi", "vf"}):
            return layers.get("", layers)
    raise UserError(
        "--net-arch expects sizes (256 256) or pi=512,512 vf=1024,1024, got "
        f"{shown(' '.join(value))[1:-1]}"
    )


def flag_type(name: str, cls: type) -> Any:
    """Type of a flag on the command line."""
    if name in SB3_FLAGS:
        return SB3_FLAGS[name][0]
    return get_type_hints(vars(_owner(cls))["__init__"], include_extras=True)[name]


def _owner(cls: type) -> type:
    return next(base for base in cls.__mro__ if "__init__" in vars(base))
