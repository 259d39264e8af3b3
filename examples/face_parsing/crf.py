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
from losses import resize_labels
from metrics import accuracy, confusion_matrix
from tqdm import tqdm

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
        """ValueError unless the weights are 0 or more, the sigmas positive, all finite."""
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


class Lattice:
    """A Gaussian filter of sigma 1 over n scattered points of d dimensions.

    Adams, Baek and Davis, "Fast high-dimensional filtering using the permutohedral lattice",
    Eurographics 2010. Values are spread to the corners of the simplex that each point lies in,
    blurred along d + 1 directions between the corners that hold points, and read back. A corner
    is d + 1 integers, congruent modulo d + 1, of sum zero; it is kept as their quotients by d + 1,
    whose sum tells the remainder.
    """

    def __init__(self, features):
        """Find the corners.

        Args:
            features: (d, n) float32 tensor on the CPU, n >= 1.

        Raises:
            ValueError: the points spread over too many sigmas to number the corners.
        """
        if not features.abs().max() < 1 << 20:  # where float32 still tells places in a simplex
            raise ValueError("points too far apart, or sigma too small")
        quotients, ranks, weights = _simplices(features.numpy())
        d, n = features.shape
        low = quotients[:d].min(1) - 2  # room for neighbours
        spans = [int(span) for span in quotients[:d].max(1) + 2 - low + 1]
        radices = np.cumprod([1, *spans], dtype=object)
        bits = (n - 1).bit_length()
        if int(radices[-1]).bit_length() + bits > 63:
            raise ValueError("points too far apart, or sigma too small")
        radices = np.append(radices[:d], 0).astype(np.int64)  # the last quotient is redundant
        # Corner k of a simplex has remainder k: the quotient is one less where rank > d - k.
        by_rank = np.empty((d + 1, n), np.int64)
        np.put_along_axis(by_rank, ranks, np.broadcast_to(radices[:, None], (d + 1, n)), 0)
        codes = np.empty((d + 1, n), np.int64)
        codes[0] = radices[:d] @ (quotients[:d] - low[:, None]).astype(np.int64)
        for k in range(1, d + 1):
            codes[k] = codes[k - 1] - by_rank[d + 1 - k]
        # Points of one corner come together: sorted by code, with the point in the low bits.
        codes = np.sort(codes << bits | np.arange(n), axis=1)
        points, codes = codes & ((1 << bits) - 1), codes >> bits
        first = np.ones((d + 1, n), bool)
        first[:, 1:] = codes[:, 1:] != codes[:, :-1]
        corners = np.cumsum(first).reshape(d + 1, n) - 1
        slots = np.empty((n, d + 1), np.int64)
        for k in range(d + 1):
            slots[points[k], k] = corners[k]
        starts = np.append(np.flatnonzero(first), first.size)  # one empty corner at the end
        self.count = len(starts) - 1
        self.slots = torch.from_numpy(slots)
        self.weights = torch.from_numpy(np.ascontiguousarray(weights.T))
        self.points = torch.from_numpy(points.reshape(-1))
        self.point_weights = torch.from_numpy(np.take_along_axis(weights, points, 1).reshape(-1))
        self.starts = torch.from_numpy(starts)
        self.lines = [
            torch.from_numpy(line) for line in self._neighbours(codes[first], first, radices)
        ]
        self.taps = torch.tensor([0.5, 0.25, 0.25]).repeat(self.count + 1, 1)

    def _neighbours(self, codes, first, radices):
        """For each direction (count + 1, 3): a corner, the one before and the one after it.

        A step along direction j adds 1 to all coordinates but takes d off the j-th: the quotient
        j falls by one and the remainder grows by one, or from d to 0 with all other quotients up.
        """
        groups = first.sum(1)  # corners by remainder
        bounds = np.append(0, np.cumsum(groups))
        nothing, d1 = self.count, len(groups)
        for radix in radices:
            line = np.full((self.count + 1, 3), nothing, np.int64)
            line[:, 0] = np.arange(self.count + 1)
            for k in range(d1):
                here, there = (slice(bounds[g], bounds[g + 1]) for g in (k, (k + 1) % d1))
                wanted = codes[here] - radix + (radices.sum() if k == d1 - 1 else 0)
                places = np.searchsorted(codes[there], wanted)
                places[places == groups[(k + 1) % d1]] = 0
                found = np.flatnonzero(codes[there][places] == wanted)
                source, target = found + bounds[k], places[found] + there.start
                line[source, 2] = target
                line[target, 1] = source
            yield line

    def blur(self, values):
        """Values (K, n) float32 at the points, summed with Gaussian weights, up to one factor."""
        rows = values.T.contiguous()
        # embedding_bag sums weighted rows in parallel, in a fixed order: nothing here is atomic.
        rows = F.embedding_bag(
            self.points, rows, self.starts, mode="sum", per_sample_weights=self.point_weights
        )
        for line in self.lines:
            rows = F.embedding_bag(line, rows, mode="sum", per_sample_weights=self.taps)
        rows = F.embedding_bag(self.slots, rows, mode="sum", per_sample_weights=self.weights)
        return rows.T


def _simplices(features):
    """The simplex of each point.

    Args:
        features: (d, n) float32.

    Returns:
        quotients (d + 1, n) int32 of the corner with remainder 0, ranks (d + 1, n) int64 of the
        coordinates by their distance from it, and the points' weights (d + 1, n) on the corners.
    """
    d, n = features.shape
    # Onto the plane of zero sum, by orthogonal rows; so long that the blur's and the
    # interpolation's variances add up to sigma 1.
    basis = np.zeros((d + 1, d), np.float32)
    for i in range(1, d + 1):
        basis[:i, i - 1], basis[i, i - 1] = 1, -i
        basis[:, i - 1] /= np.sqrt(i * (i + 1))
    place = np.float32(np.sqrt(2 / 3)) * (basis @ features)  # in units of d + 1
    quotients = np.rint(place)
    excess = quotients.sum(0).astype(np.int64)
    rest = place - quotients
    ranks = np.repeat(excess[None], d + 1, 0)
    for i in range(d + 1):
        for j in range(i + 1, d + 1):
            behind = rest[i] < rest[j]
            ranks[i] += behind
            ranks[j] += ~behind
    # Rounding may have left the plane: the coordinates that moved farthest move back.
    step = (ranks < 0).astype(np.int64) - (ranks > d)
    quotients += step
    ranks += (d + 1) * step
    rest = np.empty_like(place)
    np.put_along_axis(rest, ranks, place - quotients, 0)  # from here on by rank: falling
    weights = np.empty((d + 1, n), np.float32)
    weights[1:] = (rest[:-1] - rest[1:])[::-1]
    weights[0] = 1 - weights[1:].sum(0)
    return quotients.astype(np.int32), ranks, weights


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
