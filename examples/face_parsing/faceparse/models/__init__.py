"""The networks by name."""

from .first_stage import FeedForwardParser, RecurrentParser
from .fuse_bn import fuse_bn
from .outputs import Outputs
from .part import PartParser, PartsParser
from .points import Points, PointsNet
from .rnn_g_plus import PlusParser
from .unet import UNet

__all__ = [
    "MODELS",
    "SECOND_STAGE",
    "FeedForwardParser",
    "Outputs",
    "PartParser",
    "PartsParser",
    "PlusParser",
    "Points",
]
__all__ += ["PointsNet", "RecurrentParser", "UNet", "build_model", "fuse_bn"]

SMALL = {"first": 8, "strided": False, "widths": (12, 16, 24, 32), "convolutions": (1, 1, 1, 1)}
SMALL |= {"skip": 16, "channels": 8, "refined": 0}

# name: (network, its options); each takes the number of classes and whether for scenes, too.
MODELS = {
    "rnn-g": (RecurrentParser, {"gated": True}),
    "rnn": (RecurrentParser, {"gated": False}),
    "cnn-s": (FeedForwardParser, {"deep": False}),
    "cnn-deep": (FeedForwardParser, {"deep": True}),
    "mo": (FeedForwardParser, {"deep": True, "boundary": True}),
    "rnn-g+": (PlusParser, {}),
    "rnn-g+small": (PlusParser, SMALL),  # of the paper's size
    "unet": (UNet, {}),
}
# The rest of the chain; see inference/face_crops.py for what they are shown.
SECOND_STAGE = {
    "part": (PartParser, {}),
    "points": (PointsNet, {}),  # the number of points, instead of classes
}


def build_model(name, classes, *, side=128):
    """A freshly initialised network; its weights come from PyTorch's global generator.

    Args:
        name: a key of ``MODELS`` or ``SECOND_STAGE``.
        classes: number of labels.
        side: of the images that it is for, pixels: 64, a part of a face, or 128, one face, logits
            at full size; or 512, a scene of many, logits at 256.

    Raises:
        ValueError: unknown name or side.
    """
    known = MODELS | SECOND_STAGE
    if name not in known:
        raise ValueError(f"model must be one of {', '.join(known)}, got {name!r}")
    if side not in (64, 128, 512):
        raise ValueError(f"side must be 64, 128 or 512, got {side!r}")
    network, options = known[name]
    return network(classes, scene=side == 512, **options)
