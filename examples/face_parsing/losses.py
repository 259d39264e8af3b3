"""The three losses of the first stage: labels from X, boundary from G, labels from the output."""

import torch
import torch.nn.functional as F

OTHERS_PER_BOUNDARY = 5


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


def label_loss(logits, labels):
    """Softmax cross entropy, the mean over pixels, against labels resized to the logits' size.

    Args:
        logits: (N, classes, h, w).
        labels: (N, H, W) uint8.
    """
    return F.cross_entropy(logits, resize_labels(labels, logits.shape[-2:]).long())


def boundary_loss(gate_logit, labels, *, generator):
    """Logistic cross entropy of the gate: 0 on a boundary, 1 elsewhere.

    Boundary pixels are few. All of them count, and for each one ``OTHERS_PER_BOUNDARY`` pixels
    drawn from the rest of the batch, without repeats (all of the rest, where it is smaller).

    Args:
        gate_logit: (N, 1, h, w).
        labels: (N, H, W) uint8.
        generator: CPU ``torch.Generator`` for the draw.

    Returns:
        The mean over the sampled pixels; 0 if the batch has no boundary.
    """
    boundary = boundary_map(resize_labels(labels, gate_logit.shape[-2:])).flatten()
    logit = gate_logit[:, 0].flatten()
    on = boundary.nonzero()[:, 0]
    off = (~boundary).nonzero()[:, 0]
    drawn = torch.randperm(len(off), generator=generator)[: OTHERS_PER_BOUNDARY * len(on)]
    if not len(on):
        return logit.sum() * 0
    sample = torch.cat([on, off[drawn.to(off.device)]])
    return F.binary_cross_entropy_with_logits(logit[sample], (~boundary[sample]).to(logit))


def parser_losses(output, labels, *, generator):
    """The losses of one batch by name, as scalars; the training loss is their sum.

    Args:
        output: ``models.Parse``; a part that is None has no loss.
        labels: (N, H, W) uint8 at the output's size.
        generator: as in :func:`boundary_loss`.
    """
    losses = {"output": label_loss(output.logits, labels)}
    if output.x_logits is not None:
        losses["x"] = label_loss(output.x_logits, labels)
    if output.gate_logit is not None:
        losses["boundary"] = boundary_loss(output.gate_logit, labels, generator=generator)
    return losses
