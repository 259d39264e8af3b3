"""The parts of a face, each described in one row, and the label sets made of them.

Colours, mirroring, the three classes of the first stage, the crops of the second stage, the rows of
Table 3 and what recolour.py changes all come from ``CLASSES`` and ``CROPS``.
"""

import colorsys
import functools
from typing import NamedTuple

import numpy as np


class FaceClass(NamedTuple):
    """One class, for all label sets."""

    colour: tuple[int, int, int]  # RGB, in pictures
    coarse: str = "background"  # its class of the three in COARSE
    otherwise: str = "background"  # its class in any larger set that lacks it
    crop: str | None = None  # where the second stage finds it: a key of CROPS
    measured: tuple[str, ...] = ()  # the rows of Table 3 that count it
    recoloured: str | None = None  # the part of recolour.py that it belongs to


CLASSES = {
    "background": FaceClass((40, 60, 120)),
    "skin": FaceClass((120, 200, 120), "skin", measured=("skin",), recoloured="skin"),
    "left brow": FaceClass(
        (250, 200, 60), "skin", crop="eye", measured=("brows",), recoloured="brows"
    ),
    "right brow": FaceClass(
        (200, 150, 20), "skin", crop="eye", measured=("brows",), recoloured="brows"
    ),
    "left eye": FaceClass((80, 220, 240), "skin", crop="eye", measured=("eyes",)),
    "right eye": FaceClass((30, 160, 190), "skin", crop="eye", measured=("eyes",)),
    "nose": FaceClass((250, 140, 40), "skin", crop="nose", measured=("nose",), recoloured="skin"),
    "upper lip": FaceClass(
        (240, 60, 140), "skin", crop="mouth", measured=("upper_lip", "mouth"), recoloured="lips"
    ),
    "inner mouth": FaceClass((90, 20, 60), "skin", crop="mouth", measured=("in_mouth", "mouth")),
    "lower lip": FaceClass(
        (180, 40, 180), "skin", crop="mouth", measured=("lower_lip", "mouth"), recoloured="lips"
    ),
    "hair": FaceClass((220, 80, 60), "hair", measured=("hair",), recoloured="hair"),
    # HELEN's face skin has no ears, hence background where there is no class for them.
    "left ear": FaceClass((60, 140, 60), "skin", crop="ear", measured=("ears",), recoloured="skin"),
    "right ear": FaceClass(
        (30, 100, 30), "skin", crop="ear", measured=("ears",), recoloured="skin"
    ),
    "eyeglasses": FaceClass((160, 160, 160), "skin", otherwise="skin"),
    "hat": FaceClass((110, 80, 200)),
    "earring": FaceClass((255, 255, 120)),
    "necklace": FaceClass((200, 255, 200)),
    "neck": FaceClass((150, 110, 90)),
    "cloth": FaceClass((20, 30, 60)),
}

# The five key points. Left and right are the subject's: a left eye lies on the viewer's right.
POINTS = ("left eye", "right eye", "nose tip", "left mouth corner", "right mouth corner")


class Crop(NamedTuple):
    """A picture that the second stage sees; of what has two sides, the left one."""

    size: tuple[int, int]  # h, w of the network's input; w is 64
    points: tuple[str, ...]  # it lies about the middle of these key points


CROPS = {
    "eye": Crop((64, 64), ("left eye",)),
    "nose": Crop((64, 64), ("nose tip",)),
    "mouth": Crop((32, 64), ("left mouth corner", "right mouth corner")),
    "ear": Crop((64, 64), ("left eye",)),
}


def mirrored(names):
    """For each name the place of the one that takes its place in a mirrored image."""
    swap = {"left": "right", "right": "left"}
    partners = [" ".join(swap.get(word, word) for word in name.split(" ")) for name in names]
    return tuple(
        names.index(partner) if partner in names else i for i, partner in enumerate(partners)
    )


POINTS_MIRROR = mirrored(POINTS)


class LabelSet(NamedTuple):
    """One set of classes; every tuple is indexed by the label, and label 0 is the background."""

    names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]  # RGB; for pictures, in LFW_PL those of the files
    mirror: tuple[int, ...]  # the label that takes its place in a mirrored image

    def into(self, other):
        """The place of each label in another set.

        None if that cannot be told: a class is not in ``CLASSES``, or the other set has a class
        that none of this set's becomes.
        """
        return _into(self.names, other.names)

    @property
    def coarse(self):
        """The place of each label in COARSE, or None; see :meth:`into`."""
        return self.into(COARSE)

    @property
    def fine(self):
        """The place of each label in FINE, or None; see :meth:`into`."""
        return self.into(FINE)


@functools.cache
def _into(names, others):
    table = [_place(name, others) for name in names]
    if None in table or not set(range(1, len(others))) <= set(table):
        return None
    return tuple(table)


def _place(name, others):
    while name not in others:
        if name not in CLASSES:
            return None
        row = CLASSES[name]
        name = row.coarse if others == COARSE.names else row.otherwise
    return others.index(name)


def label_set(*names):
    """The set of these classes, the background first.

    Left and right, in names, are swapped by a mirror. A name that ``CLASSES`` lacks gets a colour
    by its place; such a set can be trained with ``--labels own`` only.

    Raises:
        ValueError: the first name is not "background", or a name occurs twice.
    """
    if names[:1] != ("background",) or len(set(names)) < len(names):
        raise ValueError(f"names must differ and begin with 'background', got {names}")
    colours = tuple(
        CLASSES[name].colour if name in CLASSES else _colour(i) for i, name in enumerate(names)
    )
    return LabelSet(names, colours, mirrored(names))


def _colour(i):
    # Steps by the golden ratio keep neighbours apart.
    return tuple(round(255 * v) for v in colorsys.hsv_to_rgb(0.618 * i % 1, 0.6, 0.9))


def mapped(labels, table):
    """Labels (H, W) uint8 through a table of new values, such as ``LabelSet.coarse``."""
    # bytes.translate takes a quarter of the time of indexing.
    new = labels.tobytes().translate(bytes(table) + bytes(256 - len(table)))
    return np.frombuffer(new, np.uint8).reshape(labels.shape)


COARSE = label_set("background", "skin", "hair")
# The order of HELEN's own label files.
FINE = label_set(
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
)
EARS = label_set(*FINE.names, "left ear", "right ear")

# What a network learns. OWN stands for the data set's own classes, whichever they are.
LABEL_SETS = {"coarse": COARSE, "fine": FINE, "ears": EARS}
OWN = "own"

# What lies on disk, one table a data set.
LFW_PL = COARSE._replace(colours=((0, 0, 255), (0, 255, 0), (255, 0, 0)))
MULTI_FACE = COARSE
HELEN = FINE
LAPA = FINE
# Indexed as the parts are painted (celebamask_hq.MASK_NAMES, from 1).
CELEBAMASK_HQ = label_set(
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
)
