"""The networks by name."""

from .coarse import FeedForwardParser, Parse, RecurrentParser

__all__ = ["MODELS", "FeedForwardParser", "Parse", "RecurrentParser", "build_model"]

MODELS = {
    "rnn-g": lambda classes: RecurrentParser(classes, gated=True),
    "rnn": lambda classes: RecurrentParser(classes, gated=False),
    "cnn-s": lambda classes: FeedForwardParser(classes, deep=False),
    "cnn-deep": lambda classes: FeedForwardParser(classes, deep=True),
}


def build_model(name, classes):
    """A freshly initialised network; its weights come from PyTorch's global generator.

    Args:
        name: a key of ``MODELS``.
        classes: number of labels.

    Raises:
        ValueError: unknown name.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    return MODELS[name](classes)
