"""`MLPDynamics` and `TransitionBuffer`: targets, scales, a linear system, the ring buffer."""

import numpy as np
import pytest
import torch

from totalprop.world_models.mlp_dynamics import MLPDynamics, fit
from totalprop.world_models.transitions import UNKNOWN, TransitionBuffer

A = np.array([[0.9, 0.2], [-0.1, 0.8]], np.float32)
B = np.array([[0.0], [0.5]], np.float32)


def linear_data(n=400, scale=1.0, offset=0.0, reward_scale=1.0, seed=0):
    """A stable linear system; states times `scale` plus `offset`, rewards times `reward_scale`."""
    rng = np.random.default_rng(seed)
    states, actions = rng.normal(size=(n, 2)), rng.uniform(-1, 1, (n, 1))
    after, rewards = states @ A.T + actions @ B.T, states[:, 0] - actions[:, 0]
    buffer = TransitionBuffer(n, 2, 1)
    buffer.add(
        states * scale + offset, actions, rewards * reward_scale, after * scale + offset, False
    )
    return buffer


def trained(buffer, *, steps=400, **settings):
    torch.manual_seed(0)
    model = MLPDynamics(2, 1, **{"width": 32, **settings})
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = fit(model, optimizer, buffer, steps=steps, batch_size=64, rng=np.random.default_rng(0))
    return model, list(losses.values())


def errors(model, buffer):
    """Root mean squared errors of next states and rewards in the data's own units."""
    data = [torch.as_tensor(x) for x in buffer.sample(len(buffer), np.random.default_rng(0))]
    with torch.no_grad():
        after, reward = model(*data[:2])
    squares = (after - data[3]).square().mean(), (reward - data[2]).square().mean()
    return [float(x.sqrt()) for x in squares]


@pytest.mark.parametrize("target", ["delta", "next"])
@pytest.mark.parametrize("normalise", [True, False])
def test_learns_a_linear_system(target, normalise):
    model, losses = trained(linear_data(), target=target, normalise=normalise)
    fresh = linear_data(seed=1)
    transition, reward = errors(model, fresh)
    assert transition < 0.15 and reward < 0.15  # of a deviation of about 1
    assert max(losses) < 0.02


@pytest.mark.parametrize("target", ["delta", "next"])
def test_target_is_the_change_or_the_next_state(target):
    model = MLPDynamics(2, 1, width=4, target=target)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    states = torch.tensor([[1.0, 2.0]])
    after, reward = model(states, torch.tensor([[0.5]]))
    assert torch.equal(after, states if target == "delta" else torch.zeros(1, 2))
    assert reward.shape == (1,) and reward.item() == 0
    model.target_mean.copy_(torch.tensor([10.0, 20.0]))
    model.reward_mean.fill_(7.0)
    after, reward = model(states, torch.tensor([[0.5]]))
    expected = [[11.0, 22.0]] if target == "delta" else [[10.0, 20.0]]
    assert after.tolist() == expected and reward.item() == 7


@pytest.mark.parametrize("target", ["delta", "next"])
def test_scales_are_those_of_the_data(target):
    buffer = linear_data(scale=4.0, offset=100.0, reward_scale=9.0)
    model = MLPDynamics(2, 1, width=4, target=target)
    model.set_scale(buffer)
    targets = buffer.next_states - (buffer.states if target == "delta" else 0)
    for name, data in (("state", buffer.states), ("target", targets)):
        mean, std = getattr(model, f"{name}_mean"), getattr(model, f"{name}_std")
        np.testing.assert_allclose(mean, data.mean(0), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(std, data.std(0), rtol=1e-4)
    np.testing.assert_allclose(model.reward_std, buffer.rewards.std(), rtol=1e-4)


def test_scales_ignore_slots_that_are_not_filled():
    buffer = TransitionBuffer(1000, 2, 1)
    buffer.states[:], buffer.next_states[:], buffer.rewards[:] = 1e9, 1e9, 1e9
    part = linear_data(50)
    buffer.add(part.states, part.actions, part.rewards, part.next_states, part.terminated)
    model, reference = MLPDynamics(2, 1, width=4), MLPDynamics(2, 1, width=4)
    model.set_scale(buffer), reference.set_scale(part)
    for name, value in reference.named_buffers():
        assert torch.equal(dict(model.named_buffers())[name], value)


@pytest.mark.parametrize("target", ["delta", "next"])
def test_what_is_learned_does_not_depend_on_the_units(target):
    """It does with normalise=False."""
    plain, scaled = linear_data(), linear_data(scale=64.0, offset=32.0, reward_scale=0.25)
    model, losses = trained(plain, target=target, steps=40)
    other, other_losses = trained(scaled, target=target, steps=40)
    assert other_losses == pytest.approx(losses, rel=1e-2)
    (transition, reward), (t, r) = errors(model, plain), errors(other, scaled)
    assert t / 64 == pytest.approx(transition, rel=2e-2)
    assert r / 0.25 == pytest.approx(reward, rel=2e-2)
    raw = [trained(x, target=target, steps=40, normalise=False)[1][0] for x in (plain, scaled)]
    assert raw[1] > 10 * raw[0]


def test_normalise_false_leaves_the_units_alone():
    model, _ = trained(linear_data(scale=5.0), steps=2, normalise=False)
    for name, value in model.named_buffers():
        if name != "terminates":
            assert torch.equal(value, torch.full_like(value, float(name.endswith("std"))))


def test_constant_entries_are_not_divided_by_nothing():
    buffer = linear_data()
    buffer.states[:, 1] = buffer.next_states[:, 1] = 1e3
    buffer.rewards[:] = -2.0
    model, losses = trained(buffer)
    assert np.isfinite(losses).all()
    after, reward = model(torch.tensor([[0.0, 1e3]]), torch.zeros(1, 1))
    assert after[0, 1].item() == pytest.approx(1e3, abs=0.5)
    assert reward.item() == pytest.approx(-2.0, abs=0.2)


def test_losses_are_mean_squared_errors_in_the_units_of_the_targets():
    buffer = linear_data(scale=3.0)
    torch.manual_seed(0)
    model = MLPDynamics(2, 1, width=4)
    model.set_scale(buffer)
    data = [torch.as_tensor(x) for x in buffer.sample(10, np.random.default_rng(0))]
    after, reward = model(*data[:2])
    transition, reward_loss = model.losses(*data[:4])
    expected = ((after - data[3]) / model.target_std).pow(2).mean()
    torch.testing.assert_close(transition, expected)
    torch.testing.assert_close(reward_loss, ((reward - data[2]) / model.reward_std).pow(2).mean())


def test_gradients_reach_states_and_actions():
    torch.manual_seed(0)
    model = MLPDynamics(2, 1, width=8).double()
    model.state_std.fill_(2.0), model.target_std.fill_(3.0)
    states, actions = torch.randn(3, 2).double(), torch.randn(3, 1).double()
    states.requires_grad_(), actions.requires_grad_()
    assert torch.autograd.gradcheck(model, (states, actions))


def test_leading_axes_are_kept():
    model = MLPDynamics(2, 1, width=4)
    after, reward = model(torch.randn(5, 3, 2), torch.randn(5, 3, 1))
    assert after.shape == (5, 3, 2) and reward.shape == (5, 3)


def test_fit_takes_the_batches_of_its_generator_only():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    state = np.random.get_state()[1].copy()
    buffer, model = linear_data(), None
    with torch.random.fork_rng():
        model = MLPDynamics(2, 1, width=4)
    optimizer = torch.optim.Adam(model.parameters())
    fit(model, optimizer, buffer, steps=3, batch_size=8, rng=np.random.default_rng(0))
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state()[1], state)


# Offsets


def grid(offset=0.0, scale=1.0):
    """States on a grid that float64 can shift and scale by powers of 2 without rounding."""
    rng = np.random.default_rng(0)
    states = rng.integers(-(2**10), 2**10, (300, 2)) / 2**10
    actions = rng.uniform(-1, 1, (300, 1))
    after = states + rng.integers(-(2**8), 2**8, (300, 2)) / 2**10
    buffer = TransitionBuffer(300, 2, 1, np.float64)
    buffer.add(states * scale + offset, actions, actions[:, 0], after * scale + offset, False)
    return buffer


@pytest.mark.parametrize("target", ["delta", "next"])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("offset", [2.0**20, -(2.0**30)])
def test_an_offset_of_the_states_changes_nothing(target, normalise, offset):
    """Up to the round-off of float64; float32 has only multiples of 128 around 2^30."""
    found = []
    for shift in (0.0, offset):
        torch.manual_seed(0)
        model, buffer = MLPDynamics(2, 1, width=8, target=target, normalise=normalise), grid(shift)
        model.set_offset(buffer.states[0])
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        losses = fit(
            model, optimizer, buffer, steps=20, batch_size=64, rng=np.random.default_rng(0)
        )
        states, actions = torch.as_tensor(buffer.states), torch.as_tensor(buffer.actions)
        with torch.no_grad():
            after, rewards = model(states, actions)
        assert after.dtype == torch.float64
        found.append((losses, [*model.parameters()], after - shift, rewards))
    (losses, parameters, after, rewards), (others, *rest) = found
    assert losses == pytest.approx(others, rel=1e-5)
    for x, y in zip(parameters, rest[0]):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after, rest[1], rtol=0, atol=1e-4)
    torch.testing.assert_close(rewards, rest[2], rtol=1e-4, atol=1e-5)


def test_a_scale_of_the_states_changes_nothing():
    """With normalise=True; one entry changes by a constant."""
    found = []
    for scale in (1.0, 2.0**12, 2.0**-12):
        buffer = grid(scale=scale)
        buffer.next_states[:, 1] = buffer.states[:, 1] + scale / 8
        found.append(fitted(buffer, steps=20))
    for model, losses in found[1:]:
        assert losses == pytest.approx(found[0][1], rel=1e-4)
        for x, y in zip(model.parameters(), found[0][0].parameters()):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)


# Termination


def ending(n=4000, seed=0, known=True):
    """States beyond 1 end the episode, and an action moves by as much as it says."""
    rng = np.random.default_rng(seed)
    states, actions = rng.uniform(-2, 1, (n, 1)), rng.uniform(-1, 1, (n, 1))
    after = states + actions
    buffer = TransitionBuffer(n, 1, 1)
    ends = after[:, 0] > 1
    buffer.add(states, actions, after[:, 0], after, ends if known else UNKNOWN)
    return buffer, ends


def continuation(model, buffer):
    states, actions = (torch.as_tensor(x) for x in (buffer.states, buffer.actions))
    with torch.no_grad():
        return model.continuation(states, actions).numpy()


def fitted(buffer, steps=700, **settings):
    torch.manual_seed(0)
    model = MLPDynamics(buffer.states.shape[1], 1, **{"width": 32, **settings})
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    rng = np.random.default_rng(0)
    return model, fit(model, optimizer, buffer, steps=steps, batch_size=64, rng=rng)


@pytest.mark.parametrize("normalise", [True, False])
def test_where_an_episode_ends_is_learned(normalise):
    buffer, _ = ending()
    model, losses = fitted(buffer, normalise=normalise)
    fresh, ends = ending(seed=1)
    found = continuation(model, fresh)
    clear = np.abs(fresh.next_states[:, 0] - 1) > 0.2
    assert 0.05 < ends.mean() < 0.3
    assert (found[clear & ends] < 0.3).all() and (found[clear & ~ends] > 0.7).all()
    assert losses["termination_loss"] < 0.1


def test_random_ends_are_probabilities():
    """A quarter of the transitions ends, whatever the action: 4 standard errors of 4000 draws."""
    buffer, _ = ending()
    buffer.terminated[:] = np.random.default_rng(5).random(4000) < 0.25
    found = continuation(fitted(buffer, steps=300)[0], buffer)
    assert found.mean() == pytest.approx(0.75, abs=0.03)
    assert found.std() < 0.1


def test_the_first_estimate_is_the_share_of_the_data():
    buffer, ends = ending()
    model = MLPDynamics(1, 1, width=8)
    model.see_terminations(buffer)
    np.testing.assert_allclose(continuation(model, buffer), 1 - ends.mean(), atol=1e-3)
    before = model.termination[-1].bias.clone()
    buffer.terminated[:2000] = 1
    model.see_terminations(buffer)  # only once
    assert torch.equal(model.termination[-1].bias, before)


@pytest.mark.parametrize("known", [True, False])
def test_without_terminations_nothing_is_learned_of_them(known):
    buffer, _ = ending(known=known)
    buffer.terminated[buffer.terminated == 1] = 0
    model, losses = fitted(buffer, steps=5)
    assert set(losses) == {"transition_loss", "reward_loss"} and not model.terminates
    torch.manual_seed(0)
    fresh = MLPDynamics(1, 1, width=32)
    for found, expected in zip(model.termination.parameters(), fresh.termination.parameters()):
        assert torch.equal(found, expected)


def test_what_is_learned_of_states_and_rewards_does_not_depend_on_ends():
    """Bit for bit, because the networks share nothing."""
    buffer, _ = ending()
    with_ends = fitted(buffer, steps=20)[0]
    buffer.terminated[:] = 0
    without = fitted(buffer, steps=20)[0]
    for part in ("transition", "reward"):
        pairs = zip(getattr(with_ends, part).parameters(), getattr(without, part).parameters())
        assert all(torch.equal(x, y) for x, y in pairs)


def test_ends_that_are_not_known_do_not_count():
    buffer, _ = ending()
    model = MLPDynamics(1, 1, width=8)
    data = [torch.as_tensor(x) for x in (buffer.states, buffer.actions, buffer.terminated)]
    expected = model.termination_loss(*(x[:100] for x in data))
    data[2][100:] = UNKNOWN
    torch.testing.assert_close(model.termination_loss(*data), expected)
    data[2][:] = UNKNOWN
    assert model.termination_loss(*data).item() == 0


# The buffer


def add(buffer, *numbers):
    x = np.array(numbers, np.float32)
    buffer.add(x[:, None], -x[:, None], 10 * x, x[:, None] + 0.5, x % 2)


def contents(buffer):
    rows = buffer.sample(len(buffer), np.random.default_rng(0))
    order = np.argsort(rows[0][:, 0])
    states, actions, rewards, after, terminated = (x[order] for x in rows)
    np.testing.assert_array_equal(terminated, states[:, 0] % 2)
    np.testing.assert_array_equal(actions, -states)
    np.testing.assert_array_equal(rewards, 10 * states[:, 0])
    np.testing.assert_array_equal(after, states + 0.5)
    return states[:, 0].tolist()


def test_first_in_first_out():
    buffer = TransitionBuffer(4, 1, 1)
    assert len(buffer) == 0
    add(buffer, 1, 2, 3)
    assert len(buffer) == 3 and contents(buffer) == [1, 2, 3]
    add(buffer, 4, 5, 6)  # wraps around within one call
    assert len(buffer) == 4 and contents(buffer) == [3, 4, 5, 6]
    add(buffer, 7)
    assert contents(buffer) == [4, 5, 6, 7]


def test_samples_are_different_uniform_and_all_there_is_if_fewer():
    buffer = TransitionBuffer(10, 1, 1)
    add(buffer, *range(6))
    rng = np.random.default_rng(0)
    assert sorted(buffer.sample(100, rng)[0][:, 0]) == list(range(6))
    counts = np.zeros(6)
    for _ in range(2000):
        rows = buffer.sample(3, rng)[0][:, 0]
        assert len(set(rows)) == 3
        counts[rows.astype(int)] += 1
    # Each is drawn with probability 1/2: 4 standard errors of 2000 draws.
    assert np.abs(counts / 2000 - 0.5).max() < 4 * 0.5 / 2000**0.5


def test_stored_data_are_copies():
    buffer, x = TransitionBuffer(3, 1, 1), np.ones((1, 1), np.float32)
    buffer.add(x, x, x[0], x, False)
    x[:] = 5
    assert buffer.states[0, 0] == 1
