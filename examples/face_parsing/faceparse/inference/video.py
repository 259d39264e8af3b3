"""Frames of videos and cameras, read and written by OpenCV."""

import contextlib
import errno
import math
import os
from typing import NamedTuple

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
FASTEST = 60  # frames a second of what is written of a film whose frame rate varies
REPEATS = 100  # frames written for one that is read, on average: a damaged time could ask for more


class Timing(NamedTuple):
    """How a film of one frame rate shows each frame of another film at its own time."""

    rate: float  # frames a second
    counts: list[int]  # how often each frame is written; 0 for one that another frame replaces
    promised: int | None = None  # frames that the film's header counts; None if that is a guess


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
        # FFmpeg takes "concat:a.mp4" for an order, unless it is a whole path.
        capture = cv2.VideoCapture(os.path.abspath(source))
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
    """How many frames :func:`frames` should give, as the header says; None where it does not."""
    total = capture.get(cv2.CAP_PROP_FRAME_COUNT)
    return math.ceil(total / every) if total > 0 else None


def frames(capture, *, every=1, title=None, total=None):
    """Each frame (H, W, 3) uint8 RGB, or each ``every``-th, with the progress bar that counts it.

    Args:
        capture: ``cv2.VideoCapture``; released at the end.
        title: words in front of the bar.
        total: how many there will be, for the bar.
    """
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


def timing(path, *, every=1):
    """The :class:`Timing` of what :func:`frames` gives of a film. It reads the film once.

    OpenCV writes one frame rate only, so a frame that lasts longer is written more than once. Each
    frame is shown within half a frame of its own time.
    """
    capture = open_capture(path)
    given = capture.get(cv2.CAP_PROP_FPS)
    end = capture.get(cv2.CAP_PROP_FRAME_COUNT) / given if given > 0 else 0.0
    given = given if 0 < given < 1000 else 0.0  # NaN is neither
    promised = count_of(capture, every=every)
    times = []
    bar = tqdm(desc=f"times of {printable(path.name)}", unit="frame", disable=None, leave=False)
    try:
        while capture.grab():
            times.append(capture.get(cv2.CAP_PROP_POS_MSEC) / 1000)
            bar.update()
            if not all(capture.grab() for _ in range(every - 1)):
                break
    finally:
        bar.close()
        capture.release()
    times = np.maximum.accumulate(times) if times else np.zeros(1)
    gaps = np.diff(times)
    if not gaps.any():  # one frame, or no times
        return Timing(max((given or RATE) / every, SLOWEST), [1] * len(times))
    middle = gaps.sum() / len(gaps)
    grid = times[0] + middle * np.arange(len(times))
    if (abs(times - grid) < middle / 2).all():
        known = abs(1 / middle - given / every) < 0.1 / middle
        rate = max(round(float(1 / middle), 4), SLOWEST)
        return Timing(rate, [1] * len(times), promised if known else None)
    return _varying(times, given / every, end)


def _varying(times, given, end):
    """The :class:`Timing` of frames whose distances differ.

    Args:
        times: seconds, in order.
        given: frames a second, as the film says; 0 where it does not.
        end: seconds, the same.
    """
    gaps = np.diff(times)
    # The last frame lasts until the film's end, but no longer than any other.
    last = np.clip(end - times[-1], np.median(gaps), gaps.max())
    most = min(FASTEST, REPEATS * len(times) / (times[-1] + last - times[0]))
    finest = 1 / gaps[gaps > 0].min()
    rate = max(given if 0.75 * finest <= given <= most else min(finest, most), SLOWEST)
    places = np.round((np.append(times, times[-1] + last) - times[0]) * rate).astype(int)
    counts = np.diff(places)
    counts[-1] = max(1, counts[-1])
    return Timing(round(float(rate), 4), counts.tolist())


@contextlib.contextmanager
def writing(path, frames_per_second):
    """A function that writes a frame, a Pillow image, some times; the file is whole or not there.

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
    # MPEG-4 counts time in fractions of a second, down to 1 / 65535.
    rate = frames_per_second if frames_per_second < 60 else round(frames_per_second, 2)

    def write(frame, times=1):
        nonlocal count
        if not writer.isOpened():
            code = cv2.VideoWriter_fourcc(*CODEC)
            if not writer.open(os.path.abspath(temporary), code, rate, frame.size):
                raise PhotographError(
                    f"OpenCV {cv2.__version__} cannot write {CODEC} video of "
                    f"{frame.size[0]} x {frame.size[1]} pixels to {path}"
                )
        pixels = cv2.cvtColor(np.asarray(frame), cv2.COLOR_RGB2BGR)
        for _ in range(times):
            writer.write(pixels)
        count += times

    try:
        yield write
        writer.release()
        # The writer says nothing of a full disk, but the list of frames comes last in the file.
        written = cv2.VideoCapture(os.path.abspath(temporary)).get(cv2.CAP_PROP_FRAME_COUNT)
        if written != count:
            raise OSError(errno.EIO, "could not be written whole", os.fspath(path))
        os.replace(temporary, path)
    finally:
        writer.release()
        temporary.unlink(missing_ok=True)
