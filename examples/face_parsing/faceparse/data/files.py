"""What the loaders of sets on disk share: looking for folders and lists, reading one file."""

import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ImageOps

from faceparse.console import say
from faceparse.inference import image_io

from .faces import DataError

# What tells the sets apart: paths below the root. A set that has all paths of a row is recognised;
# the rows are tried in this order.
LAYOUTS = (
    ("lfw-pl", ("lfw_funneled", "parts_lfw_funneled_gt_images")),
    ("celebamask-hq", ("CelebA-HQ-img", "CelebAMask-HQ-mask-anno")),
    ("helen", ("images", "labels", "exemplars.txt")),
    ("helen", ("images", "labels", "testing.txt")),
    ("lapa", ("train/images", "train/labels")),
    ("celebamask-mini", ("images", "masks", "train.txt")),
    ("multi-face", ("images", "labels", "train.txt")),
)
NEIGHBOURS = 50  # folders in the root that are looked into for a set


class Record(NamedTuple):
    """Where one face lies on disk."""

    image: Path
    labels: tuple[Path | str, ...]  # all label files that the face has
    origin: str  # what says that these files exist: the name of a list or a folder
    landmarks: Path | None = None

    def files(self):
        """All files that the face is read from."""
        return (self.image, *self.labels, *filter(None, [self.landmarks]))


def require(name, home, root, entries):
    """Check that ``root`` holds ``entries``; returns it as a Path.

    Raises:
        DataError: says what was looked for, what was found, and where the set is described; and
            if another set lies there, or this one a level higher or lower, says so.
    """
    if root is None:
        holds = ", ".join(entries)
        raise DataError(
            f"{name} needs --root DIR, the folder that holds {holds}; described at {home}"
        )
    root = Path(root)
    for entry in entries:
        if not (root / entry).exists():
            raise DataError(
                f"{name}: no '{entry}' in {root} ({found(root)}){_hint(name, root)}; "
                f"described at {home}"
            )
    return root


def found(folder):
    """What lies in a folder, in words, for an error message."""
    if not folder.is_dir():
        return "that is a file, not a folder" if folder.exists() else "there is no such folder"
    try:
        entries = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())
    except OSError as error:
        return error.strerror
    if not entries:
        return "the folder is empty"
    return "found " + ", ".join(entries[:8]) + (", ..." if len(entries) > 8 else "")


def looks_like(folder):
    """The data set that a folder holds, judged by its layout alone, or None."""
    for name, marks in LAYOUTS:
        if all((folder / mark).exists() for mark in marks):
            return name
    return None


def _hint(name, root):
    """Another set in ``root``, or a set one level lower or higher: words to append, or none."""
    other = looks_like(root)
    if other not in (None, name):
        return f"; this looks like {other}: --dataset {other}"
    if not root.is_dir() or other:
        return ""
    try:
        with os.scandir(root) as entries:
            folders = sorted(entry.path for entry in entries if entry.is_dir())
    except OSError:
        return ""
    places = [Path(folder) for folder in folders[:NEIGHBOURS]]
    real = Path(os.path.realpath(root))
    places += [real.parent, real.parent.parent]
    kinds = [(looks_like(place), place) for place in places]
    for kind, place in sorted(kinds, key=lambda pair: pair[0] != name):  # this set first
        if kind:
            return f"; {place} looks like {kind}: --dataset {kind} --root {place}"
    return ""


def read_list(name, path):
    """The (line number, text) pairs of a list file, without blank lines."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"{name}: {path} must be text in UTF-8") from None
    except OSError as error:
        raise DataError(f"{name}: cannot read {path}: {error.strerror}") from None
    for i, line in enumerate(lines, start=1):
        if "\0" in line:
            raise DataError(f"{name}: {path} line {i} holds a zero byte: {line!r}")
    return [(i, line.strip()) for i, line in enumerate(lines, start=1) if line.strip()]


def note(words):
    """A line on the error stream that is no error."""
    say(f"note: {words}", file=sys.stderr)


def entry_names(name, folder):
    """The sorted names in a folder."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(f"{name}: cannot list {folder}: {error.strerror}") from None


class Listing:
    """Finds files by their names, with the suffix in any case. It lists each folder once."""

    def __init__(self):
        self._folders = {}

    def names(self, folder):
        """The names in a folder by the same with the suffix in lower case."""
        if folder not in self._folders:
            try:
                found = sorted(os.listdir(folder))  # .JPG before .jpg, so that the latter wins
            except OSError:
                found = []  # opening the file gives the reason
            pairs = ((*os.path.splitext(name), name) for name in found)
            self._folders[folder] = {stem + suffix.lower(): name for stem, suffix, name in pairs}
        return self._folders[folder]

    def path(self, path):
        """The path of a file that is there, or the path that was asked for."""
        return path.with_name(self.names(path.parent).get(path.name, path.name))


def open_image(name, path, origin):
    """An image file opened, its header read and its pixels not."""
    try:
        image = image_io.open_image(path)
    except Exception as error:
        raise unreadable(name, path, origin, error) from error
    if image.mode.startswith(("I", "F")):  # converted, these would be cut off at 255
        raise DataError(f"{name}: {path} must have 8 bits a channel, not be of mode {image.mode}")
    return image


def unreadable(name, path, origin, error):
    """The DataError for a file that cannot be opened or decoded."""
    if isinstance(error, FileNotFoundError):
        return DataError(f"{name}: {origin} names a missing file, {path}")
    if isinstance(error, image_io.TooLargeError):
        return DataError(f"{name}: {path}: {error}: make it and its labels smaller")
    # A damaged file can make Pillow raise nearly anything.
    words = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"{name}: cannot decode {path}: {words}")


def read_pixels(name, path, origin, *, mode=None):
    """A label file's pixels, upright, as an array (H, W) or (H, W, 3) uint8.

    Args:
        mode: convert to this Pillow mode; None takes the values of an 8-bit grey file, or the
            indices of a palette file, as they are.
    """
    with open_image(name, path, origin) as image:
        if mode is None and image.mode not in ("P", "L"):
            raise DataError(
                f"{name}: {path} must be an 8-bit grey or palette image, not of mode {image.mode}"
            )
        try:
            ImageOps.exif_transpose(image, in_place=True)
            return np.asarray(image if mode is None else image.convert(mode))
        except Exception as error:
            raise unreadable(name, path, origin, error) from error


def check_values(name, path, labels, count):
    """Refuse labels (H, W) that are not all below ``count``."""
    unknown = labels >= count
    if unknown.any():
        row, column = np.argwhere(unknown)[0]
        raise DataError(
            f"{name}: {path} holds the unknown label {labels[row, column]} at row {row}, "
            f"column {column} ({int(unknown.sum())} such pixels)"
        )


def check_face(name, path, labels):
    """Refuse labels (H, W) without a face."""
    if not labels.any():
        raise DataError(f"{name}: {path} must label a face, all its pixels are background")


def same_size(name, record, size, label_size):
    """Refuse an image (width, height) unlike its labels."""
    if size != label_size:
        raise DataError(
            f"{name}: {record.labels[0]} is {label_size[0]} x {label_size[1]}, "
            f"its image {record.image} is {size[0]} x {size[1]}"
        )


def same_aspect(name, record, size, label_size):
    """The same, where labels may be of another scale: widths and heights in one proportion."""
    if size[0] * label_size[1] != size[1] * label_size[0]:
        same_size(name, record, size, label_size)
