"""The chain from a photograph to eleven classes, with networks that are not trained."""

import numpy as np
import predict
import pytest
import torch
import torch.nn.functional as F
from example_scripts import call
from PIL import Image

from faceparse.data import FINE, DataError, open_dataset
from faceparse.inference import face_crops, face_parser
from faceparse.inference.face_parser import FaceParser, NoFaceError
from faceparse.models import build_model
from faceparse.reporting import table3_metrics, writers
from faceparse.reporting.metrics import confusion_matrix
from faceparse.training import checkpoint


@pytest.fixture(scope="module")
def faces():
    return open_dataset("synthetic", None, "train", limit=6, labels="fine", progress=False)


@pytest.fixture(scope="module")
def parser(faces):
    torch.manual_seed(0)
    networks = {"points": build_model("points", 5, side=64), "face": build_model("rnn-g", 3)}
    for name in face_crops.parts_of(FINE):
        networks[name] = build_model("part", len(face_crops.PARTS[name].names) + 1, side=64)
    return FaceParser.of(networks, face_crops.learn_layout(faces, progress=False))


def test_labels_are_the_largest_scores(parser, faces):
    parsed_face = parser(faces.images[0], points=faces.points[0])
    assert parsed_face.labels.shape == (128, 128)
    assert parsed_face.scores.shape == (11, 128, 128)
    torch.testing.assert_close(parsed_face.scores.sum(0), torch.ones(128, 128))
    chosen = parsed_face.scores.gather(0, parsed_face.labels.long()[None])[0]
    assert (parsed_face.scores.amax(0) - chosen).max() < 1e-5
    both = parsed_face.score("upper lip", "lower lip")
    torch.testing.assert_close(both, parsed_face.scores[[7, 9]].sum(0))


def test_a_batch_is_its_photographs_one_by_one(parser, faces):
    images, points = list(faces.images[:3]), list(faces.points[:3].numpy())
    for one, of_batch in zip(
        (parser(images[i], points=points[i]) for i in range(3)),
        parser(images, points=points),
        strict=True,
    ):
        assert (one.labels != of_batch.labels).float().mean() < 1e-3


def test_many_faces_are_parsed_in_batches_of_bounded_size(parser, faces, monkeypatch):
    image, boxes = faces.images[0], np.array([[16.0, 16, 96, 96]] * 5)
    whole = parser.parse([image] * 5, parser.find_points([image] * 5, boxes), boxes)
    sizes = []
    for network in parser.networks.values():
        monkeypatch.setattr(network, "_forward_pre_hooks", network._forward_pre_hooks.copy())
        network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    monkeypatch.setattr(face_parser, "BATCH", 2)
    points = parser.find_points([image] * 5, boxes)
    found = parser.parse([image] * 5, points, boxes)
    assert max(sizes) == 2
    assert len(found) == 5
    for one, other in zip(found, whole, strict=True):
        assert (one.labels != other.labels).float().mean() < 1e-3
    assert parser.find_points([], []).shape == (0, 5, 2)
    assert parser.parse([], [], []) == []


def test_a_small_face_of_a_large_photograph_takes_little_memory(parser, faces):
    image = torch.zeros(3, 1500, 1500, dtype=torch.uint8)
    image[:, :128, :128] = faces.images[0]
    parsed_face = parser(image, points=faces.points[0])
    assert parsed_face.labels.shape == (1500, 1500)
    assert sum(found.numel() for _, found in parsed_face._found) < 0.1 * parsed_face.labels.numel()


def test_results_of_many_faces_need_no_map_of_the_photograph_for_each(parser, faces, monkeypatch):
    image = torch.zeros(3, 300, 400, dtype=torch.uint8)
    image[:, :128, :128] = faces.images[0]
    parsed_face = parser(image, points=faces.points[0])
    labels = parsed_face.labels
    monkeypatch.setattr(face_parser.ParsedFace, "labels", None)
    assert torch.equal(writers.compose([parsed_face], (300, 400)), labels)
    counts = torch.bincount(labels.flatten(), minlength=11)
    found = writers.describe(parsed_face)
    assert list(found["pixels"].values()) == counts.tolist()
    assert list(found["share"].values()) == [round(n / 120_000, 6) for n in counts.tolist()]


def test_kinds_of_images_give_the_same(parser, faces):
    array = faces.images[0].permute(1, 2, 0).numpy()
    kinds = (faces.images[0], array, Image.fromarray(array))
    first, *others = (parser(kind, points=faces.points[0]).labels for kind in kinds)
    assert all(torch.equal(first, other) for other in others)


def test_no_face_is_an_error_or_none(parser):
    empty = np.zeros((60, 80), np.uint8)
    with pytest.raises(NoFaceError):
        parser(empty)
    assert parser([empty]) == [None]
    assert parser.all_faces(empty) == []
    with pytest.raises(ValueError, match="points must not all be in one place"):
        parser(empty, points=np.ones((5, 2)))
    with pytest.raises(ValueError, match="box must be x, y and a width and height of a pixel"):
        parser(empty, box=(0, 0, -1, 5))


@pytest.mark.parametrize("points", [np.full((5, 2), 1e300), {"left": 1}, "abc", [[1], [2, 3]]])
def test_points_that_no_photograph_has_are_refused(points, parser):
    with pytest.raises(ValueError, match=r"points must be \(5, 2\) numbers, pixels of the image"):
        parser(np.zeros((60, 80), np.uint8), points=points)


def test_a_class_named_twice_counts_once(parser, faces):
    parsed_face = parser(faces.images[0], points=faces.points[0])
    assert torch.equal(parsed_face.score("hair", "hair"), parsed_face.score("hair"))


@pytest.mark.parametrize("side", [128, 500, 750])
@pytest.mark.parametrize("quarters", [0, 1, 2])
def test_pictures_of_several_sizes_are_those_of_each_alone(side, quarters, parser, faces):
    image, points = faces.images[0], faces.points[0].double().numpy()
    for _ in range(quarters):
        image, points = image.rot90(1, (1, 2)), np.stack([points[:, 1], 128 - points[:, 0]], 1)
    image = F.interpolate(image[None].float(), (side, side), mode="bilinear")[0].to(torch.uint8)
    face = face_parser.Aligned(image, points * (side / 128), parser.layout)
    names = ("eye", "mouth")
    maps = [face_crops.part_in_frame(face.points, parser.layout, name) for name in names]
    sizes = [face_crops.PARTS[name].size for name in names]
    together = face.pictures(maps, sizes)
    assert together.shape == (2, 3, 64, 64)
    for seen, m, (height, width) in zip(together, maps, sizes, strict=True):
        (alone,) = face.pictures([m], [(height, width)])
        torch.testing.assert_close(seen[:, :height, :width], alone, atol=0.05, rtol=0)


def test_a_part_of_another_class_count_is_refused(parser):
    networks = {**parser.networks, "mouth": build_model("part", 3, side=64)}
    with pytest.raises(ValueError, match="network 'mouth' must have 4 classes, got 3"):
        FaceParser.of(networks, parser.layout)


@pytest.mark.parametrize("networks", [{}, [], {"points": 3}])
def test_a_damaged_parser_is_named(networks, tmp_path):
    stored = {"layout": {}, "networks": networks}
    checkpoint.write(tmp_path / face_parser.FILE, face_parser.KIND, stored)
    with pytest.raises(checkpoint.CheckpointError, match="holds no face parser"):
        FaceParser.load(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda stored: stored["networks"].update(face=("rnn-g", 4, 128, None)),
        lambda stored: stored["networks"].update(eye=stored["networks"]["nose"]),
        lambda stored: stored["networks"].update(ear=stored["networks"]["nose"]),
        lambda stored: stored["layout"].update(nose=(1.0, 2.0, 3.0)),
        lambda stored: stored["layout"].update(nose=(1.0, 2.0, 0.0, 3.0)),
        lambda stored: stored["layout"].update(nose=(0.0, 0.0, 1e300, 1e300)),
        lambda stored: stored["layout"].update(shape=[[0.0, 0.0]] * 5),
        lambda stored: stored["layout"].update(shape=[[1e300, 0.0], [0.0, 1.0]] * 5),
        lambda stored: stored["layout"].update(shape=[[1e300, 0.0], *[[0.0, 1.0]] * 4]),
        lambda stored: stored["networks"].update(face=stored["networks"]["points"]),
        lambda stored: stored["networks"]["face"].__setitem__(2, 512),
    ],
)
def test_a_parser_whose_parts_do_not_fit_is_named(damage, parser, tmp_path):
    names = {"points": ("points", 5, 64), "face": ("rnn-g", 3, 128)}
    counts = {"eye": 3, "nose": 2, "mouth": 4}
    names |= {name: ("part", count, 64) for name, count in counts.items()}
    networks = {
        name: [model, classes, side, build_model(model, classes, side=side).state_dict()]
        for name, (model, classes, side) in names.items()
    }
    stored = {"layout": parser.layout.as_dict(), "networks": networks}
    checkpoint.write(tmp_path / face_parser.FILE, face_parser.KIND, stored)
    FaceParser.load(tmp_path)
    damage(stored)
    checkpoint.write(tmp_path / face_parser.FILE, face_parser.KIND, stored)
    with pytest.raises(checkpoint.CheckpointError, match="holds no face parser"):
        FaceParser.load(tmp_path)


def test_faces_without_points_are_refused(parser, faces):
    for measured in (table3_metrics.locate, table3_metrics.true_points):
        with pytest.raises(DataError, match="need key points"):
            measured(parser, faces._replace(points=None))


def test_missing_parser_is_named(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match="no face parser at"):
        FaceParser.load(tmp_path)


def test_layout_of_the_training_faces(parser):
    shape = parser.layout.shape
    np.testing.assert_allclose(
        face_crops.mirrored_points(shape, face_crops.FRAME), shape, atol=1e-6
    )
    for name, (_, _, width, height) in parser.layout.boxes.items():
        h, w = face_crops.PARTS[name].size
        assert width / height == pytest.approx(w / h)


def test_perfect_labels_have_the_best_scores_and_sides_do_not_matter(faces):
    truth = faces.labels[0]
    swapped = torch.tensor(FINE.mirror)[truth.long()]
    result = table3_metrics.table_scores(confusion_matrix(swapped, truth, 11))
    assert {v for v in result["f"].values() if v is not None} == {1.0}


@pytest.mark.slow
def test_all_networks_are_trained_bundled_and_predict(faces, tmp_path, monkeypatch, one_thread):
    import train

    out = tmp_path / "models"
    options = ["--all", "--dataset", "synthetic", "--limit", 3, "--epochs", 1, "--jobs", 2]
    assert call(monkeypatch, train, *options, "--out", out) == 0
    assert (out / face_parser.FILE).stat().st_size < 2_000_000
    photo = tmp_path / "face.png"
    Image.fromarray(faces.images[0].permute(1, 2, 0).numpy()).save(photo)
    points = tmp_path / "points.json"
    points.write_text(f'{{"face.png": {faces.points[0].tolist()}}}')
    given = ["--models", out, photo, "--points", points, "--out", tmp_path / "parsed"]
    assert call(monkeypatch, predict, *given) == 0
    written = sorted(path.name for path in (tmp_path / "parsed").iterdir())
    assert written == ["face.json", "face_labels.png", "face_overlay.png"]
    assert Image.open(tmp_path / "parsed" / "face_labels.png").size == (128, 128)
