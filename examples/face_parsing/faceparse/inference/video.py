"""Frames of videos and cameras, read and written by OpenCV."""

import contextlib
import errno
import math
import os

import cv2
import numpy as np
from tqdm import tqdm

from faceparse.console import printable
from faceparse.training.checkpoint import temporary_beside

from .image_io import PhotographError

# FFmpeg says much of a bad file, where one line is enough; OpenCV reads this with the first video.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

SUFFIXES = {".3gp", ".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".webm"}
SUFFIXES |= {".flv", ".m2ts", ".mts", ".ts", ".wmv"}
# Every build of OpenCV writes it; those on PyPI have no H.264, and VP9 takes twenty times as long.
CODEC = "mp4v"
RATE = 25  # frames a second, of a file that does not say
SLOWEST = 0.01  # that OpenCV writes


def open_capture(source):
    """``cv2.VideoCapture`` of a file's path or a camera's number.

    Raises:
        PhotographError: it cannot be opened.
    """
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    if isinstance(source, int):
        capture, what = cv2.VideoCapture(source), f"camera {source}"
    else:
        what = source
        check_name(source, "read")
        capture = cv2.VideoCapture(os.fspath(source))
    if not capture.isOpened():
        raise PhotographError(f"cannot read {what}: OpenCV cannot open it")
    return capture


def check_name(path, action):
    """Refuse a path that is not UTF-8: OpenCV would end the process."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise PhotographError(f"cannot {action} {path}: its name is not UTF-8") from None


def count_of(capture, *, every=1):
    """How many frames :func:`frames` should give, as the file says; None where it does not."""
    total = capture.get(cv2.CAP_PROP_FRAME_COUNT)
    return math.ceil(total / every) if total > 0 else None


def frames(capture, *, every=1, title=None):
    """Each frame (H, W, 3) uint8 RGB, or each ``every``-th, with the progress bar that counts it.

    Args:
        capture: ``cv2.VideoCapture``; released at the end.
        title: words in front of the bar.
    """
    total = count_of(capture, every=every)
    try:
        with tqdm(total=total, desc=title and printable(title), unit="frame", disable=None) as bar:
            while True:
                read, frame = capture.read()
                if not read:
                    return
                yield frame[..., ::-1], bar
                bar.update()
                if not all(capture.grab() for _ in range(every - 1)):
                    return
    finally:
        capture.release()


def rate(capture, *, every=1):
    """Frames a second of what :func:`frames` gives."""
    given = capture.get(cv2.CAP_PROP_FPS)
    return max((given if 0 < given < 1000 else RATE) / every, SLOWEST)  # NaN is neither


@contextlib.contextmanager
def writing(path, frames_per_second):
    """A function that writes one frame, a Pillow image; the file is whole or not there.

    Of an odd number of rows or columns, OpenCV leaves out the last.

    Args:
        path: of an mp4 file.

    Raises:
        PhotographError: OpenCV cannot write such a video.
        OSError: the file does not hold all frames in the end.
    """
    check_name(path, "write")
    temporary = temporary_beside(path)
    writer, count = cv2.VideoWriter(), 0

    def write(frame):
        nonlocal count
        if not count:
            code = cv2.VideoWriter_fourcc(*CODEC)
            if not writer.open(os.fspath(temporary), code, frames_per_second, frame.size):
                raise PhotographError(
                    f"OpenCV {cv2.__version__} cannot write {CODEC} video of "
                    f"{frame.size[0]} x {frame.size[1]} pixels to {path}"
                )
        writer.write(cv2.cvtColor(np.asarray(frame), cv2.COLOR_RGB2BGR))
        count += 1

    try:
        yield write
        writer.release()
        # The writer says nothing of a full disk, but the list of frames comes last in the file.
        written = cv2.VideoCapture(os.fspath(temporary)).get(cv2.CAP_PROP_FRAME_COUNT)
        if written != count:
            raise OSError(errno.EIO, "could not be written whole", os.fspath(path))
        os.replace(temporary, path)
    finally:
        writer.release()
        temporary.unlink(missing_ok=True)
