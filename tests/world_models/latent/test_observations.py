"""Observations of several entries: likelihoods by hand, and what one entry must agree with."""

import math

import pytest
import torch

from totalprop.world_models.latent.model import LatentModel, ModelLossSettings
from totalprop.world_models.latent.observations import (
    Categories,
    Choices,
    DictDecoder,
    DictEncoder,
    Entries,
    Joined,
)

A, T, B = 2, 5, 3
SIZES = {"stoch": 4, "deter": 6, "hidden": 7, "width": 8, "conv_depth": 2}
SETTINGS = ModelLossSettings(1.0, 1.0, 0.0, False, 0.99, 10.0)
MIXED = {
    "look": (1, 64, 64),
    "above": (3, 64, 64),
    "speed": (2,),
    "place": (1,),
    "goal": Choices((3,)),
    "doors": Choices((2, 4)),
}


def mixed(*lead):
    """One observation of each entry of MIXED."""
    return {
        "look": torch.randint(256, (*lead, 1, 64, 64), dtype=torch.uint8),
        "above": torch.randint(256, (*lead, 3, 64, 64), dtype=torch.uint8),
        "speed": torch.randn(*lead, 2),
        "place": torch.randn(*lead, 1, dtype=torch.float64),
        "goal": torch.randint(3, (*lead, 1), dtype=torch.uint8),
        "doors": torch.stack((torch.randint(2, lead), torch.randint(4, lead)), -1).int(),
    }


def make(entries, **changes):
    torch.manual_seed(0)
    return LatentModel(entries, A, **{**SIZES, **changes})


def sequences():
    """Actions, rewards, is_first, is_terminal and noise of a batch."""
    is_first = torch.zeros(T, B, dtype=torch.bool)
    is_first[0], is_first[3, 1] = True, True
    is_terminal = torch.zeros(T, B, dtype=torch.bool)
    return torch.randn(T, B, A), torch.randn(T, B), is_first, is_terminal, torch.randn(T, B, 4)


def test_entries_are_joined_by_name_and_split_again():
    entries, seen = Entries(MIXED), mixed(T, B)
    joined = entries.join(seen)
    assert torch.equal(joined.image, torch.cat((seen["above"], seen["look"]), 2))
    assert torch.equal(joined.vector, torch.cat((seen["place"], seen["speed"].double()), -1))
    assert torch.equal(joined.choices, torch.cat((seen["doors"], seen["goal"]), -1).long())
    assert entries.sizes == (2, 4, 3) and entries.n_channels == 4 and entries.n_numbers == 3
    back = entries.split(joined)
    assert back.keys() == seen.keys()
    for name, part in seen.items():
        assert torch.equal(back[name], part.to(back[name].dtype))


def test_one_hot_codes_by_hand():
    found = Categories((2, 4, 3)).one_hot(torch.tensor([[1, 2, 0], [0, 3, 2]]))
    expected = [[0, 1, 0, 0, 1, 0, 1, 0, 0], [1, 0, 0, 0, 0, 1, 0, 0, 1]]
    assert found.tolist() == expected and found.dtype == torch.float32


def test_log_likelihoods_of_choices_by_hand():
    """exp(logits) are 1, 3 | 2, 2, 1, 5 | 1, 1, 8."""
    logits = torch.tensor([1.0, 3, 2, 2, 1, 5, 1, 1, 8]).log().requires_grad_()
    categories = Categories((2, 4, 3))
    found = categories.log_prob(logits, torch.tensor([1, 2, 0]))
    torch.testing.assert_close(found.exp(), torch.tensor([3 / 4, 1 / 10, 1 / 10]))
    found.sum().backward()  # d log p_i / d logit_j = [i = j] - p_j
    expected = [-0.25, 0.25, -0.2, -0.2, 0.9, -0.5, 0.9, -0.1, -0.8]
    torch.testing.assert_close(logits.grad, torch.tensor(expected))
    assert categories.most_likely(logits).tolist() == [1, 3, 2]


def test_probabilities_of_each_choice_sum_to_one():
    categories, logits = Categories((2, 5)), torch.randn(7)
    for m, size in enumerate((2, 5)):
        choices = torch.zeros(size, 2, dtype=torch.int64)
        choices[:, m] = torch.arange(size)
        total = categories.log_prob(logits.expand(size, 7), choices)[:, m].exp().sum()
        torch.testing.assert_close(total, torch.tensor(1.0))


def flat_decoder(std, image_std):
    """A decoder whose predictions do not depend on the features."""
    decoder = DictDecoder(4, Entries(MIXED), width=8, conv_depth=2, std=std, image_std=image_std)
    for parameter in decoder.parameters():
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        # place, speed | doors | goal
        bias = [0.5, -1, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0]
        decoder.vector.net[-1].bias.copy_(torch.tensor(bias))
        decoder.image.layers[-1].bias.fill_(0.1)
    return decoder


@pytest.mark.parametrize(("std", "image_std"), [(1.0, 1.0), (0.1, 1.0), (1.0, 0.2)])
def test_log_likelihood_of_a_dictionary_is_the_sum_of_all_heads_by_hand(std, image_std):
    """Numbers (place, speed) have means 0.5, -1, 0; of the choices, door 2 has a logit of 2."""
    decoder = flat_decoder(std, image_std)
    place, speed = math.expm1(0.7), [-math.expm1(1.0), math.expm1(0.3)]  # symlog: 0.7, -1, 0.3
    seen = {
        "look": torch.full((2, 1, 64, 64), 255, dtype=torch.uint8),  # 0.5 in the decoder's units
        "above": torch.zeros(2, 3, 64, 64, dtype=torch.uint8),  # -0.5
        "speed": torch.tensor([speed, speed]),
        "place": torch.tensor([[place], [place]]),
        "goal": torch.tensor([[0], [2]]),
        "doors": torch.tensor([[0, 2], [1, 0]]),
    }
    joined = Entries(MIXED).join(seen)
    found = decoder.log_prob(torch.zeros(2, 4), joined._replace(vector=joined.vector.float()))
    normal = 0.5 * math.log(2 * math.pi)
    errors = 64**2 * 0.4**2 + 3 * 64**2 * 0.6**2
    pixels = -0.5 * errors / image_std**2 - 4 * 64**2 * (math.log(image_std) + normal)
    numbers = -0.5 * (0.2**2 + 0 + 0.3**2) / std**2 - 3 * (math.log(std) + normal)
    doors = math.log(1 / 2) + math.log(math.e**2 / (3 + math.e**2))
    other = math.log(1 / 2) + math.log(1 / (3 + math.e**2))
    expected = 2 * (pixels + numbers) + doors + other + 2 * math.log(1 / 3)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-6)


def test_embeddings_of_vectors_and_images_are_concatenated():
    torch.manual_seed(0)
    entries, seen = Entries(MIXED), mixed(T)
    encoder = DictEncoder(entries, width=8, conv_depth=2)
    image, vector, choices = entries.join(seen)
    joined = Joined(image, vector.float(), choices)
    one_hot = Categories(entries.sizes).one_hot(choices)
    expected = torch.cat((encoder.vector(vector, one_hot), encoder.image(image)), -1)
    found = encoder(joined)
    assert found.shape == (T, encoder.outputs) == (T, 8 + 64)
    assert torch.equal(found, expected)
    for name in MIXED:  # every entry is seen
        other = {**seen, name: seen[name] * 0 if seen[name].any() else seen[name] + 1}
        changed = entries.join(other)
        assert not torch.equal(encoder(changed._replace(vector=changed.vector.float())), found)


SAME = {
    "a vector": ({"a": (3,)}, (3,), lambda x: {"a": x}),
    "two vectors": ({"b": (1,), "a": (2,)}, (3,), lambda x: {"a": x[..., :2], "b": x[..., 2:]}),
    "an image": ({"a": (3, 64, 64)}, (3, 64, 64), lambda x: {"a": x}),
    "two images": (
        {"a": (1, 64, 64), "b": (2, 64, 64)},
        (3, 64, 64),
        lambda x: {"a": x[:, :, :1], "b": x[:, :, 1:]},
    ),
}


@pytest.mark.parametrize("kind", SAME)
@pytest.mark.parametrize("is_new", [False, True], ids=["V1", "layer norm, learned std"])
def test_entries_of_one_kind_are_learned_as_if_they_were_one_observation(kind, is_new):
    """Loss, gradients and predictions, bit for bit."""
    entries, shape, split = SAME[kind]
    changes = {
        "layer_norm": is_new, "vector_std": 0.1, "learn_vector_std": is_new, "image_std": 0.3,
    }  # fmt: skip
    ours, plain = (make(x, **changes) for x in (entries, shape))
    torch.manual_seed(1)
    seen, data = torch.randn(T, B, *shape), sequences()
    if len(shape) == 3:
        seen = torch.randint(256, (T, B, *shape), dtype=torch.uint8)
    plain.set_offset(seen[0, 0])
    ours.set_offset({name: part[0, 0] for name, part in split(seen).items()})
    losses = [m.loss(x, *data, SETTINGS)[0].total for m, x in ((ours, split(seen)), (plain, seen))]
    assert torch.equal(*losses)
    gradients = [torch.autograd.grad(loss, list(m.parameters()))
                 for loss, m in zip(losses, (ours, plain), strict=True)]  # fmt: skip
    for g, expected in zip(*gradients, strict=True):
        assert torch.equal(g, expected)
    predictions = [
        m.open_loop(x, data[0], data[2], context=2, generator=torch.Generator().manual_seed(3))
        for m, x in ((ours, split(seen)), (plain, seen))
    ]
    for name, part in split(predictions[1]).items():
        assert torch.equal(predictions[0][name], part)


@pytest.mark.parametrize("learn_std", [False, True])
def test_all_kinds_at_once_learn_and_predict(learn_std):
    model = make(MIXED, vector_std=0.1, learn_vector_std=learn_std)
    torch.manual_seed(1)
    seen, data = mixed(T, B), sequences()
    model.set_offset({name: part[0, 0] for name, part in seen.items()})
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(40):
        loss = model.loss(seen, *data, SETTINGS)[0]
        optimizer.zero_grad(), loss.total.backward(), optimizer.step()
        losses.append(float(loss.observation.detach()))
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert losses[-1] < losses[0] - 50  # the images are noise
    found = model.open_loop(
        seen, data[0], data[2], context=2, generator=torch.Generator().manual_seed(0)
    )
    assert found.keys() == seen.keys()
    for name, part in seen.items():
        assert found[name].shape == part.shape
    assert int(found["doors"].max()) < 4 and found["doors"].dtype == torch.int64


def test_offsets_are_those_of_each_vector():
    """A million metres on one entry costs no digits, and other entries keep theirs."""
    entries = {"far": (2,), "near": (1,), "goal": Choices((3,))}
    plain, shifted = make(entries), make(entries)
    torch.manual_seed(1)
    far = (torch.randn(T, B, 2, dtype=torch.float64) * 2**10).round() / 2**10
    seen = {
        "far": far, "near": torch.randn(T, B, 1), "goal": torch.randint(3, (T, B, 1)),
    }  # fmt: skip
    moved = {**seen, "far": far + 2.0**20}
    zeros = {name: torch.zeros_like(part[0, 0]) for name, part in seen.items()}
    shifted.set_offset({**zeros, "far": torch.full((2,), 2.0**20)})
    assert shifted.offset.tolist() == [2.0**20, 2.0**20, 0]
    assert torch.equal(plain.embed(seen), shifted.embed(moved))
    data = sequences()
    found, expected = shifted.loss(moved, *data, SETTINGS), plain.loss(seen, *data, SETTINGS)
    assert torch.equal(found[0].total, expected[0].total)


def test_without_vectors_there_is_no_offset():
    model = make({"goal": Choices((3,))})
    model.set_offset({"goal": torch.tensor([2])})
    assert model.offset is None
    loss, _ = model.loss({"goal": torch.randint(3, (T, B, 1))}, *sequences(), SETTINGS)
    assert torch.isfinite(loss.total)


def test_images_of_a_dictionary_must_have_the_size_of_the_convolutions():
    with pytest.raises(ValueError, match=r"must be \[C, 64, 64\], got \[3, 84, 84\]"):
        make({"look": (3, 84, 84)})


def test_choices_alone_have_no_standard_deviation_to_learn():
    model = make({"goal": Choices((3,))}, learn_vector_std=True)
    assert model.decoder.vector.log_excess is None
