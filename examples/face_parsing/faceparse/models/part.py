"""Second stage: one part of the face at a time, in a small picture (Figure 2 of the paper)."""

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import nn

from .fuse_bn import fuse_bn
from .outputs import Outputs
from .pooling import MaxPool
from .rnn_g_plus import convolution


class PartParser(nn.Module):
    """Five convolutions, two poolings, two deconvolutions; no propagation.

    The finer of the two sizes in between comes back as a summand, as edges are sharper there.
    Takes (N, 3, H, W) float32 images in -0.5 .. 0.5, H and W divisible by 4; logits at full size.
    Each convolution but the last is followed by batch normalisation, which the paper's code lacks.

    Args:
        classes: number of labels.
        widths: channels at 1/2 and 1/4 of the size: of the first convolution, the second, the rest.
        groups: so many networks side by side, which share no channel: see :class:`PartsParser`.
    """

    def __init__(self, classes, *, scene=False, widths=(8, 16, 32), groups=1):
        super().__init__()
        if scene:
            raise ValueError("the model 'part' is for a part of one face, not for scenes")
        self.classes, self.widths = classes, widths
        image, classes, first, second, third = (groups * n for n in (3, classes, *widths))
        self.conv1 = convolution(image, first, 5, groups=groups)
        self.conv2 = convolution(first, second, groups=groups)
        self.conv3 = convolution(second, third, groups=groups)
        self.conv4 = convolution(third, third, groups=groups)
        self.conv5 = convolution(third, third, groups=groups)
        twice = {"kernel_size": 4, "stride": 2, "padding": 1, "groups": groups}
        self.deconv6 = nn.ConvTranspose2d(third, second, **twice)
        self.deconv7 = nn.ConvTranspose2d(second, classes, **twice)
        self.pool = MaxPool()
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        """Images (N, 3, H, W) to :class:`Outputs`."""
        x = self.pool(self.cut(self.conv1(images)))
        fine = self.cut(self.conv2(x))
        x = self.pool(fine)
        for layer in (self.conv3, self.conv4, self.conv5):
            x = self.cut(layer(x))
        return Outputs(self.deconv7(self.cut(F.relu(self.deconv6(x) + fine))))

    def cut(self, maps):
        """What of a layer's maps the next one sees."""
        return maps


class PartsParser(nn.Module):
    """Trained parsers of several parts, a picture each: of one face in one pass.

    One pass takes three quarters of the time that the networks take one by one, where they see one
    picture each; where they see more, it is they who are faster. No gradients.

    Args:
        networks: ``PartParser`` of the same widths, one for each picture; one may occur twice. They
            are copied.
        sizes: h, w of each picture, divisible by 4.

    Raises:
        ValueError: networks of different widths; sizes that are not such, or not as many.
    """

    def __init__(self, networks, sizes):
        super().__init__()
        widths = dict.fromkeys(network.widths for network in networks)
        if len(widths) != 1:
            given = ", ".join(map(str, widths)) or "none"
            raise ValueError(f"networks must have the same widths, got {given}")
        if len(sizes) != len(networks) or any(
            side % 4 or side < 4 for size in sizes for side in size
        ):
            raise ValueError(
                f"sizes must be h, w divisible by 4 of {len(networks)} pictures, got {sizes}"
            )
        networks = [fuse_bn(deepcopy(network).eval()) for network in networks]
        self.sizes, self.networks = sizes, nn.ModuleList(networks)
        self.joined = _Joined(networks, sizes)
        self.requires_grad_(False)

    def forward(self, images):
        """The logits (N, classes, h, w) of each picture.

        Args:
            images: (N, 3 * P, H, W) float32, H, W the largest of the sizes: each picture in the
                upper left of its own three channels; beyond it lies anything.
        """
        every = list(zip(self.networks, self.sizes, strict=True))
        if len(images) == 1:
            logits = self.joined(images).logits.chunk(len(every), 1)
            return [
                part[:, : network.classes, :height, :width]
                for part, (network, (height, width)) in zip(logits, every, strict=True)
            ]
        return [
            network(images[:, 3 * i : 3 * i + 3, :height, :width]).logits
            for i, (network, (height, width)) in enumerate(every)
        ]


class _Joined(PartParser):
    """Several networks as one with a group of the channels for each: see :class:`PartsParser`.

    What the layers make beyond a picture is cut away, so that its border is what it was in
    training.
    """

    def __init__(self, networks, sizes):
        classes = max(network.classes for network in networks)
        super().__init__(classes, widths=networks[0].widths, groups=len(networks))
        self.sizes, self.size = sizes, tuple(max(side) for side in zip(*sizes, strict=True))
        fuse_bn(self.eval())
        states = [_with_classes(network, classes) for network in networks]
        self.load_state_dict({k: torch.cat([state[k] for state in states]) for k in states[0]})

    def forward(self, images):
        return super().forward(self.cut(images.clone()))

    def cut(self, maps):
        """Maps (N, P * C, H / s, W / s) without what is beyond each picture; in place."""
        step, channels = self.size[0] // maps.shape[2], maps.shape[1] // len(self.sizes)
        for i, (height, width) in enumerate(self.sizes):
            group = maps[:, i * channels : (i + 1) * channels]
            if height < self.size[0]:
                group[:, :, height // step :] = 0
            if width < self.size[1]:
                group[:, :, :, width // step :] = 0
        return maps


def _with_classes(network, classes):
    """The parameters of a ``PartParser`` as for more classes, the others' all zero."""
    state = network.state_dict()
    missing = classes - network.classes
    state["deconv7.weight"] = F.pad(state["deconv7.weight"], (0, 0, 0, 0, 0, missing))
    state["deconv7.bias"] = F.pad(state["deconv7.bias"], (0, missing))
    return state
