"""A fully connected CRF over the pixels of an image: the refinement of CNN-CRF.

Kraehenbuehl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge
Potentials", NIPS 2011: mean field, with a Potts cost between any two pixels, weighted by a Gaussian
of their distance (smoothness) plus one of their distance and colours (appearance). Both kernels are
normalised symmetrically, D^-1/2 k D^-1/2 with the row sums D, so that a weight means the same at
any sigma; a pixel's sum includes itself. The smoothness kernel is exact; that of appearance, in
five dimensions, is approximated on a permutohedral lattice.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from faceparse.reporting.metrics import accuracy, confusion_matrix
from faceparse.training.losses import resize_labels

from .lattice import Lattice

LEAST = 1e-6  # probability: no pixel is so certain that its neighbours cannot overrule it
SCREENED = 6  # the search looks at every sixth image first
FINALISTS = 6  # and at all images with so many candidates


class CrfParameters(NamedTuple):
    """Weights in log probability, distances in pixels of the maps, colours in 0 .. 255."""

    smooth_weight: float
    smooth_sigma: float
    appearance_weight: float
    position_sigma: float
    colour_sigma: float
    steps: int  # of mean field; 0 leaves the maps as they are

    def check(self):
        """ValueError unless weights are 0 or more, sigmas positive, all finite, steps whole."""
        if type(self.steps) is not int:
            raise ValueError(f"steps of the CRF cannot be {self.steps}")
        for name, value in self._asdict().items():
            enough = value > 0 if name.endswith("sigma") else value >= 0
            if not (enough and math.isfinite(value)):
                raise ValueError(f"{name} of the CRF cannot be {value}")


NONE = CrfParameters(0.0, 1.0, 0.0, 1.0, 1.0, 0)  # leaves the maps as they are


@torch.inference_mode()
def refine(probabilities, images, parameters, *, progress=False):
    """The labels that mean field arrives at.

    Args:
        probabilities: (N, K, H, W) float, of the K classes.
        images: (N, 3, H', W') uint8; brought to H x W.
        parameters: :class:`CrfParameters`.
        progress: show a progress bar on a terminal.

    Returns:
        labels (N, H, W) uint8, on the CPU.

    Raises:
        ValueError: shapes or types that do not fit, or parameters out of range.
    """
    _check_maps(probabilities, images)
    parameters.check()
    images = _resize(images, probabilities.shape[-2:])
    labels = torch.empty(probabilities[:, 0].shape, dtype=torch.uint8)
    pairs = zip(probabilities, images, strict=True)
    bar = tqdm(pairs, "crf", len(images), leave=False, disable=None if progress else True)
    for i, (maps, image) in enumerate(bar):
        labels[i] = mean_field(maps.cpu().float(), image, parameters).argmax(0)
    return labels


def mean_field(probabilities, image, parameters):
    """The marginals (K, H, W) of one image after ``parameters.steps`` updates.

    Args:
        probabilities: (K, H, W) float32.
        image: (3, H, W) uint8.
    """
    if not parameters.steps:
        return probabilities
    kernels = []
    if parameters.smooth_weight:
        kernel = smoothness_kernel(image.shape[-2:], parameters.smooth_sigma)
        kernels.append((parameters.smooth_weight, kernel))
    if parameters.appearance_weight:
        sigmas = parameters.position_sigma, parameters.colour_sigma
        kernels.append((parameters.appearance_weight, appearance_kernel(image, *sigmas)))
    if not kernels:
        return probabilities
    unary = probabilities.clamp(min=LEAST).log()
    marginals = probabilities
    for _ in range(parameters.steps):
        message = sum(weight * kernel(marginals) for weight, kernel in kernels)
        marginals = (unary + message).softmax(0)
    return marginals


def smoothness_kernel(size, sigma):
    """The normalised Gaussian of distance, as a function of maps (K, H, W)."""
    # Separable, normalisation too: one small dense matrix an axis is exact and quick.
    rows, columns = (_normalised_gaussian(side, sigma) for side in size)
    return lambda maps: rows @ maps @ columns


def _normalised_gaussian(side, sigma):
    """(side, side) float32: exp(-d^2 / 2 sigma^2), normalised symmetrically."""
    distance = torch.arange(side)[:, None] - torch.arange(side)
    kernel = (-0.5 * (distance / sigma) ** 2).exp()
    scale = kernel.sum(1).rsqrt()
    return scale[:, None] * kernel * scale


def appearance_kernel(image, position_sigma, colour_sigma):
    """The normalised Gaussian of distance and colour, as a function of maps (K, H, W)."""
    height, width = image.shape[-2:]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = torch.stack([rows, columns]).float() / position_sigma
    features = torch.cat([place, image.float() / colour_sigma]).flatten(1)
    try:
        lattice = Lattice(features)
    except ValueError:
        raise ValueError(
            f"sigmas of {position_sigma:g} pixels and {colour_sigma:g} grey levels are too small "
            f"for a CRF on an image of {height} x {width}"
        ) from None
    scale = lattice.blur(torch.ones(1, height * width)).rsqrt()
    return lambda maps: (scale * lattice.blur(scale * maps.flatten(1))).view_as(maps)


def search(probabilities, images, labels, *, trials, seed, progress=False):
    """The parameters with the best per-pixel accuracy, drawn at random and then near the best.

    Doing nothing is among the candidates, so that the result says so where a CRF does not help.

    Args:
        probabilities, images: of the validation split, as in :func:`refine`.
        labels: (N, H', W') uint8; brought to H x W.
        trials: how many parameters to try.
        seed: int; the same one finds the same parameters.
        progress: show a progress bar on a terminal.

    Returns:
        the :class:`CrfParameters` and their accuracy.
    """
    _check_maps(probabilities, images)
    if not len(images):
        raise ValueError("a search for the CRF's parameters needs at least one image")
    size = probabilities.shape[-2:]
    images, labels = _resize(images, size), resize_labels(labels, size)

    def score(parameters, rows=slice(None)):
        refined = refine(probabilities[rows], images[rows], parameters)
        return accuracy(confusion_matrix(refined, labels[rows], probabilities.shape[1]))

    rng = np.random.default_rng(seed)
    rows = slice(None, None, SCREENED if len(images) > 2 * SCREENED else 1)
    screened = []
    for i in tqdm(range(trials), "crf search", leave=False, disable=None if progress else True):
        # The first half anywhere, the second ever closer to the best so far.
        if i < (trials + 1) // 2:
            parameters = _draw(rng, max(size))
        else:
            parameters = _near(rng, max(screened)[1], max(size), spread=1 - i / trials)
        screened.append((score(parameters, rows), parameters))
    best = sorted(set(screened), reverse=True)[:FINALISTS]
    final = [NONE] + [parameters for _, parameters in best]
    scores = [score(parameters) for parameters in final]
    found = scores.index(max(scores))  # the first of equals: NONE, if a CRF does not help
    return final[found], scores[found]


def _ranges(side):
    """Where the search looks, for maps of ``side`` pixels: (low, high) of all but the steps."""
    return (
        (0.1, 10),
        (0.5, max(1, side / 20)),
        (0.1, 10),
        (max(1, side / 50), max(2, side / 3)),
        (4, 50),
    )


def _draw(rng, side):
    """Parameters anywhere in the ranges, evenly in their logarithms."""
    values = [float(np.exp(rng.uniform(*np.log(span)))) for span in _ranges(side)]
    return CrfParameters(*values, steps=int(rng.choice([5, 10])))


def _near(rng, parameters, side, *, spread):
    """Parameters about those given, inside the ranges."""
    values = [value * np.exp(spread * rng.normal()) for value in parameters[:-1]]
    pairs = zip(values, _ranges(side), strict=True)
    return CrfParameters(*(float(np.clip(v, *span)) for v, span in pairs), parameters.steps)


def _check_maps(probabilities, images):
    if probabilities.ndim != 4 or not probabilities.is_floating_point():
        raise ValueError(
            f"probabilities must be (N, K, H, W) float, got {tuple(probabilities.shape)} "
            f"{probabilities.dtype}"
        )
    n = len(probabilities)
    if images.ndim != 4 or images.shape[:2] != (n, 3) or images.dtype != torch.uint8:
        raise ValueError(
            f"images must be ({n}, 3, H, W) uint8, got {tuple(images.shape)} {images.dtype}"
        )


def _resize(images, size):
    """Images (N, 3, ...) to (N, 3, *size), on the CPU."""
    images = images.cpu()
    if images.shape[-2:] == size:
        return images
    return F.interpolate(images, size=size, mode="bilinear", antialias=True)
