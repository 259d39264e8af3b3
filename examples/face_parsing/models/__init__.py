"""The networks by name."""

from .coarse import FeedForwardParser, RecurrentParser
from .parse import Parse
from .plus import PlusParser
from .unet import UNet

__all__ = ["MODELS", "FeedForwardParser", "Parse", "PlusParser", "RecurrentParser", "UNet"]
__all__ += ["build_model"]

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


def build_model(name, classes, *, side=128):
    """A freshly initialised network; its weights come from PyTorch's global generator.

    Args:
        name: a key of ``MODELS``.
        classes: number of labels.
        side: of the images that it is for, pixels: 128, one face, logits at full size; or 512, a
            scene of many, logits at 256.

    Raises:
        ValueError: unknown name or side.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    if side not in (128, 512):
        raise ValueError(f"side must be 128 or 512, got {side!r}")
    network, options = MODELS[name]
    return network(classes, scene=side == 512, **options)
