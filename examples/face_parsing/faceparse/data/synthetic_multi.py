"""Synthetic scenes of two to six faces: synthetic.draw_face's heads on a ground made to mislead.

The ground is full of patches in the skin and hair colours of the scene's own people, and every
head stands on a neck and shoulders that are background. Nearer (larger) heads hide others.
"""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from .faces import Faces, label_set_for
from .labels import FINE
from .labels import FINE as TABLE
from .synthetic import draw_face

SIDE = 512
COUNTS = {"train": 200, "validation": 20, "test": 40}
SEED = 1  # not synthetic's: no head is one of its faces
HEADS = (2, 6)
HEAD_SIDES = (90, 250)  # pixels that the 128 of draw_face are scaled to
HAIR = FINE.names.index("hair")


def load(root, split, *, limit=None, labels="coarse", skip_bad=False, progress=True):
    """Draw one split; see :func:`data.open_dataset`. ``root`` and ``skip_bad`` are not used."""
    label_set, places = label_set_for("synthetic-multi", TABLE, labels)
    count = COUNTS[split] if limit is None else limit
    images = np.empty((count, 3, SIDE, SIDE), np.uint8)
    label_maps = np.empty((count, SIDE, SIDE), np.uint8)
    for i in tqdm(range(count), f"synthetic-multi {split}", disable=None if progress else True):
        image, label_maps[i] = draw_scene((SEED, list(COUNTS).index(split)), i)
        images[i] = image.transpose(2, 0, 1)
    label_maps = np.array(places, np.uint8)[label_maps]
    return Faces(
        images=torch.from_numpy(images),
        labels=torch.from_numpy(label_maps),
        label_set=label_set,
    )


def draw_scene(seed, index):
    """Draw one scene; the same ``(seed, index)`` gives the same scene.

    Args:
        seed: int or tuple of ints.
        index: int.

    Returns:
        image (512, 512, 3) uint8, labels (512, 512) uint8 in ``FINE``.
    """
    rng = np.random.default_rng([*np.atleast_1d(seed), index])
    heads = [_draw_head(rng) for _ in range(rng.integers(HEADS[0], HEADS[1] + 1))]
    heads.sort(key=lambda head: head[0].width)  # the nearest last
    tones = [head[2:] for head in heads]
    canvas = _ground(rng, tones)
    labels = Image.new("L", (SIDE, SIDE))
    taken = []
    for photo, face, skin, _ in heads:
        x, y = _free_place(rng, photo.width, taken)
        taken.append((x, y, photo.width))
        _body(rng, canvas, labels, (x, y, photo.width), skin)
        # The edge is soft in the photograph and lies at one half in the labels.
        soft = Image.fromarray((np.asarray(face) > 0).astype(np.uint8) * 255)
        size = (photo.width, photo.width)
        face = face.resize(size, Image.Resampling.NEAREST)
        canvas.paste(photo, (x, y), soft.resize(size, Image.Resampling.BILINEAR))
        labels.paste(face, (x, y), face.point(lambda label: 255 * (label > 0)))
    return _photograph(rng, canvas), np.asarray(labels)


def _draw_head(rng):
    """One person: photograph at its size, labels (128, 128), mean colours of skin and hair."""
    image, labels, _ = draw_face(tuple(rng.integers(2**31, size=2)), 0)
    side = int(rng.integers(*HEAD_SIDES))
    # Only the heads proper: no background, no neck, no clothes of the single picture.
    coarse = np.array(FINE.coarse)[labels]
    skin = image[coarse == 1].mean(0)
    hair = image[coarse == 2].mean(0) if (coarse == 2).any() else skin * 0.4
    photo = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
    return photo, Image.fromarray(labels), skin, hair


def _free_place(rng, side, taken):
    """A corner x, y for a square: of some random ones, the one that overlaps least."""
    places = rng.integers(-side // 8, SIDE - side + side // 8, (12, 2))
    if not taken:
        return tuple(int(v) for v in places[0])

    def overlap(place):
        return sum(
            max(0, min(place[0] + side, x + s) - max(place[0], x))
            * max(0, min(place[1] + side, y + s) - max(place[1], y))
            for x, y, s in taken
        )

    best = min(places.tolist(), key=overlap)
    # One head in six is put anywhere, and so may hide part of another.
    return tuple(int(v) for v in (places[0] if rng.random() < 1 / 6 else best))


def _body(rng, canvas, labels, place, skin):
    """Neck and shoulders, drawn behind the head; both are background."""
    x, y, side = place
    middle, below = x + side / 2, y + 0.7 * side
    wide, neck = rng.uniform(0.35, 0.55) * side, 0.14 * side
    shoulders = [
        (middle - wide, y + 2 * side),
        (middle - wide, y + 1.1 * side),
        (middle - neck, y + 0.95 * side),
        (middle + neck, y + 0.95 * side),
        (middle + wide, y + 1.1 * side),
        (middle + wide, y + 2 * side),
    ]
    column = [
        (middle - neck, below),
        (middle + neck, below),
        (middle + 1.2 * neck, y + 0.98 * side),
        (middle, y + 1.1 * side),
        (middle - 1.2 * neck, y + 0.98 * side),
    ]
    clothes = skin * rng.uniform(0.6, 1.1) if rng.random() < 0.25 else rng.uniform(0, 255, 3)
    for outline, colour in ((shoulders, clothes), (column, skin * rng.uniform(0.7, 0.95))):
        ImageDraw.Draw(canvas).polygon(outline, fill=_colour(colour))
        ImageDraw.Draw(labels).polygon(outline, fill=0)


def _ground(rng, tones):
    """A wall with clutter: (512, 512) RGB; most patches have the colour of somebody in it."""
    small = rng.uniform(30, 220, 3) + 35 * rng.standard_normal((rng.integers(3, 9), 6, 3))
    wall = Image.fromarray(small.clip(0, 255).astype(np.uint8))
    wall = wall.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    for _ in range(rng.integers(14, 30)):
        skin, hair = tones[rng.integers(len(tones))]
        what = rng.random()
        colour = skin if what < 0.4 else hair if what < 0.75 else rng.uniform(0, 255, 3)
        radius = rng.uniform(12, 75, 2)
        x, y = rng.uniform(0, SIDE, 2)
        turn = np.linspace(0, 2 * np.pi, int(rng.choice([4, 5, 24])), endpoint=False)
        turn += rng.uniform(0, np.pi)
        outline = [(x + radius[0] * np.cos(t), y + radius[1] * np.sin(t)) for t in turn]
        ImageDraw.Draw(wall).polygon(outline, fill=_colour(colour * rng.uniform(0.85, 1.1)))
    return wall.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 2)))


def _photograph(rng, canvas):
    """The scene with texture, a light that falls off, and sensor noise: (512, 512, 3) uint8."""
    texture = rng.standard_normal((64, 64), np.float32)
    texture = Image.fromarray(texture).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    across, down = rng.uniform(-0.3, 0.3, 2).astype(np.float32)
    ramp = np.linspace(-0.5, 0.5, SIDE, dtype=np.float32)
    level = 1 + across * ramp + down * ramp[:, None] + np.float32(0.03) * np.asarray(texture)
    image = np.asarray(canvas, np.float32) * level[..., None]
    image += np.float32(rng.uniform(1, 5)) * rng.standard_normal(image.shape, np.float32)
    return image.clip(0, 255).astype(np.uint8)


def _colour(values):
    return tuple(int(v) for v in np.clip(values, 0, 255))
