"""How a pixel spreads through a spatial gated RNN, which direction wins, and whom a pixel hears."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gatedrnn.functional import spatial_gated_rnn

SIZE, ROW, COLUMN = 41, 12, 10  # of the hand-made map, and a pixel in it
WEIGHT = 0.94  # of every gate map without a network: what is passed on fades to half in 11 pixels
LAYERS = 3  # a path that turns two corners
TIE = 4  # after the four directions, in the order of gatedrnn.DIRECTIONS


class Scene(NamedTuple):
    """What a layer reads, and its weights; `layers` of them follow one another."""

    x: Tensor  # (1, C, H, W)
    g: Tensor  # (1, 1 or C, H, W), -1 .. 1
    weight: Tensor  # (4, C, C)
    bias: Tensor | None = None  # (4, C)
    layers: int = 1

    @property
    def gate(self) -> Tensor:
        """(H, W): how open the gates are, 0 .. 1: the mean of |g| over channels."""
        return self.g[0].abs().mean(0)


def walls() -> Tensor:
    """(SIZE, SIZE): 1, but 0 on two walls, one with a gap, and around a closed room."""
    g = torch.ones(SIZE, SIZE)
    g[:34, 22] = 0
    g[ROW - 1 : ROW + 2, 22] = 1
    g[27, 3:18] = 0
    g[19:35, 28:38] = 0
    g[20:34, 29:37] = 1
    return g


def scene_of_gate(gate: Tensor) -> Scene:
    """A gate map (H, W), one channel, and x = 1 everywhere: all pixels have the same to say."""
    weight = torch.full((4, 1, 1), WEIGHT, dtype=gate.dtype)
    return Scene(torch.ones_like(gate)[None, None], gate[None, None], weight, layers=LAYERS)


def size(h: Tensor) -> Tensor:
    """(..., C, H, W) to (..., H, W): root mean square over the channels; |h| where C = 1."""
    return h.square().mean(-3).sqrt()


def output(scene: Scene) -> Tensor:
    """(1, C, H, W): what the last layer makes of x."""
    y = scene.x
    for _ in range(scene.layers):
        y = spatial_gated_rnn(y, scene.g, scene.weight, scene.bias)
    return y


def impulse(scene: Scene, pixel: tuple[int, int]) -> Tensor:
    """(1, C, H, W): 1 in all channels of the pixel, 0 elsewhere."""
    x = torch.zeros_like(scene.x)
    x[..., pixel[0], pixel[1]] = 1
    return x


def spread(scene: Scene, pixel: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """What becomes of an impulse, without the bias, which would spread from every pixel.

    A direction is linear, so that its map is also what the impulse adds to any other x.

    Returns:
        (4, C, H, W), the four directions of one layer; and (layers, C, H, W), the layer's maximum,
        then the one of a second layer that reads it, and so on.
    """
    x = impulse(scene, pixel)
    maps = spatial_gated_rnn(x, scene.g, scene.weight, merge=None)[0]
    merged = []
    for _ in range(scene.layers):
        x = spatial_gated_rnn(x, scene.g, scene.weight)
        merged.append(x[0])
    return maps, torch.stack(merged)


def winners(scene: Scene) -> Tensor:
    """The direction that gives one layer's maximum, at each pixel.

    Each channel has its own winner. The one returned is that of the channel in which the choice
    matters most, whose largest and smallest map are farthest apart.

    Returns:
        (H, W) int64, an index into `gatedrnn.DIRECTIONS`, or `TIE` where several give the maximum,
        as all four do where a gate is closed.
    """
    maps = spatial_gated_rnn(scene.x, scene.g, scene.weight, scene.bias, merge=None)[0]
    channel = (maps.amax(0) - maps.amin(0)).argmax(0)  # (H, W)
    maps = maps.gather(1, channel.expand(len(maps), 1, -1, -1))[:, 0]  # (4, H, W)
    attained = maps == maps.amax(0)
    return torch.where(attained.sum(0) > 1, TIE, attained.int().argmax(0))


def influence(scene: Scene, pixel: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Whom the pixel hears: |dy/dx| and |dy/dg| by one backward pass through all layers.

    y is the sum over the channels at the pixel, and || the Euclidean norm over those of x and g.

    Returns:
        (H, W) twice, of x and of g.
    """
    x, g = scene.x.detach().requires_grad_(), scene.g.detach().requires_grad_()
    y = output(scene._replace(x=x, g=g))
    target = y[0, :, pixel[0], pixel[1]].sum()
    dx, dg = torch.autograd.grad(target, (x, g))
    return dx[0].norm(dim=0), dg[0].norm(dim=0)


def steps(x: Tensor, g: Tensor, weight: Tensor) -> Iterator[Tensor]:
    """The four recurrences, Eq. (3), one step at a time, at all pixels at once.

    A step takes h of the pixel behind as the step before left it. After k steps a map holds all
    that comes from fewer than k pixels behind, and at last what the scan gives.

    Args:
        x, g, weight: as in :class:`Scene`.

    Yields:
        h (4, C, H, W), the first time x itself, until a step changes nothing.
    """
    h = x.expand(4, -1, -1, -1)
    while True:
        yield h
        behind = torch.zeros_like(h)
        behind[0, ..., 1:] = h[0, ..., :-1]
        behind[1, ..., :-1] = h[1, ..., 1:]
        behind[2, ..., 1:, :] = h[2, ..., :-1, :]
        behind[3, ..., :-1, :] = h[3, ..., 1:, :]
        after = x + g * torch.einsum("dck,dkhw->dchw", weight, behind)
        if torch.equal(after, h):
            return
        h = after


def waves(scene: Scene, pixel: tuple[int, int]) -> list[Tensor]:
    """The impulse of :func:`spread` under way: for each layer, its maximum after each step.

    Returns:
        (steps, C, H, W) for each layer; the last step is what the layer after it reads.
    """
    x, layers = impulse(scene, pixel), []
    for _ in range(scene.layers):
        layers.append(torch.stack([h.amax(0) for h in steps(x, scene.g, scene.weight)]))
        x = layers[-1][-1:]
    return layers
