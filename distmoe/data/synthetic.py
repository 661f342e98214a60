"""The built-in procedural set: 32x32 colour images of a textured shape, ten classes, nothing to download.

A class is a shape x a texture: disc, square, triangle, ring or cross, filled with stripes or with a checkerboard. The
shape stands at a random place, in a random size, orientation and two random colours, on a background of cloudy colour
and noise. *What* the image shows and *where* it is can both be learned, so experts have something to specialise in; the
place and the size are recorded as factors. Pixels alone say little: colours are drawn alike for every class.

A sample depends on its split, its number and the difficulty, on nothing else. Only additions, multiplications,
divisions and square roots are used, which IEEE 754 rounds alike everywhere: all machines make the same bytes.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from distmoe.config import DataSection
from distmoe.contracts import SplitName
from distmoe.data.split import Split
from distmoe.noise import make_key, random_bits, uniform

SIZE = 32  # pixels, height and width
SHAPES = ("disc", "square", "triangle", "ring", "cross")
TEXTURES = ("striped", "checkered")
CLASS_NAMES = tuple(f"{texture} {shape}" for shape in SHAPES for texture in TEXTURES)
CHUNK = 100  # samples made at a time: the temporaries stay in the processor's cache
GRID = 4  # cells of the background's clouds, across and down

Floats = NDArray[np.float32]


def load(data: DataSection, split: SplitName) -> Split:
    """Makes ``data.synthetic.train_size`` or ``test_size`` samples.

    Classes follow one another (sample i is of class i mod 10): every split is balanced.

    Returns:
        Images (N, 32, 32, 3) uint8 with factors ``position`` (N, 2): centre of the shape, down and across, 0 at the
        first and 1 at the last pixel; and ``scale`` (N, 1): its radius as a share of half the image.
    """
    settings = data.synthetic
    size = settings.train_size if split == "train" else settings.test_size
    images = np.empty((size, SIZE, SIZE, 3), np.uint8)
    position, scale = np.empty((size, 2), np.float32), np.empty((size, 1), np.float32)
    for start in range(0, size, CHUNK):
        ids = torch.arange(start, min(start + CHUNK, size))
        rows = slice(start, start + len(ids))
        images[rows], position[rows], scale[rows] = _render(_Draws(split, ids), np.float32(settings.difficulty))
    labels = np.arange(size, dtype=np.int64) % len(CLASS_NAMES)
    return Split(images, labels, {"position": position, "scale": scale}, CLASS_NAMES)


class _Draws:
    """Random numbers of some samples: each name is a stream of its own."""

    def __init__(self, split: SplitName, ids: torch.Tensor):
        self.split = split
        self.ids = ids

    def __call__(self, name: str, count: int, low: float, high: float) -> Floats:
        """(B, count) float32 in [low, high)."""
        key = make_key("synthetic", self.split, name)
        unit: Floats = uniform(key, self.ids[:, None] * count + torch.arange(count)).numpy()
        return unit * np.float32(high - low) + np.float32(low)

    def noise(self) -> Floats:
        """(B, SIZE, SIZE, 3) float32 in (-1, 1), triangular: three sums of two 10-bit numbers from one hash."""
        pixels = SIZE * SIZE
        key = make_key("synthetic", self.split, "noise")
        bits = random_bits(key, self.ids[:, None] * pixels + torch.arange(pixels)).numpy()
        parts = [((bits >> 20 * c) & 1023) + ((bits >> (20 * c + 10)) & 1023) for c in range(3)]
        unit: Floats = np.stack(parts, axis=-1).astype(np.float32) * np.float32(1 / 1023) - np.float32(1)
        return unit.reshape(-1, SIZE, SIZE, 3)


def _render(draw: _Draws, difficulty: np.float32) -> tuple[NDArray[np.uint8], Floats, Floats]:
    """Images, positions and scales of the samples ``draw.ids``."""
    labels = draw.ids.numpy() % len(CLASS_NAMES)
    radius = draw("radius", 1, 8.0, 12.0)  # pixels
    margin = radius * np.float32(0.85)  # the shape may stick out a little
    centre = margin + draw("centre", 2, 0.0, 1.0) * (SIZE - 1 - 2 * margin)
    u, v = _local_coordinates(draw, centre)
    inside = _coverage(labels // len(TEXTURES), u, v, radius[:, :, None])
    first = _texture(draw, labels % len(TEXTURES), u, v)
    # Two shades on either side of the background's, so that the texture is seen on any ground.
    base = draw("base", 3, 90.0, 165.0)[:, None, None, :]
    tint = draw("tint", 3, -25.0, 25.0)[:, None, None, :]
    contrast = 80 * (np.float32(1.25) - np.float32(0.5) * difficulty)
    shade = np.where(first, contrast, -contrast)[..., None] + tint
    background = _clouds(draw) * (60 * difficulty)
    shade -= background
    shade *= inside[..., None]
    image = background
    image += shade
    image += base + np.float32(0.5)
    image += draw.noise() * (6 + 50 * difficulty)
    pixels = np.clip(image, 0, 255, out=image).astype(np.uint8)
    return pixels, centre / np.float32(SIZE - 1), radius / np.float32(SIZE / 2)


def _local_coordinates(draw: _Draws, centre: Floats) -> tuple[Floats, Floats]:
    """Pixel coordinates across and down from the shape's centre, turned with it: each (B, SIZE, SIZE)."""
    # Cosine and sine of an angle with tangent of its half t: rational, so no library's sine is involved.
    t = draw("turn", 1, -0.15, 0.15)[:, :, None]
    cosine, sine = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    axis = np.arange(SIZE, dtype=np.float32)
    down = (axis - centre[:, :1])[:, :, None]
    across = (axis - centre[:, 1:])[:, None, :]
    return across * cosine + down * sine, down * cosine - across * sine


def _coverage(shapes: NDArray[np.int64], u: Floats, v: Floats, radius: Floats) -> Floats:
    """How much of each pixel the shape covers, 0..1, from the signed distance to its edge: (B, SIZE, SIZE)."""
    distance = np.empty_like(u)
    for number, name in enumerate(SHAPES):
        rows = shapes == number
        distance[rows] = _distance(name, u[rows], v[rows], radius[rows])
    return np.clip(np.float32(0.5) - distance, 0, 1)


def _distance(shape: str, u: Floats, v: Floats, radius: Floats) -> Floats:
    """Signed distance in pixels to the edge, negative inside (for outer corners: a bound, which is enough here)."""
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - radius * np.float32(0.85)
    if shape == "triangle":
        side = np.abs(u) * np.float32(0.866) + v * np.float32(-0.5)
        return np.maximum(side, v) - radius * np.float32(0.6)
    if shape == "cross":
        arm, half = radius, radius * np.float32(0.36)
        upright = np.maximum(np.abs(u) - half, np.abs(v) - arm)
        return np.minimum(upright, np.maximum(np.abs(v) - half, np.abs(u) - arm))
    reach = np.sqrt(u * u + v * v)
    if shape == "ring":
        return np.abs(reach - radius * np.float32(0.72)) - radius * np.float32(0.28)
    return reach - radius


def _texture(draw: _Draws, textures: NDArray[np.int64], u: Floats, v: Floats) -> NDArray[np.bool_]:
    """Which of the two shades each pixel of the shape has: (B, SIZE, SIZE)."""
    period = draw("period", 1, 5.5, 7.0)[:, :, None]  # pixels, one light and one dark band
    phase = draw("phase", 2, 0.0, 1.0)
    across = np.floor((u / period + phase[:, :1, None]) * 2).astype(np.int64)
    down = np.floor((v / period + phase[:, 1:, None]) * 2).astype(np.int64)
    upright = draw("direction", 1, 0.0, 1.0)[:, :, None] < np.float32(0.5)
    stripes = np.where(upright, across, down)
    return np.where(textures[:, None, None] == 0, stripes, across + down) % 2 == 0


def _clouds(draw: _Draws) -> Floats:
    """Smooth random colour in (-1, 1), interpolated from a coarse grid: (B, SIZE, SIZE, 3)."""
    corners = draw("clouds", (GRID + 1) ** 2 * 3, -1.0, 1.0).reshape(-1, GRID + 1, GRID + 1, 3)
    place = np.arange(SIZE, dtype=np.float32) * np.float32(GRID / SIZE)
    cell = place.astype(np.int64)
    share = place - cell
    down = share[:, None, None]
    rows = corners[:, cell] * (1 - down) + corners[:, cell + 1] * down
    across = share[:, None]
    return rows[:, :, cell] * (1 - across) + rows[:, :, cell + 1] * across
