"""HELEN with the labels of Smith et al. 2013: eleven soft maps a face.

root/images/<id>.jpg
root/labels/<id>/<id>_lbl00.png ... _lbl10.png        0 to 255, in the order of labels.FINE
root/exemplars.txt, tuning.txt, testing.txt           lines "1 , 100032540_1"
"""

import numpy as np

from . import files
from .faces import DataError
from .labels import HELEN as TABLE

NAME = "helen"
HOME = "http://pages.cs.wisc.edu/~lizhang/projects/face-parsing/"
COUNTS = {"train": 2000, "validation": 230, "test": 100}
SIDE = 128
CUT = "face"
LISTS = {"train": "exemplars.txt", "validation": "tuning.txt", "test": "testing.txt"}
sizes_fit = files.same_size


def find(root, split):
    """The records of a split, in list order."""
    list_name = LISTS[split]
    root = files.require(NAME, HOME, root, ("images", "labels", list_name))
    records, listing = [], files.Listing()
    for i, line in files.read_list(NAME, root / list_name):
        number, comma, stem = (field.strip() for field in line.partition(","))
        if not (comma and stem and number.isdecimal()):
            raise DataError(
                f"{NAME}: {root / list_name} line {i}: expected '<number> , <id>', got {line!r}"
            )
        names = [f"{stem}_lbl{k:02d}.png" for k in range(len(TABLE.names))]
        maps = tuple(listing.path(root / "labels" / stem / name) for name in names)
        image = listing.path(root / "images" / f"{stem}.jpg")
        records.append(files.Record(image, maps, list_name))
    return records


def read(record):
    """Labels (H, W) uint8 in TABLE, each pixel's strongest map, and no points.

    Of equally strong maps the first one counts.
    """
    first = record.labels[0]
    best = files.read_pixels(NAME, first, record.origin, mode="L")
    labels = np.zeros(best.shape, np.uint8)
    for label, path in enumerate(record.labels[1:], start=1):
        soft = files.read_pixels(NAME, path, record.origin, mode="L")
        if soft.shape != best.shape:
            raise DataError(
                f"{NAME}: {path} is {soft.shape[1]} x {soft.shape[0]}, "
                f"{first} is {best.shape[1]} x {best.shape[0]}"
            )
        labels[soft > best] = label
        best = np.maximum(best, soft)
    return labels, None
