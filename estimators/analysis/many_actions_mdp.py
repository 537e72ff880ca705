"""Variance of many-action policy gradients in a finite MDP, in closed form.

`many_actions.py` defines the components and uses them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from totalprop.estimators.analysis.many_actions import VarianceComponents


def finite_mdp(
    transition: Tensor,
    upsilon: Tensor,
    policy: Tensor,
    *,
    n_steps: int,
    n_lags: int | None = None,
    start: Tensor | None = None,
    gamma: float = 1.0,
) -> VarianceComponents:
    """Compute the components of Lemma 1 in closed form.

    With f_0 = E_a Υ, f_t = P_π f_{t-1} and m = E_s f_0:
    α_t = E_s[f_0·f_t] - m·m,
    α^e_t = E_s[Σ_a π(a|s) Υ(s,a)·Σ_s' P(s'|s,a) f_{t-1}(s') - f_0·f_t].
    Nauman & Cygan 2022, Eq. 17 and 19. Differs from the paper: the product of means subtracted in
    the 1/N bracket of Eq. 19 should be E_s[f_0·f_t]. Extends the paper to any start distribution,
    for which the lags are averaged over the T steps.

    Args:
        transition: [S, A, S] P(s'|s, a).
        upsilon: [S, A, P] Υ.
        policy: [S, A] π(a|s).
        n_steps: T.
        n_lags: L >= T, for tails and longer trajectories; T if None, and if `start` is given.
        start: [S] distribution of the first state; None for the chain's stationary distribution.
        gamma: γ, see `VarianceComponents`.
    Raises:
        ValueError: a shape is wrong, a row is not a distribution, or the chain has several
            stationary distributions.
    """
    _check_mdp(transition, upsilon, policy, start)
    transition, policy, upsilon = _normalised(transition), _normalised(policy), upsilon.double()
    n_lags = n_steps if n_lags is None or start is not None else max(n_lags, n_steps)
    chain = torch.einsum("sa,saz->sz", policy, transition)  # [S, S] P_π
    law = _stationary_law(chain) if start is None else _normalised(start)
    # A constant shift of Υ leaves covariances unchanged; it avoids cancellation in E[f·f] - m·m.
    upsilon = upsilon - torch.einsum("s,sa,sap->p", law, policy, upsilon)
    mean = torch.einsum("sa,sap->sp", policy, upsilon)  # [S, P] f_0
    of_action = policy.unsqueeze(-1) * (upsilon - mean.unsqueeze(1))  # [S, A, P]
    future, marginal, policies = mean, [mean.square().sum(-1)], [(of_action * upsilon).sum((1, 2))]
    for _ in range(1, n_lags):
        after = torch.einsum("saz,zp->sap", transition, future)
        policies.append((of_action * after).sum((1, 2)))
        future = chain @ future
        marginal.append((mean * future).sum(-1))
    by_state, by_action = torch.stack(marginal), torch.stack(policies)  # [L, S]
    n_parameters, stationary = upsilon.shape[-1], start is None
    if stationary:
        alpha, alpha_e = by_state @ law, by_action @ law
    else:
        laws = [law]
        for _ in range(1, n_steps):
            laws.append(laws[-1] @ chain)
        visits = torch.stack(laws)  # [T, S]
        means = visits @ mean  # [T, P]
        weight = gamma ** (2 * torch.arange(n_steps).to(visits))
        averages = [_step_average(visits, means, weight, lag) for lag in range(n_steps)]
        alpha = torch.stack([a @ p - m for a, (p, m) in zip(by_state, averages)])
        alpha_e = torch.stack([e @ p for e, (p, _) in zip(by_action, averages)])
    return VarianceComponents(alpha, alpha_e, n_steps, n_parameters, gamma, stationary)


def _normalised(p: Tensor) -> Tensor:
    """Probabilities in float64, with rows that sum to 1 to float64 precision."""
    return p.double() / p.double().sum(-1, keepdim=True)


def _step_average(visits: Tensor, means: Tensor, weight: Tensor, lag: int) -> tuple[Tensor, Tensor]:
    """Weighted averages over i < T - lag of the distribution of s_i, [S], and of m_i·m_{i+lag}."""
    w = weight[: len(weight) - lag]
    w = w / w.sum()
    return w @ visits[: len(w)], w @ (means[: len(w)] * means[lag:]).sum(-1)


def _stationary_law(chain: Tensor) -> Tensor:
    """[S] stationary distribution of the chain [S, S]."""
    _, singular, v = torch.linalg.svd(chain.mT - torch.eye(len(chain)).to(chain))
    n_laws = int((singular < 1e3 * torch.finfo(chain.dtype).eps).sum())
    if n_laws > 1:
        raise ValueError(
            f"the chain has {n_laws} stationary distributions, expected one: pass start"
        )
    return v[-1] / v[-1].sum()


def _check_mdp(transition: Tensor, upsilon: Tensor, policy: Tensor, start: Tensor | None) -> None:
    s, a = policy.shape if policy.dim() == 2 else (0, 0)
    expected = {"policy": [s, a], "transition": [s, a, s], "upsilon": [s, a, -1], "start": [s]}
    given = {"policy": policy, "transition": transition, "upsilon": upsilon, "start": start}
    for name, tensor in given.items():
        if tensor is None:
            continue
        shape, wanted = list(tensor.shape), expected[name]
        if len(shape) != len(wanted) or any(w not in (-1, n) for w, n in zip(wanted, shape)):
            raise ValueError(
                f"{name} is {shape}, expected {wanted} (-1 any): pass transition [S, A, S], "
                "upsilon [S, A, P], policy [S, A] and start [S] of the same states and actions"
            )
        rows = tensor.sum(-1)
        if name != "upsilon" and not torch.allclose(rows, torch.ones_like(rows), atol=1e-5):
            worst = float((rows - 1).abs().max())
            raise ValueError(
                f"the rows of {name} must sum to 1, one is off by {worst:.3g}: normalise them"
            )
