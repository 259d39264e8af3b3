"""The regressor of the five key points, from a rough square about a face."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .pooling import MaxPool
from .rnn_g_plus import convolution


class Points(NamedTuple):
    """The key points of a batch."""

    points: torch.Tensor  # (N, P, 2): x, y in the picture, 0 at its left and top, 1 at its end


class PointsNet(nn.Module):
    """One heat map a point, at a quarter of the picture's size; the point is its mean place.

    Takes (N, 3, H, W) float32 images in -0.5 .. 0.5, H and W divisible by 16.
    """

    def __init__(self, points, *, scene=False, widths=(16, 32, 48, 64)):
        super().__init__()
        if scene:
            raise ValueError("the model 'points' is for one face, not for scenes")
        self.stages = nn.ModuleList()
        before = 3
        for i, width in enumerate(widths):
            self.stages.append(convolution(before, width, 3 if i else 5))
            before = width
        *_, third, fourth = widths
        self.deep = nn.Sequential(convolution(fourth, fourth), convolution(fourth, fourth))
        self.widen = nn.Conv2d(fourth, third, 1)
        self.join = convolution(third, third)
        self.head = nn.Conv2d(third, points, 1)
        self.pool = MaxPool()
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        """Images (N, 3, H, W) to :class:`Points`."""
        x, maps = images, []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
            x = self.pool(x)
        x = self.widen(self.deep(x))  # at 1/16
        x = self.join(maps[2] + F.interpolate(x, scale_factor=4.0, mode="nearest"))
        return Points(mean_place(self.head(x)))


def mean_place(logits):
    """The mean of x and y under the softmax of each map (N, P, h, w): (N, P, 2), 0 .. 1."""
    height, width = logits.shape[-2:]
    share = logits.flatten(2).softmax(-1).unflatten(-1, (height, width))
    columns = (torch.arange(width, device=logits.device) + 0.5) / width
    rows = (torch.arange(height, device=logits.device) + 0.5) / height
    return torch.stack([share.sum(2) @ columns, share.sum(3) @ rows], -1)
