"""The command line of `totalprop train`: an agent's flags, presets, and --config files.

Flags are the constructor's arguments: types, ranges and choices come from the signature, help from
the docstring.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import io
import itertools
import re
import shlex
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import tyro
import yaml
from docstring_parser import parse as parse_docstring
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from totalprop.agents import AGENTS
from totalprop.agents.core.validation import RANGES, constructor_hints
from totalprop.agents.persistence import safe_file
from totalprop.agents.persistence.safe_file import in_one_line, shown
from totalprop.scripts.commands import add_import
from totalprop.scripts.flag_types import Parser, integer
from totalprop.scripts.run.environments import check_import, env_arg_flags, our_id, parse_env_args
from totalprop.scripts.run.errors import UserError
from totalprop.scripts.run.hub import local
from totalprop.scripts.run.job import NOT_FLAGS, Job, RunOptions
from totalprop.scripts.run.policy_kwargs import (
    SB3_FLAGS,
    default_policy_kwargs,
    flag_type,
    from_flag,
    policy_parameters,
    to_flag,
    to_words,
)

# Entries of a run's config.json that are not settings. A stranger's file starts no upload.
RECORDED = {"commit", "env_arg", "runs", "threads", "track", "track_project"}


REGISTRY = ConstructorRegistry()


@REGISTRY.primitive_rule
def _integers(of: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    if of.type is not int:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda words: integer(words[0]),
        is_instance=lambda value: type(value) is int,
        str_from_instance=lambda value: [str(value)],
    )


class Integers(tuple[int, ...]):
    """A list of integers in one word of a flag, 0,2 or [0,2]."""

    metavar = "INT,INT"


class Numbers(tuple[float, ...]):
    """A list of numbers in one word of a flag, -1,0.5 or [-1,0.5]."""

    metavar = "FLOAT,FLOAT"


@REGISTRY.primitive_rule
def _lists(of: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    if of.type not in (Integers, Numbers):
        return None
    read: Callable[[str], Any] = integer if of.type is Integers else float
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=of.type.metavar,
        instance_from_str=lambda words: tuple(map(read, words[0].strip("[]").split(","))),
        is_instance=lambda value: isinstance(value, tuple | list),
        str_from_instance=lambda value: list(to_words([value])),
    )


NESTED = {
    tuple[tuple[int, int], ...]: tuple[Integers, ...],
    Sequence[Sequence[float]]: tuple[Numbers, ...],
}


def agent_flags(agent: str) -> type:
    """Dataclass of the agent's flags, from its constructor's signature and docstring."""
    cls = AGENTS[agent].cls
    hints, texts = constructor_hints(cls), _texts(cls)
    fields = [
        _field(name, _typed(hints[name]), texts.get(name, ""), parameter.default)
        for name, parameter in inspect.signature(cls.__init__).parameters.items()
        if name not in NOT_FLAGS and not name.startswith("_")
    ]
    return _dataclass(f"{cls.__name__}Flags", fields, f"Arguments of {cls.__name__}.")


def policy_flags(agent: str) -> type:
    """Dataclass of the flags that become `policy_kwargs`."""
    fields = []
    for name, (cls, parameter) in policy_parameters(AGENTS[agent]).items():
        text = SB3_FLAGS[name][1] if name in SB3_FLAGS else _texts(cls).get(name, "")
        fields.append(_field(name, flag_type(name, cls), text, to_flag(name, parameter.default)))
    return _dataclass(
        f"{AGENTS[agent].cls.__name__}PolicyFlags", fields, "Arguments of its policy."
    )


def run_flags() -> type[RunOptions]:
    """RunOptions whose flags show their ranges."""
    hints = typing.get_type_hints(RunOptions, include_extras=True)
    fields = [
        (field.name, Annotated[hints[field.name], tyro.conf.arg(metavar=metavar)], copy(field))
        for field in dataclasses.fields(RunOptions)
        if (metavar := _metavar(hints[field.name]))
    ]
    return _dataclass("RunFlags", fields, str(RunOptions.__doc__), bases=(RunOptions,))


def _dataclass(name: str, fields: list[Any], doc: str, bases: tuple[type, ...] = ()) -> type:
    made = dataclasses.make_dataclass(name, fields, bases=bases, frozen=True)
    made.__doc__ = doc
    return made


def _texts(cls: type) -> dict[str, str]:
    """Argument -> its docstring entry, in one line."""
    found = {}
    for base in reversed(cls.__mro__):
        for entry in parse_docstring(vars(base).get("__doc__") or "").params:
            found[entry.arg_name] = " ".join((entry.description or "").split())
    return found


def _field(name: str, kind: Any, text: str, default: Any) -> tuple[str, Any, Any]:
    """A dataclass's field whose flag shows its range and its help."""
    if text[:1].isascii():  # not of λ
        text = text[:1].upper() + text[1:]
    shown = tyro.conf.arg(help=text, metavar=_metavar(kind))
    return name, Annotated[kind, shown], dataclasses.field(default=default)


def _typed(hint: Any) -> Any:
    """The part of a union that can be typed on a command line: float | Schedule -> float."""
    if get_origin(hint) not in (typing.Union, types.UnionType):
        return hint
    types_of_text = (int, float, str, bool, type(None))
    members = [NESTED.get(m, m) for m in get_args(hint)]
    plain = [m for m in members if _base(m) in types_of_text or get_origin(m) in (Literal, tuple)]
    return typing.Union[tuple(plain)]  # noqa: UP007  (built at run time)


def _base(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _metavar(hint: Any) -> str | None:
    """Return a type and range, such as INT ≥ 2; None where tyro's own text is enough."""
    members = get_args(hint) if get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    words = [
        word for member in members if get_origin(member) is Literal for word in get_args(member)
    ]
    others = "".join(f" | {word}" for word in words + ["None"] * (type(None) in members))
    for member in members:
        if member in NESTED.values():
            return f"{get_args(member)[0].metavar} ...{others}"
        for found in getattr(member, "__metadata__", ()):
            if isinstance(found, RANGES) and found.symbol:
                return f"{_base(member).__name__.upper()} {found.symbol}{others}"
    return None


def parse(arguments: Sequence[str], usage: str) -> Job:
    """The run that a command line asks for; exits with 2 on wrong usage.

    Args:
        arguments: [AGENT] [--config FILE] [--preset NAME] and flags, of which the later count.
        usage: printed where no agent is named.
    """
    try:
        return _parse(list(arguments), usage)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _parse(arguments: list[str], usage: str) -> Job:
    config, imports = _take(arguments, "--config"), []
    while (module := _take(arguments, "--import")) is not None:
        imports.append(module)
    if config == "":
        raise UserError("--config needs a run's folder, its config.json, or a YAML file")
    config = config and str(local(config))
    settings = {} if config is None else read_settings(Path(config))
    if config is not None and (not arguments or arguments[0].startswith("-")):
        if "agent" not in settings:
            raise UserError(f"{config} names no agent; put one first: totalprop train AGENT ...")
        arguments.insert(0, str(settings["agent"]))
    agent = arguments[0] if arguments else ""
    if agent not in AGENTS:
        known = ", ".join(AGENTS)
        near = difflib.get_close_matches(agent, AGENTS, 1)
        if near:
            raise UserError(f"unknown agent {shown(agent)}; did you mean {near[0]}?")
        print(usage)
        if agent in ("-h", "--help"):
            raise SystemExit(0)
        what = f"unknown agent {shown(agent)}" if agent else "an agent must be named"
        raise UserError(f"{what}; choose one of {known}")
    if (named := settings.pop("agent", agent)) != agent:
        raise UserError(f"{config} is for {named}, not {agent}")
    flags = arguments[1:]
    preset = _take(flags, "--preset")
    in_config = str(settings.pop("preset", None) or "")
    entry, preset = AGENTS[agent], in_config if preset is None else preset
    if preset not in entry.presets and not (preset == in_config == ""):
        raise UserError(f"unknown preset {shown(preset)}; choose one of {', '.join(entry.presets)}")
    defaults = _defaults(agent, preset)
    is_own = any(flag.partition("=")[0] in ("--env-id", "--env_id") for flag in flags)
    if config is not None:
        flags = [*_as_flags(settings, config, defaults), *flags]
    run, own, policy = _parse_flags(agent, flags, defaults)
    if run.offline and not any(re.match(r"--env[-_]id(=|$)", flag) for flag in flags):
        run = dataclasses.replace(run, env_id="")  # that of the dataset, not the agent's default
    if config is not None and not is_own:
        _check_import(run.env_id, Path(config), imports)
    # A run's config.json holds all arguments of its environment, and the preset may have changed.
    is_of_a_run = (
        config is not None and preset == in_config and not config.endswith((".yaml", ".yml"))
    )
    if not is_of_a_run:
        run = _with_env_args(run, entry.preset_runs.get(preset, {}))
    return Job(
        agent=agent,
        preset=preset,
        options=run,
        env_args=parse_env_args(run.env_arg),
        arguments=dataclasses.asdict(own),
        policy_kwargs={k: from_flag(k, v) for k, v in dataclasses.asdict(policy).items()},
    )


def _check_import(env_id: str, config: Path, imports: list[str]) -> None:
    """An environment's module is named by the command line, too, before it is imported."""
    is_run = config.is_dir() or config.name == "config.json"
    within = None if not is_run else config if config.is_dir() else config.parent
    check_import(env_id, config, imports, within=within)


def _take(arguments: list[str], flag: str) -> str | None:
    """Remove `flag VALUE` or `flag=VALUE`; None where it is not there, "" without a value."""
    for i, argument in enumerate(arguments):
        name, separator, value = argument.partition("=")
        if name == flag:
            value = value if separator else "".join(arguments[i + 1 : i + 2])
            del arguments[i : i + (1 if separator else 2)]
            return value
    return None


def _defaults(agent: str, preset: str) -> tuple[RunOptions, Any, Any]:
    """Options, agent's and policy's flags as a preset sets them, without `_with_env_args`."""
    entry, own = AGENTS[agent], agent_flags(agent)
    run = {**entry.run, **entry.preset_runs.get(preset, {})}
    for name in ("action_repeat", "env_arg"):
        run.pop(name, None)
    names = {field.name for field in dataclasses.fields(own)}
    values = {k: v for k, v in entry.presets.get(preset, {}).items() if k in names}
    policy = {k: to_flag(k, v) for k, v in default_policy_kwargs(agent, preset).items()}
    return run_flags()(**run), own(**{"seed": 0, **values}), policy_flags(agent)(**policy)


def _parse_flags(
    agent: str, arguments: Sequence[str], defaults: tuple[RunOptions, Any, Any]
) -> tuple[RunOptions, Any, Any]:
    entry = AGENTS[agent]
    kinds: list[Any] = [tyro.conf.OmitArgPrefixes[type(part)] for part in defaults]  # type: ignore[misc]
    command = dataclasses.make_dataclass(
        "Command", list(zip(("run", "agent", "policy"), kinds, strict=True))
    )
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            parsed = tyro.cli(
                command,
                args=arguments,
                prog=f"totalprop train {agent}",
                description=f"{entry.cls.__doc__.splitlines()[0]}\n"  # type: ignore[union-attr]
                f"--preset {{{','.join(entry.presets)}}} starts from a paper's or our settings.\n"
                "--config FILE starts from a run's config.json, hf://ORG/NAME, or a YAML file.\n"
                "--import MODULE allows the file's environment, MODULE:ID, to import its module.\n"
                "Flags override both.",
                default=command(*defaults),
                registry=REGISTRY,
            )
    except SystemExit as stop:
        if stop.code:
            help_command = f"totalprop train {agent} --help lists the flags"
            raise UserError(f"{_unboxed(box.getvalue())}; {help_command}") from None
        raise
    return RunOptions(**vars(parsed.run)), parsed.agent, parsed.policy


def _with_env_args(options: RunOptions, preset_run: Mapping[str, Any]) -> RunOptions:
    """With a preset's arguments of the environment that its paper trains on.

    An action repeat is for any task of the control suite, `env_arg` for the preset's own `env_id`.
    """
    wanted: list[str] = []
    if "action_repeat" in preset_run and our_id(options.env_id).startswith("dmc/"):
        wanted.append(f"action_repeat={preset_run['action_repeat']}")
    if options.env_id == preset_run.get("env_id"):
        wanted.extend(preset_run.get("env_arg", ()))
    given = {argument.partition("=")[0] for argument in options.env_arg}
    missing = [argument for argument in wanted if argument.partition("=")[0] not in given]
    return dataclasses.replace(options, env_arg=(*missing, *options.env_arg))


def _unboxed(box: str) -> str:
    """The message of tyro's box of several lines, and the flag that it takes for meant."""
    lines = [line.strip("│ ") for line in box.splitlines()]
    # Rulers part title, message and help; where lines can be drawn, the title is in the first one.
    groups = itertools.groupby(lines, lambda line: line[:1] in "╭╰" or not line.strip("─-"))
    blocks = [" ".join(group) for is_ruler, group in groups if not is_ruler]
    message = blocks[0 if box.startswith("╭") else 1].partition("  Got errors")[0].rstrip(".")
    unfit = (
        r"Error parsing (--[\w-]+): no type matching .* could be instantiated from \['?(.*?)'?\]"
    )
    message = re.sub(unfit, r"\1 cannot be \2", message)
    near = re.search(r"Perhaps you meant: (--[\w-]+)", " ".join(blocks))
    return f"{message}; did you mean {near[1]}?" if near else message


def read_settings(path: Path) -> dict[str, Any]:
    """Settings by name, of a run's config.json (or its folder) or of a YAML file.

    A YAML file names agent, preset, flags (with underscores or hyphens) and `env_args`, a mapping.

    Raises:
        UserError: the file cannot be read, or is not a mapping.
    """
    path = path / "config.json" if path.is_dir() else path
    try:
        if path.suffix == ".json":
            found = safe_file.read_json(path)
        else:
            safe_file.check_regular(path)
            found = yaml.safe_load(path.read_text())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path}: {in_one_line(error)}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold settings by name, such as `estimator: tpx`")
    settings = {str(name).replace("-", "_"): value for name, value in found.items()}
    if "options" in settings:  # a run's: its options hold what they were made of, too
        parts = [settings.pop(part, {}) for part in ("options", "arguments", "policy_kwargs")]
        if not all(isinstance(part, dict) for part in parts):
            raise UserError(f"{path}: options, arguments and policy_kwargs must be JSON objects")
        settings = {k: v for part in (*parts, settings) for k, v in part.items()}
        settings = {k: v for k, v in settings.items() if k not in RECORDED}
    return settings


def _as_flags(settings: dict[str, Any], config: str, defaults: Sequence[Any]) -> list[str]:
    """Settings as the flags that would set them, so that both are checked by the same code."""
    known = [field.name for part in defaults for field in dataclasses.fields(part)]
    flags = []
    for name, value in settings.items():
        if name == "env_args" or (name == "env_arg" and isinstance(value, dict)):
            if not isinstance(value, dict):
                raise UserError(f"{config}: env_args must be a mapping, got {shown(value)}")
            flags += env_arg_flags(value)
            continue
        if name not in known:
            near = difflib.get_close_matches(name, [*known, "env_args", "preset", "agent"], 1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise UserError(f"{config} sets {shown(name)}, which is not a setting{hint}")
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            flags.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, list | tuple | dict):
            parts = value.values() if isinstance(value, dict) else [value]
            words = to_words(value) if all(isinstance(part, list) for part in parts) else ["--"]
            if any(word.startswith("--") for word in words):  # it would be a flag of its own
                raise UserError(f"{config}: {name} cannot be {shown(value)}")
            flags += [flag, *words]
        else:
            flags.append(f"{flag}={value}")
    return flags


def parse_resume(arguments: Sequence[str]) -> tuple[Path, int | None, list[str]]:
    """(run folder, steps or None, modules that its config may name) of `--resume RUN`."""
    parser = Parser("totalprop train", description="Resume a run.")
    parser.add_argument("--resume", type=Path, required=True, metavar="RUN", help="its folder")
    parser.add_argument(
        "--total-timesteps", type=int, help="steps in all, to extend a run beyond what it was for"
    )
    add_import(parser)
    options, others = parser.parse_known_args(arguments)
    if others:
        parser.error(
            f"a resumed run keeps its agent and settings; leave out {shlex.join(others)}, or start "
            "a run of its own without --resume"
        )
    return options.resume, options.total_timesteps, options.imports
