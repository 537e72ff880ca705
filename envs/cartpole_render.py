"""Rendering of the cart-pole: `draw` turns a state into an RGB array."""

import math

import numpy as np

from totalprop.envs.sheet import FAINT, GREEN, GREY, INK, ORANGE, PAPER, RED, WIDTH, Sheet

HINGE_Y, TRACK_Y = 158.0, 184.0


def draw(
    state: np.ndarray, *, pole_length: float, force: float, captions: tuple[str, str, str]
) -> np.ndarray:
    """Draw the track, the target of the tip, the cart, the force and the pole.

    The camera is centred at x = 0, and follows the cart once it leaves the middle of the picture.

    Args:
        state: [4] x (m), theta (rad, 0 upright, positive leans left), two unused velocities.
        pole_length: in m.
        force: in N, drawn as an arrow.
        captions: left, centre and right text in the top line.

    Returns:
        [320, 480, 3] uint8, C-contiguous.

    Raises:
        ImportError: Pillow is missing.
    """
    sheet = Sheet()
    x, theta = float(state[0]), float(state[1])
    scale = min(200.0, 110.0 / pole_length)  # pixels per metre
    length = pole_length * scale
    camera = x - min(max(x, -130 / scale), 130 / scale)
    cart, target = WIDTH / 2 + (x - camera) * scale, WIDTH / 2 - camera * scale

    spacing = max(0.5, float(round(pole_length)))  # m between ticks
    sheet.line((0, TRACK_Y), (WIDTH, TRACK_Y), GREY, 2)
    reach = WIDTH / 2 / scale
    for i in range(
        math.ceil((camera - reach) / spacing), math.floor((camera + reach) / spacing) + 1
    ):
        tick = WIDTH / 2 + (i * spacing - camera) * scale
        sheet.line((tick, TRACK_Y), (tick, TRACK_Y + 6), GREY, 1.5)
        sheet.text((tick, TRACK_Y + 10), f"{i * spacing:g} m", GREY, 10, "mt")

    sheet.line((target, HINGE_Y - length), (target, TRACK_Y), FAINT, 1.5)
    sheet.disc((target, HINGE_Y - length), 11, None, GREEN)
    sheet.disc((target, HINGE_Y - length), 3, GREEN)

    for side in (-18, 18):
        sheet.disc((cart + side, TRACK_Y - 7), 6, INK)
    sheet.box((cart - 32, HINGE_Y - 14), (cart + 32, HINGE_Y + 14), 5, INK)
    if abs(force) > 0.05:
        start = cart + math.copysign(36, force)
        sheet.arrow(start, start + math.copysign(12 + 5 * abs(force), force), HINGE_Y, RED)
    tip = (cart - length * math.sin(theta), HINGE_Y - length * math.cos(theta))
    sheet.line((cart, HINGE_Y), tip, ORANGE, 8)
    sheet.disc((cart, HINGE_Y), 4, ORANGE)
    sheet.disc(tip, 4, ORANGE)
    sheet.disc((cart, HINGE_Y), 2.5, PAPER)

    places = ((14.0, INK, "lt"), (WIDTH / 2, RED, "mt"), (WIDTH - 14.0, INK, "rt"))
    for caption, (left, colour, anchor) in zip(captions, places, strict=True):
        sheet.text((left, 12), caption, colour, 14, anchor)
    return sheet.pixels()
