"""What a network is shown of a face: all of it, or a picture placed by its five key points.

``whole`` is the data set's own square. ``face`` is the first stage of the two: the aligned frame,
in which the key points lie about a mean shape. ``eye`` (with its brow), ``nose`` and ``mouth`` are
what the second stage sees, boxes of that frame about their own points. ``box`` is what the key
points are found in, a square about a detector's box.

Left is the subject's. The network for eyes knows the left one; a right one is shown as the left one
of the mirrored face.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from faceparse.data import COARSE, FINE, LABEL_SETS, DataError, Faces, LabelSet, geometry
from faceparse.data.faces import label_set_for
from faceparse.data.labels import CLASSES, CROPS, POINTS, POINTS_MIRROR
from faceparse.data.transforms import augment, change_colours, draw

SOURCE = 384  # pixels of the squares that the pictures are taken from, where a set can give them
FRAME = 250  # units of the aligned frame
LARGEST = 10 * FRAME  # of a place in that frame
SIDE = 128  # pixels of the first stage's input
MARGIN = 0.2  # about a part, of its height and width
COVERED = (0.02, 0.98)  # quantiles of where parts end: the few faces beyond are cut


class Part(NamedTuple):
    """A part of the face for the second stage."""

    size: tuple[int, int]  # h, w of the network's input
    points: tuple[int, ...]  # the box lies about the middle of these
    classes: tuple[str, ...]  # those in it; of what has two sides, the left ones
    names: tuple[str, ...]  # the same without the side

    @property
    def two_sided(self):
        """Whether its network sees the right one too, mirrored."""
        return self.classes != self.names


def _part(name, crop):
    classes = [one for one, row in CLASSES.items() if row.crop == name]
    left = tuple(one for one in classes if not one.startswith("right "))
    points = tuple(POINTS.index(point) for point in crop.points)
    return Part(crop.size, points, left, tuple(one.removeprefix("left ") for one in left))


PARTS = {name: _part(name, crop) for name, crop in CROPS.items()}
VIEWS = ("whole", "face", *PARTS, "box")

# The cascade's box about a face, in root mean square distances of the key points from their mean:
# medians over 379 portraits (10 and 90 %: side 3.8 and 4.5, up 0.48 and 0.29).
BOX_SIDE, BOX_RISE = 4.15, 0.37
BOX_GROWN = 1.2  # so much of a box, for what is shown: its own place is only roughly right
BOX_SIZE = (64, 64)


class Layout(NamedTuple):
    """What is learned of a training split's geometry, in units of the aligned frame."""

    shape: np.ndarray  # (5, 2), the mean shape; symmetric
    boxes: dict  # part: (left, top, width, height) from the middle of its points

    def as_dict(self):
        """For a checkpoint."""
        return {"shape": self.shape.tolist(), **{k: list(v) for k, v in self.boxes.items()}}

    @classmethod
    def of(cls, stored):
        """From what :meth:`as_dict` made.

        Raises:
            KeyError, OverflowError, TypeError, ValueError: it is something else.
        """
        shape = np.array(stored["shape"], float).reshape(len(POINTS), 2)
        parts = [part for part in PARTS if part in stored or part in parts_of(FINE)]
        boxes = {part: tuple(float(v) for v in stored[part]) for part in parts}
        for name, box in boxes.items():
            left, top, width, height = box
            if not ((np.abs(box) <= LARGEST).all() and min(width, height) >= 1):
                raise ValueError(f"{name} must be left, top, width, height, got {box}")
        if not ((np.abs(shape) <= LARGEST).all() and np.ptp(shape, axis=0).min() >= 1):
            raise ValueError(f"shape must be points that lie apart, got {shape.tolist()}")
        return cls(shape, boxes)


def parts_of(label_set):
    """The names of the second stage's parts whose classes a label set has."""
    return tuple(name for name, part in PARTS.items() if set(part.classes) <= set(label_set.names))


def learn_layout(faces, *, progress=True):
    """The mean shape, and how large the parts are about their points.

    Args:
        faces: ``Faces`` with points; the parts are those of their label set.

    Raises:
        DataError: no face has all five points, or none shows a part.
    """
    side = faces.images.shape[-1]
    points = faces.points.double().numpy()
    whole = points[~np.isnan(points).any((1, 2))]
    if not len(whole):
        raise DataError("no face of the training split shows all five key points")
    shape = mean_shape(whole * (FRAME / side))
    maps = geometry.similarity(complete(points, shape, side), shape)
    parts = {name: PARTS[name] for name in parts_of(faces.label_set)}
    extents = {name: [] for name in parts}
    wanted = {name: np.isin(faces.label_set.names, part.classes) for name, part in parts.items()}
    bar = tqdm(maps, "parts of the face", disable=None if progress else True)
    for i, m in enumerate(bar):
        seen = geometry.apply(m, complete(points[i], shape, side))
        labels = geometry.view_labels(faces.labels[i], m, (FRAME, FRAME)).numpy()
        for mirrored in (False, True):
            if mirrored:
                seen = mirrored_points(seen, FRAME)
                labels = np.array(faces.label_set.mirror, np.uint8)[labels[:, ::-1]]
            for name, part in parts.items():
                on = wanted[name][labels]
                rows, columns = np.flatnonzero(on.any(1)), np.flatnonzero(on.any(0))
                if len(rows):
                    ends = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
                    extents[name].append(ends - np.tile(seen[list(part.points)].mean(0), 2))
    boxes = {}
    for name, part in parts.items():
        if not extents[name]:
            raise DataError(f"no face of the training split shows the class {part.names[0]!r}")
        low, high = np.quantile(extents[name], COVERED, axis=0)
        boxes[name] = _grown(low[:2], high[2:], part.size)
    return Layout(shape, boxes)


def mean_shape(shapes):
    """The Procrustes mean of shapes (N, 5, 2) and of their mirror images, as they lie on average.

    Returns:
        (5, 2): upright, symmetric about FRAME / 2.
    """
    shapes = np.concatenate([shapes, mirrored_points(shapes, FRAME)])
    mean = shapes.mean(0)
    for _ in range(10):
        mean = geometry.apply(geometry.similarity(shapes, mean), shapes).mean(0)
    back = geometry.similarity(mean, shapes)
    scale = np.exp(np.log(np.hypot(back[:, 0, 0], back[:, 1, 0])).mean())
    return (mean - mean.mean(0)) * scale + shapes.mean((0, 1))


def _grown(low, high, size):
    """The box from low to high with its margin, in the proportions of ``size``."""
    middle, extent = (low + high) / 2, (high - low) * (1 + 2 * MARGIN)
    unit = max(extent[0] / size[1], extent[1] / size[0])
    width, height = unit * size[1], unit * size[0]
    return (*(middle - (width / 2, height / 2)).tolist(), width.item(), height.item())


def mirrored_points(points, width):
    """Points (..., 5, 2) of the mirror image of a plane of that width."""
    return geometry.apply(geometry.mirror(width), points)[..., list(POINTS_MIRROR), :]


def complete(points, shape, side):
    """Points (..., 5, 2) with those not seen where the mean shape has them.

    With fewer than two seen, the face is taken to lie as faces do in a square of that side.
    """
    m = geometry.similarity(shape, points)
    usual = np.array([[side / FRAME, 0, 0], [0, side / FRAME, 0]])
    m = np.where(np.isnan(m).any((-1, -2), keepdims=True), usual, m)
    return np.where(np.isnan(points), geometry.apply(m, shape), points)


# The map from the aligned frame to the first stage's input.
FRAME_TO_FACE = geometry.box_to_picture((0, 0, FRAME, FRAME), (SIDE, SIDE))


def frame_of(points, layout):
    """The map from a plane with these points (5, 2) to the aligned frame."""
    return geometry.similarity(points, layout.shape)


def misfit(points, layout):
    """How far points (..., 5, 2) are from the mean shape, wherever it is: in sizes of that shape.

    Root mean squares. NaN where all points are in one place.
    """
    off = geometry.apply(frame_of(points, layout), points) - layout.shape
    middle = layout.shape - layout.shape.mean(0)
    return np.sqrt((off**2).sum((-1, -2)) / (middle**2).sum())


def part_in_frame(points, layout, name):
    """The map from the aligned frame, with the points there, to the second stage's input."""
    part = PARTS[name]
    left, top, width, height = layout.boxes[name]
    x, y = points[list(part.points)].mean(0)
    return geometry.box_to_picture((x + left, y + top, width, height), part.size)


def box_about(points):
    """The box (x, y, width, height) that the detector would give for a face with these points."""
    middle = points.mean(0)
    unit = math.sqrt(((points - middle) ** 2).sum(1).mean())
    side = BOX_SIDE * unit
    x, y = middle - (0, BOX_RISE * unit)
    return np.array([x - side / 2, y - side / 2, side, side])


def box_of(box):
    """The map from a plane to what key points are looked for in, from a box of a face in it."""
    x, y, width, height = (float(v) for v in box)
    side = BOX_GROWN * max(width, height)
    square = (x + (width - side) / 2, y + (height - side) / 2, side, side)
    return geometry.box_to_picture(square, BOX_SIZE)


def box_again(points, layout):
    """The map to the same, once the points (5, 2) are about known: the face upright, in place."""
    return geometry.compose(box_of(box_about(layout.shape)), frame_of(points, layout))


class View:
    """What views have in common."""

    layout = None

    def facts(self):
        """What a checkpoint keeps: names of what is learned, width of the picture, geometry."""
        layout = self.layout.as_dict() if self.layout else {}
        return {"classes": list(self.classes), "side": self.size[1], "layout": layout}


class Whole(View):
    """The data set's own square, as it is."""

    strength = 1.0

    def __init__(self, faces):
        self.size, self.label_set = tuple(faces.images.shape[-2:]), faces.label_set
        self.classes = self.label_set.names

    def batch(self, faces, chosen, draws):
        """Augmented images (n, 3, h, w) float32, labels (n, h, w) uint8 and points, here None."""
        images, labels, _ = augment(
            faces.images[chosen], faces.labels[chosen], draws, label_set=self.label_set
        )
        return images, labels, None

    def still(self, faces):
        """``Faces`` of the pictures as they are, for evaluation."""
        return faces


class Placed(View):
    """A picture of each face, placed by its key points.

    Args:
        name: ``face``, a key of ``PARTS``, or ``box``.
        layout: :class:`Layout`.
        opened: ``LabelSet`` of the faces that it is given.
        labels: for ``face``, the classes: one of ``LABELS``.
    """

    def __init__(self, name, layout, *, opened=FINE, labels="coarse"):
        self.name, self.layout, self.opened = name, layout, opened
        if name in PARTS:
            part = PARTS[name]
            self.size = part.size
            self.label_set = label_set_of(part)
            places = {one: label for label, one in enumerate(part.classes, start=1)}
            table = [places.get(one, 0) for one in opened.names]
        elif name == "face":
            self.size = (SIDE, SIDE)
            self.label_set, table = label_set_for("the data set", opened, labels)
        else:
            self.size, self.label_set, table = BOX_SIZE, COARSE, opened.coarse
        self.classes = POINTS if name == "box" else self.label_set.names  # what is learned
        self.table = torch.tensor(table, dtype=torch.uint8)
        # Alignment has taken away most of what else is drawn; a detector's box is rough.
        self.strength = 1.5 if name == "box" else 0.5

    def place(self, points):
        """The map from a plane with these points (5, 2) to the picture."""
        if self.name == "box":
            return box_of(box_about(points))
        frame = frame_of(points, self.layout)
        if self.name == "face":
            return geometry.compose(FRAME_TO_FACE, frame)
        inside = geometry.apply(frame, points)
        return geometry.compose(part_in_frame(inside, self.layout, self.name), frame)

    def picture(self, faces, i, *, mirrored, moved=None):
        """One face's image (3, h, w) in 0 .. 255, labels (h, w) uint8, points (5, 2) or NaN."""
        side = faces.images.shape[-1]
        seen = faces.points[i].double().numpy()
        m = np.eye(2, 3)
        if mirrored:
            m, seen = geometry.mirror(side), mirrored_points(seen, side)
        place = self.place(complete(seen, self.layout.shape, side))
        if moved is not None:
            middle = (self.size[1] / 2, self.size[0] / 2)
            place = geometry.compose(geometry.about(moved, middle), place)
        m = geometry.compose(place, m)
        labels = geometry.view_labels(faces.labels[i], m, self.size).long()
        if mirrored:
            labels = torch.tensor(self.opened.mirror)[labels]
        points = torch.from_numpy(geometry.apply(place, seen)).float()
        return geometry.view(faces.images[i], m, self.size), self.table[labels], points

    def batch(self, faces, chosen, draws):
        """Augmented images (n, 3, h, w) float32, labels (n, h, w) uint8, points (n, 5, 2)."""
        rows = [
            self.picture(faces, i, mirrored=mirrored, moved=moved)
            for i, mirrored, moved in zip(
                chosen.tolist(), draws.mirrored.tolist(), draws.matrix.double().numpy(), strict=True
            )
        ]
        images, labels, points = (torch.stack(column) for column in zip(*rows, strict=True))
        return change_colours(images / 255 - 0.5, draws), labels, points

    def still(self, faces):
        """``Faces`` of the pictures, for evaluation: both sides of a part, rough boxes."""
        count = len(faces.images)
        two_sided = self.name in PARTS and PARTS[self.name].two_sided
        moves = [None] * count
        if self.name == "box":
            generator = torch.Generator().manual_seed(0)
            moves = draw(count, self.size, generator=generator, strength=self.strength).matrix
            moves = moves.double().numpy()
        rows = [
            self.picture(faces, i, mirrored=mirrored, moved=moves[i])
            for mirrored in ([False, True] if two_sided else [False])
            for i in range(count)
        ]
        if not rows:
            rows = [(torch.zeros(3, *self.size), torch.zeros(self.size), torch.zeros(5, 2))]
        images, labels, points = (torch.stack(column) for column in zip(*rows, strict=True))
        return Faces(
            images=images.round().to(torch.uint8)[: len(rows) * (count > 0)],
            labels=labels.to(torch.uint8)[: len(rows) * (count > 0)],
            label_set=self.label_set,
            points=points[: len(rows) * (count > 0)],
            skipped=faces.skipped,
        )


def label_set_of(part):
    """The classes of a part as a ``LabelSet``."""
    return LabelSet(
        names=("background", *part.names),
        colours=tuple(CLASSES[name].colour for name in ("background", *part.classes)),
        mirror=tuple(range(len(part.names) + 1)),
    )


def how_to_open(name, labels):
    """The options of ``data.open_dataset`` for a view: whole faces as asked, others larger."""
    if name == "whole":
        return {"labels": labels}
    if name in PARTS:  # the smallest set that has its classes
        labels = next(key for key, label_set in LABEL_SETS.items() if name in parts_of(label_set))
    elif name == "box" or labels == "coarse":
        labels = "fine"
    return {"labels": labels, "side": SOURCE}


def make_view(name, faces, *, labels="coarse", layout=None):
    """A view by its name in ``VIEWS``.

    Args:
        faces: the training split, opened as :func:`how_to_open` says.
        labels: one of ``LABELS``, for ``face``.
        layout: as before, to go on; None to learn it.

    Raises:
        DataError: the faces have no points.
    """
    if name == "whole":
        return Whole(faces)
    if faces.points is None:
        raise DataError(f"the view {name!r} needs key points, and this data set has none")
    layout = layout or learn_layout(faces)
    return Placed(name, layout, opened=faces.label_set, labels=labels)
