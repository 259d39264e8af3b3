"""Max pooling by two, as fast as it can be in each mode."""

import torch
from torch import nn


class MaxPool(nn.MaxPool2d):
    """``nn.MaxPool2d(2)``, the same values; where no gradient is wanted, in a quarter of the time.

    PyTorch's pooling writes the place of each maximum even where nobody asks. The maximum of slices
    does not, but splits the gradient of a tie where pooling gives it to the first.
    """

    def __init__(self):
        super().__init__(2)

    def forward(self, x):
        """(N, C, H, W) to (N, C, H // 2, W // 2)."""
        if torch.is_grad_enabled():
            return super().forward(x)
        height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
        x = x[:, :, :height, :width]
        x = torch.maximum(x[:, :, ::2], x[:, :, 1::2])
        return torch.maximum(x[..., ::2], x[..., 1::2])
