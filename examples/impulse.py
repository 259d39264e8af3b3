"""Draws how one impulse spreads under a gate map: `python examples/impulse.py [FILE]`."""

import sys
from pathlib import Path

import torch
from matplotlib import colors
from matplotlib.figure import Figure

from gatedrnn import DIRECTIONS
from gatedrnn.functional import spatial_gated_rnn

SIZE, ROW, COLUMN = 41, 12, 10  # the impulse stands at (ROW, COLUMN)
# White, where the map is exactly zero, is no colour of the scale.
INK = colors.LinearSegmentedColormap.from_list(
    "ink", ["#fef1dc", "#fcd9a0", "#f28f43", "#bd3a3f", "#45103f"]
)


def gate_map():
    """(1, 1, SIZE, SIZE): 1, but 0 on two walls, one with a gap, and around a closed room."""
    g = torch.ones(1, 1, SIZE, SIZE)
    g[..., :34, 22] = 0
    g[..., ROW - 1 : ROW + 2, 22] = 1
    g[..., 27, 3:18] = 0
    g[..., 19:35, 28:38] = 0
    g[..., 20:34, 29:37] = 1
    return g


def draw(target):
    g, x = gate_map(), torch.zeros(1, 1, SIZE, SIZE)
    x[..., ROW, COLUMN] = 1
    weight = torch.full((4, 1, 1), 0.94)
    maps = spatial_gated_rnn(x, g, weight, merge=None)[0]  # (4, 1, SIZE, SIZE)
    panels = {"gate map and impulse": x}
    panels |= {d.replace("_", " "): h[None] for d, h in zip(DIRECTIONS, maps, strict=True)}
    y = x
    for title in ("maximum of the four", "after a second layer", "after a third layer"):
        panels[title] = y = spatial_gated_rnn(y, g, weight)

    figure = Figure(figsize=(11, 6), layout="constrained")
    for axis, (title, h) in zip(figure.subplots(2, 4).flat, panels.items(), strict=True):
        axis.imshow(h[0, 0], cmap=INK, norm=colors.LogNorm(h.max() / 300, h.max()))
        axis.imshow((1 - g[0, 0])[..., None] * torch.tensor([0.3, 0.35, 0.4, 1]))
        axis.set_title(title, fontsize=12)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_color("0.75")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    target = Path(__file__).resolve().parents[1] / "docs" / "impulse.png"
    if len(sys.argv) > 1:
        target = Path(sys.argv[1])
    draw(target)
    print(target)
