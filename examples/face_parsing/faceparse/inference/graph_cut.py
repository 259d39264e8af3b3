"""Labels by a graph cut between neighbouring pixels: how MO's two outputs become one parse.

Boykov, Veksler and Zabih, "Fast approximate energy minimization via graph cuts", PAMI 2001. The
energy is the sum of -log probability over the pixels, and of a Potts cost over neighbours of
different labels, which is high where no boundary is predicted and low on one. Expansion moves lower
it until none of them does. With two labels the result is then the minimum; with more it lies above
it by at most the minimum's own pairwise part.
"""

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from faceparse.reporting.metrics import accuracy, confusion_matrix
from faceparse.training.losses import resize_labels

LEAST = 1e-6  # probability
UNIT = 10_000  # steps in one of the energy: whole numbers make every comparison exact
LARGEST = 1000  # smoothness for which the capacities stay small whole numbers
SMOOTHNESS = (0, 0.1, 0.2, 0.4, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 12, 20)  # what the search tries


def expand(probabilities, boundary, *, smoothness, progress=False):
    """The labels of lowest energy that expansion moves find from the most probable ones.

    Args:
        probabilities: (N, K, H, W) float, of the K classes.
        boundary: (N, 1, h, w) float, probability that there is NO boundary; brought to H x W.
        smoothness: the cost, in log probability, of different labels side by side where there is
            certainly no boundary; 0 gives the most probable labels.
        progress: show a progress bar on a terminal.

    Returns:
        labels (N, H, W) uint8, on the CPU.

    Raises:
        ValueError: shapes that do not fit, or a smoothness that is not in 0 .. ``LARGEST``.
    """
    n = len(probabilities)
    if probabilities.ndim != 4 or boundary.ndim != 4 or boundary.shape[:2] != (n, 1):
        raise ValueError(
            f"probabilities must be (N, K, H, W) and boundary (N, 1, h, w), "
            f"got {tuple(probabilities.shape)} and {tuple(boundary.shape)}"
        )
    if not 0 <= smoothness <= LARGEST:
        raise ValueError(f"smoothness must be in 0 .. {LARGEST}, got {smoothness}")
    labels = torch.empty(n, *probabilities.shape[-2:], dtype=torch.uint8)
    bar = tqdm(range(n), "graph cut", leave=False, disable=None if progress else True)
    for i in bar:
        costs, across, down = energy(probabilities[i], boundary[i], smoothness)
        labels[i] = torch.from_numpy(expansions(costs, across, down).astype(np.uint8))
    return labels


def energy(probabilities, boundary, smoothness):
    """The costs of one image, in whole units of 1 / UNIT.

    Args:
        probabilities: (K, H, W) float.
        boundary: (1, h, w) float.

    Returns:
        int64 arrays: the costs of the labels (K, H, W), and those of different labels between
        a pixel and the next to its right (H, W - 1) and the next below (H - 1, W).
    """
    costs = -probabilities.cpu().double().clamp(min=LEAST).log()
    size = probabilities.shape[-2:]
    no_boundary = boundary.cpu().double()
    if no_boundary.shape[-2:] != size:
        no_boundary = F.interpolate(
            no_boundary[None], size=size, mode="bilinear", align_corners=False
        )[0]
    no_boundary = no_boundary[0].clamp(0, 1)
    # Both sides of a border are boundary (losses.boundary_map): one side that is certainly none
    # is enough to say that there is no border between them.
    across = smoothness * torch.maximum(no_boundary[:, 1:], no_boundary[:, :-1])
    down = smoothness * torch.maximum(no_boundary[1:], no_boundary[:-1])
    return tuple((UNIT * part).round().long().numpy() for part in (costs, across, down))


def total(labels, costs, across, down):
    """The energy of labels (H, W), an int."""
    unary = np.take_along_axis(costs, labels[None], 0).sum()
    return int(
        unary
        + across[labels[:, 1:] != labels[:, :-1]].sum()
        + down[labels[1:] != labels[:-1]].sum()
    )


def expansions(costs, across, down):
    """Labels (H, W) int64 that no expansion move makes cheaper; arguments from :func:`energy`."""
    labels = costs.argmin(0)
    lowest = total(labels, costs, across, down)
    classes = len(costs)
    label, unchanged = 0, 0
    while unchanged < classes:
        moved = expansion(labels, label, costs, across, down)
        value = total(moved, costs, across, down)
        # Only what is cheaper: the energy falls by whole units, so that this comes to an end.
        if value < lowest:
            labels, lowest, unchanged = moved, value, 0
        unchanged += 1
        label = (label + 1) % classes
    return labels


def expansion(labels, label, costs, across, down):
    """The cheapest labels among those in which any pixels have changed to ``label``.

    A minimum cut: a pixel on the sink's side changes. The cost of a pair, with A, B, C, D for
    (keep, keep), (keep, change), (change, keep) and (change, change = 0), is
    A + (C - A) [first changes] - C [second changes] + (B + C - A) [first keeps, second changes].
    """
    import maxflow  # here, so that what cuts no graph runs without this GPL package

    height, width = labels.shape
    # What a change costs more than keeping.
    change = costs[label] - np.take_along_axis(costs, labels[None], 0)[0]
    differs = labels != label
    pairs = []
    for weights, first, second in (
        (across, np.s_[:, :-1], np.s_[:, 1:]),
        (down, np.s_[:-1], np.s_[1:]),
    ):
        a = weights * (labels[first] != labels[second])
        b, c = weights * differs[first], weights * differs[second]
        change[first] += c - a
        change[second] -= c
        pairs.append(b + c - a)
    graph = maxflow.GraphInt(height * width, 2 * height * width)
    nodes = graph.add_grid_nodes((height, width))
    for weights, (row, column) in zip(pairs, ((1, 2), (2, 1)), strict=True):
        structure = np.zeros((3, 3), int)
        structure[row, column] = 1
        # One weight a pixel; those in the last column or row have no partner.
        padding = [(0, height - weights.shape[0]), (0, width - weights.shape[1])]
        graph.add_grid_edges(nodes, np.pad(weights, padding), structure, symmetric=False)
    graph.add_grid_tedges(nodes, change.clip(min=0), (-change).clip(min=0))
    graph.maxflow()
    return np.where(graph.get_grid_segments(nodes), label, labels)


def search(probabilities, boundary, labels, *, progress=False):
    """The smoothness with the best per-pixel accuracy, among ``SMOOTHNESS``.

    Args:
        probabilities, boundary: of the validation split, as in :func:`expand`.
        labels: (N, H', W') uint8; brought to H x W.
        progress: show a progress bar on a terminal.

    Returns:
        the smoothness and its accuracy; of equals the smallest.
    """
    labels = resize_labels(labels, probabilities.shape[-2:])
    scores = []
    bar = tqdm(SMOOTHNESS, "graph cut search", leave=False, disable=None if progress else True)
    for smoothness in bar:
        cut = expand(probabilities, boundary, smoothness=smoothness)
        scores.append(accuracy(confusion_matrix(cut, labels, probabilities.shape[1])))
    best = scores.index(max(scores))
    return SMOOTHNESS[best], scores[best]
