"""`QNetworks`: the smallest of several values, fitted to targets."""

import numpy as np
import pytest
import torch

from totalprop.world_models.q_networks import QNetworks


@pytest.mark.parametrize("n", [1, 2, 3])
def test_value_is_the_least_of_the_networks(n):
    torch.manual_seed(0)
    q = QNetworks(3, 2, n=n, width=8)
    states, actions = torch.randn(5, 4, 3), torch.randn(5, 4, 2)
    each = torch.stack([net(torch.cat((states, actions), -1))[..., 0] for net in q.networks])
    assert len(each) == n and each.shape == (n, 5, 4)
    assert torch.equal(q.all(states, actions), each)
    assert torch.equal(q(states, actions), each.min(0).values)


def test_networks_are_initialised_differently():
    q = QNetworks(3, 2, n=2, width=8)
    first, second = (net[0].weight for net in q.networks)
    assert not torch.equal(first, second)


def fitted(steps, targets=None, seed=0):
    torch.manual_seed(0)
    q = QNetworks(2, 1, width=32)
    states, actions = torch.randn(200, 2), torch.randn(200, 1)
    if targets is None:
        targets = 3 + states[:, 0] - 2 * actions[:, 0]
    optimizer = torch.optim.Adam(q.parameters(), 3e-3)
    loss = q.fit(
        optimizer, states, actions, targets, steps=steps, batch_size=50,
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    return q, loss, states, actions, targets


def test_every_network_is_fitted():
    q, loss, states, actions, targets = fitted(400)
    assert loss < 0.05
    errors = (q.all(states, actions) - targets).square().mean(1)
    assert (errors < 0.05).all()


def test_the_loss_reported_is_the_mean_squared_error_before_the_last_step():
    q, loss, states, actions, targets = fitted(1)
    torch.manual_seed(0)
    fresh = QNetworks(2, 1, width=32)
    rows = torch.as_tensor(np.random.default_rng(0).permutation(200)[:50])
    expected = (fresh.all(states[rows], actions[rows]) - targets[rows]).square().mean()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert not torch.equal(q.networks[0][0].weight, fresh.networks[0][0].weight)


def test_batches_come_from_the_generator_given():
    state = torch.get_rng_state()
    fitted(3)
    torch.manual_seed(0)  # fitted() itself seeds; after equal work the state must be equal
    first, second = fitted(5, seed=1)[0], fitted(5, seed=1)[0]
    other = fitted(5, seed=2)[0]
    assert torch.equal(first.networks[0][0].weight, second.networks[0][0].weight)
    assert not torch.equal(first.networks[0][0].weight, other.networks[0][0].weight)
    torch.set_rng_state(state)


def test_activation_is_as_asked():
    q = QNetworks(2, 1, width=4, activation="leaky_relu")
    assert isinstance(q.networks[0][1], torch.nn.LeakyReLU)
    assert isinstance(QNetworks(2, 1, width=4).networks[0][1], torch.nn.ReLU)
