"""Resizing by area, against means computed by hand and with fractions."""

import math
from fractions import Fraction

import numpy as np
import pytest

from totalprop.agents.dreamer.resize import area_resize


def by_hand(image, size):
    """Every output pixel as an exact mean over the input's area, rounded half to even."""
    out = np.empty((size, size), np.uint8)

    def covered(i, n):
        low, high = Fraction(i * n, size), Fraction((i + 1) * n, size)
        for j in range(math.floor(low), math.ceil(high)):
            yield j, (min(high, j + 1) - max(low, j)) / (high - low)

    for i in range(size):
        for j in range(size):
            pixels = (
                u * v * int(image[y, x])
                for y, u in covered(i, image.shape[0])
                for x, v in covered(j, image.shape[1])
            )
            out[i, j] = round(sum(pixels))
    return out


def test_a_half_is_the_mean_of_four_pixels_rounded_half_to_even():
    image = np.array([[10, 20, 0, 1], [30, 41, 2, 3], [5, 5, 255, 255], [5, 7, 255, 255]], np.uint8)
    # 101 / 4 = 25.25, 6 / 4 = 1.5, 22 / 4 = 5.5
    np.testing.assert_array_equal(area_resize(image, 2), [[25, 2], [6, 255]])


def test_two_thirds_weigh_the_pixel_between_two_by_its_halves():
    image = np.tile(np.array([0, 90, 240], np.uint8), (3, 1))
    # (0 + 90 / 2) / 1.5 and (90 / 2 + 240) / 1.5
    np.testing.assert_array_equal(area_resize(image, 2), [[30, 190], [30, 190]])


def test_enlarging_by_a_whole_number_repeats_pixels():
    image = np.array([[1, 200], [30, 4]], np.uint8)
    np.testing.assert_array_equal(area_resize(image, 6), np.kron(image, np.ones((3, 3))))


@pytest.mark.parametrize("shape", [(7, 7), (9, 5), (13, 3), (32, 20), (21, 16)])
@pytest.mark.parametrize("size", [4, 8])
def test_any_ratio_equals_exact_fractions(shape, size):
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    np.testing.assert_array_equal(area_resize(image, size), by_hand(image, size))


@pytest.mark.parametrize("shape", [(84, 84), (210, 160), (128, 128)])
def test_sizes_in_use_equal_exact_fractions(shape):
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    np.testing.assert_array_equal(area_resize(image, 64), by_hand(image, 64))


def test_large_images_are_exact_too():
    """1021 x 1019 exceeds what float32 counts."""
    image = np.random.default_rng(0).integers(0, 256, (1021, 1019), np.uint8)
    np.testing.assert_array_equal(area_resize(image, 2), by_hand(image, 2))


def test_channels_and_batches_are_resized_one_by_one():
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 96, 80), np.uint8)
    found = area_resize(images, 64)
    assert found.shape == (2, 3, 64, 64) and found.dtype == np.uint8
    for n in range(2):
        for c in range(3):
            np.testing.assert_array_equal(found[n, c], area_resize(images[n, c], 64))


def test_views_and_images_of_one_level_are_kept():
    image = np.random.default_rng(0).integers(0, 256, (84, 84), np.uint8)
    np.testing.assert_array_equal(area_resize(image[::-1].T, 64), area_resize(image, 64)[::-1].T)
    for level in (0, 1, 127, 255):
        assert (area_resize(np.full((210, 160), level, np.uint8), 64) == level).all()
