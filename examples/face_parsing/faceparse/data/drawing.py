"""A small canvas: soft masks of polygons, strokes that also label, noise and directional light."""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .faces import SIDE

OVERSAMPLE = 2  # masks are drawn at twice the size and averaged down, for soft edges
ROWS, COLUMNS = np.mgrid[:SIDE, :SIDE].astype(np.float32) + 0.5


class Canvas:
    """The picture (float, 0..255), its labels, and the brushes.

    The picture is planar, (3, 128, 128): NumPy is slow where the last axis has three entries.
    """

    def __init__(self, rng):
        self.rng = rng
        self.image = np.zeros((3, SIDE, SIDE), np.float32)
        self.labels = np.zeros((SIDE, SIDE), np.uint8)

    def mask(self, *outlines):
        """Coverage (128, 128) in 0..1 of the union of polygons given in pixels."""
        cover = np.zeros((SIDE, SIDE), np.float32)
        corners = np.concatenate(outlines)
        left, top = np.floor(corners.min(0)).clip(0, SIDE).astype(int)
        right, bottom = np.ceil(corners.max(0)).clip(0, SIDE).astype(int)
        if left < right and top < bottom:
            big = Image.new("L", ((right - left) * OVERSAMPLE, (bottom - top) * OVERSAMPLE))
            draw = ImageDraw.Draw(big)
            for outline in outlines:
                inside = (outline - np.array([left, top])) * OVERSAMPLE
                draw.polygon([tuple(p) for p in inside.tolist()], fill=255)
            small = np.asarray(big.reduce(OVERSAMPLE), np.float32)
            cover[top:bottom, left:right] = small / 255
        return cover

    def paint(self, mask, colour, label=None):
        """Lay ``colour`` (3,) or (3, 128, 128) over the picture; ``label=None`` leaves labels."""
        box = _box(mask)
        colour, cover = np.asarray(colour, np.float32), mask[box]
        part = self.image[:, box[0], box[1]]
        colour = planar(colour) if colour.ndim < 3 else colour[:, box[0], box[1]]
        part += cover * (colour - part)
        if label is not None:
            self.labels[box][cover > 0.5] = label

    def shade_behind(self, mask, depth, radius):
        """The soft shadow that an object throws on what is painted so far."""
        soft = Image.fromarray((mask * 255).astype(np.uint8)).filter(ImageFilter.BoxBlur(radius))
        soft = np.asarray(soft, np.float32)
        box = _box(soft)
        self.image[:, box[0], box[1]] *= 1 - (float(depth) / 255) * soft[box]

    def noise(self, rows, columns):
        """Smooth noise (128, 128), about N(0, 1), with rows x columns cells."""
        grid = self.rng.standard_normal((rows, columns), np.float32)
        return np.asarray(Image.fromarray(grid).resize((SIDE, SIDE), Image.Resampling.BICUBIC))

    def photograph(self):
        """The scene under a light that falls off, with a colour cast, blur and sensor noise.

        Returns (128, 128, 3) uint8.
        """
        rng = self.rng
        across, down = rng.uniform(-0.7, 0.7), rng.uniform(-0.5, 0.5)
        level = 1 + (COLUMNS / SIDE - 0.5) * across + (ROWS / SIDE - 0.5) * down
        image = self.image * level * planar(rng.uniform(0.85, 1.15, 3))
        pixels = image.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
        image = Image.fromarray(np.ascontiguousarray(pixels))
        if rng.random() < 0.5:
            image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.9)))
        noise = np.float32(rng.uniform(1, 7)) * rng.standard_normal((SIDE, SIDE, 3), np.float32)
        return (np.asarray(image) + noise).clip(0, 255).astype(np.uint8)


def planar(colour):
    """A colour (3,), or one number, that broadcasts over (3, 128, 128)."""
    return np.asarray(colour, np.float32).reshape(-1, 1, 1)


def _box(mask):
    """The slices of the smallest box that holds all of a mask: most strokes are small."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        return slice(0), slice(0)
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def mix(rng, tones, jitter):
    """A colour between two neighbouring tones of a table."""
    place = rng.uniform(0, len(tones) - 1)
    i = int(place)
    colour = tones[i] + (place - i) * (tones[i + 1] - tones[i]) + rng.normal(0, jitter, 3)
    return colour.clip(8, 250).astype(np.float32)


def blob(rng, centre, radii, roughness=0.0, lobes=5, count=56):
    """A closed wavy outline (count, 2) about ``centre``."""
    t = np.linspace(0, 2 * np.pi, count, endpoint=False)
    k = np.arange(2, 2 + lobes)[:, None]
    waves = rng.normal(0, roughness, (lobes, 1)) * np.cos(k * t + rng.uniform(0, 6.3, (lobes, 1)))
    r = 1 + waves.sum(0)
    return np.stack([r * np.cos(t), r * np.sin(t)], 1) * radii + np.asarray(centre)


def lit(colour, centre, scale, light):
    """A flat colour under directional light with fall-off: (3, 128, 128)."""
    # Python floats: a NumPy float64 scalar would turn the maps into float64, at half the speed.
    x, y, scale, right, down = (float(v) for v in (*centre, scale, *light))
    u, v = (COLUMNS - x) / scale, (ROWS - y) / scale
    level = 1 + right * u + down * v - 0.06 * (u * u + v * v)
    return planar(colour) * level.clip(0.35, 1.5)
