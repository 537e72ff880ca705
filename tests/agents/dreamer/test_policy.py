"""DreamerTPX's policy: a recurrent `predict` that filters like the world model in training."""

import random

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch.distributions import Normal, TanhTransform

from totalprop.agents.dreamer.policy import Actor, DreamerPolicy

LOW, HIGH = np.array([-2.0, 0.0], np.float32), np.array([4.0, 1.0], np.float32)
SIZES = {"deter": 8, "hidden": 8, "width": 8, "stoch": 4, "conv_depth": 2}
VECTOR = spaces.Box(-10, 10, (3,), np.float32)
IMAGE = spaces.Box(0, 255, (3, 64, 64), np.uint8)
RNG = np.random.default_rng(0)


def make(observation=VECTOR, action=None, seed=0, **changes):
    """A policy whose actions depend strongly on its inputs; those of a fresh one hardly do."""
    torch.manual_seed(seed)
    action = spaces.Box(LOW, HIGH) if action is None else action
    policy = DreamerPolicy(observation, action, **{**SIZES, **changes})
    with torch.no_grad():
        for parameter in [*policy.actor.parameters(), *policy.model.rssm.parameters()]:
            parameter.mul_(2).add_(0.3 * torch.randn_like(parameter))
    return policy


def draw(space, *shape):
    """Observations, batched by `shape`."""
    if space.dtype == np.uint8:
        return RNG.integers(0, 256, (*shape, *space.shape), dtype=np.uint8)
    return RNG.uniform(-3, 3, (*shape, *space.shape)).astype(space.dtype)


def follow(policy, observations, starts=None, **kwargs):
    """Actions [T, n, A] and last state of consecutive calls of predict."""
    actions, state = [], None
    for t, observation in enumerate(observations):
        start = None if starts is None else starts[t]
        action, state = policy.predict(observation, state, start, **kwargs)
        actions.append(action)
    return np.stack(actions), state


def assert_same(state, other, rows=slice(None)):
    for part, expected in zip(state, other, strict=True):
        np.testing.assert_array_equal(part[rows], expected[rows])


# The state


@pytest.mark.parametrize("space", [VECTOR, IMAGE], ids=["vector", "image"])
def test_state_is_deter_stoch_and_the_previous_action(space):
    policy = make(space)
    actions, state = policy.predict(draw(space, 3), deterministic=True)
    assert isinstance(state, tuple) and all(type(part) is np.ndarray for part in state)
    assert [part.shape for part in state] == [(3, 8), (3, 4), (3, 2)]
    assert all(part.dtype == np.float32 for part in state)
    np.testing.assert_allclose(LOW + (HIGH - LOW) * (state[2] + 1) / 2, actions, atol=1e-6)


@pytest.mark.parametrize("space", [VECTOR, IMAGE], ids=["vector", "image"])
def test_predict_filters_as_the_model_is_trained(space):
    """Six steps with an episode start in the middle, against `RSSM.observe` on the same data."""
    policy, (T, n) = make(space), (6, 3)
    observations = draw(space, T, n)
    starts = np.zeros((T, n), bool)
    starts[0] = starts[3, 1] = True
    actions, state = follow(policy, observations, starts, deterministic=True)
    scaled = policy.scale_action(actions)
    previous = np.concatenate([np.zeros((1, n, 2)), scaled[:-1]]).astype(np.float32)
    with torch.no_grad():
        states, _, posterior = policy.model.rssm.observe(
            policy.model.encoder(torch.from_numpy(observations)),
            torch.from_numpy(previous),
            torch.from_numpy(starts),
            torch.zeros(T, n, 4),
        )
        expected, _ = policy.actor.act(policy.actor(states.features), None)
    np.testing.assert_allclose(scaled, expected, atol=2e-5)
    np.testing.assert_allclose(state[0], states.deter[-1], atol=2e-5)
    np.testing.assert_allclose(state[1], posterior.mean[-1], atol=2e-5)
    assert np.ptp(actions, axis=(0, 1)).min() > 0.01


def test_none_is_the_state_of_a_new_episode():
    policy, observation = make(), draw(VECTOR, 3)
    fresh, state = policy.predict(observation, deterministic=True)
    zeros = tuple(np.zeros_like(part) for part in state)
    same, other = policy.predict(observation, zeros, deterministic=True)
    np.testing.assert_array_equal(fresh, same)
    assert_same(state, other)


def test_episode_start_resets_its_rows_and_no_others():
    policy, observations = make(), draw(VECTOR, 4, 3)
    _, state = follow(policy, observations[:3], deterministic=True)
    some, after = policy.predict(
        observations[3], state, np.array([True, False, True]), deterministic=True
    )
    fresh, fresh_state = policy.predict(observations[3], deterministic=True)
    kept, kept_state = policy.predict(observations[3], state, np.zeros(3, bool), deterministic=True)
    np.testing.assert_array_equal(some, np.stack([fresh[0], kept[1], fresh[2]]))
    assert_same(after, fresh_state, [0, 2])
    assert_same(after, kept_state, [1])
    assert np.abs(fresh - kept).max(1).min() > 1e-4  # the memory matters


@pytest.mark.parametrize("starts", [[True], [True, False], np.ones((2, 2), bool)])
def test_episode_starts_of_another_number_are_refused(starts):
    policy, observations = make(), draw(VECTOR, 1, 3)
    with pytest.raises(ValueError, match="one entry for each of 3 observations, got"):
        policy.predict(observations[0], None, starts)


def test_a_state_of_other_parts_is_refused():
    policy, observations = make(), draw(VECTOR, 2, 3)
    _, state = policy.predict(observations[0])
    with pytest.raises(ValueError, match="what predict returned, three arrays, got 2"):
        policy.predict(observations[1], state[:2])


def test_episode_start_none_keeps_every_row():
    policy, observations = make(), draw(VECTOR, 2, 3)
    _, state = policy.predict(observations[0], deterministic=True)
    none, after = policy.predict(observations[1], state, None, deterministic=True)
    false, other = policy.predict(observations[1], state, np.zeros(3, bool), deterministic=True)
    np.testing.assert_array_equal(none, false)
    assert_same(after, other)


@pytest.mark.parametrize("index", [0, 1, 2], ids=["deter", "stoch", "action"])
def test_every_part_of_the_state_matters(index):
    policy, observations = make(), draw(VECTOR, 2, 3)
    _, state = policy.predict(observations[0], deterministic=True)
    changed = [part.copy() for part in state]
    changed[index] = -changed[index]
    action, _ = policy.predict(observations[1], state, deterministic=True)
    other, _ = policy.predict(observations[1], tuple(changed), deterministic=True)
    assert not np.array_equal(action, other)


def test_input_state_is_neither_changed_nor_returned():
    policy, observations = make(), draw(VECTOR, 2, 3)
    _, state = policy.predict(observations[0])
    before = [part.copy() for part in state]
    for part in state:
        part.flags.writeable = False  # as a caller may: no warning, no error
    _, after = policy.predict(observations[1], state, np.array([True, False, False]))
    assert_same(state, before)
    assert not any(np.shares_memory(a, b) for a in state for b in after)


def test_changing_the_returned_action_does_not_change_the_state():
    policy = make(action=spaces.Box(-1.0, 1.0, (2,)))  # where units are the scaled ones
    action, state = policy.predict(draw(VECTOR, 3))
    assert not np.shares_memory(action, state[2])


@pytest.mark.parametrize("n", [1, 2, 5])
def test_number_of_environments_is_free_but_must_agree_with_the_state(n):
    policy = make()
    _, state = policy.predict(draw(VECTOR, n))
    assert len(state[0]) == n
    with pytest.raises(ValueError, match=f"state is of {n} environments, observation of 7; pass"):
        policy.predict(draw(VECTOR, 7), state)


@pytest.mark.parametrize("space", [VECTOR, IMAGE], ids=["vector", "image"])
def test_single_observation_is_a_batch_of_one(space):
    policy, observations = make(space), draw(space, 2, 3)
    batch, batch_state = follow(policy, observations, deterministic=True)
    for row in range(3):
        single, state = follow(policy, observations[:, row], deterministic=True)
        assert single.shape == (2, 2) and [len(part) for part in state] == [1, 1, 1]
        np.testing.assert_allclose(single, batch[:, row], atol=1e-5)
        np.testing.assert_allclose(state[0][0], batch_state[0][row], atol=1e-5)
    with pytest.raises(ValueError, match="state is of 3 environments, observation of 1"):
        policy.predict(observations[0, 0], batch_state)


# Observations


@pytest.mark.parametrize("n", [0, 3], ids=["single", "batch"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_may_be_channel_last_and_flipped(n, channels):
    """Renderers return views with negative strides, which torch does not accept."""
    space = spaces.Box(0, 255, (channels, 64, 64), np.uint8)
    policy, image = make(space), draw(space, *([n] if n else []))
    expected, state = policy.predict(image, deterministic=True)
    last = np.moveaxis(image, -3, -1)
    flipped = np.ascontiguousarray(last[..., ::-1, :, :])[..., ::-1, :, :]
    assert min(flipped.strides) < 0
    for view in (last, np.ascontiguousarray(last), flipped):
        action, other = policy.predict(view, deterministic=True)
        np.testing.assert_array_equal(action, expected)
        assert_same(state, other)
    upside_down, _ = policy.predict(last[..., ::-1, :, :], deterministic=True)
    assert not np.array_equal(upside_down, expected)


def test_gym_style_tuples_are_refused():
    with pytest.raises(
        ValueError, match=r"mixing Gym API.*\(observation, info\).*the observation alone"
    ):
        make().predict((draw(VECTOR), {}))


@pytest.mark.parametrize("shape", [(4,), (2, 4), (2, 2, 3)])
def test_observations_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="observation shape"):
        make().predict(np.zeros(shape, np.float32))


def test_matrices_are_flat_in_the_networks_and_whole_outside():
    matrix = spaces.Box(-10, 10, (2, 3), np.float64)
    actions = spaces.Box(-np.ones((2, 2)), np.array([[1.0, 2.0], [3.0, 4.0]]), dtype=np.float64)
    policy = make(matrix, actions)
    flat = make(spaces.Box(-10, 10, (6,)), spaces.Box(-1, 1, (4,)))
    flat.load_state_dict(policy.state_dict())
    observations = draw(matrix, 5)
    found, state = policy.predict(observations, deterministic=True)
    assert found.shape == (5, 2, 2) and found.dtype == np.float64 and state[2].shape == (5, 4)
    assert policy.predict(observations[0])[0].shape == (2, 2)
    expected, _ = flat.predict(observations.reshape(5, 6).astype(np.float32), deterministic=True)
    np.testing.assert_allclose(policy.scale_action(found).reshape(5, 4), expected, atol=1e-5)


# Actions


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("deterministic", [True, False])
def test_actions_have_the_spaces_units_and_dtype(dtype, deterministic):
    space = spaces.Box(LOW.astype(dtype), HIGH.astype(dtype), dtype=dtype)
    actions, _ = make(action=space).predict(draw(VECTOR, 100), deterministic=deterministic)
    assert actions.dtype == dtype and all(space.contains(action) for action in actions)


def test_scaled_actions_become_the_environments_and_never_leave_its_bounds():
    """Bounds like 0.1 are not exact in float32: low + (high - low) may pass high."""
    space = spaces.Box(np.array([-0.1, 0.3], np.float32), np.array([0.7, 0.9], np.float32))
    policy = make(action=space)
    scaled = np.array([[-1, -1], [1, 1], [0, 0], [-0.5, 0.5]], np.float32)
    actions = policy.to_env(scaled)
    expected = [[-0.1, 0.3], [0.7, 0.9], [0.3, 0.6], [0.1, 0.75]]
    np.testing.assert_allclose(actions, expected, atol=1e-6)
    # A generator of its own: with the shared one, the draws depend on the tests before.
    rng = np.random.default_rng(1)
    many = policy.to_env(rng.uniform(-1.1, 1.1, (1000, 2)).astype(np.float32))
    assert all(space.contains(action) for action in many)
    assert (many[:, 0] == space.high[0]).any() and (many[:, 1] == space.low[1]).any()


def test_deterministic_draws_nothing_and_repeats_itself():
    policy, observations = make(), draw(VECTOR, 3, 4)
    np.random.seed(0)
    random.seed(0)
    before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    first, _ = follow(policy, observations, deterministic=True)
    second, _ = follow(policy, observations, deterministic=True)
    np.testing.assert_array_equal(first, second)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (str(np.random.get_state()), random.getstate()) == before[1:]


def test_stochastic_actions_differ_and_follow_the_global_seed():
    policy, observations = make(), draw(VECTOR, 1, 4)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(follow(policy, observations)[0])
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


def test_stochastic_latents_and_actions_have_the_models_distributions():
    """One observation n = 4000 times, seed 0: moments and quantiles within 4 standard errors."""
    policy, n = make(), 4000
    with torch.no_grad():  # an actor that says the same in every state
        policy.actor.out.weight.zero_()
        policy.actor.out.bias.copy_(torch.tensor([0.2, -0.3, -5.0, -4.0]))
    observation = np.repeat(draw(VECTOR, 1), n, axis=0)
    torch.manual_seed(0)
    _, (_, stoch, action) = policy.predict(observation)
    with torch.no_grad():
        deter = policy.model.rssm.recur(*policy.initial_state(1))
        embed = policy.model.encoder(torch.from_numpy(observation[:1]))
        mean, std = (x[0].numpy() for x in policy.model.rssm.posterior(deter, embed))
    assert (np.abs(stoch.mean(0) - mean) < 4 * std / n**0.5).all()
    assert (np.abs(stoch.std(0) / std - 1) < 4 / (2 * n) ** 0.5).all()
    mean = 5 * np.tanh(np.array([0.2, -0.3]) / 5)
    std = np.log1p(np.exp(np.array([-5.0, -4.0]) + np.log(np.expm1(5.0)))) + 1e-4
    for deviations, share in ((-1, 0.158655), (0, 0.5), (1, 0.841345)):
        found = (action < np.tanh(mean + deviations * std)).mean(0)
        assert (np.abs(found - share) < 4 * (share * (1 - share) / n) ** 0.5).all()


# The parts


def test_actor_at_zero_is_dreamer_v1s_first_policy():
    """danijar/dreamer, models.ActionDecoder: mean 5 tanh(raw / 5), std softplus(raw + c) = 5."""
    actor = Actor(3, 1, width=4)
    u = torch.tensor([[-1.5], [0.0], [0.7]])
    action, _ = actor.act(torch.zeros(3, 2), u / 5.0001)
    torch.testing.assert_close(action, u.tanh(), atol=1e-5, rtol=0)
    action, _ = actor.act(torch.tensor([[100.0, 0.0], [2.0, 0.0]]), None)
    expected = torch.tensor([[5.0], [5 * np.tanh(0.4)]]).float().tanh()
    torch.testing.assert_close(action, expected)


@pytest.mark.parametrize("std", [0.5, 1.0, 5.0])
def test_init_std_is_that_of_outputs_of_zero(std):
    actor = Actor(3, 2, width=4, init_std=std)
    noise = torch.tensor([[1.0, -0.3]])
    action, _ = actor.act(torch.zeros(1, 4), noise)
    torch.testing.assert_close(action, ((std + 1e-4) * noise).tanh())
    assert make(init_std=std).actor.std_shift == pytest.approx(np.log(np.expm1(std)))


def test_entropy_is_the_one_sample_estimate_of_a_squashed_gaussian():
    """-log p(a) with the Gaussian's own term in expectation, against torch.distributions."""
    actor = Actor(3, 2, width=4)
    raw = torch.randn(50, 4, dtype=torch.float64)
    noise = torch.randn(50, 2, dtype=torch.float64)
    _, entropy = actor.act(raw, noise)
    mean = 5 * (raw[:, :2] / 5).tanh()
    std = torch.nn.functional.softplus(raw[:, 2:] + np.log(np.expm1(5.0))) + 1e-4
    u = mean + std * noise
    slope = TanhTransform().log_abs_det_jacobian(u, u.tanh())
    torch.testing.assert_close(entropy, (Normal(mean, std).entropy() + slope).sum(-1))


def test_entropy_and_its_gradient_are_finite_where_the_tanh_is_flat():
    raw = torch.tensor([[1000.0, 5.0], [-1000.0, 5.0]], requires_grad=True)
    action, entropy = Actor(3, 1, width=4).act(raw, torch.ones(2, 1))
    (gradient,) = torch.autograd.grad(entropy.sum() + action.sum(), raw)
    assert torch.isfinite(entropy).all() and torch.isfinite(gradient).all()


def test_value_and_initial_state():
    policy = make()
    state, action = policy.initial_state(3)
    assert policy.value(state.features).shape == (3,)
    assert policy.value(torch.zeros(2, 3, 12)).shape == (2, 3)
    assert not any(part.any() for part in (*state, action)) and action.shape == (3, 2)


def test_feed_forward_use_says_what_to_call():
    policy = make()
    for call in (policy._predict, policy.forward):
        with pytest.raises(NotImplementedError, match="recurrent: call predict"):
            call(torch.zeros(1, 3))


@pytest.mark.parametrize("space", [VECTOR, IMAGE], ids=["vector", "image"])
def test_policy_can_be_saved_without_its_agent(space, tmp_path):
    policy = make(space, discount_head=True, vector_std=0.5)
    policy.save(str(tmp_path / "policy"))
    loaded = DreamerPolicy.load(str(tmp_path / "policy"), device="cpu")
    observations = draw(space, 2, 3)
    expected, state = follow(policy, observations, deterministic=True)
    found, other = follow(loaded, observations, deterministic=True)
    np.testing.assert_array_equal(found, expected)
    assert_same(state, other)
    assert loaded.model.discount_head is not None


# Remedies of DreamerV2 and V3


def test_the_slow_critic_follows_at_its_rate():
    """After two updates from s to fast critics f and g: 0.9 (0.9 s + 0.1 f) + 0.1 g."""
    policy = make(slow_critic=True)
    assert all(not p.requires_grad for p in policy.slow_critic.parameters())
    first = [p.clone() for p in policy.slow_critic.parameters()]
    moved = []
    with torch.no_grad():
        for _ in range(2):
            for p in policy.critic.parameters():
                p.add_(torch.randn_like(p))
            moved.append([p.clone() for p in policy.critic.parameters()])
            policy.follow(0.1, 0.5)
    for slow, s, f, g in zip(policy.slow_critic.parameters(), first, *moved, strict=True):
        torch.testing.assert_close(slow, 0.9 * (0.9 * s + 0.1 * f) + 0.1 * g)
    features = torch.randn(5, 12)
    slow, fast = policy.target_value(features), policy.value(features)
    torch.testing.assert_close(slow, policy.slow_critic(features).squeeze(-1))
    assert not torch.allclose(slow, fast)


def test_without_a_slow_critic_returns_are_bootstrapped_with_the_critic():
    policy, features = make(), torch.randn(5, 12)
    assert policy.slow_critic is None
    assert torch.equal(policy.target_value(features), policy.value(features))
    policy.follow(0.1, 0.1)  # nothing to move


def test_the_slow_actor_follows_at_its_rate_and_acts():
    """A slow actor that is still the first one predicts what the first one did."""
    policy, observation = make(slow_actor=True), np.ones((2, 3), np.float32)
    assert all(not p.requires_grad for p in policy.slow_actor.parameters())
    before, _ = policy.predict(observation, deterministic=True)
    first = [p.clone() for p in policy.slow_actor.parameters()]
    with torch.no_grad():
        for p in policy.actor.parameters():
            p.add_(torch.randn_like(p))
    assert np.array_equal(policy.predict(observation, deterministic=True)[0], before)
    policy.follow(0.5, 0.1)
    for slow, s, fast in zip(
        policy.slow_actor.parameters(), first, policy.actor.parameters(), strict=True
    ):
        torch.testing.assert_close(slow, 0.9 * s + 0.1 * fast)
    policy.follow(0.5, 1.0)
    copied, _ = policy.predict(observation, deterministic=True)
    policy.slow_actor = None
    assert np.array_equal(policy.predict(observation, deterministic=True)[0], copied)
    assert not np.allclose(copied, before)


def test_the_return_range_averages_percentiles():
    """Of 0 .. 100 it is 90, and of twice that 180: 0.99 x 0.9 + 1.8 after both."""
    policy, returns = make(), torch.arange(101.0).view(1, 101)
    policy.follow_returns(returns)
    assert float(policy.return_range) == pytest.approx(0.9)
    policy.follow_returns(2 * returns)
    assert float(policy.return_range) == pytest.approx(0.99 * 0.9 + 1.8)


def test_critics_with_two_hot_heads_start_at_zero():
    policy = make(critic_head="two-hot", reward_head="two-hot", slow_critic=True, layer_norm=True)
    features = torch.randn(5, 12)
    for value in (policy.value, policy.target_value, policy.model.reward):
        assert torch.equal(value(features), torch.zeros(5))
    norms = [type(m).__name__ for m in policy.actor.modules()].count("LayerNorm")
    assert norms == 4
