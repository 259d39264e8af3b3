"""vmap: a batch of scans is one scan with more groups, the batch folded into the channels.

Each rule takes an op's arguments with the place of the batch in each, or None, and returns the
op's results with theirs.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from . import _ops
from ._options import MERGES

Dims = Sequence[int | None]  # the place of the batch in each tensor
Results = tuple[Any, tuple[int | None, ...]]


def scan(
    info: Any,
    in_dims: Dims,
    x: Tensor,
    g: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    directions: list[int],
    merge: int,
    *rest: Any,
) -> Results:
    size, tensors = _not_empty(info.batch_size, in_dims, (x, g, weight, bias))
    x, g, weight, bias = tensors
    channels = _logical(weight, in_dims[2])[1]
    y, mask = _ops.scan_op(
        _fold(x, in_dims[0], size, 1),
        _fold_gate(g, in_dims[1], size, channels),
        _fold(weight, in_dims[2], size, 1).contiguous(),  # of one channel it is a view
        None if bias is None else _fold(bias, in_dims[3], size, 1).contiguous(),
        directions,
        merge,
        *rest,
    )
    separate = MERGES[merge] is None
    y = _unfold(y, size, 2 if separate else 1)[: info.batch_size]
    if mask.dim() == 1:
        return (y, mask), (0, None)
    return (y, _unfold(mask, size, 1)[: info.batch_size]), (0, 0)


def scan_backward(
    info: Any,
    in_dims: Dims,
    grad: Tensor,
    x: Tensor,
    g: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    directions: list[int],
    merge: int,
    *rest: Any,
) -> Results:
    needs = rest[2:]
    size, tensors = _not_empty(info.batch_size, in_dims, (grad, x, g, weight, bias, mask))
    grad, x, g, weight, bias, mask = tensors
    channels = _logical(weight, in_dims[3])[1]
    gate = _fold_gate(g, in_dims[2], size, channels)
    if gate is g and g is not None:  # each sample wants a gradient of its own
        shape = list(g.shape)
        shape[-3] = channels
        gate = _fold(g.expand(shape), None, size, g.dim() - 3)
    if len(_logical(mask, in_dims[5])) > 1:
        mask = _fold(mask, in_dims[5], size, 1)
    elif in_dims[5] is not None:
        mask = mask.select(in_dims[5], 0)
    dx, dg, dweight, dbias = _ops.scan_backward_op(
        _fold(grad, in_dims[0], size, 2 if MERGES[merge] is None else 1),
        _fold(x, in_dims[1], size, 1),
        gate,
        _fold(weight, in_dims[3], size, 1).contiguous(),
        None if bias is None else _fold(bias, in_dims[4], size, 1).contiguous(),
        mask,
        directions,
        merge,
        *rest,
    )
    if needs[0]:
        assert g is not None
        logical = _logical(g, in_dims[2])
        dg = _unfold(dg, size, len(logical) - 3)
        if logical[-3] == 1:
            dg = dg.sum(-3, keepdim=True)
    results = [_unfold(dx, size, 1), dg]
    results += [
        _unfold(t, size, 1) if need else t
        for t, need in zip((dweight, dbias), needs[1:], strict=True)
    ]
    dims = [0] + [0 if need else None for need in needs]
    results = [
        t if dim is None else t[: info.batch_size] for t, dim in zip(results, dims, strict=True)
    ]
    return tuple(results), tuple(dims)


def clamp_spectral(info: Any, in_dims: Dims, weight: Tensor, keep: bool) -> Results:
    size, (weight,) = _not_empty(info.batch_size, in_dims, (weight,))
    folded = weight.movedim(cast(int, in_dims[0]), 0).flatten(0, 1).contiguous()
    clamped, kept = torch.ops.gatedrnn.clamp_spectral(folded, keep)
    results = _unfold(clamped, size, 0), _unfold(kept, size, 0)
    return tuple(t[: info.batch_size] for t in results), (0, 0)


def _not_empty(size: int, in_dims: Dims, tensors: Sequence[Any]) -> tuple[int, Sequence[Any]]:
    """A batch of no samples gets one of zeros, for which there is a scan."""
    if size > 0:
        return size, tensors

    def with_one(tensor: Tensor, dim: int) -> Tensor:
        shape = list(tensor.shape)
        shape[dim] = 1
        return torch.cat([tensor, tensor.new_zeros(shape)], dim)

    return 1, [
        t if t is None or dim is None else with_one(t, dim)
        for t, dim in zip(tensors, in_dims, strict=False)
    ]


def _logical(tensor: Tensor, bdim: int | None) -> list[int]:
    """The shape of one sample."""
    return [s for i, s in enumerate(tensor.shape) if i != bdim]


def _fold(tensor: Tensor, bdim: int | None, size: int, channel: int) -> Tensor:
    """Moves the batch into the channel dimension: (..., B * C, ...)."""
    if bdim is None:
        tensor = tensor.unsqueeze(channel).expand(
            *tensor.shape[:channel], size, *tensor.shape[channel:]
        )
    else:
        tensor = tensor.movedim(bdim, channel)
    return tensor.flatten(channel, channel + 1)


def _fold_gate(g: Tensor | None, bdim: int | None, size: int, channels: int) -> Tensor | None:
    if g is None:
        return None
    shape = _logical(g, bdim)
    channel = len(shape) - 3
    if shape[channel] == 1 and bdim is None:
        return g
    shape[channel] = channels
    if bdim is None:
        return _fold(g.expand(shape), None, size, channel)
    return _fold(g.movedim(bdim, 0).expand(size, *shape), 0, size, channel)


def _unfold(tensor: Tensor, size: int, channel: int) -> Tensor:
    """(..., B * C, ...) -> (B, ..., C, ...)."""
    parts = tensor.shape[channel] // size
    split: Tensor = tensor.unflatten(channel, (size, parts))
    return split.movedim(channel, 0)
