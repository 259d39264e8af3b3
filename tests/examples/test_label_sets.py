"""One table describes the parts of a face: ears as two more classes, and sets of the user's own."""

import json

import numpy as np
import pytest
import torch
import train
import trees
from example_scripts import QUICK, call, refused
from PIL import Image

from faceparse.data import EARS, FINE, DataError, celebamask_mini, open_dataset, open_mixed
from faceparse.data.labels import CELEBAMASK_HQ, COARSE, label_set
from faceparse.inference import face_crops, face_parser
from faceparse.inference.face_parser import FaceParser
from faceparse.inference.recolouring import RECOLOURED
from faceparse.models import build_model
from faceparse.reporting import table3_metrics, writers
from faceparse.training import checkpoint

# Rows and columns in the trees' faces of 80 x 80; the left ear is on the viewer's right.
EAR_BOXES = {"left ear": ((32, 40), (50, 56)), "right ear": ((32, 40), (4, 10))}
FIVE = ("background", "skin", "hair", "scarf", "microphone")


def paint(path, boxes):
    """Give boxes (value, rows, columns) of a palette file new values."""
    picture = Image.open(path)
    labels = np.array(picture)
    for value, (top, bottom), (left, right) in boxes:
        labels[top:bottom, left:right] = value
    changed = Image.fromarray(labels)
    changed.putpalette(picture.getpalette())
    changed.save(path)


@pytest.fixture
def eared(tmp_path):
    tree = trees.write_tree("celebamask-mini", tmp_path / "eared")
    for k in range(6):
        # 8 and 9 are the ears in CelebAMask-HQ's own order.
        boxes = [(value, *box) for value, box in zip((8, 9), EAR_BOXES.values(), strict=True)]
        paint(trees.label("celebamask-mini", tree, k), boxes)
    return tree


@pytest.fixture
def five(tmp_path, monkeypatch):
    """Faces with five classes, two of which no other set has: values 0 to 4."""
    monkeypatch.setattr(celebamask_mini, "TABLE", label_set(*FIVE))
    tree = trees.write_tree("celebamask-mini", tmp_path / "five")
    for k in range(6):
        path = trees.label("celebamask-mini", tree, k)
        everywhere = ((0, trees.HEIGHT), (0, trees.WIDTH))
        paint(path, [(0, *everywhere), *((i, (16 * i, 16 * i + 16), (0, 80)) for i in range(5))])
    return tree


def test_ears_are_two_more_classes_everywhere():
    assert EARS.names == (*FINE.names, "left ear", "right ear")
    assert EARS.mirror == (0, 1, 3, 2, 5, 4, 6, 7, 8, 9, 10, 12, 11)
    assert EARS.colours[11:] == ((60, 140, 60), (30, 100, 30))
    assert EARS.coarse == (0, *[1] * 9, 2, 1, 1)
    assert EARS.fine == (*range(11), 0, 0)
    assert FINE.into(EARS) is None
    # As painted: skin, nose, glasses, eyes, brows, ears, mouth and lips, hair, and five others.
    places = (0, 1, 6, 1, 4, 5, 2, 3, 11, 12, 8, 7, 9, 10, 0, 0, 0, 0, 0)
    assert CELEBAMASK_HQ.into(EARS) == places
    assert face_crops.parts_of(FINE) == ("eye", "nose", "mouth")
    assert face_crops.parts_of(EARS) == ("eye", "nose", "mouth", "ear")
    assert table3_metrics.groups_of(EARS.names)["ears"] == ["left ear", "right ear"]
    assert RECOLOURED["skin"] == ("skin", "nose", "left ear", "right ear")


def test_ears_of_a_set_on_disk_are_read(eared):
    faces = open_dataset("celebamask-mini", eared, "test", labels="ears", side=80)
    assert faces.label_set is EARS
    expected = trees.fine()
    for label, ((top, bottom), (left, right)) in zip((11, 12), EAR_BOXES.values(), strict=True):
        expected[top:bottom, left:right] = label
    np.testing.assert_array_equal(faces.labels[0], expected)
    fine = open_dataset("celebamask-mini", eared, "test", labels="fine", side=80)
    np.testing.assert_array_equal(fine.labels[0], np.where(expected > 10, 0, expected))
    own = open_dataset("celebamask-mini", eared, "test", labels="own", side=80)
    assert own.label_set is CELEBAMASK_HQ
    assert own.labels[0][36, 52] == 8


def test_a_set_without_ears_is_refused(tmp_path):
    tree = trees.write_tree("helen", tmp_path)
    with pytest.raises(DataError, match=r"^helen has 11 classes .* do not give the labels 'ears'"):
        open_dataset("helen", tree, "train", labels="ears")


def constant(model, label):
    """A network of a part that says the same everywhere: one class, or the background."""
    network = build_model("part", model, side=64)
    torch.nn.init.zeros_(network.deconv7.weight)
    with torch.no_grad():
        network.deconv7.bias.copy_(torch.arange(model) == label).mul_(9)
    return network


def test_ears_are_found_by_a_network_of_their_own(eared):
    faces = open_dataset("celebamask-mini", eared, "train", **face_crops.how_to_open("ear", "fine"))
    layout = face_crops.learn_layout(faces, progress=False)
    view = face_crops.make_view("ear", faces, layout=layout)
    still = view.still(faces)
    assert still.label_set.names == ("background", "ear")
    assert len(still.images) == 2 * len(faces.images)  # the right ear as the left of a mirror image
    share = (still.labels == 1).float().mean((1, 2))
    torch.testing.assert_close(share[0], share[len(faces.images)], atol=0.03, rtol=0)
    # The box has the ear's proportions, 6 x 8, in a square with a fifth of its height around it.
    assert share[0] == pytest.approx(6 * 8 / (1.4 * 8) ** 2, abs=0.05)

    torch.manual_seed(0)
    networks = {"points": build_model("points", 5, side=64), "face": build_model("rnn-g", 3)}
    counts = {"eye": 3, "nose": 2, "mouth": 4, "ear": 2}
    networks |= {name: constant(n, int(name == "ear")) for name, n in counts.items()}
    parser = FaceParser.of(networks, layout, labels="ears")
    parsed_face = parser(faces.images[0], points=faces.points[0])
    for label, name in ((11, "left ear"), (12, "right ear")):
        rows, columns = (faces.labels[0] == label).nonzero().float().unbind(1)
        seen_rows, seen_columns = (parsed_face.labels == label).nonzero().float().unbind(1)
        # Its picture lies about the ear.
        assert seen_columns.mean() == pytest.approx(columns.mean(), abs=3)
        assert seen_rows.mean() == pytest.approx(rows.mean(), abs=3)
        assert parsed_face.score(name).max() > 0.9
    picture = writers.label_picture(parsed_face.labels, parsed_face.label_set)
    assert tuple(picture.getpalette()[33:36]) == (60, 140, 60)
    assert list(writers.describe(parsed_face)["pixels"]) == list(EARS.names)


def test_a_bundle_keeps_its_classes(eared, tmp_path):
    faces = open_dataset("celebamask-mini", eared, "train", **face_crops.how_to_open("ear", "fine"))
    layout = face_crops.learn_layout(faces, progress=False).as_dict()
    without = {key: value for key, value in layout.items() if key != "ear"}
    states = {}
    counts = {"points": 5, "face": 3, "eye": 3, "nose": 2, "mouth": 4, "ear": 2}
    for name, count in counts.items():
        model = {"points": "points", "face": "rnn-g"}.get(name, "part")
        side = 128 if name == "face" else 64
        states[name] = {
            "settings": {"model": model},
            "classes": [""] * count,
            "side": side,
            "layout": layout if name == "ear" else without,
            "average": build_model(model, count, side=side).state_dict(),
        }
    face_parser.save(tmp_path, states, labels="ears")
    parser = FaceParser.load(tmp_path)
    assert parser.names == EARS.names
    assert parser.layout.boxes["ear"] == tuple(layout["ear"])
    # Without the box, the network for ears has nothing to look at.
    states["ear"]["layout"] = without
    face_parser.save(tmp_path, states, labels="ears")
    with pytest.raises(checkpoint.CheckpointError, match="holds no face parser"):
        FaceParser.load(tmp_path)


@pytest.mark.slow
def test_a_network_for_ears_is_trained(eared, tmp_path, monkeypatch):
    out = tmp_path / "out"
    options = ["--stage", 2, "--part", "ear", "--dataset", "celebamask-mini", "--root", eared]
    options += ["--epochs", 1, "--batch-size", 3, "--no-cache", "--out", out]
    assert call(monkeypatch, train, *options) == 0
    state = checkpoint.load(out / "best.pt")
    assert state["classes"] == ["background", "ear"]


@pytest.mark.slow
def test_both_stages_are_trained_with_ears(eared, tmp_path, monkeypatch):
    out = tmp_path / "models"
    options = ["--all", "--dataset", "celebamask-mini", "--root", eared, "--labels", "ears"]
    options += ["--epochs", 1, "--jobs", 2, "--no-cache", "--out", out]
    assert call(monkeypatch, train, *options) == 0
    assert FaceParser.load(out).names == EARS.names
    assert "ears" in json.loads((out / "metrics.json").read_text())["f"]


def test_a_set_with_five_classes_is_trained_on_five(five, tmp_path, monkeypatch, capsys):
    faces = open_dataset("celebamask-mini", five, "test", labels="own", side=80)
    assert faces.labels[0][:, 0].tolist() == np.repeat(range(5), 16).tolist()
    assert faces.label_set.mirror == (0, 1, 2, 3, 4)
    assert len(set(faces.label_set.colours)) == 5
    out = tmp_path / "out"
    options = [*QUICK, "--dataset", "celebamask-mini", "--root", five, "--epochs", 1]
    assert call(monkeypatch, train, *options, "--labels", "own", "--out", out) == 0
    assert f"5 classes: {', '.join(FIVE)}" in capsys.readouterr().out
    state = checkpoint.load(out / "best.pt")
    assert state["classes"] == list(FIVE)
    assert state["average"]["head.weight"].shape[0] == 5
    assert tuple(json.loads((out / "metrics.json").read_text())["f"]) == FIVE


def test_five_classes_are_not_trained_on_as_three(five, tmp_path, monkeypatch, capsys):
    options = [*QUICK, "--dataset", "celebamask-mini", "--root", five, "--out", tmp_path / "out"]
    error = refused(monkeypatch, capsys, train, *options)
    assert error.startswith("error: celebamask-mini has 5 classes (background, skin, hair, scarf, ")
    assert "do not give the labels 'coarse'; --labels own" in error


def test_sets_of_different_classes_are_not_mixed(five, tmp_path):
    helen = trees.write_tree("helen", tmp_path / "helen")
    with pytest.raises(ValueError, match=r"celebamask-mini \(5\), helen \(11\)"):
        open_mixed([("celebamask-mini", five), ("helen", helen)], "train", labels="own")


@pytest.mark.parametrize("names", [("skin", "hair"), ("background", "skin", "skin"), ()])
def test_a_set_begins_with_the_background_and_has_each_name_once(names):
    with pytest.raises(ValueError, match="must differ and begin with 'background'"):
        label_set(*names)


def test_a_class_beyond_the_table_has_a_colour_and_no_other_place():
    own = label_set("background", "skin", "hair", "left horn", "right horn")
    assert own.mirror == (0, 1, 2, 4, 3)
    assert own.into(COARSE) is None
    assert own.into(own) == (0, 1, 2, 3, 4)
