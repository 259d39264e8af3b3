"""Checks an installed wheel where there is nothing but PyTorch. `make wheel` and CI run it."""

import sys
from importlib import metadata
from pathlib import Path

import torch

import gatedrnn
from gatedrnn import SpatialGatedRNN, __main__
from gatedrnn.reference import spatial_gated_rnn as reference


def check_files():
    """The package comes from the wheel, and the wheel brings no library of PyTorch."""
    root = Path(gatedrnn.__file__).parents[1]
    assert root.is_relative_to(sys.prefix), f"{root} is not in {sys.prefix}"
    assert gatedrnn.__version__ == metadata.version("gatedrnn")
    files = {path.parts[0] for path in metadata.files("gatedrnn")}
    assert files == {"gatedrnn", f"gatedrnn-{gatedrnn.__version__}.dist-info"}, files


def check_training():
    """A step of a layer changes its parameters as a step of the reference loop does."""
    torch.manual_seed(0)
    layer = SpatialGatedRNN(6, groups=2, weight_constraint=None, dtype=torch.float64)
    x, g = torch.randn(2, 6, 9, 7).double(), torch.rand(2, 1, 9, 7).double()
    maps = layer(x, g)
    expected = reference(x, g, layer.raw_weight, layer.bias, gate_activation="clamp")
    torch.testing.assert_close(maps, expected)
    ours, theirs = (
        torch.autograd.grad(y.square().mean(), tuple(layer.parameters()), create_graph=True)
        for y in (maps, expected)
    )
    torch.testing.assert_close(ours, theirs)
    second = (torch.autograd.grad(grads[0].square().sum(), layer.bias) for grads in (ours, theirs))
    torch.testing.assert_close(*second)


if __name__ == "__main__":
    check_files()
    check_training()
    sys.exit(__main__.main())
