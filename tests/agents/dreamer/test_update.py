"""A gradient step against three plain ones: what learns from which loss, what is unchanged."""

import copy
import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from totalprop import estimators
from totalprop.agents.dreamer import update as dreamer_update
from totalprop.agents.dreamer.cuda_graph import EAGER_CALLS, GraphedFunction
from totalprop.agents.dreamer.imagination import (
    ImaginationNoise,
    ImaginationSettings,
    critic_loss,
    imagine,
)
from totalprop.agents.dreamer.policy import DreamerPolicy
from totalprop.agents.dreamer.replay import SequenceBatch, SequenceReplay
from totalprop.agents.dreamer.update import (
    DreamerUpdate,
    UpdateNoise,
    UpdateSettings,
    draw_share,
    draw_starts,
)
from totalprop.estimators.gauge import read
from totalprop.world_models.latent.distributions import GaussianLatents
from totalprop.world_models.latent.model import ModelLossSettings
from totalprop.world_models.latent.networks import symlog
from totalprop.world_models.latent.rssm import State

T, B, A, H, OBSERVATION = 5, 4, 2, 3, 3
SIZES = {"stoch": 3, "deter": 4, "hidden": 5, "width": 5}
SETTINGS = UpdateSettings(
    estimator=estimators.make("tpx"),
    imagination=ImaginationSettings(
        gamma=0.99, lam=0.95, stop_grad_actor_input=True, discount_weights=True, entropy_scale=0.01
    ),
    model=ModelLossSettings(
        kl_scale=1.0,
        representation_scale=1.0,
        free_nats=0.01,
        free_nats_per_step=False,
        gamma=0.99,
        discount_scale=10.0,
    ),
    horizon=H,
    decoded_share=1.0,
    imagination_starts=0,
    learning_rate=2e-3,
    model_learning_rate=3e-3,
    adam_eps=1e-3,  # large: a step is then a smooth function of the gradient
    max_grad_norm=100.0,
    slow_critic_rate=0.0,
    slow_actor_rate=0.0,
    bf16=False,
    compile=False,
    cuda_graph=False,
)
NAMES = {
    "model_loss", "observation_loss", "reward_loss", "kl", "discount_loss", "actor_loss",
    "critic_loss", "return", "value", "entropy", "model_gradient_norm", "actor_gradient_norm",
    "critic_gradient_norm", "skipped_steps",
}  # fmt: skip


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed):
    return torch.randn(shape, generator=generator(seed))


def make(**changes):
    """A tiny policy with weights and biases of about 0.5."""
    observation, action = spaces.Box(-1, 1, (OBSERVATION,)), spaces.Box(-1, 1, (A,))
    policy = DreamerPolicy(observation, action, **{**SIZES, **changes})
    with torch.no_grad():
        for i, p in enumerate(policy.parameters()):
            p.copy_(0.5 * randn(*p.shape, seed=100 + i))
        policy.actor.out.bias[A:] -= 5
    return policy


KINDS = ("vector", "image", "mixed")  # mixed: a dictionary with an option, and discrete actions
IMAGES = spaces.Box(0, 255, (3, 64, 64), np.uint8)


def sized(kind, **changes):
    """A tiny policy as DreamerTPX initialises it, for a kind of observations."""
    torch.manual_seed(0)
    vectors = spaces.Box(-1, 1, (OBSERVATION,))
    mixed = spaces.Dict({"image": IMAGES, "option": spaces.Discrete(4), "vector": vectors})
    observation = {"vector": vectors, "image": IMAGES, "mixed": mixed}[kind]
    action = spaces.Discrete(A) if kind == "mixed" else spaces.Box(-1, 1, (A,))
    policy = DreamerPolicy(observation, action, **{**SIZES, "conv_depth": 2, **changes})
    for head in (policy.critic, policy.slow_critic, policy.model.reward_head):
        if head is not None and head.kind == "two-hot":
            # As after some training. In equal probabilities of bins of ± 4.9e8, round-off is large.
            head[-1].bias.data = -2 * symlog(head.bins).abs()
    return policy


def batch_of(kind, seed=0):
    data, source = batch(seed), torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (T, B, 3, 64, 64), generator=source, dtype=torch.uint8)
    options = torch.randint(0, 4, (T, B, 1), generator=source)
    mixed = {"image": images, "option": options, "vector": data.observation}
    seen = {"vector": data.observation, "image": images, "mixed": mixed}
    return data._replace(observation=seen[kind])


def batch(seed=0):
    is_first, is_terminal = torch.zeros(2, T, B, dtype=torch.bool)
    is_first[0, :2] = is_first[3, 1] = is_terminal[2, 1] = True
    return SequenceBatch(
        observation=randn(T, B, OBSERVATION, seed=seed),
        action=randn(T, B, A, seed=seed + 1).tanh(),
        reward=randn(T, B, seed=seed + 2),
        is_first=is_first,
        is_terminal=is_terminal,
    )


def noise(horizon):
    return ImaginationNoise.draw(horizon, T * B, A, GaussianLatents(SIZES["stoch"]), generator(5))


def values_of(module):
    return [p.detach().clone() for p in module.parameters()]


def assert_same_scalars(scalars, others):
    assert scalars.keys() == others.keys()
    for name, value in scalars.items():
        assert torch.equal(value, others[name]), name


def is_unchanged(module, values):
    return all(torch.equal(p, v) for p, v in zip(module.parameters(), values, strict=True))


def parts(policy):
    return {"model": policy.model, "actor": policy.actor, "critic": policy.critic}


# Sizes


def test_parameter_counts_of_the_reference():
    """danijar/dreamer at 3x64x64 images and 6 actions."""
    policy = DreamerPolicy(
        spaces.Box(0, 255, (3, 64, 64), np.uint8), spaces.Box(-1, 1, (6,), np.float32)
    )
    counts = {name: sum(p.numel() for p in x.parameters()) for name, x in parts(policy).items()}
    assert counts == {"model": 5_296_820, "actor": 578_412, "critic": 413_601}
    assert sum(p.numel() for p in policy.parameters()) == 6_288_833
    biases = [p for name, p in policy.named_parameters() if "bias" in name]
    assert len(biases) > 20 and not any(b.any() for b in biases)


# The step


def plain_step(policy, optimizers, data, settings, source):
    """Three losses with `backward`, all with the weights as they are, then three steps.

    The noise is drawn in the order of the update: model, actions, latents.
    """
    losses = {}
    noise = torch.randn(T, B, policy.model.rssm.stoch_size, generator=source)
    loss, states = policy.model.loss(
        data.observation, data.action, data.reward, data.is_first, data.is_terminal, noise,
        settings.model,
    )  # fmt: skip
    losses["model"] = loss.total
    rows = draw_starts(data.is_terminal, settings.imagination_starts, source)
    start = State(*(x.detach().flatten(0, 1)[rows] for x in states))
    noise = ImaginationNoise.draw(H, len(rows), A, policy.model.rssm.latents, source)
    imagined = imagine(policy, start, noise, settings.estimator, settings.imagination)
    losses["actor"], losses["critic"] = imagined.actor_loss, critic_loss(policy, imagined)[0]
    gradients = {
        name: torch.autograd.grad(losses[name], list(part.parameters()))
        for name, part in parts(policy).items()
    }
    for name, part in parts(policy).items():
        for p, g in zip(part.parameters(), gradients[name], strict=True):
            p.grad = g.clone()  # clipped in place
        torch.nn.utils.clip_grad_norm_(part.parameters(), settings.max_grad_norm)
        optimizers[name].step()
        optimizers[name].zero_grad()
    return {name: x.detach() for name, x in losses.items()}, gradients


def plain_adam(policy, settings):
    rates = {"model": settings.model_learning_rate}
    return {
        name: torch.optim.Adam(
            part.parameters(), rates.get(name, settings.learning_rate), eps=settings.adam_eps
        )
        for name, part in parts(policy).items()
    }


def assert_plain_steps(policy, settings, batches):
    """Several updates in a row, so that the optimisers' states matter too."""
    plain = copy.deepcopy(policy)
    update, optimizers = DreamerUpdate(policy, settings), plain_adam(plain, settings)
    sources, before = (generator(5), generator(5)), values_of(policy)
    for data in batches:
        record = update(data, sources[0])
        losses, gradients = plain_step(plain, optimizers, data, settings, sources[1])
        for part, loss in losses.items():
            torch.testing.assert_close(record.scalars[f"{part}_loss"], loss)
            norm = math.sqrt(sum(float(g.square().sum()) for g in gradients[part]))
            found = record.scalars[f"{part}_gradient_norm"].item()
            assert found == pytest.approx(norm, rel=1e-4)
            # both sides of the clip
            assert (norm > settings.max_grad_norm) == (settings.max_grad_norm < 1)
        torch.testing.assert_close(record.actor_gradient, gradients["actor"], rtol=1e-4, atol=1e-6)
        for p, expected in zip(policy.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, expected, rtol=1e-4, atol=1e-5)
    moved = [(p - v).abs().max() for p, v in zip(policy.parameters(), before, strict=True)]
    assert min(moved) > 1e-4


@pytest.mark.parametrize("max_grad_norm", [1e4, 0.01])
@pytest.mark.parametrize("discount_head", [False, True])
@pytest.mark.parametrize("name", ["rp", "lr", "tpx"])
def test_update_equals_three_plain_steps(name, discount_head, max_grad_norm):
    settings = replace(SETTINGS, estimator=estimators.make(name), max_grad_norm=max_grad_norm)
    batches = [batch(10 * i) for i in range(3)]
    assert_plain_steps(make(discount_head=discount_head), settings, batches)


def test_update_from_pixels_equals_plain_steps():
    """Gradients of convolutions may have another memory format than their weights."""
    images = spaces.Box(0, 255, (3, 64, 64), np.uint8)
    torch.manual_seed(0)
    policy = DreamerPolicy(images, spaces.Box(-1, 1, (A,)), **SIZES, conv_depth=2)
    pixels = torch.randint(0, 256, (T, B, 3, 64, 64), generator=generator(1), dtype=torch.uint8)
    batches = [batch(10 * i)._replace(observation=pixels) for i in range(2)]
    assert_plain_steps(policy, replace(SETTINGS, max_grad_norm=1e6), batches)


@pytest.mark.parametrize("name", estimators.names())
def test_an_update_leaves_a_record_of_finite_numbers(name):
    policy = make(discount_head=True)
    record = DreamerUpdate(policy, replace(SETTINGS, estimator=estimators.make(name)))(
        batch(), generator(5)
    )
    assert set(record.scalars) == NAMES
    for value in record.scalars.values():
        assert value.shape == () and torch.isfinite(value) and not value.requires_grad
    assert [g.shape for g in record.actor_gradient] == [p.shape for p in policy.actor.parameters()]
    assert record.k.shape == (H, SIZES["stoch"])
    if name != "tpx-unclipped":
        assert (record.k >= 0).all() and (record.k <= 1).all()
    if name in ("rp", "lr"):
        assert (record.k == (name == "lr")).all()


@pytest.mark.parametrize("name", estimators.names())
def test_gauging_the_legs_changes_no_step(name):
    settings, after = replace(SETTINGS, estimator=estimators.make(name)), []
    for measure in (False, True):
        policy = make(discount_head=True)
        record = DreamerUpdate(policy, settings)(batch(), generator(5), measure=measure)
        after.append(values_of(policy))
    assert all(torch.equal(a, b) for a, b in zip(*after, strict=True))
    reading = read(record.gauge)
    assert reading.z.shape == (H,)
    for field, values in reading._asdict().items():
        assert values.isfinite().all() == (field != "snr" or not settings.estimator.whole_graph)


def test_a_step_does_not_gauge_its_legs_unless_asked():
    """A CUDA graph does, since it has one recording."""
    found = []
    for cuda_graph in (False, True):
        update = DreamerUpdate(make(), replace(SETTINGS, cuda_graph=cuda_graph))
        update._step = lambda data, noise, measure: found.append(measure)
        for measure in (False, True):
            update(batch(), generator(5), measure=measure)
    assert found == [False, True, True, True]
    assert DreamerUpdate(make(), SETTINGS)(batch(), generator(5)).gauge is None


def test_no_gradient_is_left_behind():
    policy = make()
    DreamerUpdate(policy, SETTINGS)(batch(), generator(5))
    assert all(p.grad is None and p.requires_grad for p in policy.parameters())


# Who learns from what


@pytest.mark.parametrize("name", ["rp", "lr", "tps", "ivw"])
def test_the_actor_s_gradient_touches_no_other_parameter(name):
    policy = make()
    update = DreamerUpdate(policy, replace(SETTINGS, estimator=estimators.make(name)))
    before = values_of(policy)
    gradient, imagined = update.actor_gradient(policy.model.rssm.initial(T * B), noise(H))
    assert [g.shape for g in gradient.gradients] == [p.shape for p in policy.actor.parameters()]
    assert all(g.abs().max() > 0 for g in gradient.gradients)
    assert is_unchanged(policy, before) and not imagined.features.requires_grad
    assert all(p.grad is None and p.requires_grad for p in policy.parameters())


def test_frozen_parameters_thaw_after_an_error():
    policy = make()
    update = DreamerUpdate(policy, SETTINGS)
    with pytest.raises(ValueError, match="at least 2 imagined states"):
        update.actor_gradient(policy.model.rssm.initial(T * B), noise(1))
    assert all(p.requires_grad for p in policy.parameters())


def test_the_model_learns_from_its_own_loss_only():
    """The model is bit-identical whatever the estimator, the horizon and the critic."""
    outcomes = []
    for name, scale in (("rp", 1.0), ("lr", 1.0), ("tpx", 2.0)):
        policy = make()
        with torch.no_grad():
            for p in [*policy.critic.parameters(), *policy.actor.parameters()]:
                p.mul_(scale)
        DreamerUpdate(policy, replace(SETTINGS, estimator=estimators.make(name)))(
            batch(), generator(5)
        )
        outcomes.append(policy)
    first, *others = outcomes
    for other in others:
        assert is_unchanged(other.model, values_of(first.model))
        assert not is_unchanged(other.actor, values_of(first.actor))
    assert is_unchanged(others[0].critic, values_of(first.critic))  # LR's returns are RP's


# Starts


@pytest.fixture
def spied_starts(monkeypatch):
    """The states that imagination starts from."""
    found = []

    def spy(policy, start, *args, **kwargs):
        found.append(start)
        return imagine(policy, start, *args, **kwargs)

    monkeypatch.setattr(dreamer_update, "imagine", spy)
    return found


@pytest.mark.parametrize(
    ("wanted", "n"), [(0, T * B), (7, 7), (T * B, T * B), (T * B + 1, T * B), (1, 1)]
)
def test_imagination_starts_from_different_posterior_states(wanted, n, spied_starts):
    policy, data = make(), batch()
    data.is_terminal[:] = False
    noise = torch.randn(T, B, policy.model.rssm.stoch_size, generator=generator(5))
    states, _, _ = policy.model.rssm.observe(
        policy.model.encoder(data.observation), data.action, data.is_first, noise
    )
    posterior = [tuple(row.tolist()) for row in states.features.flatten(0, 1)]
    assert len(set(posterior)) == T * B
    estimator = estimators.make("tpx" if n > 1 else "rp")
    settings = replace(SETTINGS, imagination_starts=wanted, estimator=estimator)
    DreamerUpdate(policy, settings)(data, generator(5))
    (start,) = spied_starts
    assert not start.deter.requires_grad and not start.stoch.requires_grad
    rows = [tuple(row.tolist()) for row in start.features]
    assert len(rows) == len(set(rows)) == n and set(rows) <= set(posterior)


@pytest.mark.parametrize("discount_head", [False, True])
@pytest.mark.parametrize("wanted", [0, 10])
def test_imagination_starts_from_no_terminal_state(wanted, discount_head, spied_starts):
    """Windows of a replay whose every episode terminates after 4 entries, shorter than a window."""
    replay, rng = SequenceReplay(90, (OBSERVATION,), np.float32, A), np.random.default_rng(0)
    replay.start(rng.normal(size=(1, OBSERVATION)).astype("f4"))
    for t in range(1, 75):
        action, seen, end = rng.normal(size=(3, 1, OBSERVATION)).astype("f4")
        infos = [{"terminal_observation": end[0]}]
        replay.step(action[:, :A], seen, np.ones(1), np.array([t % 3 == 0]), infos)
    data = replay.sample(B, T, rng)
    assert data.is_terminal[1:-1].any() and not data.is_terminal.all(0).any()
    for seed in range(5):
        policy = make(discount_head=discount_head)
        noise = torch.randn(T, B, policy.model.rssm.stoch_size, generator=generator(seed))
        states, _, _ = policy.model.rssm.observe(
            policy.model.encoder(data.observation), data.action, data.is_first, noise
        )
        alive = {tuple(row.tolist()) for row in states.features[~data.is_terminal]}
        settings = replace(SETTINGS, imagination_starts=wanted)
        DreamerUpdate(policy, settings)(data, generator(seed))
        rows = [tuple(row.tolist()) for row in spied_starts[-1].features]
        assert len(rows) == (wanted or T * B)
        assert set(rows) <= alive
        assert len(set(rows)) == min(len(rows), len(alive))  # none twice while others are left


@pytest.mark.parametrize("wanted", [0, 3, 4, 12])
def test_each_state_that_is_not_terminal_is_equally_likely_to_be_a_start(wanted):
    """Of 6 states, 4 are alive; in N = 4000 draws of n starts each, 4 standard errors at most.

    A state is drawn floor(n / 4) times, and once more with probability (n mod 4) / 4.
    """
    is_terminal = torch.tensor([[False, True], [True, False], [False, False]])
    source, draws = generator(0), 4000
    rows = torch.stack([draw_starts(is_terminal, wanted, source) for _ in range(draws)])
    n = min(wanted, 6) if wanted else 6
    assert rows.shape == (draws, n)
    counts = rows.flatten().bincount(minlength=6).view(3, 2)
    assert not counts[is_terminal].any()
    p = n % 4 / 4
    tolerance = 4 * math.sqrt(p * (1 - p) * draws)
    assert (counts[~is_terminal] - draws * n / 4).abs().max() <= tolerance


@pytest.mark.parametrize(("share", "wanted"), [(1, 6), (0.5, 3), (0.26, 2), (0.01, 1)])
def test_each_image_is_equally_likely_to_be_decoded(share, wanted):
    """In N = 4000 draws of M of 6 indices, 4 standard errors at most; none comes twice."""
    source, draws = generator(0), 4000
    rows = torch.stack([draw_share(6, share, source) for _ in range(draws)])
    assert rows.shape == (draws, wanted)
    assert all(len(row.unique()) == wanted for row in rows)
    p = wanted / 6
    counts = rows.flatten().bincount(minlength=6)
    assert (counts - p * draws).abs().max() <= 4 * math.sqrt(p * (1 - p) * draws)


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_decodes_the_share_of_images_it_is_told(kind):
    """Without images there is nothing to leave out, and the update is the same, bit for bit."""
    data, records = batch_of(kind), []
    for share in (1.0, 0.5):
        update = DreamerUpdate(sized(kind), replace(SETTINGS, decoded_share=share))
        decoded = update._draw(data, generator(1)).decoded
        if share == 1 or kind == "vector":
            assert decoded is None
        else:
            assert len(decoded) == T * B / 2
        records.append(update(data, generator(1)).scalars)
    whole, half = records
    if kind == "vector":
        assert_same_scalars(whole, half)
    else:
        assert whole["observation_loss"] != half["observation_loss"]
        assert whole["kl"] == half["kl"]


def test_an_unused_discount_head_changes_nothing_and_learns_nothing():
    """Until an episode terminates, the update is that of a model without the head, bit for bit."""
    data = batch()
    data.is_terminal[:] = False
    off = replace(
        SETTINGS,
        imagination=replace(SETTINGS.imagination, learned_discount=False),
        model=SETTINGS.model._replace(learned_discount=False),
    )
    without, unused = make(), make(discount_head=True)
    unused.load_state_dict(without.state_dict(), strict=False)
    head = values_of(unused.model.discount_head)
    update, other = DreamerUpdate(without, SETTINGS), DreamerUpdate(unused, off)
    for seed in (5, 6):
        records = [u(data, generator(seed)) for u in (update, other)]
        assert_same_scalars(*(record.scalars for record in records))
    for name, value in without.state_dict().items():
        assert torch.equal(unused.state_dict()[name], value), name
    assert is_unchanged(unused.model.discount_head, head)
    # Once in use, it starts to learn with fresh moments: Adam's first step.
    other.configure(SETTINGS)
    other(data, generator(7))
    moments = other.model_optimizer.state
    steps = {int(moments[p]["step"]) for p in unused.model.discount_head.parameters()}
    assert steps == {1} and not is_unchanged(unused.model.discount_head, head)


def test_an_untrained_discount_head_says_that_episodes_continue():
    torch.manual_seed(0)
    policy = DreamerPolicy(
        spaces.Box(-1, 1, (OBSERVATION,)), spaces.Box(-1, 1, (A,)), discount_head=True
    )
    found = policy.model.discount(randn(1000, 230, seed=0))
    assert 0.97 < found.median() < 1


def test_the_subset_of_starts_is_drawn_from_the_generator(spied_starts):
    settings = replace(SETTINGS, imagination_starts=7)
    for seed in (5, 5, 6):
        policy = make()
        DreamerUpdate(policy, settings)(batch(), generator(seed))
    first, second, other = (start.deter for start in spied_starts)
    assert torch.equal(first, second) and not torch.equal(first, other)


# Seeds


@pytest.mark.parametrize("name", ["tpx", "tpg", "ivw"])
def test_same_seed_gives_the_same_update(name):
    """Bit-identical, whatever was drawn from the global generator."""
    settings = replace(SETTINGS, estimator=estimators.make(name), imagination_starts=7)
    outcomes = []
    for seed in (5, 5, 6):
        policy = make()
        update, source = DreamerUpdate(policy, settings), generator(seed)
        records = [update(batch(10 * i), source) for i in range(2)]
        torch.rand(3)
        outcomes.append((policy, records[-1]))
    (first, record), (second, same), (other, _) = outcomes
    assert is_unchanged(second, values_of(first)) and not is_unchanged(other, values_of(first))
    for key, value in record.scalars.items():
        assert torch.equal(value, same.scalars[key])
    assert torch.equal(record.k, same.k)


# Clipping, and gradients that are not finite


@pytest.mark.parametrize("max_grad_norm", [0.3, 1000.0])
def test_gradients_are_clipped_by_their_global_norm(max_grad_norm):
    """With plain gradient descent, the step is the clipped gradient itself."""
    parameters = [torch.nn.Parameter(randn(*s, seed=1)) for s in ((4, 3), (5,))]
    gradients = [3 * randn(*p.shape, seed=2) for p in parameters]
    before = [p.detach().clone() for p in parameters]
    update = DreamerUpdate(make(), replace(SETTINGS, max_grad_norm=max_grad_norm))
    norm = update._apply(torch.optim.SGD(parameters, 1.0, fused=True), parameters, gradients)
    expected = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    assert norm.item() == pytest.approx(expected, rel=1e-6)
    step = torch.cat([(b - p).flatten() for b, p in zip(before, parameters, strict=True)]).detach()
    direction = torch.cat([g.flatten() for g in gradients])
    scale = min(1.0, max_grad_norm / expected)
    torch.testing.assert_close(step, scale * direction, rtol=1e-5, atol=1e-5)
    assert step.norm().item() == pytest.approx(min(max_grad_norm, expected), rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    """The next update is as if there had been no bad one; Adam keeps no trace of it either."""
    policy = make()
    update, before = DreamerUpdate(policy, SETTINGS), values_of(policy)
    with torch.no_grad():
        policy.model.reward_head[-1].bias.fill_(bad)
    record = update(batch(), generator(5))
    assert not any(
        torch.isfinite(record.scalars[f"{part}_gradient_norm"]) for part in parts(policy)
    )
    assert record.scalars["skipped_steps"] == 3
    with torch.no_grad():
        policy.model.reward_head[-1].bias.copy_(make().model.reward_head[-1].bias)
    assert is_unchanged(policy, before)
    assert all(p.grad is None for p in policy.parameters())
    update(batch(), generator(6))
    fresh = make()
    DreamerUpdate(fresh, SETTINGS)(batch(), generator(6))
    assert is_unchanged(policy, values_of(fresh))


def test_a_range_of_returns_that_is_not_finite_is_left_out():
    """It divides all later gradients of the actor; no update would repair it."""
    settings = replace(SETTINGS, imagination=replace(SETTINGS.imagination, scale_returns=True))
    policy = make()
    update, bias = DreamerUpdate(policy, settings), policy.model.reward_head[-1].bias
    update(batch(), generator(5))
    kept, good = policy.return_range.clone(), bias.detach().clone()
    for bad in (math.nan, math.inf):
        with torch.no_grad():
            bias.fill_(bad)
        update(batch(), generator(6))
        with torch.no_grad():
            bias.copy_(good)
        assert torch.equal(policy.return_range, kept) and kept > 0
    assert update(batch(), generator(7)).scalars["skipped_steps"] == 0
    assert policy.return_range != kept


def test_one_bad_loss_does_not_stop_the_others():
    """A NaN reward affects only the model: imagination does not use rewards of the batch."""
    policy, data = make(), batch()
    before = {name: values_of(part) for name, part in parts(policy).items()}
    data.reward[2, 1] = math.nan
    DreamerUpdate(policy, SETTINGS)(data, generator(5))
    assert is_unchanged(policy.model, before["model"])
    assert not is_unchanged(policy.actor, before["actor"])
    assert not is_unchanged(policy.critic, before["critic"])


def test_learning_rate_is_of_actor_and_critic():
    policy = make()
    update, before = DreamerUpdate(policy, SETTINGS), values_of(policy.model)
    kept = values_of(policy.actor), values_of(policy.critic)
    update.set_learning_rate(0.0)
    update(batch(), generator(5))
    assert is_unchanged(policy.actor, kept[0]) and is_unchanged(policy.critic, kept[1])
    assert not is_unchanged(policy.model, before)


# Precision


@pytest.mark.parametrize("name", ["rp", "tpx", "tps", "ivw"])
def test_bf16_updates_float32_weights_with_float32_losses(name):
    """Close to the float32 update: bfloat16 has 8 bits."""
    records = []
    for bf16 in (False, True):
        policy = make()
        settings = replace(SETTINGS, estimator=estimators.make(name), bf16=bf16)
        records.append(DreamerUpdate(policy, settings)(batch(), generator(5)))
        assert all(p.dtype == torch.float32 for p in policy.parameters())
    for key, value in records[0].scalars.items():
        found = records[1].scalars[key]
        assert found.dtype == torch.float32, key
        torch.testing.assert_close(found, value, rtol=0.1, atol=0.1)
    assert records[0].scalars["model_loss"] != records[1].scalars["model_loss"]


# CUDA graphs


# What the presets switch on, together: networks, and settings of an update.
REMEDIES = {
    "layer_norm": True, "reward_head": "two-hot", "critic_head": "two-hot", "slow_critic": True,
    "slow_actor": True,
}  # fmt: skip
REMEDIED = replace(
    SETTINGS,
    imagination=replace(SETTINGS.imagination, scale_returns=True),
    model=SETTINGS.model._replace(representation_scale=0.2),
    imagination_starts=7,
    slow_critic_rate=0.25,
    slow_actor_rate=0.25,
)


def at_node(settings, node):
    return replace(settings, imagination=replace(settings.imagination, node=node))


class HostConstants(TorchFunctionMode):
    """Tensors made from Python's numbers: on a GPU, the host waits until they are copied."""

    NAMES = ("tensor", "as_tensor", "new_tensor", "from_numpy")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.NAMES:
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


class HostSyncs(TorchDispatchMode):
    """Operators that make the host wait for the GPU; a CUDA graph must not contain any."""

    NAMES = ("local_scalar", "nonzero", "check_errors", "equal.", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in str(func) for name in self.NAMES):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("baseline", ["leave_one_out", "critic"])
@pytest.mark.parametrize("name", estimators.names())
def test_an_update_never_waits_for_its_results(name, baseline):
    estimator = estimators.make(name, baseline=getattr(estimators.baselines, baseline))
    settings = replace(SETTINGS, estimator=estimator, imagination_starts=7)
    update = DreamerUpdate(make(discount_head=True), settings)
    with HostSyncs() as syncs:
        record = update(batch(), generator(5))
        assert syncs.found == []
        float(record.k.mean())
    assert syncs.found  # the spy sees what it is after


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("remedies", [{}, REMEDIES], ids=["v1", "remedies"])
def test_an_update_copies_nothing_from_the_host(remedies, kind):
    update = DreamerUpdate(sized(kind, **remedies), REMEDIED if remedies else SETTINGS)
    with HostConstants() as constants, HostSyncs() as syncs:
        update(batch_of(kind), generator(5))
        assert constants.found == syncs.found == []
        torch.zeros(2).new_tensor([1.0])
    assert constants.found == ["new_tensor"]  # the spy sees what it is after


@pytest.mark.parametrize("name", ["rp", "lr", "tpx", "ivw"])
@pytest.mark.parametrize("node", ["action", "both"])
@pytest.mark.parametrize("kind", ["vector", "mixed"])
def test_a_node_at_the_action_waits_for_nothing(kind, node, name):
    settings = replace(at_node(REMEDIED, node), estimator=estimators.make(name))
    update = DreamerUpdate(sized(kind, **REMEDIES), settings)
    with HostConstants() as constants, HostSyncs() as syncs:
        update(batch_of(kind), generator(5))
    assert constants.found == syncs.found == []


def test_an_update_draws_all_random_numbers_before_it_begins(monkeypatch):
    update = DreamerUpdate(make(), replace(SETTINGS, imagination_starts=7))
    source, seen = generator(5), []
    monkeypatch.setattr(
        update, "_step", lambda data, noise, measure: seen.append((noise, source.get_state()))
    )
    update(batch(), source)
    ((drawn, after),) = seen
    state = torch.get_rng_state()
    update._take_step(batch(), drawn)
    assert torch.equal(source.get_state(), after) and torch.equal(torch.get_rng_state(), state)


def test_another_optimiser_state_is_another_recording():
    """The old graph would keep the old moments; and the rate must remain a tensor."""
    update = DreamerUpdate(make(), replace(SETTINGS, cuda_graph=True))
    recorded = update._step
    for optimizer in (update.actor_optimizer, update.model_optimizer):
        state = optimizer.state_dict()
        state["param_groups"][0] |= {"lr": 0.125, "capturable": False}  # of an agent without
        optimizer.load_state_dict(state)
        (group,) = optimizer.param_groups
        assert isinstance(group["lr"], torch.Tensor) and group["lr"] == 0.125
        assert group["capturable"]
        assert isinstance(update._step, GraphedFunction) and update._step is not recorded
        recorded = update._step
    rate = update.actor_optimizer.param_groups[0]["lr"]
    update.set_learning_rate(0.25)
    assert update.actor_optimizer.param_groups[0]["lr"] is rate and rate == 0.25
    plain = DreamerUpdate(make(), SETTINGS)
    plain.actor_optimizer.load_state_dict(update.actor_optimizer.state_dict())
    (group,) = plain.actor_optimizer.param_groups
    assert type(group["lr"]) is float and not group["capturable"]


CHANGES = {
    "gamma": {"imagination": replace(SETTINGS.imagination, gamma=0.5)},
    "model": {"model": SETTINGS.model._replace(kl_scale=0.1, gamma=0.5)},
    "estimator": {"estimator": estimators.make("lr")},
    "steps": {"model_learning_rate": 0.05, "adam_eps": 1e-6},
    "starts": {"imagination_starts": 7, "horizon": 4},
    "compile": {"compile": True},
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_settings_count_from_the_next_step_on(name):
    """Two steps with the settings, and one with others, are what updates of their own do."""
    others = replace(SETTINGS, **CHANGES[name])
    one, two = make(discount_head=True), make(discount_head=True)
    update, first = DreamerUpdate(one, SETTINGS), DreamerUpdate(two, SETTINGS)
    for seed in (1, 2):
        update(batch(seed), generator(seed)), first(batch(seed), generator(seed))
    update.configure(others)
    second = DreamerUpdate(two, others)
    for optimizer in ("model_optimizer", "actor_optimizer", "critic_optimizer"):
        moments = getattr(first, optimizer).state_dict()["state"]
        groups = getattr(second, optimizer).state_dict()["param_groups"]
        getattr(second, optimizer).load_state_dict({"state": moments, "param_groups": groups})
    update(batch(3), generator(3)), second(batch(3), generator(3))
    assert is_unchanged(one, values_of(two))
    update.configure(SETTINGS)  # and back again
    if name == "compile":
        rssm = type(one.model.rssm)
        assert one.model.rssm.recur.__func__ is rssm.recur
        assert one.actor.hidden._compiled_call_impl is None


@pytest.mark.gpu
@pytest.mark.parametrize("name", estimators.names())
def test_an_update_as_cuda_graph_equals_the_eager_one(name):
    """Before, at and after the recording, with a change of rate, then of settings, in between."""
    policies, records = [], []
    for cuda_graph in (False, True):
        policy = make(discount_head=True).to("cuda")
        settings = replace(SETTINGS, estimator=estimators.make(name), cuda_graph=cuda_graph)
        update, source = DreamerUpdate(policy, settings), torch.Generator("cuda").manual_seed(5)
        for i in range(2 * EAGER_CALLS + 6):
            if i == EAGER_CALLS + 1:
                update.set_learning_rate(5e-4)
            if i == EAGER_CALLS + 3:
                other = replace(settings.imagination, gamma=0.5)
                update.configure(replace(settings, imagination=other, adam_eps=1e-2))
            data = SequenceBatch(*(x.to("cuda") for x in batch(10 * i)))
            records.append(update(data, source))
        policies.append(policy)
    eager, graphed = (records[: len(records) // 2], records[len(records) // 2 :])
    for one, other in zip(eager, graphed, strict=True):
        torch.testing.assert_close(other.scalars, one.scalars, rtol=1e-4, atol=1e-5)
    for p, q in zip(*(policy.parameters() for policy in policies), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"bf16": True}, {"compile": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_remedies_as_cuda_graph_equal_the_eager_ones(kind, changes):
    eager, graphed = (updated(kind, "cuda", cuda_graph=g, **changes) for g in (False, True))
    assert_alike(eager, graphed, loose=10 if "bf16" in changes else 1)


@pytest.fixture
def _without_tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
@pytest.mark.usefixtures("_without_tf32")
@pytest.mark.parametrize("kind", ["vector", "image"])
def test_the_remedies_on_a_gpu_equal_those_on_the_cpu(kind):
    source = generator(5)
    noise = UpdateNoise(
        torch.randn(T, B, SIZES["stoch"], generator=source),
        torch.randperm(T * B, generator=source)[:7],
        ImaginationNoise.draw(H, 7, A, GaussianLatents(SIZES["stoch"]), source),
    )
    records = []
    for device in ("cpu", "cuda"):
        policy = sized(kind, discount_head=True, **REMEDIES).to(device)
        inputs = tree_map(
            lambda x, device=device: None if x is None else x.to(device), (batch_of(kind), noise)
        )
        record = DreamerUpdate(policy, REMEDIED)._take_step(*inputs)
        records.append({name: value.cpu() for name, value in record.scalars.items()})
    torch.testing.assert_close(records[1], records[0], rtol=1e-4, atol=1e-5)


class Updated(NamedTuple):
    records: list
    state: dict


def updated(kind, device, noise=0.0, **changes):
    """What updates record and leave: before, at and after a recording, and a change of settings."""
    policy = sized(kind, discount_head=True, **REMEDIES).to(device)
    settings = replace(at_node(REMEDIED, "both" if kind == "mixed" else "latent"), **changes)
    update, source = DreamerUpdate(policy, settings), torch.Generator(device).manual_seed(5)
    records = []
    for i in range(2 * EAGER_CALLS + 6):
        if i == EAGER_CALLS + 3:
            imagination = replace(settings.imagination, gamma=0.5)
            rate = settings.slow_critic_rate / 2
            update.configure(
                replace(
                    settings, imagination=imagination, slow_critic_rate=rate, slow_actor_rate=rate
                )
            )
        data = batch_of(kind, 10 * i)
        data = data._replace(reward=(1 + noise) * data.reward)
        records.append(update(tree_map(lambda x: x.to(device), data), source))
    return Updated(records, dict(policy.state_dict()))


def assert_alike(one, other, loose=1):
    """Up to round-off, records and state, the slow critic and the range of returns included."""
    for first, second in zip(one.records, other.records, strict=True):
        rtol, atol = loose * 1e-4, loose * 1e-5
        torch.testing.assert_close(second.scalars, first.scalars, rtol=rtol, atol=atol)
    assert one.state.keys() == other.state.keys()
    for name, value in one.state.items():
        found = other.state[name]
        close = torch.isclose(found, value, rtol=loose * 1e-4, atol=loose * 2e-5)
        assert close.all(), f"{name} differs by {float((found - value).abs().max()):.2g}"


@pytest.mark.parametrize("kind", KINDS)
def test_round_off_does_not_grow_over_those_updates(kind):
    """So that the tolerance of the comparison on a GPU is one of round-off."""
    plain = updated(kind, "cpu")
    assert_alike(plain, updated(kind, "cpu", noise=1e-6))
    for name in ("slow_critic", "slow_actor"):  # a stale rate would be found
        with pytest.raises(AssertionError, match=name):
            assert_alike(plain, updated(kind, "cpu", **{f"{name}_rate": 0.3}))


def test_an_update_moves_the_slow_critic_and_the_range_of_returns():
    policy = make(slow_critic=True, critic_head="two-hot", reward_head="two-hot", layer_norm=True)
    imagination = replace(SETTINGS.imagination, scale_returns=True)
    settings = replace(SETTINGS, slow_critic_rate=0.25, imagination=imagination)
    before = values_of(policy.slow_critic)
    update = DreamerUpdate(policy, settings)
    record = update(batch(), generator(0))
    after = zip(policy.slow_critic.parameters(), before, policy.critic.parameters(), strict=True)
    for slow, old, fast in after:
        torch.testing.assert_close(slow, 0.75 * old + 0.25 * fast)
    assert float(record.scalars["return_range"]) == float(policy.return_range) > 0
    assert all(torch.isfinite(value) for value in record.scalars.values())
