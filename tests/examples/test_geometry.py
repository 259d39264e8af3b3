"""Maps between planes, and what pictures they make."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from faceparse.data import geometry

number = st.floats(-40, 40)
similarities = st.builds(
    lambda angle, scale, x, y: np.array(
        [
            [scale * np.cos(angle), -scale * np.sin(angle), x],
            [scale * np.sin(angle), scale * np.cos(angle), y],
        ]
    ),
    st.floats(-3, 3),
    st.floats(0.3, 3),
    number,
    number,
)


@given(similarities, st.integers(0, 2**31))
def test_similarity_is_found_again_and_its_inverse_leads_back(m, seed):
    points = np.random.default_rng(seed).uniform(0, 100, (5, 2))
    moved = geometry.apply(m, points)
    np.testing.assert_allclose(geometry.similarity(points, moved), m, atol=1e-6)
    np.testing.assert_allclose(geometry.apply(geometry.inverse(m), moved), points, atol=1e-6)


def test_points_not_seen_are_left_out():
    points = np.array([[0.0, 0], [10, 0], [3, 7], [np.nan, np.nan], [5, 5]])
    m = geometry.about(np.array([[0.0, -2, 1], [2, 0, 1]]), (4, 4))
    moved = geometry.apply(m, points)
    np.testing.assert_allclose(geometry.similarity(points, moved), m)
    assert np.isnan(geometry.similarity(points[:1], points[:1])).all()


@given(similarities)
def test_align_and_back_gives_the_place_within_half_a_pixel(m):
    """A bright spot is where its map says, in the picture and, brought back, in the image."""
    middle = np.array([40.0, 40])
    m = geometry.compose(np.array([[1.0, 0, 48], [0, 1, 48]]), m[:, :3] * [1, 1, 0])
    m = geometry.compose(m, np.array([[1.0, 0, -40], [0, 1, -40]]))
    rows, columns = torch.meshgrid(torch.arange(80) + 0.5, torch.arange(80) + 0.5, indexing="ij")
    spot = torch.exp(-((rows - middle[1]) ** 2 + (columns - middle[0]) ** 2) / 50)[None]
    picture = geometry.view(spot, m, (96, 96))
    back = geometry.view(picture, geometry.inverse(m), (80, 80))
    for image, expected in ((picture, geometry.apply(m, middle[None])[0]), (back, middle)):
        height, width = image.shape[1:]
        weight = (image[0] - 0.1).clamp(min=0)
        x = (weight.sum(0) * (torch.arange(width) + 0.5)).sum() / weight.sum()
        y = (weight.sum(1) * (torch.arange(height) + 0.5)).sum() / weight.sum()
        assert abs(x - expected[0]) < 0.5
        assert abs(y - expected[1]) < 0.5


def test_view_of_all_is_the_image_and_labels_stay_labels():
    image = torch.randint(256, (3, 20, 30), dtype=torch.uint8)
    m = geometry.box_to_picture((0, 0, 30, 20), (20, 30))
    assert torch.equal(geometry.view(image, m, (20, 30)), image.float())
    assert torch.equal(geometry.view_labels(image[0], m, (20, 30)), image[0])


def test_shrinking_averages():
    image = torch.rand(3, 64, 64)
    m = geometry.box_to_picture((0, 0, 64, 64), (16, 16))
    expected = torch.nn.functional.avg_pool2d(image[None], 4)[0]
    torch.testing.assert_close(geometry.view(image, m, (16, 16)), expected, atol=1e-5, rtol=0)


def test_a_picture_wholly_outside_repeats_the_border():
    image = torch.arange(12.0).view(1, 3, 4)
    shown = geometry.view(image, geometry.box_to_picture((-50, -50, 4, 4), (4, 4)), (4, 4))
    assert (shown == 0).all()
