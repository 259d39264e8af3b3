"""Label tables: class names, colours, the fine-to-coarse mapping and the left-right swap."""

from typing import NamedTuple


class LabelSet(NamedTuple):
    """One set of classes; every tuple is indexed by the label."""

    names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]  # RGB, for pictures only
    coarse: tuple[int, ...]  # the label's place in the coarse set
    mirror: tuple[int, ...]  # the label that takes its place in a mirrored image


COARSE = LabelSet(
    names=("background", "skin", "hair"),
    colours=((40, 60, 120), (120, 200, 120), (220, 80, 60)),
    coarse=(0, 1, 2),
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
    mirror=(0, 1, 3, 2, 5, 4, 6, 7, 8, 9, 10),
)

LABEL_SETS = {"coarse": COARSE, "fine": FINE}

# The five key points and their swap, in the same sense of left and right.
POINTS = ("left eye", "right eye", "nose tip", "left mouth corner", "right mouth corner")
POINTS_MIRROR = (1, 0, 2, 4, 3)

# Colours of LFW-PL's label files, as they are on disk.
LFW_PL_COLOURS = {(0, 0, 255): 0, (0, 255, 0): 1, (255, 0, 0): 2}
