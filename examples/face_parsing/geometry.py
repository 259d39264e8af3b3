"""Planes and what takes one to another: photograph, aligned frame, the networks' inputs.

A position is x, y in pixels, pixel 0 spanning 0 to 1. A map is an affine matrix, (..., 2, 3)
float64 in NumPy: ``A, t = m[:, :2], m[:, 2]`` takes p to ``A p + t``. All that are made here are
similarities, so none loses anything but what lies outside of a picture.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F


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
    linear = np.linalg.inv(m[..., :2])
    return np.concatenate([linear, -linear @ m[..., 2:]], -1)


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
    corners = apply(inverse(m), np.array([[0, 0], [w, 0], [0, h], [w, h]], float))
    low, high = corners.min(0).tolist(), corners.max(0).tolist()
    return (*(math.floor(v + 1e-6) for v in low), *(math.ceil(v - 1e-6) for v in high))


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
    reduction = max(1, min(int(1 / scale_of(m) + 1e-6), *image.shape[-2:]))
    part, m = _window(image, m, size, reduction)
    part = part.float()[None]
    if reduction > 1:
        part = F.avg_pool2d(part, reduction)
        m = compose(m, np.array([[reduction, 0.0, 0], [0, reduction, 0]]))
    return F.grid_sample(part, _grid(m, size, part), "bilinear", "border", align_corners=False)[0]


def view_labels(labels, m, size):
    """The same of labels (H, W) uint8: each pixel takes the label at its middle; (h, w) uint8."""
    part, m = _window(labels[None], m, size, 1)
    part = part.float()[None]  # indices survive the trip, as nearest never mixes them
    shown = F.grid_sample(part, _grid(m, size, part), "nearest", "border", align_corners=False)
    return shown[0, 0].to(torch.uint8)


def _window(image, m, size, reduction):
    """The part of an image (C, H, W) that ``m`` shows, and the map from that part."""
    height, width = image.shape[-2:]
    # Bilinear weights reach one pixel further, and a pixel of the reduced image is so wide.
    spare = 2 * reduction
    left, top, right, bottom = shown_box(m, size)
    left, right = (min(max(v, 0), width) for v in (left - spare, right + spare))
    top, bottom = (min(max(v, 0), height) for v in (top - spare, bottom + spare))
    # Wholly outside, the nearest line of pixels is what is repeated.
    left, right = min(left, width - 1), max(right, 1)
    top, bottom = min(top, height - 1), max(bottom, 1)
    part = image[..., top:bottom, left:right]
    # Whole blocks: the average would drop a remainder.
    x, y = -(right - left) % reduction, -(bottom - top) % reduction
    if x or y:
        part = F.pad(part.float()[None], (0, x, 0, y), mode="replicate")[0]
    return part, compose(m, np.array([[1.0, 0, left], [0, 1, top]]))


def _grid(m, size, image):
    """What grid_sample takes: where each pixel of a picture comes from; (1, h, w, 2)."""
    height, width = image.shape[-2:]
    h, w = size
    # Both planes in units of half their sides, about their middles.
    out = np.array([[w / 2, 0, w / 2], [0, h / 2, h / 2]])
    into = np.array([[2 / width, 0, -1], [0, 2 / height, -1]])
    theta = torch.from_numpy(compose(into, inverse(m), out)).float().to(image.device)
    return F.affine_grid(theta[None], (1, 1, h, w), align_corners=False)
