"""The three losses of the first stage: labels from X, boundary from G, labels from the output.

The second stage has the last of these; the key points have a loss of their own.

Each is a sum over pixels and their count, not a mean: both add up over the parts of a batch, so
that processes that share a batch can divide by the count of all of it. For the same reason, what is
drawn at random is drawn for each image from its own seed.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from faceparse.models import Points

OTHERS_PER_BOUNDARY = 5


class Loss(NamedTuple):
    """A loss over ``count`` pixels; its mean is ``total / count``."""

    total: torch.Tensor  # scalar
    count: torch.Tensor  # scalar, no gradient


def resize_labels(labels, size):
    """Labels (N, H, W) to (N, *size), nearest."""
    if labels.shape[1:] == tuple(size):
        return labels
    return F.interpolate(labels[:, None].float(), size=size, mode="nearest")[:, 0].to(labels.dtype)


def boundary_map(labels):
    """Where a pixel differs in label from one of its 4 neighbours: (N, H, W) to bool (N, H, W).

    Both sides of a border count, so that it is two pixels wide. The image's rim is no border.
    """
    boundary = torch.zeros_like(labels, dtype=torch.bool)
    differs = labels[:, 1:] != labels[:, :-1]
    boundary[:, 1:] |= differs
    boundary[:, :-1] |= differs
    differs = labels[:, :, 1:] != labels[:, :, :-1]
    boundary[:, :, 1:] |= differs
    boundary[:, :, :-1] |= differs
    return boundary


def sample(wanted, others, ratio, seeds):
    """All wanted pixels of each image, and ``ratio`` times as many drawn from the others.

    Args:
        wanted, others: bool (N, h, w); no pixel is in both.
        ratio: int; without repeats, and all of the others where they are fewer.
        seeds: N ints, one an image, which decide the draw.

    Returns:
        bool (N, h, w).
    """
    size = wanted[0].numel()
    # In float64, so that no two lots of an image are equal, but by a chance of one in millions.
    lots = torch.stack(
        [
            torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            for seed in seeds
        ]
    ).to(wanted.device)
    lots[~others.flatten(1)] = 2  # after every other
    quotas = [min(ratio * count, size) for count in wanted.flatten(1).sum(1).tolist()]
    # The quota's last lot, a part of the time that all of them in order would take.
    last = [
        one.kthvalue(quota).values if quota else one.new_tensor(-1.0)
        for one, quota in zip(lots, quotas, strict=True)
    ]
    drawn = (lots <= torch.stack(last)[:, None]).view_as(others)
    return wanted | (drawn & others)


def sample_background(labels, ratio, seeds):
    """Every pixel that is not background, and ``ratio`` times as many that are; bool (N, h, w).

    For scenes in which faces are few: an image without any contributes nothing.
    """
    # Another draw than the boundary's, which is made from what this one leaves.
    return sample(labels != 0, labels == 0, ratio, [seed ^ 1 for seed in seeds])


def label_loss(logits, labels, *, pixels=None):
    """Softmax cross entropy against labels resized to the logits' size.

    Args:
        logits: (N, classes, h, w).
        labels: (N, H, W) uint8.
        pixels: bool (N, h, w), those that count; None for all.
    """
    labels = resize_labels(labels, logits.shape[-2:]).long()
    if pixels is None:
        total = F.cross_entropy(logits, labels, reduction="sum")
        return Loss(total, torch.tensor(float(labels.numel()), device=logits.device))
    each = F.cross_entropy(logits, labels, reduction="none")
    return Loss((each * pixels).sum(), pixels.sum().float())


def boundary_loss(gate_logit, labels, *, seeds, pixels=None):
    """Logistic cross entropy of the gate: 0 on a boundary, 1 elsewhere.

    Boundary pixels are few. All of them count, and for each one ``OTHERS_PER_BOUNDARY`` pixels
    drawn from the rest of the image.

    Args:
        gate_logit: (N, 1, h, w).
        labels: (N, H, W) uint8.
        seeds: as in :func:`sample`.
        pixels: bool (N, h, w), those that may be drawn as the rest; None for all.
    """
    boundary = boundary_map(resize_labels(labels, gate_logit.shape[-2:]))
    others = ~boundary if pixels is None else ~boundary & pixels
    chosen = sample(boundary, others, OTHERS_PER_BOUNDARY, seeds)
    logit = gate_logit[:, 0]
    target, weight = (~boundary).to(logit), chosen.to(logit)  # faster than to pick those chosen
    total = F.binary_cross_entropy_with_logits(logit, target, weight, reduction="sum")
    return Loss(total, chosen.sum().float())


def parser_losses(output, labels, *, seeds, background=0):
    """The losses of one batch by name.

    Args:
        output: ``models.Outputs``; a part that is None has no loss.
        labels: (N, H, W) uint8.
        seeds: N ints, one an image, for what is drawn.
        background: if not 0, every loss counts this many background pixels for each other pixel
            (5 for scenes of many faces); see :func:`sample_background`.

    Returns:
        dict of name to :class:`Loss`: ``output``, and where there are such parts ``x`` and
        ``boundary``.
    """
    maps = {"output": output.logits, "x": output.x_logits, "boundary": output.gate_logit}
    losses = {}
    for name, logits in maps.items():
        if logits is None:
            continue
        pixels = None
        if background:
            small = resize_labels(labels, logits.shape[-2:])
            pixels = sample_background(small, background, seeds)
        if name == "boundary":
            losses[name] = boundary_loss(logits, labels, seeds=seeds, pixels=pixels)
        else:
            losses[name] = label_loss(logits, labels, pixels=pixels)
    return losses


def points_loss(output, points):
    """The distance of each key point from its place, in widths of the picture.

    Args:
        output: ``models.Points``, in picture heights and widths.
        points: (N, P, 2), in the same; one that is NaN does not count.
    """
    seen = ~points.isnan().any(-1)
    # The root's slope at zero is infinite, and so is NaN's beyond a mask.
    squared = (output.points - torch.where(seen[..., None], points, 0)).square().sum(-1)
    return Loss(((squared + 1e-8).sqrt() * seen).sum(), seen.sum().float())


def losses_of(output, batch, *, background=0):
    """The losses of one batch by name, whatever the network returns.

    Args:
        output: ``models.Outputs`` or ``models.Points``.
        batch: ``data.batches.Batch``, on the output's device.
        background: see :func:`parser_losses`.
    """
    if isinstance(output, Points):
        size = torch.tensor(batch.images.shape[:1:-1], device=batch.points.device)
        return {"output": points_loss(output, batch.points / size)}
    seeds = batch.seeds.tolist()
    return parser_losses(output, batch.labels, seeds=seeds, background=background)
