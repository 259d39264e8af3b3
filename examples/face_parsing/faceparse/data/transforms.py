"""Augmentation of a whole batch at once: affine and mirror with the labels, colour and noise.

What is random is drawn first (``draw``), on the CPU, and then applied: the same draws give the same
batch on any device, and a part of the draws the same part of the batch.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

SHIFT = 0.10  # of the side, either way
SCALE = (0.9, 1.1)
ROTATION = 15.0  # degrees, either way
COLOUR_SHARE = 0.2  # one image in five gets a colour mix, a contrast stretch or noise


def normalise(images):
    """uint8 images (N, 3, H, W) to what the networks take: float32 in -0.5 .. 0.5."""
    return images.float().div_(255).sub_(0.5)


def network_input(images):
    """The same in the layout that the networks are fastest with."""
    return normalise(images).contiguous(memory_format=torch.channels_last)


class Draws(NamedTuple):
    """The random choices for a batch of n images; indexed, those of a part of it."""

    mirrored: torch.Tensor  # (n,) bool
    matrix: torch.Tensor  # (n, 2, 3), the similarity that follows the mirroring; see ``warp``
    colour: torch.Tensor  # (n,) the change of colours: -1 none, 0 mix, 1 contrast, 2 noise
    unit: torch.Tensor  # (n, 3, 3) in -1 .. 1, how much of it
    seeds: torch.Tensor  # (n,) int64, for all else that is drawn for an image

    def part(self, rows):
        return Draws(*(field[rows] for field in self))


def draw(n, size, *, generator, strength=1.0):
    """The random choices for ``n`` images of H x W = ``size``, from a CPU ``torch.Generator``.

    ``strength`` is that of shift, scale and rotation, in what is usual.
    """
    changed = torch.rand(n, generator=generator) < COLOUR_SHARE
    kind = torch.randint(3, (n,), generator=generator)
    return Draws(
        mirrored=torch.rand(n, generator=generator) < 0.5,
        matrix=random_similarity(n, size, generator=generator, strength=strength),
        colour=torch.where(changed, kind, -1),
        unit=torch.rand(n, 3, 3, generator=generator) * 2 - 1,
        seeds=torch.randint(2**62, (n,), generator=generator),
    )


def augment(images, labels, draws, *, label_set, points=None, points_mirror=None):
    """Transform, mirror and recolour each image of a batch as ``draws`` says.

    Args:
        images: (N, 3, H, W) uint8.
        labels: (N, H, W) uint8.
        draws: from :func:`draw`, of N images.
        label_set: ``data.LabelSet``; its ``mirror`` swaps left and right labels.
        points: (N, P, 2) float32, x and y in pixels, or None.
        points_mirror: the P indices that swap left and right points; needed with ``points``.

    Returns:
        images (N, 3, H, W) float32, labels (N, H, W) uint8, points (N, P, 2) or None.
    """
    mirrored, matrix = draws.mirrored, draws.matrix.clone()
    matrix[mirrored, :, 0] *= -1  # M R, with the reflection R of x about the image's middle
    images, labels, points = warp(normalise(images), labels, matrix, points=points)
    swap = torch.tensor(label_set.mirror, dtype=labels.dtype, device=labels.device)
    if label_set.mirror != tuple(range(len(label_set.mirror))):
        labels[mirrored] = swap[labels[mirrored].long()]
    if points is not None:
        points[mirrored] = points[mirrored][:, list(points_mirror)]
    return change_colours(images, draws), labels, points


def random_similarity(n, size, *, generator, strength=1.0):
    """``n`` matrices (n, 2, 3) that move pixel positions about the middle of an H x W image."""
    unit = strength * (torch.rand(n, 4, generator=generator) * 2 - 1)
    angle = unit[:, 0] * math.radians(ROTATION)
    middle, spread = sum(SCALE) / 2, (SCALE[1] - SCALE[0]) / 2
    scale = middle + spread * unit[:, 1]
    cos, sin = scale * angle.cos(), scale * angle.sin()
    shift = unit[:, 2:] * SHIFT * torch.tensor([size[1], size[0]])
    return torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).view(n, 2, 3)


def warp(images, labels, matrix, *, points=None):
    """Move images (bilinear), labels (nearest) and points by ``matrix``.

    A position p (x, y in pixels) goes to ``A (p - c) + c + t`` with ``A, t = matrix[:, :, :2],
    matrix[:, :, 2]`` and c the middle. What comes in from outside repeats the border.

    Args:
        images: (N, 3, H, W) float32.
        labels: (N, H, W) uint8.
        matrix: (N, 2, 3) float32.
        points: (N, P, 2) or None.

    Returns:
        images, labels, points, as given in shape and dtype.
    """
    n, _, height, width = images.shape
    half = torch.tensor([width / 2, height / 2])
    linear, shift = matrix[:, :, :2], matrix[:, :, 2]
    if points is not None:
        points = (points - half) @ linear.transpose(1, 2) + half + shift[:, None]
    # grid_sample asks where each output pixel comes from, in units of half the side.
    inverse = torch.linalg.inv(linear) * half / half[:, None]
    origin = -(inverse @ (shift / half)[:, :, None])
    theta = torch.cat([inverse, origin], 2).to(images.device)
    grid = F.affine_grid(theta, (n, 1, height, width), align_corners=False)
    images = F.grid_sample(images, grid, "bilinear", "border", align_corners=False)
    # Indices survive the trip through float32, as nearest never mixes them.
    labels = F.grid_sample(labels[:, None].float(), grid, "nearest", "border", align_corners=False)
    return images, labels[:, 0].to(torch.uint8), points


def change_colours(images, draws):
    """Mix the channels, stretch the contrast, or add noise, as ``draws`` says.

    Args:
        images: (N, 3, H, W) float32 in -0.5 .. 0.5; written to.

    Returns:
        images.
    """
    for i in (draws.colour >= 0).nonzero()[:, 0].tolist():
        image, unit = images[i], draws.unit[i]
        if draws.colour[i] == 0:
            mix = (torch.eye(3) + 0.2 * unit).to(image)
            image = torch.einsum("dc,chw->dhw", mix, image)
        elif draws.colour[i] == 1:
            level = image.mean()
            image = level + (image - level) * (1 + 0.4 * unit[0, 0].item())
        else:
            generator = torch.Generator().manual_seed(draws.seeds[i].item())
            noise = torch.randn(image.shape, generator=generator)
            image = image + 0.02 * (1 + unit[0, 0].item()) * noise.to(image)
        images[i] = image.clamp(-0.5, 0.5)
    return images
