"""First stage: a small CNN, and the spatial RNN that spreads its labels between boundaries.

Figure 1 of the paper. All networks share the trunk and take (N, 3, H, W) float32 images in -0.5 ..
0.5. Those for one face (the paper's are 128 x 128; H and W divisible by 4) work at half the input's
size after the trunk and return logits at its full size. Those for a scene of many faces (512 x 512;
divisible by 16) have two units and one deconvolution more, work at a quarter and return half.
"""

import torch
import torch.nn.functional as F
from torch import nn

from gatedrnn import SpatialGatedRNN

from .outputs import Outputs
from .pooling import MaxPool

PROPAGATED = 8  # channels of X, and of G


def trunk(channels, *, scene):
    """Conv1 to Deconv6: (N, 3, H, W) to (N, channels, h, w), without a last nonlinearity."""
    widths = (16, 16, 16, 32) if scene else (16, 32)
    layers, before = [], 3
    for i, width in enumerate(widths):
        kernel = 3 if i else 5
        # conv - ReLU - pool, with the last two swapped: maximum and ReLU commute, and the ReLU
        # then touches a quarter of the pixels, which is a fifth of a training step.
        convolution = nn.Conv2d(before, width, kernel, padding=kernel // 2)
        layers += [convolution, MaxPool(), nn.ReLU()]
        before = width
    layers += [nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()]
    if scene:
        layers += [nn.ConvTranspose2d(32, 32, 4, stride=2, padding=1), nn.ReLU()]
    layers.append(nn.ConvTranspose2d(32, channels, 4, stride=2, padding=1))
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.ConvTranspose2d):
            # With stride 2 a kernel of 4 x 4 reaches each output pixel with 2 x 2 taps.
            gain = 1 if layer is layers[-1] else 2**0.5
            nn.init.normal_(layer.weight, std=gain * (32 * 2 * 2) ** -0.5)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def upsample(logits):
    """(N, C, H, W) to (N, C, 2H, 2W), bilinear."""
    return F.interpolate(logits, scale_factor=2, mode="bilinear", align_corners=False)


class RecurrentParser(nn.Module):
    """RNN-G (gated, Eq. (3)) and RNN (no gate, Eq. (1)): the trunk, then four scans and a max."""

    def __init__(self, classes, *, gated, scene=False):
        super().__init__()
        self.gated = gated
        self.trunk = trunk(2 * PROPAGATED if gated else PROPAGATED, scene=scene)
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
        """Images (N, 3, H, W) to :class:`Outputs`."""
        features = self.trunk(images)
        x, g = features.split(PROPAGATED, 1) if self.gated else (features, None)
        logits = upsample(self.head(self.rnn(x, g)))
        if not self.training:
            return Outputs(logits, gate=g)
        return Outputs(logits, self.x_head(x), self.gate_head(g) if self.gated else None, g)


class FeedForwardParser(nn.Module):
    """CNN-S, CNN-deep and MO.

    CNN-S is the trunk and a convolution. CNN-deep has two 3x3x32 convolutions in the RNN's place.
    MO has those two, a second output for the boundary, and no supervision in between: the
    multi-objective network whose two outputs a graph cut makes into labels.
    """

    def __init__(self, classes, *, deep, boundary=False, scene=False):
        super().__init__()
        channels = 2 * PROPAGATED
        self.trunk = trunk(channels, scene=scene)
        self.deep = self.x_head = self.gate_head = None
        if deep:
            if not boundary:
                self.x_head = nn.Conv2d(channels, classes, 3, padding=1)
            self.deep = nn.Sequential(
                nn.Conv2d(channels, 32, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(32, 32, 3, padding=1),
                nn.ReLU(),
            )
            channels = 32
        self.head = nn.Conv2d(channels, classes, 3, padding=1)
        if boundary:
            self.gate_head = nn.Conv2d(channels, 1, 1)
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        """Images (N, 3, H, W) to :class:`Outputs`."""
        x = self.trunk(images)
        if self.deep is None:
            # X is what the output is read from: a loss on it apart would be the same loss twice.
            return Outputs(upsample(self.head(x)))
        deep = self.deep(x)
        return Outputs(
            upsample(self.head(deep)),
            self.x_head(x) if self.x_head and self.training else None,
            None if self.gate_head is None else self.gate_head(deep),
        )
