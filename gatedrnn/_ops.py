"""The native ops and everything PyTorch wants to know of them: fake kernels, autograd, vmap, jvp.

Two routes lead to the same kernels. Under `torch.compile` and `torch.export` the registered ops are
called, with `register_autograd`: Dynamo refuses an `autograd.Function` that defines `jvp`.
Otherwise `autograd.Function` is used, for a registered op carries no tangents: forward-mode AD
through it would be zero without a word. Where a compiled function takes such derivatives itself,
the graph is left for it.

All of them differentiate by the same two facts (csrc/README.md): the adjoint of a scan and its
tangent are scans again. `_derivatives` writes them with the scan itself, so that derivatives of
any order need no other kernel.
"""

import importlib.util
import os

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import reference
from ._batching import fold, fold_gate, unfold
from ._derivatives import adjoint, tangent
from ._options import DIRECTIONS, Options, op_arguments

if importlib.util.find_spec("gatedrnn._C") is None:
    raise ImportError(
        f"gatedrnn's native module is not in {os.path.dirname(__file__)}. In a checkout: "
        "`pip install -e .` builds it there; after `pip install .`, start Python in another folder",
        name="gatedrnn",
    )
from . import _C  # loading it registers torch.ops.gatedrnn

# Devices with kernels; on others the reference loop runs.
DEVICES = ("cpu", "meta", *(("cuda",) if _C.build_info()["cuda_architectures"] else ()))

# Seen in 2.11, and not in 2.13: behind a break of the graph what torch.func.vjp returns gives zero.
_GRAPH_CAN_BREAK = torch.__version__ >= "2.13"  # as versions, not as text
_JVP = torch._C._functorch.TransformType.Jvp


# ---- fake kernels ------------------------------------------------------------------------------


def _format_like(model: Tensor) -> torch.memory_format:
    """channels_last when `model` is so and is not also contiguous."""
    if model.dim() != 4 or model.is_contiguous():
        return torch.contiguous_format
    if model.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _check_devices(x: Tensor, *others: Tensor | None) -> None:
    """A single meta tensor brings a call here: nobody must take memory for a result then."""
    for other in others:
        if other is not None and other.device != x.device:
            raise RuntimeError(f"all tensors must be on x's device {x.device}, got {other.device}")


@torch.library.register_fake("gatedrnn::scan")
def _scan_fake(x, g, weight, bias, directions, merge, nonlinearity, gate_norm, keep_mask):
    _check_devices(x, g, weight, bias)
    n, c, h, w = x.shape
    if merge == "none":
        y = x.new_empty((n, len(directions), c, h, w))
    else:
        y = torch.empty_like(x, memory_format=_format_like(x))
    if keep_mask and merge == "max":
        return y, torch.empty_like(y, dtype=torch.uint8)
    return y, x.new_empty((0,), dtype=torch.uint8)


@torch.library.register_fake("gatedrnn::scan_backward")
def _scan_backward_fake(
    grad, x, g, weight, bias, mask, directions, merge, nonlinearity, gate_norm, *needs
):
    _check_devices(x, grad, g, weight, bias, mask)
    needs_g, needs_weight, needs_bias = needs
    nothing = weight.new_empty((0,))
    return (
        torch.empty_like(x, memory_format=_format_like(x)),
        torch.empty_like(g, memory_format=_format_like(g)) if needs_g else nothing,
        torch.empty_like(weight) if needs_weight else nothing.clone(),
        weight.new_empty(weight.shape[:2]) if needs_bias else nothing.clone(),
    )


@torch.library.register_fake("gatedrnn::clamp_spectral")
def _clamp_spectral_fake(weight, keep):
    k = weight.shape[2]
    count = weight.numel() // (k * k) if keep else 0
    return torch.empty_like(weight), weight.new_empty((count, 1 + 2 * k), dtype=torch.float64)


@torch.library.register_fake("gatedrnn::clamp_spectral_backward")
def _clamp_spectral_backward_fake(grad, weight, kept):
    _check_devices(weight, grad, kept)
    return torch.empty_like(weight)


# ---- the registered ops' autograd, for torch.compile and torch.export ----------------------------


def _registered_setup(ctx, inputs, output):
    x, g, weight, bias, directions, merge, nonlinearity, gate_norm, _ = inputs
    ctx.options = Options(tuple(directions), merge, nonlinearity, gate_norm)
    ctx.save_for_backward(x, g, weight, bias, output[1])


def _registered_backward(ctx, grad, _):
    x, g, weight, bias, mask = ctx.saved_tensors
    if ctx.options.merge == "max" and mask.dim() == 1:  # not kept: a gradient was not foreseen
        mask = torch.ops.gatedrnn.scan(x, g, weight, bias, *op_arguments(ctx.options), True)[1]
    _, needs_g, needs_weight, needs_bias = ctx.needs_input_grad[:4]
    needs = needs_g, needs_weight, needs_bias
    dx, dg, dweight, dbias = torch.ops.gatedrnn.scan_backward(
        grad, x, g, weight, bias, mask, *op_arguments(ctx.options), *needs
    )
    return (
        dx,
        dg if needs_g else None,
        dweight if needs_weight else None,
        dbias if needs_bias else None,
        *[None] * 5,
    )


torch.library.register_autograd(
    "gatedrnn::scan", _registered_backward, setup_context=_registered_setup
)


def _clamp_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output[1])


def _clamp_backward(ctx, grad, _):
    weight, kept = ctx.saved_tensors
    if kept.shape[0] == 0:  # nothing was kept: a gradient was not foreseen
        kept = torch.ops.gatedrnn.clamp_spectral(weight, True)[1]
    return torch.ops.gatedrnn.clamp_spectral_backward(grad.contiguous(), weight, kept), None


torch.library.register_autograd(
    "gatedrnn::clamp_spectral", _clamp_backward, setup_context=_clamp_setup
)


def _refuse_second_derivative(ctx, *grads):
    raise RuntimeError(
        "gatedrnn: a compiled or exported scan, and the bare op, have no second derivative; "
        "SpatialGatedRNN and gatedrnn.functional have, where they are not compiled"
    )


for _name in ("scan_backward", "clamp_spectral_backward"):
    torch.library.register_autograd(f"gatedrnn::{_name}", _refuse_second_derivative)


@torch.library.register_vmap("gatedrnn::clamp_spectral")
def _clamp_vmap(info, in_dims, weight, keep):
    folded = weight.movedim(in_dims[0], 0).flatten(0, 1).contiguous()
    results = torch.ops.gatedrnn.clamp_spectral(folded, keep)
    return tuple(t.unflatten(0, (info.batch_size, -1)) for t in results), (0, 0)


# ---- the differentiable scan ---------------------------------------------------------------------


class _Scan(torch.autograd.Function):
    """(y, mask) of a scan; mask carries no gradient."""

    @staticmethod
    def forward(x, g, weight, bias, options, keep_mask):
        return torch.ops.gatedrnn.scan(x, g, weight, bias, *op_arguments(options), keep_mask)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, g, weight, bias, ctx.options, _ = inputs
        mask = output[1]
        ctx.mark_non_differentiable(mask)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, g, weight, bias, mask)
        ctx.save_for_forward(x, g, weight, bias, mask)

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 6
        x, g, weight, bias, mask = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:4]
        tensors = (grad, x, g, weight, bias, mask, ctx.options)
        if forward_ad._current_level >= 0:  # a tangent of this derivative may be asked for
            grads = adjoint(*tensors)
        else:
            grads = _ScanBackward.apply(*tensors, *needs)
        return (
            grads[0],
            *(t if need else None for t, need in zip(grads[1:], needs, strict=True)),
            None,
            None,
        )

    @staticmethod
    def jvp(ctx, x_t, g_t, weight_t, bias_t, *_):
        *primals, mask = ctx.saved_tensors
        y_t = tangent(primals, (x_t, g_t, weight_t, bias_t), mask, ctx.options)
        return y_t, None

    @staticmethod
    def vmap(info, in_dims, x, g, weight, bias, options, keep_mask):
        size = info.batch_size
        channels = weight.shape[2 if in_dims[2] is not None and in_dims[2] <= 1 else 1]
        y, mask = _Scan.apply(
            fold(x, in_dims[0], size, 1),
            fold_gate(g, in_dims[1], size, channels),
            fold(weight, in_dims[2], size, 1),
            fold(bias, in_dims[3], size, 1),
            options,
            keep_mask,
        )
        y = unfold(y, size, 2 if options.merge == "none" else 1)
        if mask.dim() == 1:
            return (y, mask), (0, None)
        return (y, unfold(mask, size, 1)), (0, 0)


class _ScanBackward(torch.autograd.Function):
    """dx, dg, dweight, dbias by the fused kernel; its own gradients by those of `adjoint`."""

    @staticmethod
    def forward(grad, x, g, weight, bias, mask, options, *needs):
        return torch.ops.gatedrnn.scan_backward(
            grad, x, g, weight, bias, mask, *op_arguments(options), *needs
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.options, needs_g, needs_weight, needs_bias = inputs
        ctx.needs = (True, needs_g, needs_weight, needs_bias)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *cotangents):
        *tensors, mask = ctx.saved_tensors
        present = [i for i, t in enumerate(tensors) if t is not None]

        def function(*given):
            full = [None] * 5
            for i, t in zip(present, given, strict=True):
                full[i] = t
            results = adjoint(*full, mask, ctx.options)
            return tuple(r for r, need in zip(results, ctx.needs, strict=True) if need)

        results, vjp = torch.func.vjp(function, *(tensors[i] for i in present))
        wanted = [c for c, need in zip(cotangents, ctx.needs, strict=True) if need]
        wanted = [
            torch.zeros_like(r) if c is None else c for r, c in zip(results, wanted, strict=True)
        ]
        grads = [None] * 10
        for i, t in zip(present, vjp(tuple(wanted)), strict=True):
            grads[i] = t
        return tuple(grads)

    @staticmethod
    def vmap(info, in_dims, grad, x, g, weight, bias, mask, options, *needs):
        size = info.batch_size
        channels = weight.shape[2 if in_dims[3] is not None and in_dims[3] <= 1 else 1]
        channel = 2 if options.merge == "none" else 1
        gate = fold_gate(g, in_dims[2], size, channels)
        if g is not None and gate is g:  # each sample wants a gradient of its own
            shape = list(g.shape)
            shape[-3] = channels
            gate = fold(g.expand(shape), None, size, g.dim() - 3)
        folded_mask = (
            mask if mask.dim() - (in_dims[5] is not None) == 1 else fold(mask, in_dims[5], size, 1)
        )
        if folded_mask is mask and in_dims[5] is not None:
            folded_mask = mask.select(in_dims[5], 0)
        dx, dg, dweight, dbias = _ScanBackward.apply(
            fold(grad, in_dims[0], size, channel),
            fold(x, in_dims[1], size, 1),
            gate,
            fold(weight, in_dims[3], size, 1),
            fold(bias, in_dims[4], size, 1),
            folded_mask,
            options,
            *needs,
        )
        if needs[0]:
            dg = unfold(dg, size, g.dim() - (in_dims[2] is not None) - 3)
            logical = [s for i, s in enumerate(g.shape) if i != in_dims[2]]
            if logical[-3] == 1:
                dg = dg.sum(-3, keepdim=True)
        results = [unfold(dx, size, 1), dg]
        results += [
            unfold(t, size, 1) if need else t
            for t, need in zip((dweight, dbias), needs[1:], strict=True)
        ]
        dims = [0] + [0 if need else None for need in needs]
        return tuple(results), tuple(dims)


def scan(x, g, weight, bias, options: Options) -> Tensor:
    """y of a scan (N, C, H, W), or (N, D, C, H, W) without a merge; differentiable to any order.

    Tensors as the op wants them: g in x's dtype, weight and bias in the state's and contiguous.
    """
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    tensors = (x, g, weight, bias)
    if torch.compiler.is_compiling():
        if is_differentiated():
            from . import _tracing

            return (_tracing.scan_eagerly if _GRAPH_CAN_BREAK else _reference)(*tensors, options)
        keep_mask = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in tensors
        )
        return torch.ops.gatedrnn.scan(*tensors, *op_arguments(options), keep_mask)[0]
    if is_plain(*tensors):
        return torch.ops.gatedrnn.scan(*tensors, *op_arguments(options), False)[0]
    if has_nested_tangents():
        return _reference(*tensors, options)
    return _Scan.apply(*tensors, options, options.merge == "max")[0]


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether no derivative can be asked for: no gradients, tangents, transforms or tracing."""
    return not is_transformed() and not (
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    )


def is_transformed() -> bool:
    """Whether tangents or a transform may be under way, or a graph is traced."""
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def has_nested_tangents() -> bool:
    """Whether the tangent of a tangent is taken. PyTorch runs a Function's `jvp` with forward-mode
    AD switched off, so that it would be zero without a word; plain operations have it."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    return sum(level.key() == _JVP for level in stack) > 1


def is_differentiated() -> bool:
    """Whether, in a function that is traced, torch.func takes a gradient or a tangent or a dual
    level is open. The latter is read where Dynamo sees it, and compiles anew when it changes."""
    from . import _tracing

    return forward_ad._current_level >= 0 or _tracing.func_differentiates()


def _reference(x, g, weight, bias, options: Options) -> Tensor:
    return reference.spatial_gated_rnn(
        x,
        g,
        weight,
        bias,
        directions=[DIRECTIONS[code] for code in options.directions],
        merge=None if options.merge == "none" else options.merge,
        nonlinearity=options.nonlinearity,
        gate_norm=None if options.gate_norm == "none" else options.gate_norm,
    )
