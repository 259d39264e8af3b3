"""What networks are shown of a face: parts lie in the picture, points and labels go along."""

import evaluate
import numpy as np
import pytest
import torch
import train
from example_scripts import call, refused
from tiers import sampled

from faceparse.data import FINE, DataError, open_dataset
from faceparse.data.transforms import draw
from faceparse.inference import face_crops
from faceparse.reporting import table3_metrics


@pytest.fixture(scope="module")
def faces():
    return open_dataset("synthetic", None, "train", limit=12, labels="fine", progress=False)


@pytest.fixture(scope="module")
def layout(faces):
    return face_crops.learn_layout(faces, progress=False)


@pytest.mark.parametrize("name", face_crops.parts_of(FINE))
def test_a_part_is_in_its_picture_and_keeps_its_classes(name, faces, layout):
    view = face_crops.make_view(name, faces, layout=layout)
    still = view.still(faces)
    assert len(still.images) == len(faces.images) * (2 if name == "eye" else 1)
    assert still.images.shape[2:] == face_crops.PARTS[name].size
    # Of each class, the share of the part's pixels is about that in the whole face.
    part = face_crops.PARTS[name]
    for label, one in enumerate(part.classes, start=1):
        k = FINE.names.index(one)
        sides = {k, FINE.mirror[k]} if name == "eye" else {k}
        whole = sum((faces.labels == side).sum().item() for side in sides)
        scale = part.size[1] / layout.boxes[name][2] * face_crops.FRAME / 128
        shown = (still.labels == label).sum().item() / scale**2
        assert shown == pytest.approx(whole, rel=0.35)


def test_box_of_a_part_has_a_fifth_of_its_sides_as_margin():
    # 10 x 20 pixels and a fifth at each side are 14 x 28: in a square, 28 x 28 about (5, 10).
    box = face_crops._grown(np.array([0.0, 0.0]), np.array([10.0, 20.0]), (64, 64))
    assert box == pytest.approx((-9, -4, 28, 28))


@pytest.mark.parametrize("name", ["face", "nose", "mouth", "eye", "box"])
def test_augmented_points_lie_on_their_labels(name, faces, layout):
    """Where an eye's centre or the nose's tip is said to be, the labels agree."""
    view = face_crops.make_view(name, faces, labels="fine", layout=layout)
    chosen = torch.arange(12)
    draws = draw(12, view.size, generator=torch.Generator().manual_seed(1), strength=view.strength)
    images, labels, points = view.batch(faces, chosen, draws)
    assert images.shape == (12, 3, *view.size)
    assert images.abs().max() < 0.5001
    assert points.shape == (12, 5, 2)
    if name in ("face", "nose", "eye"):
        index, wanted = {"face": (2, "nose"), "nose": (2, "nose"), "eye": (0, "eye")}[name]
        label = view.label_set.names.index(wanted)
        hits = 0
        for i in range(12):
            x, y = points[i, index].long().tolist()
            near = labels[i, max(0, y - 6) : y + 7, max(0, x - 6) : x + 7]
            hits += bool((near == label).any())
        assert hits >= 10


def test_layout_goes_through_a_checkpoint(layout):
    again = face_crops.Layout.of(layout.as_dict())
    np.testing.assert_array_equal(again.shape, layout.shape)
    assert again.boxes == layout.boxes


def test_points_not_seen_are_completed_by_the_mean_shape(layout):
    points = layout.shape * 0.5 + 7
    hidden = points.copy()
    hidden[[1, 4]] = np.nan
    np.testing.assert_allclose(face_crops.complete(hidden, layout.shape, 128), points)
    usual = face_crops.complete(np.full((5, 2), np.nan), layout.shape, 125)
    np.testing.assert_allclose(usual, layout.shape / 2)


def test_a_set_without_points_is_refused(faces):
    with pytest.raises(DataError, match="needs key points"):
        face_crops.make_view("eye", faces._replace(points=None))


@pytest.mark.parametrize("task", sampled([["--stage", 2, "--part", "mouth"], ["--points"]], 1))
def test_second_stage_trains_and_goes_on_to_the_same_bits(
    task, tmp_path, monkeypatch, capsys, one_thread
):
    options = ["--limit", 4, "--batch-size", 2]
    assert call(monkeypatch, train, *task, *options, "--epochs", 2, "--out", tmp_path / "a") == 0
    assert call(monkeypatch, train, *task, *options, "--epochs", 1, "--out", tmp_path / "b") == 0
    resumed = ["--resume", "--epochs", 2, "--out", tmp_path / "b"]
    assert call(monkeypatch, train, *task, *resumed) == 0
    states = [train.checkpoint.load(tmp_path / run / "last.pt") for run in "ab"]
    for name, value in states[0]["average"].items():
        assert torch.equal(value, states[1]["average"][name])
    capsys.readouterr()
    given = ["--checkpoint", tmp_path / "a" / "best.pt", "--limit", 3, "--json"]
    assert call(monkeypatch, evaluate, *given) == 0
    assert ("error" if task == ["--points"] else "accuracy") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--stage", 2], "--stage 2 and --part PART go together"),
        (["--part", "eye"], "--stage 2 and --part PART go together"),
        (["--points", "--model", "unet"], "--points means --model points, not unet"),
        (["--view", "box"], "--view box and --model points go together"),
        (["--all", "--view", "eye"], "--all has a --view for each network"),
        (["--all", "--resume"], "--all and --resume do not go together"),
        (["--all"], "--root DIR is needed"),
    ],
)
def test_tasks_that_cannot_be_are_one_line(given, words, tmp_path, monkeypatch, capsys):
    error = refused(monkeypatch, capsys, train, *given, "--out", tmp_path / "out")
    assert words in error
    assert not (tmp_path / "out").exists()


def test_evaluate_says_what_goes_together(tmp_path, monkeypatch, capsys):
    assert "--models DIR" in refused(monkeypatch, capsys, evaluate, "--table", 3)
    given = ["--table", 3, "--models", tmp_path]
    assert "no face parser at" in refused(monkeypatch, capsys, evaluate, *given)


def test_overall_adds_up_six_groups():
    matrix = torch.diag(torch.arange(1, 12))
    matrix[4, 1] = 10  # of a left eye, called skin
    result = table3_metrics.table_scores(matrix)["f"]
    hits = sum(3 + k for k in range(8))  # classes 2 to 9
    assert result["overall"] == pytest.approx(2 * hits / (2 * hits + 10))
    assert result["eyes"] == pytest.approx(2 * 11 / (2 * 11 + 10))
    assert result["mouth"] == 1
    assert list(result)[-1] == "overall"
