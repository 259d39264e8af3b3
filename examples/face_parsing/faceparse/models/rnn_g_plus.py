"""RNN-G+: the paper's idea with a trunk as one would build it today."""

import torch
import torch.nn.functional as F
from torch import nn

from gatedrnn import SpatialGatedRNN

from .outputs import Outputs
from .pooling import MaxPool


def convolution(inputs, outputs, kernel=3, stride=1, groups=1):
    """Convolution, batch normalisation, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def position_of(images):
    """Two maps (N, 2, H, W) next to images (N, 3, H, W): column and row, from -0.5 to 0.5."""
    n, _, height, width = images.shape
    columns = torch.linspace(-0.5, 0.5, width, dtype=images.dtype, device=images.device)
    rows = torch.linspace(-0.5, 0.5, height, dtype=images.dtype, device=images.device)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1]).expand(n, -1, -1, -1)


class PlusParser(nn.Module):
    """An encoder, summed skips up to half the input's size, gated propagations, labels.

    Takes (N, 3, H, W) float32 images in -0.5 .. 0.5, H and W divisible by 32.

    Args:
        classes: number of labels.
        scene: for 512 x 512 pixels and many faces; the labels spread at a quarter of that, and the
            logits are half of it.
        first: channels of the 5 x 5 convolution.
        strided: it steps by two, instead of the first pooling. A scene's does anyway.
        widths: channels of the stages, at 1/2, 1/4, ... of the input's size.
        convolutions: in each of these stages.
        skip: channels of the decoder's sums.
        channels: of X and of G.
        propagations: how often the labels spread. Each has weights of its own and the same gates,
            and is added to X; the next one reads the sum.
        refined: channels of a convolution between the last of these and the labels; 0: none.
        position: give the network each pixel's place too: portraits are framed alike.
    """

    def __init__(
        self,
        classes,
        *,
        scene=False,
        first=24,
        strided=True,
        widths=(32, 48, 64, 64),
        convolutions=(1, 2, 2, 1),
        skip=32,
        channels=16,
        propagations=1,
        refined=24,
        position=True,
    ):
        super().__init__()
        self.position, self.channels = position, channels
        self.first = convolution(
            5 if position else 3, first, 5, stride=2 if strided or scene else 1
        )
        # A scene is halved by both: the same stages then see as much of a face.
        self.pooled_first = scene or not strided
        self.stages, self.laterals = nn.ModuleList(), nn.ModuleList()
        before = first
        for width, count in zip(widths, convolutions, strict=True):
            layers = [convolution(before, width)]
            layers += [convolution(width, width) for _ in range(count - 1)]
            self.stages.append(nn.Sequential(*layers))
            self.laterals.append(nn.Conv2d(width, skip, 1))
            before = width
        self.smooth = nn.ModuleList(convolution(skip, skip) for _ in widths[:-1])
        self.to_x_and_g = nn.Conv2d(skip, 2 * channels, 1)
        self.rnns = nn.ModuleList(SpatialGatedRNN(channels) for _ in range(propagations))
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(propagations))
        self.x_head = nn.Conv2d(channels, classes, 3, padding=1)
        self.gate_head = nn.Conv2d(channels, 1, 1)
        head = nn.Conv2d(refined or channels, classes, 3, padding=1)
        self.head = nn.Sequential(convolution(channels, refined), head) if refined else head
        self.pool = MaxPool()
        with torch.no_grad():  # gates start open, as RNN-G's
            self.to_x_and_g.weight[channels:] *= 0.2
            self.to_x_and_g.bias[channels:] = 0.8
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        """Images (N, 3, H, W) to :class:`Outputs`."""
        if self.position:
            images = torch.cat([images, position_of(images)], 1)
        x = self.first(images)
        maps = []
        for i, (stage, lateral) in enumerate(zip(self.stages, self.laterals, strict=True)):
            x = stage(self.pool(x) if i or self.pooled_first else x)
            maps.append(lateral(x))
        x = maps.pop()
        for lateral, smooth in zip(reversed(maps), self.smooth, strict=True):
            x = smooth(lateral + F.interpolate(x, scale_factor=2.0, mode="nearest"))
        x, g = self.to_x_and_g(x).split(self.channels, 1)
        h = x
        for rnn, norm in zip(self.rnns, self.norms, strict=True):
            h = norm(rnn(h, g)) + x
        logits = F.interpolate(self.head(h), scale_factor=2.0, mode="bilinear", align_corners=False)
        if not self.training:
            return Outputs(logits, gate=g)
        return Outputs(logits, self.x_head(x), self.gate_head(g), g)
