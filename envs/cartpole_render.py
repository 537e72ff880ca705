"""Rendering of the cart-pole: `draw` turns a state into an RGB array."""

import math

import numpy as np

WIDTH, HEIGHT = 480, 320  # pixels
ZOOM = 3  # anti-aliasing: drawn larger by this factor, then averaged down
HINGE_Y, TRACK_Y = 158.0, 184.0
PAPER, INK, GREY, FAINT = "#fbfbf9", "#2f3b4c", "#9aa5b1", "#e3e7ec"
ORANGE, GREEN, RED = "#e07b28", "#2e9e6b", "#d1344b"


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
    sheet = _Sheet()
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


class _Sheet:
    """A Pillow canvas whose coordinates are pixels of the final picture, enlarged by `ZOOM`."""

    def __init__(self) -> None:
        try:
            from PIL import Image, ImageDraw, ImageFont
        except ImportError as error:
            raise ImportError(
                "Rendering the cart-pole requires Pillow: run `pip install pillow`."
            ) from error
        self.image = Image.new("RGB", (WIDTH * ZOOM, HEIGHT * ZOOM), PAPER)
        self.canvas = ImageDraw.Draw(self.image)
        self.font = ImageFont.load_default

    def line(
        self, a: tuple[float, float], b: tuple[float, float], colour: str, wide: float
    ) -> None:
        self.canvas.line([v * ZOOM for v in (*a, *b)], colour, round(wide * ZOOM))

    def disc(
        self, at: tuple[float, float], radius: float, fill: str | None, edge: str | None = None
    ) -> None:
        corners = [(v + side * radius) * ZOOM for side in (-1, 1) for v in at]
        self.canvas.ellipse(corners, fill, edge, 2 * ZOOM)

    def box(self, a: tuple[float, float], b: tuple[float, float], radius: int, fill: str) -> None:
        self.canvas.rounded_rectangle([v * ZOOM for v in (*a, *b)], radius * ZOOM, fill)

    def arrow(self, start: float, end: float, y: float, colour: str) -> None:
        neck = end - math.copysign(11, end - start)
        self.line((start, y), (neck, y), colour, 4)
        head = [(end, y), (neck, y - 7), (neck, y + 7)]
        self.canvas.polygon([(p * ZOOM, q * ZOOM) for p, q in head], colour)

    def text(
        self, at: tuple[float, float], words: str, colour: str, size: int, anchor: str
    ) -> None:
        place = (at[0] * ZOOM, at[1] * ZOOM)
        self.canvas.text(place, words, colour, self.font(size * ZOOM), anchor)

    def pixels(self) -> np.ndarray:
        return np.array(self.image.reduce(ZOOM))
