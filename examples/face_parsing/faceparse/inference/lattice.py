"""The permutohedral lattice: a Gaussian filter over points of a few dimensions."""

import numpy as np
import torch
import torch.nn.functional as F


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
