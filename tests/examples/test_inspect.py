"""``datasets inspect``: what it prints, what it draws, what it calls a problem."""

import sys

import children
import data as command
import numpy as np
import pytest
import trees
from example_scripts import EXAMPLE, call, refused
from PIL import Image


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to run in, with a cache next to it."""
    monkeypatch.setenv("GATEDRNN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def tree(tmp_path):
    return trees.write_tree("helen", tmp_path / "helen")


def test_a_good_set_is_described(tree, here, monkeypatch, capsys):
    before = sorted(tree.rglob("*"))
    arguments = ["inspect", "--dataset", "helen", "--root", tree]
    assert call(monkeypatch, command, *arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [
        "helen, train",
        "helen, validation",
        "helen, test",
    ]
    text = "\n".join(lines)
    assert "faces: 3 (published 2000), 3 opened" in text
    assert "faces: 2 (published 100), 2 opened" in text
    assert "smallest 80 x 80, median 80 x 80, largest 80 x 80" in text
    assert "left eye on the viewer's right: 3 of 3 faces" in text
    assert "problem" not in text
    assert sorted(p.name for p in here.iterdir()) == [
        "helen-test.png",
        "helen-train.png",
        "helen-validation.png",
    ]
    assert sorted(tree.rglob("*")) == before
    assert list((here.parent / "cache").rglob("*.npy"))


def test_class_shares_are_those_of_the_labels(tmp_path, here, monkeypatch, capsys):
    """Of multi-face's padded square: 2 in 16 hair, 6 in 16 skin in the upper half of 512 x 512."""
    tree = trees.write_tree("multi-face", tmp_path / "multi-face")
    labels = np.zeros((80, 160), np.uint8)
    labels[:20, :80], labels[20:40, :80] = 2, 1
    for k in trees.SPLITS["train"]:
        Image.fromarray(labels).save(trees.label("multi-face", tree, k))
        Image.new("RGB", (160, 80)).save(trees.image("multi-face", tree, k))
    arguments = ["inspect", "--dataset", "multi-face", "--root", tree, "--split", "train"]
    assert call(monkeypatch, command, *arguments, "--no-cache") == 0
    out = capsys.readouterr().out
    assert "background 87.50 %, skin 6.25 %, hair 6.25 %" in out
    assert "no published number" in out
    assert not (here.parent / "cache").exists()


def test_all_problems_are_listed_and_it_goes_on(tree, here, monkeypatch, capsys):
    trees.image("helen", tree, 0).write_bytes(b"damaged")
    trees.label("helen", tree, 2, 4).unlink()
    lists = tree / "exemplars.txt"
    lists.write_text(lists.read_text() + "4 , 10001_1\n5 , 10004_1\n")
    arguments = ["inspect", "--dataset", "helen", "--root", tree]
    error = refused(monkeypatch, capsys, command, *arguments, "--no-cache")
    assert error == "error: helen: 4 problems, listed above"
    assert call(monkeypatch, command, *arguments, "--skip-bad") == 0
    out = capsys.readouterr().out
    problems = [line for line in out.splitlines() if "problem: " in line]
    assert len(problems) == 4
    text = "\n".join(problems)
    assert f"cannot decode {trees.image('helen', tree, 0)}" in text
    assert f"missing file, {trees.label('helen', tree, 2, 4)}" in text
    assert f"names {trees.image('helen', tree, 1)} twice (train)" in text
    assert f"{trees.image('helen', tree, 4)} is in two splits, train and test" in text
    assert "faces: 5 (published 2000), 3 opened" in out
    assert "helen, test" in out


def test_contact_sheet_shows_photograph_and_labels(tree, here, monkeypatch, tmp_path):
    out = tmp_path / "sheet.png"
    arguments = ["inspect", "--dataset", "helen", "--root", tree, "--split", "test", "--out", out]
    assert call(monkeypatch, command, *arguments) == 0
    sheet = np.asarray(Image.open(out)).astype(int)
    assert sheet.shape == (160, 1280, 3)
    photo, labelled = sheet[:, :160], sheet[:, 160:320]
    assert (np.abs(photo - trees.shade(4)) < 4).all()
    assert len(np.unique(labelled.reshape(-1, 3), axis=0)) > 10
    second = sheet[:, 320:480]
    assert (np.abs(second - trees.shade(5)) < 4).all()


def test_no_other_picture_is_written_over(tree, here, monkeypatch, capsys):
    """A sheet of an earlier run is."""
    arguments = ["inspect", "--dataset", "helen", "--root", tree, "--split", "test"]
    for _ in range(2):
        assert call(monkeypatch, command, *arguments) == 0
    path = here / "helen-test.png"
    Image.new("RGB", (5, 4)).save(path)
    before = path.read_bytes()
    error = refused(monkeypatch, capsys, command, *arguments)
    assert "helen-test.png exists, and this program did not write it: give --out" in error
    assert path.read_bytes() == before
    assert call(monkeypatch, command, *arguments, "--out", path) == 0  # named, so meant
    assert path.read_bytes() != before


def test_limit_and_labels_are_obeyed(tree, here, monkeypatch, capsys):
    arguments = ["inspect", "--dataset", "helen", "--root", tree, "--split", "train"]
    assert call(monkeypatch, command, *arguments, "--limit", 2, "--labels", "coarse") == 0
    out = capsys.readouterr().out
    assert "faces: 3 (published 2000), 2 opened" in out
    assert "hair" in out
    assert "nose" not in out


@pytest.mark.parametrize("place", ["sheet.png", "images/sheet.png"])
def test_nothing_is_written_below_the_root(place, tree, here, monkeypatch, capsys):
    before = sorted(tree.rglob("*"))
    arguments = ["inspect", "--dataset", "helen", "--root", tree, "--split", "test"]
    error = refused(monkeypatch, capsys, command, *arguments, "--out", tree / place)
    assert "will not write" in error
    monkeypatch.chdir(tree)
    assert "will not write" in refused(monkeypatch, capsys, command, *arguments)
    assert sorted(tree.rglob("*")) == before


def test_bad_arguments_are_one_line(tree, here, monkeypatch, capsys):
    for arguments, words in (
        (["inspect"], "--dataset"),
        (["inspect", "--dataset", "nowhere"], "nowhere"),
        (["inspect", "--dataset", "helen"], "needs --root"),
        (["inspect", "--dataset", "helen", "--root", tree, "--limit", "0"], "--limit"),
        (["inspect", "--dataset", "lapa", "--root", tree], "looks like helen"),
        (["inspect", "--dataset", "helen", "--root", tree, "--out", "no/where.png"], "no folder"),
        ([], "inspect"),
    ):
        assert words in refused(monkeypatch, capsys, command, *arguments)


def test_a_root_that_is_a_loop_of_links_is_one_line(here, monkeypatch, capsys):
    (here / "loop").symlink_to("loop")
    arguments = ["inspect", "--dataset", "helen", "--root", here / "loop"]
    assert str(here / "loop") in refused(monkeypatch, capsys, command, *arguments)


def test_the_folder_runs_as_a_program(here, script_environment):
    arguments = ["inspect", "--dataset", "synthetic", "--split", "test", "--limit", "3"]
    done = children.run(
        [sys.executable, EXAMPLE / "data.py", *arguments],
        env=script_environment,
    )
    assert done.returncode == 0, done.stderr
    assert "faces: 3 (drawn by default 200)" in done.stdout
    assert (here / "synthetic-test.png").is_file()


def test_pictures_go_into_a_folder_only(here, monkeypatch, capsys):
    (here / "file").touch()
    for place in ("file", "file/below"):
        error = refused(monkeypatch, capsys, command, "draw", "--out", place, "--count", 1)
        assert error == f"error: --out must be a folder, {place} is not"


def test_faces_are_drawn_as_pictures(here, monkeypatch, capsys):
    assert call(monkeypatch, command, "draw", "--out", "drawn", "--count", 2) == 0
    assert sorted(path.name for path in (here / "drawn").iterdir()) == [
        "drawn-000.png",
        "drawn-001.png",
    ]
    assert Image.open(here / "drawn" / "drawn-001.png").size == (384, 384)
