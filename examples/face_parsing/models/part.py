"""Second stage: one part of the face at a time, in a small picture (Figure 2 of the paper)."""

import torch
import torch.nn.functional as F
from torch import nn

from .parse import Parse
from .plus import convolution
from .pooling import MaxPool


class PartParser(nn.Module):
    """Five convolutions, two poolings, two deconvolutions; no propagation.

    The finer of the two sizes in between comes back as a summand, as edges are sharper there.
    Takes (N, 3, H, W) float32 images in -0.5 .. 0.5, H and W divisible by 4; logits at full size.
    Each convolution but the last is followed by batch normalisation, which the paper's code lacks.
    """

    def __init__(self, classes, *, scene=False, widths=(8, 16, 32)):
        super().__init__()
        if scene:
            raise ValueError("the model 'part' is for a part of one face, not for scenes")
        first, second, third = widths
        self.conv1 = convolution(3, first, 5)
        self.conv2 = convolution(first, second)
        self.conv3 = convolution(second, third)
        self.conv4 = convolution(third, third)
        self.conv5 = convolution(third, third)
        self.deconv6 = nn.ConvTranspose2d(third, second, 4, stride=2, padding=1)
        self.deconv7 = nn.ConvTranspose2d(second, classes, 4, stride=2, padding=1)
        self.pool = MaxPool()
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        """Images (N, 3, H, W) to :class:`Parse`."""
        x = self.pool(self.conv1(images))
        fine = self.conv2(x)
        x = self.conv5(self.conv4(self.conv3(self.pool(fine))))
        return Parse(self.deconv7(F.relu(self.deconv6(x) + fine)))
