"""The scan where nothing is under way but gradients of first order: one entry of Python a pass.

It calls the ops below the rules of autograd that `_ops` registers for them, which take longer than
the scan of a small map. Whatever else is under way goes the way of `_ops.scan`.
"""

from typing import Any

import torch
from torch import Tensor

from . import _ops
from ._options import Options, op_arguments
from .norms import clamp_norm, has_native_clamp


def plain_scan(
    x: Tensor,
    g: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    options: Options,
    norm: str | None,
) -> Tensor:
    """`_ops.scan` of a weight that is clamped to `norm`, for an x that `runs_natively`."""
    clamps = norm == "spectral" and has_native_clamp(weight)
    if not clamps:
        weight = clamp_norm(weight, norm)
    needs_grad = torch.is_grad_enabled() and torch._C._any_requires_grad(x, g, weight, bias)
    try:
        if needs_grad:
            y: Tensor = _PlainScan.apply(x, g, weight, bias, options, clamps)  # type: ignore[no-untyped-call]
            return y
        return _forward(x, g, weight, bias, options, clamps, False)[0]
    except RuntimeError as error:
        raise _ops.named(error, x) from None


def _forward(
    x: Tensor,
    g: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    options: Options,
    clamps: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """y, the mask, the weight that was scanned with, and what its clamp keeps."""
    weight, kept = weight.contiguous(), None
    bias = None if bias is None else bias.contiguous()
    with torch._C._AutoDispatchBelowAutograd():
        if clamps:
            weight, kept = torch.ops.gatedrnn.clamp_spectral(weight, keep)
        y, mask = torch.ops.gatedrnn.scan(x, g, weight, bias, *op_arguments(options), keep)
    return y, mask, weight, kept


class _PlainScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        g: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        options: Options,
        clamps: bool,
    ) -> Tensor:
        y, mask, scanned, kept = _forward(x, g, weight, bias, options, clamps, True)
        ctx.options, ctx.clamps = options, clamps
        ctx.save_for_backward(x, g, weight, bias, mask, scanned if clamps else None, kept)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # unpacked once: a checkpoint refuses a second time
        inputs = saved[:4]
        if torch.compiler.is_compiling():  # by compiled autograd
            return _backward(ctx, grad, *saved)
        if _ops.no_autograd(grad, *inputs):
            try:
                with torch._C._AutoDispatchBelowAutograd():
                    return _backward(ctx, grad, *saved)
            except RuntimeError as error:
                raise _ops.named(error, grad) from None

        def function(x: Tensor, g: Any, weight: Tensor, bias: Any) -> list[Tensor]:
            weight = clamp_norm(weight, "spectral" if ctx.clamps else None)
            return [_ops.scan(x, g, weight, bias, ctx.options)]

        return *_ops.vjp(function, inputs, ctx.needs_input_grad[:4], [grad]), None, None


def _backward(
    ctx: Any,
    grad: Tensor,
    x: Tensor,
    g: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    scanned: Tensor | None,
    kept: Tensor | None,
) -> tuple[Tensor | None, ...]:
    _, *needs = ctx.needs_input_grad[:4]
    weight = weight.contiguous()
    dx, *others = torch.ops.gatedrnn.scan_backward(
        grad, x, g, scanned if ctx.clamps else weight, None if bias is None else bias.contiguous(),
        mask, *op_arguments(ctx.options), *needs,
    )  # fmt: skip
    dg, dweight, dbias = (t if need else None for t, need in zip(others, needs, strict=True))
    if ctx.clamps and dweight is not None:
        dweight = torch.ops.gatedrnn.clamp_spectral_backward(dweight, weight, kept)
    return dx, dg, dweight, dbias, None, None
