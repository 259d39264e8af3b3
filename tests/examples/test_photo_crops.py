"""Which part of a photograph is taken; picture, labels and points stay together."""

import io

import numpy as np
import pytest
from PIL import Image

from faceparse.data import FINE, photo_crops, points


def step(width, height, column, row):
    """Black, white right of ``column``, half grey below ``row``."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, column:] = 255
    pixels[row:, :column] = 128
    return pixels


def opened(pixels, kind, **options):
    """The picture as it comes from a file of a kind, its pixels not read yet."""
    file = io.BytesIO()
    options |= {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    Image.fromarray(pixels).save(file, kind, **options)
    return Image.open(io.BytesIO(file.getvalue()))


# A JPEG of these sizes is decoded at a quarter, at a half with an odd width, and in full.
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [(512, 512), (341, 333), (250, 250), (90, 70)])
def test_edges_in_picture_and_labels_coincide(size, kind):
    width, height = size
    column, row = int(0.6 * width), int(0.3 * height)
    pixels = step(width, height, column, row)
    labels = np.zeros((height, width), np.uint8)
    labels[:, column:] = 2
    labels[row:, :column] = 1
    place = photo_crops.whole(labels, FINE, 128)
    found = photo_crops.image_at(opened(pixels, kind), size, place, 128)
    label = photo_crops.labels_at(labels, place, 128)
    assert found.shape == (128, 128, 3)
    edge, level = column * 128 / width, row * 128 / height
    assert abs((label[0] == 0).sum() - edge) <= 0.5
    assert abs((label[:, 0] == 0).sum() - level) <= 0.5
    # The place of an edge by what lies on its dark side, to a fraction of a pixel.
    assert 128 - found[0, :, 0].sum() / 255 == pytest.approx(edge, abs=0.3)
    assert 128 - found[:, 0, 0].sum() / 128 == pytest.approx(level, abs=0.3)


def test_a_large_jpeg_is_decoded_small_but_never_below_the_wanted_size():
    sizes = {}
    for width in (512, 511, 256, 255, 1024, 2000):
        image = opened(np.zeros((width, width, 3), np.uint8), "JPEG")
        place = photo_crops.whole(np.zeros((width, width), np.uint8), FINE, 128)
        photo_crops.image_at(image, (width, width), place, 128)
        sizes[width] = image.width
    assert sizes == {512: 128, 511: 256, 256: 128, 255: 255, 1024: 128, 2000: 250}


def test_a_large_jpeg_is_turned_upright():
    """Stored as 400 x 800, decoded as 200 x 400, and 800 x 400 upright."""
    exif = Image.Exif()
    exif[0x112] = 6
    stored = np.ascontiguousarray(np.rot90(step(800, 400, 200, 100)))
    image = opened(stored, "JPEG", exif=exif)
    place = photo_crops.whole(np.zeros((400, 800), np.uint8), FINE, 200)
    found = photo_crops.image_at(image, (800, 400), place, 200)
    np.testing.assert_allclose(found, step(200, 200, 50, 50), atol=40)
    assert np.abs(found - step(200, 200, 50, 50).astype(int)).mean() < 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_face_at_the_corner_of_a_large_photograph(kind):
    """The square reaches outside; the JPEG is decoded at a half."""
    pixels = step(800, 600, 160, 240)
    labels = np.zeros((600, 800), np.uint8)
    labels[80:240, 0:160] = 1
    labels[40:80, 0:200] = FINE.names.index("hair")  # does not count
    place = photo_crops.face(labels, FINE, 128)
    assert tuple(place[:4]) == (-80, 0, 320, 320)
    found = photo_crops.image_at(opened(pixels, kind), (800, 600), place, 128)
    label = photo_crops.labels_at(labels, place, 128)
    # 320 pixels become 128: columns 0 to 32 lie outside, the edges at 96 and 96.
    assert (label[:, :32] == 0).all()
    assert (label[32:96, 32:96] == 1).all()
    assert (label[96:] == 0).all()
    assert (found[:90, :90] < 12).all()
    assert (np.abs(found[100:, :90].astype(int) - 128) < 12).all()
    assert (found[:, 100:] > 243).all()


def test_padded_keeps_proportions():
    for size, inner in (((900, 450), (512, 256)), ((100, 300), (171, 512)), ((3000, 1), (512, 1))):
        place = photo_crops.padded(np.zeros(size[::-1], np.uint8), FINE, 512)
        assert place.size == inner
        image = photo_crops.image_at(
            opened(np.full((*size[::-1], 3), 99, np.uint8), "PNG"), size, place, 512
        )
        assert (image[: inner[1], : inner[0]] == 99).all()
        assert image.sum() == 3 * 99 * inner[0] * inner[1]


def test_labels_without_a_face_are_refused():
    with pytest.raises(ValueError, match="no face label"):
        photo_crops.face(np.full((9, 9), FINE.names.index("hair"), np.uint8), FINE, 128)


LABEL = {name: i for i, name in enumerate(FINE.names)}


def drawn(quarter_turns=0):
    labels = np.zeros((60, 60), np.uint8)
    labels[10:14, 38:44] = LABEL["left eye"]
    labels[10:14, 16:22] = LABEL["right eye"]
    labels[16:36, 28:32] = LABEL["nose"]
    labels[42:44, 22:38] = LABEL["upper lip"]
    labels[44:46, 22:38] = LABEL["lower lip"]
    labels[43:45, 24:36] = LABEL["inner mouth"]
    return np.rot90(labels, quarter_turns)


POINTS = np.array([[41, 12], [19, 12], [30, 32], [37.5, 44], [22.5, 44]])


@pytest.mark.parametrize("turns", range(4))
def test_points_turn_with_the_head(turns):
    expected = POINTS
    for _ in range(turns):  # x, y to y, 60 - x: what rot90 does to positions
        expected = np.stack([expected[:, 1], 60 - expected[:, 0]], 1)
    np.testing.assert_allclose(points.from_labels(drawn(turns)), expected, atol=1e-4)


def test_points_of_absent_parts_are_nan():
    labels = drawn()
    labels[labels == LABEL["left eye"]] = 0
    found = points.from_labels(labels)
    assert np.isnan(found[0]).all()
    np.testing.assert_allclose(found[1:], POINTS[1:])
    assert np.isnan(points.from_labels(np.ones((5, 7), np.uint8))).all()


def test_points_where_left_and_right_are_mixed_up_keep_the_nose_tip():
    labels = drawn()
    left, right = labels == LABEL["left eye"], labels == LABEL["right eye"]
    labels[left], labels[right] = LABEL["right eye"], LABEL["left eye"]
    np.testing.assert_allclose(points.from_labels(labels)[2], POINTS[2])
