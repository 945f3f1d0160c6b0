"""Drawn scenes: shapes on a textured background, and the masks of what is visible of them.

Everything is arithmetic on one numpy generator, without fonts or drawing libraries, so that a seed gives the same
picture on every machine. Coordinates: x to the right, y down, in pixels. Images are float32 (H,W,3) in 0..255.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Point = npt.NDArray[np.float64]  # (2,): x, y

CLASS_NAMES = {1: "circle", 2: "square", 3: "triangle", 4: "cross", 5: "ring"}
ROUND_CLASSES = (1, 5)
IMAGE_SIDES = (88, 120)  # pixels, both included
OBJECT_SIDES = (20, 80)  # the longer side of an object's box, pixels
MAX_OBJECTS = 3
PLACEMENT_TRIES = 8
SMALLEST_VISIBLE_PART = 0.5
SMALLEST_VISIBLE_AREA = 40  # pixels
SUPERSAMPLING = 2
SMALLEST_CONTRAST = 90.0  # Euclidean distance of mean colours, of 255 a channel
HUE_SPREAD = 0.12  # of the colour circle, to either side of a class's own hue
BACKGROUND = -1


class VisibleObject(NamedTuple):
    """An object of a finished scene."""

    category_id: int
    bbox: tuple[int, int, int, int]  # x, y, width, height of the visible pixels
    area: int  # visible pixels


class Scene(NamedTuple):
    image: npt.NDArray[np.uint8]  # (H,W,3), RGB
    objects: list[VisibleObject]
    owner: npt.NDArray[np.int8]  # (H,W): position in `objects` of the one seen at this pixel; -1: background


def draw_scene(rng: np.random.Generator, empty: bool = False) -> Scene:
    """A scene with 1 to 3 objects, or with none if `empty`."""
    height, width = (int(side) for side in rng.integers(*IMAGE_SIDES, size=2, endpoint=True))
    canvas = _Canvas(_background(rng, height, width))
    wanted = 0 if empty else int(rng.integers(1, MAX_OBJECTS, endpoint=True))
    for _ in range(wanted):
        _place_object(rng, canvas)
    image = np.clip(canvas.image + 0.5, 0, 255).astype(np.uint8)
    return Scene(image, [canvas.visible(number) for number in range(len(canvas.categories))], canvas.owner)


class _Canvas:
    """A picture in progress, with the object that each pixel belongs to."""

    def __init__(self, background: Floats) -> None:
        self.image = background
        self.owner: npt.NDArray[np.int8] = np.full(background.shape[:2], BACKGROUND, dtype=np.int8)
        self.categories: list[int] = []
        self.full_areas: list[int] = []  # pixels, before anything covered the object

    def leaves_all_visible(self, window: tuple[slice, slice], mask: Mask) -> bool:
        """Whether every object here stays sufficiently visible once `mask` covers a part of `window`."""
        count = len(self.categories)
        now = np.bincount(self.owner.ravel() + 1, minlength=count + 1)[1:]
        covered = np.bincount(self.owner[window][mask] + 1, minlength=count + 1)[1:]
        least = np.maximum(SMALLEST_VISIBLE_PART * np.array(self.full_areas), SMALLEST_VISIBLE_AREA)
        touched = covered > 0
        return bool((now - covered >= least)[touched].all())

    def add(self, category_id: int, window: tuple[slice, slice], coverage: Floats, paint: Floats) -> None:
        """Blend `paint` (h,w,3) into `window` with weight `coverage` (h,w) in [0,1]."""
        region = self.image[window]
        region += coverage[..., None] * (paint - region)
        mask = coverage >= 0.5
        self.owner[window][mask] = len(self.categories)
        self.categories.append(category_id)
        self.full_areas.append(int(mask.sum()))

    def visible(self, number: int) -> VisibleObject:
        rows, columns = np.nonzero(self.owner == number)
        x, y = int(columns.min()), int(rows.min())
        box = (x, y, int(columns.max()) + 1 - x, int(rows.max()) + 1 - y)
        return VisibleObject(self.categories[number], box, len(rows))


def _place_object(rng: np.random.Generator, canvas: _Canvas) -> None:
    """Add one object where it hides no other too much; give up after a few tries."""
    category_id = int(rng.integers(1, len(CLASS_NAMES), endpoint=True))
    for _ in range(PLACEMENT_TRIES):
        coverage = _coverage(rng, category_id)
        window = _random_window(rng, canvas, coverage)
        mask = coverage >= 0.5
        if mask.sum() >= SMALLEST_VISIBLE_AREA and canvas.leaves_all_visible(window, mask):
            canvas.add(category_id, window, coverage, _paint(rng, canvas, window, category_id))
            return


def _random_window(rng: np.random.Generator, canvas: _Canvas, coverage: Floats) -> tuple[slice, slice]:
    height, width = coverage.shape
    image_height, image_width = canvas.owner.shape
    top = int(rng.integers(0, image_height - height, endpoint=True))
    left = int(rng.integers(0, image_width - width, endpoint=True))
    return slice(top, top + height), slice(left, left + width)


def _coverage(rng: np.random.Generator, category_id: int) -> Floats:
    """How much of each pixel a random object of the class covers: (h,w) in [0,1], with the longer side in range."""
    low, high = OBJECT_SIDES
    side = round(low * (high / low) ** rng.random())
    aspect = 1.25 ** rng.uniform(-1, 1)  # width over height before the rotation
    angle = 0.0 if category_id in ROUND_CLASSES else rng.uniform(0, 2 * math.pi)
    detail = rng.random()
    low_corner, high_corner = _extent(category_id, aspect, angle)
    scale = side / float((high_corner - low_corner).max())
    width, height = (math.ceil(extent - 1e-6) for extent in (high_corner - low_corner) * scale)
    centre = (low_corner + high_corner) / 2
    u, v = _sample_points(width) / scale + centre[0], (_sample_points(height) / scale + centre[1])[:, None]
    across = (math.cos(angle) * u + math.sin(angle) * v) / math.sqrt(aspect)
    down = (math.cos(angle) * v - math.sin(angle) * u) * math.sqrt(aspect)
    inside = _INSIDE[category_id](across, down, detail)
    return _pixel_means(inside)


def _pixel_means(samples: Mask) -> Floats:
    """The means of the supersampled points of each pixel."""
    total = np.zeros([side // SUPERSAMPLING for side in samples.shape], dtype=np.float32)
    for row, column in np.ndindex(SUPERSAMPLING, SUPERSAMPLING):  # faster than a reduction over short axes
        total += samples[row::SUPERSAMPLING, column::SUPERSAMPLING]
    total /= SUPERSAMPLING**2
    return total


def _sample_points(count: int) -> npt.NDArray[np.float64]:
    """The supersampled positions along `count` pixels, relative to their centre."""
    return (np.arange(count * SUPERSAMPLING) + 0.5) / SUPERSAMPLING - count / 2


def _extent(category_id: int, aspect: float, angle: float) -> tuple[Point, Point]:
    """Top left and bottom right of a unit shape's box after stretching and rotation, both (x, y)."""
    corners = np.array(_CORNERS[category_id]) * (math.sqrt(aspect), 1 / math.sqrt(aspect))
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    turned = corners @ turn
    return turned.min(axis=0), turned.max(axis=0)


_CORNERS: dict[int, list[tuple[float, float]]] = {  # (across, down)
    1: [(1, 0), (0, 1), (-1, 0), (0, -1)],
    2: [(1, 1), (1, -1), (-1, 1), (-1, -1)],
    3: [(0, -1), (0.95, 0.75), (-0.95, 0.75)],
    4: [(x * s, y * t) for x, y in ((1, 0.34), (0.34, 1)) for s in (1, -1) for t in (1, -1)],
    5: [(1, 0), (0, 1), (-1, 0), (0, -1)],
}

_Inside = Callable[[npt.NDArray[np.float64], npt.NDArray[np.float64], float], Mask]


def _in_circle(across: npt.NDArray[np.float64], down: npt.NDArray[np.float64], detail: float) -> Mask:
    return across**2 + down**2 <= 1


def _in_square(across: npt.NDArray[np.float64], down: npt.NDArray[np.float64], detail: float) -> Mask:
    return np.maximum(np.abs(across), np.abs(down)) <= 1


def _in_triangle(across: npt.NDArray[np.float64], down: npt.NDArray[np.float64], detail: float) -> Mask:
    return (down <= 0.75) & (np.abs(across) <= 0.95 * (down + 1) / 1.75)


def _in_cross(across: npt.NDArray[np.float64], down: npt.NDArray[np.float64], detail: float) -> Mask:
    half_arm = 0.34
    across, down = np.abs(across), np.abs(down)
    return (np.minimum(across, down) <= half_arm) & (np.maximum(across, down) <= 1)


def _in_ring(across: npt.NDArray[np.float64], down: npt.NDArray[np.float64], detail: float) -> Mask:
    radius = across**2 + down**2
    return (radius <= 1) & (radius >= (0.5 + 0.15 * detail) ** 2)


_INSIDE: dict[int, _Inside] = {1: _in_circle, 2: _in_square, 3: _in_triangle, 4: _in_cross, 5: _in_ring}


def _background(rng: np.random.Generator, height: int, width: int) -> Floats:
    """A smooth, muted random gradient with weak stripes and noise."""
    brightness = rng.uniform(60, 195) + rng.uniform(-40, 40, size=(4, 4, 1))
    knots = brightness + rng.uniform(-18, 18, size=3) + rng.uniform(-10, 10, size=(4, 4, 3))
    image: Floats = np.einsum("ya,abc,xb->yxc", _blend(height), knots, _blend(width), optimize=True).astype(np.float32)
    image += _stripes(rng, height, width, strongest=9)[..., None]
    image += _noise(rng, height, width, strongest=6)[..., None]
    return image


def _blend(count: int) -> npt.NDArray[np.float64]:
    """Weights (count, 4) of four knots along a line; smooth, non-negative, summing to 1 (cubic Bernstein)."""
    t = np.linspace(0, 1, count)
    return np.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], axis=1)


def _stripes(rng: np.random.Generator, height: int, width: int, strongest: float) -> Floats:
    angle, phase = rng.uniform(0, 2 * math.pi, size=2)
    period, strength = rng.uniform(5, 20), rng.uniform(0, strongest)
    steps = 2 * math.pi / period
    y, x = (np.arange(count, dtype=np.float32) for count in (height, width))
    phases = (steps * math.sin(angle) * y)[:, None] + (steps * math.cos(angle) * x + phase)
    waves: Floats = (strength * np.sin(phases)).astype(np.float32)
    return waves


def _noise(rng: np.random.Generator, height: int, width: int, strongest: float) -> Floats:
    noise: Floats = rng.standard_normal((height, width), dtype=np.float32)
    noise *= rng.uniform(1, strongest)
    return noise


def _paint(rng: np.random.Generator, canvas: _Canvas, window: tuple[slice, slice], category_id: int) -> Floats:
    """The surface (h,w,3) of a new object: a colour unlike those around, shaded from one side, with faint texture."""
    height, width = canvas.owner[window].shape
    angle, strength = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.18)
    y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)
    shading = 1 + strength * (math.sin(angle) * y + math.cos(angle) * x)
    paint: Floats = (shading[..., None] * _contrasting_colour(rng, canvas, window, category_id)).astype(np.float32)
    paint += (_stripes(rng, height, width, strongest=6) + _noise(rng, height, width, strongest=4))[..., None]
    return paint


def _contrasting_colour(
    rng: np.random.Generator, canvas: _Canvas, window: tuple[slice, slice], category_id: int
) -> npt.NDArray[np.float64]:
    """A colour of the class, far from the mean colour of everything seen in the window; else the furthest of a few."""
    owners, image = canvas.owner[window], canvas.image[window]
    around = np.stack([image[owners == owner].mean(axis=0) for owner in np.unique(owners)])  # (k,3)
    candidates = _vivid_colours(rng, category_id, count=32)
    distances = np.linalg.norm(candidates[:, None] - around, axis=2).min(axis=1)
    colour: npt.NDArray[np.float64] = candidates[np.minimum(distances, SMALLEST_CONTRAST).argmax()]
    return colour


def _vivid_colours(rng: np.random.Generator, category_id: int, count: int) -> npt.NDArray[np.float64]:
    """Random colours (count, 3) around the hue of a class. Neighbouring classes share some hues: shape decides."""
    hue = category_id / len(CLASS_NAMES) + rng.uniform(-HUE_SPREAD, HUE_SPREAD, size=(count, 1))
    saturation, value = rng.uniform(0.75, 1, size=(count, 1)), rng.uniform(150, 250, size=(count, 1))
    purity = np.clip(np.abs((6 * hue + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1, 0, 1)
    colours: npt.NDArray[np.float64] = value * (1 - saturation * (1 - purity))
    return colours
