"""Rendering of the unicycle: `draw` turns a state into an RGB array, seen in perspective."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from totalprop.envs.sheet import GREEN, GREY, INK, ORANGE, PAPER, RED, WIDTH, Sheet

WHEEL_RADIUS, TURNTABLE_HEIGHT, TURNTABLE_RADIUS = 0.225, 0.81, 0.27  # m
HALF_WHEEL, HALF_TURNTABLE, HALF_FORK = 0.025, 0.025, 0.06  # m, half of a thickness or distance
BEHIND, RIGHT, ABOVE = 1.7, 2.3, 1.15  # m, of the camera from the point that it looks at
FOCUS = 560.0  # pixels: an object 1 m wide at 1 m
MIDDLE = (WIDTH / 2, 178.0)  # where the point that the camera looks at is drawn
LOOK_AT = 0.5  # m above the floor
ROOM = 0.5  # m that the robot moves before the camera follows
SIGHT = 3.2  # m of floor around that point
SHADOW, TYRE, PANEL = "#dfe2e4", "#46556a", "#f0a05a"
GRID, PLUMB = "#cfd5dc", "#b9dccd"


def draw(
    state: np.ndarray,
    *,
    path: np.ndarray,
    torques: tuple[float, float],
    captions: tuple[str, str, str],
) -> np.ndarray:
    """Draw the floor, the path of the contact point, the target, the robot and its torques.

    The camera stands behind the robot's right side at yaw 0, never turns, and follows once the
    robot leaves the middle of the picture. The target is where the turntable is to be: above the
    origin.

    Args:
        state: [12] of `envs.unicycle`.
        path: [n, 2] x and y of the contact point so far, in m.
        torques: of turntable and wheel as fractions of their limits, drawn as curved arrows.
        captions: left, centre and right text in the top line.

    Returns:
        [320, 480, 3] uint8, C-contiguous.

    Raises:
        ImportError: Pillow is missing.
    """
    sheet = Sheet()
    x, y, roll, yaw, wheel_angle, pitch, table_angle = map(float, state[5:])
    camera = _Camera(x - min(max(x, -ROOM), ROOM), y - min(max(y, -ROOM), ROOM))
    _draw_floor(sheet, camera)
    contact = np.array([x, y, 0.0])
    ahead = np.array([math.cos(yaw), math.sin(yaw), 0.0])
    left = np.array([-math.sin(yaw), math.cos(yaw), 0.0])
    up = np.array([0.0, 0.0, 1.0])
    axle = math.cos(roll) * left - math.sin(roll) * up
    wheel_up = math.sin(roll) * left + math.cos(roll) * up
    long = math.sin(pitch) * ahead + math.cos(pitch) * wheel_up
    front = math.cos(pitch) * ahead - math.sin(pitch) * wheel_up
    hub = contact + WHEEL_RADIUS * wheel_up
    top = hub + TURNTABLE_HEIGHT * long

    rim = _circle(hub, ahead, wheel_up, WHEEL_RADIUS)
    disc = _circle(top, front, axle, TURNTABLE_RADIUS)
    for outline in (rim, disc, _bar(hub, top, axle, 0.05)):
        sheet.polygon(camera.project(outline * [1, 1, 0]), SHADOW)
    _draw_target(sheet, camera)
    seen = [point for point in np.c_[path, np.zeros(len(path))] if camera.sees(point)]
    if len(seen) > 1:
        sheet.curve(camera.project(np.array(seen)), RED, 2)

    crown = WHEEL_RADIUS + 0.1  # above the axle, where the two legs of the fork meet
    legs = [
        _bar(
            hub + side * HALF_FORK * axle, hub + crown * long + side * HALF_FORK * axle, front, 0.02
        )
        for side in (-1, 1)
    ]

    def draw_leg(i: int) -> None:
        sheet.polygon(camera.project(legs[i]), ORANGE, INK)

    def draw_wheel() -> None:
        near = camera.nearer_side(hub, axle)
        sides = [rim + side * HALF_WHEEL * axle for side in (-near, near)]
        _draw_cylinder(sheet, camera, sides, TYRE)
        sheet.polygon(camera.project(hub + near * HALF_WHEEL * axle + 0.78 * (rim - hub)), PAPER)
        for spoke in range(6):
            angle = wheel_angle + spoke * math.pi / 3
            end = math.sin(angle) * ahead + math.cos(angle) * wheel_up
            line = np.array([hub, hub + 0.78 * WHEEL_RADIUS * end]) + near * HALF_WHEEL * axle
            sheet.curve(camera.project(line), RED if spoke == 0 else GREY, 3 if spoke == 0 else 2)
        _draw_torque(sheet, camera, hub, (wheel_up, ahead), 1.25 * WHEEL_RADIUS, torques[1])

    def draw_column() -> None:
        bottom, end = hub + crown * long, top - HALF_TURNTABLE * long
        halves = (0.04 * front, (HALF_FORK + 0.02) * axle)
        for (out, along), colour in zip((halves, halves[::-1]), (PANEL, ORANGE), strict=True):
            out = out * camera.nearer_side((bottom + end) / 2, out)
            side = _bar(bottom + out, end + out, along, 1.0)
            sheet.polygon(camera.project(side), colour, INK)

    def draw_turntable() -> None:
        near = camera.nearer_side(top, long)
        sides = [disc + side * HALF_TURNTABLE * long for side in (-near, near)]
        _draw_cylinder(sheet, camera, sides, TYRE)
        middle = top + near * HALF_TURNTABLE * long
        sheet.polygon(camera.project(middle + 0.88 * (disc - top)), PANEL)
        for spoke in range(4):
            angle = table_angle + spoke * math.pi / 2
            end = math.cos(angle) * front + math.sin(angle) * axle
            line = np.array([middle, middle + 0.88 * TURNTABLE_RADIUS * end])
            sheet.curve(camera.project(line), RED if spoke == 0 else INK, 3 if spoke == 0 else 1.5)
        _draw_torque(sheet, camera, middle, (front, axle), 1.2 * TURNTABLE_RADIUS, torques[0])

    parts: list[tuple[np.ndarray, Callable[[], None]]] = [
        (legs[0].mean(0), lambda: draw_leg(0)),
        (legs[1].mean(0), lambda: draw_leg(1)),
        (hub, draw_wheel),
        (hub + (crown + TURNTABLE_HEIGHT) / 2 * long, draw_column),
        (top, draw_turntable),
    ]
    for _, draw_part in sorted(parts, key=lambda part: -camera.depth(part[0])):
        draw_part()
    places = ((14.0, INK, "lt"), (WIDTH / 2, RED, "mt"), (WIDTH - 14.0, INK, "rt"))
    for caption, (column, colour, anchor) in zip(captions, places, strict=True):
        sheet.text((column, 12), caption, colour, 14, anchor)
    return sheet.pixels()


class _Camera:
    """A pinhole camera that looks at a point above (x, y)."""

    def __init__(self, x: float, y: float) -> None:
        self.target = np.array([x, y, LOOK_AT])
        self.place = self.target + np.array([-BEHIND, -RIGHT, ABOVE])
        self.sight = (self.target - self.place) / np.linalg.norm(self.target - self.place)
        self.right = np.cross(self.sight, [0.0, 0.0, 1.0])
        self.right /= np.linalg.norm(self.right)
        self.up = np.cross(self.right, self.sight)

    def depth(self, point: np.ndarray) -> float:
        """Distance in m along the line of sight."""
        return float((point - self.place) @ self.sight)

    def sees(self, point: np.ndarray) -> bool:
        """Whether a point of the floor lies in the part of it that is drawn."""
        return math.dist(point[:2], self.target[:2]) < SIGHT

    def nearer_side(self, middle: np.ndarray, normal: np.ndarray) -> float:
        """1 if the side of a disc that the normal points to is seen, -1 if it is the other."""
        return 1.0 if (self.place - middle) @ normal > 0 else -1.0

    def project(self, points: np.ndarray) -> list[tuple[float, float]]:
        """Pixels of points [n, 3]."""
        away = points - self.place
        scale = FOCUS / np.maximum(away @ self.sight, 0.1)
        across, down = MIDDLE[0] + scale * (away @ self.right), MIDDLE[1] - scale * (away @ self.up)
        return list(zip(across.tolist(), down.tolist(), strict=True))


def _draw_floor(sheet: Sheet, camera: _Camera) -> None:
    """Lines every half metre, which fade towards the end of the sight."""
    x, y = camera.target[:2]
    for axis, centre in ((0, x), (1, y)):
        for i in range(math.ceil((centre - SIGHT) / 0.5), math.floor((centre + SIGHT) / 0.5) + 1):
            reach = math.sqrt(max(SIGHT**2 - (0.5 * i - centre) ** 2, 0.0))
            ends = np.linspace(-reach, reach, 15) + (y if axis == 0 else x)
            line = np.zeros((15, 3))
            line[:, axis], line[:, 1 - axis] = 0.5 * i, ends
            pixels = camera.project(line)
            for start, end, middle in zip(pixels, pixels[1:], line[1:] + line[:-1], strict=False):
                far = math.dist(middle[:2] / 2, (x, y)) / SIGHT
                sheet.line(start, end, _mixed(GREY if i == 0 else GRID, PAPER, far**2), 1.2)


def _draw_target(sheet: Sheet, camera: _Camera) -> None:
    origin = np.zeros(3)
    if not camera.sees(origin):
        return
    goal = np.array([0.0, 0.0, WHEEL_RADIUS + TURNTABLE_HEIGHT])
    axes = np.eye(3)
    sheet.curve(camera.project(np.array([origin, goal])), PLUMB, 2)
    sheet.curve(camera.project(_circle(origin, axes[0], axes[1], 0.1)), GREEN, 2)
    sheet.curve(camera.project(_circle(goal, axes[0], axes[1], 0.1)), GREEN, 2)


def _draw_cylinder(sheet: Sheet, camera: _Camera, sides: Sequence[np.ndarray], colour: str) -> None:
    far, near = sides
    for i in range(len(near) - 1):
        sheet.polygon(camera.project(np.array([far[i], far[i + 1], near[i + 1], near[i]])), colour)
    sheet.polygon(camera.project(near), colour, INK)


def _draw_torque(
    sheet: Sheet,
    camera: _Camera,
    centre: np.ndarray,
    axes: tuple[np.ndarray, np.ndarray],
    radius: float,
    fraction: float,
) -> None:
    """An arrow around a disc, from the first axis towards the second one; half round at 1."""
    if abs(fraction) < 0.02:
        return
    start = -math.copysign(0.5, fraction)
    angles = np.linspace(start, start + fraction * math.pi, 30)
    arc = centre + radius * (np.cos(angles)[:, None] * axes[0] + np.sin(angles)[:, None] * axes[1])
    sheet.curve(camera.project(arc), RED, 2.5)
    end, onwards = angles[-1], math.copysign(0.28, fraction)
    head = np.array(
        [
            centre + scale * radius * (math.cos(a) * axes[0] + math.sin(a) * axes[1])
            for a, scale in ((end + onwards, 1.0), (end, 1.13), (end, 0.87))
        ]
    )
    sheet.polygon(camera.project(head), RED)


def _circle(centre: np.ndarray, a: np.ndarray, b: np.ndarray, radius: float) -> np.ndarray:
    """[49, 3] points of a circle in the plane of a and b, the last one equal to the first."""
    angle = np.linspace(0, 2 * math.pi, 49)[:, None]
    return centre + radius * (np.cos(angle) * a + np.sin(angle) * b)


def _bar(start: np.ndarray, end: np.ndarray, across: np.ndarray, half: float) -> np.ndarray:
    """[4, 3] corners of a flat bar."""
    return np.array(
        [start - half * across, start + half * across, end + half * across, end - half * across]
    )


def _mixed(a: str, b: str, share: float) -> str:
    """The colour a with this share of b."""
    share = min(max(share, 0.0), 1.0)
    pairs = ((int(a[i : i + 2], 16), int(b[i : i + 2], 16)) for i in (1, 3, 5))
    return "#" + "".join(f"{round(p + share * (q - p)):02x}" for p, q in pairs)
