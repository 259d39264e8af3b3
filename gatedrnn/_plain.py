"""The scan where nothing is under way but gradients of first order: one entry of Python a pass.

It calls the ops below the rules of autograd that `_ops` registers for them, which take longer than
the scan of a small map. Whatever else is under way goes the way of `_ops.scan`.
"""

import contextlib
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
        *inputs, mask, scanned, kept = ctx.saved_tensors
        x, g, weight, bias = inputs
        needs = ctx.needs_input_grad[:4]
        compiling = torch.compiler.is_compiling()  # compiled autograd
        if not compiling and not _ops.no_autograd(grad, *inputs):

            def function(x: Tensor, g: Any, weight: Tensor, bias: Any) -> list[Tensor]:
                weight = clamp_norm(weight, "spectral" if ctx.clamps else None)
                return [_ops.scan(x, g, weight, bias, ctx.options)]

            return *_ops.vjp(function, inputs, needs, [grad]), None, None

        raw = weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        with contextlib.nullcontext() if compiling else torch._C._AutoDispatchBelowAutograd():
            dx, dg, dweight, dbias = torch.ops.gatedrnn.scan_backward(
                grad, x, g, scanned if ctx.clamps else raw, bias, mask,
                *op_arguments(ctx.options), *needs[1:],
            )  # fmt: skip
            if ctx.clamps and needs[2]:
                dweight = torch.ops.gatedrnn.clamp_spectral_backward(dweight, raw, kept)
        wanted = (
            dg if needs[1] else None,
            dweight if needs[2] else None,
            dbias if needs[3] else None,
        )
        return dx, *wanted, None, None
