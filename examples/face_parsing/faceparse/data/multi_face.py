"""Photographs of several faces with skin, hair and background labels, in a generic layout.

root/images/<id>.jpg
root/labels/<id>.png                 8-bit grey or palette: 0 background, 1 skin, 2 hair
root/train.txt, val.txt, test.txt    one id a line
"""

import re

from . import files
from .faces import DataError
from .labels import MULTI_FACE as TABLE

NAME = "multi-face"
HOME = "section 5.1 of the paper (its own set was never published; any in this layout will do)"
COUNTS = {"train": None, "validation": None, "test": None}
SIDE = 512
CUT = "padded"
LISTS = {"train": "train.txt", "validation": "val.txt", "test": "test.txt"}
sizes_fit = files.same_size


def find(root, split):
    """The records of a split, in list order."""
    list_name = LISTS[split]
    root = files.require(NAME, HOME, root, ("images", "labels", list_name))
    if files.looks_like(root) == "helen":
        raise DataError(f"{NAME}: {root} looks like helen: --dataset helen")
    path = files.Listing().path
    names = [
        re.sub(r"\.jpg$", "", line, flags=re.I)
        for _, line in files.read_list(NAME, root / list_name)
    ]
    return [
        files.Record(
            path(root / "images" / f"{name}.jpg"),
            (path(root / "labels" / f"{name}.png"),),
            list_name,
        )
        for name in names
    ]


def read(record):
    """Labels (H, W) uint8 in TABLE, and no points."""
    (path,) = record.labels
    labels = files.read_pixels(NAME, path, record.origin)
    files.check_values(NAME, path, labels, len(TABLE.names))
    return labels, None
