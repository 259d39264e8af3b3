"""Another colour for a part of a face, which keeps its texture and light."""

import argparse
import re

import numpy as np
import torch
from PIL import Image

from faceparse.data.labels import CLASSES

from .detect import as_array
from .image_io import as_tensor, in_srgb

# The classes whose shares together are the mask of a part.
RECOLOURED = {
    part: tuple(name for name, row in CLASSES.items() if row.recoloured == part)
    for part in dict.fromkeys(row.recoloured for row in CLASSES.values() if row.recoloured)
}
EDGE = (0.2, 0.8)  # shares of a part that count as none and as all: a network is never quite sure
LIGHTNESS = 0.75  # of the way to the colour's lightness: all of it would flatten light and shade
DARKEST = 0.05  # black and white themselves, as odds, are infinitely far away
TINY = 1e-6  # instead of a lightness of 0 to divide by; such a colour has no chroma
STRIP = 1 << 20  # pixels at a time, so that memory does not grow with the photograph

# From linear sRGB to OKLab: a matrix, the cube root, a matrix.
TO_CONES = torch.tensor(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ],
    dtype=torch.float64,
)
TO_LAB = torch.tensor(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ],
    dtype=torch.float64,
)
FROM_CONES, FROM_LAB = TO_CONES.inverse().float(), TO_LAB.inverse().float()
TO_CONES, TO_LAB = TO_CONES.float(), TO_LAB.float()


def recolour(image, mask, colour, strength):
    """Give a part of an image another colour, and keep its texture and light.

    In OKLab. The odds of lightness, L / (1 - L), of all pixels grow by one factor, which takes
    their mean most of the way to the colour's: black and white stay, and what was lighter than its
    neighbour is so afterwards. Hue and chroma are those of the colour, the chroma falling to none
    at black and at white, as in shadows and highlights.

    Args:
        image: (3, H, W) uint8.
        mask: (H, W) floating, the share of the part in each pixel, 0 to 1; below and above
            ``EDGE`` it counts as 0 and 1, and rises smoothly in between.
        colour: red, green, blue, 0 to 255.
        strength: 0, the image as it is, to 1.

    Returns:
        (3, H, W) uint8; where the mask is 0, the very pixels of the image.
    """
    if mask.shape != image.shape[1:]:
        raise ValueError(f"mask must be {tuple(image.shape[1:])}, got {tuple(mask.shape)}")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be in 0 .. 1, got {strength!r}")
    result, strips = image.clone(), list(_strips(mask > EDGE[0]))
    if not strips or strength == 0:
        return result
    total = amount = 0.0
    for place in strips:
        weight = _soft(mask[place])
        total += (weight * _to_lab(image[place])[0]).sum().item()
        amount += weight.sum().item()
    target, a, b = _to_lab(torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1)).flatten().tolist()
    factor = (_odds(target) / _odds(total / amount)) ** LIGHTNESS
    for place in strips:
        lab = _to_lab(image[place])
        light = factor * lab[0] / (1 + (factor - 1) * lab[0])
        chroma = torch.minimum(light / max(target, TINY), (1 - light) / max(1 - target, TINY))
        new = torch.stack([light, a * chroma, b * chroma])
        weight = strength * _soft(mask[place])
        changed = _to_bytes(lab.lerp(new, weight))
        result[place] = torch.where(weight > 0, changed, image[place])
    return result


def _strips(inside):
    """Indices (..., rows, columns) of strips that cover all that is True in (H, W)."""
    rows, columns = inside.any(1).nonzero(), inside.any(0).nonzero()
    if len(rows):
        (top, bottom), (left, right) = ((v[0].item(), v[-1].item() + 1) for v in (rows, columns))
        height = max(1, STRIP // (right - left))
        for start in range(top, bottom, height):
            yield ..., slice(start, min(start + height, bottom)), slice(left, right)


def _soft(mask):
    t = ((mask - EDGE[0]) / (EDGE[1] - EDGE[0])).clamp(0, 1)
    return t * t * (3 - 2 * t)


def _odds(lightness):
    lightness = min(max(lightness, DARKEST), 1 - DARKEST)
    return lightness / (1 - lightness)


def _to_lab(image):
    """(3, H, W) uint8 sRGB to OKLab, float32; L is 0 to 1."""
    levels = torch.arange(256) / 255
    linear = torch.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    cones = torch.tensordot(TO_CONES, linear[image.int()], 1) ** (1 / 3)
    return torch.tensordot(TO_LAB, cones, 1)


def _to_bytes(lab):
    """The way back; what sRGB has not is cut off."""
    linear = torch.tensordot(FROM_CONES, torch.tensordot(FROM_LAB, lab, 1) ** 3, 1).clamp_(0, 1)
    levels = torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return levels.mul_(255).round_().to(torch.uint8)


def recolour_part(image, parsed_faces, part, colour, strength):
    """:func:`recolour` of a part, a key of ``RECOLOURED``, of each parsed face by its own light."""
    for parsed_face in parsed_faces:
        names = [name for name in RECOLOURED[part] if name in parsed_face.label_set.names]
        image = recolour(image, parsed_face.score(*names), colour, strength)
    return image


def colour_of(text):
    """An argparse type: '#rrggbb' to red, green, blue."""
    if not re.fullmatch("#[0-9a-fA-F]{6}", text):
        raise argparse.ArgumentTypeError(f"must be like '#8b2252', got {text!r}")
    return tuple(bytes.fromhex(text[1:]))


def converted(image, profile, *, back=False):
    """An image (3, H, W) uint8 in sRGB, from an ICC profile or None; or back to the profile."""
    if not profile:
        return image
    return as_tensor(np.asarray(in_srgb(Image.fromarray(as_array(image)), profile, back=back)))
