"""The adjoint of a scan, written with scans: what derivatives of any order are made of.

docs/how-it-works/math.md derives the formulas. Everything here is differentiable in both modes.
"""

import torch
from torch import Tensor

from . import _ops
from ._options import ALONG_WIDTH, FROM_END, REVERSED, Options, unknown
from .reference import Nonlinearity


def _per_direction(g: Tensor | None, d: int) -> Tensor | None:
    """The gate map (N, 1|C, H, W) of the d-th direction."""
    return g[:, d] if g is not None and g.dim() == 5 else g


def _single(
    x: Tensor,
    g: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    code: int,
    nonlinearity: Nonlinearity = "identity",
) -> Tensor:
    """One direction's map h (N, C, H, W); gates as they are."""
    bias = None if bias is None else bias[None]
    return _ops.scan(x, g, weight[None], bias, Options((code,), None, nonlinearity))[:, 0]


def _before(h: Tensor, code: int, step: int = 1) -> Tensor:
    """h_{i-1} in the order of the direction (step = -1: h_{i+1}); zero where there is none."""
    axis = 3 if ALONG_WIDTH[code] else 2
    length = h.shape[axis]
    if length == 0:
        return h
    zero = torch.zeros_like(h.narrow(axis, 0, 1))
    if (step == 1) != FROM_END[code]:
        return torch.cat([zero, h.narrow(axis, 0, length - 1)], axis)
    return torch.cat([h.narrow(axis, 1, length - 1), zero], axis)


def _blocks(weight: Tensor) -> Tensor:
    """(C, K) -> (G, K, K)."""
    c, k = weight.shape
    return weight.reshape(c // k, k, k)


def _product(weight: Tensor, h: Tensor) -> Tensor:
    """w h: weight (C, K) applied to the channels of h (N, C, H, W)."""
    n, c, height, width = h.shape
    k = weight.shape[1]
    u = torch.einsum("gck,ngkhw->ngchw", _blocks(weight), h.reshape(n, c // k, k, height, width))
    return u.reshape(h.shape)


def _transposed(weight: Tensor) -> Tensor:
    return _blocks(weight).transpose(1, 2).reshape(weight.shape)


def _outer(e: Tensor, h: Tensor, k: int) -> Tensor:
    """sum over images and pixels of e h^T within each block: (C, K)."""
    n, c, height, width = e.shape
    shape = (n, c // k, k, height, width)
    return torch.einsum("ngchw,ngkhw->gck", e.reshape(shape), h.reshape(shape)).reshape(c, k)


def _slope(nonlinearity: str, h: Tensor) -> Tensor | None:
    """theta'(a) from h = theta(a); None where it is 1."""
    match nonlinearity:
        case "tanh":
            return 1 - h * h
        case "relu":
            return (~(h <= 0)).to(h.dtype)  # 1 where h is NaN, as in PyTorch
        case "sigmoid":
            return h * (1 - h)
        case "identity":
            return None
    raise unknown("nonlinearity", nonlinearity)


def _times(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a * b


def unit_clamp(t: Tensor) -> Tensor:
    """t.clamp(-1, 1), with derivative 1 at the bounds: PyTorch's own is 1 up to 2.13 and then 0."""
    return torch.where((t >= -1) & (t <= 1), t, t.detach().clamp(-1, 1))


def _activated(g: Tensor | None, gate_activation: str | None) -> Tensor | None:
    if g is None:
        return None
    match gate_activation:
        case None:
            return g
        case "clamp":
            return unit_clamp(g)
        case "tanh":
            return torch.tanh(g)
        case "sigmoid":
            return torch.sigmoid(g)
    raise unknown("gate_activation", gate_activation)


def _shares(mask: Tensor, options: Options, dtype: torch.dtype) -> Tensor:
    """Each direction's share of a merged value: (D, N, C, H, W), or (D, 1, 1, 1, 1)."""
    count = len(options.directions)
    match options.merge:
        case "max":
            bits = 1 << torch.arange(count, device=mask.device).view(-1, 1, 1, 1, 1)
            won = ((mask & bits) != 0).to(dtype)
            return won / won.sum(0)
        case "mean":
            share = 1 / count
        case "sum":
            share = 1.0
        case _:
            raise unknown("merge", options.merge)
    return torch.full((count, 1, 1, 1, 1), share, dtype=dtype, device=mask.device)


def adjoint(
    grad: Tensor,
    x: Tensor,
    g: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """dx, dg, dweight, dbias of a scan, by differentiable operations alone.

    e_i = g_i theta'_i xi_i + g_i theta'_i (w^T e_{i+1}): Eq. (3) against the direction.
    """
    dtype = x.dtype
    grad, x = (t.to(weight.dtype) for t in (grad, x))
    g = None if g is None else g.to(weight.dtype)
    k = weight.shape[2]
    if options.merge is not None:
        shares = _shares(mask, options, weight.dtype)
    deltas, dweight, dbias, dgates = [], [], [], []
    with_norm = _activated(g, options.gate_activation)
    for d, code in enumerate(options.directions):
        if options.merge is None:
            xi = grad[:, d]
        else:  # a direction without a share gets 0, of a gradient of infinity too
            xi = torch.where(shares[d] > 0, grad * shares[d], 0)
        gate = _per_direction(with_norm, d)
        h = _single(
            x, gate, weight[d], None if bias is None else bias[d], code, options.nonlinearity
        )
        slope = _slope(options.nonlinearity, h)
        e_gate = _times(gate, slope)
        transposed = _transposed(weight[d])
        drive = xi if e_gate is None else e_gate * xi
        e = _single(drive, e_gate, transposed, None, REVERSED[code])
        delta = xi + _product(transposed, _before(e, code, -1))
        delta = delta if slope is None else slope * delta
        deltas.append(delta)
        h_before = _before(h, code)
        dweight.append(_outer(e, h_before, k))
        dbias.append(e.sum((0, 2, 3)))
        if g is not None:
            u = _product(weight[d], h_before)
            if bias is not None:
                u = u + bias[d][:, None, None]
            dgates.append(delta * u)
    dg = None
    if g is not None:
        dg = torch.stack(dgates, 1)
        dg = dg if g.dim() == 5 else dg.sum(1)
        channel = dg.dim() - 3
        if g.shape[channel] == 1:
            dg = dg.sum(channel, keepdim=True)
        dg = dg * _gate_slope(g, options.gate_activation)
        dg = dg.to(dtype)
    return sum(deltas[1:], deltas[0]).to(dtype), dg, torch.stack(dweight), torch.stack(dbias)


def _gate_slope(g: Tensor, gate_activation: str | None) -> Tensor | float:
    match gate_activation:
        case None:
            return 1.0
        case "clamp":
            return ((g >= -1) & (g <= 1)).to(g.dtype)
        case "tanh":
            return 1 - torch.tanh(g) ** 2
        case "sigmoid":
            y = torch.sigmoid(g)
            return y * (1 - y)
    raise unknown("gate_activation", gate_activation)
