"""Draw a scene: shapes as signed distances, textures, background and sensor noise, and the outline of a sketch.

Lengths are fractions of the picture's side; in a shape's own frame they are fractions of its radius, x to the right and
y upwards. Distances become pixels only to anti-alias. Pictures are float32 in [0, 1] until they are rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, UInt8

from distilclip.corpus.scenes import PLACES, Object, Scene

Plane = Float[np.ndarray, "h w"]

_RADIUS = {"small": 0.17, "medium": 0.25, "large": 0.34}
_RGB = {
    "red": (0.85, 0.10, 0.10),
    "orange": (0.98, 0.52, 0.05),
    "yellow": (0.95, 0.85, 0.08),
    "green": (0.12, 0.60, 0.18),
    "cyan": (0.10, 0.80, 0.85),
    "blue": (0.12, 0.22, 0.85),
    "purple": (0.50, 0.12, 0.66),
    "pink": (0.98, 0.50, 0.74),
    "brown": (0.45, 0.25, 0.10),
    "grey": (0.50, 0.50, 0.50),
}
_BACKGROUND_RGB = {
    "white": (0.95, 0.95, 0.95),
    "black": (0.07, 0.07, 0.08),
    "cream": (0.95, 0.89, 0.72),
    "mint": (0.72, 0.92, 0.80),
    "lavender": (0.83, 0.78, 0.95),
}
_STROKE = 0.16  # of a radius: the edge that keeps a shape readable where its texture is as pale as the background


# Shapes: signed distance (negative inside) in a frame where the shape fills about the unit disc and points up.
# Corners are mitred, not rounded: cheaper than the exact distance, and the same inside one pixel of the edge.


def _circle(x: Plane, y: Plane) -> Plane:
    return np.hypot(x, y) - 0.9


def _box(x: Plane, y: Plane, half_width: float, half_height: float) -> Plane:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _square(x: Plane, y: Plane) -> Plane:
    return _box(x, y, 0.78, 0.78)


def _fold(x: Plane, y: Plane, num: int) -> tuple[Plane, Plane]:
    """Return radius and angle, folded into [0, pi / num]: 0 towards each of `num` corners, the first one upwards."""
    sector = 2 * np.pi / num
    angle = np.mod(np.arctan2(x, y) + sector / 2, sector) - sector / 2
    return np.hypot(x, y), np.abs(angle)


def _regular(x: Plane, y: Plane, num: int, radius: float) -> Plane:
    length, angle = _fold(x, y, num)
    return length * np.cos(np.pi / num - angle) - radius * np.cos(np.pi / num)


def _triangle(x: Plane, y: Plane) -> Plane:
    return _regular(x, y + 0.15, 3, 1.1)


def _hexagon(x: Plane, y: Plane) -> Plane:
    return _regular(x, y, 6, 0.98)


def _star(x: Plane, y: Plane) -> Plane:
    length, angle = _fold(x, y, 5)
    valley = 0.42 * np.exp(1j * np.pi / 5)
    normal = np.array([valley.imag, 1 - valley.real]) / abs(1 - valley)
    return (length * np.cos(angle) - 1.0) * normal[0] + length * np.sin(angle) * normal[1]


def _heart(x: Plane, y: Plane) -> Plane:
    x, y = np.abs(x) * 0.62, y * 0.62 + 0.55  # the formula's own frame: the tip at 0, lobes about (0.25, 0.75)
    lobe = np.hypot(x - 0.25, y - 0.75) - np.sqrt(2) / 4
    along = 0.5 * np.maximum(x + y, 0)
    side = np.sqrt(np.minimum(x**2 + (y - 1) ** 2, (x - along) ** 2 + (y - along) ** 2)) * np.sign(x - y)
    return np.where(x + y > 1, lobe, side) / 0.62


def _cross(x: Plane, y: Plane) -> Plane:
    return np.minimum(_box(x, y, 0.92, 0.29), _box(x, y, 0.29, 0.92))


def _ring(x: Plane, y: Plane) -> Plane:
    return np.abs(np.hypot(x, y) - 0.7) - 0.22


def _diamond(x: Plane, y: Plane) -> Plane:
    return (np.abs(x) / 0.58 + np.abs(y) - 1) / np.hypot(1 / 0.58, 1)


def _crescent(x: Plane, y: Plane) -> Plane:
    return np.maximum(np.hypot(x, y) - 0.95, 0.78 - np.hypot(x - 0.42, y))


def _arrow(x: Plane, y: Plane) -> Plane:
    slant = (np.abs(x) / 0.78 + (y - 1) / 0.95) / np.hypot(1 / 0.78, 1 / 0.95)
    return np.minimum(np.maximum(slant, 0.05 - y), _box(x, y + 0.4, 0.25, 0.52))


def _oval(x: Plane, y: Plane) -> Plane:
    unit = np.hypot(x / 0.98, y / 0.56)
    return unit * (unit - 1) / np.maximum(np.hypot(x / 0.98**2, y / 0.56**2), 1e-6)


_DISTANCE: dict[str, Callable[[Plane, Plane], Plane]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "cross": _cross,
    "ring": _ring,
    "diamond": _diamond,
    "hexagon": _hexagon,
    "crescent": _crescent,
    "arrow": _arrow,
    "oval": _oval,
}


@dataclass(frozen=True)
class Look:
    """Everything in a picture that no caption tells; k is the number of objects."""

    center: Float[np.ndarray, "k 2"]
    radius: Float[np.ndarray, " k"]
    angle: Float[np.ndarray, " k"]  # radians, clockwise
    phase: Float[np.ndarray, "k 2"]  # of the texture, in periods
    slant: Float[np.ndarray, " k"]  # of the texture against the object, radians
    colour: Float[np.ndarray, "k 3"]
    background: Float[np.ndarray, " 3"]
    slope: Float[np.ndarray, " 2"]  # of the background's brightness, per picture side
    exposure: float
    noise: float  # standard deviation of the sensor noise


def draw_look(rng: np.random.Generator, scene: Scene) -> Look:
    """Draw the look of a new scene."""
    num = len(scene.objects)
    radius = np.array([_RADIUS[o.size] for o in scene.objects]) * rng.uniform(0.92, 1.08, num)
    column_row = np.array([divmod(PLACES.index(o.place), 3)[::-1] for o in scene.objects])
    center = 0.22 + 0.28 * column_row + rng.uniform(-0.04, 0.04, (num, 2))
    edge = 0.85 * radius[:, None]  # large objects are pulled in, so that the frame cuts only their rim
    return Look(
        center=np.clip(center, edge, 1 - edge),
        radius=radius,
        angle=rng.uniform(-0.3, 0.3, num),
        phase=rng.random((num, 2)),
        slant=rng.uniform(0, np.pi, num),
        colour=np.array([_RGB[o.colour] for o in scene.objects]) + rng.normal(0, 0.03, (num, 3)),
        background=np.array(_BACKGROUND_RGB[scene.background]) + rng.normal(0, 0.015, 3),
        slope=rng.normal(0, 0.08, 2),
        exposure=rng.uniform(0.85, 1.08),
        noise=rng.uniform(0.005, 0.05),
    )


def vary_look(rng: np.random.Generator, look: Look) -> Look:
    """Vary a look as if another camera saw the scene a moment later: a semantic duplicate's look."""
    num = len(look.radius)
    return replace(
        look,
        center=look.center + rng.normal(0, 0.012, (num, 2)),
        radius=look.radius * rng.uniform(0.95, 1.05, num),
        angle=look.angle + rng.normal(0, 0.06, num),
        phase=rng.random((num, 2)),
        colour=look.colour + rng.normal(0, 0.012, (num, 3)),
        background=look.background + rng.normal(0, 0.015, 3),
        slope=look.slope + rng.normal(0, 0.02, 2),
        exposure=look.exposure * rng.uniform(0.96, 1.04),
        noise=rng.uniform(0.005, 0.05),
    )


def draw_scene(rng: np.random.Generator, scene: Scene, look: Look, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Draw the picture; `rng` is used for the sensor noise alone."""
    ramp = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    shade = 1 + look.slope[0] * ramp[None, :] + look.slope[1] * ramp[:, None]
    picture = shade[..., None].astype(np.float32) * look.background.astype(np.float32)
    for k, item in enumerate(scene.objects):
        _draw_object(picture, item, look, k)
    noise = rng.standard_normal(picture.shape, dtype=np.float32) * np.float32(look.noise)
    return _round_to_levels(picture * np.float32(look.exposure) + noise)


def draw_sketch(rng: np.random.Generator, scene: Scene, look: Look, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Draw the scene's largest object as a pencil outline on white paper, with a wavering line."""
    picture = np.full((size, size, 3), rng.uniform(0.93, 1.0), np.float32)
    window, x, y = _frame(look, 0, size)
    wave = rng.uniform(2, 5, 2)
    phase = rng.uniform(0, 2 * np.pi, 2)
    x, y = x + 0.05 * np.sin(wave[0] * y + phase[0]), y + 0.05 * np.sin(wave[1] * x + phase[1])
    distance = _DISTANCE[scene.objects[0].shape](x, y) * look.radius[0] * size
    half_line = rng.uniform(0.008, 0.016) * size
    line = np.clip(0.5 + half_line - np.abs(distance), 0, 1)[..., None]
    picture[window] += line * (np.float32(rng.uniform(0.05, 0.4)) - picture[window])
    return _round_to_levels(
        picture + rng.standard_normal(picture.shape[:2], dtype=np.float32)[..., None] * np.float32(0.015)
    )


def _frame(look: Look, k: int, size: int) -> tuple[tuple[slice, slice], Plane, Plane]:
    """Return the window of pixels that object k can touch, and its pixels' coordinates in the object's own frame."""
    reach = 1.35 * look.radius[k]
    low = np.floor(np.clip(look.center[k] - reach, 0, 1) * size).astype(int)
    high = np.ceil(np.clip(look.center[k] + reach, 0, 1) * size).astype(int)
    right = ((np.arange(low[0], high[0]) + 0.5) / size - look.center[k, 0]) / look.radius[k]
    down = ((np.arange(low[1], high[1]) + 0.5) / size - look.center[k, 1]) / look.radius[k]
    cos, sin = np.cos(look.angle[k]), np.sin(look.angle[k])
    x = cos * right[None, :] + sin * down[:, None]
    y = sin * right[None, :] - cos * down[:, None]
    return (slice(low[1], high[1]), slice(low[0], high[0])), x, y


def _draw_object(picture: Float[np.ndarray, "size size 3"], item: Object, look: Look, k: int) -> None:
    size = picture.shape[0]
    window, x, y = _frame(look, k, size)
    distance = _DISTANCE[item.shape](x, y)
    pixels = look.radius[k] * size  # of one unit of the frame
    pale = _texture(item.texture, x, y, look, k)
    pale = pale * np.clip(-(distance + _STROKE) * pixels + 0.5, 0, 1)  # the texture stays inside the stroke
    coverage = np.clip(0.5 - distance * pixels, 0, 1)
    colour = look.colour[k] + pale[..., None] * (0.93 - look.colour[k])
    picture[window] += coverage[..., None] * (colour - picture[window])


def _texture(texture: str, x: Plane, y: Plane, look: Look, k: int) -> Plane:
    """Return how pale each pixel is, 0 to 1. A period is 0.11 of the side or more, 7 pixels of 64."""
    if texture == "solid":
        return np.zeros_like(x)
    period = max(0.6, 0.11 / look.radius[k])
    cos, sin = np.cos(look.slant[k]), np.sin(look.slant[k])
    u = 2 * np.pi * ((cos * x + sin * y) / period + look.phase[k, 0])
    v = 2 * np.pi * ((cos * y - sin * x) / period + look.phase[k, 1])
    if texture == "striped":
        return np.clip(0.5 + 2.5 * np.sin(u), 0, 1)
    if texture == "dotted":
        return np.clip(0.5 + 2.5 * (np.sin(u) + np.sin(v) - 0.55), 0, 1)
    assert texture == "checkered", texture
    return np.clip(0.5 + 4 * np.sin(u / 1.4) * np.sin(v / 1.4), 0, 1)


def _round_to_levels(picture: Float[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)
