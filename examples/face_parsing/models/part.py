"""Second stage: one part of the face at a time, in a small picture (Figure 2 of the paper)."""

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import nn

from .folding import folded
from .parse import Parse
from .plus import convolution
from .pooling import MaxPool


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
        """Images (N, 3, H, W) to :class:`Parse`."""
        x = self.pool(self.cut(self.conv1(images)))
        fine = self.cut(self.conv2(x))
        x = self.pool(fine)
        for layer in (self.conv3, self.conv4, self.conv5):
            x = self.cut(layer(x))
        return Parse(self.deconv7(self.cut(F.relu(self.deconv6(x) + fine))))

    def cut(self, maps):
        """What of a layer's maps the next one sees."""
        return maps


class PartsParser(PartParser):
    """Trained parsers of several parts in one pass, each a group of the channels; no gradients.

    A picture that is smaller than the largest lies in its upper left corner. What the layers make
    beyond it is cut away, so that its border is what it was in training.

    Args:
        networks: ``PartParser`` of the same widths, in evaluation, one for each picture; one may
            occur twice.
        sizes: h, w of each picture, divisible by 4.
    """

    def __init__(self, networks, sizes):
        widths = {network.widths: None for network in networks}
        if len(widths) > 1:
            raise ValueError(
                f"networks must have the same widths, got {', '.join(map(str, widths))}"
            )
        classes = max(network.classes for network in networks)
        super().__init__(classes, widths=networks[0].widths, groups=len(networks))
        self.sizes, self.size = sizes, tuple(max(side) for side in zip(*sizes, strict=True))
        folded(self.eval())
        states = [_with_classes(folded(deepcopy(network)), classes) for network in networks]
        self.load_state_dict({k: torch.cat([state[k] for state in states]) for k in states[0]})

    def forward(self, images):
        """Pictures (N, P * 3, H, W), H, W the largest; logits (N, P, classes, H, W) of ``Parse``.

        What lies beyond a picture, and classes that a part has not, are to be left out of them.
        """
        logits = super().forward(self.cut(images.clone())).logits
        return Parse(logits.unflatten(1, (len(self.sizes), self.classes)))

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
