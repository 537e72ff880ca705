"""The base of all agents: stable-baselines3's `BaseAlgorithm` with safe files and checkpoints."""

from __future__ import annotations

import copy
import inspect
import io
import warnings
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, ClassVar, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from stable_baselines3.common.base_class import BaseAlgorithm, maybe_make_env
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import recursive_getattr
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.utils import check_for_correct_spaces, get_system_info
from stable_baselines3.common.vec_env import VecEnv, VecMonitor, unwrap_vec_normalize
from torch import Tensor, nn

from totalprop.agents.core.checked_env import check_environments
from totalprop.agents.core.file_contents import (
    SizeLimit,
    check_attributes,
    check_optimizer,
    check_state,
    not_finite,
    with_own_devices,
)
from totalprop.agents.core.processes import Processes, share_statistics
from totalprop.agents.core.spaces import (
    UnsupportedSpaceError,
    describe,
    not_nested,
    refuse_mixed_images,
    to_actions,
)
from totalprop.agents.core.validation import check_arguments, whole
from totalprop.agents.core.vector_env import GymnasiumVecEnv
from totalprop.agents.persistence import safe_file
from totalprop.agents.persistence.safe_file import UNREADABLE, BadFileError, NotInFile

# Observations that stable-baselines3's environments and policies know.
HELD_SPACES = (
    spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary, spaces.Dict
)  # fmt: skip
SelfAlgorithm = TypeVar("SelfAlgorithm", bound="Algorithm")


def _remedy(space: spaces.Space) -> str:
    """What to do about observations that stable-baselines3 does not know; "" if it does."""
    parts = list(space.values()) if isinstance(space, spaces.Dict) else []
    if isinstance(space, spaces.Tuple) or any(
        isinstance(part, spaces.Dict | spaces.Tuple) for part in parts
    ):
        return not_nested(space)
    if isinstance(space, HELD_SPACES) and all(isinstance(part, HELD_SPACES) for part in parts):
        return ""
    entries = space.items() if isinstance(space, spaces.Dict) else ()
    held = [name for name, part in entries if isinstance(part, HELD_SPACES)]
    if not held:
        return "convert them with gymnasium.wrappers.TransformObservation"
    return f"leave out the others: gymnasium.wrappers.FilterObservation(env, {held})"


def _range_of(space: spaces.Box) -> np.ndarray:
    """[...] high - low in the space's own numbers, infinite where these overflow."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(space.high - space.low, float)


def _refuse_starts(agent: str, observations: spaces.Space, actions: spaces.Space) -> None:
    """Refuse choices that are not counted from 0, which SB3's policies take for others."""
    seen = list(observations.values()) if isinstance(observations, spaces.Dict) else [observations]
    for part, what, shift in [(actions, "actions", "TransformAction")] + [
        (part, "observations", "TransformObservation") for part in seen
    ]:
        if np.any(start := getattr(part, "start", 0)):
            sign = "+" if part is actions else "-"
            raise UnsupportedSpaceError(
                f"{agent} counts choices from 0, and its {what}, {describe(part)}, start at "
                f"{start}: shift them with gymnasium.wrappers.{shift}(env, lambda x: x {sign} "
                f"start, space), where the space is the same without start"
            )


def _in_words(kinds: tuple[type[spaces.Space], ...]) -> str:
    if kinds == (spaces.Box,):
        return "continuous actions (a Box)"
    *most, last = (kind.__name__ for kind in kinds)
    return f"actions that are a {', '.join(most)} or {last}"


class NoEnvironmentError(ValueError, AssertionError):
    """An agent was to learn without an environment; stable-baselines3 raises AssertionError."""


class Algorithm(BaseAlgorithm):
    """Base of all agents. It provides what is common to them, with SB3's interface:

    - `save`, `load` and `set_parameters` with files that cannot execute code (`safe_file`);
    - `state_dict`, `load_state_dict` and `cut_episodes` for exact resume (`checkpoint`);
    - `set_random_seed`, which also seeds a generator of the agent's own, `_generator`;
    - `set_env`, which refuses VecNormalize for agents that cannot work with it;
    - attributes that may be set later: `learn` checks and uses what they are by then.

    An agent adds its networks (`_setup_model`), `learn` and `predict`, and extends `state_dict`,
    `load_state_dict`, `_excluded_save_params` and `_get_torch_save_params` by its own state.

    Attributes:
        no_vec_normalize: why the agent cannot work with VecNormalize and what to do instead; ""
            if it can.
        action_spaces: the kinds of action spaces that the agent can work with; () for all.
        takes_starts: whether choices may be counted from another number than 0.
        check_observations: whether `predict` refuses observations that are not finite.
        fixed_arguments: those that cannot be set later, because something was built from them.
        phase: what the agent does between two steps if it takes long, in words; "" otherwise.
    """

    no_vec_normalize: ClassVar[str] = ""
    action_spaces: ClassVar[tuple[type[spaces.Space], ...]] = ()
    takes_starts: ClassVar[bool] = True
    check_observations = True
    phase: str = ""
    fixed_arguments: ClassVar[tuple[str, ...]] = ("policy_kwargs",)
    group: dist.ProcessGroup | None = None  # an argument of agents that several can learn
    _fixed: Mapping[str, Any] = MappingProxyType({})
    _own_names: frozenset[str] = frozenset()  # of attributes, when the agent was made
    _own_lr_schedule: Any = None  # that was made of `learning_rate`
    _generator: torch.Generator

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for policy_class in cls.policy_aliases.values():  # files may name them
            safe_file.register_class(policy_class)

    # ----------------------------------------------------------------------------------------
    # seeds and environments
    # ----------------------------------------------------------------------------------------

    def set_random_seed(self, seed: int | None = None) -> None:
        """Like SB3's, and also seed the agent's own generator; None draws a seed for it.

        Raises:
            ValueError: NumPy takes no such seed.
        """
        if seed is not None and not 0 <= seed < 2**32:
            raise ValueError(f"seed must be at least 0 and below 2^32, got {seed}")
        super().set_random_seed(seed)
        seed = self._draw_seed() if seed is None else seed
        self._generator = torch.Generator(self.device).manual_seed(seed)

    @property
    def _processes(self) -> Processes:
        return Processes(self.group)

    def _join(self) -> None:
        """Begin with the parameters of the first process, and with random numbers of one's own."""
        processes = self._processes
        if processes.size == 1:
            return
        for name in self._get_torch_save_params()[0]:
            if isinstance(thing := recursive_getattr(self, name), nn.Module):
                processes.send(thing)
        self.set_random_seed(processes.seed(processes.objects(self._generator.initial_seed())[0]))

    def recent_episodes(self) -> tuple[list[Any], list[Any]]:
        """Monitor's records of the last episodes of all processes, and their successes."""
        both = self.ep_info_buffer or (), self.ep_success_buffer or ()
        infos, successes = (
            [entry for part in self._processes.objects(list(own)) for entry in part] for own in both
        )
        return infos, successes

    def _draw_seed(self) -> int:
        return int(torch.randint(2**31, ()))

    @classmethod
    def _wrap_env(cls, env: GymEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        env = maybe_make_env(env, verbose)  # `load` and `set_env` take ids, too
        if (callable(env) and not hasattr(env, "step")) or isinstance(env, type):
            raise ValueError(
                f"{cls.__name__} needs an environment or its id, got {env!r}, which makes one; "
                "call it"
            )
        if cls.no_vec_normalize and isinstance(env, VecEnv) and unwrap_vec_normalize(env):
            raise ValueError(cls.no_vec_normalize)
        if isinstance(env, VectorEnv):
            env = VecMonitor(GymnasiumVecEnv(env))
        seen, actions = env.observation_space, env.action_space
        if remedy := _remedy(seen):
            raise UnsupportedSpaceError(
                f"{cls.__name__} needs numbers as observations, got {describe(seen)}; {remedy}"
            )
        refuse_mixed_images(seen)
        if not cls.takes_starts:
            _refuse_starts(cls.__name__, seen, actions)
        if cls.action_spaces and not isinstance(actions, cls.action_spaces):
            raise UnsupportedSpaceError(
                f"{cls.__name__} needs {_in_words(cls.action_spaces)}, got {describe(actions)}; "
                f"{to_actions(actions, cls.action_spaces)}"
            )
        if isinstance(actions, spaces.Box) and not np.isfinite(_range_of(actions)).all():
            raise UnsupportedSpaceError(
                "the action space must have finite bounds, not too far apart, got "
                f"{describe(actions)}; give it bounds: gymnasium.wrappers.TransformAction(env, "
                f"lambda action: action, gymnasium.spaces.Box(-1, 1, {actions.shape}))"
            )
        return check_environments(BaseAlgorithm._wrap_env(env, verbose, monitor_wrapper))

    def _get_policy_from_name(self, policy_name: str) -> type[BasePolicy]:
        if policy_name not in self.policy_aliases:
            raise ValueError(
                f"unknown policy {policy_name!r}; {type(self).__name__} has "
                f"{', '.join(map(repr, self.policy_aliases))}"
            )
        return super()._get_policy_from_name(policy_name)

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """Like SB3's; if the environment is refused, the old one remains.

        Raises:
            ValueError: the agent cannot work with `env`.
        """
        names = ("env", "n_envs", "_vec_normalize_env", "_last_obs")
        before = {name: getattr(self, name) for name in names}
        super().set_env(env, force_reset)
        try:
            self._adopt_env()
        except ValueError:
            vars(self).update(before)
            raise

    def _adopt_env(self) -> None:
        """Check `self.env`, which `set_env` has replaced, and take over what depends on it.

        Raises:
            ValueError: the agent cannot work with it; nothing has changed.
        """

    def _setup_learn(
        self, total_timesteps: int, *args: Any, **kwargs: Any
    ) -> tuple[int, BaseCallback]:
        total_timesteps = self._check_call(total_timesteps)
        self._renew_lr_schedule()
        assert self.env is not None
        share_statistics(unwrap_vec_normalize(self.env), self._processes)
        return super()._setup_learn(total_timesteps, *args, **kwargs)

    def _setup_lr_schedule(self) -> None:
        super()._setup_lr_schedule()
        self._own_lr_schedule = self.lr_schedule

    def _renew_lr_schedule(self) -> None:
        """Take over a `learning_rate` or an `lr_schedule` that was set since the last round."""
        if self.lr_schedule is not self._own_lr_schedule:
            self.learning_rate = self.lr_schedule
        self._setup_lr_schedule()

    def _step_size(self) -> float:
        """The learning rate of this round."""
        self._renew_lr_schedule()
        return float(self.lr_schedule(self._current_progress_remaining))

    def _update_learning_rate(self, optimizers: Any) -> None:
        self._renew_lr_schedule()
        super()._update_learning_rate(optimizers)

    def _check_call(self, total_timesteps: int) -> int:
        """Refuse a call of `learn` before anything has changed; return its steps as an int.

        Raises:
            ValueError: it has no environment, a wrong argument, or one that cannot change.
        """
        total_timesteps = whole("total_timesteps", total_timesteps)
        if self.env is None:
            raise NoEnvironmentError(
                f"this {type(self).__name__} has no environment to learn in: pass one to "
                "load(path, env=...), or call set_env(env) first"
            )
        # Attributes are arguments, too: they may have been set since the agent was made.
        for name, value in self._fixed.items():
            if (now := getattr(self, name)) != value:
                raise ValueError(
                    f"{name} cannot be changed any more: the agent was made with {value!r}, and "
                    f"it is now {now!r}; make a new agent"
                )
        self._check_arguments()
        return total_timesteps

    def _update_info_buffer(
        self, infos: list[dict[str, Any]], dones: np.ndarray | None = None
    ) -> None:
        """Like SB3's, but a success is kept as a number, whatever the environment says it with.

        Files hold numbers, and an array or a tensor would be refused when they are read.
        """
        name, ends = "is_success", [False] * len(infos) if dones is None else dones
        infos = [
            {**info, name: _as_number(info[name])} if done and name in info else info
            for info, done in zip(infos, ends, strict=True)
        ]
        super()._update_info_buffer(infos, dones)

    def _check_arguments(self) -> None:
        """Raise ValueError for a wrong argument, before any work is done."""
        check_arguments(self)

    def _fix_arguments(self) -> None:
        """Remember `fixed_arguments`; an agent's `_setup_model` ends with it."""
        fixed = {name: copy.copy(getattr(self, name)) for name in self.fixed_arguments}
        self._fixed = {**fixed, "group": self.group}  # which cannot be copied
        self._own_names = frozenset(vars(self))

    def _excluded_save_params(self) -> list[str]:
        return [
            *super()._excluded_save_params(), "_fixed", "_own_names", "_own_lr_schedule", "group",
            "phase",
        ]  # fmt: skip

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Like SB3's.

        Raises:
            ValueError: the observation is not right, see `check_observation`.
        """
        self.check_observation(observation)
        return super().predict(observation, state, episode_start, deterministic)

    def check_observation(self, observation: Any) -> None:
        """Raise ValueError for numbers that are not finite, or images in [0, 1].

        `predict` calls it. It reads every entry once. Set `check_observations` to False to save
        that time.
        """
        is_pair = isinstance(observation, tuple)  # of Gymnasium's reset, which policies refuse
        if is_pair or not self.check_observations:
            return
        parts = observation.items() if isinstance(observation, dict) else [("", observation)]
        for key, part in parts:
            array = np.asarray(part)
            if array.dtype.kind != "f" or not array.size:
                continue
            where = f"entry {key!r} of the observation" if key else "the observation"
            own = self.observation_space
            space = getattr(own, "spaces", {}).get(key) if key else own
            is_image = space is not None and space.dtype == np.uint8 and array.ndim > 1
            if is_image and 0 < array.max() <= 1:
                raise ValueError(
                    f"predict got {where} as numbers up to {array.max():.3g}, where an image has "
                    "whole numbers up to 255; pass (255 * image).astype(np.uint8)"
                )
            if not np.isfinite(array).all():
                raise ValueError(
                    f"predict got {np.count_nonzero(~np.isfinite(array))} non-finite number(s) in "
                    f"{where}; check the sensor or the environment that it comes from"
                )

    # ----------------------------------------------------------------------------------------
    # files
    # ----------------------------------------------------------------------------------------

    def save(
        self,
        path: str | Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """Write the agent to a file, atomically.

        Functions and objects of a user's own classes (a `cost_fn`, a schedule that is a function, a
        policy class) are left out: pass them to `load` again, by name. A warning says so where
        `load` cannot do without. SB3's LinearSchedule and ConstantSchedule are kept.

        Args:
            path: where to write; ".zip" is appended if it has no suffix.
            exclude: attributes to leave out.
            include: attributes to keep although they are left out by default.

        Raises:
            OSError: the file cannot be written; an older one of this name is unchanged.
            FloatingPointError: a parameter is not finite, so that `load` would refuse the file; an
                older one is unchanged.
        """
        if isinstance(path, str | Path):
            path = with_suffix(Path(path))
            path.parent.mkdir(parents=True, exist_ok=True)
        values, info = self.file_values(exclude, include), get_system_info(print_info=False)[1]
        for name in sorted(_ESSENTIAL & values["attributes"].keys()):
            for place, kind in safe_file.not_held(values["attributes"][name], name):
                warnings.warn(
                    f"the file does not hold {place}, a {kind}: pass it to load again, by name "
                    f"({name}=...)",
                    stacklevel=2,
                )
        safe_file.write(cast("Path | IO[bytes]", path), self._file_kind(), values, note=info)

    def file_values(
        self, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None
    ) -> dict[str, Any]:
        """Return what `save` writes: attributes, and the states of networks and optimisers.

        Raises:
            FloatingPointError: a parameter, or what an optimiser keeps of one, is not finite.
        """
        names = self._get_torch_save_params()[0]
        left_out = {*(exclude or ()), *self._excluded_save_params()} - set(include or ())
        left_out |= {name.split(".")[0] for name in names}
        attributes = {k: v for k, v in vars(self).items() if k not in left_out}
        if foreign := self._foreign(attributes):
            warnings.warn(
                f"the file does not hold {', '.join(foreign)}, set on the agent from outside: keep "
                "it elsewhere",
                stacklevel=3,
            )
            attributes = {k: v for k, v in attributes.items() if k not in foreign}
        for name in self.function_arguments:
            needed = f"_needs_{name}"
            attributes[needed] = bool(attributes[needed]) or callable(getattr(self, name))
        parameters = self.get_parameters()
        for name, state in parameters.items():
            if entry := not_finite(state):
                raise FloatingPointError(
                    f"{entry} in '{name}' holds a NaN or infinity at step {self.num_timesteps}, so "
                    "that no file of this agent could be loaded; go on from the last checkpoint or "
                    "file with a smaller step size"
                )
        return {"attributes": attributes, "parameters": parameters}

    def _foreign(self, attributes: Mapping[str, Any]) -> list[str]:
        """Attributes that `from_values` would refuse: not the agent's, nor its subclass's own."""
        unknown = attributes.keys() - self._own_names - set(self._late_attributes)
        unknown = {name for name in unknown if safe_file.is_held(attributes[name])}
        if not unknown:
            return []
        try:  # a subclass may set some after this class's constructor
            new = type(self)(self.policy_class, None, _init_setup_model=False)  # type: ignore[call-arg]
        except TypeError:  # it takes other arguments, and `load` cannot make it either
            return []
        return sorted(unknown - vars(new).keys())

    @classmethod
    def load(
        cls: type[SelfAlgorithm],
        path: str | Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: torch.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfAlgorithm:
        """Load an agent. Like SB3's, except that nothing in the file is executed.

        Args:
            path: file that `save` wrote.
            env: environment or id to set; None if the agent is only to predict.
            device: where the agent's tensors are put.
            custom_objects: attributes that replace the file's, including step sizes and Adam's eps.
                Functions and objects of your own classes are not in files and have to be given.
                As in SB3, those that the agent does not have are ignored.
            print_system_info: print versions of Python and packages.
            force_reset: reset the environment before the next `learn`.
            **kwargs: as `custom_objects`, but an unknown name is an error; these take precedence.

        Raises:
            ValueError: the file is damaged, foreign or hostile, holds another agent, or does not
                fit the environment.
            FileNotFoundError: the file does not exist.
        """
        if print_system_info:
            get_system_info()
        values = cls._read(path)
        known = {*values["attributes"], *inspect.signature(cls).parameters}
        objects = {k: v for k, v in (custom_objects or {}).items() if k in known}
        passed = {**objects, **kwargs}
        try:
            return cls.from_values(values, env, device, passed, force_reset=force_reset)
        except UNREADABLE as error:
            given = passed if env is None else ("env", *passed)
            raise cls._cannot_load(path, error, given) from error

    @classmethod
    def from_values(
        cls: type[SelfAlgorithm],
        values: dict[str, Any],
        env: GymEnv | None,
        device: torch.device | str,
        replaced: dict[str, Any],
        *,
        force_reset: bool = True,
    ) -> SelfAlgorithm:
        """Make the agent that `file_values` describes, with some attributes replaced."""
        attributes, parameters = values["attributes"], values["parameters"]
        kwargs = attributes["policy_kwargs"]
        passed = replaced.get("policy_kwargs", kwargs)
        if not safe_file.agrees(passed, kwargs):
            raise ValueError(f"the file's policy_kwargs are {kwargs}, you passed {passed}")
        if "stats_window_size" in replaced:  # which stable-baselines3 keeps under another name
            window = {"_stats_window_size": replaced["stats_window_size"]}
            replaced = {k: v for k, v in replaced.items() if k != "stats_window_size"} | window
        attributes = {**attributes, **replaced}
        for name in sorted(_ESSENTIAL & attributes.keys()):
            for place, kind in safe_file.not_held(attributes[name], name, read=True):
                raise ValueError(
                    f"{place} was a {kind}, which files do not hold; pass it again: "
                    f"load(path, custom_objects={{'{name}': ...}})"
                )
        attributes = {k: v for k, v in attributes.items() if not isinstance(v, NotInFile)}
        if env is not None:
            env = cls._wrap_env(env, attributes["verbose"])
            check_for_correct_spaces(
                env, attributes["observation_space"], attributes["action_space"]
            )
            if force_reset:
                attributes["_last_obs"] = attributes["_last_original_obs"] = None
            attributes["n_envs"] = env.num_envs
        policy_class = attributes["policy_class"]
        if not (isinstance(policy_class, type) and issubclass(policy_class, BasePolicy)):
            raise BadFileError(f"its policy_class is {policy_class!r}, not a policy")
        agent = cls(policy_class, env, device=device, _init_setup_model=False)  # type: ignore[call-arg]
        left_out = set(agent._excluded_save_params()) - set(replaced)
        attributes = {k: v for k, v in attributes.items() if k not in left_out}
        unknown = sorted(set(attributes) - set(vars(agent)) - set(cls._late_attributes))
        if mistaken := [name for name in unknown if name in replaced]:
            raise ValueError(
                f"{', '.join(mistaken[:3])} passed to load: the agent has no such argument"
            )
        if unknown:
            raise BadFileError(f"it holds unknown attributes: {', '.join(unknown[:3])}")
        check_attributes(agent, {k: v for k, v in attributes.items() if k not in replaced})
        vars(agent).update(attributes)
        if "_stats_window_size" in replaced:
            check_arguments(agent)
            for name in ("ep_info_buffer", "ep_success_buffer"):
                kept = deque(getattr(agent, name) or (), maxlen=agent._stats_window_size)
                setattr(agent, name, kept)
        # A policy class that the caller passed may make what it likes.
        limit = SizeLimit(parameters) if "policy_class" not in replaced else nullcontext()
        with limit:
            agent._setup_model()
        own = [_step_sizes(optimizer) for optimizer in agent._optimizers()]
        agent.set_parameters(parameters, exact_match=True, device=device)
        if replaced:  # arguments take precedence over the optimisers' states in the file
            for optimizer, sizes in zip(agent._optimizers(), own, strict=True):
                _set_step_sizes(optimizer, sizes)
        if agent.use_sde:
            agent.policy.reset_noise()  # type: ignore[operator]
        return agent

    def _check_replay_call(self, truncate_last_traj: bool) -> None:
        """Raise ValueError where no replay can be loaded, whatever the file."""
        if self.env is None:
            raise ValueError("set an environment first: load(path, env=...) or set_env(env)")
        if not truncate_last_traj:
            raise ValueError(
                "truncate_last_traj must be True: the episode that was running when the replay was "
                "saved cannot go on"
            )

    def _check_given_again(self) -> None:
        """Raise ValueError if the agent was made with functions and loaded without them."""
        for name in self.function_arguments:
            if getattr(self, name) is not None:
                setattr(self, f"_needs_{name}", False)
            elif getattr(self, f"_needs_{name}"):
                raise ValueError(
                    f"this agent was made with a {name}, which is not in its file; "
                    f"pass it again: {type(self).__name__}.load(path, env=env, {name}=...)"
                )

    # Arguments that may be functions, which no file holds. For each there is an attribute
    # `_needs_<name>`: whether the agent comes from a file of one that had such a function.
    function_arguments: ClassVar[tuple[str, ...]] = ()

    # Attributes that exist only after set-up or `learn`; files may hold them too.
    _late_attributes: ClassVar[tuple[str, ...]] = (
        "observation_space", "action_space", "n_envs", "lr_schedule", "rollout_buffer_class",
        "rollout_buffer_kwargs", "start_time", "tensorboard_log", "n_cut_episodes",
        "check_observations",
    )  # fmt: skip

    def set_parameters(
        self,
        load_path_or_dict: Any,
        exact_match: bool = True,
        device: torch.device | str = "auto",
    ) -> None:
        """Like SB3's, except that names, shapes, dtypes and finiteness are checked first.

        Raises:
            ValueError: the parameters do not fit this agent, which is unchanged.
        """
        given = load_path_or_dict
        if not isinstance(given, dict):
            given = self._read(given)["parameters"]
        given = self._completed(given)
        expected = set(self._get_torch_save_params()[0])
        if set(given) - expected or (exact_match and set(given) != expected):
            raise ValueError(f"it has parameters of {sorted(given)}, expected {sorted(expected)}")
        given = dict(given)
        for name, state in given.items():
            target = recursive_getattr(self, name)
            if isinstance(target, torch.optim.Optimizer):
                check_optimizer(name, target, state)
                given[name] = with_own_devices(target, state)
            else:
                check_state(name, target, state, exact_match=exact_match)
        # Optimisers keep the tensors that they are given, which may be another agent's moments.
        super().set_parameters(copy.deepcopy(given), exact_match, device)

    def _completed(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Parameters with this agent's own for what files of older versions lack."""
        return parameters

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        found = [recursive_getattr(self, name) for name in self._get_torch_save_params()[0]]
        return [thing for thing in found if isinstance(thing, torch.optim.Optimizer)]

    # ----------------------------------------------------------------------------------------
    # checkpoints, see totalprop.agents.persistence.checkpoint
    # ----------------------------------------------------------------------------------------

    n_cut_episodes = 0  # cut when the run resumed in environments that cannot be rewound

    def state_dict(self, folder: Path) -> dict[str, Any]:
        """Return the state that `learn` resumes from and `save` leaves out.

        It is valid only between rollouts. Large parts may be written to files of their own in the
        folder; "files" lists their names.
        """
        return {"action_space": self.action_space.np_random.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any], folder: Path) -> None:
        """Restore what `state_dict` returned."""
        self.action_space.np_random.bit_generator.state = state["action_space"]

    def cut_episodes(self) -> None:
        """Begin new episodes at the next `learn`; the running ones count as truncated."""
        assert self.env is not None
        if self._last_obs is None:  # none is running, as while learning from data alone
            return
        self._last_obs = None
        self.n_cut_episodes += self.env.num_envs
        if self.seed is not None:  # or the first episodes would be repeated
            self.env.seed(self._processes.seed(self.seed) + self.num_timesteps)

    @classmethod
    def _file_kind(cls) -> str:
        return f"{cls.__name__} model"

    @classmethod
    def _read(cls, path: str | Path | io.BufferedIOBase) -> dict[str, Any]:
        if isinstance(path, str | Path):
            path = Path(path)
            path = existing(path)
        try:
            values = safe_file.read(cast("Path | IO[bytes]", path), cls._file_kind())
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path} does not exist") from error
        except (BadFileError, OSError) as error:
            raise cls._cannot_load(path, error) from error
        if not all(isinstance(values.get(key), dict) for key in ("attributes", "parameters")):
            raise cls._cannot_load(path, BadFileError("it holds no attributes or no parameters"))
        return values

    @classmethod
    def _cannot_load(
        cls, path: object, error: Exception, passed: Collection[str] = ()
    ) -> ValueError:
        text = safe_file.in_one_line(error, 400)
        expected = f"expected a file written by {cls.__name__}.save (model.zip in a run folder)"
        if passed:
            expected += f", and arguments that fit it, here {', '.join(passed)}"
        return ValueError(f"cannot load {path} as a {cls.__name__} model: {text}; {expected}")


# An agent cannot be set up without these. Anything else that a file lacks is rebuilt or optional.
_ESSENTIAL = {
    "learning_rate", "clip_range", "clip_range_vf", "policy_class", "policy_kwargs", "estimator",
    "observation_space", "action_space",
}  # fmt: skip


def _step_sizes(optimizer: torch.optim.Optimizer) -> list[dict[str, float]]:
    """Learning rate and, if the optimiser has one, eps of each group."""
    keys = ("lr", "eps")
    return [{k: float(group[k]) for k in keys if k in group} for group in optimizer.param_groups]


def _set_step_sizes(optimizer: torch.optim.Optimizer, sizes: list[dict[str, float]]) -> None:
    for group, values in zip(optimizer.param_groups, sizes, strict=True):
        for key, value in values.items():
            if isinstance(group[key], Tensor):  # a CUDA graph reads it: agents.dreamer.update
                group[key].fill_(value)
            else:
                group[key] = value


def _as_number(success: Any) -> float | None:
    """A success as an environment says it; None, which SB3 leaves out, where it is no number."""
    value = success.detach().cpu() if isinstance(success, Tensor) else success
    try:
        number = float(np.mean(np.asarray(value, float)))
    except (TypeError, ValueError):
        return None
    return number if np.isfinite(number) else None


def with_suffix(path: Path, suffix: str = ".zip") -> Path:
    """The path, with a suffix if it has none."""
    return path if path.suffix else path.with_name(path.name + suffix)


def existing(path: Path, suffix: str = ".zip") -> Path:
    """The path, or where there is no such file the one that `with_suffix` makes of it."""
    return path if path.exists() else with_suffix(path, suffix)
