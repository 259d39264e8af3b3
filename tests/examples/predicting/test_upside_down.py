"""Faces upside down, and what the detector takes for a face: never returned as a good one."""

import numpy as np
import pytest
import torch
from drawn_faces import LAYOUT, SHAPE, Network, skin_over_hair, usual_points

from faceparse.inference import face_crops
from faceparse.inference.face_parser import FaceParser, NoFaceError
from faceparse.models import Points


def test_a_misfit_is_a_share_of_the_faces_size():
    """Wherever the face is, and of any size."""
    turned = np.add(SHAPE[:, ::-1] * (-3, 3), (7, -90))
    assert face_crops.misfit(turned, LAYOUT) == pytest.approx(0, abs=1e-9)
    exchanged = SHAPE[[1, 0, 2, 3, 4]]  # the eyes
    # The sum of squares about the middle is 5650, and the similarity has a = 3150 / 5650.
    expected = [0, (1 - (3150 / 5650) ** 2) ** 0.5]
    found = face_crops.misfit(np.stack([SHAPE, exchanged]), LAYOUT)
    np.testing.assert_allclose(found, expected, atol=1e-9)


def points_if_upright(images):
    """The usual points if the upper half is lighter; else both eyes are in the middle."""
    upper, lower = images.chunk(2, 2)
    points = usual_points(images).points.clone()
    points[upper.mean((1, 2, 3)) <= lower.mean((1, 2, 3)), :2] = 0.5
    return Points(points)


@pytest.fixture
def seeing():
    networks = {"face": Network(skin_over_hair), "points": Network(points_if_upright)}
    return FaceParser(networks, LAYOUT, detector=lambda image: np.array([[40.0, 40, 60, 60]]))


def test_a_face_upside_down_is_parsed_as_such(seeing):
    image = np.zeros((140, 140, 3), np.uint8)
    image[:70] = 200
    upright, turned = seeing([image, image[::-1, ::-1]])
    eyes, nose, mouth = upright.points[:2, 1], upright.points[2, 1], upright.points[3:, 1]
    assert eyes.max() < nose < mouth.min()
    torch.testing.assert_close(turned.points, 140 - upright.points, atol=1e-3, rtol=0)
    assert (turned.labels != upright.labels.flip(0, 1)).float().mean() < 0.01


def test_what_has_no_points_of_a_face_is_none(seeing):
    flat = np.zeros((140, 140, 3), np.uint8)
    with pytest.raises(NoFaceError):
        seeing(flat)
    assert seeing([flat]) == [None]
    assert seeing.all_faces(flat) == []
    assert seeing(flat, points=SHAPE / 2) is not None  # a person has given them


def test_where_the_largest_box_is_no_face_the_next_one_is_taken(seeing, monkeypatch):
    image = np.zeros((140, 140, 3), np.uint8)
    image[40:70] = 200
    boxes = np.array([[10.0, 85, 50, 50], [40, 40, 60, 60]])
    expected = seeing(image).points
    monkeypatch.setattr(seeing, "_detector", lambda image: boxes)
    torch.testing.assert_close(seeing(image).points, expected)
    (face,) = seeing.all_faces(image)
    torch.testing.assert_close(face.points, expected)


def test_points_far_smaller_than_the_box_are_no_face(seeing):
    image = np.zeros((140, 140, 3), np.uint8)
    image[:70] = 200
    points = seeing(image).points.numpy()
    box = seeing(image).box.numpy()
    assert seeing._is_face(points, box)
    assert not seeing._is_face(points.mean(0) + (points - points.mean(0)) * 0.7, box)
    assert seeing._is_face(points.mean(0) + (points - points.mean(0)) * 0.7, None)
