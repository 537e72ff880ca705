"""Variance of many-action policy gradients: when do more actions per state beat more states?

Υ(s, a) [P] is the gradient contributed by one sample: the score times Q, or times an advantage, or
any other fixed weight. The estimator averages over T states with N actions each, of which the first
drives the transition:

    g = 1/T Σ_t γ^t 1/N Σ_n Υ(s_t, a_t^n)

This module holds the components of its variance and the rules that choose between more actions and
more states. `many_actions_mdp.py` computes the components in closed form, `many_actions_data.py`
estimates them from data. All variances are traces over the parameters, and the distribution of the
first state is stationary unless stated otherwise.

Nauman & Cygan 2022, "On All-Action Policy Gradients". Docstrings point out where the paper errs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class VarianceComponents:
    """Variance components of Lemma 1 at every lag, and the variance they imply for T steps.

    V(T, N) = (M + P / N) / T,   M = Σ_t w_t α_t,   P = Σ_t w_t α^e_t,
    w_t = (2 - [t = 0]) / T Σ_{i < T-t} γ^{2i+t}, which is (2 - [t = 0]) (T - t) / T if γ = 1.
    Nauman & Cygan 2022, Eq. 7 and 24. Differs from the paper: γ^t is not part of Υ, since Eq. 7
    needs a stationary Υ. It enters through w_t instead, and gamma = 1 (as in PPO) leaves it out.

    P can be negative. Given the states, only the first action is correlated with its successor, so
    more actions can raise the variance (the paper claims that they cannot).

    If `stationary` is False, the lags are averages over the steps, valid for this T and γ only.
    """

    marginal: Tensor  # [L] α_t = Cov(E_a Υ(s_0, a), E_a Υ(s_t, a)); α_0 is V_s
    policy: Tensor  # [L] α^e_t = E_s0 Cov(Υ(s_0, a_0), E_a Υ(s_t, a) | s_0); α^e_0 is E_a
    n_steps: float  # T <= L; w_t is interpolated between integers
    n_parameters: int  # number of parameters, to report means over them
    gamma: float = 1.0  # γ
    stationary: bool = True  # whether every step has the same distribution
    q_noise: float = 0.0  # variance in Υ due to the noise of one Q sample; in no other component

    def __post_init__(self) -> None:
        if self.marginal.dim() != 1 or self.marginal.shape != self.policy.shape:
            shapes = f"{list(self.marginal.shape)} and {list(self.policy.shape)}"
            raise ValueError(f"marginal and policy are {shapes}, expected [L] both: pass all lags")
        if not 1 <= self.n_steps <= len(self.marginal):
            raise ValueError(
                f"n_steps is {self.n_steps}, expected 1 to {len(self.marginal)}, the number of "
                "known lags: compute or record more lags"
            )

    @property
    def state_variance(self) -> float:
        """V_s = Var_s[E_a Υ], the variance when the policy is marginalised."""
        return float(self.marginal[0])

    @property
    def action_variance(self) -> float:
        """E_a = E_s[Var_a Υ], the variance due to the policy, given the state."""
        return float(self.policy[0])

    @property
    def markov_chain(self) -> float:
        """M, the variance due to the Markov chain, which only more states reduce."""
        return self._weighted(self.marginal)

    @property
    def policy_dependent(self) -> float:
        """P, the policy-dependent variance, which more actions divide by N."""
        return self._weighted(self.policy)

    @property
    def policy_share(self) -> float:
        """P / (M + P), the policy's share of the single-action variance."""
        return self.policy_dependent / (self.markov_chain + self.policy_dependent)

    def variance(self, n_actions: float = 1) -> float:
        """V(T, N) for N = `n_actions`; math.inf gives M / T."""
        return (self.markov_chain + self.policy_dependent / n_actions) / self.n_steps

    def at(self, *, n_steps: float | None = None, gamma: float | None = None) -> VarianceComponents:
        """The components for another number of steps or another γ of the same chain.

        Args:
            n_steps: the new T, unchanged if None.
            gamma: the new γ, unchanged if None.
        Raises:
            ValueError: the start is not stationary, or T exceeds the number of known lags.
        """
        n_steps = self.n_steps if n_steps is None else n_steps
        gamma = self.gamma if gamma is None else gamma
        if not self.stationary and (n_steps, gamma) != (self.n_steps, self.gamma):
            raise ValueError(
                "the components of a start that is not stationary are valid at T = "
                f"{self.n_steps}, gamma = {self.gamma} only, got {n_steps} and {gamma}: compute or "
                "estimate them for these"
            )
        return replace(self, n_steps=n_steps, gamma=gamma)

    def sampled_q(self, n_rollouts: int) -> VarianceComponents:
        """The components when Q is a mean of K = `n_rollouts` rollouts: adds q_noise / K to E_a."""
        policy = self.policy.clone()
        policy[0] += self.q_noise / n_rollouts
        return replace(self, policy=policy, q_noise=0.0)

    def _weighted(self, lags: Tensor) -> float:
        weights = _lag_weights(self.n_steps, self.gamma).to(lags)
        return float(weights @ lags[: len(weights)])


def _lag_weights(n_steps: float, gamma: float) -> Tensor:
    """w_t of `VarianceComponents`, [ceil(T)]."""
    lag = torch.arange(math.ceil(n_steps), dtype=torch.float64)
    left = n_steps - lag
    if gamma != 1:
        left = gamma**lag * (1 - gamma ** (2 * left)) / (1 - gamma**2)
    return left * torch.where(lag == 0, 1.0, 2.0) / n_steps


def table(components: VarianceComponents, *, covariance_factor: float = 2.0) -> dict[str, float]:
    """Rows of Table 1 in Nauman & Cygan 2022, as means over the parameters.

    Args:
        components: the variance components.
        covariance_factor: multiplies the two sums over lags, in their own rows and in the totals.
            2 is Eq. 7, and the rows add up to the totals as in the paper. 1 reads the paper's row
            names literally; the totals are then not those of Eq. 7.
    Returns:
        Row name -> value.
    """
    c, scale = components, 1 / components.n_parameters
    weights = _lag_weights(c.n_steps, c.gamma)
    first = float(weights[0])  # 1 without γ^t
    state, action = first * c.state_variance, first * c.action_variance
    chain = (c.markov_chain - state) / 2 * covariance_factor
    policy = (c.policy_dependent - action) / 2 * covariance_factor
    return {
        "Var_s[E_a ∇J]": state * scale,
        "E_s Var_a[∇J]": action * scale,
        "Σ (T-t)/T Cov[E_a ∇J_0, E_a ∇J_t]": chain * scale,
        "Σ (T-t)/T E_s Cov[∇J_0, ∇J_t]": policy * scale,
        "Markov chain variance": (state + chain) * scale,
        "Policy-dependent variance": (action + policy) * scale,
    }


# Where further states come from: longer trajectories as in the paper, or more of the same length.
States = Literal["longer", "trajectories"]


class Condition(NamedTuple):
    """An inequality: more actions reduce the variance more than more states iff left >= right."""

    left: float
    right: float

    @property
    def more_actions(self) -> bool:
        """Whether more actions reduce the variance more."""
        return self.left >= self.right


class Advice(NamedTuple):
    """Effect of one more action per state and of δT more states, and the better of the two."""

    delta_actions: float  # Δ_N, negative if the variance falls
    delta_states: float  # Δ_T, negative if the variance falls
    choice: str  # "more actions", "more states", or "neither" if both raise the variance


class Allocation(NamedTuple):
    """A budget spent on N actions in each of T states."""

    n_actions: int  # N
    n_steps: float  # T
    variance: float  # V(T, N)


def delta_actions(components: VarianceComponents, n_actions: float = 1) -> float:
    """Δ_N = V(T, N+1) - V(T, N) = -P / (T N (N+1)). Nauman & Cygan 2022, Eq. 8 (Lemma 2)."""
    n = n_actions
    return -components.policy_dependent / (components.n_steps * n * (n + 1))


def delta_states(
    components: VarianceComponents, delta: float, n_actions: float = 1, *, tail: bool = False
) -> float:
    """Δ_T = V(T + δT, N) - V(T, N). Nauman & Cygan 2022, Eq. 9 (Lemma 2) and 26.

    Args:
        components: the variance components at T.
        delta: δ > 0; the trajectory grows by δT.
        n_actions: N.
        tail: False drops the covariances at lags >= T, as Lemma 2 does ("reaches a regenerative
            state"). True keeps them, which is exact and needs T + δT lags.
    Raises:
        ValueError: δ <= 0, or the variances cannot be compared between lengths.
    """
    longer = _longer(components, delta, tail=tail)
    return longer.variance(n_actions) - components.variance(n_actions)


def delta_trajectories(components: VarianceComponents, delta: float, n_actions: float = 1) -> float:
    """V(T, N) / (1 + δ) - V(T, N): δ times more independent trajectories instead of longer ones.

    Holds for any start and any γ, since the mean of the gradient does not change.

    Raises:
        ValueError: δ <= 0.
    """
    _check_positive(delta)
    return -components.variance(n_actions) * delta / (1 + delta)


def theorem_1(components: VarianceComponents) -> Condition:
    """Σ_t t/T Cov_t >= M, for δ = N = 1, with zero covariance at lags >= T.

    Nauman & Cygan 2022, Eq. 10.

    Raises:
        ValueError: gamma is not 1, or the start is not stationary.
    """
    _check_comparable(components)
    covariance = components.marginal + components.policy
    n_lags = math.ceil(components.n_steps)
    lag = torch.arange(n_lags).to(covariance)
    left = float(lag @ covariance[:n_lags]) / components.n_steps
    return Condition(left, components.markov_chain)


def general_condition(
    components: VarianceComponents, delta: float, n_actions: float = 1, *, tail: bool = False
) -> Condition:
    """Δ_N <= Δ_T for any N and δ, with the policy's terms on the left and the chain's on the right.

    Nauman & Cygan 2022, Eq. 30. Arguments and errors are those of `delta_states`.
    """
    c, n = components, n_actions
    longer = _longer(c, delta, tail=tail)
    per_step = c.n_steps * (1 + delta) / delta
    p_change = longer.policy_dependent / longer.n_steps - c.policy_dependent / c.n_steps
    m_change = longer.markov_chain / longer.n_steps - c.markov_chain / c.n_steps
    left = (1 + delta) / (delta * n * (n + 1)) * c.policy_dependent + per_step * p_change / n
    return Condition(left, -per_step * m_change)


def corollary_1(components: VarianceComponents, delta: float, n_actions: float = 1) -> Condition:
    """(1 - δN) / (δ (N² + N)) >= V_s / E_a. Nauman & Cygan 2022, Eq. 11.

    Holds for contextual bandits, where the next state does not depend on the action. Differs from
    the paper: its App. A.3 only requires the states to be independent under the policy. That is not
    sufficient, because an action may still determine its successor.
    """
    right = components.state_variance / components.action_variance
    return Condition((1 - delta * n_actions) / (delta * n_actions * (n_actions + 1)), right)


def bandit_break_even(components: VarianceComponents, n_actions: float = 1) -> float:
    """δ*(N) = 1 / (N (1 + (N+1) V_s / E_a)), the δ at which Corollary 1 holds with equality."""
    ratio = components.state_variance / components.action_variance
    return 1 / (n_actions * (1 + ratio * (n_actions + 1)))


def advise(
    components: VarianceComponents,
    delta: float,
    n_actions: float = 1,
    *,
    tail: bool = False,
    states: States = "longer",
) -> Advice:
    """Choose between more actions and more states at equal cost. Nauman & Cygan 2022, Lemma 2.

    Args:
        components: the variance components.
        delta: δ such that one more action in all T states costs as much as δT more states *with all
            their N actions*. If an extra action costs as much as d states with one action each,
            then δ = d / (1 + d (N - 1)), which is d at N = 1.
        n_actions: the current N.
        tail: as in `delta_states`.
        states: where more states come from; "trajectories" needs no stationary start.
    Returns:
        Both changes of the variance, and the better choice.
    """
    by_actions = delta_actions(components, n_actions)
    if states == "trajectories":
        by_states = delta_trajectories(components, delta, n_actions)
    else:
        by_states = delta_states(components, delta, n_actions, tail=tail)
    if min(by_actions, by_states) > 0:
        return Advice(by_actions, by_states, "neither")
    return Advice(
        by_actions, by_states, "more actions" if by_actions <= by_states else "more states"
    )


def optimal_actions(
    components: VarianceComponents,
    delta: float,
    *,
    max_actions: int = 64,
    states: States = "longer",
) -> Allocation:
    """Find the N that minimises V(T', N) at the cost of T single-action states.

    T' = T / (1 + δ (N-1)) states are affordable with N actions each. For a bandit, the optimum is
    an integer next to √(E_a (1-δ) / (V_s δ)), or 1 if δ >= 1. This extends Lemma 2, which only
    compares two steps from one (T, N) and does not determine the optimum.

    Args:
        components: the variance components for T single-action states.
        delta: δ >= 0, cost of an extra action / cost of an extra state (with its first action).
        max_actions: the largest N considered. N for which T' < 1 are not considered either.
        states: what T' counts. "trajectories": the states per trajectory of T states that would be
            affordable at N = 1; there are fewer trajectories, of the same length.
    Returns:
        The best allocation.
    Raises:
        ValueError: δ < 0, max_actions < 1, or the variances cannot be compared between lengths.
    """
    if states == "longer":
        _check_comparable(components)
    if delta < 0 or max_actions < 1:
        raise ValueError(
            f"delta is {delta} and max_actions {max_actions}, expected delta >= 0 and max_actions "
            ">= 1: pass the cost of an extra action in states"
        )
    best = Allocation(1, components.n_steps, components.variance())
    for n in range(2, max_actions + 1):
        n_steps = components.n_steps / (1 + delta * (n - 1))
        if n_steps < 1:
            break
        if states == "trajectories":
            variance = components.variance(n) * components.n_steps / n_steps
        else:
            variance = components.at(n_steps=n_steps).variance(n)
        found = Allocation(n, n_steps, variance)
        best = min(best, found, key=lambda a: a.variance)
    return best


def _longer(components: VarianceComponents, delta: float, *, tail: bool) -> VarianceComponents:
    """The components at T + δT; the covariances at lags >= T are set to zero unless `tail`."""
    _check_comparable(components)
    _check_positive(delta)
    n_steps = components.n_steps * (1 + delta)
    if tail:
        return components.at(n_steps=n_steps)
    known = math.ceil(components.n_steps)
    zeros = components.marginal.new_zeros(math.ceil(n_steps) - known)
    return replace(
        components,
        marginal=torch.cat([components.marginal[:known], zeros]),
        policy=torch.cat([components.policy[:known], zeros]),
        n_steps=n_steps,
    )


def _check_positive(delta: float) -> None:
    if delta <= 0:
        raise ValueError(f"delta is {delta}, expected > 0: there are delta·T states more")


def _check_comparable(components: VarianceComponents) -> None:
    if components.gamma != 1 or not components.stationary:
        raise ValueError(
            f"gamma is {components.gamma} and stationary {components.stationary}, expected 1 and "
            "True: otherwise the mean of the gradient depends on T too, and variances at different "
            "T cannot be compared; use components.at(gamma=1) or a stationary start"
        )
