"""Synthetic faces, drawn: eleven classes, five key points, and a background made to mislead.

A small window often cannot tell a class here: the background holds patches in this very person's
skin and hair colour with the same texture, beards have the hair's texture but are skin, the neck
has the skin's colour but is background. What decides is what a pixel is connected to.

Face coordinates: the origin is between the eyes and the mouth, the half width of the face is 1,
y points down, the chin is at about 1.3. One similarity transform takes them to the image.
"""

import numpy as np
import torch
from tqdm import tqdm

from .drawing import COLUMNS, ROWS, Canvas, blob, lit, mix, planar
from .faces import SIDE, Faces, label_set_for
from .labels import FINE, POINTS
from .labels import FINE as TABLE

COUNTS = {
    "train": 960,
    "validation": 100,
    "test": 200,
}  # any limit is possible, this is the default
SEED = 0  # the data set's own: a training seed does not change the faces

LABEL = {name: i for i, name in enumerate(FINE.names)}
SKIN_TONES = np.array(
    [[236, 196, 172], [224, 172, 140], [198, 140, 104], [146, 96, 66], [92, 60, 44]]
)
HAIR_TONES = np.array(
    [[28, 24, 24], [62, 42, 30], [112, 74, 46], [190, 150, 96], [140, 62, 34], [168, 164, 160]]
)


def load(root, split, *, limit=None, labels="coarse", skip_bad=False, progress=True):
    """Draw one split; see :func:`data.open_dataset`. ``root`` and ``skip_bad`` are not used."""
    label_set, places = label_set_for("synthetic", TABLE, labels)
    count = COUNTS[split] if limit is None else limit
    images = np.empty((count, SIDE, SIDE, 3), np.uint8)
    label_maps = np.empty((count, SIDE, SIDE), np.uint8)
    points = np.empty((count, len(POINTS), 2), np.float32)
    for i in tqdm(range(count), f"synthetic {split}", disable=None if progress else True):
        images[i], label_maps[i], points[i] = draw_face((SEED, list(COUNTS).index(split)), i)
    label_maps = np.array(places, np.uint8)[label_maps]
    return Faces(
        images=torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        labels=torch.from_numpy(label_maps),
        label_set=label_set,
        points=torch.from_numpy(points),
    )


def draw_face(seed, index):
    """Draw one face; the same ``(seed, index)`` gives the same face.

    Args:
        seed: int or tuple of ints.
        index: int.

    Returns:
        image (128, 128, 3) uint8, labels (128, 128) uint8 in ``FINE``, points (5, 2) float32 as
        in ``Faces.points``.
    """
    canvas = Canvas(np.random.default_rng([*np.atleast_1d(seed), index]))
    person = _Person(canvas.rng)
    _background(canvas, person)
    _body(canvas, person)
    _head(canvas, person)
    _features(canvas, person)
    _front_hair(canvas, person)
    _accessories(canvas, person)
    return canvas.photograph(), canvas.labels, person.to_pixels(person.points).astype(np.float32)


class _Person:
    """The random choices that several layers share: place, colours, hair style."""

    def __init__(self, rng):
        self.centre = SIDE / 2 + rng.uniform(-8, 8, 2) + (0, 4)
        self.scale = rng.uniform(25, 36)  # pixels of half the face's width
        angle = np.deg2rad(rng.uniform(-14, 14))
        self.rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        self.yaw = rng.uniform(-0.22, 0.22)  # features shift sideways as the head turns
        self.jaw = rng.uniform(0.1, 0.38)
        self.skin = mix(rng, SKIN_TONES, 8)
        self.hair = mix(rng, HAIR_TONES, 10)
        self.style = rng.choice(
            ["bald", "short", "bob", "long", "afro", "bun"], p=[0.06, 0.32, 0.18, 0.24, 0.1, 0.1]
        )
        self.beard = rng.random() < 0.22 and self.style in ("bald", "short", "afro")
        self.light = rng.uniform(-0.28, 0.28, 2)
        eye = rng.uniform((0.36, -0.3), (0.44, -0.2))
        mouth, nose_y = rng.uniform((0.26, 0.66), (0.38, 0.8)), rng.uniform(0.24, 0.36)
        flip = np.array([-1, 1])
        # In the order of labels.POINTS.
        self.points = np.array([eye, eye * flip, [0, nose_y], mouth, mouth * flip])
        self.points[:, 0] += self.yaw
        self.points[2, 0] += 0.5 * self.yaw

    def to_pixels(self, points):
        """Face coordinates (..., 2) to pixels x, y."""
        return np.asarray(points, float) @ self.rotation.T * self.scale + self.centre


def _skin_paint(canvas, person, centre, scale):
    """Skin as it looks on this person, about any centre: face, neck and distractors alike."""
    blotches = 1 + 0.035 * canvas.noise(18, 18)
    return lit(person.skin, centre, scale, person.light) * blotches


def _hair_paint(canvas, person, centre, scale):
    """Hair with strands, about any centre: head, beard and distractors alike."""
    strands = canvas.noise(10, 64) if canvas.rng.random() < 0.7 else canvas.noise(48, 48)
    level = 1 + 0.2 * strands + 0.12 * canvas.noise(5, 5)
    return lit(person.hair, centre, scale, person.light) * level.clip(0.3, 2)


def _background(canvas, person):
    """A wall, then clutter: half of it in this person's own skin and hair."""
    rng = canvas.rng
    everything = np.ones((SIDE, SIDE), np.float32)
    middle = (SIDE / 2, SIDE / 2)
    kind = rng.random()
    if kind < 0.2:
        canvas.paint(everything, _hair_paint(canvas, person, middle, 60))
    elif kind < 0.35:
        canvas.paint(everything, _skin_paint(canvas, person, middle, 60))
    else:
        ramp = (COLUMNS * rng.uniform(-1, 1) + ROWS * rng.uniform(-1, 1)) / SIDE
        wall = planar(rng.uniform(20, 235, 3)) + ramp * planar(rng.uniform(-70, 70, 3))
        cells = int(rng.integers(3, 40))
        wall += float(rng.uniform(4, 26)) * canvas.noise(cells, int(rng.integers(3, 40)))
        if rng.random() < 0.3:  # stripes: shelves, blinds, bricks
            phase = (COLUMNS * rng.uniform(-0.6, 0.6) + ROWS * rng.uniform(-0.6, 0.6)).astype(int)
            wall += rng.uniform(-60, 60) * (phase % 16 < 5)
        canvas.paint(everything, wall.clip(0, 255))
    for _ in range(rng.integers(4, 10)):
        centre = rng.uniform(0, SIDE, 2)
        radii = rng.uniform(8, 38, 2)
        mask = canvas.mask(blob(rng, centre, radii, rng.uniform(0, 0.09)))
        scale = 1.4 * radii.max()
        what = rng.random()
        if what < 0.38:
            colour = _hair_paint(canvas, person, centre, scale)
        elif what < 0.7:
            colour = _skin_paint(canvas, person, centre, scale)
        else:
            colour = lit(rng.uniform(10, 245, 3), centre, scale, person.light)
        canvas.shade_behind(mask, 0.25, 3)
        canvas.paint(mask, colour)


def _body(canvas, person):
    """Neck and clothes; both are background, as in HELEN and CelebAMask-HQ."""
    rng = canvas.rng
    wide = rng.uniform(1.7, 2.3)
    clothes = [[-wide, 4], [-wide, 2.4], [-0.9, 1.9], [0.9, 1.9], [wide, 2.4], [wide, 4]]
    colour = mix(rng, np.vstack([HAIR_TONES, SKIN_TONES, rng.uniform(0, 255, (4, 3))]), 20)
    mask = canvas.mask(person.to_pixels(clothes))
    canvas.paint(mask, lit(colour, person.centre, 90, person.light), 0)
    neck = [[-0.55, 0.6], [-0.6, 1.9], [0, rng.uniform(2, 2.7)], [0.6, 1.9], [0.55, 0.6]]
    shade = rng.uniform(0.72, 0.95)
    paint = _skin_paint(canvas, person, person.to_pixels([0, 1.5]), 2 * person.scale)
    canvas.paint(canvas.mask(person.to_pixels(neck)), shade * paint, 0)


def _head(canvas, person):
    """Hair behind the head, ears, the face's skin, and a beard."""
    rng = canvas.rng
    behind = {
        "bald": [],
        "short": [((0, -0.45), (1.12, 1.1), 0.02)],
        "bob": [((0, -0.15), (rng.uniform(1.25, 1.5), 1.45), 0.03)],
        "long": [
            ((0, -0.3), (rng.uniform(1.2, 1.45), 1.3), 0.02),
            ((rng.uniform(-0.2, 0.2), 1.0), (rng.uniform(1.2, 1.5), rng.uniform(1.3, 2)), 0.04),
        ],
        "afro": [((0, -0.5), (rng.uniform(1.4, 1.9), rng.uniform(1.3, 1.7)), 0.035)],
        "bun": [
            ((0, -0.45), (1.1, 1.12), 0.02),
            ((rng.uniform(-0.7, 0.7), rng.uniform(-2, -1.6)), (0.6, 0.5), 0.04),
        ],
    }[person.style]
    outlines = [person.to_pixels(blob(rng, *shape, lobes=9)) for shape in behind]
    face = person.to_pixels(_face_outline(person))
    canvas.shade_behind(canvas.mask(face, *outlines), rng.uniform(0.2, 0.45), 4)
    if outlines:
        paint = _hair_paint(canvas, person, person.centre, 2.2 * person.scale)
        canvas.paint(canvas.mask(*outlines), rng.uniform(0.75, 1) * paint, LABEL["hair"])
    if person.style in ("bald", "short", "bun"):
        ears = [blob(rng, (x, 0.05), (0.16, 0.3)) for x in (-1.0, 1.0)]
        ear_paint = _skin_paint(canvas, person, person.centre, 1.6 * person.scale)
        mask = canvas.mask(*[person.to_pixels(ear) for ear in ears])
        canvas.paint(mask, rng.uniform(0.8, 1) * ear_paint, LABEL["skin"])
    mask = canvas.mask(face)
    canvas.shade_behind(mask, 0.25, 2)
    canvas.paint(
        mask, _skin_paint(canvas, person, person.centre, 1.6 * person.scale), LABEL["skin"]
    )
    if person.beard:
        jaw = _face_outline(person)
        jaw = jaw[jaw[:, 1] > 0.15]
        jaw = np.vstack([jaw, [[-0.5, 0.62], [-0.2, 0.5], [0.2, 0.5], [0.5, 0.62]]])
        paint = _hair_paint(canvas, person, person.centre, 2 * person.scale)
        canvas.paint(mask * canvas.mask(person.to_pixels(jaw)) * rng.uniform(0.6, 0.95), paint)


def _face_outline(person):
    t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    width = 1 - person.jaw * np.maximum(0, np.sin(t)) ** 3
    return np.stack([width * np.cos(t), 1.3 * np.sin(t)], 1)


def _features(canvas, person):
    """Eyes, brows, nose and mouth, about the key points."""
    rng = canvas.rng

    def polygon(centre, *offsets):
        return canvas.mask(person.to_pixels(centre + np.array(offsets)))

    def ellipse(centre, radii):
        return canvas.mask(person.to_pixels(blob(rng, centre, radii, count=24)))

    iris = rng.uniform(20, 120, 3)
    opening, lift = rng.uniform(0.07, 0.12), rng.uniform(0.2, 0.28)
    thick = rng.uniform(0.03, 0.06)  # half of the brow
    for eye, side in zip(person.points[:2], ("left", "right"), strict=True):
        canvas.paint(ellipse(eye, (0.22, opening + 0.05)), person.skin * 0.75)
        white = ellipse(eye, (0.18, opening))
        canvas.paint(white, rng.uniform(190, 240), LABEL[f"{side} eye"])
        canvas.paint(white * ellipse(eye, (0.085, 0.1)), iris * 0.6)
        end, arch = 0.04 - lift, -0.05 - lift
        brow = polygon(
            eye, (-0.25, end - thick), (0, arch - thick), (0.25, end - thick),
            (0.25, end + thick), (0, arch + thick), (-0.25, end + thick),
        )  # fmt: skip
        canvas.paint(brow * 0.85, person.hair * 0.8, LABEL[f"{side} brow"])

    tip = person.points[2]
    bridge_x, bridge_y = person.points[:2].mean(0) - tip
    nose = polygon(
        tip, (bridge_x - 0.08, bridge_y), (bridge_x + 0.08, bridge_y),
        (0.2, 0.02), (0.12, 0.13), (-0.12, 0.13), (-0.2, 0.02),
    )  # fmt: skip
    canvas.paint(0.8 * nose, canvas.image * np.float32(rng.uniform(1.02, 1.12)), LABEL["nose"])
    for x in (0.09, -0.09):
        nostril = ellipse((tip[0] + x, tip[1] + 0.1), (0.07, 0.04))
        canvas.paint(0.5 * nostril, person.skin * 0.4)

    left, right = person.points[3:]
    centre = (left + right) / 2
    lip = person.skin * np.array([0.85, 0.55, 0.55])
    gap = rng.uniform(0.04, 0.16) if rng.random() < 0.45 else 0

    def lens(above, below):
        """Between two lines from corner to corner, ``above`` and ``below`` in the middle."""
        return polygon(centre, right - centre, (0, above), left - centre, (0, below))

    if gap:
        teeth = rng.uniform(180, 235, 3) if rng.random() < 0.5 else np.array([70, 20, 25])
        canvas.paint(lens(-gap, gap), teeth, LABEL["inner mouth"])
    canvas.paint(lens(-0.14 - gap / 2, -gap), lip * 0.9, LABEL["upper lip"])
    canvas.paint(lens(gap, 0.2 + gap / 2), lip, LABEL["lower lip"])


def _front_hair(canvas, person):
    """What lies on top of the skull, above the hairline."""
    if person.style == "bald":
        return
    rng = canvas.rng
    height, tilt = rng.uniform(-0.95, -0.45), rng.uniform(-0.35, 0.35)
    x = np.linspace(-1.02, 1.02, 24)
    hairline = height + tilt * x + 0.55 * x**4 + rng.normal(0, 0.035, len(x))
    t = np.linspace(0, np.pi, 24)
    crown = np.stack([1.1 * np.cos(t), -0.35 - 1.12 * np.sin(t)], 1)
    mask = canvas.mask(person.to_pixels(np.vstack([np.stack([x, hairline], 1), crown])))
    canvas.shade_behind(mask, 0.2, 2)
    paint = _hair_paint(canvas, person, person.centre, 2.2 * person.scale)
    canvas.paint(mask, paint, LABEL["hair"])


def _accessories(canvas, person):
    """Glasses (labelled as what is behind them; dark ones as skin), hats (background)."""
    rng = canvas.rng
    if rng.random() < 0.15:
        dark = rng.random() < 0.4
        lenses = [blob(rng, eye, (0.29, 0.21), count=24) for eye in person.points[:2]]
        inner = [np.mean(lens, 0) + 0.82 * (lens - np.mean(lens, 0)) for lens in lenses]
        outer = canvas.mask(*[person.to_pixels(lens) for lens in lenses])
        hole = 0 if dark else canvas.mask(*[person.to_pixels(lens) for lens in inner])
        eyes_or_skin = LABEL["skin"] if dark else None
        canvas.paint(outer * (1 - hole), rng.uniform(10, 90, 3), eyes_or_skin)
    if rng.random() < 0.1:
        brim = rng.uniform(-0.85, -0.6)
        hat = [[-1.35, brim], [-1.05, brim - 0.9], [1.05, brim - 0.9], [1.35, brim]]
        mask = canvas.mask(
            person.to_pixels(hat), person.to_pixels(blob(rng, (0, brim - 0.7), (1.05, 0.6)))
        )
        canvas.shade_behind(mask, 0.25, 2)
        canvas.paint(mask, lit(rng.uniform(10, 240, 3), person.centre, 80, person.light), 0)
