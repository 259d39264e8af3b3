"""Planes and what takes one to another: photograph, aligned frame, the networks' inputs.

A position is x, y in pixels, pixel 0 spanning 0 to 1. A map is an affine matrix, (..., 2, 3)
float64 in NumPy: ``A, t = m[:, :2], m[:, 2]`` takes p to ``A p + t``. All that are made here are
similarities, so none loses anything but what lies outside of a picture.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

EXACT = 1e-6


def similarity(source, target):
    """The least-squares similarity (rotation, scale, shift) that takes points to others.

    With points as complex numbers it is ``z -> a z + b``, and linear in a and b.

    Args:
        source, target: arrays (..., P, 2); NaN in either leaves a point out.

    Returns:
        (..., 2, 3); NaN with fewer than two points, or where all of them coincide.
    """
    source, target = np.broadcast_arrays(source, target)
    seen = ~(np.isnan(source) | np.isnan(target)).any(-1)
    z, w = (np.where(seen, p[..., 0] + 1j * p[..., 1], 0) for p in (source, target))
    with np.errstate(invalid="ignore", divide="ignore"):
        z_middle, w_middle = (v.sum(-1) / seen.sum(-1) for v in (z, w))
        z, w = ((v - middle[..., None]) * seen for v, middle in ((z, z_middle), (w, w_middle)))
        a = (z.conj() * w).sum(-1) / (abs(z) ** 2).sum(-1)
        b = w_middle - a * z_middle
    rows = np.stack([a.real, -a.imag, b.real, a.imag, a.real, b.imag], -1)
    return rows.reshape(*a.shape, 2, 3)


def compose(*maps):
    """The map that applies the last of these first, as matrices are multiplied."""
    result = maps[0]
    for inner in maps[1:]:
        product = result[..., :2] @ inner
        product[..., 2] += result[..., 2]
        result = product
    return result


def inverse(m):
    """The map back."""
    if m.ndim == 2:  # as Python's numbers, which is four times as fast
        return np.array(_inverse_of_one(m))
    a, b, c, d = m[..., 0, 0], m[..., 0, 1], m[..., 1, 0], m[..., 1, 1]
    linear = np.stack([d, -b, -c, a], -1) / (a * d - b * c)[..., None]
    linear = linear.reshape(m[..., :2].shape)
    return np.concatenate([linear, -linear @ m[..., 2:]], -1)


def _inverse_of_one(m):
    (a, b, x), (c, d, y) = m.tolist()
    area = a * d - b * c
    a, b, c, d = d / area, -b / area, -c / area, a / area
    return [[a, b, -a * x - b * y], [c, d, -c * x - d * y]]


def apply(m, points):
    """Points (..., P, 2) through maps (..., 2, 3)."""
    return points @ m[..., :2].swapaxes(-1, -2) + m[..., None, :, 2]


def box_to_picture(box, size):
    """The map from a plane to a picture of ``size`` = (h, w) that shows this box of it.

    Args:
        box: left, top, width, height, in the picture's proportions.
    """
    left, top, width, height = (float(v) for v in box)
    x, y = size[1] / width, size[0] / height
    return np.array([[x, 0, -x * left], [0, y, -y * top]])


def mirror(width):
    """The map that swaps the left and the right of a plane of that width."""
    return np.array([[-1.0, 0, width], [0, 1, 0]])


def about(m, middle):
    """The map that does about ``middle`` what ``m`` does about the origin."""
    middle = np.asarray(middle, float)
    shift = m[..., 2] + middle - m[..., :2] @ middle
    return np.concatenate([m[..., :2], shift[..., None]], -1)


def scale_of(m):
    """What a length grows by."""
    return math.sqrt(abs(m[0, 0] * m[1, 1] - m[0, 1] * m[1, 0]))


def shown_box(m, size):
    """The smallest box of whole pixels that holds what ``m`` shows in ``size`` = (h, w).

    Returns:
        left, top, right, bottom: ints, the last two exclusive; it may reach outside of the image.
    """
    h, w = size
    low, high = [], []
    for along, across, start in _inverse_of_one(m):  # of x, of y
        ends = sorted((0, along * w)), sorted((0, across * h))
        low.append(math.floor(start + ends[0][0] + ends[1][0] + EXACT))
        high.append(math.ceil(start + ends[0][1] + ends[1][1] - EXACT))
    return (*low, *high)


def view(image, m, size):
    """The picture that a map makes of an image: bilinear, and averaged first where it shrinks.

    What comes in from outside repeats the border. Only the part that is shown is touched, so the
    image may be large.

    Args:
        image: tensor (C, H, W), uint8 or floating.
        m: (2, 3), image to picture.
        size: h, w of the picture.

    Returns:
        (C, h, w) float32.
    """
    patch, to_image = window(image, m, size, reduction=reduction_of(image, m))
    return pictures(patch, compose(m, to_image)[None], size)[0]


def view_labels(labels, m, size):
    """The same of labels (H, W) uint8: each pixel takes the label at its middle; (h, w) uint8."""
    # As numbers they survive the trip, since nearest never mixes them.
    patch, to_image = window(labels[None], m, size)
    shown = pictures(patch, compose(m, to_image)[None], size, mode="nearest")
    return shown[0, 0].to(torch.uint8)


def pictures(image, maps, size, *, mode="bilinear"):
    """What several maps make of one image, without averaging: (N, C, h, w) of its dtype.

    Args:
        image: tensor (C, H, W), floating.
        maps: (N, 2, 3), image to picture.
        size: h, w of the pictures.
    """
    if (
        len(maps) == 1
        and tuple(size) == image.shape[-2:]
        and abs(maps[0] - np.eye(2, 3)).max() < EXACT
    ):
        return image[None]
    back = inverse(maps)
    # Where grid_sample is to look, in units of half the image's sides about its middle.
    half = np.array([image.shape[2] / 2, image.shape[1] / 2])
    axes = (back / half[:, None]).astype(np.float32)
    axes[:, :, 2] -= 1
    x, y, start = torch.from_numpy(axes).to(image.device).unbind(2)
    columns = torch.arange(0.5, size[1], device=image.device)
    rows = torch.arange(0.5, size[0], device=image.device)
    # F.affine_grid makes the same in twice the time.
    along = columns[:, None] * x[:, None] + start[:, None]
    grid = along[:, None] + (rows[:, None] * y[:, None])[:, :, None]
    many = image.expand(len(maps), -1, -1, -1)
    return F.grid_sample(many, grid, mode, "border", align_corners=False)


def reduction_of(image, m, *, finest=1.0):
    """How many pixels of an image (C, H, W) may be averaged before a map is applied, each way.

    Args:
        finest: pixels of the picture that one of the average should still be worth.
    """
    wanted = int(1 / (finest * scale_of(m)) + EXACT)
    return max(1, min(wanted, *image.shape[-2:]))


def window(image, m, size, *, reduction=1):
    """The part of an image (C, H, W) that ``m`` shows, averaged over squares of ``reduction``.

    Returns:
        (C, h, w) float32, and the map from it to the image.
    """
    height, width = image.shape[-2:]
    # Bilinear weights reach one pixel further, and a pixel of the average is so wide.
    spare = 2 * reduction
    left, top, right, bottom = shown_box(m, size)
    # Wholly outside, the nearest line of pixels is what is repeated.
    left, right = min(max(left - spare, 0), width - 1), max(min(right + spare, width), 1)
    top, bottom = min(max(top - spare, 0), height - 1), max(min(bottom + spare, height), 1)
    part = image[..., top:bottom, left:right].float()
    if reduction > 1:
        # Whole squares: the average would drop a remainder.
        x, y = -(right - left) % reduction, -(bottom - top) % reduction
        if x or y:
            part = F.pad(part[None], (0, x, 0, y), mode="replicate")[0]
        part = F.avg_pool2d(part[None], reduction)[0]
    return part, np.array([[float(reduction), 0, left], [0, reduction, top]])
