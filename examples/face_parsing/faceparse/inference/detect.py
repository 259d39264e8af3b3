"""Parse a scene of many faces by a network for one face: detect, cut out, parse, paste back."""

import functools
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from faceparse.data import DataError, transforms

# Of the frontal cascades that OpenCV brings along, the one with the fewest false boxes, and on
# scenes the most faces: 57 of 60 photographs of one face, and 96 of 106 faces in 30 scenes
# composed of these, with 4 false boxes.
CASCADE = "haarcascade_frontalface_alt2.xml"
SCALE_STEP, NEIGHBOURS = 1.1, 4
SMALLEST = 24  # pixels, the side of a box; the cascade's own window has 20
REDUCED = (320, 640, 1600)  # pixels of a photograph's longer side, when it is searched


class Framing(NamedTuple):
    """How photographs of one face lie about the detector's box, in widths of that box."""

    factor: float  # the side of the photograph
    rise: float  # how far its middle lies above that of the box


# The medians over the cascade's boxes on 57 portraits of CelebAMask-HQ, whole photographs as the
# loaders give them (5 % and 95 %: factor 1.45 and 1.73). Other photographs, LFW's own among them,
# may be cut more widely: ``framing`` measures it on those that a network was trained with.
FRAMING = Framing(factor=1.60, rise=0.08)


def open_detector():
    """:func:`detect` with the cascade that OpenCV brings along.

    Raises:
        DataError: this OpenCV has no cascades.
    """
    try:
        cascade = cv2.CascadeClassifier(cv2.data.haarcascades + CASCADE)
        missing = cascade.empty()
    except (AttributeError, cv2.error):
        missing = True
    if missing:
        raise DataError(
            f"OpenCV {cv2.__version__} has no {CASCADE}: install opencv-python-headless>=4.10,<5"
        )
    return functools.partial(detect, cascade=cascade)


def detect(image, *, cascade=None):
    """The frontal faces of an image.

    Args:
        image: (H, W, 3) uint8 RGB array.
        cascade: ``cv2.CascadeClassifier``; by default opened anew, see :func:`open_detector`.

    Returns:
        boxes (M, 4) float32, x, y, width, height in pixels, the largest first.
    """
    if cascade is None:
        return open_detector()(image)
    grey = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)
    found = cascade.detectMultiScale(grey, SCALE_STEP, NEIGHBOURS, minSize=(SMALLEST, SMALLEST))
    # In an order that does not depend on that of OpenCV's threads.
    boxes = sorted((tuple(box) for box in found), key=lambda box: (-box[2] * box[3], box))
    return np.array(boxes, np.float32).reshape(-1, 4)


def detect_reduced(image, *, detector, everyone=False):
    """Boxes (M, 4) in a photograph of any size, which is searched at reduced ones.

    At first large faces are looked for, quickly, and smaller ones only where there is none; or,
    for ``everyone``, in any case, after those that were found before.

    Args:
        image: (H, W, 3) uint8 RGB array.
        detector: as :func:`parse_scene` takes it.
    """
    height, width = image.shape[:2]
    boxes = np.zeros((0, 4), np.float32)
    for side in REDUCED:
        factor = min(1.0, side / max(height, width))
        size = max(1, round(width * factor)), max(1, round(height * factor))
        small = image if factor == 1 else cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        found = detector(small) * np.float32([width / size[0], height / size[1]] * 2)
        new = [box for box in found if not any(same_face(box, known) for known in boxes)]
        boxes = np.concatenate([boxes, *(box[None] for box in new)])
        if factor == 1 or (len(boxes) and not everyone):
            break
    return boxes


def same_face(box, other):
    """Whether the middle of either box (x, y, width, height) lies in the other."""

    def holds(outer, inner):
        middle = inner[:2] + inner[2:] / 2
        return bool(((middle >= outer[:2]) & (middle <= outer[:2] + outer[2:])).all())

    return holds(box, other) or holds(other, box)


def framing(images, *, detector):
    """The framing of photographs of one face: medians over the largest box in each.

    Args:
        images: (N, 3, S, S) uint8.
        detector: as :func:`parse_scene` takes it.

    Returns:
        :class:`Framing` and the number of images with a face; None and 0 without any.
    """
    measured = []
    for image in images:
        boxes = detector(as_array(image))
        if len(boxes):
            _, y, width, height = (float(value) for value in boxes[0])
            side = image.shape[-1]
            measured.append((side / width, (y + height / 2 - side / 2) / width))
    if not measured:
        return None, 0
    return Framing(*(float(value) for value in np.median(measured, axis=0))), len(measured)


@torch.inference_mode()
def parse_scene(model, image, *, detector, side=128, framing=FRAMING):
    """The labels of a scene, by parsing each face that the detector finds.

    Args:
        model: a network for one face, or any function of images (M, 3, side, side) float32,
            normalised, to ``models.Outputs``; label 0 is background.
        image: (3, H, W) uint8.
        detector: function of an image (H, W, 3) uint8 RGB array to boxes (M, 4), largest first.
        side: pixels of the network's input.
        framing: :class:`Framing` of the photographs that the network was trained with.

    Returns:
        labels (H, W) uint8, on the CPU; all 0 without a face. Where faces overlap, the larger
        box, hence the nearer face, covers the smaller one; its background covers nothing.
    """
    image = image.cpu()
    labels = torch.zeros(image.shape[1:], dtype=torch.uint8)
    squares = [square(box, framing) for box in detector(as_array(image))]
    if not squares:
        return labels
    faces = torch.stack([cut(image, *place, side=side) for place in squares])
    parameter = next(model.parameters(), None) if hasattr(model, "parameters") else None
    if parameter is not None:
        faces = faces.to(parameter.device)
    logits = model(transforms.normalise(faces)).logits.cpu()
    height, width = labels.shape
    for (left, top, size), maps in reversed(list(zip(squares, logits, strict=True))):
        maps = F.interpolate(maps[None], size=(size, size), mode="bilinear", align_corners=False)
        parsed = maps[0].argmax(0).to(torch.uint8)
        # The part of the square that lies in the image.
        x, y = max(left, 0), max(top, 0)
        parsed = parsed[y - top : height - top, x - left : width - left]
        under = labels[y : y + parsed.shape[0], x : x + parsed.shape[1]]
        under[parsed != 0] = parsed[parsed != 0]
    return labels


def square(box, framing):
    """The left, top and side, in whole pixels, of the photograph about a box."""
    x, y, width, height = (float(value) for value in box)
    side = max(1, round(framing.factor * width))
    left = x + width / 2 - side / 2
    top = y + height / 2 - framing.rise * width - side / 2
    return round(left), round(top), side


def cut(image, left, top, size, *, side):
    """A square of an image (3, H, W) uint8, scaled to (3, side, side) uint8.

    What lies outside the image repeats its border, as in ``transforms.warp``.
    """
    rows = torch.arange(top, top + size).clamp(0, image.shape[1] - 1)
    columns = torch.arange(left, left + size).clamp(0, image.shape[2] - 1)
    part = image[:, rows[:, None], columns][None]
    if size == side:
        return part[0]
    return F.interpolate(part, size=(side, side), mode="bilinear", antialias=True)[0]


def as_array(image):
    """An image (3, H, W) uint8 as an array (H, W, 3)."""
    return image.permute(1, 2, 0).contiguous().cpu().numpy()
