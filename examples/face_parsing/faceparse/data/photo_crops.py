"""Which part of a photograph becomes the network's square, and how it gets there."""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from faceparse.inference import image_io

from .labels import CLASSES, mapped

RULE = 4  # raise it when what comes out changes: cached faces are then decoded again
MARGIN = 2  # side of the square about a face, in longer sides of its box


class Place(NamedTuple):
    """A box in the pixels of the label map, and what one of its pixels is scaled by."""

    left: int
    top: int
    width: int
    height: int
    scale: np.ndarray  # (2,) output pixels in one label pixel, across and down
    size: tuple[int, int]  # width, height of the output; the rest of the square is zero


def whole(labels, table, side):
    """All of the photograph, whatever its proportions."""
    height, width = labels.shape
    return Place(0, 0, width, height, np.array([side / width, side / height]), (side, side))


def face(labels, table, side):
    """A square about the annotated face, twice its box's longer side; it may reach outside.

    Raises:
        ValueError: there is no face label.
    """
    # By name: a set of the user's own may have classes that CLASSES lacks.
    of_face = [name in CLASSES and CLASSES[name].coarse == "skin" for name in table.names]
    on = mapped(labels, of_face).view(bool)
    rows, columns = np.flatnonzero(on.any(1)), np.flatnonzero(on.any(0))
    if not rows.size:
        raise ValueError("holds no face label")
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    length = int(MARGIN * max(bottom - top, right - left))
    return Place(
        int(left + right - length) // 2,
        int(top + bottom - length) // 2,
        length,
        length,
        np.full(2, side / length),
        (side, side),
    )


def padded(labels, table, side):
    """All of the photograph, its longer side scaled to the square's, zeros right or below."""
    height, width = labels.shape
    factor = side / max(width, height)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return Place(0, 0, width, height, np.array(size) / (width, height), size)


PLACES = {"whole": whole, "face": face, "padded": padded}


def image_at(image, label_size, place, side):
    """The pixels (side, side, 3) uint8 of an opened image at a place, upright and in sRGB.

    What lies outside of the photograph repeats its border.

    Args:
        image: a Pillow image, its pixels not read yet.
        label_size: (width, height) of the label map that ``place`` refers to.
    """
    width, height = image_io.upright_size(image)
    x, y = width / label_size[0], height / label_size[1]
    box = np.array([place.left, place.top, place.left + place.width, place.top + place.height])
    box = box * (x, y, x, y)
    # A JPEG can be decoded at a half, a quarter or an eighth in much less time; draft() takes
    # the smallest that is no smaller than what is asked for here.
    shrink = min((box[2] - box[0]) / place.size[0], (box[3] - box[1]) / place.size[1])
    stored, profile = image.width, image.info.get("icc_profile")
    wanted = [math.ceil(length / max(shrink, 1) - 1e-6) for length in image.size]
    drafted = image.draft("RGB", wanted)
    if drafted is not None:
        box = box * (drafted[1][2] / stored)
    ImageOps.exif_transpose(image, in_place=True)
    image, box = _extended(image.convert("RGB"), box)
    # Bilinear in Pillow averages over the whole source area, so shrinking does not alias.
    image = image.resize(place.size, Image.Resampling.BILINEAR, tuple(box), reducing_gap=2.0)
    pixels = np.asarray(image_io.in_srgb(image, profile))
    if place.size == (side, side):
        return pixels
    square = np.zeros((side, side, 3), np.uint8)
    square[: place.size[1], : place.size[0]] = pixels
    return square


def _extended(image, box):
    """The image cropped or grown to hold ``box``, its border repeated; and the box in it."""
    if box[0] >= 0 and box[1] >= 0 and box[2] <= image.width and box[3] <= image.height:
        return image, box
    left, top = np.floor(box[:2]).astype(int)
    right, bottom = np.ceil(box[2:]).astype(int)
    columns = np.arange(left, right).clip(0, image.width - 1)
    rows = np.arange(top, bottom).clip(0, image.height - 1)
    pixels = np.asarray(image)[rows][:, columns]
    return Image.fromarray(pixels), (box - (left, top, left, top)).clip(
        0, (right - left, bottom - top, right - left, bottom - top)
    )


def labels_at(labels, place, side):
    """Labels (side, side) uint8 at a place, nearest; 0 outside of the label map."""
    height, width = labels.shape
    # The middle of each output pixel, as Pillow's nearest takes it.
    columns = place.left + ((np.arange(place.size[0]) + 0.5) * (place.width / place.size[0]))
    rows = place.top + ((np.arange(place.size[1]) + 0.5) * (place.height / place.size[1]))
    columns, rows = np.floor(columns).astype(int), np.floor(rows).astype(int)
    square = np.zeros((side, side), np.uint8)
    inside_x, inside_y = (columns >= 0) & (columns < width), (rows >= 0) & (rows < height)
    block = labels[rows[inside_y]][:, columns[inside_x]]
    square[np.ix_(np.flatnonzero(inside_y), np.flatnonzero(inside_x))] = block
    return square
