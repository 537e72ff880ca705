"""Probes: they map a node's cotangent to per-sample gradients of the policy parameters.

A probe is any callable `cotangent -> [N, P]`. The rules that need one (`tp`, `tps`, `tpg`) only use
the means and covariances of these gradients, and `ControlProbe` computes those without the [N, P]
arrays. A probe does no work until a rule calls it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from totalprop.estimators.collectives import gathered, own, summed

Zeta = tuple[Tensor, ...]
Probe = Callable[[Zeta], Tensor]


class Gram(NamedTuple):
    """Products between M cotangents in parameter space, where cotangent a gives B_a [N, P].

    Attributes:
        covariance: [M, M] Σ_p Cov_i(B_a[i, p], B_b[i, p]); the factor 1 / (N - 1) is left out.
        mean: [M, M] Σ_p of the products of the means over i, times N. Noise of zero mean adds
            covariance / (N - 1) to it.
        total: [M, P] Σ_i B_a[i, p], with the parameters in an order of the probe's own.
    """

    covariance: Tensor
    mean: Tensor
    total: Tensor


def gram(probe: Probe, cotangents: Zeta) -> Gram:
    """Products between M cotangents in parameter space.

    Args:
        probe: any probe; B_a is its result for cotangent a.
        cotangents: each [M, N, ..., D], like zeta with a leading axis M.
    """
    if isinstance(probe, ControlProbe | GroupProbe):
        return probe.gram(cotangents)
    b = torch.stack([probe(one) for one in zip(*cotangents, strict=True)])  # [M, N, P]
    b = b.to(torch.promote_types(b.dtype, torch.float32))
    mean = b.mean(1)
    centred = (b - mean.unsqueeze(1)).flatten(1)
    return Gram(centred @ centred.T, mean @ mean.T * b.shape[1], mean * b.shape[1])


def gram_of_variables(probe: Probe, legs: Sequence[Zeta]) -> Gram:
    """Products between the shares that single variables have in several legs, see `gram`.

    A variable is a coordinate of a Gaussian [N, D], with its mean and std, or a categorical, with
    its D logits: a node of logits [N, ..., D] has one for every entry of "...". Its share is the
    leg's cotangent, with zeros at the other variables.

    Args:
        probe: any probe.
        legs: L cotangents of zeta.
    Returns:
        [L V, L V] each; the V variables of the first leg come first.
    """
    if isinstance(probe, GroupProbe):
        return probe.gram_of_variables(legs)
    if isinstance(probe, ControlProbe) and len(legs[0]) == 1:
        return probe.gram_of_categoricals([leg[0] for leg in legs])
    # One field per leg and variable, [L V, N, ..., D].
    fields = [torch.cat([_shares(g, len(legs[0])) for g in m], 1) for m in zip(*legs, strict=True)]
    return gram(probe, tuple(f.movedim(1, 0) for f in fields))


def _shares(cotangent: Tensor, members: int) -> Tensor:
    """[N, V, ...] copies of a cotangent [N, ...], each with the values of one variable only."""
    if members == 2:
        return torch.diag_embed(cotangent)
    by_variable = cotangent.reshape(len(cotangent), -1, cotangent.shape[-1])  # [N, V, D]
    copies = torch.diag_embed(by_variable.mT).movedim(1, -1)  # [N, V, V, D]
    return copies.reshape(*copies.shape[:2], *cotangent.shape[1:])


def restrict(probe: Probe, rows: slice, n: int) -> Probe:
    """Restrict a probe for a batch of n samples to some of its rows."""
    if isinstance(probe, ControlProbe):
        return probe.rows(rows)

    def padded(cotangent: Zeta) -> Tensor:
        full = []
        for c in cotangent:
            whole = c.new_zeros(n, *c.shape[1:])
            whole[rows] = c
            full.append(whole)
        return probe(tuple(full))[rows]

    return padded


class ParameterProbe:
    """The general probe: per-sample vector-Jacobian products with `torch.func`.

    Args:
        function: (parameters, *inputs of one sample) -> its zeta, (mean [D], std [D]) for a
            Gaussian, and logits [D], (logits,) or (logits, None) for a categorical; or an
            `nn.Module` that maps the inputs to zeta.
        parameters: name -> tensor, or an `nn.Module` for all of its own but the frozen ones. Leave
            out what should not count for the rule, as `tps` does (Parmas et al. 2023, Sec. 4).
        inputs: tensors [N, ...], one slice per sample.
    Raises:
        TypeError: `parameters` has no names.
        ValueError: there are none.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        parameters: Mapping[str, Tensor] | nn.Module,
        *inputs: Tensor,
    ) -> None:
        if isinstance(function, nn.Module):
            function = functools.partial(_call_module, function)
        self.function = function
        self.parameters = {name: p.detach() for name, p in trainable(parameters).items()}
        self.inputs = tuple(x.detach() for x in inputs)

    def __call__(self, cotangent: Zeta) -> Tensor:
        """[N, P] gradients of Σ cotangent·zeta, one row per sample, parameters in order.

        Raises:
            ValueError: the function failed on one sample.
        """

        def one_sample(cotangent: Zeta, *inputs: Tensor) -> Tensor:
            zeta, pull_back, *_ = vjp(
                lambda p: _members(self.function(p, *inputs)), self.parameters
            )
            matching = (c.to(z.dtype) for c, z in zip(cotangent, zeta, strict=True))
            gradients = pull_back(tuple(matching))[0]
            return torch.cat([g.reshape(-1) for g in gradients.values()])

        try:
            return vmap(one_sample)(tuple(cotangent), *self.inputs)
        except (RuntimeError, ValueError, IndexError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                "a probe's function must map one sample, a slice of each input without axis 0, to "
                "its zeta, without noise and without other samples (module.eval() for Dropout and "
                f"BatchNorm); it failed with: {reason}"
            ) from error


def trainable(parameters: Mapping[str, Tensor] | nn.Module) -> dict[str, Tensor]:
    """Parameters by name: those of a mapping, or those of a module that are not frozen.

    Args:
        parameters: name -> tensor, or a module.
    Raises:
        TypeError: it is neither.
        ValueError: it holds none.
    """
    found: dict[str, Tensor]
    if isinstance(parameters, nn.Module):
        found = {name: p for name, p in parameters.named_parameters() if p.requires_grad}
    elif isinstance(parameters, Mapping):
        found = dict(parameters)
    else:
        raise TypeError(
            "parameters must be a module or a mapping of names to tensors, got "
            f"{type(parameters).__name__}; dict(module.named_parameters()) is one"
        )
    if not found:
        raise ValueError(
            f"parameters must be at least one tensor, got {type(parameters).__name__} without one; "
            "those of a module count where they have requires_grad=True"
        )
    return found


def _members(zeta: Any) -> Zeta:
    """Mean and std, or the logits alone."""
    return (zeta,) if isinstance(zeta, Tensor) else tuple(x for x in zeta if x is not None)


def _call_module(module: nn.Module, parameters: Mapping[str, Tensor], *inputs: Tensor) -> Any:
    return functional_call(module, dict(parameters), inputs)


class DenseJacobian:
    """The Jacobian J = du/dθ as a dense array [N, F, P]."""

    def __init__(self, jacobian: Tensor) -> None:
        self.jacobian = jacobian

    def rows(self, rows: slice) -> DenseJacobian:
        """The Jacobian of some of the samples."""
        return DenseJacobian(self.jacobian[rows])

    def gram(self, alpha: Tensor) -> Gram:
        """Of the products α_ai J_i, from α [M, N, F]."""
        inner = self.jacobian @ self.jacobian.mT  # [N, F, F]
        total = alpha.flatten(1) @ self.jacobian.flatten(0, 1)  # [M, P]
        return gram_of_products(torch.einsum("anf,nfg->ang", alpha, inner), alpha, total)

    def per_sample(self, alpha: Tensor) -> Tensor:
        """[N, P] products α_i J_i, from α [N, F]."""
        return torch.einsum("nf,nfp->np", alpha, self.jacobian)


def gram_of_products(weighted: Tensor, alpha: Tensor, total: Tensor) -> Gram:
    """The `Gram` of the products α_ai J_i over the samples i.

    Its covariance is Σ_i α_ai J_i J_iᵀ α_biᵀ less its mean, Σ_i α_ai J_i · Σ_i α_bi J_i / N.

    Args:
        weighted: [M, N, F] or [M, N], the products α J Jᵀ.
        alpha: the shape of `weighted`, α.
        total: [M, P], Σ_i α_i J_i.
    """
    n, second = alpha.shape[1], weighted.flatten(1) @ alpha.flatten(1).T
    covariance = torch.addmm(second, total, total.T, alpha=-1 / n)
    return Gram(covariance, total @ total.T / n, total)


class ControlProbe:
    """Exact and cheap probe for a zeta that depends on the parameters only through F controls u.

    With α = cotangentᵀ dzeta/du [N, F] and J = du/dθ [N, F, P], the per-sample gradients are α·J.
    Their products need only J Jᵀ [N, F, F] and one product of α with J. No [N, P] array is
    formed per cotangent, and none at all if J has a structure that yields these two products.

    Args:
        zeta_jacobian: [N, ..., D, F] dzeta/du, one for each member of zeta.
        control_jacobian: () -> du/dθ, as a `DenseJacobian` or an object with its methods.
        counted: the same for the parameters that count for the weight rule, if not all, as in `tps`
            (Parmas et al. 2023, Sec. 4). Calling the probe still returns the gradients of all.
    """

    def __init__(
        self,
        zeta_jacobian: Sequence[Tensor],
        control_jacobian: Callable[[], Any],
        counted: Callable[[], Any] | None = None,
    ) -> None:
        self.zeta_jacobian = zeta_jacobian
        self.control_jacobian = control_jacobian
        self.counted = counted or control_jacobian

    def __call__(self, cotangent: Zeta) -> Tensor:
        """[N, P] per-sample parameter gradients."""
        per_sample: Tensor = self.control_jacobian().per_sample(self._alpha(cotangent))
        return per_sample

    def gram(self, cotangents: Zeta) -> Gram:
        """Of the counted parameters' gradients, see `estimators.probes.gram`."""
        found: Gram = self.counted().gram(self._alpha(cotangents))
        return found

    def gram_of_categoricals(self, cotangents: Sequence[Tensor]) -> Gram:
        """`gram_of_variables` from L cotangents of logits [N, ..., D], without the zeros."""
        n, *_, d, f = self.zeta_jacobian[0].shape
        jacobian = self.zeta_jacobian[0].reshape(n, -1, d, f)
        alpha = [torch.einsum("nvd,nvdf->vnf", c.reshape(n, -1, d), jacobian) for c in cotangents]
        found: Gram = self.counted().gram(torch.cat(alpha))
        return found

    def rows(self, rows: slice) -> ControlProbe:
        """Restrict the probe to some of the samples."""
        return ControlProbe(
            [j[rows] for j in self.zeta_jacobian],
            lambda: self.control_jacobian().rows(rows),
            lambda: self.counted().rows(rows),
        )

    def _alpha(self, cotangent: Zeta) -> Tensor:
        """[..., N, F] cotangentᵀ dzeta/du, summed over the members of zeta."""
        axes = self.zeta_jacobian[0].ndim - 2
        cotangent = tuple(c.flatten(-axes) for c in cotangent)  # [..., N, D]
        jacobian = [j.flatten(1, -2) for j in self.zeta_jacobian]
        if jacobian[0].shape[-1] > 1:
            terms = [torch.einsum("...nd,ndf->...nf", c, j) for c, j in zip(cotangent, jacobian)]
            return torch.stack(terms).sum(0)
        first, *rest = zip(cotangent, (j[..., 0] for j in jacobian))
        products = first[0] * first[1]  # one control: a fraction of einsum's time
        for c, j in rest:
            products = torch.addcmul(products, c, j)
        return products.sum(-1, keepdim=True)


class GroupProbe:
    """The probe of a batch that is spread over processes, see `estimators.collectives`.

    Args:
        probe: of this process's N samples.
        group: the processes.
    """

    def __init__(self, probe: Probe, group: dist.ProcessGroup) -> None:
        self.probe, self.group = probe, group

    def __call__(self, cotangent: Zeta) -> Tensor:
        """[W N, P] per-sample parameter gradients."""
        mine = self.probe(tuple(own(self.group, c) for c in cotangent))
        return gathered(self.group, [mine])[0]

    def gram(self, cotangents: Zeta) -> Gram:
        """Of all samples, see `estimators.probes.gram`."""
        mine = tuple(own(self.group, c, axis=1) for c in cotangents)
        return self._of_all(gram(self.probe, mine), mine[0].shape[1])

    def gram_of_variables(self, legs: Sequence[Zeta]) -> Gram:
        """Of all samples, see `estimators.probes.gram_of_variables`."""
        mine = [tuple(own(self.group, g) for g in leg) for leg in legs]
        return self._of_all(gram_of_variables(self.probe, mine), len(mine[0][0]))

    def _of_all(self, mine: Gram, n: int) -> Gram:
        """Add the scatter within the processes and that of their means, without cancelling."""
        total, size = summed(self.group, mine.total), n * self.group.size()
        apart = mine.total / n - total / size
        covariance = summed(self.group, torch.addmm(mine.covariance, apart, apart.T, alpha=n))
        return Gram(covariance, total @ total.T / size, total)
