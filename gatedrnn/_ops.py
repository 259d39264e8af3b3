"""The native ops and everything PyTorch needs to know of them: fake kernels, autograd and vmap.

The rules of autograd and vmap exist once, and are registered for the ops. The transforms of
torch.func nest only an `autograd.Function`, so there is one of the same rules for each op. The
adjoint of a scan is a scan again (docs/how-it-works/math.md): `_derivatives` writes it with scans,
so that derivatives of any order need no other kernel.

A registered op carries no tangents: forward-mode AD through it would silently give zero. So every
call that may take part in forward-mode AD runs the reference loop (`may_have_tangents`).
"""

import contextlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from . import _vmap, reference
from ._derivatives import adjoint
from ._options import DIRECTIONS, MERGES, Options, op_arguments, options_of

if importlib.util.find_spec("gatedrnn._C") is None:
    raise ImportError(
        f"gatedrnn's native module is not in {os.path.dirname(__file__)}. In a checkout: "
        "`pip install -e .` builds it there; after `pip install .`, start Python in another folder",
        name="gatedrnn",
    )
from . import _C  # loading it registers torch.ops.gatedrnn

# Devices with kernels; on others the reference loop runs.
ARCHITECTURES: tuple[str, ...] = _C.build_info()["cuda_architectures"]
DEVICES = ("cpu", "meta", *(("cuda",) if ARCHITECTURES else ()))

# Seen in 2.11, and not in 2.13: behind a break of the graph what torch.func.vjp returns gives zero.
_GRAPH_CAN_BREAK = torch.__version__ >= "2.13"  # as versions, not as text
_JVP = torch._C._functorch.TransformType.Jvp


# ---- fake kernels ------------------------------------------------------------------------------


def _is_dense(t: Tensor, dims: tuple[int, ...]) -> bool:
    """As is_dense in csrc/ops.cpp. What cannot be known of symbolic sizes counts as different."""
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    expected = 1
    for dim in reversed(dims):
        if guard_or_false(t.shape[dim] == 1):
            continue
        if not guard_or_false(t.stride(dim) == expected):
            return False
        expected = expected * t.shape[dim]
    return True


def _format_like(model: Tensor) -> torch.memory_format:
    """channels_last when `model` is so and is not also contiguous."""
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    if model.dim() != 4 or guard_or_false(model.numel() == 0) or _is_dense(model, (0, 1, 2, 3)):
        return torch.contiguous_format
    return torch.channels_last if _is_dense(model, (0, 2, 3, 1)) else torch.contiguous_format


def _check_devices(x: Tensor, *others: Tensor | None) -> None:
    """A single meta tensor brings a call here: nobody must take memory for a result then."""
    for other in others:
        if other is not None and other.device != x.device:
            raise RuntimeError(f"all tensors must be on x's device {x.device}, got {other.device}")


def _scan_fake(
    x: Tensor,
    g: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    directions: list[int],
    merge: int,
    nonlinearity: int,
    gate_activation: int,
    keep_mask: bool,
) -> tuple[Tensor, Tensor]:
    _check_devices(x, g, weight, bias)
    n, c, h, w = x.shape
    if MERGES[merge] is None:
        y = x.new_empty((n, len(directions), c, h, w))
    else:
        y = torch.empty_like(x, memory_format=_format_like(x))
    if keep_mask and MERGES[merge] == "max":
        return y, torch.empty_like(y, dtype=torch.uint8)
    return y, x.new_empty((0,), dtype=torch.uint8)


def _scan_backward_fake(
    grad: Tensor,
    x: Tensor,
    g: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    directions: list[int],
    merge: int,
    nonlinearity: int,
    gate_activation: int,
    *needs: bool,
) -> tuple[Tensor, ...]:
    _check_devices(x, grad, g, weight, bias, mask)
    needs_g, needs_weight, needs_bias = needs
    nothing = weight.new_empty((0,))
    return (
        torch.empty_like(x, memory_format=_format_like(x)),
        torch.empty_like(g, memory_format=_format_like(g))
        if needs_g and g is not None
        else nothing,
        torch.empty_like(weight) if needs_weight else nothing.clone(),
        weight.new_empty(weight.shape[:2]) if needs_bias else nothing.clone(),
    )


def _clamp_spectral_fake(weight: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    k = weight.shape[2]
    count = weight.numel() // (k * k) if keep else 0
    return torch.empty_like(weight), weight.new_empty((count, 1 + 2 * k), dtype=torch.float64)


def _clamp_spectral_backward_fake(grad: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    _check_devices(weight, grad, kept)
    return torch.empty_like(weight)


# ---- autograd ------------------------------------------------------------------------------------


def _scan_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, g, weight, bias, *options, _ = inputs
    ctx.options = options_of(*options)
    ctx.save_for_backward(x, g, weight, bias, output[1])


def _scan_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    x, g, weight, bias, mask = ctx.saved_tensors
    arguments = op_arguments(ctx.options)
    if ctx.options.merge == "max" and mask.dim() == 1:  # not kept: a gradient was not foreseen
        mask = scan_op(x, g, weight, bias, *arguments, True)[1]
    needs = ctx.needs_input_grad[1:4]
    tensors = grad, x, g, weight, bias, mask
    if may_have_tangents(*tensors):
        with no_autocast(x):
            grads = adjoint(*tensors, ctx.options)
    else:
        grads = scan_backward_op(*tensors, *arguments, *needs)
    wanted = (t if need else None for t, need in zip(grads[1:], needs, strict=True))
    return grads[0], *wanted, *[None] * 5


def _adjoint_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    (
        *tensors,
        directions,
        merge,
        nonlinearity,
        gate_activation,
        needs_g,
        needs_weight,
        needs_bias,
    ) = inputs
    ctx.options = options_of(directions, merge, nonlinearity, gate_activation)
    ctx.needs = True, needs_g, needs_weight, needs_bias
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _adjoint_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, mask = ctx.saved_tensors
    given = [i for i, t in enumerate(cotangents) if t is not None and ctx.needs[i]]

    def function(*inputs: Any) -> list[Any]:
        grad, x, g, weight, bias = inputs
        results = adjoint(grad, x, g, weight, bias, mask, ctx.options)
        return [results[i] for i in given]

    with no_autocast(mask):
        grads = vjp(function, tensors, ctx.needs_input_grad[:5], [cotangents[i] for i in given])
    return *grads, *[None] * 8


def vjp(
    function: Callable[..., list[Any]],
    tensors: Sequence[Any],
    needs: Sequence[bool],
    cotangents: list[Any],
) -> list[Tensor | None]:
    """The gradients of those `tensors` that need one; `function` returns a list of results."""
    asked = [i for i, need in enumerate(needs) if need]

    def of_asked(*inputs: Tensor) -> list[Any]:
        given = dict(zip(asked, inputs, strict=True))
        return function(*(given.get(i, t) for i, t in enumerate(tensors)))

    grads = dict(zip(asked, _vjp(of_asked, [tensors[i] for i in asked], cotangents), strict=True))
    return [grads.get(i) for i in range(len(tensors))]


def _vjp(function: Callable[..., list[Any]], inputs: list[Tensor], cotangents: list[Any]) -> Any:
    if in_transform():  # where autograd.grad does not see through a batch
        return torch.func.vjp(function, *inputs)[1](cotangents)
    # Not torch.func.vjp, which refuses hooks on saved tensors, such as those of checkpoints.
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [t.view_as(t) for t in inputs]  # gradients stop here, their own graph goes on
        # A result may depend on none of the inputs: dx of a linear scan does not depend on x.
        pairs = [
            (result, cotangent)
            for result, cotangent in zip(function(*inputs), cotangents, strict=True)
            if result.requires_grad
        ]
        if not pairs:
            return [None] * len(inputs)
        results, cotangents = map(list, zip(*pairs, strict=True))
        return torch.autograd.grad(
            results, inputs, cotangents, create_graph=create_graph, allow_unused=True
        )


def _clamp_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], output[1])


def _clamp_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None]:
    weight, kept = ctx.saved_tensors
    if kept.shape[0] == 0:  # nothing was kept: a gradient was not foreseen
        kept = torch.ops.gatedrnn.clamp_spectral(weight, True)[1]
    return torch.ops.gatedrnn.clamp_spectral_backward(grad.contiguous(), weight, kept), None


def _refuse_second_derivative(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "gatedrnn: the clamp of a compiled or exported layer, and the bare op, have no second "
        "derivative. SpatialGatedRNN has all derivatives where it is not compiled"
    )


# ---- registration --------------------------------------------------------------------------------


def register(library: str) -> None:
    """Registers the rules for the ops of torch.ops.<library>."""
    for name, fake, setup, backward, vmap in (
        ("scan", _scan_fake, _scan_setup, _scan_backward, _vmap.scan),
        ("scan_backward", _scan_backward_fake, _adjoint_setup, _adjoint_backward,
         _vmap.scan_backward),
        ("clamp_spectral", _clamp_spectral_fake, _clamp_setup, _clamp_backward,
         _vmap.clamp_spectral),
        ("clamp_spectral_backward", _clamp_spectral_backward_fake, None,
         _refuse_second_derivative, None),
    ):  # fmt: skip
        op = f"{library}::{name}"
        torch.library.register_fake(op, fake)
        torch.library.register_autograd(op, backward, setup_context=setup)
        if vmap is not None:
            torch.library.register_vmap(op, vmap)


register("gatedrnn")


@register_flop_formula(torch.ops.gatedrnn.scan)
def scan_flops(x: Any, g: Any, weight: Any, *_: Any, **__: Any) -> int:
    """Two for each multiply-add of Eq. (3), from shapes; as for PyTorch's own operations, nothing
    is counted for additions, nonlinearities and merges."""
    n, _, height, width = x
    directions, c, k = weight
    return int(2 * n * height * width * directions * c * (k + (g is not None)))


@register_flop_formula(torch.ops.gatedrnn.scan_backward)
def scan_backward_flops(
    grad: Any, x: Any, g: Any, weight: Any, bias: Any, mask: Any, *options: Any, **__: Any
) -> int:
    """The products with w once more and with w^T, and of e and h where dweight is asked for."""
    n, _, height, width = x
    directions, c, k = weight
    needs_g, needs_weight = options[4:6]
    products = 2 * k + k * needs_weight + (g is not None) * (2 + needs_g)
    return int(2 * n * height * width * directions * c * products)


class _Scan(torch.autograd.Function):
    """The op `scan`, for the transforms of torch.func."""

    setup_context = staticmethod(_scan_setup)
    backward = staticmethod(_scan_backward)
    vmap = staticmethod(_vmap.scan)

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return torch.ops.gatedrnn.scan(*arguments)


class _ScanBackward(torch.autograd.Function):
    """The op `scan_backward`, for the transforms of torch.func."""

    setup_context = staticmethod(_adjoint_setup)
    backward = staticmethod(_adjoint_backward)
    vmap = staticmethod(_vmap.scan_backward)

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return torch.ops.gatedrnn.scan_backward(*arguments)


def scan_op(*arguments: Any) -> tuple[Tensor, Tensor]:
    results: tuple[Tensor, Tensor] = _call("scan", _Scan, arguments)
    return results


def scan_backward_op(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results: tuple[Tensor, Tensor, Tensor, Tensor] = _call(
        "scan_backward", _ScanBackward, arguments
    )
    return results


def _call(name: str, function: type[torch.autograd.Function], arguments: tuple[Any, ...]) -> Any:
    op = getattr(torch.ops.gatedrnn, name)
    if torch.compiler.is_compiling():
        return op(*arguments)
    try:
        return (function.apply if in_transform() else op)(*arguments)
    except RuntimeError as error:
        raise named(error, arguments[0]) from None


def named(error: RuntimeError, x: Tensor) -> RuntimeError:
    """The error, as PyTorch's own where a GPU has no memory left."""
    if x.is_cuda and "gatedrnn: out of memory" in str(error):
        return torch.OutOfMemoryError(str(error))
    return error


# ---- the differentiable scan ---------------------------------------------------------------------


def scan(
    x: Tensor, g: Tensor | None, weight: Tensor, bias: Tensor | None, options: Options
) -> Tensor:
    """y of a scan (N, C, H, W), or (N, D, C, H, W) without a merge; differentiable to any order.

    Tensors as the op wants them: g in x's dtype, weight and bias in the state's and contiguous.
    """
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    tensors = (x, g, weight, bias)
    if torch.compiler.is_compiling():
        if is_differentiated():
            from . import _tracing

            return (_tracing.scan_eagerly if _GRAPH_CAN_BREAK else by_reference)(*tensors, options)
    elif may_have_tangents(*tensors):
        return by_reference(*tensors, options)
    keep_mask = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return scan_op(*tensors, *op_arguments(options), keep_mask)[0]


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Off, since autocast would run the products of a state of 32 bits in 16."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


def by_reference(
    x: Tensor, g: Tensor | None, weight: Tensor, bias: Tensor | None, options: Options
) -> Tensor:
    with no_autocast(x):
        return reference.spatial_gated_rnn(
            x,
            g,
            weight,
            bias,
            directions=[DIRECTIONS[code] for code in options.directions],
            merge=options.merge,
            nonlinearity=options.nonlinearity,
            gate_activation=options.gate_activation,
        )


# ---- what is under way ---------------------------------------------------------------------------


def runs_natively(x: object) -> bool:
    """Whether a scan of `x` needs the native ops and their gradients, and nothing else."""
    return (
        type(x) is Tensor
        and (x.is_cpu or (x.is_cuda and "cuda" in DEVICES))
        and not torch.compiler.is_compiling()
        and not in_transform()
        and forward_ad._current_level < 0  # of any thread
    )


def no_autograd(*tensors: Tensor | None) -> bool:
    """Whether no derivative can be asked for: no gradients, tangents, transforms or tracing."""
    return not is_transformed(*tensors) and not (
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    )


def is_transformed(*tensors: Tensor | None) -> bool:
    """Whether tangents or a transform of torch.func may be under way, or a graph is traced."""
    return torch.compiler.is_compiling() or in_transform() or may_have_tangents(*tensors)


def in_transform() -> bool:
    """Whether a transform of torch.func is under way in this thread, outside of a traced graph."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is not None
    )


def may_have_tangents(*tensors: Tensor | None) -> bool:
    """Whether forward-mode AD may be under way for one of these tensors."""
    if forward_ad._current_level < 0:  # of any thread
        return False
    # Below the wrappers of a transform a tangent may lie, whatever the transform is.
    if torch._C._functorch.get_interpreter_stack():  # of this thread
        return True
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def has_nested_tangents() -> bool:
    """Whether the tangent of a tangent is taken. PyTorch runs a Function's `jvp` with forward-mode
    AD switched off, so that it would silently be zero; plain operations have it."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    return sum(level.key() == _JVP for level in stack) > 1


def is_differentiated() -> bool:
    """Whether, in a function that is traced, torch.func takes a gradient or a tangent or a dual
    level is open. The latter is read where Dynamo sees it, and compiles again when it changes."""
    from . import _tracing

    return forward_ad._current_level >= 0 or _tracing.func_differentiates()
