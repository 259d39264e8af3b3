"""What every data set becomes: uint8 tensors, and the one error that loaders raise."""

from typing import NamedTuple

import torch

from .labels import LabelSet

SIDE = 128  # pixels; the first-stage network's input


class DataError(ValueError):
    """A data set that is missing, incomplete or damaged; the message is one line and names it."""


class Faces(NamedTuple):
    """The decoded faces of one split, in memory or mapped from a cache file.

    S is 128, or 512 where a photograph holds several faces (``multi-face``, ``synthetic-multi``).
    A mapped tensor may be written to; the file stays as it is.
    """

    images: torch.Tensor  # (N, 3, S, S) uint8 RGB
    labels: torch.Tensor  # (N, S, S) uint8, indices into label_set.names
    label_set: LabelSet
    # (N, 5, 2) float32: x, y in pixels, in the order of labels.POINTS; pixel 0 spans 0 to 1, so
    # its centre is 0.5; NaN where a point cannot be seen. None where the data set has no points.
    points: torch.Tensor | None = None
    skipped: tuple[str, ...] = ()  # one line for each bad file left out
