"""The yardstick: a plain U-Net with batch normalisation, what a user would pick instead."""

import torch
from torch import nn

from .outputs import Outputs
from .pooling import MaxPool

WIDTHS = (16, 32, 64, 128, 256)  # channels at 1, 1/2, 1/4, 1/8 and 1/16 of the input's size


def double_convolution(inputs, outputs):
    layers = []
    for channels in (inputs, outputs):
        layers += [
            nn.Conv2d(channels, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Ronneberger et al. 2015 with padding and batch normalisation.

    Takes (N, 3, H, W) float32 images in -0.5 .. 0.5, H and W divisible by 16. With ``scene=True``
    the last decoder stage is left out and the logits are (N, classes, H/2, W/2), the size at which
    scenes of many faces are compared.
    """

    def __init__(self, classes, *, scene=False):
        super().__init__()
        self.down = nn.ModuleList()
        for inputs, outputs in zip((3, *WIDTHS), WIDTHS, strict=False):
            self.down.append(double_convolution(inputs, outputs))
        self.widen, self.up = nn.ModuleList(), nn.ModuleList()
        for wide, narrow in zip(WIDTHS[:0:-1], WIDTHS[-2::-1], strict=True):
            self.widen.append(nn.ConvTranspose2d(wide, narrow, 2, stride=2))
            self.up.append(double_convolution(2 * narrow, narrow))
        if scene:
            del self.widen[-1], self.up[-1]
        self.head = nn.Conv2d(WIDTHS[int(scene)], classes, 1)
        self.pool = MaxPool()
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        """Images (N, 3, H, W) to :class:`Outputs`, the logits alone."""
        maps, x = [], images
        for i, stage in enumerate(self.down):
            x = stage(x if i == 0 else self.pool(x))
            maps.append(x)
        for widen, stage, skip in zip(self.widen, self.up, maps[-2::-1], strict=False):
            x = stage(torch.cat([skip, widen(x)], 1))
        return Outputs(self.head(x))
