"""What every network returns."""

from typing import NamedTuple

import torch


class Outputs(NamedTuple):
    """The maps of a batch; h x w is where the network propagates. None: there is no such part.

    What only a loss reads is made in training mode alone: it is a seventh of a frame.
    """

    logits: torch.Tensor  # (N, classes, H, W), or half that size for 512 x 512 scenes
    x_logits: torch.Tensor | None = None  # (N, classes, h, w), read off X
    gate_logit: torch.Tensor | None = None  # (N, 1, h, w): high off boundaries; MO always
    gate: torch.Tensor | None = None  # (N, C, h, w): G; the layer clamps it to -1 .. 1
