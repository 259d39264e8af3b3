"""The pictures of visualize_propagation.py, as bytes: a PNG of panels and an animated GIF."""

import io
import itertools

import numpy as np
import propagation
import torch
from matplotlib import cm, colors, font_manager
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image, ImageDraw, ImageFont
from propagation import size

from gatedrnn import DIRECTIONS

NAMES = [f"{a} {d.replace('_', ' ')}" for a, d in zip("→←↓↑", DIRECTIONS, strict=True)]

# Shares of a map's largest value, on a logarithmic scale. White, exactly zero, is no colour of it.
FLOOR = 1 / 300
INK = colors.LinearSegmentedColormap.from_list(
    "ink", ["#fef1dc", "#fcd9a0", "#f28f43", "#bd3a3f", "#45103f"]
)
CLOSED = np.array([0.3, 0.35, 0.4])
# Rows are blue, columns orange, which the colour-blind can tell apart too; ties are grey.
WINNERS = np.array([colors.to_rgb(c) for c in ("#0072b2", "#8fd0f5", "#d55e00", "#f5b83d", "0.9")])

FRAMES = 64  # of a layer in the animation, at most, next to its first
STEP, PAUSE, END = 60, 800, 3000  # milliseconds
WIDE, HIGH = 760, 400  # pixels of the animation's panels together, at most if they can be so small
MARGIN, HEADER = 12, 28  # around them


def paint(values, gate, *, largest=None, ink=INK):
    """The colours of a map: paper or ink, and both the darker the more the gate is closed.

    Args:
        values: (H, W), not negative.
        gate: (H, W), 0 .. 1.
        largest: the value that is darkest; default: the map's largest.
        ink: a colour map.

    Returns:
        (H, W, 3), 0 .. 1.
    """
    largest = values.max() if largest is None else largest
    # Of a map that is zero everywhere, all shares are zero.
    share = (values / torch.where(largest > 0, largest, 1)).double().numpy()[..., None]
    level = 1 - np.log(share[..., 0].clip(FLOOR)) / np.log(FLOOR)
    closed = 1 - gate.double().numpy()[..., None]
    # A closed gate lets nothing pass, but the pixel's own x goes on: ink must be seen there too.
    closed = np.where(share > 0, 0.6 * closed, closed)
    return (1 - closed) * np.where(share > 0, ink(level)[..., :3], 1) + closed * CLOSED


def paint_winners(found, gate):
    """The colours (H, W, 3) of winning directions (H, W); a tie is the darker the more closed."""
    closed = torch.where(found == propagation.TIE, 1 - gate, 0).double().numpy()[..., None]
    return (1 - closed) * WINNERS[found.numpy()] + closed * CLOSED


def panels(scene, pixel, shown=None):
    """Three rows of pictures by title, (H, W, 3) each: the spread, its directions, what wins.

    Args:
        scene: ``propagation.Scene``.
        pixel: row and column.
        shown: two pictures by title that come first, of what the scene was made of; None: it is a
            gate map alone.
    """
    gate = scene.gate
    maps, merged = propagation.spread(scene, pixel)
    directions = {name: paint(size(h), gate) for name, h in zip(NAMES, maps, strict=True)}
    winning = paint_winners(propagation.winners(scene), gate)
    dx, dg = propagation.influence(scene, pixel)
    if shown is None:
        titles = ("maximum of the four", "after a second layer", "after a third layer")
        first = {"gate map and impulse": paint(size(propagation.impulse(scene, pixel)[0]), gate)}
        first |= {title: paint(size(h), gate) for title, h in zip(titles, merged, strict=True)}
        resting = scene._replace(x=torch.zeros_like(scene.x))
        last = {
            "winning direction, x = 1": winning,
            "influence on the pixel, x = 0": paint(propagation.influence(resting, pixel)[0], gate),
            "influence on the pixel, x = 1": paint(dx, gate),
        }
        return first, directions, last
    first = {
        **shown,
        "gate map": paint(torch.zeros_like(gate), gate),
        "impulse, maximum of the four": paint(size(merged[0]), gate),
    }
    last = {
        "winning direction": winning,
        "influence of X on the pixel": paint(dx, gate),
        "influence of the gates": paint(dg, gate),
    }
    return first, directions, last


def png(scene, pixel, shown=None):
    """All panels, the pixel ringed, and a key; arguments as in :func:`panels`."""
    pictures = itertools.chain(*(row.items() for row in panels(scene, pixel, shown)))
    height, width = scene.gate.shape
    tall = min(max(height / width, 0.4), 2)  # a panel, though a map may be a single line
    figure = Figure(figsize=(11, 0.9 + 8.1 * tall), layout="constrained")
    axes = figure.subplots(3, 4)
    for axis, (title, picture) in zip(axes.flat, pictures, strict=False):
        # In the map's coordinates, also a photograph, which has more pixels.
        axis.imshow(picture, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
        axis.set_title(title, fontsize=12)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_color("0.75")
    for axis in (axes[0, 0], *axes[2, :3]):
        for colour, line in (("white", 3), ("black", 1)):
            axis.plot(*pixel[::-1], "o", ms=11, mfc="none", mec=colour, mew=line)
    key(figure, axes[2, 3])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def key(figure, axis):
    """What the colours mean, instead of a panel."""
    axis.set_axis_off()
    patches = [Patch(color=c, label=n) for c, n in zip(WINNERS, [*NAMES, "tie"], strict=True)]
    patches.append(Patch(color=CLOSED, label="closed gate"))
    axis.legend(handles=patches, loc="upper left", frameon=False, fontsize=11)
    shares = cm.ScalarMappable(colors.LogNorm(FLOOR, 1), INK)
    scale = axis.inset_axes((0.05, 0.14, 0.9, 0.06))
    bar = figure.colorbar(shares, scale, orientation="horizontal", extend="min")
    bar.set_ticks([0.01, 0.1, 1], labels=["1 %", "10 %", "100 %"], minor=False)
    scale.set_title("of the map's largest; no ink: zero", fontsize=10)


def frames(scene, pixel):
    """The animation as small pictures: a panel a layer, one layer after the other.

    Returns:
        pictures, (layers, H, W, 3) uint8 each, no two in a row the same; and the milliseconds
        that each is shown.
    """
    # Few colours, so that a palette holds them all: 9 greys, each as paper and under 24 inks.
    gate, ink = (scene.gate * 8).round() / 8, INK.resampled(24)

    def picture(values, largest):
        return (255 * paint(values, gate, largest=largest, ink=ink)).round().astype(np.uint8)

    nothing = torch.zeros_like(gate)
    page = np.stack([picture(nothing, nothing.max())] * scene.layers)
    pictures, times = [], []
    for layer, wave in enumerate(propagation.waves(scene, pixel)):
        values = size(wave)
        stride = -(-len(values) // FRAMES)
        last = len(values) - 1
        for i in sorted({0, *range(last, 0, -stride)}):
            page = page.copy()
            page[layer] = picture(values[i], values[-1].max())
            if not pictures or not np.array_equal(page, pictures[-1]):  # too faint to be seen
                pictures.append(page)
                times.append(STEP)
        times[-1] = PAUSE
    times[-1] = END
    return pictures, times


def gif(scene, pixel):
    """The bytes of the animation."""
    pictures, times = frames(scene, pixel)
    count, height, width, _ = pictures[0].shape
    zoom = max(1, min(WIDE // (count * width), HIGH // height))
    titles = ("one layer", "a second layer", "a third layer")[:count]
    corners = [(HEADER, MARGIN + i * (width * zoom + MARGIN)) for i in range(count)]
    sheet = background(titles, corners, (height * zoom, width * zoom))
    palette = np.unique(np.concatenate([packed(sheet).ravel(), packed(np.stack(pictures)).ravel()]))
    assert len(palette) <= 256
    channels = np.stack([palette >> 16, palette >> 8 & 255, palette & 255], -1)
    pages = []
    for picture in pictures:
        page = np.searchsorted(palette, packed(sheet)).astype(np.uint8)
        for (top, left), panel in zip(corners, packed(picture), strict=True):
            indices = np.searchsorted(palette, panel).repeat(zoom, 0).repeat(zoom, 1)
            page[top : top + height * zoom, left : left + width * zoom] = indices
        pages.append(Image.fromarray(page))
        pages[-1].putpalette(channels.astype(np.uint8).tobytes())
    buffer = io.BytesIO()
    options = dict(save_all=True, append_images=pages[1:], duration=times, loop=0, optimize=False)
    pages[0].save(buffer, "GIF", **options)
    return buffer.getvalue()


def packed(rgb):
    """Colours (..., 3) uint8 as one number each."""
    return rgb.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1])


def background(titles, corners, extent):
    """What is about the panels in every frame: (H, W, 3) uint8, white with titles and borders.

    Args:
        titles: of the panels.
        corners: their top and left.
        extent: their height and width.
    """
    width = corners[-1][1] + extent[1] + MARGIN
    sheet = Image.new("L", (width, HEADER + extent[0] + MARGIN), 255)
    canvas = ImageDraw.Draw(sheet)
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 14)
    for title, (top, left) in zip(titles, corners, strict=True):
        canvas.text((left + extent[1] // 2, top // 2), title, fill=0, font=font, anchor="mm")
        box = (left - 1, top - 1, left + extent[1], top + extent[0])
        canvas.rectangle(box, outline=190)
    # 16 greys: the letters' edges must leave room in the palette.
    return np.repeat(np.array(sheet)[..., None] // 17 * 17, 3, -1)
