"""A small part of CelebAMask-HQ with one palette file of labels a face.

root/images/<id>.jpg                   512 x 512
root/masks/<id>.png                    8-bit indices 0 to 18, as in labels.CELEBAMASK_HQ
root/train.txt, val.txt                one id a line

val.txt is the test split; the last 60 lines of train.txt, at most a tenth, are for validation.
"""

from . import files
from .labels import CELEBAMASK_HQ as TABLE

NAME = "celebamask-mini"
HOME = "https://github.com/switchablenorms/CelebAMask-HQ"
COUNTS = {"train": 740, "validation": 60, "test": 100}
SIDE = 128
CUT = "whole"
HELD_OUT = 60
LISTS = {"train": "train.txt", "validation": "train.txt", "test": "val.txt"}
sizes_fit = files.same_size


def find(root, split):
    """The records of a split, in list order."""
    list_name = LISTS[split]
    root = files.require(NAME, HOME, root, ("images", "masks", list_name))
    names = [line for _, line in files.read_list(NAME, root / list_name)]
    if split != "test":
        held = held_out(len(names))
        names = names[:-held] if split == "train" else names[-held:]
    path = files.Listing().path
    return [
        files.Record(
            path(root / "images" / f"{name}.jpg"),
            (path(root / "masks" / f"{name}.png"),),
            list_name,
        )
        for name in names
    ]


def held_out(count):
    """How many of the training list's faces are for validation."""
    return max(1, min(HELD_OUT, count // 10))


def read(record):
    """Labels (H, W) uint8 in TABLE, and no points."""
    (path,) = record.labels
    labels = files.read_pixels(NAME, path, record.origin)
    files.check_values(NAME, path, labels, len(TABLE.names))
    files.check_face(NAME, path, labels)
    return labels, None
