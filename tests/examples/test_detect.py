"""Detection on drawn and real faces, and the cutting and pasting of a scene with known parsers."""

import cv2
import numpy as np
import pytest
import torch
from example_scripts import ROOT
from PIL import Image, ImageDraw, ImageFilter

from faceparse.data import DataError
from faceparse.inference import detect
from faceparse.models import build_model
from faceparse.models.outputs import Outputs

FACES = ROOT.parent / "shared" / "data" / "celebamask-mini" / "images"
GROUND, SKIN, HAIR = (90, 110, 100), (215, 170, 145), (60, 40, 30)
WHOLE = detect.Framing(1, 0)  # the box itself


def draw_face(side):
    """A plain face from the front on a plain ground, side x side."""
    unit = side / 100
    image = Image.new("RGB", (side, side), GROUND)
    pen = ImageDraw.Draw(image)

    def ellipse(x, y, across, down, colour):
        box = (x - across, y - down, x + across, y + down)
        pen.ellipse([unit * value for value in box], fill=colour)

    ellipse(50, 45, 36, 42, HAIR)
    ellipse(50, 54, 28, 36, SKIN)
    for x in (38, 62):
        ellipse(x, 45, 8, 4.5, (150, 105, 90))
        ellipse(x, 45, 4.5, 2.6, (40, 30, 30))
        pen.rectangle([unit * v for v in (x - 7, 36, x + 7, 38.5)], fill=(70, 45, 35))
    ellipse(50, 60, 4, 3, (170, 120, 105))
    pen.rectangle([unit * v for v in (48.5, 46, 51.5, 58)], fill=(235, 195, 170))
    ellipse(50, 73, 10, 3.5, (150, 70, 75))
    return image.filter(ImageFilter.GaussianBlur(1.2 * unit))


def scene(*places, size=(300, 400)):
    """Faces drawn at (left, top, side) on the ground: (3, H, W) uint8."""
    image = Image.new("RGB", size[::-1], GROUND)
    for left, top, side in places:
        image.paste(draw_face(side), (left, top))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def by_colour(images):
    """A parser that tells ground, skin and hair by the nearest colour."""
    colours = torch.tensor([GROUND, SKIN, HAIR]) / 255 - 0.5
    distance = (images[:, None] - colours[None, :, :, None, None]).square().sum(2)
    return Outputs(-distance)


def at(*boxes):
    """A detector that has found these boxes."""
    return lambda image: np.array(boxes, np.float32).reshape(-1, 4)


def constant(*labels, side):
    """A parser that gives one map of labels to each image of its batch."""
    maps = torch.stack([torch.as_tensor(each).expand(side, side) for each in labels])
    return lambda images: Outputs(torch.nn.functional.one_hot(maps, 3).permute(0, 3, 1, 2).float())


def test_cascade_finds_drawn_faces_the_largest_first():
    image = scene((10, 20, 100), (150, 60, 200))
    boxes = detect.detect(detect.as_array(image))
    assert boxes.dtype == np.float32
    assert boxes.shape == (2, 4)
    for (x, y, width, height), (left, top, side) in zip(
        boxes, [(150, 60, 200), (10, 20, 100)], strict=True
    ):
        assert left < x < x + width < left + side
        assert top < y < y + height < top + side
        assert abs(x + width / 2 - left - side / 2) < 0.05 * side
        assert width > side / 2
    assert detect.detect(detect.as_array(scene())).shape == (0, 4)


def test_scene_is_cut_to_the_framing_of_the_photographs_and_pasted_back():
    detector = detect.open_detector()
    photographs = torch.stack([scene((0, 0, side), size=(side, side)) for side in (140, 140)])
    framing, count = detect.framing(photographs, detector=detector)
    assert count == 2
    assert 1 < framing.factor < 1.7
    image = scene((10, 20, 100), (150, 60, 200))
    seen = []

    def model(images):
        seen.append(images)
        return by_colour(images)

    labels = detect.parse_scene(model, image, detector=detector, framing=framing)
    assert labels.dtype == torch.uint8
    assert labels.shape == (300, 400)
    # Both in one batch, each like the photograph at the network's size.
    (images,) = seen
    assert images.shape == (2, 3, 128, 128)
    photograph = scene((0, 0, 128), size=(128, 128)) / 255 - 0.5
    assert (images - photograph).abs().mean(dim=(1, 2, 3)).max() < 0.03
    expected = by_colour(image[None] / 255 - 0.5).logits.argmax(1)[0]
    assert (labels == expected).double().mean() > 0.99
    assert (labels == 1).sum() > 0.8 * (expected == 1).sum()


def test_square_about_a_box():
    box = (100, 50, 40, 40)
    assert detect.square(box, WHOLE) == (100, 50, 40)
    # Twice the size; the middle (120, 70) rises by a quarter of 40.
    assert detect.square(box, detect.Framing(2, 0.25)) == (80, 20, 80)


def test_a_square_outside_of_the_image_repeats_its_border():
    image = torch.arange(3 * 4 * 5, dtype=torch.uint8).view(3, 4, 5)
    expected = image[:, [0, 0, 0, 1]][:, :, [3, 4, 4, 4]]
    assert torch.equal(detect.cut(image, 3, -2, 4, side=4), expected)
    assert detect.cut(image, 3, -2, 4, side=9).shape == (3, 9, 9)


@pytest.mark.parametrize("box", [(-30, -20, 64, 64), (180, 100, 64, 64), (-40, -70, 300, 300)])
def test_a_face_over_the_rim_is_pasted_where_it_lies(box):
    image = torch.randint(0, 256, (3, 130, 200), generator=torch.Generator().manual_seed(0))
    image = image.to(torch.uint8)
    side = box[2]
    labels = detect.parse_scene(by_colour, image, detector=at(box), side=side, framing=WHOLE)
    x, y = max(box[0], 0), max(box[1], 0)
    inside = np.s_[y : box[1] + side, x : box[0] + side]
    expected = torch.zeros_like(labels)
    expected[inside] = by_colour(image[None] / 255 - 0.5).logits.argmax(1)[0][inside].byte()
    assert expected.any()
    assert torch.equal(labels, expected)


def test_larger_faces_cover_smaller_ones_and_background_covers_nothing():
    left = torch.arange(8) < 4  # the first columns are a face, the others background
    large = torch.where(left, 1, 0)
    detector = at((10, 10, 8, 8), (12, 12, 4, 4), (17, 10, 2, 2))
    model = constant(large, 2, 2, side=8)
    image = torch.zeros(3, 30, 40, dtype=torch.uint8)
    labels = detect.parse_scene(model, image, detector=detector, side=8, framing=WHOLE)
    expected = torch.zeros(30, 40, dtype=torch.uint8)
    expected[12:16, 12:16] = 2  # the second one, of which the right half is seen
    expected[10:12, 17:19] = 2
    expected[10:18, 10:14] = 1
    assert torch.equal(labels, expected)


def test_no_face_is_background_without_a_parser():
    def never(images):
        raise AssertionError

    image = torch.zeros(3, 20, 30, dtype=torch.uint8)
    labels = detect.parse_scene(never, image, detector=at())
    assert torch.equal(labels, torch.zeros(20, 30, dtype=torch.uint8))
    assert detect.framing(image[None], detector=at()) == (None, 0)


def test_a_network_parses_a_scene():
    torch.manual_seed(0)
    model = build_model("rnn-g", 3).eval()
    with torch.no_grad():
        model.head.bias[1] = 100.0
    labels = detect.parse_scene(
        model, scene(), detector=at((20, 30, 50, 50)), framing=detect.Framing(1.2, 0.1)
    )
    # Side 60 about (45, 55 - 5).
    expected = torch.zeros(300, 400, dtype=torch.uint8)
    expected[20:80, 15:75] = 1
    assert torch.equal(labels, expected)


@pytest.mark.parametrize("lacking", ["file", "class"])
def test_an_opencv_without_cascades_is_one_line(monkeypatch, lacking):
    if lacking == "file":
        monkeypatch.setattr(detect, "CASCADE", "none.xml")
    else:
        monkeypatch.delattr(cv2, "CascadeClassifier")
    with pytest.raises(DataError, match=r"^OpenCV [\d.]+ has no .*\.xml: install opencv-python"):
        detect.open_detector()


@pytest.mark.skipif(not FACES.is_dir(), reason="needs the real faces beside the repository")
def test_cascade_frames_real_faces_as_the_constant_says():
    paths = sorted(FACES.glob("*.jpg"))[:24]
    images = [
        torch.from_numpy(np.array(Image.open(path).convert("RGB").resize((250, 250))))
        for path in paths
    ]
    images = torch.stack(images).permute(0, 3, 1, 2)
    framing, count = detect.framing(images, detector=detect.open_detector())
    assert count >= 20
    assert framing.factor == pytest.approx(detect.FRAMING.factor, abs=0.1)
    assert framing.rise == pytest.approx(detect.FRAMING.rise, abs=0.03)


def test_every_face_is_at_least_the_one_that_is_taken_alone():
    """A face that is seen at one size only is not lost where all sizes are searched."""

    def detector(image):
        height, width = image.shape[:2]
        if width == 320:
            return np.float32([[100, 50, 80, 80]])
        small = [[10, 10, 30, 30], [200 * width / 640, 100 * width / 640, 100, 100]]
        return np.float32(small if width == 640 else []).reshape(-1, 4)

    image = np.zeros((960, 1280, 3), np.uint8)
    alone = detect.detect_reduced(image, detector=detector)
    every = detect.detect_reduced(image, detector=detector, everyone=True)
    np.testing.assert_array_equal(alone, [[400, 200, 320, 320]])
    np.testing.assert_array_equal(every[0], alone[0])
    np.testing.assert_array_equal(every[1:], [[20, 20, 60, 60]])  # the other is the same face
