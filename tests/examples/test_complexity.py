"""Multiply-adds and parameters against numbers worked by hand."""

import pytest
import torch
from torch import nn

from faceparse.models import MODELS, build_model, complexity
from gatedrnn import SpatialGatedRNN


class Gated(nn.Module):
    """A scan alone; its gate is its own input, or there is none."""

    def __init__(self, gated, **options):
        super().__init__()
        self.rnn, self.gated = SpatialGatedRNN(6, **options), gated

    def forward(self, x):
        return self.rnn(x, x if self.gated else None)


@pytest.mark.parametrize(
    ("layer", "count"),
    [
        # An output pixel, of which there are 5 x 7: 4 channels x 3 inputs x 3 x 3 taps.
        (nn.Conv2d(3, 4, 3, padding=1), 5 * 7 * 4 * 3 * 9),
        # Stride 2 leaves 3 x 4 output pixels, without padding there are 3 x 5.
        (nn.Conv2d(3, 4, 3, stride=2, padding=1), 3 * 4 * 4 * 3 * 9),
        (nn.Conv2d(3, 4, 3), 3 * 5 * 4 * 3 * 9),
        # Each input pixel is spread over 4 x 4 output pixels of 2 channels.
        (nn.ConvTranspose2d(3, 2, 4, stride=2, padding=1), 5 * 7 * 3 * 2 * 16),
        (nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(3)), 0),
    ],
)
def test_convolution_is_counted_as_by_hand(layer, count):
    images = torch.zeros(1, 3, 5, 7)
    assert complexity.multiply_adds(layer.eval(), images) == count
    assert complexity.multiply_adds(layer, images.expand(2, -1, -1, -1)) == 2 * count


@pytest.mark.parametrize(
    ("gated", "options", "count"),
    [
        # A pixel, direction and channel: 6 multiplications of w h and one by the gate.
        (True, {}, 4 * 6 * (6 + 1)),
        (False, {}, 4 * 6 * 6),
        (True, {"groups": 3}, 4 * 6 * (2 + 1)),
        (True, {"directions": ("left_to_right",)}, 6 * (6 + 1)),
        (True, {"integration": "cascade"}, 4 * 6 * (6 + 1)),
    ],
)
@pytest.mark.parametrize("gradients", [True, False])
def test_scan_is_counted_as_by_hand(gated, options, count, gradients):
    model = Gated(gated, **options).requires_grad_(gradients)
    assert complexity.multiply_adds(model, torch.zeros(2, 6, 5, 7)) == 2 * 5 * 7 * count
    assert complexity.multiply_adds_by_layer(model, torch.zeros(1, 6, 5, 7)) == {
        "rnn": 5 * 7 * count
    }


def test_layers_are_named_and_add_up():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 2, 1)))
    assert complexity.multiply_adds_by_layer(model, torch.zeros(1, 3, 5, 7)) == {
        "0": 3 * 5 * 4 * 3 * 9,
        "2.0": 3 * 5 * 2 * 4,
    }


def test_multiplying_outside_of_layers_is_not_lost():
    class Outside(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return torch.nn.functional.conv2d(x, self.convolution.weight)

    images = torch.zeros(1, 3, 5, 7)
    assert complexity.multiply_adds(Outside(), images) == 5 * 7 * 9
    with pytest.raises(ValueError, match="Outside multiplies outside of its innermost modules"):
        complexity.multiply_adds_by_layer(Outside(), images)


def test_parameters_are_counted():
    assert complexity.parameters(nn.Conv2d(3, 4, 5)) == 3 * 4 * 25 + 4


@pytest.mark.parametrize("name", MODELS)
def test_networks_do_all_their_work_in_layers(name):
    with torch.device("meta"):
        model = build_model(name, 3).eval()
        images = torch.empty(1, 3, 128, 128)
        by_layer = complexity.multiply_adds_by_layer(model, images)
        assert sum(by_layer.values()) == complexity.multiply_adds(model, images)


def test_counting_needs_no_meta_device():
    model, images = build_model("rnn-g", 3).eval(), torch.zeros(1, 3, 32, 32)
    counted = complexity.multiply_adds(model, images)
    assert counted == complexity.multiply_adds(model.to("meta"), images.to("meta")) > 0


def test_table_has_every_network():
    lines = complexity.table((128,)).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == list(MODELS)
    assert all(line.count("|") == 5 for line in lines)
