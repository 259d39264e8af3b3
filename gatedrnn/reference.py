"""The spatially variant RNN as a plain PyTorch loop: slow, readable, the truth of the tests.

Imports torch alone. Every derivative comes from autograd through the loop.
"""

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Direction = Literal["left_to_right", "right_to_left", "top_to_bottom", "bottom_to_top"]
Integration = Literal["parallel", "cascade"]
Merge = Literal["max", "mean", "sum"]
Nonlinearity = Literal["identity", "tanh", "relu", "sigmoid"]
GateActivation = Literal["clamp", "tanh", "sigmoid"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)

# A direction is (axis, reverse): the axis of (N, C, H, W) that is scanned, and from which end.
_SCANS: dict[Direction, tuple[int, bool]] = {
    "left_to_right": (3, False),
    "right_to_left": (3, True),
    "top_to_bottom": (2, False),
    "bottom_to_top": (2, True),
}

_THETA: dict[Nonlinearity, Callable[[Tensor], Tensor]] = {
    "identity": lambda a: a,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
}


def _clamp(g: Tensor) -> Tensor:
    """g.clamp(-1, 1) with a derivative of 1 at |g| = 1 exactly, whatever PyTorch's own is there."""
    return torch.where((g >= -1) & (g <= 1), g, g.detach().clamp(-1, 1))


_GATE_ACTIVATION: dict[GateActivation | None, Callable[[Tensor], Tensor]] = {
    None: lambda g: g,
    "clamp": _clamp,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}

_MERGE: dict[Merge | None, Callable[[Tensor], Tensor]] = {
    "max": lambda maps: maps.amax(1),  # splits the gradient of a tie evenly, propagates NaN
    "mean": lambda maps: maps.mean(1),
    "sum": lambda maps: maps.sum(1),
    None: lambda maps: maps,
}


def _scan(
    x: Tensor, g: Tensor | None, w: Tensor, b: Tensor, direction: Direction, theta: Nonlinearity
) -> Tensor:
    """One direction, Eq. (3). x (N, C, H, W); g (N, 1|C, H, W) or None; w (C, K); b (C,)."""
    axis, reverse = _SCANS[direction]
    n, c = x.shape[:2]
    k = w.shape[1]
    w = w.reshape(c // k, k, k)
    maps: list[Tensor] = []
    if x.shape[axis] == 0:
        return x.clone()
    h = x.new_zeros(()).expand(x.select(axis, 0).shape)  # (N, C, L)
    for i in range(x.shape[axis])[:: -1 if reverse else 1]:
        u = (w[..., None] * h.unflatten(1, (c // k, 1, k))).sum(3).flatten(1, 2)
        u = u + b[:, None]
        if g is not None:
            u = g.select(axis, i) * u
        h = _THETA[theta](x.select(axis, i) + u)
        maps.append(h)
    if reverse:
        maps.reverse()
    return torch.stack(maps, axis)


def spatial_gated_rnn(
    x: Tensor,
    g: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    directions: Sequence[Direction] = DIRECTIONS,
    integration: Integration = "parallel",
    merge: Merge | None = "max",
    nonlinearity: Nonlinearity = "identity",
    gate_activation: GateActivation | None = None,
) -> Tensor:
    """Reference of `gatedrnn.functional.spatial_gated_rnn`: same signature, same result.

    16-bit inputs are computed in float32 and rounded once (in a cascade: once a stage).
    """
    dtype = x.dtype
    state = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    weight = weight.to(state)
    bias = weight.new_zeros(weight.shape[:2]) if bias is None else bias.to(state)
    if g is not None:
        g = _GATE_ACTIVATION[gate_activation](g.to(state))

    maps = []
    for d, direction in enumerate(directions):
        g_d = g[:, d] if g is not None and g.dim() == 5 else g
        h = _scan(x.to(state), g_d, weight[d], bias[d], direction, nonlinearity)
        if integration == "cascade":
            x = h.to(dtype)
        maps.append(h)
    if integration == "cascade":
        return x
    return _MERGE[merge](torch.stack(maps, 1)).to(dtype)
