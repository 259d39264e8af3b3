"""predict.py on videos and cameras."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from drawn_faces import FOUND, drawn, files, labels_of
from PIL import Image

from faceparse import cli
from faceparse.inference import video


def write_video(path, images, rate=10, codec="mp4v"):
    height, width = images[0].shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), rate, (width, height))
    for image in images:
        writer.write(np.ascontiguousarray(image[..., ::-1]))
    writer.release()


def read_video(path):
    capture = cv2.VideoCapture(str(path))
    rate = capture.get(cv2.CAP_PROP_FPS)
    return [frame.copy() for frame, _ in video.frames(capture)], rate


@pytest.mark.parametrize(("every", "expected"), [(1, 5), (2, 3)])
def test_a_video_is_written_with_its_labels(every, expected, run, tmp_path):
    face, blank = drawn(FOUND[1])[0], np.full((256, 256, 3), 90, np.uint8)
    write_video("clip.mp4", [face, blank, face, face, face])
    Path("parsed").mkdir()
    Path("parsed/.123-0.gatedrnn-tmp.mp4").touch()  # of a run that was killed
    assert run("clip.mp4", "--every", every) == 0
    assert files("parsed") == ["clip.json", "clip_overlay.mp4"]
    frames, rate = read_video("parsed/clip_overlay.mp4")
    assert len(frames) == expected
    assert rate == pytest.approx(10 / every, abs=0.01)
    seen = [abs(frame.astype(float) - face).mean() for frame in frames]
    assert 10 < seen[0] < 100  # tinted, and still the face
    if every == 1:
        assert abs(frames[1].astype(float) - 90).mean() < 9  # without a face, it stays as it is
    stored = json.loads(Path("parsed/clip.json").read_text())
    assert stored["frames"] == expected
    assert stored["frames_with_faces"] == expected - (every == 1)


def write_timed(path, images, times):
    """A film whose frames are shown at their own times, in seconds."""
    height, width = images[0].shape[:2]
    code, raw = cv2.VideoWriter_fourcc(*"MJPG"), [cv2.VIDEOWRITER_PROP_RAW_VIDEO, 1]
    writer = cv2.VideoWriter(path, cv2.CAP_FFMPEG, code, 1000, (width, height), raw)
    for image, time in zip(images, times, strict=True):
        writer.set(cv2.VIDEOWRITER_PROP_PTS, round(1000 * time))
        encoded = cv2.imencode(".jpg", np.ascontiguousarray(image[..., ::-1]))[1]
        writer.write(encoded.reshape(1, -1))
    writer.release()


def test_of_a_film_whose_rate_varies_each_frame_has_its_own_time(run, capfd):
    times = [0, 0.5, 0.54, 0.58, 2, 2.2, 3]
    greys = [np.full((256, 256, 3), 30 * i, np.uint8) for i in range(1, len(times))]
    write_timed("clip.mkv", [drawn(FOUND[1])[0], *greys], times)
    assert run("clip.mkv") == 0
    assert "damaged" not in capfd.readouterr().err
    shown, rate = read_video("parsed/clip_overlay.mp4")
    assert rate == 25
    # The film's end is unknown: the last frame lasts as long as the median one, 0.35 s.
    assert len(shown) / rate == pytest.approx(3.35, abs=0.05)
    for i, frame in enumerate(shown):
        source = np.searchsorted(times, (i + 0.5) / rate) - 1
        assert source == 0 or abs(frame.mean() - 30 * source) < 9
    stored = json.loads(Path("parsed/clip.json").read_text())
    assert (stored["frames"], stored["frames_with_faces"]) == (7, 1)


@pytest.mark.parametrize(
    ("times", "options", "rate", "counts"),
    [
        ([i / 15 for i in range(9)], {}, 15, [1] * 9),  # the header says 1000
        ([i / 15 for i in range(9)], {"every": 2}, 7.5, [1] * 5),
        ([0], {}, 25, [1]),
        ([1, 1.02, 1.1, 1.1, 1.2], {}, 50, [1, 4, 0, 5, 5]),
        ([0, 0.001, 1], {}, 60, [0, 60, 30]),
        # No more than a hundred for each that is read, in 1500 s.
        ([0, 0.01, 1000], {}, 0.2, [0, 200, 100]),
    ],
)
def test_the_times_of_a_film(times, options, rate, counts, tmp_path):
    path = tmp_path / "clip.mkv"
    write_timed(str(path), [np.zeros((16, 16, 3), np.uint8)] * len(times), times)
    found = video.timing(path, **options)
    assert found.rate == pytest.approx(rate, rel=0.01)
    assert found.counts == counts
    assert found.promised is None


@pytest.mark.parametrize("rate", [71.428571, 144.0144])
def test_every_frame_rate_can_be_written(rate, tmp_path):
    path = tmp_path / "clip.mp4"
    with video.writing(path, rate) as write:
        write(Image.new("RGB", (64, 48)))
    assert read_video(path)[1] == pytest.approx(rate, abs=0.01)


def test_the_name_of_a_film_is_no_order_to_ffmpeg(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, count in (("other.mp4", 2), ("concat:other.mp4", 3)):
        with video.writing(Path(name), 10) as write:
            write(Image.new("RGB", (64, 48)), count)
    assert video.timing(Path("concat:other.mp4")).counts == [1] * 3


def test_bad_videos_are_named(run, tmp_path, capfd):
    write_video("blank.mp4", [np.full((64, 64, 3), 90, np.uint8)] * 2)
    Path("broken.mp4").write_bytes(b"no video")
    strange = os.fsdecode(b"\xff.mp4")
    Path(strange).write_bytes(b"no video")
    assert run("blank.mp4") == cli.FACELESS
    assert run("broken.mp4", strange, "blank.mp4") == cli.WRONG
    lines = {line for line in capfd.readouterr().err.splitlines() if line.strip()}
    (nameless,) = (line for line in lines if line.endswith(".mp4: its name is not UTF-8"))
    assert lines - {nameless} == {
        "error: no face found in blank.mp4",
        "error: cannot read broken.mp4: OpenCV cannot open it",
    }
    assert not Path("parsed").exists()
    assert run("blank.mp4", "--out", os.fsdecode(b"\xff")) == cli.WRONG
    error = "error: cannot write \\udcff/blank_overlay.mp4: its name is not UTF-8"
    assert capfd.readouterr().err.splitlines()[-1] == error


def test_a_video_of_too_few_frames_is_named_and_one_that_cannot_be_written_stops_no_other(
    run, tmp_path, monkeypatch, capfd
):
    face = drawn(FOUND[1])[0]
    write_video("clip.mp4", [face] * 3)
    write_video("narrow.avi", [face[:, :1]] * 2, codec="MJPG")
    promised = video.count_of
    monkeypatch.setattr(video, "count_of", lambda *args, **every: promised(*args, **every) + 1)
    assert run("clip.mp4", "--every", 10**6) == 0
    assert run("narrow.avi", "clip.mp4") == cli.WRONG
    lines = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert "note: clip.mp4 may be damaged: of 4 frames, 3 could be read" in lines
    (error,) = {line for line in lines if line.startswith("error: ")}
    assert "cannot write mp4v video of 1 x 256 pixels" in error
    assert files("parsed") == ["clip.json", "clip_overlay.mp4"]


def test_a_video_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "clip.mp4"
    picture = Image.new("RGB", (64, 48))

    def write_one(*, stopped):
        with video.writing(path, 10) as write:
            write(picture)
            if stopped:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_one(stopped=True)
    assert files(tmp_path) == []

    with monkeypatch.context() as patch:
        none = SimpleNamespace(get=lambda what: 0.0)  # as after a full disk
        patch.setattr(cv2, "VideoCapture", lambda path: none)
        with pytest.raises(OSError, match="could not be written whole"):
            write_one(stopped=False)
    assert files(tmp_path) == []


class Camera:
    """Frames from a list, then Ctrl-C, or the end."""

    def __init__(self, images, *, stopped):
        self.images, self.stopped, self.released = list(images), stopped, False

    def isOpened(self):
        return True

    def get(self, what):
        return -1.0

    def read(self):
        if self.images:
            return True, np.ascontiguousarray(self.images.pop(0)[..., ::-1])
        if self.stopped:
            raise KeyboardInterrupt
        return False, None

    def release(self):
        self.released = True


@pytest.mark.parametrize("stopped", [True, False])
def test_a_camera_leaves_its_last_face(stopped, run, monkeypatch, capsys):
    faces = [drawn(index)[0] for index in FOUND]
    camera = Camera([*faces, np.full((256, 256, 3), 90, np.uint8)], stopped=stopped)
    monkeypatch.setattr(cv2, "VideoCapture", lambda number: {3: camera}[number])
    assert run("--camera", 3) == 0
    assert camera.released
    assert files("parsed") == ["camera-3.json", "camera-3_labels.png", "camera-3_overlay.png"]
    labels = labels_of("parsed/camera-3_labels.png")
    shown = np.array(Image.open("parsed/camera-3_overlay.png"))
    np.testing.assert_array_equal(shown[labels == 0], faces[-1][labels == 0])
    assert json.loads(Path("parsed/camera-3.json").read_text())["source"] == "camera 3"


@pytest.mark.parametrize(
    ("images", "code", "words"),
    [
        ([], cli.WRONG, "error: cannot read camera 0: it gives no frame"),
        ([np.zeros((64, 64, 3), np.uint8)], cli.FACELESS, "error: no face found by camera 0"),
    ],
)
def test_a_camera_without_a_face_is_one_line(images, code, words, run, monkeypatch, capsys):
    monkeypatch.setattr(cv2, "VideoCapture", lambda number: Camera(images, stopped=True))
    assert run("--camera", 0) == code
    assert capsys.readouterr().err.splitlines() == [words]
    assert not Path("parsed").exists()
