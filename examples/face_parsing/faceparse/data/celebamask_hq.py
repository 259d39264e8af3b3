"""CelebAMask-HQ as published: one mask file for each part that a face has.

root/CelebA-HQ-img/<k>.jpg                                        1024 x 1024
root/CelebAMask-HQ-mask-anno/<k // 2000>/<k:05d>_<part>.png       512 x 512, nonzero is the part

There are no lists: of the images by number, the last tenth is the test split and the tenth before
it the validation split.
"""

from pathlib import Path

import numpy as np

from . import files
from . import labels as tables
from .faces import DataError

NAME = "celebamask-hq"
HOME = "https://github.com/switchablenorms/CelebAMask-HQ"
COUNTS = {"train": 24000, "validation": 3000, "test": 3000}
SIDE = 128
TABLE = tables.CELEBAMASK_HQ
CUT = "whole"
IMAGES, MASKS = "CelebA-HQ-img", "CelebAMask-HQ-mask-anno"
# In the order in which they are painted, later over earlier; the label is the place, from 1.
MASK_NAMES = (
    "skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear", "mouth",
    "u_lip", "l_lip", "hair", "hat", "ear_r", "neck_l", "neck", "cloth",
)  # fmt: skip
LISTS = {"train": IMAGES, "validation": IMAGES, "test": IMAGES}
sizes_fit = files.same_aspect


def find(root, split):
    """The records of a split, by number."""
    root = files.require(NAME, HOME, root, (IMAGES, MASKS))
    listing = files.Listing()
    files.entry_names(NAME, root / IMAGES)  # can be listed
    names = listing.names(root / IMAGES)
    numbers = [name[:-4] for name in names if name.endswith(".jpg") and name[:-4].isdecimal()]
    if not numbers:
        raise DataError(
            f"{NAME}: no '<number>.jpg' in {root / IMAGES} ({files.found(root / IMAGES)}); "
            f"described at {HOME}"
        )
    numbers = sorted({int(number) for number in numbers})
    chosen = split_tenths(numbers)[split]
    records = []
    for k in chosen:
        folder = f"{root / MASKS}/{k // 2000}"
        there = listing.names(folder)
        wanted = [f"{k:05d}_{part}.png" for part in MASK_NAMES]
        # Strings: some hundred thousand Paths would take seconds to make.
        masks = tuple(f"{folder}/{there[name]}" for name in wanted if name in there)
        records.append(files.Record(listing.path(root / IMAGES / f"{k}.jpg"), masks, IMAGES))
    return records


def split_tenths(rows):
    """A sorted list by split: the last tenth for the test, the tenth before for validation."""
    tenth = max(1, len(rows) // 10)
    return {
        "train": rows[: -2 * tenth],
        "validation": rows[-2 * tenth : -tenth],
        "test": rows[-tenth:],
    }


def read(record):
    """Labels (H, W) uint8 in TABLE, and no points.

    Raises:
        DataError: the face has no mask, masks of different sizes, or empty ones only.
    """
    if not record.labels:
        raise DataError(f"{NAME}: {record.image} has no mask file in {MASKS}")
    labels = None
    for path in record.labels:
        mask = files.read_pixels(NAME, path, MASKS, mode="L")
        if labels is None:
            labels = np.zeros(mask.shape, np.uint8)
        elif mask.shape != labels.shape:
            raise DataError(
                f"{NAME}: {path} is {mask.shape[1]} x {mask.shape[0]}, "
                f"{record.labels[0]} is {labels.shape[1]} x {labels.shape[0]}"
            )
        labels[mask > 0] = 1 + MASK_NAMES.index(Path(path).stem.partition("_")[2])
    if not labels.any():
        raise DataError(f"{NAME}: the masks of {record.image} are all empty: {record.labels[0]}")
    return labels, None
