"""The sheet of paper that environments draw on, and its colours."""

import math
from collections.abc import Sequence

import numpy as np

WIDTH, HEIGHT = 480, 320  # pixels
ZOOM = 3  # anti-aliasing: drawn larger by this factor, then averaged down
PAPER, INK, GREY, FAINT = "#fbfbf9", "#2f3b4c", "#9aa5b1", "#e3e7ec"
ORANGE, GREEN, RED = "#e07b28", "#2e9e6b", "#d1344b"


class Sheet:
    """A Pillow canvas whose coordinates are pixels of the final picture, enlarged by `ZOOM`."""

    def __init__(self) -> None:
        try:
            from PIL import Image, ImageDraw, ImageFont
        except ImportError as error:
            raise ImportError("Rendering requires Pillow: run `pip install pillow`.") from error
        self.image = Image.new("RGB", (WIDTH * ZOOM, HEIGHT * ZOOM), PAPER)
        self.canvas = ImageDraw.Draw(self.image)
        self.font = ImageFont.load_default

    def line(
        self, a: tuple[float, float], b: tuple[float, float], colour: str, wide: float
    ) -> None:
        self.canvas.line([v * ZOOM for v in (*a, *b)], colour, round(wide * ZOOM))

    def curve(self, points: Sequence[tuple[float, float]], colour: str, wide: float) -> None:
        scaled = [(p * ZOOM, q * ZOOM) for p, q in points]
        self.canvas.line(scaled, colour, round(wide * ZOOM), "curve")

    def polygon(
        self, points: Sequence[tuple[float, float]], fill: str, edge: str | None = None
    ) -> None:
        self.canvas.polygon([(p * ZOOM, q * ZOOM) for p, q in points], fill)
        if edge is not None:
            self.curve([*points, points[0]], edge, 1)

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
        self.polygon([(end, y), (neck, y - 7), (neck, y + 7)], colour)

    def text(
        self, at: tuple[float, float], words: str, colour: str, size: int, anchor: str
    ) -> None:
        place = (at[0] * ZOOM, at[1] * ZOOM)
        self.canvas.text(place, words, colour, self.font(size * ZOOM), anchor)

    def pixels(self) -> np.ndarray:
        return np.array(self.image.reduce(ZOOM))
