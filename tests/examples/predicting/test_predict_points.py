"""predict.py with key points that are given."""

import json
from pathlib import Path

import predict
import pytest
from drawn_faces import SHAPE, labels_of, write_blank, write_face
from example_scripts import refused

from faceparse import cli


def test_points_are_read_back_and_used(run, tmp_path):
    write_face(tmp_path / "a.png")
    assert run("a.png") == 0
    detected = labels_of("parsed/a_labels.png")
    path = Path("parsed/a.json")
    assert run("a.png", "--points", path) == 0
    assert (labels_of("parsed/a_labels.png") == detected).mean() > 0.999  # points have 2 decimals
    stored = json.loads(path.read_text())
    assert stored["faces"][0]["box"] is None

    # Corrected by hand: 20 pixels to the right.
    for point in stored["faces"][0]["points"].values():
        point[0] += 20
    path.write_text(json.dumps(stored))
    assert run("a.png", "--points", path) == 0
    moved = labels_of("parsed/a_labels.png")
    assert (moved[:, 40:-20] == detected[:, 20:-40]).mean() > 0.999


def test_points_are_used_where_the_detector_finds_nothing(run, tmp_path):
    write_blank(tmp_path / "a.png")
    fives = (SHAPE / 6).tolist()
    further = (SHAPE / 12 + 30).tolist()
    for given_points, count in ((fives, 1), ([fives], 1), ([fives, further], 2)):
        Path("p.json").write_text(json.dumps({"a.png": given_points}))
        assert run("a.png", "--points", "p.json") == 0
        assert len(json.loads(Path("parsed/a.json").read_text())["faces"]) == count


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("{}", "must map photographs to points"),
        ("[[1, [[1, 2]]]]", "must map photographs to points"),
        (r'{"a\u0000b.png": 3}', "no PHOTO is"),
        ("[1, 2]", "must map photographs to points"),
        ('{"source": "a.png", "faces": 3}', "must map photographs to points"),
        ('{"source": "a.png", "faces": []}', "'a.png' must have five points [x, y]"),
        ('{"source": "a.png", "faces": [{"points": {"nose tip": [1, 2]}}]}', "must map"),
        ('{"b.png": [[1, 2]]}', "no PHOTO is 'b.png'"),
        ('{"a.png": [[1, 2]]}', "five points [x, y], or a list of such, got [[1, 2]]"),
        ('{"a.png": [[1, 2], [3, 4], [5, 6], [7, 8], [9, null]]}', "must have five points"),
        ('{"a.png": [[1, 2], [3, 4], [5, 6], [7, 8], [9]]}', "must have five points"),
        ('{"a.png": [[1, 2], [3, 4], [5, 6], [7, 8], [9, Infinity]]}', "must have five points"),
        ('{"a.png": "here"}', "must have five points"),
        ('{"loop/a.png": "here"}', "must have five points"),
        ('{"a.png": [[1, 2], [1, 2], [1, 2], [1, 2], [1, 2]]}', "points that lie apart"),
    ],
)
def test_points_that_cannot_be_are_one_line(text, words, run, tmp_path, monkeypatch, capsys):
    write_face(tmp_path / "a.png")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "p.json").write_text(text)
    given_arguments = ["--models", "m", "a.png", "--points", "p.json"]
    error = refused(monkeypatch, capsys, predict, *given_arguments)
    assert error.startswith("error: --points p.json")
    assert words in error
    assert not Path("parsed").exists()


def test_points_name_one_photograph(run, tmp_path, monkeypatch, capsys):
    for folder in ("x", "y"):
        write_blank(write_face(tmp_path / folder / "a.png"))
    Path("p.json").write_text(json.dumps({"a.png": (SHAPE / 6).tolist()}))
    arguments = ["--models", "m", "x", "y", "--points", "p.json"]
    assert "several PHOTOs are 'a.png'" in refused(monkeypatch, capsys, predict, *arguments)
    Path("p.json").write_text(json.dumps({"y/a.png": (SHAPE / 6).tolist()}))
    assert run("x", "y", "--points", "p.json") == cli.FACELESS
    assert json.loads(Path("parsed/a-2.json").read_text())["source"] == "../y/a.png"


def test_points_far_from_the_photograph_are_refused(run, tmp_path, capsys):
    write_blank(tmp_path / "a.png")
    Path("p.json").write_text(json.dumps({"a.png": (SHAPE * 1000).tolist()}))
    assert run("a.png", "--points", "p.json") == cli.WRONG
    assert "is not near its 64 x 48 pixels" in capsys.readouterr().err
