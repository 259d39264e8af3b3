"""First stage: a small CNN, and the spatial RNN that spreads its labels between boundaries.

Figure 1 of the paper. All networks share the trunk, take (N, 3, H, W) float32 images in -0.5 .. 0.5
with H and W divisible by 4 (the paper's are 128), and work at half that size after the trunk.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from gatedrnn import SpatialGatedRNN

PROPAGATED = 8  # channels of X, and of G


class Parse(NamedTuple):
    """What a network returns; None where it has no such part."""

    logits: torch.Tensor  # (N, classes, H, W)
    x_logits: torch.Tensor | None = None  # (N, classes, H/2, W/2), read off X
    gate_logit: torch.Tensor | None = None  # (N, 1, H/2, W/2): high where there is no boundary
    gate: torch.Tensor | None = None  # (N, 8, H/2, W/2): G; the layer clamps it to -1 .. 1


def trunk(channels):
    """Conv1 to Deconv6: (N, 3, H, W) to (N, channels, H/2, W/2), without a last nonlinearity."""
    layers = nn.Sequential(
        # conv - ReLU - pool, with the last two swapped: maximum and ReLU commute, and the ReLU
        # then touches a quarter of the pixels, which is a fifth of a training step.
        nn.Conv2d(3, 16, 5, padding=2),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(32, channels, 4, stride=2, padding=1),
    )
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    # With stride 2 a kernel of 4 x 4 reaches each output pixel with 2 x 2 taps.
    nn.init.normal_(layers[-1].weight, std=(32 * 2 * 2) ** -0.5)
    nn.init.zeros_(layers[-1].bias)
    return layers


def upsample(logits):
    """(N, C, H, W) to (N, C, 2H, 2W), bilinear."""
    return F.interpolate(logits, scale_factor=2, mode="bilinear", align_corners=False)


class RecurrentParser(nn.Module):
    """RNN-G (gated, Eq. (3)) and RNN (no gate, Eq. (1)): the trunk, then four scans and a max."""

    def __init__(self, classes, *, gated):
        super().__init__()
        self.gated = gated
        self.trunk = trunk(2 * PROPAGATED if gated else PROPAGATED)
        self.x_head = nn.Conv2d(PROPAGATED, classes, 3, padding=1)
        self.rnn = SpatialGatedRNN(PROPAGATED)
        self.head = nn.Conv2d(PROPAGATED, classes, 3, padding=1)
        if gated:
            self.gate_head = nn.Conv2d(PROPAGATED, 1, 1)
            # G starts open, so that labels spread from the first step, and inside of the clamp,
            # beyond which a gate has no gradient from the RNN.
            deconv = self.trunk[-1]
            with torch.no_grad():
                deconv.weight[:, PROPAGATED:] *= 0.2
                deconv.bias[PROPAGATED:] = 0.8
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        """Images (N, 3, H, W) to :class:`Parse`."""
        features = self.trunk(images)
        if not self.gated:
            return Parse(upsample(self.head(self.rnn(features))), self.x_head(features))
        x, g = features.split(PROPAGATED, 1)
        logits = upsample(self.head(self.rnn(x, g)))
        return Parse(logits, self.x_head(x), self.gate_head(g), g)


class FeedForwardParser(nn.Module):
    """CNN-S (the trunk and a convolution) and CNN-deep (two 3x3x32 convolutions for the RNN)."""

    def __init__(self, classes, *, deep):
        super().__init__()
        channels = 2 * PROPAGATED
        self.trunk = trunk(channels)
        self.deep = None
        if deep:
            self.x_head = nn.Conv2d(channels, classes, 3, padding=1)
            self.deep = nn.Sequential(
                nn.Conv2d(channels, 32, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(32, 32, 3, padding=1),
                nn.ReLU(),
            )
            channels = 32
        self.head = nn.Conv2d(channels, classes, 3, padding=1)
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        """Images (N, 3, H, W) to :class:`Parse`."""
        x = self.trunk(images)
        if self.deep is None:
            # X is what the output is read from: a loss on it apart would be the same loss twice.
            return Parse(upsample(self.head(x)))
        return Parse(upsample(self.head(self.deep(x))), self.x_head(x))
