"""Augmentation of a whole batch at once: affine and mirror with the labels, colour and noise.

Every random number comes from the generator passed in, on the CPU: the same generator state gives
the same batch, on any device.
"""

import math

import torch
import torch.nn.functional as F

SHIFT = 0.10  # of the side, either way
SCALE = (0.9, 1.1)
ROTATION = 15.0  # degrees, either way
COLOUR_SHARE = 0.2  # one image in five gets a colour mix, a contrast stretch or noise


def normalise(images):
    """uint8 images (N, 3, H, W) to what the networks take: float32 in -0.5 .. 0.5."""
    return images.float().div_(255).sub_(0.5)


def augment(images, labels, *, label_set, generator, points=None, points_mirror=None):
    """A random similarity transform, mirror and colour change for each image of a batch.

    Args:
        images: (N, 3, H, W) uint8.
        labels: (N, H, W) uint8.
        label_set: ``datasets.LabelSet``; its ``mirror`` swaps left and right labels.
        generator: CPU ``torch.Generator``.
        points: (N, P, 2) float32, x and y in pixels, or None.
        points_mirror: the P indices that swap left and right points; needed with ``points``.

    Returns:
        images (N, 3, H, W) float32, labels (N, H, W) uint8, points (N, P, 2) or None.
    """
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    matrix = random_similarity(len(images), images.shape[-2:], generator=generator)
    matrix[mirrored, :, 0] *= -1  # M R, with the reflection R of x about the image's middle
    images, labels, points = warp(normalise(images), labels, matrix, points=points)
    swap = torch.tensor(label_set.mirror, dtype=labels.dtype, device=labels.device)
    if label_set.mirror != tuple(range(len(label_set.mirror))):
        labels[mirrored] = swap[labels[mirrored].long()]
    if points is not None:
        points[mirrored] = points[mirrored][:, list(points_mirror)]
    return change_colours(images, generator=generator), labels, points


def random_similarity(n, size, *, generator):
    """``n`` matrices (n, 2, 3) that move pixel positions about the middle of an H x W image."""
    unit = torch.rand(n, 4, generator=generator) * 2 - 1
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


def change_colours(images, *, generator):
    """On one image in five: mix the channels, stretch the contrast, or add noise.

    Args:
        images: (N, 3, H, W) float32 in -0.5 .. 0.5; written to.

    Returns:
        images.
    """
    n = len(images)
    chosen = torch.rand(n, generator=generator) < COLOUR_SHARE
    kind = torch.randint(3, (n,), generator=generator)
    unit = torch.rand(n, 3, 3, generator=generator) * 2 - 1
    for i in chosen.nonzero()[:, 0].tolist():
        image = images[i]
        if kind[i] == 0:
            mix = (torch.eye(3) + 0.2 * unit[i]).to(image)
            image = torch.einsum("dc,chw->dhw", mix, image)
        elif kind[i] == 1:
            level = image.mean()
            image = level + (image - level) * (1 + 0.4 * unit[i, 0, 0].item())
        else:
            noise = torch.randn(image.shape, generator=generator)
            image = image + 0.02 * (1 + unit[i, 0, 0].item()) * noise.to(image)
        images[i] = image.clamp(-0.5, 0.5)
    return images
