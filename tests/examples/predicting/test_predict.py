"""predict.py: what it writes of photographs, and what it says of bad ones."""

import json
import os
import re
import sys
import tempfile
from pathlib import Path

import children
import numpy as np
import predict
import pytest
import torch
from drawn_faces import FOUND, HAIR, LAYOUT, SKIN, drawn, files, labels_of, write_blank, write_face
from example_scripts import EXAMPLE, refused
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from faceparse import cli
from faceparse.data import FINE
from faceparse.data.labels import POINTS
from faceparse.inference import face_crops, face_parser, image_io, prediction
from faceparse.inference.face_parser import FaceParser, ParsedFace
from faceparse.models import build_model
from faceparse.reporting import writers


def test_a_photograph_gives_labels_overlay_and_json(run, tmp_path, capsys):
    photo = write_face(tmp_path / "ann.png")
    assert run("ann.png") == 0
    assert capsys.readouterr().out == "1 of 1 parsed into parsed\n"
    assert files("parsed") == ["ann.json", "ann_labels.png", "ann_overlay.png"]

    picture = Image.open("parsed/ann_labels.png")
    assert (picture.mode, picture.size) == ("P", (256, 256))
    assert Path("parsed/ann_labels.png").read_bytes()[24] == 8  # bits, in the PNG's header
    colours = np.reshape(picture.getpalette()[: 3 * len(FINE.colours)], (-1, 3))
    np.testing.assert_array_equal(colours, FINE.colours)
    labels = np.array(picture)
    assert set(np.unique(labels)) == {0, SKIN, HAIR}

    before, after = (
        np.array(Image.open(path), float) for path in (photo, "parsed/ann_overlay.png")
    )
    np.testing.assert_array_equal(before[labels == 0], after[labels == 0])
    share = writers.STRENGTH / 255
    mixed = before * (1 - share) + share * np.array(FINE.colours)[labels]
    np.testing.assert_allclose(after[labels != 0], mixed[labels != 0], atol=1)

    stored = json.loads(Path("parsed/ann.json").read_text())
    assert stored["source"] == "../ann.png"
    assert stored["size"] == [256, 256]
    assert tuple(stored["classes"]) == FINE.names
    (face,) = stored["faces"]
    assert tuple(face["points"]) == POINTS
    assert face["pixels"] == {name: (labels == i).sum() for i, name in enumerate(FINE.names)}
    assert sum(face["share"].values()) == pytest.approx(1, abs=1e-5)
    assert face["share"]["hair"] == pytest.approx((labels == HAIR).mean(), abs=1e-6)
    x, y, width, height = face["box"]
    assert x < face["points"]["nose tip"][0] < x + width
    assert y < face["points"]["nose tip"][1] < y + height


def test_labels_lie_on_the_upright_photograph(run, tmp_path):
    image, points = drawn(FOUND[0])
    tall = np.concatenate([image, image[:64]])
    Image.fromarray(tall).save("upright.png")
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(np.ascontiguousarray(np.rot90(tall))).save("turned.png", exif=exif)
    Path("points.json").write_text(
        json.dumps({f"{n}.png": points.tolist() for n in ("upright", "turned")})
    )
    assert run("upright.png", "turned.png", "--points", "points.json") == 0
    expected = labels_of("parsed/upright_labels.png")
    assert expected.shape == (320, 256)
    np.testing.assert_array_equal(labels_of("parsed/turned_labels.png"), expected)


def test_the_limit_of_pixels_can_be_set(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(image_io, "_limit", image_io._limit)
    write_face(tmp_path / "face.png")
    assert run("face.png", "--max-megapixels", "0.05") == cli.WRONG
    assert "must have at most 0.05 megapixels, got 256 x 256" in capsys.readouterr().err
    assert run("face.png", "--max-megapixels", "0.1") == 0


@pytest.mark.parametrize("name", ["a.MTS", "a.m2ts", "a.ts", "a.flv", "a.mp4"])
def test_films_are_told_by_their_names(name):
    assert prediction.is_video(Path(name))


@pytest.mark.parametrize(
    ("names", "code"),
    [
        (["face"], 0),
        (["face", "blank"], cli.FACELESS),
        (["face", "broken"], cli.WRONG),
        (["broken", "blank", "face"], cli.WRONG),  # that code wins
    ],
)
def test_bad_photographs_are_named_and_the_others_go_on(names, code, run, tmp_path, capsys):
    write_face(tmp_path / "face.png")
    write_blank(tmp_path / "blank.png")
    whole = (tmp_path / "face.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(whole[: len(whole) // 2])
    assert run(*(f"{name}.png" for name in names)) == code
    assert "face_labels.png" in files("parsed")
    assert len(files("parsed")) == 3
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if "error" in line]
    assert len(lines) == len(names) - 1
    assert ("error: no face found in blank.png" in lines) == ("blank" in names)
    assert any("cannot read broken.png: " in line for line in lines) == ("broken" in names)
    assert f"1 of {len(names)} parsed" in said.out


def test_a_run_without_results_leaves_no_folder(run, tmp_path):
    write_blank(tmp_path / "blank.png")
    assert run("blank.png") == cli.FACELESS
    assert not Path("parsed").exists()


def test_arguments_that_cannot_be_are_one_line(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(FaceParser, "load", None)  # refused before any work
    photo = write_face(tmp_path / "face.png")
    (tmp_path / "empty").mkdir()
    for arguments, words in {
        ("face.png", "none.png", "empty", "*.tif"): "got 'none.png', 'empty', '*.tif'",
        (): "either PHOTO or --camera N must be given",
        ("face.png", "--camera", "0"): "must be given, not both",
        ("--camera", "-1"): "--camera",
        ("--camera", "0", "--points", "p.json"): "--points goes with photographs",
        ("face.png", "--every", "0"): "--every",
        ("face.png", "--device", "abacus"): "abacus",
        ("face.png", "--points", "none.json"): "none.json",
    }.items():
        assert words in refused(monkeypatch, capsys, predict, "--models", "m", *arguments)
    assert "--models" in refused(monkeypatch, capsys, predict, photo)
    assert files(tmp_path) == ["empty", "face.png"]


def test_models_that_are_not_there_are_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.undo()  # the true FaceParser.load
    photo = write_face(tmp_path / "face.png")
    error = refused(monkeypatch, capsys, predict, "--models", tmp_path / "none", photo)
    assert f"no face parser at {tmp_path / 'none' / face_parser.FILE}" in error


def test_folders_and_globs(tmp_path):
    for name in ("b.png", "a.JPG", "sub/c.png", ".hidden.png", "notes.txt", "clip.mp4", "[d].png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def expanded(*arguments):
        return [p.relative_to(tmp_path).as_posix() for p in prediction.expand(arguments)]

    folder = str(tmp_path)
    assert expanded(folder) == ["[d].png", "a.JPG", "b.png"]
    assert expanded(f"{folder}/*.png") == ["[d].png", "b.png"]
    assert expanded(f"{folder}/**/*.png") == ["[d].png", "b.png", "sub/c.png"]
    assert expanded(f"{folder}/[d].png", f"{folder}/clip.mp4") == ["[d].png", "clip.mp4"]
    assert expanded(f"{folder}/b.png", folder, f"{folder}/sub/../b.png")[0] == "b.png"
    assert len(expanded(f"{folder}/b.png", folder, f"{folder}/sub/../b.png")) == 3


def test_a_glob_visits_each_folder_once(tmp_path):
    """Without that, links upward make a number of paths that has no end in practice."""
    (tmp_path / "loop" / "sub").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    for name in ("loop/a.jpg", "loop/sub/b.jpg", "other/c.jpg"):
        (tmp_path / name).touch()
    for link, target in (("up", ".."), ("again", "."), ("sub/up", ".."), ("sub/loop", "loop")):
        (tmp_path / "loop" / link).symlink_to(target)
    found = predict.expand([str(tmp_path / "loop" / "**" / "*.jpg")])
    assert sorted(path.name for path in found) == ["a.jpg", "b.jpg", "c.jpg"]
    found = predict.expand([str(tmp_path / "loop" / "**" / "sub" / "**")])
    assert {path.name for path in found} >= {"a.jpg", "b.jpg"}


def test_results_beside_the_photographs_are_no_photographs(run, tmp_path):
    write_face(tmp_path / "photos" / "a.png")
    for _ in range(2):
        assert run("photos", "--out", "photos") == 0
        assert run("photos/*.png", "--out", "photos") == 0
    assert files("photos") == ["a.json", "a.png", "a_labels.png", "a_overlay.png"]


def test_photographs_of_one_name_keep_their_own_results(run, tmp_path, capsys):
    write_face(tmp_path / "x" / "a.png", FOUND[0])
    write_face(tmp_path / "y" / "a.jpg", FOUND[1])

    def sources():
        stored = {path.stem: json.loads(path.read_text()) for path in Path("parsed").glob("*.json")}
        return {name: each["source"] for name, each in stored.items()}

    assert run("x/a.png") == 0
    assert run("y/a.jpg") == 0
    assert "a is taken, y/a.jpg is parsed into a-2" in capsys.readouterr().err
    expected = {"a": "../x/a.png", "a-2": "../y/a.jpg"}
    assert sources() == expected
    assert run("y/a.jpg", "x/a.png") == 0  # each finds its own
    assert sources() == expected
    assert not np.array_equal(labels_of("parsed/a_labels.png"), labels_of("parsed/a-2_labels.png"))


def test_no_file_of_another_kind_is_written_over(run, tmp_path):
    photo = write_face(tmp_path / "a.png")
    other = write_face(tmp_path / "a_overlay.png", FOUND[1])
    before = other.read_bytes()
    (tmp_path / "a-2.json").write_text('{"mine": 1}')
    assert run(photo, "--out", tmp_path) == 0
    assert other.read_bytes() == before
    assert (tmp_path / "a-2.json").read_text() == '{"mine": 1}'
    assert (tmp_path / "a-3_labels.png").exists()


path_parts = st.sampled_from(["a", "b", "A", "a-2", "c", "a.b"])
paths = st.builds(
    lambda folders, stem, suffix: Path(*folders, stem + suffix),
    st.lists(path_parts, max_size=2),
    path_parts,
    st.sampled_from([".png", ".jpg"]),
)


@given(st.lists(paths, max_size=8, unique=True), st.lists(paths, max_size=8, unique=True))
def test_names_are_distinct_stable_and_never_another_photographs(first, second):
    """Two runs into one folder, then the first again."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        stored = {}
        for sources in (first, second, first):
            names = writers.names_of(sources, folder)
            assert len({name.casefold() for name in names.values()}) == len(sources)
            for source, name in names.items():
                assert re.fullmatch(re.escape(source.stem) + r"(-\d+)?", name)
                assert stored.setdefault(name, source) == source
                writers.write_json(folder, name, source, (1, 1), FINE, {})
        assert names == writers.names_of(first, folder)
        if len({path.stem.casefold() for path in first + second}) == len({*first, *second}):
            assert all(name == source.stem for name, source in stored.items())


def test_results_keep_their_names_whatever_the_order(run, tmp_path):
    for name in ("x/a.png", "y/A.png", "y/a-2.png", "y/a.png"):
        write_face(tmp_path / name)
    assert run("x", "y") == 0
    before = files("parsed")
    assert run("y", "x", "--resume") == 0
    assert files("parsed") == before
    assert len(before) == 12


def test_long_names_are_cut(run, tmp_path):
    names = ["é" * 120, "é" * 120 + "n", "n" + "é" * 120]
    for name in names:
        write_face(tmp_path / f"{name}.png")
    assert run(tmp_path) == 0
    stored = [json.loads(path.read_bytes())["source"] for path in Path("parsed").glob("*.json")]
    assert sorted(stored) == sorted(f"../{name}.png" for name in names)
    assert len(files("parsed")) == 9
    assert all(name.isprintable() for name in files("parsed"))


def test_all_faces_are_parsed(run, tmp_path):
    scene = np.concatenate([drawn(index)[0] for index in FOUND], axis=1)
    Image.fromarray(scene).save("scene.png")
    assert run("scene.png") == 0
    assert len(json.loads(Path("parsed/scene.json").read_text())["faces"]) == 1
    assert run("scene.png", "--all-faces") == 0
    faces = json.loads(Path("parsed/scene.json").read_text())["faces"]
    assert len(faces) == 3
    widths = [face["box"][2] for face in faces]
    assert widths == sorted(widths, reverse=True)
    assert sorted(face["points"]["nose tip"][0] // 256 for face in faces) == [0, 1, 2]


def test_the_nearer_face_covers_the_other_but_its_background_does_not():
    def face(size, labels):
        face = object.__new__(ParsedFace)
        face.size, face.points = (1, 4), torch.rand(5, 2) * size
        face._found = [((0, 0, 4, 1), torch.tensor([labels], dtype=torch.uint8))]
        return face

    near = face(100, [0, 1, 2, 0])
    far = face(10, [3, 3, 0, 0])
    for order in ([near, far], [far, near]):
        assert writers.compose(order, (1, 4)).tolist() == [[3, 1, 2, 0]]
    assert writers.compose([], (1, 4)).tolist() == [[0, 0, 0, 0]]


def test_an_interrupted_run_is_one_line_and_resumed(run, tmp_path, monkeypatch, capsys):
    for name, index in zip("abc", FOUND, strict=True):
        write_face(tmp_path / f"{name}.png", index)
    original = writers._write_png

    def stopped(path, picture):
        if path.name == "b_labels.png":
            raise KeyboardInterrupt
        original(path, picture)

    with monkeypatch.context() as patch:
        patch.setattr(writers, "_write_png", stopped)
        assert run(tmp_path) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    done = ["a.json", "a_labels.png", "a_overlay.png", "b.json", "b_overlay.png"]
    assert files("parsed") == done

    parsed = []
    read = image_io.read
    monkeypatch.setattr(image_io, "read", lambda path: parsed.append(path.name) or read(path))
    assert run(tmp_path, "--resume") == 0
    assert parsed == ["b.png", "c.png"]
    assert "2 of 3 parsed into parsed, 1 done before" in capsys.readouterr().out
    assert len(files("parsed")) == 9

    later = os.stat("parsed/c_labels.png").st_mtime + 1
    os.utime("parsed/c.json", (later, later))  # edited, so it is to be parsed once more
    parsed.clear()
    assert run(tmp_path, "--resume") == 0
    assert parsed == ["c.png"]
    parsed.clear()
    assert run(tmp_path) == 0  # without it, its own results are written anew
    assert parsed == ["a.png", "b.png", "c.png"]


MEASURED = """
import runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    # Not ru_maxrss, in which a process starts with the memory of the one that starts it.
    print([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_twelve_megapixels_take_less_than_a_gigabyte(tmp_path, script_environment):
    """With all networks, untrained, as a bundle on disk."""
    states = {}
    for name in face_parser.networks_of(FINE):
        if name in face_crops.PARTS:
            model, classes, side = "part", len(face_crops.PARTS[name].names) + 1, 64
        else:
            model, classes, side = ("rnn-g", 3, 128) if name == "face" else ("points", 5, 64)
        weights = build_model(model, classes, side=side).state_dict()
        states[name] = {"settings": {"model": model}, "classes": [""] * classes, "side": side}
        states[name] |= {"average": weights, "layout": LAYOUT.as_dict()}
    face_parser.save(tmp_path, states)
    image, points = drawn(FOUND[0], 3000)
    Image.fromarray(np.pad(image, ((0, 0), (500, 500), (0, 0)))).save(tmp_path / "large.jpg")
    points = points + np.array([500, 0])
    (tmp_path / "p.json").write_text(json.dumps({"large.jpg": points.tolist()}))
    command = [sys.executable, "-c", MEASURED, str(EXAMPLE / "predict.py")]
    command += ["--models", ".", "large.jpg", "--points", "p.json"]
    result = children.run(command, cwd=tmp_path, env=script_environment)
    assert result.returncode == 0, result.stderr
    assert labels_of(tmp_path / "parsed" / "large_labels.png").shape == (3000, 4000)
    kilobytes = int(re.search(r"VmHWM:\s*(\d+) kB", result.stdout)[1])
    assert kilobytes < 1e6
