"""What a model file may hold: checks of its attributes, parameters and optimisers' states.

A file from an untrusted source may hold any values of any types. These checks come before the first
of them is used, so that it is an agent that works or one sentence.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.utils import LinearSchedule
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from totalprop.agents.core.validation import (
    AtLeast,
    Finite,
    constructor_hints,
    expectation,
    is_finite,
    is_whole,
)
from totalprop.agents.persistence.safe_file import BadFileError, shown

# Attributes of stable-baselines3's that are not arguments of constructors.
ATTRIBUTES: dict[str, Any] = {
    **dict.fromkeys(
        ("num_timesteps", "_total_timesteps", "_num_timesteps_at_start", "_episode_num",
         "_n_updates", "n_cut_episodes"),
        Annotated[int, AtLeast(0)],
    ),
    "n_envs": Annotated[int, AtLeast(1)],
    "_stats_window_size": Annotated[int, AtLeast(1)],
    "start_time": Annotated[float, Finite()],
    "_current_progress_remaining": Annotated[float, Finite()],
    "sde_sample_freq": Annotated[int, AtLeast(-1)],
    "action_noise": None,  # no agent here takes one
    "observation_space": spaces.Space,
    "action_space": spaces.Space,
}  # fmt: skip
# Factories whose results are memory of the size that a file's numbers ask for.
_FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)
MAX_INT, MAX_FLOAT = 2**63 - 1, torch.finfo(torch.float32).max  # what PyTorch converts
FREE_ELEMENTS, FREE_TENSORS = 2**20, 1000  # beside those of networks


class SizeLimit(TorchFunctionMode):
    """Within it, networks larger than the file's are refused before they are initialised.

    The sizes of networks are numbers in the file, and a short file can ask for any. What is made
    has to be in the file, too, so its tensors bound the largest, the sum and the count.

    Args:
        parameters: the tensors of the file, nested in dicts and lists.
    """

    def __init__(self, parameters: Any) -> None:
        super().__init__()
        stored: list[int] = []
        _collect_sizes(parameters, stored)
        self.largest = max([FREE_ELEMENTS, *stored])
        self.elements = 4 * sum(stored) + 4 * FREE_ELEMENTS
        self.tensors = 8 * len(stored) + FREE_TENSORS

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call `func` if the memory that it asks for is within the limits."""
        kwargs = kwargs or {}
        if func in _FACTORIES:
            shape = _asked(args, kwargs)
            size = math.prod(shape)
            self.elements -= size
            self.tensors -= 1
            if size > self.largest or self.elements < 0 or self.tensors < 0:
                raise BadFileError(
                    f"its settings ask for networks larger than those it holds (a tensor of "
                    f"{shown(list(shape))})"
                )
        return func(*args, **kwargs)


def _asked(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[int]:
    """The shape that is asked of a factory, as `size`, a sequence or several numbers."""
    if "size" in kwargs:
        return kwargs["size"]
    if args and isinstance(args[0], Sequence):
        return args[0]
    return [arg for arg in args if isinstance(arg, int)]


def _collect_sizes(value: Any, found: list[int]) -> None:
    if isinstance(value, Tensor):
        found.append(value.numel())
    elif isinstance(value, dict | list | tuple):
        for entry in value.values() if isinstance(value, dict) else value:
            _collect_sizes(entry, found)


def check_attributes(agent: BaseAlgorithm, attributes: Mapping[str, Any]) -> None:
    """Check the attributes in a file against the constructor's annotations and a new agent's.

    Args:
        agent: a new agent, which has the default of every attribute.
        attributes: name -> value, with both spaces.

    Raises:
        ValueError: one sentence with the attribute, what was expected and the value.
    """
    hints = {**constructor_hints(type(agent)), **ATTRIBUTES}
    for name, value in attributes.items():
        if name in hints:
            expected = expectation(hints[name], value, exact=True)
        elif name in _CHECKS:
            expected = _CHECKS[name](value)
        else:
            expected = _unlike(getattr(agent, name, None), value)
        if isinstance(value, LinearSchedule) and min(value.start, value.end) < 0:
            expected = "a schedule of numbers of at least 0"
        if isinstance(value, int | float):
            largest = MAX_INT if isinstance(value, int) else MAX_FLOAT
            expected = expected or f"at most {largest:.3g}" * (abs(value) > largest)
        if expected:
            raise BadFileError(f"its {name} must be {expected}, got {shown(value)}")
    if len({attributes.get(name) is None for name in _CHECKS}) > 1:
        raise BadFileError(f"it holds only one of {' and '.join(_CHECKS)}")
    _check_observations(attributes)


def _unlike(default: Any, value: Any) -> str:
    """What an attribute must be of which only the default is known; "" where the value is that."""
    if isinstance(default, bool):
        return "" if isinstance(value, bool) else "True or False"
    if isinstance(default, int | float):
        return "" if is_finite(value) else "a finite number"
    if isinstance(default, str | list | dict | tuple):
        return "" if isinstance(value, type(default)) else f"a {type(default).__name__}"
    return ""


def _not_episodes(value: Any) -> str:
    """Monitor's records of episodes, which logs average."""
    if value is None or (isinstance(value, deque) and all(map(_is_episode, value))):
        return ""
    return "a deque of episodes, each a dict of the numbers r and l"


def _is_episode(entry: Any) -> bool:
    return isinstance(entry, dict) and all(is_finite(entry.get(key)) for key in ("r", "l"))


def _not_successes(value: Any) -> str:
    if value is None or (
        isinstance(value, deque)
        and all(isinstance(x, bool | np.bool_) or is_finite(x) for x in value)
    ):
        return ""
    return "a deque of True and False"


_CHECKS: dict[str, Callable[[Any], str]] = {
    "ep_info_buffer": _not_episodes,
    "ep_success_buffer": _not_successes,
}


def _check_observations(attributes: Mapping[str, Any]) -> None:
    """The observations from which `learn` continues must be those of so many environments."""
    space, n = attributes["observation_space"], attributes.get("n_envs", 1)
    # The original ones are those of VecNormalize, around which stable-baselines3 turns images.
    for name, turned in (("_last_obs", False), ("_last_original_obs", True)):
        value = attributes.get(name)
        if value is not None and not _is_batch(value, space, n, turned=turned):
            raise BadFileError(f"its {name} is not one observation of each of {n} environments")
    if attributes.get("_last_obs") is None:  # `learn` resets the environments
        return
    starts = attributes.get("_last_episode_starts")
    if not isinstance(starts, np.ndarray) or starts.dtype != bool or starts.shape != (n,):
        raise BadFileError(f"its _last_episode_starts are not those of {n} environments")


def _is_batch(value: Any, space: spaces.Space[Any], n: int, *, turned: bool) -> bool:
    """Whether it holds n observations; `turned` are images whose channels may come last."""
    if isinstance(space, spaces.Dict):
        return (
            isinstance(value, dict)
            and value.keys() == space.spaces.keys()
            and all(_is_batch(value[key], part, n, turned=turned) for key, part in space.items())
        )
    shapes = [space.shape or ()]
    if turned and is_image_space(space):
        channels, *size = shapes[0]
        shapes.append((*size, channels))
    return (
        isinstance(value, np.ndarray)
        and value.dtype.kind in "biuf"
        and value.shape in [(n, *shape) for shape in shapes]
        and bool(np.isfinite(value).all())
    )


def not_finite(state: Any, name: str = "") -> str:
    """Name of the first tensor that `check_state` or `check_optimizer` would refuse; "" if none."""
    if isinstance(state, Tensor):
        is_bad = state.is_floating_point() and not torch.isfinite(state).all()
        return name if is_bad else ""
    entries: Any = ()
    if isinstance(state, Mapping):
        entries = state.items()
    elif isinstance(state, list | tuple):
        entries = enumerate(state)
    found = (not_finite(value, f"{name}.{key}" if name else str(key)) for key, value in entries)
    return next(filter(None, found), "")


class UnfitStateError(ValueError, RuntimeError):
    """A state dict does not fit; PyTorch, and so stable-baselines3, raises RuntimeError."""


def check_state(name: str, module: nn.Module, state: Any, *, exact_match: bool = True) -> None:
    """Check names, shapes, dtypes and finiteness of a state dict against the module's own.

    Raises:
        UnfitStateError: an entry does not fit; the message names the first.
    """
    ours = module.state_dict()
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UnfitStateError(f"'{name}' is not a state dict")
    optional = getattr(module, "OPTIONAL_BUFFERS", ())
    for key in sorted(state.keys() ^ ours.keys(), key=str):
        if key in optional and key in ours:
            continue
        if exact_match or key in state:
            side = "the file has" if key in state else "the file lacks"
            raise UnfitStateError(f"{side} {shown(key)} in '{name}'")
    grows = getattr(module, "GROWING_BUFFERS", ())
    for key, value in state.items():
        shape, kind = ours[key].shape, ours[key].dtype
        same = value.shape[1:] == shape[1:] if key in grows else value.shape == shape
        if not same:
            raise UnfitStateError(
                f"'{key}' in '{name}' is {list(value.shape)} in the file, {list(shape)} here"
            )
        if value.dtype != kind:
            raise UnfitStateError(f"'{key}' in '{name}' is {value.dtype} in the file, {kind} here")
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UnfitStateError(f"'{key}' in '{name}' holds a NaN or infinity")
    lengths = {len(state[key]) for key in grows if key in state}
    if len(lengths) > 1:
        raise UnfitStateError(f"{' and '.join(grows)} in '{name}' differ in length")
    check_meaning: Callable[[Any], None] | None = getattr(module, "check_state", None)
    if check_meaning is not None and state.keys() >= ours.keys():
        try:
            check_meaning(state)
        except ValueError as error:
            raise UnfitStateError(f"'{name}' cannot be used: {error}") from None


def check_optimizer(name: str, optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Check hyper-parameters, and names, shapes and finiteness of the moments.

    Raises:
        ValueError: an entry does not fit; the message names the first.
    """
    if not isinstance(state, dict) or set(state) != {"state", "param_groups"}:
        raise ValueError(f"'{name}' is not the state of an optimiser")
    groups, ours = state["param_groups"], optimizer.param_groups
    ends = list(itertools.accumulate((len(group["params"]) for group in ours), initial=0))
    numbers = [list(range(*pair)) for pair in itertools.pairwise(ends)]
    if not isinstance(groups, list) or [_numbers(group) for group in groups] != numbers:
        raise ValueError(f"'{name}' in the file is for other parameters")
    parameters = [p for group in ours for p in group["params"]]
    moments = state["state"]
    if not isinstance(moments, dict) or not all(
        isinstance(index, int) and 0 <= index < len(parameters) for index in moments
    ):
        raise ValueError(f"'{name}' in the file is for other parameters")
    index = 0
    for group, own in zip(groups, ours, strict=True):
        expected = _moments_of(name, optimizer, group, own)
        for parameter in own["params"]:
            if index in moments:
                _check_moments(name, moments[index], expected, parameter)
            index += 1


def with_own_devices(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A checked state whose groups compute as the optimiser's own do, whatever wrote the file."""
    groups = [
        {**group, **{key: own[key] for key in own.keys() & _OF_DEVICES}}
        for group, own in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    return {**state, "param_groups": groups}


def _numbers(group: Any) -> list[Any]:
    """The parameters of a group, which states number in their order."""
    found = group.get("params") if isinstance(group, dict) else None
    return found if isinstance(found, list) and all(map(is_whole, found)) else [None]


def _moments_of(
    name: str, optimizer: torch.optim.Optimizer, group: dict[str, Any], own: dict[str, Any]
) -> dict[str, int]:
    """What the optimiser keeps of a parameter, name -> number of axes, found by one step of it.

    The optimiser's own constructor checks the ranges of its hyper-parameters.
    """
    for key, value in group.items():
        if key == "params":
            continue
        if key not in own:
            raise ValueError(f"'{name}' in the file has {shown(key)}, which it does not take")
        is_flag = isinstance(own[key], bool) and key not in _OF_DEVICES
        if not _is_like(own[key], value) or (is_flag and value != own[key]):
            raise ValueError(f"'{key}' in '{name}' is {shown(value)}, which it does not take")
    if missing := sorted(set(own) - set(group) - {"decoupled_weight_decay"}):  # new in PyTorch 2.7
        raise ValueError(f"'{name}' in the file lacks '{missing[0]}'")
    parameter = nn.Parameter(torch.ones(1))
    taken = inspect.signature(type(optimizer).__init__).parameters.keys() - _OF_DEVICES
    settings: dict[str, Any] = {
        key: float(value) if isinstance(value, Tensor) else value
        for key, value in group.items()
        if key in taken and key in optimizer.defaults
    }
    try:
        trial = type(optimizer)([parameter], **settings)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"'{name}' in the file: {error}") from error
    parameter.grad = torch.ones_like(parameter)
    trial.step()
    return {key: value.dim() for key, value in trial.state[parameter].items()}


# Settings of an optimiser that change how it computes and not what.
_OF_DEVICES = {"foreach", "fused", "capturable"}


def _is_like(own: Any, value: Any) -> bool:
    """Whether a hyper-parameter is of its kind: a flag, a finite number, or several."""
    if isinstance(own, bool) or own is None:
        return value is None or isinstance(value, bool)
    if isinstance(own, tuple | list):
        is_like = isinstance(value, tuple | list) and len(value) == len(own)
        return is_like and all(map(is_finite, value))
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    return is_finite(number)


def _check_moments(name: str, moments: Any, expected: dict[str, int], parameter: Tensor) -> None:
    if not isinstance(moments, dict) or set(moments) != set(expected):
        raise ValueError(f"'{name}' in the file does not keep {' and '.join(expected)}")
    for key, value in moments.items():
        shape = parameter.shape if expected[key] else torch.Size([])
        if not isinstance(value, Tensor):
            raise ValueError(f"'{key}' in '{name}' is not a tensor")
        if value.shape != shape:
            raise ValueError(
                f"'{key}' in '{name}' is {list(value.shape)} in the file, {list(shape)} here"
            )
        if not torch.isfinite(value).all():
            raise ValueError(f"'{key}' in '{name}' holds a NaN or infinity")
        if key in _NOT_NEGATIVE and (value < 0).any():
            raise ValueError(f"'{key}' in '{name}' holds a negative number")


# Numbers of steps and means of squares, by their names in PyTorch's optimisers.
_NOT_NEGATIVE = ("step", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
