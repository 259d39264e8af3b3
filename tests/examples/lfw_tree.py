"""A tiny data set in the genuine LFW-PL layout, for tests."""

import numpy as np
from PIL import Image

LISTS = {"train": "parts_train.txt", "validation": "parts_validation.txt", "test": "parts_test.txt"}
NAMES = {
    "train": [("Ann_Lee", 1), ("Jean-Pierre_van_den_Berg", 12), ("Ann_Lee", 2)],
    "validation": [("Bo", 3)],
    "test": [("Cy_Young_2", 1), ("Dee", 1)],
}
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)  # hair, skin, background


def image_path(root, name, number):
    return root / "lfw_funneled" / name / f"{name}_{number:04d}.jpg"


def label_path(root, name, number):
    return root / "parts_lfw_funneled_gt_images" / f"{name}_{number:04d}.ppm"


def write_face(root, name, number, *, size=250):
    """A grey photograph; hair above, skin below on the left, background below on the right."""
    photo, labels = image_path(root, name, number), label_path(root, name, number)
    photo.parent.mkdir(parents=True, exist_ok=True)
    labels.parent.mkdir(parents=True, exist_ok=True)
    shade = np.full((size, size, 3), 40 * number % 256, np.uint8)
    Image.fromarray(shade).save(photo, quality=95)
    colours = np.empty((size, size, 3), np.uint8)
    half = size // 2
    colours[:half], colours[half:, :half], colours[half:, half:] = RED, GREEN, BLUE
    Image.fromarray(colours).save(labels)


def write_tree(root):
    """All of NAMES, with their lists; returns ``root``."""
    for split, rows in NAMES.items():
        for name, number in rows:
            write_face(root, name, number)
        lines = [f"{name} {number}" for name, number in rows]
        (root / LISTS[split]).write_text("\n".join(lines) + "\n\n")
    return root
