"""What agents that simulate trials ask of an environment: its cost, its start, its names."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import ObservationWrapper, RewardWrapper, Wrapper, spaces
from gymnasium.wrappers import NormalizeReward
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from totalprop.agents.core.vector_env import GymnasiumVecEnv
from totalprop.agents.persistence import env_state
from totalprop.agents.trials.controllers import ControllerPolicy
from totalprop.agents.trials.saturating_cost import SaturatingCost
from totalprop.world_models.gp import positive_std
from totalprop.world_models.gp_dynamics import GPDynamics

Cost = Callable[[Tensor, Tensor], Tensor]  # (next states [..., S], controls [..., A]) -> [...]
StateFunction = Callable[[Tensor], Tensor]  # states [..., S] -> [...]

INSTEAD = {  # of an attribute of the environment that is not used
    "cost": "it is learned from the rewards",
    "saturating_cost": "it is learned from the rewards",
    "termination": "simulated particles go on beyond the end",
    "initial_distribution": "the start is that of the episodes' first observations",
    "invariant_dims": "pass invariant_dims=...",
    "integrated_dims": "pass integrated_dims=...",
    "time_step": "pass time_step=...",
    "observation_names": "observations are numbered",
}


class Problem:
    """What a simulated trial costs, where it starts and where it ends.

    An environment may have a differentiable `cost(states)`, a `saturating_cost` (the arguments of
    `SaturatingCost` by name, where the cost is one), a `termination(states)`, an
    `initial_distribution` (mean, std; several means are as many starts, equally likely),
    `invariant_dims` (entries of an observation that no change of it depends on), `integrated_dims`
    (pairs of a position and its velocity) with `time_step`, and `observation_names`. Each is looked
    up once, cost and termination at construction and the others when first needed; an attribute
    that does not fit is reported with a UserWarning and not used.

    Args:
        env: vector environment, or None, of which nothing is known.
        observation_space: Box [S].
        cost_fn: cost of the next states, which takes precedence over the environment's own.
        termination: whether an episode ends in a state, or how probably; takes precedence over the
            environment's own. "ignore": it never does.
        device: device of the states that costs are evaluated on.

    Attributes:
        cost: `cost_fn`, the environment's own cost, or None: costs are learned from rewards.
        termination: the function given, the environment's own, or None: episodes do not end.

    Raises:
        ValueError: `cost_fn` is not a differentiable cost of states, or `termination` not a
            function of them.
    """

    def __init__(
        self,
        env: VecEnv | None,
        observation_space: spaces.Box,
        *,
        cost_fn: StateFunction | None = None,
        termination: StateFunction | Literal["ignore"] | None = None,
        device: torch.device,
    ) -> None:
        self.env, self.device = env, device
        self.shape = observation_space.shape
        self.observation_space = observation_space
        self.cost = self._own_cost() if cost_fn is None else cost_fn
        if cost_fn is not None:
            flaw = cost_flaw(cost_fn, self.shape[0], device)
            if flaw is not None:
                raise ValueError(f"cost_fn is not a cost of states: {flaw}")
        self.termination: StateFunction | None = None
        if termination is None:
            self.termination = self._own_termination()
        elif not isinstance(termination, str):
            self.termination = termination
            flaw = termination_flaw(termination, self.shape[0], device)
            if flaw is not None:
                raise ValueError(f"termination is not a function of states: {flaw}")

    # ----------------------------------------------------------------------------------------
    # for simulations
    # ----------------------------------------------------------------------------------------

    def step_cost(self, model: GPDynamics) -> Cost:
        """Cost of a simulated step; without a known cost, minus the reward of a fitted model."""
        known = self.cost
        if known is not None:
            return lambda next_states, controls: known(next_states)
        return lambda next_states, controls: -model.reward(next_states, controls)

    def start_distribution(
        self,
        resets: Sequence[np.ndarray],
        noise: Tensor,
        *,
        means: Sequence[Sequence[float]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean [S] and std [S] of simulated starts: the environment's own, or those of its resets.

        Several means of the environment's own are [M, S].

        Args:
            resets: observations [S] that episodes began with.
            noise: [S] deviation of the noise of an observed state difference.
            means: [M, S] that take the place of the mean.
        """
        given = None if means is None else np.asarray(means, np.float64)
        if self.start is not None:
            mean, std = self.start
        else:
            starts = np.stack(resets).astype(np.float64)
            mean = starts.mean(0)
            if given is not None:  # the spread of each start, and not that among them
                nearest = np.abs(starts[:, None] - given).sum(-1).argmin(1)  # [n], of M
                for start in set(nearest):
                    starts[nearest == start] -= starts[nearest == start].mean(0)
            # One reset has no spread: assume at least that of one noisy observation.
            std = np.maximum(starts.std(0), noise.cpu().numpy() / math.sqrt(2))
        return self._tensor(mean if given is None else given), self._tensor(std)

    def place(
        self,
        policy: ControllerPolicy,
        model: GPDynamics,
        *,
        means: Sequence[Sequence[float]] | None = None,
    ) -> None:
        """Place a new controller at the known start, or over the states seen so far.

        At a known start the controller has unit scale; over data it has their spread.

        Args:
            policy: to be placed.
            model: with the data.
            means: [M, S] of a known start, which take the place of the environment's own.
        """
        if self.start is not None:
            own = self.start[0] if means is None else np.asarray(means, np.float64)
            starts = policy.features(self._tensor(own))
            mean = starts.view(-1, starts.shape[-1]).mean(0)
            std = torch.ones_like(mean)
        else:
            mean = model.features.mean(0)
            std = positive_std(model.features, model.gp.rounding)
            # The sine of a constant angle wobbles by the rounding of the angle, not by its own.
            trig = std[std.numel() - 2 * len(model.angle_dims) :]
            trig[trig <= model.gp.rounding] = 1.0
        policy.place(mean, std)

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float64, device=self.device)

    # ----------------------------------------------------------------------------------------
    # what the environment says
    # ----------------------------------------------------------------------------------------

    @cached_property
    def start(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The environment's own `initial_distribution`, or None: mean [S] or [M, S], std [S]."""
        given = self._attribute("initial_distribution")
        if given is None:
            return None
        try:
            mean, std = (np.asarray(part, np.float64) for part in given)
        except (TypeError, ValueError):
            mean = std = np.zeros(0)
        fits = mean.size > 0 and mean.ndim in (1, 2) and mean.shape[-1:] == self.shape
        is_right = np.isfinite(mean).all() and np.isfinite(std).all() and (std >= 0).all()
        if not fits or std.shape != self.shape or not is_right:
            why = f"it must be a finite mean, or several, and a std ≥ 0 of shape {self.shape}"
            _warn_unused("initial_distribution", why)
            return None
        return mean, std

    @cached_property
    def invariant_dims(self) -> tuple[int, ...]:
        """The environment's own `invariant_dims`, or none."""
        given = self._attribute("invariant_dims")
        if given is None:
            return ()
        entries = range(self.shape[0])
        if not isinstance(given, Iterable) or any(d not in entries for d in given):
            why = f"it must be entries of the observation, 0..{entries[-1]}"
            _warn_unused("invariant_dims", why)
            return ()
        return tuple(sorted({int(d) for d in given}))

    @cached_property
    def integrated_dims(self) -> tuple[tuple[int, int], ...]:
        """The environment's own `integrated_dims`, or none."""
        given = self._attribute("integrated_dims")
        if given is None:
            return ()
        flaw = pairs_flaw(given, self.shape[0])
        if flaw is not None:
            _warn_unused("integrated_dims", f"it must be {flaw}")
            return ()
        return tuple((int(position), int(velocity)) for position, velocity in given)

    @cached_property
    def time_step(self) -> float | None:
        """The environment's own `time_step`, the time that passes between observations, or None."""
        given = self._attribute("time_step")
        if given is None:
            return None
        try:
            step = float(given)
        except (TypeError, ValueError):
            step = math.nan
        if not 0 < step < math.inf:
            _warn_unused("time_step", f"it must be a number above 0, and is {given!r}")
            return None
        return step

    @property
    def time_limit(self) -> int | None:
        """Steps after which an episode is truncated by gymnasium's TimeLimit; None without one."""
        if self.env is None or not self.env.has_attr("_max_episode_steps"):
            return None
        return self.env.get_attr("_max_episode_steps", indices=0)[0]

    @property
    def end_has_gradient(self) -> bool:
        """Whether `termination` is differentiable, so that a pathwise gradient sees the end."""
        states = torch.zeros(1, *self.shape, dtype=torch.float64, device=self.device)
        return self.termination is not None and bool(
            self.termination(states.requires_grad_()).requires_grad
        )

    @cached_property
    def saturating_cost(self) -> SaturatingCost | None:
        """The cost where it is a saturating one, or None: given as that, or the environment's own.

        The environment's own must agree with its `cost`, if it has one.
        """
        if isinstance(self.cost, SaturatingCost):
            return self.cost
        own = self._attribute("saturating_cost")
        if own is None:
            return None
        if not isinstance(own, Mapping):
            why = "it must be a mapping of 'target', 'weights' and 'angles'"
            _warn_unused("saturating_cost", why)
            return None
        try:
            found = SaturatingCost(**own)
        except (TypeError, ValueError) as error:
            _warn_unused("saturating_cost", str(error))
            return None
        flaw = cost_flaw(found, self.shape[0], self.device)
        if flaw is None and self.cost is not None:
            grid = torch.linspace(-2, 2, 8 * self.shape[0], dtype=torch.float64)
            states = grid.view(self.shape[0], 8).T.sin().to(self.device) * 3
            worst = float((found(states) - self.cost(states)).detach().abs().max())
            if not worst < 1e-6:
                flaw = f"it differs from the environment's `cost`, by {worst:.2g} at some state"
        if flaw is not None:
            _warn_unused("saturating_cost", flaw)
            return None
        return found

    @cached_property
    def observation_names(self) -> Sequence[str]:
        """S names, numbered ones where the environment has none that fit."""
        names = self._attribute("observation_names")
        if names is None or len(names) != self.shape[0]:
            return [f"observation {d}" for d in range(self.shape[0])]
        return names

    def _own_cost(self) -> StateFunction | None:
        """The environment's `cost(states)`; None, with a warning, if it cannot be used."""
        own = self._attribute("cost")
        if own is None:
            return None
        flaw = cost_flaw(own, self.shape[0], self.device)
        if flaw is not None:
            _warn_unused("cost", flaw)
            return None
        return own

    def _own_termination(self) -> StateFunction | None:
        """The environment's `termination(states)`; None, with a warning, if it cannot be used."""
        own = self._attribute("termination")
        flaw = None if own is None else termination_flaw(own, self.shape[0], self.device)
        if flaw is not None:
            _warn_unused("termination", flaw)
            return None
        return own

    def _attribute(self, name: str) -> Any:
        """An attribute of the (first) environment, or None.

        It refers to the environment's own observations and rewards. Where an ObservationWrapper or
        RewardWrapper (or NormalizeReward, or an unknown vector wrapper) changes these, it is not
        used, with a warning. A wrapper that changes them in its own `step` goes unnoticed.
        """
        if self.env is None:
            return None
        if not self.env.has_attr(name):
            base = self.env.unwrapped
            if isinstance(base, GymnasiumVecEnv) and base.is_out_of_reach(name):
                _warn_unused(
                    name,
                    "processes of an AsyncVectorEnv do not give it away (a SubprocVecEnv's do)",
                )
            return None
        changing: list[type[Wrapper[Any, Any, Any, Any]]] = [ObservationWrapper]
        if name in ("cost", "saturating_cost"):
            changing += [RewardWrapper, NormalizeReward]
        try:
            inner = self.env.get_attr("unwrapped", indices=0)[0]
        except (EOFError, BrokenPipeError) as error:
            raise ValueError(
                "the environment is read in this process, and cannot be sent here from its worker: "
                "use DummyVecEnv, or make it picklable"
            ) from error
        if (
            any(type(layer) not in env_state.LAYERS for layer in env_state.layers_of(self.env)[0])
            or inner.observation_space != self.observation_space
            or any(self.env.env_is_wrapped(wrapper, indices=0)[0] for wrapper in changing)
        ):
            _warn_unused(name, "a wrapper changes what it speaks of")
            return None
        return self.env.get_attr(name, indices=0)[0]


def pairs_flaw(pairs: Any, states: int) -> str | None:
    """What pairs of a position and its velocity should be where they are not, or None."""
    wanted = (
        f"pairs (position, velocity) of entries of the observation, 0..{states - 1}, each position "
        "in one pair and no position a velocity"
    )
    try:
        positions, velocities = zip(*pairs, strict=True)
    except (TypeError, ValueError):
        return None if isinstance(pairs, Iterable) and not list(pairs) else wanted
    fits = (
        all(d in range(states) for d in (*positions, *velocities))
        and len(set(positions)) == len(positions)
        and not set(positions) & set(velocities)
    )
    return None if fits else wanted


def cost_flaw(cost: Any, states: int, device: torch.device) -> str | None:
    """Why a cost is not a differentiable function of the states alone, or None if it is."""
    found = _values(cost, "cost", states, device)
    if isinstance(found, str):
        return found
    if not found.requires_grad:
        return "it must be differentiable: a cost of torch operations on the states it is given"
    return None


def rewards_flaw(cost: StateFunction, next_states: Tensor, rewards: Tensor) -> str | None:
    """How rewards depart from minus the cost, or None where they do not by much.

    A constant difference, and what observation noise makes of the cost, are none.

    Args:
        cost: of states.
        next_states: [n, S] of real steps after which the episode went on.
        rewards: [n] of these steps.
    """
    if len(rewards) < 2:
        return None
    differences = rewards + cost(next_states).detach()
    spread, size = differences.std(), rewards.square().mean().sqrt()
    if spread <= max(0.5 * rewards.std(), 0.02 * size):
        return None
    return (
        "the environment's rewards are not minus its own `cost` of the next states: their sum has "
        f"a standard deviation of {spread:.2g}, and the rewards one of {rewards.std():.2g}"
    )


def termination_flaw(termination: Any, states: int, device: torch.device) -> str | None:
    """Why a function does not say whether an episode ends in a state, or None if it does."""
    found = _values(termination, "True, False or probability", states, device)
    if isinstance(found, str):
        return found
    if found.dtype != torch.bool and not ((found >= 0) & (found <= 1)).all():
        value = float(found.flatten()[0])
        return f"it must give True, False or a probability in [0, 1], got {value:g} at states of 0"
    return None


def _values(function: Any, what: str, states: int, device: torch.device) -> Tensor | str:
    """The function's values of states [2, 3, S], or why there are none."""
    x = torch.zeros(2, 3, states, dtype=torch.float64, device=device, requires_grad=True)
    try:
        found: Any = function(x)
    except Exception as error:  # whatever a user's function may raise
        return (
            f"it takes states [..., {states}] and gives a {what} each, but with states "
            f"[2, 3, {states}] it raised {type(error).__name__}: {error}"
        )
    shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if shape != [2, 3]:
        return (
            f"it must give one {what} per state, of states [2, 3, {states}] a tensor [2, 3], "
            f"got {shape}"
        )
    return found


def _warn_unused(name: str, why: str) -> None:
    """Report that an attribute of the environment is not used, and what is instead."""
    warnings.warn(
        f"the environment's own `{name}` is not used, because {why}; {INSTEAD[name]}", stacklevel=3
    )
