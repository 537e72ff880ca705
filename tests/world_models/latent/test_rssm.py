"""The RSSM, against explicit loops and torch.distributions, in float64."""

import math

import pytest
import torch
from torch.distributions import Independent, Normal
from torch.distributions import kl_divergence as reference_kl
from torch.nn.functional import elu, softplus

from totalprop.world_models.latent.distributions import Gaussian
from totalprop.world_models.latent.rssm import RSSM, NormGRUCell, State

F64 = torch.float64
T, B, A, EMBED, STOCH, DETER, HIDDEN = 6, 3, 2, 7, 3, 4, 5


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed):
    return torch.randn(shape, dtype=F64, generator=generator(seed))


@pytest.fixture
def rssm():
    """An RSSM with weights and biases of about 0.5."""
    model = RSSM(A, EMBED, stoch=STOCH, deter=DETER, hidden=HIDDEN).double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(0.5 * randn(*p.shape, seed=100 + i))
    return model


@pytest.fixture
def sequences():
    """Sequences (embeds, actions, is_first, noise) with resets at the start, midway and never."""
    is_first = torch.zeros(T, B, dtype=torch.bool)
    is_first[0, 0] = is_first[3, 1] = is_first[5, 0] = True
    embeds, actions = randn(T, B, EMBED, seed=1), randn(T, B, A, seed=2)
    return embeds, actions, is_first, randn(T, B, STOCH, seed=3)


# Parts


def test_parameter_count_of_the_reference():
    assert (
        sum(p.numel() for p in RSSM(6, 1024, stoch=30, deter=200, hidden=200).parameters())
        == 557_920
    )


def test_features_are_stoch_then_deter(rssm):
    state = State(randn(B, DETER, seed=1), randn(B, STOCH, seed=2))
    assert torch.equal(state.features[:, :STOCH], state.stoch)
    assert torch.equal(state.features[:, STOCH:], state.deter)
    assert rssm.feature_size == STOCH + DETER


def test_initial_state_is_zero_and_of_the_model_s_dtype(rssm):
    state = rssm.initial(B)
    assert state.deter.shape == (B, DETER) and state.stoch.shape == (B, STOCH)
    assert not state.deter.any() and not state.stoch.any() and state.stoch.dtype == F64


def test_detached_states_carry_no_gradient():
    state = State(torch.ones(2, requires_grad=True) * 2, torch.ones(2, requires_grad=True) * 3)
    cut = state.detach()
    assert not cut.deter.requires_grad and not cut.stoch.requires_grad
    assert torch.equal(cut.stoch, state.stoch) and torch.equal(cut.deter, state.deter)


def test_recur_equals_a_gru_written_out(rssm):
    """Cho et al. 2014 with the reset gate after the product (Keras's reset_after)."""
    state, action = State(randn(B, DETER, seed=1), randn(B, STOCH, seed=2)), randn(B, A, seed=3)
    x = elu(
        torch.cat((state.stoch, action), -1) @ rssm.input_layer.weight.T + rssm.input_layer.bias
    )
    cell, h = rssm.cell, state.deter
    from_x = (x @ cell.weight_ih.T + cell.bias_ih).chunk(3, -1)
    from_h = (h @ cell.weight_hh.T + cell.bias_hh).chunk(3, -1)
    reset, update = torch.sigmoid(from_x[0] + from_h[0]), torch.sigmoid(from_x[1] + from_h[1])
    candidate = torch.tanh(from_x[2] + reset * from_h[2])
    expected = (1 - update) * candidate + update * h
    torch.testing.assert_close(rssm.recur(state, action), expected)


def test_prior_and_posterior_equal_their_layers(rssm):
    deter, embed = randn(B, DETER, seed=1), randn(B, EMBED, seed=2)
    for found, x, hidden, out in (
        (rssm.prior(deter), deter, rssm.prior_hidden, rssm.prior_out),
        (
            rssm.posterior(deter, embed),
            torch.cat((deter, embed), -1),
            rssm.posterior_hidden,
            rssm.posterior_out,
        ),
    ):
        y = elu(x @ hidden.weight.T + hidden.bias) @ out.weight.T + out.bias
        torch.testing.assert_close(found.mean, y[:, :STOCH])
        torch.testing.assert_close(found.std, (1 + y[:, STOCH:].exp()).log() + 0.1)


@pytest.mark.parametrize("min_std", [0.1, 0.5])
def test_stds_do_not_fall_below_the_least(min_std):
    model = RSSM(A, EMBED, stoch=STOCH, deter=DETER, hidden=HIDDEN, min_std=min_std).double()
    with torch.no_grad():
        model.prior_out.bias.fill_(-50.0)
        model.prior_out.weight.zero_()
    std = model.prior(randn(B, DETER, seed=1)).std
    torch.testing.assert_close(std, torch.full((B, STOCH), min_std, dtype=F64))


# Filtering


def explicit_filter(model, embeds, actions, is_first, noise):
    """Filter one sequence at a time, with `recur`, `prior` and `posterior`."""
    columns = [[] for _ in range(6)]
    for b in range(embeds.shape[1]):
        deter, stoch = torch.zeros(1, DETER, dtype=F64), torch.zeros(1, STOCH, dtype=F64)
        rows = [[] for _ in range(6)]
        for t in range(len(embeds)):
            action = actions[t, b : b + 1]
            if is_first[t, b]:
                deter, stoch, action = deter * 0, stoch * 0, action * 0
            deter = model.recur(State(deter, stoch), action)
            prior, posterior = model.prior(deter), model.posterior(deter, embeds[t, b : b + 1])
            stoch = posterior.mean + posterior.std * noise[t, b]
            for row, value in zip(rows, (deter, stoch, *prior, *posterior), strict=True):
                row.append(value)
        for column, row in zip(columns, rows, strict=True):
            column.append(torch.cat(row))
    deter, stoch, *rest = (torch.stack(column, 1) for column in columns)
    return State(deter, stoch), Gaussian(*rest[:2]), Gaussian(*rest[2:])


def test_observe_equals_an_explicit_loop(rssm, sequences):
    """Values and gradients, which also covers the split of the posterior's matrix product."""
    found, expected = rssm.observe(*sequences), explicit_filter(rssm, *sequences)
    cotangents = [randn(T, B, n, seed=20 + n) for n in (DETER, STOCH, *4 * [STOCH])]
    gradients = []
    for outcome in (found, expected):
        flat = [x for pair in outcome for x in pair]
        loss = sum((x * c).sum() for x, c in zip(flat, cotangents, strict=True))
        gradients.append(torch.autograd.grad(loss, list(rssm.parameters())))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*gradients)
    assert all(g.abs().max() > 1e-3 for g in gradients[0])


@pytest.mark.parametrize("min_work", [2**62, 0])
def test_float32_equals_float64_in_either_library(rssm, sequences, min_work, monkeypatch):
    """With matrix products of all sizes in PyTorch's default library, and in oneDNN."""
    monkeypatch.setattr("totalprop.world_models.latent.linear.MIN_WORK", min_work)
    outcomes = []
    for dtype in (F64, torch.float32):
        model, inputs = (
            rssm.to(dtype),
            [x.to(dtype) if x.is_floating_point() else x for x in sequences],
        )
        flat = torch.cat([x for pair in model.observe(*inputs) for x in pair], -1)
        loss = (flat * randn(*flat.shape, seed=20).to(dtype)).sum()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        outcomes.append([x.double() for x in (flat, *gradients)])
    torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-4)


def test_a_reset_forgets_state_and_action(rssm, sequences):
    """Sequence 1 resets at t = 3, and continues like a new sequence without a previous action."""
    embeds, actions, _, noise = sequences
    states, _, posterior = rssm.observe(*sequences)
    fresh = actions[3:, 1:2].clone()
    fresh[0] = 0
    no_flag = torch.zeros(3, 1, dtype=torch.bool)
    alone, _, alone_posterior = rssm.observe(embeds[3:, 1:2], fresh, no_flag, noise[3:, 1:2])
    torch.testing.assert_close(states.features[3:, 1:2], alone.features)
    torch.testing.assert_close(posterior.std[3:, 1:2], alone_posterior.std)


def test_nothing_flows_through_a_reset(rssm, sequences):
    embeds, actions, is_first, noise = (x.clone() for x in sequences)
    leaves = [x.requires_grad_() for x in (embeds, actions, noise)]
    states, _, _ = rssm.observe(embeds, actions, is_first, noise)
    gradients = torch.autograd.grad(states.features[3:, 1].square().sum(), leaves)
    for g in gradients:
        assert not g[:3].any() and g[4:, 1].any()
    assert not gradients[1][3].any()  # the action before the first step of an episode
    assert gradients[0][3, 1].any() and gradients[2][3, 1].any()


def test_a_sequence_begins_at_zero_without_a_flag(rssm, sequences):
    actions = sequences[1]
    expected = rssm.recur(rssm.initial(B), actions[0] * torch.tensor([[0.0], [1.0], [1.0]]))
    torch.testing.assert_close(rssm.observe(*sequences)[0].deter[0], expected)


def test_sequences_do_not_mix(rssm, sequences):
    found = rssm.observe(*sequences)[0].features
    for b in range(B):
        alone = rssm.observe(*(x[:, b : b + 1] for x in sequences))[0].features
        torch.testing.assert_close(found[:, b : b + 1], alone)


def test_filtered_states_are_causal(rssm, sequences):
    """State t does not depend on inputs after t, but state t + 1 does."""
    found = rssm.observe(*sequences)[0].features
    changed = [x.clone() for x in sequences]
    for i in (0, 1, 3):
        changed[i][4:] += 1.0
    other = rssm.observe(*changed)[0].features
    torch.testing.assert_close(found[:4], other[:4], rtol=0, atol=0)
    assert ((found[4] - other[4]).abs().amax(-1) > 1e-3).all()


# KL


def gaussian(seed):
    return Gaussian(
        randn(T, B, STOCH, seed=seed), 0.1 + softplus(randn(T, B, STOCH, seed=seed + 1))
    )


def test_kl_equals_torch_distributions():
    p, q = gaussian(1), gaussian(3)
    leaves = [x.requires_grad_() for x in (*p, *q)]
    found = p.kl(q)
    expected = reference_kl(Independent(Normal(*p), 1), Independent(Normal(*q), 1))
    assert found.shape == (T, B)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(kl.sum(), leaves) for kl in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_kl_by_hand():
    """KL(N(0, 1) || N(1, 2²)) = log 2 + (1 + 1) / 8 - 1/2, two coordinates."""
    one = torch.ones(2, dtype=F64)
    found = Gaussian(0 * one, one).kl(Gaussian(one, 2 * one))
    assert float(found) == pytest.approx(2 * (math.log(2) + 0.25 - 0.5))
    assert float(gaussian(1).kl(gaussian(1)).abs().max()) == pytest.approx(0, abs=1e-12)


def test_the_gru_with_layer_norm_by_hand():
    """danijar/dreamerv2, nets.GRUCell: norm of all gates, then an update gate biased by -1."""
    cell = NormGRUCell(3, 2)
    x, h = torch.randn(4, 3), torch.randn(4, 2)
    gates = torch.cat((x, h), -1) @ cell.gates.weight.T
    gates = torch.nn.functional.layer_norm(gates, (6,), eps=1e-3)
    reset, candidate, update = gates[:, :2].sigmoid(), gates[:, 2:4], (gates[:, 4:] - 1).sigmoid()
    candidate = (reset * candidate).tanh()
    torch.testing.assert_close(cell(x, h), update * candidate + (1 - update) * h)
    assert cell.gates.bias is None


def test_a_model_with_layer_norm_filters_as_it_steps():
    """`observe` equals `recur` and `posterior` step by step, as without layer norm."""
    torch.manual_seed(0)
    rssm = RSSM(2, 3, stoch=3, deter=4, hidden=5, layer_norm=True)
    embeds, actions, noise = torch.randn(3, 2, 3), torch.randn(3, 2, 2), torch.randn(3, 2, 3)
    states, prior, posterior = rssm.observe(
        embeds, actions, torch.zeros(3, 2, dtype=torch.bool), noise
    )
    state = rssm.initial(2)
    for t in range(3):
        deter = rssm.recur(state, actions[t])
        mean, std = rssm.posterior(deter, embeds[t])
        state = State(deter, mean + std * noise[t])
        torch.testing.assert_close(states.deter[t], state.deter)
        torch.testing.assert_close(states.stoch[t], state.stoch)
        torch.testing.assert_close(posterior.mean[t], mean)
        torch.testing.assert_close(prior.mean[t], rssm.prior(deter).mean)
