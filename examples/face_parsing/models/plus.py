"""RNN-G+: the paper's idea with what has been learned since about training small networks."""

import torch
import torch.nn.functional as F
from torch import nn

from gatedrnn import SpatialGatedRNN

from .parse import Parse
from .pooling import MaxPool


def convolution(inputs, outputs, kernel=3, stride=1):
    """Convolution, batch normalisation, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def position_of(images):
    """Two maps (N, 2, H, W) beside images (N, 3, H, W): column and row, from -0.5 to 0.5."""
    n, _, height, width = images.shape
    columns = torch.linspace(-0.5, 0.5, width, dtype=images.dtype, device=images.device)
    rows = torch.linspace(-0.5, 0.5, height, dtype=images.dtype, device=images.device)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1]).expand(n, -1, -1, -1)


class PlusParser(nn.Module):
    """Encoder, summed skips up to half the input's size, one or more gated propagations, labels.

    Args:
        classes: number of labels.
        scene: for 512 x 512 pixels and many faces; the logits are half that size.
        first: channels at full size.
        widths: channels at 1/2, 1/4, ... of the input's size.
        convolutions: of each of these stages.
        skip: channels of the decoder's sums.
        channels: of X and of G.
        propagations: how often the labels spread; each has weights of its own and the same gates,
            and reads the one before with the labels before spreading added.
        gates: ``"shared"`` (one map for all directions) or ``"direction"`` (a map for each).
        gate_norm, merge: of the layer.
        norm: normalise what a propagation returns.
        position: give the network the pixel's place too: portraits are framed alike.
    """

    def __init__(
        self,
        classes,
        *,
        scene=False,
        first=16,
        widths=(32, 64, 96),
        convolutions=1,
        skip=32,
        channels=16,
        propagations=1,
        gates="shared",
        gate_norm="clamp",
        merge="max",
        norm=True,
        position=False,
        strided=False,
        refined=0,
    ):
        super().__init__()
        # A scene is halved here, so that the labels spread at a quarter of its size.
        self.position = position
        self.first = convolution(
            5 if position else 3, first, 5, stride=2 if scene or strided else 1
        )
        self.stages, self.laterals = nn.ModuleList(), nn.ModuleList()
        before = first
        if isinstance(convolutions, int):
            convolutions = [convolutions] * len(widths)
        self.unpooled = strided and not scene
        for width, count in zip(widths, convolutions, strict=True):
            layers = [convolution(before, width)]
            layers += [convolution(width, width) for _ in range(count - 1)]
            self.stages.append(nn.Sequential(*layers))
            self.laterals.append(nn.Conv2d(width, skip, 1))
            before = width
        self.smooth = nn.ModuleList(convolution(skip, skip) for _ in widths[:-1])
        maps = 4 if gates == "direction" else 1
        self.split = (channels, maps * channels)
        self.maps = maps
        self.to_x_and_g = nn.Conv2d(skip, sum(self.split), 1)
        self.rnns = nn.ModuleList(
            SpatialGatedRNN(channels, gate_norm=gate_norm, merge=merge) for _ in range(propagations)
        )
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(channels) if norm else nn.Identity() for _ in range(propagations)
        )
        self.x_head = nn.Conv2d(channels, classes, 3, padding=1)
        self.gate_head = nn.Conv2d(self.split[1], 1, 1)
        head = nn.Conv2d(refined or channels, classes, 3, padding=1)
        self.head = nn.Sequential(convolution(channels, refined), head) if refined else head
        self.pool = MaxPool()
        with torch.no_grad():
            self.to_x_and_g.weight[channels:] *= 0.2
            self.to_x_and_g.bias[channels:] = 0.8
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        """Images (N, 3, H, W) to :class:`Parse`."""
        if self.position:
            images = torch.cat([images, position_of(images)], 1)
        x = self.first(images)
        maps = []
        for i, (stage, lateral) in enumerate(zip(self.stages, self.laterals, strict=True)):
            x = stage(x if i == 0 and self.unpooled else self.pool(x))
            maps.append(lateral(x))
        x = maps.pop()
        for lateral, smooth in zip(reversed(maps), self.smooth, strict=True):
            x = smooth(lateral + F.interpolate(x, scale_factor=2.0, mode="nearest"))
        x, gate = self.to_x_and_g(x).split(self.split, 1)
        g = gate.unflatten(1, (self.maps, -1)) if self.maps > 1 else gate
        h = x
        for rnn, norm in zip(self.rnns, self.norms, strict=True):
            h = norm(rnn(h, g)) + x
        logits = F.interpolate(self.head(h), scale_factor=2.0, mode="bilinear", align_corners=False)
        if not self.training:
            return Parse(logits, gate=gate)
        return Parse(logits, self.x_head(x), self.gate_head(gate), gate)
