"""`estimators.gradient`: the mean of every registered estimator; naive ivw; the tap."""

from dataclasses import replace

import pytest
import torch

from totalprop import estimators
from totalprop.estimators import Estimator, baselines, legs, mixing

F64 = torch.float64
CASES = {name: estimators.make(name) for name in estimators.names()} | {
    f"{name}-cross-fit": estimators.make(name, cross_fit=True) for name in ("tp", "tpx", "tpg")
}
CASES["tpx-biw"] = estimators.make("tpx", legs=(legs.biw,), baseline=baselines.none)
CASES["tpx-score-biw"] = estimators.make(
    "tpx", legs=(legs.score, legs.biw), baseline=baselines.none
)


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients])


def rollout_of(chain, parameters, noise):
    return lambda estimator, tap: chain.loss(estimator, tap, parameters, noise)


def one_gradient(chain, estimator, *, n=50, seed=0, per_sample=False):
    parameters = chain.parameters()
    noise = chain.noise(n, torch.Generator().manual_seed(seed))
    return estimators.gradient(
        rollout_of(chain, parameters, noise),
        list(parameters.values()),
        estimator,
        samples=n,
        per_sample=per_sample,
    )


@pytest.mark.parametrize("case", CASES)
def test_mean_gradient_matches_closed_form(case, chain):
    """30 batches of N = 600 (biw: 200), seed 1: |mean - exact| <= 4 SE in each of 12 parameters.

    A k chosen in-sample biases a batch by O(1/N): about 0.1 SE of the mean of 30 batches.
    """
    estimator = CASES[case]
    repeats, n = 30, 200 if legs.biw in estimator.legs else 600
    parameters = chain.parameters()
    exact = flat(torch.autograd.grad(chain.expected_loss(parameters), list(parameters.values())))
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(repeats):
        rollout = rollout_of(chain, parameters, chain.noise(n, generator))
        result = estimators.gradient(rollout, list(parameters.values()), estimator, samples=n)
        found.append(flat(result.gradients))
    g = torch.stack(found)
    standard_error = g.std(0) / repeats**0.5
    assert standard_error.max() < 0.05 * exact.abs().max(), "the test would have no power"
    assert ((g.mean(0) - exact) / standard_error).abs().max() <= 4


def test_mean_loss_matches_closed_form(chain):
    """N = 20000, seed 2: the rollout estimates what `expected_loss` computes, <= 4 SE."""
    batches = [one_gradient(chain, estimators.make("rp"), n=1000, seed=s).loss for s in range(20)]
    loss = torch.stack(batches)
    exact = chain.expected_loss(chain.parameters()).detach()
    assert ((loss.mean() - exact) / (loss.std() / 20**0.5)).abs() <= 4


def test_ivw_combines_two_whole_graph_gradients_once(chain):
    rp, lr = (one_gradient(chain, estimators.make(n), per_sample=True) for n in ("rp", "lr"))
    v_rp, v_lr = (g.per_sample.var(0).sum() for g in (rp, lr))
    k = v_rp / (v_rp + v_lr)
    assert 0.001 < k < 0.999
    ivw = one_gradient(chain, estimators.make("ivw"))
    expected = k * flat(lr.gradients) + (1 - k) * flat(rp.gradients)
    torch.testing.assert_close(flat(ivw.gradients), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ivw.loss, rp.loss)
    torch.testing.assert_close(ivw.per_sample, k * lr.per_sample + (1 - k) * rp.per_sample)


@pytest.mark.parametrize("factor", [1e200, torch.inf, torch.nan])
def test_ivw_is_lr_when_rp_explodes(factor, chain):
    """The pathwise gradient of one sample explodes at the first node, which leaves LR alone."""
    parameters = chain.parameters()
    noise = chain.noise(20, torch.Generator().manual_seed(3))
    blow_up = torch.ones(20, 1, dtype=F64)
    blow_up[4] = factor

    def exploding(name):
        inner = estimators.make(name)
        last = {}

        def rollout(estimator, tap):
            last["nodes"] = 0

            class Exploding:
                probe = "all"

                def __call__(self, *arguments, **keywords):
                    sample, credit = estimator(*arguments, **keywords)
                    last["nodes"] += 1
                    if last["nodes"] == 1 and sample.requires_grad:
                        sample.register_hook(lambda g: g * blow_up)
                    return sample, credit

            return chain.loss(Exploding(), tap, parameters, noise)

        return estimators.gradient(rollout, list(parameters.values()), inner, samples=20)

    ivw, lr = exploding("ivw"), exploding("lr")
    assert torch.isfinite(flat(ivw.gradients)).all()
    torch.testing.assert_close(flat(ivw.gradients), flat(lr.gradients), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", estimators.names())
def test_per_sample_gradients_sum_to_the_gradient(name, chain):
    if estimators.make(name).probe == "subset":
        pytest.skip("the tap's probe must hold all parameters, this rule's only some")
    result = one_gradient(
        chain.without_direct_paths(), estimators.make(name), n=10, per_sample=True
    )
    assert result.per_sample.shape == (10, 12)
    torch.testing.assert_close(result.per_sample.sum(0), flat(result.gradients))


def test_per_sample_gradients_of_rp_equal_autograd_sample_by_sample(chain):
    chain = chain.without_direct_paths()
    result = one_gradient(chain, estimators.make("rp"), n=6, seed=4, per_sample=True)
    parameters = chain.parameters()
    start, noise = chain.noise(6, torch.Generator().manual_seed(4))
    for i in range(6):
        one = (start[i : i + 1], noise[:, i : i + 1])
        loss = chain.loss(estimators.make("rp"), None, parameters, one) / 6
        expected = flat(torch.autograd.grad(loss, list(parameters.values())))
        torch.testing.assert_close(result.per_sample[i], expected)


def test_without_per_sample_there_is_none(chain):
    assert one_gradient(chain, estimators.make("tpx")).per_sample is None


def test_the_loss_is_detached_and_the_gradients_are_like_the_parameters(chain):
    result = one_gradient(chain, estimators.make("tpx"))
    assert not result.loss.requires_grad
    shapes = [p.shape for p in chain.parameters().values()]
    assert [g.shape for g in result.gradients] == shapes


def test_a_whole_graph_estimator_keeps_its_own_legs_and_baseline(chain):
    """The LR pass of ivw uses the estimator's baseline: with b = 0 the gradient differs."""
    plain = one_gradient(chain, estimators.make("ivw"))
    without = one_gradient(chain, estimators.make("ivw", baseline=baselines.none))
    assert (flat(plain.gradients) - flat(without.gradients)).abs().max() > 1e-3
    lr = Estimator(mixing.likelihood_ratio, baseline=baselines.none)
    assert replace(lr, source="x").baseline is baselines.none
