"""Parameters and multiply-adds of the networks; as a script, a Markdown table of all of them."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from faceparse import cli
from faceparse.console import say

from . import MODELS, build_model

SIDES = (128, 512)
CLASSES = 3


def parameters(model):
    """The numbers that training changes."""
    return sum(p.numel() for p in model.parameters())


def multiply_adds(model, images):
    """Multiply-adds of one pass of ``images`` (N, 3, H, W) through a network.

    Convolutions (a tap on the padding counts, the bias does not) and scans count: ``w h`` takes
    C // groups a channel, direction and pixel, the gate one more. Normalisation, pooling,
    nonlinearities and resizing do not.
    """
    return _count(model, images).get_total_flops() // 2


def multiply_adds_by_layer(model, images):
    """The same for each innermost module that does any, by name.

    Raises:
        ValueError: these do not add up to the whole: a module that holds others does some itself.
    """
    counter = _count(model, images)
    counts, own = counter.get_flop_counts(), type(model).__name__
    found = {}
    for name, module in model.named_modules():
        operations = sum(counts.get(f"{own}.{name}", {}).values())
        if operations and next(module.children(), None) is None:
            found[name] = operations // 2
    if sum(found.values()) != counter.get_total_flops() // 2:
        raise ValueError(f"{own} multiplies outside of its innermost modules")
    return found


def _count(model, images):
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(images)
    return counter


def table(sides=SIDES):
    """A line for each network and side of its images, for three classes and one image."""
    lines = ["| model | side | parameters | multiply-adds |", "|---|---|---|---|"]
    for name in MODELS:
        for side in sides:
            with torch.device("meta"):  # shapes alone: nothing is computed
                model = build_model(name, CLASSES, side=side).eval()
                count = multiply_adds(model, torch.empty(1, 3, side, side))
            lines.append(f"| {name} | {side} | {parameters(model):,} | {count / 1e6:,.1f} M |")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.Parser(description=__doc__).parse_args()
    say(*table().splitlines())
