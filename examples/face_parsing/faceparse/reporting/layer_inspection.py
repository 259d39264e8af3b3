"""Inside of the first stage's layer: its inputs, the map of each direction, and their maximum."""

from typing import NamedTuple

import numpy as np
import torch

from faceparse.data import geometry
from faceparse.data.transforms import network_input
from faceparse.inference import face_crops
from faceparse.inference.image_io import as_tensor
from gatedrnn import SpatialGatedRNN
from gatedrnn.functional import spatial_gated_rnn

from .plots import new_figure

ARROWS = {"left_to_right": "→", "right_to_left": "←", "top_to_bottom": "↓", "bottom_to_top": "↑"}


class Propagation(NamedTuple):
    """The layer's maps of one face, in the aligned frame; on the CPU."""

    face: torch.Tensor  # (3, 128, 128) uint8, what the first stage is shown
    x: torch.Tensor  # (C, h, w), the labels before they are spread
    g: torch.Tensor | None  # (C, h, w), 0 closed to 1 open; None without a gate
    directions: dict[str, torch.Tensor]  # by name, (C, h, w): the labels spread that way
    merged: torch.Tensor  # (C, h, w), the layer's output


@torch.inference_mode()
def propagation_of(parser, image, parsed_face):
    """What the layer does to a parsed face.

    Args:
        parser: ``FaceParser``.
        image: as ``parser`` takes it.
        parsed_face: the face's ``ParsedFace``.

    Returns:
        :class:`Propagation` of the network's first ``SpatialGatedRNN``; None without any.
    """
    network = parser.networks["face"]
    layer = next((m for m in network.modules() if isinstance(m, SpatialGatedRNN)), None)
    if layer is None:
        return None
    frame = face_crops.frame_of(parsed_face.points.double().numpy(), parser.layout)
    m = geometry.compose(face_crops.FRAME_TO_FACE, frame)
    face = geometry.view(as_tensor(image), m, (face_crops.SIDE, face_crops.SIDE))
    given = []
    hook = layer.register_forward_pre_hook(lambda layer, inputs: given.append(inputs))
    try:
        # A copy: what is floating already is normalised in place.
        network(network_input(face[None].clone()).to(parser.device))
    finally:
        hook.remove()
    x, g = given[0]
    maps = spatial_gated_rnn(
        x,
        g,
        layer.weight,
        layer.bias,
        directions=layer.directions,
        merge=None,
        nonlinearity=layer.nonlinearity,
        gate_activation=layer.gate_activation,
    )[0].cpu()
    return Propagation(
        face.round().to(torch.uint8),
        x[0].cpu(),
        None if g is None else g[0].abs().clamp(max=1).cpu(),
        dict(zip(layer.directions, maps, strict=True)),
        layer(x, g)[0].cpu(),
    )


def draw(propagation):
    """The maps side by side, each the mean of its magnitude over channels: (h, w, 3) uint8 array.

    All are on one scale, but for the gate, which is 0 (closed) to 1 (open).
    """
    shown = {"X: before the scans": propagation.x, "maximum of the four": propagation.merged}
    shown |= {
        f"{name.replace('_', ' ')}  {ARROWS[name]}": v for name, v in propagation.directions.items()
    }
    shown = {title: v.abs().mean(0) for title, v in shown.items()}
    highest = max(v.max().item() for v in shown.values())

    figure = new_figure(figsize=(11, 5.6))
    axes = figure.subplots(2, 4)
    for axis in axes.flat:
        axis.set_axis_off()
    axes[0, 0].imshow(propagation.face.permute(1, 2, 0).numpy())
    axes[0, 0].set_title("the aligned face")
    if propagation.g is not None:
        axes[0, 1].imshow(propagation.g.mean(0).numpy(), cmap="gray", vmin=0, vmax=1)
        axes[0, 1].set_title("G: white is open")
    for axis, (title, values) in zip([*axes[0, 2:], *axes[1]], shown.items(), strict=False):
        picture = axis.imshow(values.numpy(), cmap="magma", vmin=0, vmax=highest)
        axis.set_title(title)
    figure.colorbar(picture, ax=axes[:, 3], shrink=0.7)
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]
