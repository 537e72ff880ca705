"""The world model's loss, filter and open-loop prediction, against explicit computations."""

import math

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from totalprop.world_models.latent.distributions import Gaussian
from totalprop.world_models.latent.model import LatentModel, ModelLossSettings, _kl_penalty
from totalprop.world_models.latent.networks import LEAST_STD, symexp, symlog
from totalprop.world_models.latent.rssm import State

T, B, A, OBSERVATION, STOCH, DETER = 5, 3, 2, 4, 3, 4
IMAGE = (3, 64, 64)
SIZES = {"stoch": STOCH, "deter": DETER, "hidden": 5, "width": 5, "conv_depth": 2}
SETTINGS = ModelLossSettings(
    kl_scale=0.7,
    representation_scale=1.0,
    free_nats=0.01,
    free_nats_per_step=False,
    gamma=0.9,
    discount_scale=4.0,
)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed):
    return torch.randn(shape, generator=generator(seed))


DREAMER_V1 = {"stoch": 30, "deter": 200, "hidden": 200, "width": 400, "conv_depth": 32}


def make(shape=(OBSERVATION,), **changes):
    """A tiny model with weights and biases of about 0.5, and convolutions of about 0.1."""
    model = LatentModel(shape, A, **{**SIZES, **changes})
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_((0.1 if p.ndim == 4 else 0.5) * randn(*p.shape, seed=100 + i))
    return model


def batch(shape=(OBSERVATION,)):
    """A batch: observations, actions, rewards, is_first, is_terminal and noise."""
    if len(shape) == 3:
        observations = torch.randint(0, 256, (T, B, *shape), generator=generator(1)).byte()
    else:
        observations = 2 * randn(T, B, *shape, seed=1)
    is_first = torch.zeros(T, B, dtype=torch.bool)
    is_first[0, 0] = is_first[3, 1] = True
    is_terminal = torch.zeros(T, B, dtype=torch.bool)
    is_terminal[2, 1] = is_terminal[4, 2] = True
    rewards, noise = randn(T, B, seed=3), randn(T, B, STOCH, seed=4)
    return observations, randn(T, B, A, seed=2), rewards, is_first, is_terminal, noise


def observed(model, data):
    """Posterior states, priors and posteriors of the batch."""
    observations, actions, _, is_first, _, noise = data
    return model.rssm.observe(model.encoder(observations), actions, is_first, noise)


def gradient_norms(loss, model):
    """Gradient norm of each part of the model."""
    parts = {name: list(part.parameters()) for name, part in model.named_children()}
    flat = [p for part in parts.values() for p in part]
    found = iter(torch.autograd.grad(loss, flat, retain_graph=True, materialize_grads=True))
    return {
        name: math.sqrt(sum(float(next(found).square().sum()) for _ in part))
        for name, part in parts.items()
    }


# Sizes


def test_parameter_counts_of_the_reference():
    """danijar/dreamer with 6 actions; actor and critic: tests/agents/dreamer/test_update.py."""
    model = LatentModel((3, 64, 64), 6, **DREAMER_V1)
    counts = {
        name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()
    }
    assert counts == {
        "encoder": 690_144, "decoder": 3_795_555, "rssm": 557_920, "reward_head": 253_201,
    }  # fmt: skip
    assert sum(p.numel() for p in model.parameters()) == 5_296_820


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match="ResizeObservation"):
        LatentModel((3, 84, 84), A, **SIZES)


def test_the_whole_model_is_initialised():
    """No layer keeps PyTorch's default: biases are zero, and recurrent weights are orthogonal.

    Only the discount head's last one is not: sigmoid(log(99)) = 0.99.
    """
    model = LatentModel(IMAGE, A, **SIZES, discount_head=True)
    biases = {name: p for name, p in model.named_parameters() if "bias" in name and p.any()}
    assert list(biases) == ["discount_head.6.bias"]
    assert biases["discount_head.6.bias"].sigmoid().item() == pytest.approx(0.99)
    recurrent = model.rssm.cell.weight_hh
    torch.testing.assert_close(recurrent.T @ recurrent, torch.eye(DETER), rtol=0, atol=1e-5)


# The loss


MIXED = {"image": IMAGE, "vector": (OBSERVATION,)}


@pytest.mark.parametrize("shape", [IMAGE, MIXED], ids=["image", "dictionary"])
def test_images_that_are_not_decoded_count_as_those_that_are_on_average(shape):
    """Means over disjoint halves of the steps are, together, the mean over all; so are gradients.

    The rest of the loss, and of a dictionary its vectors, do not notice.
    """
    model, data = make(shape, image_std=0.3), batch(IMAGE)
    if shape is MIXED:
        vectors = batch((OBSERVATION,))[0]
        data = ({"image": data[0], "vector": vectors}, *data[1:])
    steps = data[2].numel()
    order = torch.randperm(steps, generator=torch.Generator().manual_seed(0))
    parameters = list(model.parameters())

    def found(decoded):
        loss, states = model.loss(*data, SETTINGS, decoded)
        gradient = torch.autograd.grad(loss.total, parameters, allow_unused=True)
        return loss, states, [g for g in gradient if g is not None]

    whole, states, gradient = found(None)
    halves = [found(half) for half in (order[: steps // 2], order[steps // 2 :])]
    weights = [(steps // 2) / steps, (steps - steps // 2) / steps]
    mean = sum(w * half.observation for w, (half, *_) in zip(weights, halves, strict=True))
    torch.testing.assert_close(mean, whole.observation)
    assert abs(halves[0][0].observation - halves[1][0].observation) > 1e-3  # or nothing was tested
    for half, own_states, _ in halves:
        torch.testing.assert_close(own_states, states, rtol=0, atol=0)
        for term in ("reward", "kl", "discount"):
            assert torch.equal(getattr(half, term), getattr(whole, term))
    mean_gradient = [
        sum(w * g for w, g in zip(weights, parts, strict=True))
        for parts in zip(*(half[2] for half in halves), strict=True)
    ]
    torch.testing.assert_close(mean_gradient, gradient, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("discount_head", [False, True])
@pytest.mark.parametrize("shape", [(OBSERVATION,), IMAGE], ids=["vector", "image"])
def test_loss_equals_plain_distributions(shape, discount_head):
    stds = {"vector_std": 0.4, "image_std": 0.3}
    model, data = make(shape, **stds, discount_head=discount_head), batch(shape)
    observations, _, rewards, _, is_terminal, _ = data
    loss, states = model.loss(*data, SETTINGS)
    expected_states, prior, posterior = observed(model, data)
    torch.testing.assert_close(states, expected_states)
    features = torch.cat((states.stoch, states.deter), -1)
    if len(shape) == 3:
        decoded = Independent(Normal(model.decoder(features), 0.3), 3)
        target = observations.float() / 255 - 0.5
    else:
        decoded, target = Independent(Normal(model.decoder.net(features), 0.4), 1), observations
        target = symlog(target)
    parts = {
        "observation": -decoded.log_prob(target).mean(),
        "reward": -Normal(model.reward_head(features)[..., 0], 1.0).log_prob(rewards).mean(),
        "kl": kl_divergence(Normal(*posterior), Normal(*prior)).sum(-1).mean(),
        "discount": torch.zeros(()),
    }
    if discount_head:
        p = model.discount_head(features)[..., 0].sigmoid()
        goes_on = 0.9 * (1 - is_terminal.float())
        entropy = goes_on * p.log() + (1 - goes_on) * (1 - p).log()
        parts["discount"] = -4.0 * entropy.mean()
    for name, value in parts.items():
        torch.testing.assert_close(getattr(loss, name), value, msg=name)
        assert getattr(loss, name).shape == ()
    assert parts["kl"] > SETTINGS.free_nats
    total = parts["observation"] + parts["reward"] + 0.7 * parts["kl"] + parts["discount"]
    torch.testing.assert_close(loss.total, total)
    assert discount_head == bool(loss.discount > 0.1)


def test_every_parameter_learns():
    for shape in ((OBSERVATION,), IMAGE):
        model = make(shape, discount_head=True)
        loss, _ = model.loss(*batch(shape), SETTINGS)
        gradients = torch.autograd.grad(loss.total, list(model.parameters()))
        assert all(g.abs().max() > 0 for g in gradients)


@pytest.mark.parametrize("discount_head", [False, True])
@pytest.mark.parametrize("border", [1, 3])
def test_a_window_across_a_border_is_learned_like_its_two_parts(border, discount_head):
    """Its loss, a mean over steps, and its gradient are the parts' means, weighted by length.

    Actions and rewards at the border do not matter: the replay's are zeros, the model's input too.
    """
    model = make(discount_head=discount_head)
    data = [x.clone() for x in batch()]
    is_first = data[3]
    is_first[1:] = False
    is_first[border] = True
    settings = SETTINGS._replace(free_nats=0.0)
    whole, _ = model.loss(*data, settings)
    parts = [model.loss(*(x[rows] for x in data), settings)[0]
             for rows in (slice(0, border), slice(border, T))]  # fmt: skip
    shares = border / T, 1 - border / T
    for name, value in whole._asdict().items():
        first, second = (getattr(part, name) for part in parts)
        torch.testing.assert_close(value, shares[0] * first + shares[1] * second)
    mixed = shares[0] * parts[0].total + shares[1] * parts[1].total
    gradients = [torch.autograd.grad(x, list(model.parameters())) for x in (whole.total, mixed)]
    torch.testing.assert_close(*gradients)
    data[1][border] += 1  # the action that is not there
    torch.testing.assert_close(model.loss(*data, settings)[0].total, whole.total, rtol=0, atol=0)


def kl_of_steps(model, data):
    _, prior, posterior = observed(model, data)
    return kl_divergence(Normal(*posterior), Normal(*prior)).sum(-1)


def test_free_nats_after_the_mean():
    """The loss is kl_scale·KL above the free nats and constant below, whatever the single steps."""
    model, data = make(), batch()
    kl = kl_of_steps(model, data)
    assert kl.min() < 0.9 * kl.mean() and kl.max() > 1.1 * kl.mean()
    rssm = list(model.rssm.parameters())
    for factor in (0.9, 1.1):
        free_nats = factor * kl.mean().item()
        settings = SETTINGS._replace(free_nats=free_nats)
        loss, _ = model.loss(*data, settings)
        penalty = loss.total - loss.observation - loss.reward
        torch.testing.assert_close(loss.kl, kl.mean())
        torch.testing.assert_close(penalty, 0.7 * kl.mean().clamp_min(free_nats))
        found = torch.autograd.grad(penalty, rssm, materialize_grads=True)
        expected = torch.autograd.grad(0.7 * kl.mean(), rssm, retain_graph=True)
        if factor > 1:
            # The other two terms cancel up to float32 round-off.
            expected = [torch.zeros_like(g) for g in expected]
        torch.testing.assert_close(found, tuple(expected), rtol=1e-4, atol=1e-5)


def test_free_nats_per_step():
    """Only steps above the free nats contribute to the KL's gradient."""
    model, data = make(), batch()
    kl = kl_of_steps(model, data)
    free_nats = kl.flatten().sort().values[6:8].mean().item()  # no step is exactly at the free nats
    settings = SETTINGS._replace(free_nats=free_nats, free_nats_per_step=True)
    loss, _ = model.loss(*data, settings)
    above = kl > free_nats
    assert above.any() and not above.all()
    expected = 0.7 * (kl[above].sum() + free_nats * (~above).sum()) / (T * B)
    penalty = loss.total - loss.observation - loss.reward
    torch.testing.assert_close(penalty, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.kl, kl.mean())  # before free nats are applied
    rssm = list(model.rssm.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(penalty, rssm, materialize_grads=True),
        torch.autograd.grad(expected, rssm, materialize_grads=True),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("per_step", [False, True])
def test_below_the_free_nats_the_prior_has_no_gradient(per_step):
    """Only the KL depends on the prior, so the gradient of its layers is exactly zero."""
    model, data = make(), batch()
    most = kl_of_steps(model, data).max().item()
    layers = [*model.rssm.prior_hidden.parameters(), *model.rssm.prior_out.parameters()]
    for free_nats, learns in ((1.01 * most, False), (0.0, True)):
        settings = SETTINGS._replace(free_nats=free_nats, free_nats_per_step=per_step)
        total = model.loss(*data, settings)[0].total
        gradients = torch.autograd.grad(total, layers)
        assert all(bool(g.any()) == learns for g in gradients)


def test_discount_head_s_target():
    """The cross entropy is smallest at γ while the episode continues, and at 0 where it ends."""
    model, data = make(discount_head=True), batch()
    is_terminal = data[4]
    logits = torch.zeros(T, B)

    class Fixed(torch.nn.Module):
        def forward(self, features):
            return logits.unsqueeze(-1)

    model.discount_head = Fixed()
    logits = torch.where(is_terminal, -20.0, math.log(0.9 / 0.1)).requires_grad_()
    loss, _ = model.loss(*data, SETTINGS)
    (gradient,) = torch.autograd.grad(loss.discount, logits)
    torch.testing.assert_close(gradient, torch.zeros(T, B), rtol=0, atol=1e-7)
    # By hand: 13 steps of the entropy of Bernoulli(0.9), 2 terminal ones of about 0.
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert loss.discount.item() == pytest.approx(4.0 * 13 / 15 * entropy, rel=1e-5)
    logits = torch.zeros(T, B, requires_grad=True)
    (gradient,) = torch.autograd.grad(model.loss(*data, SETTINGS)[0].discount, logits)
    expected = 4.0 / 15 * torch.where(is_terminal, 0.5, 0.5 - 0.9)
    torch.testing.assert_close(gradient, expected)


def test_each_part_of_the_loss_trains_its_own_head():
    model = make(discount_head=True)
    loss, _ = model.loss(*batch(), SETTINGS)
    heads = {"decoder": "observation", "reward_head": "reward", "discount_head": "discount"}
    for part in ("observation", "reward", "kl", "discount"):
        norms = gradient_norms(getattr(loss, part), model)
        assert {name for name in heads if norms[name] > 0} == {
            name for name, own in heads.items() if own == part
        }
        assert norms["encoder"] > 0 and norms["rssm"] > 0


# The filter


def test_filter_is_one_step_of_observe():
    model, data = make(), batch()
    observations, actions, _, _, _, noise = data
    never = torch.zeros(T, B, dtype=torch.bool)
    states, _, _ = model.rssm.observe(model.encoder(observations), actions, never, noise)
    state = model.rssm.initial(B)
    for t in range(T):
        state = model.filter(state, actions[t], observations[t], noise[t])
        torch.testing.assert_close(state, State(states.deter[t], states.stoch[t]))
        assert not state.deter.requires_grad and not state.stoch.requires_grad


def test_filter_without_noise_gives_the_mean_and_draws_nothing():
    model, data = make(), batch()
    state = State(randn(B, DETER, seed=8), randn(B, STOCH, seed=9))
    before = torch.get_rng_state()
    found = model.filter(state, data[1][0], data[0][0], None)
    assert torch.equal(before, torch.get_rng_state())
    posterior = model.rssm.posterior(found.deter, model.encoder(data[0][0]))
    torch.testing.assert_close(found.stoch, posterior.mean.detach())
    again = model.filter(state, data[1][0], data[0][0], torch.zeros(B, STOCH))
    assert torch.equal(found.stoch, again.stoch)
    other = model.filter(state, data[1][0], data[0][0], torch.ones(B, STOCH))
    torch.testing.assert_close(other.stoch - found.stoch, posterior.std.detach())


# Open-loop prediction


def explicit_open_loop(model, data, context, seed):
    """Filter, then imagine, one step at a time with the same noise; both begin anew at resets."""
    observations, actions, _, is_first, _, _ = data
    source = generator(seed)
    noise = torch.cat([torch.randn(n, B, STOCH, generator=source) for n in (context, T - context)])
    state, decoded = model.rssm.initial(B), []
    with torch.no_grad():
        for t in range(T):
            keep = 1 - is_first[t].float().unsqueeze(-1)
            state = State(state.deter * keep, state.stoch * keep)
            deter = model.rssm.recur(state, actions[t] * keep)
            found = model.rssm.prior(deter)
            if t < context:
                found = model.rssm.posterior(deter, model.encoder(observations[t]))
            state = State(deter, found.mean + found.std * noise[t])
            decoded.append(model.decoder(state.features))
    return torch.stack(decoded)


@pytest.mark.parametrize("context", [1, 2, 4, 5])
@pytest.mark.parametrize("shape", [(OBSERVATION,), IMAGE], ids=["vector", "image"])
def test_open_loop_filters_then_imagines(shape, context):
    model, data = make(shape), batch(shape)
    observations, actions, _, is_first, _, _ = data
    found = model.open_loop(
        observations, actions, is_first, context=context, generator=generator(7)
    )
    assert found.shape == observations.shape and not found.requires_grad
    expected = explicit_open_loop(model, data, context, 7)
    torch.testing.assert_close(found, expected, check_dtype=False)
    if len(shape) == 1:  # in the units of the observation
        features = observed(model, data)[0].features
        torch.testing.assert_close(model.decoder(features), symexp(model.decoder.net(features)))


def test_an_offset_shifts_what_is_learned_and_predicted():
    """Loss, states and predictions of shifted vectors are those of the vectors, in float64."""
    model, shifted, data = make(), make(), batch()
    observations, *others = data
    shift = torch.tensor([2.0**20, -(2.0**30), 0.0, 3.0], dtype=torch.float64)
    shifted.set_offset(shift)
    moved = observations.double() + shift
    shifted_by = moved - shift  # what float64 keeps of them
    loss, states = model.loss(shifted_by.float(), *others, SETTINGS)
    found, posterior = shifted.loss(moved, *others, SETTINGS)
    assert torch.equal(found.total, loss.total) and torch.equal(posterior.stoch, states.stoch)
    run = {"context": 2}
    plain = model.open_loop(shifted_by, others[0], others[2], **run, generator=generator(7))
    other = shifted.open_loop(moved, others[0], others[2], **run, generator=generator(7))
    torch.testing.assert_close(other, plain + shift, rtol=0, atol=1e-6)
    restored = make()
    restored.load_state_dict(shifted.state_dict())
    assert torch.equal(restored.offset, shift)
    old = {name: value for name, value in shifted.state_dict().items() if name != "offset"}
    restored.load_state_dict(old)  # a file of an older version
    assert not restored.offset.any()
    make(IMAGE).set_offset(torch.zeros(3, 64, 64))  # nothing for images
    assert "offset" not in make(IMAGE).state_dict()


def test_open_loop_does_not_look_ahead():
    """Observations after the context have no effect; those in it and later actions do."""
    model, data = make(), batch()

    def predict(observations, actions):
        return model.open_loop(observations, actions, data[3], context=2, generator=generator(7))

    expected = predict(data[0], data[1])
    later = data[0].clone()
    later[2:] = 100.0
    assert torch.equal(predict(later, data[1]), expected)
    earlier = data[0].clone()
    earlier[1] += 1.0
    changed = (predict(earlier, data[1]) - expected).abs().amax((1, 2))
    assert changed[0] == 0 and (changed[1:] > 1e-4).all()
    actions = data[1].clone()
    actions[3] += 1.0
    changed = (predict(data[0], actions) - expected).abs().amax((1, 2))
    assert (changed[:3] == 0).all() and (changed[3:] > 1e-4).all()


def test_kl_balance_scales_the_posteriors_gradient_alone():
    """By hand: the prior's gradient is that of the plain KL, the posterior's `scale` times it."""
    parts = [randn(2, 3, seed=i) for i in range(4)]
    parts[1], parts[3] = parts[1].exp(), parts[3].exp()

    def gradients(scale):
        leaves = [part.clone().requires_grad_() for part in parts]
        settings = SETTINGS._replace(representation_scale=scale, free_nats=0.0)
        penalty, kl = _kl_penalty(Gaussian(*leaves[:2]), Gaussian(*leaves[2:]), settings)
        return torch.autograd.grad(penalty, leaves), penalty, kl

    plain, penalty, kl = gradients(1.0)
    balanced, scaled, same = gradients(0.2)
    for i, (a, b) in enumerate(zip(balanced, plain, strict=True)):
        torch.testing.assert_close(a, b * (0.2 if i < 2 else 1.0))
    assert penalty == kl == same
    torch.testing.assert_close(scaled, 1.2 * kl)


def test_a_two_hot_reward_head_is_trained_by_its_cross_entropy():
    torch.manual_seed(0)
    model = LatentModel((OBSERVATION,), A, **SIZES, reward_head="two-hot", layer_norm=True)
    features = randn(2, 3, STOCH + DETER, seed=1)
    assert torch.equal(model.reward(features), torch.zeros(2, 3))  # at first
    loss, states = model.loss(
        randn(T, B, OBSERVATION, seed=2), randn(T, B, A, seed=3), randn(T, B, seed=4),
        torch.zeros(T, B, dtype=torch.bool), torch.zeros(T, B, dtype=torch.bool),
        randn(T, B, STOCH, seed=5), SETTINGS,
    )  # fmt: skip
    assert float(loss.reward.detach()) == pytest.approx(
        math.log(255), rel=1e-5
    )  # uniform over 255 bins
    assert states.features.shape == (T, B, STOCH + DETER)


def test_a_learned_standard_deviation_ends_at_the_error_of_its_entry():
    """The likelihood is that of Normals, and stationary where each std² is a mean squared error."""
    model = make(vector_std=0.4, learn_vector_std=True)
    decoder, features = model.decoder, randn(50, STOCH + DETER, seed=5)
    seen = randn(50, OBSERVATION, seed=6)
    error = (decoder.net(features) - symlog(seen)).detach()
    with torch.no_grad():
        decoder.log_excess.copy_((error.square().mean(0).sqrt() - LEAST_STD).log())
    std = error.square().mean(0).sqrt()
    torch.testing.assert_close(decoder.std, std)
    expected = Normal(decoder.net(features), std).log_prob(symlog(seen)).sum()
    found = decoder.log_prob(features, seen)
    torch.testing.assert_close(found, expected)
    (slope,) = torch.autograd.grad(found, decoder.log_excess)
    torch.testing.assert_close(slope, torch.zeros(OBSERVATION), rtol=0, atol=1e-3)


def test_a_learned_standard_deviation_starts_where_the_fixed_one_is():
    fixed, learned = (LatentModel((4,), A, **SIZES, vector_std=0.3, learn_vector_std=x).decoder.std
                      for x in (False, True))  # fmt: skip
    torch.testing.assert_close(learned, torch.full((4,), fixed))
