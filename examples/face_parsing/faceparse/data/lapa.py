"""LaPa: eleven classes and 106 landmarks.

root/{train,val,test}/images/<id>.jpg
root/{train,val,test}/labels/<id>.png           8-bit indices 0 to 10, in the order of labels.FINE
root/{train,val,test}/landmarks/<id>.txt        "106", then 106 lines "x y"
"""

import numpy as np

from . import files
from .faces import DataError
from .labels import LAPA as TABLE

NAME = "lapa"
HOME = "https://github.com/jd-opensource/lapa-dataset"
COUNTS = {"train": 18176, "validation": 2000, "test": 2000}
SIDE = 128
CUT = "face"
LISTS = {"train": "train/images", "validation": "val/images", "test": "test/images"}
LANDMARKS = 106
# Pupils, nose tip and mouth corners among the 106, counted from 0, in the order of labels.POINTS.
# The landmarks go from the viewer's left to right, so the subject's left comes second: 104 is the
# viewer's left pupil, 84 the viewer's left mouth corner. That is the scheme of arXiv:1905.03469, a
# challenge held by the makers of LaPa.
FIVE = (105, 104, 54, 90, 84)
sizes_fit = files.same_size


def find(root, split):
    """The records of a split, by name."""
    folder = LISTS[split].partition("/")[0]
    parts = [f"{folder}/{part}" for part in ("images", "labels", "landmarks")]
    folder = files.require(NAME, HOME, root, parts) / folder
    names = [n for n in files.entry_names(NAME, folder / "images") if is_photograph(n)]
    if not names:
        raise DataError(
            f"{NAME}: no '<id>.jpg' in {folder / 'images'} ({files.found(folder / 'images')}); "
            f"described at {HOME}"
        )
    path = files.Listing().path
    return [
        files.Record(
            folder / "images" / name,
            (path(folder / "labels" / f"{name[:-4]}.png"),),
            f"the photograph {name}",
            path(folder / "landmarks" / f"{name[:-4]}.txt"),
        )
        for name in names
    ]


def is_photograph(name):
    """Whether a file is a face's photograph; macOS leaves `._*` files next to those."""
    return name.lower().endswith(".jpg") and not name.startswith(".")


def read(record):
    """Labels (H, W) uint8 in TABLE, and points (5, 2) float32 from the landmarks."""
    (path,) = record.labels
    labels = files.read_pixels(NAME, path, record.origin)
    files.check_values(NAME, path, labels, len(TABLE.names))
    points = _read_landmarks(record.landmarks, record.origin)[list(FIVE)]
    if np.ptp(points, axis=0).max() < 1:
        raise DataError(f"{NAME}: {record.landmarks} must have landmarks that lie apart")
    return labels, points


def _read_landmarks(path, origin):
    """The landmarks (106, 2) float32."""
    try:
        numbers = [float(word) for word in path.read_text(encoding="utf-8-sig").split()]
    except (OSError, ValueError) as error:
        raise files.unreadable(NAME, path, origin, error) from error
    if (
        len(numbers) != 1 + 2 * LANDMARKS
        or numbers[0] != LANDMARKS
        or not np.isfinite(numbers).all()
    ):
        raise DataError(f"{NAME}: {path} does not hold '{LANDMARKS}' and as many lines 'x y'")
    return np.array(numbers[1:], np.float32).reshape(-1, 2)
