"""The problems of `totalprop study gradients`: rollouts whose policy gradient is to be estimated.

A problem is a Markov chain with a carried state s. Each step draws z ~ N(mean(s, θ), std(s, θ)),
which is the node, and moves on to s' = advance(s, z). Costs are of s' and z, and their mean is
differentiated in θ. Everything is float64. The kinds:

- smooth: RP and LR agree, and RP has the lower variance.
- stiff: a ramp that is 1 / κ wide. RP is right in the mean, but rarely sees the ramp, so that few
  samples make it look precise and wrong (Suh et al. 2022, the empirical bias).
- jump: a cost or a transition that RP does not see, so that it is wrong with any number of samples.
- chaos: derivatives grow with every step, and RP's variance with them (Parmas et al. 2018, 2023).
- agent: trained agents, see `agent_problems`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import jvp

from totalprop.estimators import (
    ControlProbe,
    DenseJacobian,
    Estimator,
    assign_credit,
    gradient,
    own_and_carried,
)
from totalprop.scripts.studies.chaotic_rnn import START, STD, W

KINDS = ("smooth", "stiff", "jump", "chaos", "agent")
F64 = torch.float64


class Draw(NamedTuple):
    """The distribution of a node, each [N, D]."""

    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class Problem:
    """A rollout of any length.

    Attributes:
        name: without spaces.
        kind: one of `KINDS`, but "agent".
        theta: values of the P parameters.
        start: state [S] that all samples start from.
        node: (s [N, S], θ [P]) -> the distribution of z.
        advance: (s [N, S], z [N, D]) -> s' [N, S].
        cost: (s', z, t, H) -> [N], the cost of step t = 1 .. H.
        horizons: those that the study measures.
        exact: H -> the gradient [P] in closed form, or None.
    """

    name: str
    kind: str
    theta: tuple[float, ...]
    start: tuple[float, ...]
    node: Callable[[Tensor, Tensor], Draw]
    advance: Callable[[Tensor, Tensor], Tensor]
    cost: Callable[[Tensor, Tensor, int, int], Tensor]
    horizons: tuple[int, ...]
    exact: Callable[[int], Tensor] | None = None

    def gradient(self, estimator: Estimator, noise: Tensor) -> Tensor:
        """The estimator's gradient [P] from noise [H, N, D]."""
        horizon, n, _ = noise.shape
        theta = torch.tensor(self.theta, dtype=F64, requires_grad=True)
        eye = torch.eye(len(theta), dtype=F64)

        def rollout(estimator: Estimator, tap: Tensor | None) -> Tensor:
            state = torch.tensor(self.start, dtype=F64).expand(n, -1)
            credit, total = state.new_zeros(n), state.new_zeros(())
            for t, noise_t in enumerate(noise, 1):
                (mean, std), carried = self.node(state, theta), None
                if estimator.carry == "pathwise":
                    (mean, std), carried = own_and_carried(
                        lambda p, s: self.node(s, p["theta"]), {"theta": theta}, state
                    )
                probe = None
                if estimator.probe != "none" or tap is not None:
                    probe = self._probe(state, theta, eye)
                z, credit = estimator(
                    mean, std, noise_t, credit, probe=probe, tap=tap, carried=carried
                )
                state = self.advance(state, z)
                total = total + assign_credit(self.cost(state, z, t, horizon), credit).mean()
            return total

        found = gradient(rollout, [theta], estimator, samples=n, tap_size=len(theta))
        return found.gradients[0].detach()

    def draw(self, horizon: int, n: int, seed: int) -> Tensor:
        """Standard normal noise [H, N, D], from a seed."""
        start = torch.zeros(1, len(self.start), dtype=F64)
        size = self.node(start, torch.tensor(self.theta, dtype=F64)).mean.shape[-1]
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(horizon, n, size, dtype=F64, generator=generator)

    @property
    def truth(self) -> str:
        """The estimator that measures the gradient where there is no closed form.

        Without jumps all are right, and tpx has far less variance than LR.
        """
        return "tpx" if self.kind in ("smooth", "chaos") else "lr"

    def _probe(self, state: Tensor, theta: Tensor, eye: Tensor) -> ControlProbe:
        """One Jacobian-vector product for each parameter."""
        state, theta, n = state.detach(), theta.detach(), len(state)
        columns = [jvp(lambda p: self.node(state, p), (theta,), (e,))[1] for e in eye]
        jacobian = [torch.stack(members, -1) for members in zip(*columns, strict=True)]
        return ControlProbe(jacobian, lambda: DenseJacobian(eye.expand(n, -1, -1)))


def _take(state: Tensor, z: Tensor) -> Tensor:
    return z


# ---------------------------------------------------------------------------- smooth

LINEAR = torch.tensor([[1.0, 0.1], [0.0, 1.0]], dtype=F64)
PUSH = torch.tensor([0.005, 0.1], dtype=F64)


def _regulator() -> Problem:
    """A double integrator with the gains θ, in closed form by its second moments."""

    def node(state: Tensor, theta: Tensor) -> Draw:
        mean = state @ LINEAR.T - (state @ theta).unsqueeze(-1) * PUSH
        return Draw(mean, torch.full_like(mean, 0.05))

    def exact(horizon: int) -> Tensor:
        theta = torch.tensor((1.0, 1.2), dtype=F64, requires_grad=True)
        closed = LINEAR - PUSH.unsqueeze(1) * theta
        start = torch.tensor((1.0, 0.5), dtype=F64)
        second, total = torch.outer(start, start), torch.zeros((), dtype=F64)
        for _ in range(horizon):
            second = closed @ second @ closed.T + 0.05**2 * torch.eye(2, dtype=F64)
            total = total + second.trace()
        return torch.autograd.grad(total, theta)[0]

    return Problem(
        "regulator", "smooth", (1.0, 1.2), (1.0, 0.5), node, _take,
        lambda s, z, t, h: s.square().sum(-1), (1, 20, 100), exact,
    )  # fmt: skip


def _quadratic() -> Problem:
    """x² / 2 in four dimensions, in the means and a common log-std: (μ, 4 σ²)."""
    mean, log_std = (0.5, -0.3, 0.1, 0.0), math.log(0.4)

    def node(state: Tensor, theta: Tensor) -> Draw:
        return Draw(state + theta[:4], theta[4].exp().expand_as(state))

    def exact(horizon: int) -> Tensor:
        return torch.tensor((*mean, 4 * math.exp(2 * log_std)), dtype=F64)

    return Problem(
        "quadratic", "smooth", (*mean, log_std), (0.0,) * 4, node, _take,
        lambda s, z, t, h: 0.5 * s.square().sum(-1), (1,), exact,
    )  # fmt: skip


def _pendulum() -> Problem:
    """A pendulum that torque and damping hold upright, with noise in its speed."""

    def node(state: Tensor, theta: Tensor) -> Draw:
        angle, speed = state.unbind(-1)
        torque = -theta[0] * angle.sin() - theta[1] * speed
        mean = speed + 0.1 * (angle.sin() + torque)
        return Draw(mean.unsqueeze(-1), torch.full_like(mean, 0.1).unsqueeze(-1))

    def advance(state: Tensor, z: Tensor) -> Tensor:
        return torch.cat((state[:, :1] + 0.1 * z, z), -1)

    return Problem(
        "pendulum", "smooth", (2.0, 0.5), (1.0, 0.5), node, advance,
        lambda s, z, t, h: 1 - s[:, 0].cos() + 0.1 * s[:, 1].square(), (1, 20, 100),
    )  # fmt: skip


# ---------------------------------------------------------------------------- stiff


def _ramp(stiffness: float) -> Problem:
    """A body pushed over a step that is 1 / κ wide, and is thrown on by it."""

    def node(state: Tensor, theta: Tensor) -> Draw:
        mean = 0.9 * state + 0.1 * theta
        return Draw(mean, torch.full_like(mean, 0.2))

    def cost(state: Tensor, z: Tensor, t: int, horizon: int) -> Tensor:
        x = state[:, 0]
        return x.square() - 2 * (stiffness * x).clamp(0, 1)

    return Problem(
        f"ramp-{stiffness:.0e}".replace("+0", ""), "stiff", (-1.5,), (-0.15,), node, _take, cost,
        (1, 20, 100),
    )  # fmt: skip


# ---------------------------------------------------------------------------- jumps


def _step_cost() -> Problem:
    """x² in every step, and 1[x > 0] at the end."""

    def node(state: Tensor, theta: Tensor) -> Draw:
        mean = 0.8 * state + theta
        return Draw(mean, torch.full_like(mean, 0.3))

    def cost(state: Tensor, z: Tensor, t: int, horizon: int) -> Tensor:
        x = state[:, 0]
        return x.square() + (x > 0) if t == horizon else x.square() / horizon

    def exact(horizon: int) -> Tensor:
        theta, at_end = torch.tensor([-0.15], dtype=F64, requires_grad=True), None
        mean, variance, total = torch.zeros(1, dtype=F64), 0.0, torch.zeros(1, dtype=F64)
        for t in range(1, horizon + 1):
            mean, variance = 0.8 * mean + theta, 0.64 * variance + 0.09
            total = total + mean.square() * (1 if t == horizon else 1 / horizon)
        at_end = torch.special.ndtr(mean / math.sqrt(variance))
        return torch.autograd.grad((total + at_end).sum(), theta)[0]

    return Problem(
        "step-cost", "jump", (-0.15,), (0.0,), node, _take, cost, (1, 20, 100), exact
    )  # fmt: skip


def _step_dynamics() -> Problem:
    """Past x = 0 the floor moves the body on, as ice or a conveyor belt would."""

    def node(state: Tensor, theta: Tensor) -> Draw:
        mean = 0.9 * state + theta + 0.3 * (state > 0)
        return Draw(mean, torch.full_like(mean, 0.2))

    return Problem(
        "step-dynamics", "jump", (-0.05,), (-0.2,), node, _take,
        lambda s, z, t, h: (s[:, 0] - 1).square(), (20, 100),
    )  # fmt: skip


def _termination() -> Problem:
    """A walk that ends where |x| > 1; every step that it lives earns 1."""

    def node(state: Tensor, theta: Tensor) -> Draw:
        x = state[:, :1]
        return Draw(x - theta[0] * x + theta[1], torch.full_like(x, 0.3))

    def advance(state: Tensor, z: Tensor) -> Tensor:
        return torch.cat((z, state[:, 1:] * (z.abs() < 1)), -1)

    return Problem(
        "termination", "jump", (0.3, 0.1), (0.0, 1.0), node, advance,
        lambda s, z, t, h: -s[:, 1], (20, 100),
    )  # fmt: skip


def _inventory() -> Problem:
    """Stock is filled up to θ every day; an unmet demand costs a penalty."""

    def node(state: Tensor, theta: Tensor) -> Draw:
        mean = 0.2 * state + 0.8 * theta - 1.0  # a part is ordered, and the demand is 1
        return Draw(mean, torch.full_like(mean, 0.4))

    return Problem(
        "inventory", "jump", (1.2,), (0.5,), node, _take,
        lambda s, z, t, h: s[:, 0].clamp_min(0) + 5 * (s[:, 0] < 0), (3, 20),
    )  # fmt: skip


def _queue() -> Problem:
    """Lindley's waiting time with service of mean e^-θ; waiting above 1 costs a penalty."""

    def node(state: Tensor, theta: Tensor) -> Draw:
        mean = ((-theta).exp() - 1.0).expand_as(state)
        return Draw(mean, torch.full_like(mean, 0.5))

    def cost(state: Tensor, z: Tensor, t: int, horizon: int) -> Tensor:
        return (state[:, 0] + 3 * (state[:, 0] > 1)) / horizon

    return Problem(
        "queue", "jump", (0.2,), (0.0,), node, lambda s, z: (s + z).clamp_min(0), cost, (20, 100)
    )  # fmt: skip


# ---------------------------------------------------------------------------- chaos


def _chaos(*betas: float) -> Problem:
    """The recurrent network of Parmas et al. 2023 (TPX), Sec. 5; see `chaotic_rnn`."""
    weight = torch.block_diag(*[torch.tensor(W, dtype=F64)] * len(betas)).T

    def node(state: Tensor, theta: Tensor) -> Draw:
        mean = torch.sigmoid(theta.repeat_interleave(2) * (state @ weight))
        return Draw(mean, torch.full_like(mean, STD))

    def cost(state: Tensor, z: Tensor, t: int, horizon: int) -> Tensor:
        return 0.5 * state.square().sum(-1) * (t == horizon)

    name = "chaos-" + "-".join(f"{beta:g}" for beta in betas)
    return Problem(
        name, "chaos", betas, START * len(betas), node, _take, cost, (20, 100)
    )  # fmt: skip


PROBLEMS: dict[str, Problem] = {
    problem.name: problem
    for problem in (
        _regulator(), _quadratic(), _pendulum(),
        _ramp(1e2), _ramp(1e4), _ramp(1e6),
        _step_cost(), _step_dynamics(), _termination(), _inventory(), _queue(),
        _chaos(1.5), _chaos(2.4), _chaos(2.6), _chaos(3.0), _chaos(1.5, 3.0),
    )
}  # fmt: skip
