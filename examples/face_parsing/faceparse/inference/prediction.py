"""Photographs, videos and cameras: which are meant, and how each is parsed and written."""

import contextlib
import glob
import os
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from faceparse import cli
from faceparse.console import say
from faceparse.data import DataError
from faceparse.reporting import writers

from . import image_io, video
from .image_io import NoFaceError, PhotographError, as_tensor


def expand(arguments):
    """The files that are meant, each once: photographs, videos, what folders and globs hold.

    Raises:
        DataError: an argument stands for no file.
    """
    found, wrong = {}, []
    for text in arguments:
        files = _files(text)
        for path in files:
            found.setdefault(os.path.realpath(path), path)
        if not files:
            wrong.append(repr(text))
    if wrong:
        raise DataError(
            "PHOTO must be a file, a folder that holds photographs or a glob that matches files, "
            f"got {', '.join(wrong)}"
        )
    return list(found.values())


def _files(text):
    path = Path(text)
    if path.is_dir():
        return [
            each
            for each in sorted(path.iterdir())
            if each.suffix.lower() in image_io.SUFFIXES
            and each.is_file()
            and not each.name.startswith(".")
            and not writers.is_result(each)
        ]
    if path.is_file():
        return [path]
    matches = sorted(set(_matches(path)))
    return [match for match in matches if match.is_file() and not writers.is_result(match)]


def _matches(pattern):
    """The paths that match a glob. ``**`` visits each folder once, also where links form a loop."""
    parts = pattern.parts
    if "**" not in parts:
        return map(Path, glob.glob(str(pattern)))
    place = parts.index("**")
    tops = glob.glob(os.path.join(*parts[:place])) if place else ["."]
    return [
        match
        for top in tops
        for folder in _folders(top)
        for match in _matches(Path(glob.escape(folder), *(parts[place + 1 :] or ["*"])))
    ]


def _folders(top):
    """A folder and all below it, those of links too, without hidden ones; each of them once."""
    seen = set()
    for folder, names, _ in os.walk(top, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            names.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        names[:] = [name for name in names if not name.startswith(".")]
        yield folder


def is_video(path):
    return path.suffix.lower() in video.SUFFIXES


def parse_faces(parser, image, *, everyone, points=None):
    """``ParsedFace`` of the largest face of an image (3, H, W) uint8, of all, or of those given.

    Args:
        everyone: every face that is detected.
        points: (F, 5, 2), instead of detection.
    """
    if points is not None:
        boxes = np.full((len(points), 4), np.nan)
        return parser.parse([image] * len(points), list(points), list(boxes))
    if everyone:
        return parser.all_faces(image)
    return [parsed_face for parsed_face in parser([image]) if parsed_face is not None]


def check_near(points, image, path):
    """Refuse points (F, 5, 2) further outside of an image (3, H, W) than it is large."""
    size = np.array(image.shape[:0:-1])
    far = ((points < -size) | (points > 2 * size)).any(-1)
    if far.any():
        raise PhotographError(
            f"--points for {path}: {points[far][0].tolist()} is not near its {size[0]} x {size[1]}"
            " pixels"
        )


def predict_photo(path, folder, name, *, parse, points=None):
    """Parse a photograph and write what comes of it.

    Args:
        parse: :func:`parse_faces` of a parser.

    Raises:
        PhotographError, NoFaceError: nothing is written.
    """
    image = image_io.read(path)
    if points is not None:
        check_near(points, image, path)
    parsed_faces = parse(image, points=points)
    if not parsed_faces:
        raise NoFaceError(f"no face found in {path}")
    writers.write(folder, name, path, image, parsed_faces)


def predict_video(path, folder, name, *, parse, label_set, every):
    """The same of a video; a frame without a face stays as it is."""
    rate, counts, promised = video.timing(path, every=every)
    capture = video.open_capture(path)
    count = with_face = 0
    shown = video.frames(capture, every=every, title=path.name, total=len(counts))
    with video.writing(folder / f"{name}_overlay.mp4", rate) as write, contextlib.closing(shown):
        for (frame, bar), times in zip(shown, counts, strict=False):
            image = as_tensor(frame)
            parsed_faces = parse(image)
            labels = writers.compose(parsed_faces, image.shape[1:])
            write(writers.overlay(image, labels, label_set), times)
            count, with_face = count + 1, with_face + bool(parsed_faces)
            bar.set_postfix(faces=len(parsed_faces), refresh=False)
        if not count:
            raise PhotographError(f"cannot read {path}: it has no frame")
        if promised and count < promised:
            words = f"note: {path} may be damaged: of {promised} frames, {count} could be read"
            say(cli.one_line(words), file=sys.stderr)
        if not with_face:
            raise NoFaceError(f"no face found in {path}")
        facts = {"frames": count, "frames_with_faces": with_face, "frames_per_second": rate}
        writers.write_json(folder, name, path, image.shape[1:], label_set, facts)


def predict_camera(capture, folder, name, source, *, parse):
    """Parse what a camera sees until Ctrl-C, then write the last frame with a face."""
    image = last = None
    with contextlib.closing(video.frames(capture, title=source)) as frames:
        try:
            for frame, bar in frames:
                image = as_tensor(frame)
                parsed_faces = parse(image)
                bar.set_postfix(faces=len(parsed_faces), refresh=False)
                if parsed_faces:
                    last = image, parsed_faces
        except KeyboardInterrupt:
            pass
    if image is None:
        raise PhotographError(f"cannot read {source}: it gives no frame")
    if last is None:
        raise NoFaceError(f"no face found by {source}")
    writers.write(folder, name, source, *last)


def predict_files(paths, names, args, *, parse, label_set, points):
    """Parse one file after the other; returns how many are unreadable, and how many faceless."""
    counts = {PhotographError: 0, NoFaceError: 0}
    for path in tqdm(paths, unit="photo", disable=None if len(paths) > 1 else True):
        try:
            if is_video(path):
                options = dict(parse=parse, label_set=label_set, every=args.every)
                predict_video(path, args.out, names[path], **options)
            else:
                given = points.get(path)
                predict_photo(path, args.out, names[path], parse=parse, points=given)
        except (PhotographError, NoFaceError) as error:
            counts[type(error)] += 1
            say(f"error: {cli.one_line(error)}", file=sys.stderr)
    return counts.values()


def is_done(path, folder, name):
    ending = "_overlay.mp4" if is_video(path) else "_labels.png"
    return writers.is_done(folder, name, last=ending)


def run_files(args, parse, label_set, paths, points):
    names = writers.names_of(paths, args.out)
    for path, name in names.items():
        if name != path.stem:
            say(f"note: {path.stem} is taken, {path} is parsed into {name}", file=sys.stderr)
    todo = [
        path
        for path in paths
        if not args.resume or path in points or not is_done(path, args.out, names[path])
    ]
    unreadable, faceless = predict_files(
        todo, names, args, parse=parse, label_set=label_set, points=points
    )
    words = [f"{len(todo) - unreadable - faceless} of {len(paths)} parsed into {args.out}"]
    words += [f"{len(paths) - len(todo)} done before"] * (len(todo) < len(paths))
    words += [f"{unreadable} unreadable"] * (unreadable > 0)
    words += [f"{faceless} without a face"] * (faceless > 0)
    say(", ".join(words))
    if unreadable or faceless:
        sys.exit(cli.WRONG if unreadable else cli.FACELESS)


def run_camera(args, parse):
    source = f"camera {args.camera}"
    (name,) = writers.names_of([source], args.out).values()
    capture = video.open_capture(args.camera)
    predict_camera(capture, args.out, name, source, parse=parse)
    say(f"the last face is in {args.out / name}_overlay.png")
