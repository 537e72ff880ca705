"""Figures: what is on them."""

import numpy as np
import pytest

from totalprop.agents.core import figures


@pytest.mark.parametrize(("n", "ticks"), [(1, 1), (8, 8), (30, 8), (40, 8), (1024, 8)])
def test_a_figure_of_k_has_few_enough_ticks_to_read(n, ticks):
    found = figures.weights(np.zeros((5, n))).axes[1].get_yticks()
    assert len(found) == ticks and found[0] == 0 and found[-1] < n


def test_a_figure_of_k_counts_steps_from_1_and_names_actions():
    k = np.array([[0.0, 0.2, 0.4], [0.5, 0.5, 0.8]])
    mean, axis, _ = figures.weights(k, actions=2).axes
    np.testing.assert_allclose(mean.lines[0].get_xydata(), [[1, 0.2], [2, 0.6]])
    np.testing.assert_array_equal(axis.images[0].get_array(), k.T)
    assert axis.images[0].get_extent() == [0.5, 2.5, -0.5, 2.5]
    names = [text.get_text() for text in axis.get_yticklabels()]
    assert names == ["action 0", "action 1", "0"]


def test_small_weights_of_lr_differ_in_colour():
    image = figures.weights(np.zeros((5, 3))).axes[1].images[0]
    assert image.norm(0.01) == pytest.approx(0.1) and image.norm(1.0) == 1


def test_a_caption_is_beside_the_frames_and_changes_none_of_their_pixels():
    frames = np.random.default_rng(0).integers(0, 255, (2, 60, 30, 3), dtype=np.uint8)
    found = figures.captioned(frames, ["truth", "model"], ["step 0", "step 1"])
    left, above = found.shape[2] - 30, found.shape[1] - 60
    np.testing.assert_array_equal(found[:, above:, left:], frames)
    names, captions = found[:, above:, :left], found[:, :above]
    for half in np.split(names[0], 2):
        assert (half < 128).any()  # ink
    assert (captions[0] != captions[1]).any() and (names[0] == names[1]).all()


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_same_figure_is_the_same_file(kind, tmp_path):
    """So that a report made again changes no committed picture."""
    paths = [tmp_path / f"{i}.{kind}" for i in range(2)]
    for path in paths:
        figures.save(figures.weights(np.eye(3)), path, dpi=20)
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_learning_curve_counts_in_whole_numbers_and_shows_each_spread(n):
    values = np.arange(4.0 * n).reshape(n, 4)
    figure = figures.learning_curve(np.arange(1, n + 1), values, xlabel="trial", ylabel="cost")
    (axis,) = figure.axes
    assert all(tick == int(tick) for tick in axis.get_xticks())
    (shown,) = [own for own in axis.collections if own.get_paths()]  # a band, or an error bar
    assert np.ptp(shown.get_paths()[0].vertices[:, 1]) >= 2 * values[0].std() - 1e-9
