"""Accuracy and F of each class, from one confusion matrix of the test set; error of key points."""

import torch


def confusion_matrix(predicted, labels, classes):
    """Count pixels by true label (row) and predicted label (column).

    Args:
        predicted, labels: integer tensors of one shape, values 0 .. classes - 1.

    Returns:
        (classes, classes) int64 on the CPU. Matrices of parts of a test set add up.
    """
    pairs = labels.flatten().long() * classes + predicted.flatten().long()
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes).cpu()


def accuracy(confusion):
    """Share of pixels that got their own label: trace / total."""
    return (confusion.trace() / confusion.sum()).item()


def f_measures(confusion):
    """F of each class over all pixels counted: ``2 TP / (2 TP + FP + FN)``.

    That is the harmonic mean of precision TP / (TP + FP) and recall TP / (TP + FN). A class that
    is neither in the labels nor predicted has no F: NaN.

    Returns:
        A list of floats.
    """
    hits = confusion.diagonal().double()
    # Row sum = TP + FN, column sum = TP + FP.
    return (2 * hits / (confusion.sum(0) + confusion.sum(1))).tolist()


def f_of(hits, wrong, missed):
    """``2 TP / (2 TP + FP + FN)`` of counts, or None where all are zero."""
    total = 2 * hits + wrong + missed
    return 2 * hits / total if total else None


def point_errors(predicted, truth):
    """Distances of key points in distances between the eyes' centres.

    Args:
        predicted, truth: (N, 5, 2) in the order of ``data.labels.POINTS``, in one unit.

    Returns:
        (N, 5); NaN where the truth lacks the point or one of the eyes.
    """
    between = (truth[:, 0] - truth[:, 1]).norm(dim=-1)
    return (predicted - truth).norm(dim=-1) / between[:, None]
