"""What the page shows of the layer is what the layer computes."""

import pytest
import small_parser
import torch

from faceparse.inference.face_parser import FaceParser
from faceparse.inference.image_io import read
from faceparse.models import build_model
from faceparse.reporting import layer_inspection
from gatedrnn.reference import spatial_gated_rnn


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """A parser, a photograph, and its face."""
    folder = tmp_path_factory.mktemp("models")
    small_parser.save_parser(folder)
    parser, image = FaceParser.load(folder), read(small_parser.save_photo(folder / "photo.png"))
    boxes = parser.detect(image)
    points = small_parser.place_points(parser, [image], boxes)
    return parser, image, parser.parse([image], points, boxes)[0]


def test_maps_are_those_of_the_reference(seen):
    found = layer_inspection.propagation_of(*seen)
    layer = seen[0].networks["face"].rnn
    assert tuple(found.directions) == layer.directions
    with torch.no_grad():
        x, g = found.x[None], found.g[None]
        maps = spatial_gated_rnn(x, g, layer.weight, layer.bias, merge=None)[0]
    for expected, name in zip(maps, layer.directions, strict=True):
        torch.testing.assert_close(found.directions[name], expected)
    torch.testing.assert_close(found.merged, maps.amax(0))


def test_face_is_what_the_first_stage_was_shown(seen):
    parser, image, parsed_face = seen
    shown = []
    hook = parser.networks["face"].register_forward_pre_hook(lambda _, given: shown.extend(given))
    parser.parse([image], [parsed_face.points.double().numpy()], [parsed_face.box.numpy()])
    found = layer_inspection.propagation_of(parser, image, parsed_face)
    hook.remove()
    first, second = shown
    torch.testing.assert_close(first, second, atol=0.02, rtol=0)
    assert (found.face / 255 - 0.5 - second[0]).abs().max() < 0.003


def test_the_parser_is_left_as_it_was(seen):
    layer = seen[0].networks["face"].rnn
    layer_inspection.propagation_of(*seen)
    assert not layer._forward_pre_hooks


@pytest.mark.parametrize("model", ["rnn", "rnn-g+small", "unet", "cnn-s"])
def test_every_first_stage_can_be_looked_into(seen, model):
    parser, image, parsed_face = seen
    other = FaceParser.of({**parser.networks, "face": build_model(model, 3)}, parser.layout)
    found = layer_inspection.propagation_of(other, image, parsed_face)
    if not model.startswith("rnn"):
        assert found is None
        return
    assert (found.g is None) == (model == "rnn")
    assert found.merged.shape == found.x.shape
    picture = layer_inspection.draw(found)
    assert picture.ndim == 3
    assert picture.std() > 20
