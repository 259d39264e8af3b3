"""LFW-PL: funneled LFW photographs with skin, hair and background labels, in the genuine layout.

root/lfw_funneled/<Name>/<Name>_%04d.jpg                   250 x 250
root/parts_lfw_funneled_gt_images/<Name>_%04d.ppm          colour-coded labels, same size
root/parts_train.txt, parts_validation.txt, parts_test.txt  lines "<Name> <number>"
"""

import numpy as np

from . import files
from .faces import DataError
from .labels import LFW_PL as TABLE

NAME = "lfw-pl"
HOME = "http://vis-www.cs.umass.edu/lfw/part_labels/"
COUNTS = {"train": 1500, "validation": 500, "test": 927}
SIDE = 128
CUT = "whole"
IMAGES, LABELS = "lfw_funneled", "parts_lfw_funneled_gt_images"
LISTS = {"train": "parts_train.txt", "validation": "parts_validation.txt", "test": "parts_test.txt"}
sizes_fit = files.same_size


def find(root, split):
    """The records of a split, in list order."""
    list_name = LISTS[split]
    root = files.require(NAME, HOME, root, (IMAGES, LABELS, list_name))
    records, listing = [], files.Listing()
    for i, line in files.read_list(NAME, root / list_name):
        # A name may hold '_', '-' or spaces.
        fields = line.rsplit(maxsplit=1)
        if len(fields) != 2 or not fields[1].isdecimal() or len(fields[1]) > 9:
            raise DataError(
                f"{NAME}: {root / list_name} line {i}: expected '<Name> <number>', got {line!r}"
            )
        name, stem = fields[0].strip(), f"{fields[0].strip()}_{int(fields[1]):04d}"
        image = listing.path(root / IMAGES / name / f"{stem}.jpg")
        labels = listing.path(root / LABELS / f"{stem}.ppm")
        records.append(files.Record(image, (labels,), list_name))
    return records


def read(record):
    """Labels (H, W) uint8 in TABLE, and no points."""
    (path,) = record.labels
    colours = files.read_pixels(NAME, path, record.origin, mode="RGB")
    red, green, blue = (colours[..., i].astype(np.uint32) for i in range(3))
    packed = red << 16 | green << 8 | blue
    labels = np.full(packed.shape, 255, np.uint8)
    for label, (red, green, blue) in enumerate(TABLE.colours):
        labels[packed == (red << 16 | green << 8 | blue)] = label
    unknown = labels == 255
    if unknown.any():
        row, column = np.argwhere(unknown)[0]
        colour = tuple(int(v) for v in colours[row, column])
        raise DataError(
            f"{NAME}: {path} holds the unknown colour {colour} at row {row}, column {column} "
            f"({int(unknown.sum())} such pixels)"
        )
    files.check_face(NAME, path, labels)
    return labels, None
