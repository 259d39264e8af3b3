"""What is written of a parsed photograph: how it is named, its pictures, its JSON; and read back.

Of ``photo.jpg`` the folder holds ``photo.json``, ``photo_overlay.png`` and ``photo_labels.png``,
written in this order; of ``clip.mp4`` ``clip.json`` and ``clip_overlay.mp4``. The JSON names its
source, hence claims the name.
"""

import contextlib
import io
import itertools
import json
import os
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from faceparse.data import DataError
from faceparse.data.labels import POINTS
from faceparse.inference.detect import as_array
from faceparse.training.checkpoint import write_atomically

ENDINGS = (".json", "_overlay.png", "_overlay.mp4", "_labels.png")
LONGEST = 230  # bytes of a photograph's name that its results keep; most file systems hold 255
STRENGTH = 140  # of the classes' colours in an overlay, of 255
COMPRESSION = 1  # of a PNG: two thirds of the usual one's time, for a tenth more bytes
RESULT = re.compile(r"(.*)_(labels|overlay)\.(png|mp4)")


def names_of(sources, folder):
    """The name of each source's results: that of its file, then ``-2``, ``-3``, ... after it.

    A source whose results the folder holds already keeps their name. Another one takes the first
    under which there is nothing.

    Args:
        sources: paths of different files, or what else tells sources apart, such as "camera 0".

    Returns:
        dict of the source to its name.
    """
    before = _stored_names(folder)
    stems = {source: _stem(source) for source in sources}
    names = {
        source: name
        for source, stem in stems.items()
        if (name := before.get(origin(source, folder))) is not None
        and re.fullmatch(re.escape(stem) + r"(-\d+)?", name)
    }
    claimed = {name.casefold() for name in names.values()}
    for source, stem in stems.items():
        if source in names:
            continue
        numbered = itertools.chain([stem], (f"{stem}-{i}" for i in itertools.count(2)))
        names[source] = next(
            name
            for name in numbered
            # Some file systems do not tell A from a.
            if name.casefold() not in claimed and not _is_taken(folder, name)
        )
        claimed.add(names[source].casefold())
    return {source: names[source] for source in sources}


def _stem(source):
    """What the results of a source would be called, with room for a number and an ending."""
    stem = source.stem if isinstance(source, Path) else source.replace(" ", "-")
    encoded = os.fsencode(stem)
    if len(encoded) > LONGEST:
        stem = encoded[:LONGEST].decode(errors="ignore")  # not through the middle of a character
    return stem


def _stored_names(folder):
    """The names of results in a folder by their sources, as the JSONs tell."""
    names = {}
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
            names.setdefault(str(json.loads(path.read_bytes())["source"]), path.stem)
    return names


def origin(source, folder):
    """How the JSON names a source: its path from the folder of the results."""
    if not isinstance(source, Path):
        return source
    real = os.path.realpath(source)  # Path.resolve fails on a loop of links
    try:
        return Path(os.path.relpath(real, os.path.realpath(folder))).as_posix()
    except ValueError:  # on another drive
        return Path(real).as_posix()


def _is_taken(folder, name):
    return any(os.path.lexists(folder / (name + ending)) for ending in ENDINGS)


def is_result(path):
    """Whether a picture is the result of another one, so that a folder can hold both."""
    match = RESULT.fullmatch(path.name)
    return match is not None and path.with_name(f"{match[1]}.json").is_file()


def is_done(folder, name, *, last):
    """Whether what is written last is there, and no older than the JSON, which is written first."""
    try:
        first = (folder / f"{name}.json").stat().st_mtime_ns
        return (folder / (name + last)).stat().st_mtime_ns >= first
    except FileNotFoundError:
        return False


def compose(parsed_faces, size):
    """The labels (H, W) uint8 of all faces of a photograph of ``size`` = (H, W).

    The larger, hence nearer face covers the smaller one; its background covers nothing.
    """
    labels = torch.zeros(tuple(size), dtype=torch.uint8)
    for parsed_face in sorted(
        parsed_faces, key=lambda parsed_face: parsed_face.points.std(0).norm().item()
    ):
        parsed_face.paint(labels)
    return labels


def label_picture(labels, label_set):
    """Labels (H, W) uint8 as a Pillow image with a palette: its values are the labels."""
    picture = Image.fromarray(labels.numpy())
    palette = bytes(value for colour in label_set.colours for value in colour)
    picture.putpalette(palette.ljust(3 * 256, b"\0"))  # a shorter one makes a PNG of 4 bits
    return picture


def overlay(image, labels, label_set):
    """A photograph (3, H, W) uint8 as a Pillow image, with the colours of its labels over it."""
    picture = Image.fromarray(as_array(image))
    strength = Image.fromarray(labels.numpy()).point([0] + [STRENGTH] * 255)
    picture.paste(label_picture(labels, label_set).convert("RGB"), mask=strength)
    return picture


def describe(parsed_face):
    """What the JSON says of a face; pixels are counted before another face covers any."""
    names = parsed_face.label_set.names
    pixels = parsed_face.pixels().tolist()
    known = bool(parsed_face.box.isfinite().all())
    return {
        "box": [round(v, 2) for v in parsed_face.box.tolist()] if known else None,
        "points": {
            name: [round(v, 2) for v in point]
            for name, point in zip(POINTS, parsed_face.points.tolist(), strict=True)
        },
        "pixels": dict(zip(names, pixels, strict=True)),
        "share": {
            name: round(count / sum(pixels), 6) for name, count in zip(names, pixels, strict=True)
        },
    }


def write(folder, name, source, image, parsed_faces):
    """Write the three results of a photograph.

    Args:
        image: (3, H, W) uint8.
        parsed_faces: of its faces, one at least.
    """
    labels, label_set = compose(parsed_faces, image.shape[1:]), parsed_faces[0].label_set
    facts = {"faces": [describe(parsed_face) for parsed_face in parsed_faces]}
    write_json(folder, name, source, image.shape[1:], label_set, facts)
    _write_png(folder / f"{name}_overlay.png", overlay(image, labels, label_set))
    _write_png(folder / f"{name}_labels.png", label_picture(labels, label_set))


def write_json(folder, name, source, size, label_set, facts):
    """Write the JSON of a source of ``size`` = (h, w): what all have, then its facts."""
    height, width = size
    shared = {"source": origin(source, folder), "size": [width, height]}
    shared["classes"] = label_set.names
    text = json.dumps(shared | facts, indent=2)
    # Points on a line each: people correct them.
    text = re.sub(r"\[\n([^][{}]*)\n *\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    write_atomically(folder / f"{name}.json", (text + "\n").encode())


def _write_png(path, picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=COMPRESSION)
    write_atomically(path, buffer.getvalue())


def read_points(files, photos):
    """Key points that a person has corrected.

    Args:
        files: as :func:`write` makes them, or a mapping of a photograph's name or path to its five
            points [x, y], or to a list of such fives.
        photos: the paths of those that are to be parsed.

    Returns:
        dict of a photograph to its points (F, 5, 2) float64.

    Raises:
        DataError: a file cannot be used; names it.
    """
    by_path, by_name = {os.path.realpath(photo): photo for photo in photos}, {}
    for photo in photos:
        by_name.setdefault(photo.name, []).append(photo)
    points = {}
    for file in files:
        for key, fives in _load(file).items():
            try:
                path = Path(key)
                places = (os.path.realpath(place) for place in (file.parent / path, path))
                exact = next((by_path[place] for place in places if place in by_path), None)
            except ValueError:  # what no path holds
                path, exact = Path(), None
            found = [exact] if exact else by_name.get(path.name, [])
            if len(found) != 1:
                many = "several PHOTOs are" if found else "no PHOTO is"
                raise DataError(f"--points {file}: {many} {key!r}")
            points[found[0]] = _checked(fives, f"--points {file}: {key!r}")
    return points


def _load(file):
    """The mapping in a file of points."""
    if not file.is_file():
        raise DataError(f"--points must be a file, got {file}")
    try:
        stored = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"--points {file} is no JSON: {error}") from None
    if not isinstance(stored, dict):
        stored = {}
    if "source" in stored:
        try:
            faces = [[face["points"][name] for name in POINTS] for face in stored["faces"]]
            stored = {str(stored["source"]): faces}
        except (TypeError, KeyError):
            stored = {}
    if not stored:
        raise DataError(
            f"--points {file} must map photographs to points, or be what predict.py writes"
        )
    return stored


def _checked(fives, where):
    """Points (F, 5, 2) of what may also be those of one face."""
    try:
        array = np.asarray(fives, float)
        array = array[None] if array.ndim == 2 else array
        whole = array.shape[1:] == (5, 2) and len(array) and np.isfinite(array).all()
    except (TypeError, ValueError, OverflowError):  # of unequal lengths, no numbers
        whole = False
    if not whole:
        given = json.dumps(fives)
        given = given if len(given) < 60 else given[:57] + "..."
        raise DataError(f"{where} must have five points [x, y], or a list of such, got {given}")
    if (np.ptp(array, axis=1).max(1) < 1).any():
        raise DataError(f"{where} must have points that lie apart, got {array[0, 0].tolist()}")
    return array
