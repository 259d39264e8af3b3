"""Tiny data sets in the genuine layouts, for tests: three, one and two faces in the splits.

Face ``k`` (0, 1, 2 in the training split, 3 for validation, 4 and 5 for the test; CelebAMask-HQ,
which has no lists, has twelve) is a grey photograph with all the parts of ``FINE``.
"""

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 80, 80
# Label in FINE: rows and columns. Left is the subject's, so on the viewer's right.
BOXES = (
    (10, (10, 20), (10, 50)),
    (1, (20, 60), (10, 50)),
    (3, (26, 28), (17, 25)),
    (2, (26, 28), (35, 43)),
    (5, (30, 34), (18, 24)),
    (4, (30, 34), (36, 42)),
    (6, (36, 46), (28, 32)),
    (7, (50, 52), (24, 36)),
    (8, (52, 54), (24, 36)),
    (9, (54, 56), (24, 36)),
)
# Eye centres, nose tip (middle of its lower part, rows 42 to 46) and mouth corners, by hand.
POINTS = ((39, 32), (21, 32), (30, 44), (35.5, 53), (24.5, 53))
# The label in FINE as CelebAMask-HQ's part.
PARTS = {1: "skin", 6: "nose", 4: "l_eye", 5: "r_eye", 2: "l_brow", 3: "r_brow", 8: "mouth"}
PARTS |= {7: "u_lip", 9: "l_lip", 10: "hair"}
MINI = (0, 1, 6, 7, 4, 5, 2, 11, 10, 12, 13)  # the label in FINE as celebamask-mini's
SPLITS = {"train": (0, 1, 2), "validation": (3,), "test": (4, 5)}
IDS = [f"1000{k}_1" for k in range(6)]
HQ = 12
LAPA = {"train": "train", "validation": "val", "test": "test"}
LISTS = {
    "helen": ("exemplars.txt", "tuning.txt", "testing.txt"),
    "multi-face": ("train.txt", "val.txt", "test.txt"),
    "celebamask-mini": ("train.txt", "train.txt", "val.txt"),
}


def fine():
    """The label map of every face, (80, 80) uint8."""
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    for label, (top, bottom), (left, right) in BOXES:
        labels[top:bottom, left:right] = label
    return labels


def coarse():
    return np.array([0, *[1] * 9, 2], np.uint8)[fine()]


def shade(k):
    return 40 + 15 * k


def _split(k):
    return next(split for split, faces in SPLITS.items() if k in faces)


def image(name, root, k):
    if name == "celebamask-hq":
        return root / "CelebA-HQ-img" / f"{k}.jpg"
    if name == "lapa":
        return root / LAPA[_split(k)] / "images" / f"{IDS[k]}.jpg"
    return root / "images" / f"{IDS[k]}.jpg"


def label(name, root, k, part=1):
    """A label file of a face: of its skin, where there is one a part."""
    if name == "helen":
        return root / "labels" / IDS[k] / f"{IDS[k]}_lbl{part:02d}.png"
    if name == "celebamask-hq":
        return root / "CelebAMask-HQ-mask-anno" / str(k // 2000) / f"{k:05d}_{PARTS[part]}.png"
    if name == "lapa":
        return root / LAPA[_split(k)] / "labels" / f"{IDS[k]}.png"
    folder = "masks" if name == "celebamask-mini" else "labels"
    return root / folder / f"{IDS[k]}.png"


def landmarks(root, k):
    return root / LAPA[_split(k)] / "landmarks" / f"{IDS[k]}.txt"


def _save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def save_stored(path, upright, orientation):
    """Save pixels (H, W, 3) as a camera that was held in an EXIF orientation, 1, 3 or 6, does."""
    exif = Image.Exif()
    exif[0x112] = orientation
    stored = np.rot90(upright, {1: 0, 3: 2, 6: 1}[orientation])
    _save(path, np.ascontiguousarray(stored), quality=95, exif=exif)


def write_face(name, root, k):
    """The photograph and the labels of one face."""
    scale = 2 if name == "celebamask-hq" else 1  # there the photographs are larger
    grey = np.full((scale * HEIGHT, scale * WIDTH, 3), shade(k), np.uint8)
    _save(image(name, root, k), grey, quality=95)
    if name == "helen":
        for part in range(11):
            _save(label(name, root, k, part), np.where(fine() == part, 200, 20).astype(np.uint8))
    elif name == "celebamask-hq":
        # Skin lies under all the other parts, as in the published masks.
        for part in PARTS:
            on = np.isin(fine(), range(1, 10)) if part == 1 else fine() == part
            _save(label(name, root, k, part), np.repeat(on[..., None] * np.uint8(255), 3, 2))
    elif name == "celebamask-mini":
        picture = Image.fromarray(np.array(MINI, np.uint8)[fine()])
        picture.putpalette([v % 256 for v in range(768)])
        label(name, root, k).parent.mkdir(parents=True, exist_ok=True)
        picture.save(label(name, root, k))
    else:
        _save(label(name, root, k), coarse() if name == "multi-face" else fine())
    if name == "lapa":
        places = np.zeros((106, 2))
        # Counted from the viewer's left: pupils, nose tip, mouth corners.
        for i, place in zip((105, 104, 54, 90, 84), POINTS, strict=True):
            places[i] = place
        lines = ["106", *(f"{x:.3f} {y:.3f}" for x, y in places)]
        landmarks(root, k).parent.mkdir(parents=True, exist_ok=True)
        landmarks(root, k).write_text("\n".join(lines) + "\n")


def write_tree(name, root):
    """All of a data set; returns ``root``."""
    for k in range(HQ if name == "celebamask-hq" else 6):
        write_face(name, root, k)
    names = {split: [IDS[k] for k in faces] for split, faces in SPLITS.items()}
    if name == "helen":
        for file, ids in zip(LISTS[name], names.values(), strict=True):
            lines = [f"{i} , {stem}" for i, stem in enumerate(ids, start=1)]
            (root / file).write_text("\n".join(lines) + "\n\n  \n")
    elif name == "multi-face":
        for file, ids in zip(LISTS[name], names.values(), strict=True):
            (root / file).write_text("\n".join(ids) + "\n")
    elif name == "celebamask-mini":
        (root / "train.txt").write_text("\n".join(names["train"] + names["validation"]) + "\n")
        (root / "val.txt").write_text("\n".join(names["test"]))
    return root
