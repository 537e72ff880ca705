"""The stochastic node, an autograd function whose backward pass mixes the legs.

    (zeta, noise, credit) -> (sample, credit')

`credit` is a tensor of zeros, one per sample, threaded through the rollout. Every cost that a node
can influence is multiplied by (1 + credit), which changes nothing in the forward pass. In the
backward pass the node receives dL/dsample, the pathwise signal, and dL/dcredit', which *is* the
return-to-go of each sample in the scale of the loss. It forms its legs from these two, lets the
weight rule choose k, and passes the mixture on to zeta. Paths that bypass the node are
differentiated by autograd as usual.

Schulman et al. 2015 (stochastic computation graphs); Parmas 2018 (total propagation).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from totalprop.estimators.baselines import Baseline, leave_one_out
from totalprop.estimators.collectives import gathered, own
from totalprop.estimators.declarations import declared, has, least_samples
from totalprop.estimators.gauge import LEAST, SHAPE, measure
from totalprop.estimators.legs import Leg, broadcasts_to, draw, nothing, pathwise, score
from totalprop.estimators.mixing import Context, Weight, largest_usable, tpx_guarded
from totalprop.estimators.probes import GroupProbe, Probe, Zeta, restrict

HALF = (torch.bfloat16, torch.float16)
UNCREDITED = (
    "the loss depends on a node's sample but not on the credit that the node returned, so its "
    "score leg is 0: credit every cost downstream, with assign_credit(cost, credit) or Rollout.cost"
)
PATHLESS = (
    "no cost depends on a node's sample differentiably (they jump, or the sample was detached or "
    "rounded), so its pathwise leg is 0, which this estimator trusts: use 'lr' or 'tpx-guarded'"
)


def assign_credit(cost: Tensor, credit: Tensor) -> Tensor:
    """Credit a cost to the nodes upstream: cost·(1 + credit), which leaves its value unchanged.

    Every differentiable term downstream of a node must be given the credit that the last node
    before it returned. The gradient of an uncredited term is silently shrunk by (1 - k).
    `estimators.Rollout` does this without the chance of an omission.

    Args:
        cost: [N] or [..., N], any term of the loss.
        credit: [N], or the cost's shape.
    Returns:
        The credited cost, of the cost's shape.
    Raises:
        ValueError: the product would not have the cost's shape. A cost [N, 1] times a credit [N]
            would broadcast to [N, N], and every sample would receive the returns of all samples.
        TypeError: an argument is no tensor.
    """
    if not (isinstance(cost, Tensor) and isinstance(credit, Tensor)):
        raise TypeError(
            f"cost and credit must be tensors, one number per sample, got {_shown(cost)} and "
            f"{_shown(credit)}; average the credited costs, not the costs"
        )
    if not broadcasts_to(credit.shape, cost.shape):
        raise ValueError(
            f"a cost of shape {list(cost.shape)} cannot take a credit of shape "
            f"{list(credit.shape)}: one number per sample is needed, e.g. cost.squeeze(-1)"
        )
    return cost * (1 + credit)


def infer_noise(mean: Tensor, std: Tensor, sample: Tensor) -> Tensor:
    """Infer the noise that reproduces a known sample: (sample - mean) / std.

    For nodes on real data: given this noise, the node returns the data and its backward pass is as
    usual.

    Args:
        mean: [N, ..., D].
        std: [N, ..., D], positive.
        sample: [N, ..., D].
    Returns:
        [N, ..., D] the noise, detached.
    """
    return ((sample - mean) / std).detach()


@dataclass(frozen=True)
class Estimator:
    """A policy-gradient estimator, called at every stochastic node in place of `mean + std·noise`.

    Attributes:
        weight: the rule for k (0 = pathwise leg, 1 = score legs), see `estimators.mixing`.
        legs: the score legs, usually one, see `estimators.legs`.
        baseline: what is subtracted from the returns, see `estimators.baselines`.
        cross_fit: choose k for each half of the batch from the other half. At a single node this
            makes a composite estimator unbiased. In a chain a second-order bias remains, since the
            other half's k depends on the k's further down the chain, and these depend on this half.
            A half whose own pathwise leg explodes uses its own k.
        probe: the parameters over which the rule needs a probe: "none", "all", or a "subset" (in
            Dreamer and PIPPS the policy's last layer). The caller builds the probe.
        whole_graph: the rule chooses one k for the gradients of the whole graph, which
            `estimators.gradient` combines.
        carry: what earlier nodes receive: the "mixture" that the parameters receive, or the
            "pathwise" signal alone, so that the score legs reach the parameters only. "pathwise"
            needs the node's `carried`; without it, earlier nodes receive the mixture.
        base: of a whole-graph rule, nodewise estimators. The gradient of the one whose per-sample
            gradients vary least has the place of RP's, if they vary less than RP's do.
        source: paper and equation.
        group: processes over which the samples of every node are spread, equally many each: k and
            baselines are of all of them. The loss is an average over the process's own samples; the
            average of the processes' gradients is then that of one process with all samples. None:
            this process alone, whatever process groups there are.

    Raises:
        ValueError: a field is not what it should be, or the fields do not work together.
    """

    weight: Weight
    legs: tuple[Callable[..., Any], ...] = (score,)
    baseline: Baseline = leave_one_out
    cross_fit: bool = False
    probe: Literal["none", "all", "subset"] = "none"
    whole_graph: bool = False
    carry: Literal["mixture", "pathwise"] = "mixture"
    base: tuple[Estimator, ...] = ()
    source: str = ""
    group: dist.ProcessGroup | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        named = isinstance(self.legs, tuple) and len(self.legs) > 0
        parts = (self.weight, self.baseline, *(self.legs if named else (self.legs,)))
        if not named or not all(callable(part) for part in parts):
            raise ValueError(
                "weight and baseline are functions and legs is a tuple of functions, got "
                f"{self.weight!r}, {self.baseline!r}, {self.legs!r}; estimators.make takes the "
                "names of baselines and legs, too"
            )
        if self.probe not in ("none", "all", "subset"):
            raise ValueError(f"probe is 'none', 'all' or 'subset', got {self.probe!r}")
        if len(self.legs) > 1 and not declared(self.weight, "several_legs"):
            raise ValueError(
                f"the weight rule takes one score leg, got {len(self.legs)}; use estimator 'tpx'"
            )
        if has(self.weight, "needs_no_leg") and self.legs != (nothing,):
            raise ValueError(
                "the weight rule changes the pathwise gradient alone and mixes it with no score "
                "leg: leave legs out (leg='score' of an agent), or use estimator 'tpx'"
            )
        if self.carry not in ("mixture", "pathwise"):
            raise ValueError(f"carry is 'mixture' or 'pathwise', got {self.carry!r}")
        if self.base and not (self.whole_graph and not any(b.whole_graph for b in self.base)):
            raise ValueError(
                "base=... are nodewise estimators, for an estimator with whole_graph=True, which "
                "mixes one of them with LR"
            )
        if self.cross_fit and not declared(self.weight, "cross_fit"):
            raise ValueError(
                "the weight rule chooses k for each sample from that sample alone, so there is no "
                "k to take from the other half: set cross_fit=False"
            )
        if self.several_passes and self.cross_fit:
            raise ValueError(
                "a whole-graph estimator combines once, with one k for all samples, and its legs "
                "are of all samples: set cross_fit=False, or choose an estimator such as 'tpx'"
            )
        if self.needs_critic and self.cross_fit:
            raise ValueError(
                "a node's critic is a function of all its samples, and cross_fit takes them in "
                "halves: set cross_fit=False, or legs='score'"
            )
        if self.needs_critic and self.group is not None:
            raise ValueError(
                "a node's critic is a function of this process's samples, and a group takes those "
                "of all processes: set legs='score', or group=None"
            )

    @property
    def needs_pathwise(self) -> bool:
        """Whether the pathwise leg may be used; if so, the loss must be differentiable."""
        return declared(self.weight, "needs_pathwise") or self.several_passes

    @property
    def needs_score(self) -> bool:
        """Whether the rule may use the score legs."""
        return declared(self.weight, "needs_score")

    @property
    def several_passes(self) -> bool:
        """Whether it needs several backward passes, with the same noise; see `gradient`."""
        return self.whole_graph or any(has(leg, "needs_graph") for leg in self.legs)

    @property
    def needs_critic(self) -> bool:
        """Whether a leg is made from a critic of the node's sample."""
        return any(has(leg, "needs_critic") for leg in self.legs)

    @property
    def needs_value(self) -> bool:
        """Whether the baseline needs a critic's `value`."""
        return declared(self.baseline, "needs_value")

    def __call__(
        self,
        mean: Tensor,
        std: Tensor | None,
        noise: Tensor,
        credit: Tensor,
        *,
        probe: Probe | None = None,
        value: Tensor | None = None,
        critic: Callable[[Tensor], Tensor] | None = None,
        meter: Tensor | None = None,
        gauge: Tensor | None = None,
        tap: Tensor | None = None,
        carried: Zeta | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sample the node; its backward pass mixes the legs.

        Args:
            mean: [N, ..., D], samples on axis 0; gradients flow. If `std` is None, these are the
                logits of a one-hot categorical.
            std: [N, ..., D], positive; gradients flow. None for a categorical.
            noise: [N, ..., D] standard normal (Gumbel for a categorical), or from `infer_noise`.
            credit: [N, ...] the credit that the previous node returned; zeros at the start. It has
                the node's shape without the last axis. Several categoricals [N, ..., G, D] that
                are one sample, with one return, take a credit [N, ...].
            probe: required by `tp`, `tps` and `tpg`, see `estimators.probes`.
            value: like the credit, a critic's estimate of the return, for `baselines.critic`; no
                gradient.
            critic: samples [N, ..., D] -> [N, ...], a guess of the return that follows a sample, of
                any scale and sign; for `legs.lax` and `legs.mvd`.
            meter: [..., D] zeros; the gradient w.r.t. it is k, averaged over the samples.
            gauge: [4, 2] zeros; the gradient w.r.t. it tells whether the legs agree and how noisy
                they are, see `estimators.gauge`.
            tap: [N, P] zeros; the gradient w.r.t. it accumulates the per-sample parameter
                gradients. Requires `probe`.
            carried: the same mean and std as functions of the earlier nodes alone, while `mean` and
                `std` are functions of the parameters alone, see `own_and_carried`.
        Returns:
            The sample [N, ..., D], and the credit for every cost and node downstream.
        Raises:
            ValueError: an argument has the wrong shape or is missing, or the estimator takes
                several passes.
        """
        if self.several_passes:
            raise ValueError(
                "this estimator combines the gradients of several passes over the whole graph and "
                "cannot be called at a node; call estimators.gradient(rollout, ...) instead"
            )
        estimator = self
        if self.needs_critic:
            if critic is None:
                raise ValueError(
                    "the legs 'lax' and 'mvd' need a critic of the sample: pass critic=... to the "
                    "node, or choose legs='score'"
                )
            made = [leg(critic) if has(leg, "needs_critic") else leg for leg in self.legs]
            estimator = replace(self, legs=tuple(made))
        zeta = (mean,) if std is None else (mean, std)
        return stochastic_node(
            estimator, zeta, noise, credit,
            probe=probe, value=value, meter=meter, gauge=gauge, tap=tap, carried=carried,
        )  # fmt: skip


def own_and_carried(
    function: Callable[..., Zeta], parameters: Mapping[str, Tensor], *inputs: Tensor
) -> tuple[Zeta, Zeta]:
    """A node's zeta twice: with a gradient to the parameters alone, and to the inputs alone.

    >>> own, carried = own_and_carried(policy, parameters, state)
    >>> action, credit = estimator(*own, noise, credit, carried=carried)

    Args:
        function: (parameters, *inputs) -> (mean, std) or (logits, None).
        parameters: name -> tensor.
        inputs: tensors [N, ...] that earlier nodes have an influence on.
    """
    own = function(parameters, *(x.detach() for x in inputs))
    return own, function({name: p.detach() for name, p in parameters.items()}, *inputs)


def stochastic_node(
    estimator: Estimator,
    zeta: Zeta,
    noise: Tensor,
    credit: Tensor,
    *,
    probe: Probe | None = None,
    value: Tensor | None = None,
    meter: Tensor | None = None,
    gauge: Tensor | None = None,
    tap: Tensor | None = None,
    carried: Zeta | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample a node whose backward pass mixes the estimator's legs. See `Estimator.__call__`."""
    _check_shapes(zeta, noise, credit, value)
    carried = tuple(x for x in carried or () if x is not None)
    if carried and [x.shape for x in carried] != [x.shape for x in zeta]:
        raise ValueError(
            f"carried must be like mean and std, {[list(x.shape) for x in zeta]}, got "
            f"{[list(x.shape) for x in carried]}"
        )
    _check_values(estimator, zeta, noise)
    for name, zeros in (("meter", meter), ("gauge", gauge), ("tap", tap)):
        if zeros is not None and not isinstance(zeros, Tensor):
            raise ValueError(
                f"{name} must be a tensor of zeros with requires_grad=True, got {zeros!r}"
            )
    if tap is not None and probe is None:
        raise ValueError("tap=... collects per-sample parameter gradients and needs probe=... too")
    if gauge is not None and gauge.shape != SHAPE:
        raise ValueError(
            f"gauge must be zeros {list(SHAPE)}, got {_shown(gauge)}; each node takes its own"
        )
    under_func = is_transformed()
    if under_func and estimator.group is not None:
        raise ValueError(
            "torch.func cannot transform a node whose samples are spread over processes: set "
            "group=None, or take the gradient with torch.autograd"
        )
    if estimator.needs_score and torch.is_grad_enabled():
        _check_legs(estimator, zeta, probe, value)
    node = _TransformedNode if under_func else _Node
    sample, credit = node.apply(
        estimator, probe, noise, credit, value, meter, gauge, tap, len(zeta), *zeta, *carried
    )
    return sample, credit


def is_transformed() -> bool:
    """Whether torch.func transforms (vmap, grad, ...) are active, as Function.apply asks."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _check_shapes(zeta: Zeta, noise: Tensor, credit: Tensor, value: Tensor | None) -> None:
    """Refuse what would raise an error later, or broadcast to another gradient."""
    mean = zeta[0]
    if not isinstance(mean, Tensor) or mean.ndim < 2:
        raise ValueError(
            f"mean must be a tensor [N, ..., D] of real numbers, with the samples on axis 0, got "
            f"{_shown(mean)}; a mean [N] of one coordinate needs mean.unsqueeze(-1)"
        )
    if not mean.is_floating_point():
        raise ValueError(f"mean must be of real numbers, got {mean.dtype}; pass mean.float()")
    shape, samples = mean.shape, mean.shape[:-1]
    start = "start a rollout with credit = mean.new_zeros(mean.shape[:-1])"
    if not isinstance(credit, Tensor):
        raise ValueError(f"credit must be a tensor {list(samples)}, got {credit!r}; {start}")
    is_joint = len(zeta) == 1 and credit.ndim > 0 and credit.shape == samples[: credit.ndim]
    if credit.shape != samples and not is_joint:
        alike = "all nodes of a rollout count their samples alike"
        if credit.ndim > 0 and credit.shape == samples[: credit.ndim]:
            alike += f": flatten mean, std and noise of this one, as in mean.flatten({credit.ndim})"
        raise ValueError(
            f"credit must have the node's shape without its last axis, {list(samples)}, "
            f"got {list(credit.shape)}; {start}, and {alike}"
        )
    if value is not None and value.shape != credit.shape:
        raise ValueError(
            f"value must have the credit's shape, {list(credit.shape)}, got {list(value.shape)}; "
            "a critic's [N, 1] needs value.squeeze(-1)"
        )
    for name, x, made in (
        ("std", zeta[-1], "std.expand_as(mean)"), ("noise", noise, "torch.randn_like(mean)")
    ):  # fmt: skip
        if not isinstance(x, Tensor) or x.shape != shape:
            raise ValueError(
                f"{name} must have the node's shape, {list(shape)}, got {_shown(x)}; "
                f"every entry needs its own value: {made}"
            )
    # In half precision the credit is float32: its gradients are sums of costs.
    if credit.dtype not in (mean.dtype, torch.promote_types(mean.dtype, torch.float32)):
        raise ValueError(
            f"credit must have the node's dtype, {mean.dtype}, got {credit.dtype}; {start}"
        )


def _check_values(estimator: Estimator, zeta: Zeta, noise: Tensor) -> None:
    """Refuse a std that no score has and, for a categorical, what is clearly not Gumbel noise."""
    if len(zeta) == 2:
        # A rollout without gradients forms no score and may be deterministic.
        std, may_be_0 = zeta[1], not (estimator.needs_score and torch.is_grad_enabled())
        if _holds(std, lambda std: std.amin() < 0 if may_be_0 else std.amin() <= 0):
            if std.amin() < 0:
                raise ValueError(
                    "std must be positive, got a negative entry; exp or softplus of a network's "
                    "output is positive"
                )
            raise ValueError(
                "std must be positive, got 0, at which a sample has no score; give it a floor, as "
                "in std.clamp(min=1e-6), or choose estimator 'rp', which needs no score"
            )
    elif _holds(noise, _looks_normal):
        raise ValueError(
            "a categorical node needs Gumbel noise, and this is standard normal: use "
            "-torch.empty_like(logits).exponential_().log()"
        )


def _holds(x: Tensor, condition: Callable[[Tensor], Tensor]) -> bool:
    """Whether a condition on values holds; False where reading them would cost a wait."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.numel() == 0:
        return False
    try:
        return bool(condition(x.detach()).numpy())
    except RuntimeError:  # inside torch.func.vmap there is no value to read
        return False


def _looks_normal(noise: Tensor) -> Tensor:
    """Whether mean and mean square fit a standard normal, and the mean no Gumbel distribution.

    Within 4 standard errors of the one and more than 6 from the other, so that Gumbel noise is
    never mistaken. This takes about 180 entries.
    """
    root_n, x = noise.numel() ** 0.5, noise.double()
    fits = (x.mean() * root_n).abs() < 4
    fits = fits & (((x.square().mean() - 1) * root_n / 2**0.5).abs() < 4)
    return fits & ((x.mean() - 0.5772).abs() * root_n / 1.2825 > 6)


def _check_legs(
    estimator: Estimator, zeta: Zeta, probe: Probe | None, value: Tensor | None
) -> None:
    """Refuse a node on which the backward pass would fail."""
    n, mean = len(zeta[0]), zeta[0]
    if len(zeta) != 2 or mean.ndim != 2:
        need = "categorical_nodes" if len(zeta) == 1 else "more_axes"
        for part in (estimator.weight, *estimator.legs):
            if not declared(part, need):
                kind = "Gaussian" if len(zeta) == 2 else "categorical"
                raise ValueError(
                    f"'{_name(part)}' needs a Gaussian node of shape [N, D], got a {kind} "
                    f"one of shape {list(mean.shape)}; use estimator 'tpx' with legs='score'"
                )
    if estimator.cross_fit and n < 4:
        raise ValueError(
            f"cross_fit chooses k in halves of at least 2 samples, and needs N >= 4, got {n}"
        )
    if estimator.probe != "none" and probe is None:
        raise ValueError(
            f"an estimator with probe={estimator.probe!r} weighs the legs in parameter space and "
            "needs probe=... at the node: pass one (estimators.ParameterProbe), or choose "
            "estimator 'tpx', which needs none"
        )
    parts = estimator.legs
    if any(declared(leg, "needs_baseline") for leg in estimator.legs):
        parts = (*estimator.legs, estimator.baseline)
        if has(estimator.baseline, "needs_value") and value is None:
            raise ValueError(
                f"baseline '{_name(estimator.baseline)}' needs value=[N, ...]: pass it to the "
                "estimator's call"
            )
    if estimator.group is not None:
        n *= estimator.group.size()
    if estimator.cross_fit:
        n //= 2
    for part in parts:
        if n < (least := least_samples(part)):
            halves = " in each half of cross_fit" if estimator.cross_fit else ""
            raise ValueError(
                f"'{_name(part)}' needs at least {least} samples on axis 0{halves}, got {n}; use "
                "more samples, or legs='score' with baseline='none'"
            )


def _name(part: Callable[..., Any]) -> str:
    return str(getattr(part, "__name__", part))


def _shown(x: object) -> str:
    return str(list(x.shape)) if isinstance(x, Tensor) else repr(x)


def _forward(
    estimator: Estimator,
    probe: Probe | None,
    noise: Tensor,
    credit: Tensor,
    value: Tensor | None,
    meter: Tensor | None,
    gauge: Tensor | None,
    tap: Tensor | None,
    members: int,
    *zeta: Tensor,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(credit.dtype, torch.float32)
    return draw(zeta[:members], noise), credit.to(dtype, copy=True)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    estimator, probe, noise, credit, value, meter, gauge, tap, members, *zeta = inputs
    ctx.estimator, ctx.probe, ctx.credit_shape = estimator, probe, credit.shape
    ctx.meter_shape = None if meter is None else meter.shape
    ctx.has_gauge, ctx.tap_shape = gauge is not None, None if tap is None else tap.shape
    ctx.set_materialize_grads(False)  # to tell a credit without gradient
    ctx.is_split = len(zeta) > members
    ctx.save_for_backward(noise, value, *zeta[:members])


class _Batch(NamedTuple):
    """What a node's backward pass makes a mixture of, see `mix`."""

    zeta: Zeta
    noise: Tensor
    g_sample: Tensor
    returns: Tensor
    value: Tensor | None
    probe: Probe | None

    def of_all(self, group: dist.ProcessGroup) -> _Batch:
        """The samples of all processes."""
        value = [] if self.value is None else [self.value]
        noise, g_sample, returns, *rest = gathered(
            group, [self.noise, self.g_sample, self.returns, *value, *self.zeta]
        )
        zeta = tuple(rest[len(value) :])
        probe = None if self.probe is None else GroupProbe(self.probe, group)
        return _Batch(zeta, noise, g_sample, returns, rest[0] if value else None, probe)


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(
        ctx: Any, g_sample: Tensor | None, returns: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        noise, value, *zeta = ctx.saved_tensors
        has_path, is_credited = g_sample is not None, returns is not None
        if returns is None:
            if ctx.estimator.needs_score:
                warnings.warn(UNCREDITED, stacklevel=2)
            returns = zeta[0].new_zeros(ctx.credit_shape)
        is_trusted = is_credited and _follows_pathwise(ctx.estimator)
        if is_trusted and (g_sample is None or _is_blind(tuple(zeta), noise, g_sample, returns)):
            warnings.warn(PATHLESS, stacklevel=2)
        if g_sample is None:
            g_sample = torch.zeros_like(zeta[0])
        batch = _Batch(tuple(zeta), noise, g_sample, returns, value, ctx.probe)
        group = ctx.estimator.group if ctx.estimator.needs_score or ctx.has_gauge else None
        if group is not None:
            batch = batch.of_all(group)
        device = zeta[0].device.type
        if torch.is_autocast_enabled(device):  # mixes dtypes, and rounds what needs its digits
            with torch.autocast(device, enabled=False):
                g_zeta, k = mix(ctx.estimator, *batch)
        else:
            g_zeta, k = mix(ctx.estimator, *batch)
        g_gauge = None
        if ctx.has_gauge:
            received = batch.g_sample if has_path else None, batch.returns if is_credited else None
            parts = _score_parts(ctx.estimator)
            g_gauge = measure(batch.zeta, batch.noise, *received, batch.value, g_zeta, *parts)
        if group is not None:
            g_zeta = tuple(own(group, g) for g in g_zeta)
        if torch.is_grad_enabled() and ctx.estimator.needs_score:
            g_zeta = _Once.apply(*g_zeta, g_sample, returns, *zeta)[: len(g_zeta)]
        g_meter = None
        if ctx.meter_shape is not None:
            g_meter = torch.where(_has_pathwise(k), k, 1.0).mean(0)
            if not broadcasts_to(g_meter.shape, ctx.meter_shape):
                raise ValueError(
                    f"meter must be zeros [..., D] that a k {list(g_meter.shape)} fits, got "
                    f"{list(ctx.meter_shape)}: torch.zeros({list(zeta[0].shape[1:])}, "
                    "requires_grad=True)"
                )
            g_meter = g_meter.expand(ctx.meter_shape)
        g_tap = None if ctx.tap_shape is None else ctx.probe(g_zeta)
        if g_tap is not None and g_tap.shape != ctx.tap_shape:
            raise ValueError(
                f"tap must be zeros {list(g_tap.shape)}, samples by parameters of the probe, got "
                f"{list(ctx.tap_shape)}: estimators.gradient makes it from samples= and tap_size= "
                "(by default all elements of its parameters)"
            )
        g_carried: Zeta = ()
        if ctx.is_split:
            is_pathwise = ctx.estimator.carry == "pathwise"
            g_carried = pathwise(tuple(zeta), noise, g_sample) if is_pathwise else g_zeta
        return (None, None, None, returns, None, g_meter, g_gauge, g_tap, None, *g_zeta, *g_carried)


def _follows_pathwise(estimator: Estimator) -> bool:
    """Whether the rule trusts a pathwise leg that is exactly 0."""
    return estimator.needs_pathwise and not has(estimator.weight, "compares_means")


@torch.no_grad()
def _is_blind(zeta: Zeta, noise: Tensor, g_sample: Tensor, returns: Tensor) -> bool:
    """Whether the pathwise signal is exactly 0, and a guarded rule would still give LR a weight.

    A 0 alone is no fault: the cost may not depend on the sample.
    """
    if len(noise) < LEAST or not _holds(g_sample[:1], lambda g: ~g.any()):  # mostly ends here
        return False
    if not _holds(g_sample, lambda g: ~g.any()):
        return False
    round_off = 1e3 * torch.finfo(returns.dtype).eps  # of sums over some thousand steps
    if not _holds(returns, lambda r: (r - r[:1]).abs().amax() > round_off * r.abs().amax()):
        return False
    zeta, noise = tuple(z.to(returns) for z in zeta), noise.to(returns)
    rp = tuple(torch.zeros_like(z) for z in zeta)
    (k,) = tpx_guarded(rp, [score(zeta, noise, returns, None, leave_one_out)], None)
    return any(_holds(member, lambda k: k.any()) for member in k)


def _score_parts(estimator: Estimator) -> tuple[tuple[Leg, ...], Baseline]:
    """Score legs and baseline to measure; the plain ones where these do not fit."""
    once = any(has(leg, "one_call_per_node") for leg in estimator.legs)
    if estimator.needs_score and estimator.legs != (nothing,) and not once:
        return estimator.legs, estimator.baseline
    return (score,), leave_one_out


class _TransformedNode(_Node):
    """A node under `torch.func`, whose form costs an ordinary node half of its forward time."""

    generate_vmap_rule = True
    forward = staticmethod(_forward)  # type: ignore[assignment]
    setup_context = staticmethod(_setup_context)


class _Once(torch.autograd.Function):
    """Identity whose backward pass raises, so that its outputs cannot be differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.clone() for tensor in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "differentiating a score leg does not estimate a second derivative: second derivatives "
            "pass through the nodes of estimator 'rp' only"
        )


def mix(
    estimator: Estimator,
    zeta: Zeta,
    noise: Tensor,
    g_sample: Tensor,
    returns: Tensor,
    value: Tensor | None,
    probe: Probe | None,
) -> tuple[Zeta, Tensor]:
    """Backward pass of a node, as a pure function of what it saved and received.

    Args:
        estimator: the node's estimator.
        zeta: (mean, std) or (logits,), each [N, ..., D].
        noise: [N, ..., D].
        g_sample: [N, ..., D] dL/dsample.
        returns: [N, ...] dL/dcredit', the returns-to-go, of the credit's shape.
        value: of the same shape, or None.
        probe: see `estimators.probes`, or None.
    Returns:
        The cotangent of zeta, and the total weight k of the score legs that the rule chose for its
        first member, broadcastable to zeta.
    """
    if zeta[0].dtype in HALF:  # variances and sums over the batch need more digits
        wide, wide_value = tuple(z.float() for z in zeta), None if value is None else value.float()
        noise, g_sample, returns = noise.float(), g_sample.float(), returns.float()
        g_zeta, k = mix(estimator, wide, noise, g_sample, returns, wide_value, probe)
        return tuple(g.to(zeta[0].dtype) for g in g_zeta), k
    rp = pathwise(zeta, noise, g_sample)
    if not estimator.needs_score:
        return rp, torch.zeros_like(rp[0][:1])
    if not estimator.cross_fit:
        return _combine(rp, *_weigh(estimator, zeta, noise, rp, returns, value, probe))
    # Each half has its own baseline and uses the other's k, so no sample influences its own k.
    n = len(noise)

    def half(rows: slice) -> tuple[Zeta, list[Zeta], list[Zeta]]:
        part, part_zeta = tuple(g[rows] for g in rp), tuple(z[rows] for z in zeta)
        part_value = None if value is None else value[rows]
        part_probe = probe and restrict(probe, rows, n)
        return part, *_weigh(
            estimator, part_zeta, noise[rows], part, returns[rows], part_value, part_probe
        )

    (rp_1, legs_1, k_1), (rp_2, legs_2, k_2) = half(slice(0, n // 2)), half(slice(n // 2, n))
    first = _combine(rp_1, legs_1, _borrowed(k_2, k_1, rp_1, legs_1))
    second = _combine(rp_2, legs_2, _borrowed(k_1, k_2, rp_2, legs_2))
    g_zeta = tuple(torch.cat(pair) for pair in zip(first[0], second[0], strict=True))
    return g_zeta, torch.cat((first[1], second[1]))


def _borrowed(k: list[Zeta], own: list[Zeta], rp: Zeta, legs: list[Zeta]) -> list[Zeta]:
    """The other half's k, except where this half's pathwise leg exploded: there its own k, 1.

    "Exploded" means not finite, or so much larger than the score legs that k would round to 1. Its
    own k being 1 is not a sufficient sign: clipping often makes it 1, and using it then would bias
    the mixture.
    """
    dims = tuple(range(rp[0].ndim - 1))  # all but the coordinates
    largest = torch.stack([leg[0].abs().amax(dims) for leg in legs]).amax(0)
    is_usable = rp[0].abs().amax(dims) <= largest_usable(largest)  # [D]
    return [
        tuple(torch.where(is_usable, *members) for members in zip(*pair, strict=True))
        for pair in zip(k, own, strict=True)
    ]


def _weigh(
    estimator: Estimator,
    zeta: Zeta,
    noise: Tensor,
    rp: Zeta,
    returns: Tensor,
    value: Tensor | None,
    probe: Probe | None,
) -> tuple[list[Zeta], list[Zeta]]:
    """Compute the score legs and the weight of each, for each member of zeta."""
    legs = [leg(zeta, noise, returns, value, estimator.baseline) for leg in estimator.legs]
    about: Context | Probe | None = probe
    if has(estimator.weight, "takes_context"):
        about = Context(probe, zeta, noise, returns, value)
    for leg, found in zip(estimator.legs, legs):
        if [g.shape for g in found] != [z.shape for z in zeta]:
            raise ValueError(
                f"leg '{_name(leg)}' must return a cotangent like zeta, "
                f"{[list(z.shape) for z in zeta]}, got {[list(g.shape) for g in found]}"
            )
    return legs, _weights(estimator, estimator.weight(rp, legs, about), rp)


def _weights(estimator: Estimator, chosen: Any, rp: Zeta) -> list[Zeta]:
    """What a rule returned, as one k for each leg and member of zeta; refused if it is no such."""

    def fits(ks: tuple[Any, ...]) -> bool:
        tensors = len(ks) == len(rp) and all(isinstance(k, Tensor) for k in ks)
        return tensors and all(broadcasts_to(k.shape, g.shape) for k, g in zip(ks, rp))

    if isinstance(chosen, Sequence):
        weights = [k if isinstance(k, tuple) else (k,) * len(rp) for k in chosen]
        if len(weights) == len(estimator.legs) and all(map(fits, weights)):
            return [tuple(k.to(g.dtype) for k, g in zip(ks, rp)) for ks in weights]
        shown = str([tuple(map(_shown, ks)) for ks in weights])
    else:
        shown = _shown(chosen)
    raise ValueError(
        f"weight rule '{_name(estimator.weight)}' must return a list with one k for each leg, here "
        f"{len(estimator.legs)}: a tensor that broadcasts to {list(rp[0].shape)}, or a tuple of "
        f"one for each member of zeta; got {shown}"
    )


def _has_pathwise(k: Tensor) -> Tensor:
    """Where the pathwise leg has a non-zero weight.

    If k is within round-off of 1, then 1 - k is noise, which an exploded pathwise leg would
    amplify. If k is NaN, the pathwise leg is not finite.
    """
    return (1 - k).abs() > 8 * torch.finfo(k.dtype).eps


def _combine(rp: Zeta, legs: list[Zeta], k: list[Zeta]) -> tuple[Zeta, Tensor]:
    """rp + Σ_l k_l (leg_l - rp), or the score legs alone where rp has no weight; and Σ_l k_l.

    The sum of the weights is that of the first member of zeta.
    """
    totals = [own[0] if len(own) == 1 else torch.stack(own).sum(0) for own in zip(*k, strict=True)]
    mixed = []
    for member, (g_rp, total) in enumerate(zip(rp, totals, strict=True)):
        if len(k) == 1:
            g_legs, g = legs[0][member], torch.lerp(g_rp, legs[0][member], total)
        else:
            g_legs = sum(
                (w[member] * leg[member] for w, leg in zip(k, legs, strict=True)),
                start=torch.zeros_like(g_rp),
            )
            g = g_rp * (1 - total) + g_legs
        mixed.append(torch.where(_has_pathwise(total), g, g_legs))
    return tuple(mixed), totals[0]
