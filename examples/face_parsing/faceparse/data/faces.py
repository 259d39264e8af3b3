"""What every data set becomes: uint8 tensors, and the one error that loaders raise."""

from typing import NamedTuple

import torch

from .labels import LABEL_SETS, OWN, LabelSet

SIDE = 128  # pixels; the first-stage network's input


class DataError(ValueError):
    """A data set that is missing, incomplete or damaged; the message is one line and names it."""


def label_set_for(name, table, labels):
    """The classes that a data set is opened with, and the place there of each of its own labels.

    Args:
        name: of the data set.
        table: ``LabelSet`` of its files.
        labels: a key of ``LABEL_SETS``, or ``OWN``.

    Raises:
        DataError: the set does not tell these classes.
    """
    if labels == OWN:
        return table, tuple(range(len(table.names)))
    label_set = LABEL_SETS[labels]
    places = table.into(label_set)
    if places is None:
        raise DataError(
            f"{name} has {len(table.names)} classes ({', '.join(table.names)}), which do not give "
            f"the labels {labels!r}; --labels {OWN} takes them as they are"
        )
    return label_set, places


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
