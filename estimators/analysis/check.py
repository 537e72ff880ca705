"""Check a user's rollout: are all costs credited, do RP and LR agree, which estimator is best."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from totalprop.estimators.node import UNCREDITED, Estimator
from totalprop.estimators.probes import trainable
from totalprop.estimators.registry import make
from totalprop.estimators.rollout import Rollout

LIMIT = 4.0  # standard errors by which RP and LR may differ, with up to some 100 parameters
SHOWN = 8  # parameters in a printed report


class _Ledger(Rollout):
    """A rollout that also records which part of the loss was credited.

    Every cost is multiplied by (1 + ledger). At a ledger of 0, dL/dledger is the credited part of L
    if L is linear in its costs; at -1 the loss is what is left without them.
    """

    def __init__(self, estimator: Estimator, ledger: float, noise_scale: float) -> None:
        super().__init__(estimator)
        self.zeros: list[Tensor] = []  # meter, gauge and tap, which are no parameters
        self.ledger = torch.tensor(ledger, dtype=torch.float64, requires_grad=True)
        self.noise_scale = noise_scale
        self.noises: list[Tensor] = []  # of each node, before they are scaled
        self.eps = 0.0  # of the credited costs

    def sample(
        self, mean: Tensor, std: Tensor | None, *, noise: Tensor | None = None, **extra: Any
    ) -> Tensor:
        if noise is None and isinstance(mean, Tensor):
            noise = self._draw(mean, is_gaussian=std is not None)
        if isinstance(noise, Tensor):
            self.noises.append(noise)
            noise = self.noise_scale * noise
        self.zeros += [extra[name] for name in ("meter", "gauge", "tap") if name in extra]
        return super().sample(mean, std, noise=noise, **extra)

    def cost(self, cost: Tensor) -> Tensor:
        credited = super().cost(cost)
        if credited.is_floating_point():
            self.eps = max(self.eps, torch.finfo(credited.dtype).eps)
        return credited * (1 + self.ledger.to(credited))


@dataclass(frozen=True)
class Report:
    """The result of `check`; `print` it.

    Attributes:
        loss: mean of the loss over the repeats.
        credited: mean of the part of it that passed through `Rollout.cost`.
        uncredited_cost: whether the rest of the loss depends on the rollout's samples; None if the
            loss is not linear in its costs, so that this cannot be told.
        means: estimator -> parameter -> mean gradient, of the parameter's shape.
        z: parameter -> difference of RP's and LR's mean gradient in its standard errors.
        limit: the largest |z| that chance explains.
        variances: estimator -> variance of the gradient, summed over all parameters.
        relative_errors: estimator -> relative standard error of its variance.
        best: the estimator to use, or None while a cost is uncredited, or is credited and then
            goes through a function that is not linear.
        repeats: number of gradients of each estimator.
    """

    loss: float
    credited: float
    uncredited_cost: bool | None
    means: dict[str, dict[str, Tensor]]
    z: dict[str, Tensor]
    limit: float
    variances: dict[str, float]
    relative_errors: dict[str, float]
    best: str | None
    repeats: int

    @property
    def agree(self) -> bool:
        """Whether RP and LR have the same mean, as far as these repeats can tell."""
        return all(bool((z.abs() <= self.limit).all()) for z in self.z.values())

    def saves(self, name: str, over: str = "rp") -> float:
        """How many times less variance an estimator has than another, by default than RP."""
        mine, other = self.variances[name], self.variances[over]
        if not math.isfinite(other):
            return math.inf if math.isfinite(mine) else 1.0
        return other / mine if mine > 0 else (math.inf if other > 0 else 1.0)

    def __str__(self) -> str:
        lines = [*self._credit(), *self._agreement(), ""]
        lines.append(f"{'estimator':<16}{'variance':>10}{'± %':>6}{'times less than rp':>20}")
        for name, variance in self.variances.items():
            error = 100 * self.relative_errors[name]
            shown = f"{error:.0f}" if math.isfinite(error) else "-"
            lines.append(f"{name:<16}{variance:>10.2g}{shown:>6}{self.saves(name):>20.3g}")
        return "\n".join([*lines, "", self._advice()])

    def _credit(self) -> list[str]:
        if self.uncredited_cost is None:
            return ["credit: cannot be checked, since the loss is not linear in its costs"]
        if not self.uncredited_cost:
            return ["credit: every cost that depends on a sample is credited"]
        return [
            f"credit: NOT COMPLETE. Of the loss of {self.loss:.4g}, a part of "
            f"{self.loss - self.credited:.2g} did not pass through r.cost, and depends on samples"
        ]

    def _agreement(self) -> list[str]:
        verdict = "agree" if self.agree else "DISAGREE"
        lines = [f"RP and LR {verdict} (z: standard errors between them, limit {self.limit:.1f})"]
        by_size = sorted(self.z, key=lambda name: -float(self.z[name].abs().max()))
        for name in by_size[:SHOWN]:
            z = self.z[name].flatten()
            index = int(z.abs().argmax())
            rp, lr = (self.means[one][name].flatten()[index].item() for one in ("rp", "lr"))
            where = f"{name}[{index}]" if len(z) > 1 else name
            lines.append(f"  {where}: RP {rp:.3g}, LR {lr:.3g}, z {z[index].item():.1f}")
        if len(by_size) > SHOWN:
            lines.append(f"  and {len(by_size) - SHOWN} more, with smaller z")
        return lines

    def _advice(self) -> str:
        if self.best is None and self.uncredited_cost:
            return "Credit every cost with r.cost(...), then check again."
        if self.best is None:
            return (
                "Call r.cost(...) last, on what is averaged to the loss, then check again: the "
                "gradient of a logarithm or a square of a credited cost is not the sum of the "
                "costs' gradients, and the likelihood ratio is wrong there."
            )
        if not self.agree:
            return (
                f"Use '{self.best}': RP misses part of the gradient (a jump, a rounding, a "
                "detached path), and so does every mixture with it. If every step is smooth, look "
                "for a cost that is credited too early, or for noise that r.sample did not draw."
            )
        if self.best == "rp":
            return (
                f"Use 'rp': no other estimator has clearly less variance ({self.repeats} repeats)."
            )
        saved = f"{self.saves(self.best):.3g}"
        return (
            f"Use '{self.best}': it has {saved} times less variance than 'rp', which would need "
            f"{saved} times the samples."
        )


def check(
    rollout: Callable[[Rollout], Tensor],
    parameters: Mapping[str, Tensor] | nn.Module | None = None,
    *,
    estimators: str | Estimator | Sequence[str | Estimator] = ("rp", "lr", "tpx"),
    repeats: int = 40,
    seed: int = 0,
) -> Report:
    """Check a rollout: its credits, the agreement of RP and LR, and the estimators' variances.

    The rollout is evaluated `repeats` times with each estimator. All see the same noise, so the
    difference of RP and LR is measured pairwise. PyTorch's global generator is restored.

    All randomness of the rollout must come from that generator, which is seeded before each call;
    another one can be made from it, such as `np.random.default_rng(torch.initial_seed())`.

    Args:
        rollout: r -> loss [], which samples with `r.sample(mean, std)` and credits each cost with
            `r.cost(cost)`, for an r that is passed to it, a `Rollout`.
        parameters: name -> tensor, or a module; by default all leaves that the loss depends on.
        estimators: what to compare, one or several; RP and LR are always among them. Those that
            need a probe work if the rollout passes one.
        repeats: gradients of each estimator, at least 3.
        seed: seed of the noise.
    Returns:
        A report to print, with its figures as attributes.
    Raises:
        TypeError: the rollout does not return a tensor, or `parameters` has no names.
        ValueError: the loss is no scalar, depends on no parameter or on no node, or is another one
            in a second call with the same seed; a node's noise is the same with another seed; a
            parameter is made in the rollout; `parameters` is empty, or there are too few repeats.
    """
    if repeats < 3:
        raise ValueError(f"check needs at least 3 repeats, got {repeats}")
    if isinstance(estimators, str | Estimator):
        estimators = (estimators,)
    chosen = _named_estimators(["rp", "lr", *estimators])

    def evaluate(
        name: str, number: int, *, ledger: float = 0.0, noise_scale: float = 1.0
    ) -> tuple[Tensor, float, _Ledger]:
        torch.manual_seed(1_000_003 * seed + number)
        r = _Ledger(chosen[name], ledger, noise_scale)
        loss = rollout(r)
        _check_loss(loss, r)
        (credited,) = torch.autograd.grad(
            loss, r.ledger, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return loss, float(credited), r

    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), warnings.catch_warnings():
        warnings.filterwarnings("ignore", re.escape(UNCREDITED))  # the report says it
        loss, credited, r = evaluate("rp", 0)
        named = _named(parameters, loss, [r.ledger, *r.zeros])
        again, _, _ = evaluate("rp", 0)
        if not torch.allclose(loss.detach(), again.detach(), rtol=1e-4, equal_nan=True):
            raise ValueError(
                f"the rollout's loss is {loss:.6g} in one call and {again:.6g} in the next, with "
                "the same seed: draw all noise from PyTorch's global generator, or from one made "
                "in the rollout, such as np.random.default_rng(torch.initial_seed())"
            )
        if parameters is None:
            _check_persistent(again, named)
        _check_fresh(r, evaluate("rp", 1)[2])
        # Without the credited costs (ledger -1) the loss must not change with the nodes' noise. It
        # is then the same to the bit, but for sums in another order on a GPU.
        total = float(loss.detach())
        doubled, rest, rest_moved = (
            float(evaluate("rp", 0, ledger=by, noise_scale=scale)[0].detach())
            for by, scale in ((1.0, 1.0), (-1.0, 1.0), (-1.0, -0.7))
        )
        eps = torch.finfo(loss.dtype).eps
        uncredited: bool | None = abs(rest - rest_moved) > 8 * eps * max(abs(rest), abs(rest_moved))
        # Doubled costs add to a linear loss what is credited, up to the round-off of sums over some
        # thousand steps and samples.
        round_off = 1e3 * max(eps, r.eps) * max(abs(total), abs(credited))
        if abs(doubled - total - credited) > round_off:
            uncredited = None
        gradients: dict[str, list[Tensor]] = {name: [] for name in chosen}
        losses, parts = [], []
        for number in range(repeats):
            for name in chosen:
                loss, credited, _ = evaluate(name, number)
                found = torch.autograd.grad(
                    loss, list(named.values()), allow_unused=True, materialize_grads=True
                )
                gradients[name].append(torch.cat([g.detach().flatten().double() for g in found]))
            losses.append(float(loss.detach()))
            parts.append(credited)
    stacked = {name: torch.stack(g).cpu() for name, g in gradients.items()}  # [R, P]
    return _report(stacked, named, losses, parts, uncredited=uncredited)


def _report(
    gradients: dict[str, Tensor],
    named: Mapping[str, Tensor],
    losses: list[float],
    parts: list[float],
    *,
    uncredited: bool | None,
) -> Report:
    repeats, size = gradients["rp"].shape
    sizes, shapes = [p.numel() for p in named.values()], [p.shape for p in named.values()]

    def by_parameter(flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split(sizes)
        return {n: x.reshape(s) for n, x, s in zip(named, parts, shapes, strict=True)}

    difference = gradients["rp"] - gradients["lr"]
    error = difference.std(0) / repeats**0.5
    z = torch.where(difference.mean(0) == 0, 0.0, difference.mean(0) / error)
    z = z.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)  # where one is not finite
    limit = max(LIMIT, math.sqrt(2 * math.log(size / 1e-3)))
    agree = bool((z.abs() <= limit).all())
    variances, errors = {}, {}
    for name, g in gradients.items():
        variances[name] = float(g.var(0).sum().nan_to_num(nan=math.inf))
        errors[name] = _relative_error(g)
    best: str | None = None
    if not uncredited and agree:
        best = _best(variances, errors)
    elif uncredited is False:
        best = "lr"
    return Report(
        loss=sum(losses) / repeats,
        credited=sum(parts) / repeats,
        uncredited_cost=uncredited,
        means={name: by_parameter(g.mean(0)) for name, g in gradients.items()},
        z=by_parameter(z),
        limit=limit,
        variances=variances,
        relative_errors=errors,
        best=best,
        repeats=repeats,
    )


def _relative_error(g: Tensor) -> float:
    """Relative standard error of the variance's trace over repeats [R, P], by the jackknife."""
    n = len(g)
    squares = (g - g.mean(0)).square().sum(1)  # [R]
    total = squares.sum()
    left_out = (total - squares * n / (n - 1)) / (n - 2)
    error = left_out.std(correction=0) * (n - 1) ** 0.5 / (total / (n - 1))
    return float(error.nan_to_num(nan=0.0 if total == 0 else math.inf))


def _best(variances: dict[str, float], errors: dict[str, float]) -> str:
    """The first estimator whose variance is not clearly (2 standard errors) above the least."""
    least = min(variances, key=lambda name: variances[name])
    for name, variance in variances.items():
        if variance == variances[least]:
            return name
        error = min(math.hypot(errors[name], errors[least]), 1.0)
        is_comparable = variances[least] > 0 and math.isfinite(variance)
        if is_comparable and math.log(variance / variances[least]) <= 2 * error:
            return name
    return least


def _check_loss(loss: object, r: Rollout) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"the rollout must return its loss, a tensor [], got {type(loss).__name__}")
    if loss.ndim != 0:
        raise ValueError(
            f"the rollout must return a loss [], got {list(loss.shape)}; average the credited costs"
        )
    if r.credit is None:
        raise ValueError(
            "the rollout never called r.sample(mean, std), so there is nothing to check"
        )


def _named(
    parameters: Mapping[str, Tensor] | nn.Module | None, loss: Tensor, others: Sequence[Tensor]
) -> dict[str, Tensor]:
    if parameters is not None:
        return trainable(parameters)
    leaves = [leaf for leaf in _leaves(loss) if not any(leaf is other for other in others)]
    if not leaves:
        raise ValueError("the loss depends on no parameter: is one with requires_grad=True used?")
    return {f"parameter {i}": leaf for i, leaf in enumerate(leaves)}


def _check_persistent(loss: Tensor, named: Mapping[str, Tensor]) -> None:
    """Refuse parameters that a second call does not use."""
    used = _leaves(loss)
    for name, parameter in named.items():
        if not any(parameter is leaf for leaf in used):
            raise ValueError(
                f"{name}, of shape {list(parameter.shape)}, is not used by the next call of the "
                "rollout: make it outside of the rollout, or pass parameters={...} to check"
            )


def _check_fresh(r: _Ledger, other: _Ledger) -> None:
    """Refuse noise that two rollouts of different seeds share: no mean over it can be taken."""
    for number, (noise, again) in enumerate(zip(r.noises, other.noises)):
        if noise.numel() > 0 and torch.equal(noise, again):
            raise ValueError(
                f"node {number} of the rollout, counted from 0, has the same noise with every "
                "seed, and RP and LR have the same mean over fresh noise alone: draw it within "
                "the rollout, as in noise=torch.randn_like(mean), or call r.sample without noise="
            )


def _leaves(loss: Tensor) -> list[Tensor]:
    """The leaves of the loss's graph."""
    found: list[Tensor] = []
    seen, stack = set(), [loss.grad_fn]
    while stack:
        function = stack.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        if (leaf := getattr(function, "variable", None)) is not None:
            found.append(leaf)
        stack.extend(upstream for upstream, _ in function.next_functions)
    return found


def _named_estimators(estimators: Sequence[str | Estimator]) -> dict[str, Estimator]:
    """Each under a name of its own: the registered one, or its rule's, with a number if taken."""
    found: dict[str, Estimator] = {}
    for one in estimators:
        estimator = make(one)
        if any(estimator == other for other in found.values()):
            continue
        rule = getattr(estimator.weight, "__name__", "estimator").replace("_", "-")
        name, number = one if isinstance(one, str) else rule, 2
        while name in found:
            name, number = f"{rule} {number}", number + 1
        found[name] = estimator
    return found
