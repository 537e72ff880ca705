"""When do more actions per state beat more states? The variance of many-action policy gradients.

Υ(s, a) [P] is the gradient of one sample, the score times Q, or times an advantage: all below holds
for any fixed weight. The estimator averages T states with N actions each, of which the first drives
the transition:  g = 1/T Σ_t γ^t 1/N Σ_n Υ(s_t, a_t^n).  Here live the components of its variance
and the rules that decide between actions and states. The components come in closed form from
`many_actions_mdp.py` and from data from `many_actions_data.py`. All variances are traces over the
parameters, and the first state is stationary unless said.
Nauman & Cygan 2022, "On All-Action Policy Gradients"; where its text errs, a docstring says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class VarianceComponents:
    """The components of Lemma 1 at every lag, and what they add up to for T steps.

    V(T, N) = (M + P / N) / T,   M = Σ_t w_t α_t,   P = Σ_t w_t α^e_t,
    w_t = (2 - [t = 0]) / T Σ_{i < T-t} γ^{2i+t}, which is 2 (T - t) / T without γ^t.
    Nauman & Cygan 2022, Eq. 7 and 24. Differs from the paper: γ^t is not part of Υ, since Eq. 7
    needs a stationary Υ; it enters through w_t, and gamma = 1 (as in PPO) leaves it out.

    P can be negative: given the states, the first action has seen its successor and the others
    have not, so more actions can raise the variance (the paper says they cannot).

    With stationary False, the lags are averages over the steps, valid at one T and γ only.
    """

    marginal: Tensor  # [L] α_t = Cov(E_a Υ(s_0, a), E_a Υ(s_t, a)); α_0 is V_s
    policy: Tensor  # [L] α^e_t = E_s0 Cov(Υ(s_0, a_0), E_a Υ(s_t, a) | s_0); α^e_0 is E_a
    n_steps: float  # T <= L; a real number between the integers interpolates w_t
    n_parameters: int  # P, to report means over the parameters
    gamma: float = 1.0
    stationary: bool = True
    q_noise: float = 0.0  # variance of one Q sample's noise in Υ, in no other component

    def __post_init__(self) -> None:
        if self.marginal.dim() != 1 or self.marginal.shape != self.policy.shape:
            shapes = f"{list(self.marginal.shape)} and {list(self.policy.shape)}"
            raise ValueError(f"marginal and policy are {shapes}, expected [L] both: pass all lags")
        if not 1 <= self.n_steps <= len(self.marginal):
            raise ValueError(
                f"n_steps is {self.n_steps}, expected 1 to the {len(self.marginal)} lags that are "
                "known: compute or record more lags"
            )

    @property
    def state_variance(self) -> float:
        """V_s = Var_s[E_a Υ], the variance with marginalised policy."""
        return float(self.marginal[0])

    @property
    def action_variance(self) -> float:
        """E_a = E_s[Var_a Υ], the state-conditioned variance of the policy."""
        return float(self.policy[0])

    @property
    def markov_chain(self) -> float:
        """M, the variance of the underlying Markov chain: only more states reduce it."""
        return self._weighted(self.marginal)

    @property
    def policy_dependent(self) -> float:
        """P, the policy-dependent variance: divided by the number of actions."""
        return self._weighted(self.policy)

    @property
    def policy_share(self) -> float:
        """P / (M + P), the share of the policy in the single-action variance."""
        return self.policy_dependent / (self.markov_chain + self.policy_dependent)

    def variance(self, n_actions: float = 1) -> float:
        """V(T, N); math.inf actions leave M / T."""
        return (self.markov_chain + self.policy_dependent / n_actions) / self.n_steps

    def at(self, *, n_steps: float | None = None, gamma: float | None = None) -> VarianceComponents:
        """The same chain observed for another number of steps, or with another γ.

        Raises:
            ValueError: a start that is not stationary, or more steps than lags are known.
        """
        n_steps = self.n_steps if n_steps is None else n_steps
        gamma = self.gamma if gamma is None else gamma
        if not self.stationary and (n_steps, gamma) != (self.n_steps, self.gamma):
            raise ValueError(
                f"components of a start that is not stationary hold at T = {self.n_steps}, gamma = "
                f"{self.gamma} only, got {n_steps} and {gamma}: compute or estimate them anew there"
            )
        return replace(self, n_steps=n_steps, gamma=gamma)

    def sampled_q(self, n_rollouts: int) -> VarianceComponents:
        """With Q a mean of independent noisy rollouts: E_a + q_noise / K in place of E_a."""
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
    """Rows of Table 1 (Nauman & Cygan 2022), means over the parameters.

    Args:
        covariance_factor: what multiplies the two sums over lags, alone and in the totals. 2 is
            Eq. 7, and the rows add up to the totals as in the paper. 1 is the literal reading of
            the paper's row names; its totals are then not those of Eq. 7.
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


class Condition(NamedTuple):
    """An inequality of the paper: more actions reduce the variance more iff left >= right."""

    left: float
    right: float

    @property
    def more_actions(self) -> bool:
        """left >= right."""
        return self.left >= self.right


class Advice(NamedTuple):
    """What one more action per state and δT more states change, and the better of the two."""

    delta_actions: float  # Δ_N, negative where the variance falls
    delta_states: float  # Δ_T
    choice: str  # "more actions", "more states", or "neither" where both raise the variance


class Allocation(NamedTuple):
    """A budget spent on N actions in each of T states."""

    n_actions: int
    n_steps: float
    variance: float


def delta_actions(components: VarianceComponents, n_actions: float = 1) -> float:
    """Δ_N = V(T, N+1) - V(T, N) = -P / (T N (N+1)). Nauman & Cygan 2022, Eq. 8 (Lemma 2)."""
    n = n_actions
    return -components.policy_dependent / (components.n_steps * n * (n + 1))


def delta_states(
    components: VarianceComponents, delta: float, n_actions: float = 1, *, tail: bool = False
) -> float:
    """Δ_T = V(T + δT, N) - V(T, N). Nauman & Cygan 2022, Eq. 9 (Lemma 2) and 26.

    Args:
        delta: δ > 0, the trajectory grows by δT.
        tail: False drops the covariances at lags >= T, as Lemma 2 does ("reaches a regenerative
            state"); True keeps them, which is exact and needs T + δT lags.
    Raises:
        ValueError: δ <= 0, or variances that cannot be compared between lengths.
    """
    longer = _longer(components, delta, tail=tail)
    return longer.variance(n_actions) - components.variance(n_actions)


def theorem_1(components: VarianceComponents) -> Condition:
    """Σ_t t/T Cov_t >= M, for δ = N = 1: Nauman & Cygan 2022, Eq. 10. Lags >= T count as zero.

    Raises:
        ValueError: gamma other than 1.
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
    """Δ_N <= Δ_T for any N and δ, policy on the left, chain on the right. 2022, Eq. 30.

    Args and raises: as `delta_states`.
    """
    c, n = components, n_actions
    longer = _longer(c, delta, tail=tail)
    per_step = c.n_steps * (1 + delta) / delta
    p_change = longer.policy_dependent / longer.n_steps - c.policy_dependent / c.n_steps
    m_change = longer.markov_chain / longer.n_steps - c.markov_chain / c.n_steps
    left = (1 + delta) / (delta * n * (n + 1)) * c.policy_dependent + per_step * p_change / n
    return Condition(left, -per_step * m_change)


def corollary_1(components: VarianceComponents, delta: float, n_actions: float = 1) -> Condition:
    """(1 - δN) / (δ (N² + N)) >= V_s / E_a: Nauman & Cygan 2022, Eq. 11.

    For contextual bandits, where the next state does not depend on the action. Differs from the
    paper, whose App. A.3 asks only that states are independent under the policy: not enough, an
    action may still choose its successor.
    """
    right = components.state_variance / components.action_variance
    return Condition((1 - delta * n_actions) / (delta * n_actions * (n_actions + 1)), right)


def bandit_break_even(components: VarianceComponents, n_actions: float = 1) -> float:
    """δ*(N) = 1 / (N (1 + (N+1) V_s / E_a)), the δ at which Corollary 1 is an equality."""
    ratio = components.state_variance / components.action_variance
    return 1 / (n_actions * (1 + ratio * (n_actions + 1)))


def advise(
    components: VarianceComponents, delta: float, n_actions: float = 1, *, tail: bool = False
) -> Advice:
    """More actions or more states, at equal cost? Nauman & Cygan 2022, Lemma 2.

    Args:
        delta: δ, one more action in all T states costs as much as δT more states *with all their N
            actions*. If an extra action costs d bare states, δ = d / (1 + d (N - 1)); the same at
            N = 1.
        n_actions: N now. tail: as in `delta_states`.
    """
    by_actions = delta_actions(components, n_actions)
    by_states = delta_states(components, delta, n_actions, tail=tail)
    if min(by_actions, by_states) > 0:
        return Advice(by_actions, by_states, "neither")
    return Advice(
        by_actions, by_states, "more actions" if by_actions <= by_states else "more states"
    )


def optimal_actions(
    components: VarianceComponents, delta: float, *, max_actions: int = 64
) -> Allocation:
    """The N that minimises V(T', N) at the cost of T single-action states: T' = T / (1 + δ (N-1)).

    For a bandit it is the integer at √(E_a (1-δ) / (V_s δ)), or 1 if δ >= 1. Our extension of
    Lemma 2, which compares two steps from one (T, N) and says nothing of where to stop.

    Args:
        delta: δ >= 0, cost of an extra action / cost of an extra state (with its first action).
        max_actions: the largest N considered; N with T' < 1 are left out too.
    Raises:
        ValueError: δ < 0, max_actions < 1, or variances not comparable between lengths.
    """
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
        found = Allocation(n, n_steps, components.at(n_steps=n_steps).variance(n))
        best = min(best, found, key=lambda a: a.variance)
    return best


def _longer(components: VarianceComponents, delta: float, *, tail: bool) -> VarianceComponents:
    """The components at T + δT, with lags >= T as they are or zero."""
    _check_comparable(components)
    if delta <= 0:
        raise ValueError(f"delta is {delta}, expected > 0: the trajectory grows by delta·T steps")
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


def _check_comparable(components: VarianceComponents) -> None:
    if components.gamma != 1 or not components.stationary:
        raise ValueError(
            f"gamma is {components.gamma} and stationary {components.stationary}, expected 1 and "
            "True: otherwise the mean of the gradient depends on T too, and its variances at two T "
            "do not compare; use components.at(gamma=1) or a stationary start"
        )
