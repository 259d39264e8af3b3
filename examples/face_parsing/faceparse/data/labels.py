"""Label tables: class names, colours, what a class is in the coarse and fine sets, mirroring."""

from typing import NamedTuple

import numpy as np


class LabelSet(NamedTuple):
    """One set of classes; every tuple is indexed by the label."""

    names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]  # RGB; for pictures, in LFW_PL those of the files
    coarse: tuple[int, ...]  # the label's place in COARSE
    fine: tuple[int, ...] | None  # the label's place in FINE; None where that cannot be told
    mirror: tuple[int, ...]  # the label that takes its place in a mirrored image


COARSE = LabelSet(
    names=("background", "skin", "hair"),
    colours=((40, 60, 120), (120, 200, 120), (220, 80, 60)),
    coarse=(0, 1, 2),
    fine=None,
    mirror=(0, 1, 2),
)

# The order of HELEN's own label files. Left and right are the subject's: a left eye lies on the
# viewer's right.
FINE = LabelSet(
    names=(
        "background",
        "skin",
        "left brow",
        "right brow",
        "left eye",
        "right eye",
        "nose",
        "upper lip",
        "inner mouth",
        "lower lip",
        "hair",
    ),
    colours=(
        (40, 60, 120),
        (120, 200, 120),
        (250, 200, 60),
        (200, 150, 20),
        (80, 220, 240),
        (30, 160, 190),
        (250, 140, 40),
        (240, 60, 140),
        (90, 20, 60),
        (180, 40, 180),
        (220, 80, 60),
    ),
    coarse=(0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2),
    fine=(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10),
    mirror=(0, 1, 3, 2, 5, 4, 6, 7, 8, 9, 10),
)


def mapped(labels, table):
    """Labels (H, W) uint8 through a table of new values, such as ``LabelSet.coarse``."""
    # bytes.translate takes a quarter of the time of indexing.
    new = labels.tobytes().translate(bytes(table) + bytes(256 - len(table)))
    return np.frombuffer(new, np.uint8).reshape(labels.shape)


# What a network learns.
LABEL_SETS = {"coarse": COARSE, "fine": FINE}

# The five key points and their swap, in the same sense of left and right.
POINTS = ("left eye", "right eye", "nose tip", "left mouth corner", "right mouth corner")
POINTS_MIRROR = (1, 0, 2, 4, 3)

# What lies on disk, one table a data set.
LFW_PL = COARSE._replace(colours=((0, 0, 255), (0, 255, 0), (255, 0, 0)))
MULTI_FACE = COARSE
HELEN = FINE
LAPA = FINE

# Indexed as the parts are painted (celebamask_hq.PARTS, from 1). Ears are skin in the coarse set
# and background in the fine one: HELEN's face skin has no ears. Glasses are what they lie on.
CELEBAMASK_HQ = LabelSet(
    names=(
        "background",
        "skin",
        "nose",
        "eyeglasses",
        "left eye",
        "right eye",
        "left brow",
        "right brow",
        "left ear",
        "right ear",
        "inner mouth",
        "upper lip",
        "lower lip",
        "hair",
        "hat",
        "earring",
        "necklace",
        "neck",
        "cloth",
    ),
    colours=(
        (40, 60, 120),
        (120, 200, 120),
        (250, 140, 40),
        (160, 160, 160),
        (80, 220, 240),
        (30, 160, 190),
        (250, 200, 60),
        (200, 150, 20),
        (60, 140, 60),
        (30, 100, 30),
        (90, 20, 60),
        (240, 60, 140),
        (180, 40, 180),
        (220, 80, 60),
        (110, 80, 200),
        (255, 255, 120),
        (200, 255, 200),
        (150, 110, 90),
        (20, 30, 60),
    ),
    coarse=(0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 0, 0, 0, 0, 0),
    fine=(0, 1, 6, 1, 4, 5, 2, 3, 0, 0, 8, 7, 9, 10, 0, 0, 0, 0, 0),
    mirror=(0, 1, 2, 3, 5, 4, 7, 6, 9, 8, 10, 11, 12, 13, 14, 15, 16, 17, 18),
)
