"""The native ops and everything PyTorch wants to know of them: fake kernels, autograd, vmap, jvp.

Two routes lead to the same kernels. Under `torch.compile` and `torch.export` the registered ops are
called, with `register_autograd`: Dynamo refuses an `autograd.Function` that defines `jvp`.
Otherwise `autograd.Function` is used, for a registered op carries no tangents: forward-mode AD
through it would be zero without a word.

All of them differentiate by the same two facts (csrc/README.md): the adjoint of a scan and its
tangent are scans again. `_adjoint` and `_tangent` below write them with the scan itself, so that
derivatives of any order need no other kernel.
"""

import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import reference
from .reference import DIRECTIONS

if importlib.util.find_spec("gatedrnn._C") is None:
    raise ImportError(
        "gatedrnn's native module is not built here: install the package with `pip install .`, "
        "or `pip install -e . --no-build-isolation` to work on it, and import it from there",
        name="gatedrnn",
    )
from . import _C  # noqa: E402, F401  loading it registers torch.ops.gatedrnn

_REVERSED = (1, 0, 3, 2)  # the code of the direction that runs against each direction
_ALONG_WIDTH = (True, True, False, False)
_FROM_END = (False, True, False, True)


_JVP = torch._C._functorch.TransformType.Jvp


class Options(NamedTuple):
    """What a scan is, besides its tensors; `directions` are codes, indices of DIRECTIONS."""

    directions: tuple[int, ...]
    merge: str = "none"  # "none" | "max" | "mean" | "sum"
    nonlinearity: str = "identity"
    gate_norm: str = "none"

    @property
    def args(self):
        return list(self.directions), self.merge, self.nonlinearity, self.gate_norm


def direction_code(name: str) -> int:
    return DIRECTIONS.index(name)


# ---- fake kernels ------------------------------------------------------------------------------


def _format_like(model: Tensor) -> torch.memory_format:
    """channels_last when `model` is so and is not also contiguous."""
    if model.dim() != 4 or model.is_contiguous():
        return torch.contiguous_format
    if model.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


@torch.library.register_fake("gatedrnn::scan")
def _scan_fake(x, g, weight, bias, directions, merge, nonlinearity, gate_norm, keep_mask):
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
    needs_g, needs_weight, needs_bias = needs
    nothing = weight.new_empty((0,))
    return (
        torch.empty_like(x, memory_format=_format_like(x)),
        torch.empty_like(g, memory_format=_format_like(g)) if needs_g else nothing,
        torch.empty_like(weight) if needs_weight else nothing.clone(),
        weight.new_empty(weight.shape[:2]) if needs_bias else nothing.clone(),
    )


@torch.library.register_fake("gatedrnn::clamp_spectral")
def _clamp_spectral_fake(weight):
    return torch.empty_like(weight)


# ---- the registered ops' autograd, for torch.compile and torch.export ----------------------------


def _registered_setup(ctx, inputs, output):
    x, g, weight, bias, directions, merge, nonlinearity, gate_norm, _ = inputs
    ctx.options = Options(tuple(directions), merge, nonlinearity, gate_norm)
    ctx.save_for_backward(x, g, weight, bias, output[1])


def _registered_backward(ctx, grad, _):
    x, g, weight, bias, mask = ctx.saved_tensors
    _, needs_g, needs_weight, needs_bias = ctx.needs_input_grad[:4]
    dx, dg, dweight, dbias = torch.ops.gatedrnn.scan_backward(
        grad, x, g, weight, bias, mask, *ctx.options.args, needs_g, needs_weight, needs_bias
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


# ---- adjoint and tangent, written with scans -----------------------------------------------------


def _per_direction(g: Tensor | None, d: int) -> Tensor | None:
    """The gate map (N, 1|C, H, W) of the d-th direction."""
    return g[:, d] if g is not None and g.dim() == 5 else g


def _single(x, g, weight, bias, code, nonlinearity="identity"):
    """One direction's map h (N, C, H, W); gates as they are."""
    bias = None if bias is None else bias[None]
    return scan(x, g, weight[None], bias, Options((code,), "none", nonlinearity))[:, 0]


def _before(h: Tensor, code: int, step: int = 1) -> Tensor:
    """h_{i-1} in the order of the direction (step = -1: h_{i+1}); zero where there is none."""
    axis = 3 if _ALONG_WIDTH[code] else 2
    length = h.shape[axis]
    if length == 0:
        return h
    zero = torch.zeros_like(h.narrow(axis, 0, 1))
    if (step == 1) != _FROM_END[code]:
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
            return (h > 0).to(h.dtype)
        case "sigmoid":
            return h * (1 - h)
    return None


def _times(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a * b


def _normed(g: Tensor | None, gate_norm: str) -> Tensor | None:
    if g is None or gate_norm == "none":
        return g
    return {"clamp": lambda t: t.clamp(-1, 1), "tanh": torch.tanh, "sigmoid": torch.sigmoid}[
        gate_norm
    ](g)


def _shares(mask: Tensor, options: Options, dtype: torch.dtype) -> Tensor:
    """Each direction's share of a merged value: (D, N, C, H, W), or (D, 1, 1, 1, 1)."""
    count = len(options.directions)
    if options.merge == "max":
        bits = 1 << torch.arange(count, device=mask.device).view(-1, 1, 1, 1, 1)
        won = ((mask & bits) != 0).to(dtype)
        return won / won.sum(0)
    share = 1 / count if options.merge == "mean" else 1.0
    return torch.full((count, 1, 1, 1, 1), share, dtype=dtype, device=mask.device)


def _to_state(tensor: Tensor | None, weight: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.to(weight.dtype)


def _adjoint(grad, x, g, weight, bias, mask, options: Options):
    """dx, dg, dweight, dbias of a scan, by differentiable operations alone.

    e_i = g_i theta'_i xi_i + g_i theta'_i (w^T e_{i+1}): Eq. (3) against the direction.
    """
    dtype = x.dtype
    grad, x, g = (_to_state(t, weight) for t in (grad, x, g))
    k = weight.shape[2]
    if options.merge != "none":
        shares = _shares(mask, options, weight.dtype)
    dx, dweight, dbias, dgates = 0, [], [], []
    with_norm = _normed(g, options.gate_norm)
    for d, code in enumerate(options.directions):
        xi = grad[:, d] if options.merge == "none" else grad * shares[d]
        gate = _per_direction(with_norm, d)
        h = _single(
            x, gate, weight[d], None if bias is None else bias[d], code, options.nonlinearity
        )
        slope = _slope(options.nonlinearity, h)
        e_gate = _times(gate, slope)
        transposed = _transposed(weight[d])
        e = _single(_times(e_gate, xi), e_gate, transposed, None, _REVERSED[code])
        delta = xi + _product(transposed, _before(e, code, -1))
        delta = _times(slope, delta)
        dx = dx + delta
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
        dg = dg * _norm_slope(g, options.gate_norm)
        dg = dg.to(dtype)
    return dx.to(dtype), dg, torch.stack(dweight), torch.stack(dbias)


def _norm_slope(g: Tensor, gate_norm: str) -> Tensor | float:
    match gate_norm:
        case "clamp":
            return ((g >= -1) & (g <= 1)).to(g.dtype)
        case "tanh":
            return 1 - torch.tanh(g) ** 2
        case "sigmoid":
            y = torch.sigmoid(g)
            return y * (1 - y)
    return 1.0


def _tangent(primals, tangents, mask, options: Options):
    """The tangent of a scan: x' = dx + dg * (w h + b) + g * (dw h + db), scanned without a bias."""
    x, g, weight, bias = primals
    dtype = x.dtype
    x, g, x_t, g_t = (_to_state(t, weight) for t in (x, g, *tangents[:2]))
    weight_t, bias_t = tangents[2:]
    gates = _normed(g, options.gate_norm)
    if g_t is not None:
        g_t = g_t * _norm_slope(g, options.gate_norm)
    maps = []
    for d, code in enumerate(options.directions):
        gate = _per_direction(gates, d)
        b = None if bias is None else bias[d]
        h = _single(x, gate, weight[d], b, code, options.nonlinearity)
        h_before = _before(h, code)
        drive = torch.zeros_like(h) if x_t is None else x_t
        if g_t is not None:
            u = _product(weight[d], h_before)
            u = u if b is None else u + b[:, None, None]
            drive = drive + _per_direction(g_t, d) * u
        u_t = None if weight_t is None else _product(weight_t[d], h_before)
        if bias_t is not None:
            db = bias_t[d][:, None, None]
            u_t = db.expand_as(h) if u_t is None else u_t + db
        if u_t is not None:
            drive = drive + _times(gate, u_t)
        slope = _slope(options.nonlinearity, h)
        maps.append(_single(_times(slope, drive), _times(slope, gate), weight[d], None, code))
    if options.merge == "none":
        return torch.stack(maps, 1).to(dtype)
    shares = _shares(mask, options, weight.dtype)
    return sum(share * h for share, h in zip(shares, maps, strict=True)).to(dtype)


# ---- vmap: a batch of scans is one scan with more groups ------------------------------------------


def _fold(tensor, bdim, size, channel):
    """Moves the batch into the channel dimension: (..., B * C, ...)."""
    if tensor is None:
        return None
    if bdim is None:
        tensor = tensor.unsqueeze(channel).expand(
            *tensor.shape[:channel], size, *tensor.shape[channel:]
        )
    else:
        tensor = tensor.movedim(bdim, channel)
    return tensor.flatten(channel, channel + 1)


def _fold_gate(g, bdim, size, channels):
    if g is None:
        return None
    rank = g.dim() - (bdim is not None)
    channel = rank - 3
    logical = [s for i, s in enumerate(g.shape) if i != bdim]
    if logical[channel] == 1 and bdim is None:
        return g
    shape = list(logical)
    shape[channel] = channels
    if bdim is None:
        return _fold(g.expand(shape), None, size, channel)
    g = g.movedim(bdim, 0).expand(size, *shape)
    return _fold(g, 0, size, channel)


def _unfold(tensor, size, channel):
    """(..., B * C, ...) -> (B, ..., C, ...)."""
    return tensor.unflatten(channel, (size, -1)).movedim(channel, 0)


# ---- the differentiable scan ---------------------------------------------------------------------


class _Scan(torch.autograd.Function):
    """(y, mask) of a scan; mask carries no gradient."""

    @staticmethod
    def forward(x, g, weight, bias, options, keep_mask):
        return torch.ops.gatedrnn.scan(x, g, weight, bias, *options.args, keep_mask)

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
            grads = _adjoint(*tensors)
        else:
            grads = _ScanBackward.apply(*tensors, *needs)
        return (grads[0], *(t if need else None for t, need in zip(grads[1:], needs, strict=True)),
                None, None)

    @staticmethod
    def jvp(ctx, x_t, g_t, weight_t, bias_t, *_):
        *primals, mask = ctx.saved_tensors
        tangent = _tangent(primals, (x_t, g_t, weight_t, bias_t), mask, ctx.options)
        return tangent, None

    @staticmethod
    def vmap(info, in_dims, x, g, weight, bias, options, keep_mask):
        size = info.batch_size
        channels = weight.shape[2 if in_dims[2] is not None and in_dims[2] <= 1 else 1]
        y, mask = _Scan.apply(
            _fold(x, in_dims[0], size, 1),
            _fold_gate(g, in_dims[1], size, channels),
            _fold(weight, in_dims[2], size, 1),
            _fold(bias, in_dims[3], size, 1),
            options,
            keep_mask,
        )
        y = _unfold(y, size, 2 if options.merge == "none" else 1)
        if mask.dim() == 1:
            return (y, mask), (0, None)
        return (y, _unfold(mask, size, 1)), (0, 0)


class _ScanBackward(torch.autograd.Function):
    """dx, dg, dweight, dbias by the fused kernel; its own gradients by those of `_adjoint`."""

    @staticmethod
    def forward(grad, x, g, weight, bias, mask, options, needs_g, needs_weight, needs_bias):
        return torch.ops.gatedrnn.scan_backward(
            grad, x, g, weight, bias, mask, *options.args, needs_g, needs_weight, needs_bias
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
            results = _adjoint(*full, mask, ctx.options)
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
        gate = _fold_gate(g, in_dims[2], size, channels)
        if g is not None and gate is g:  # each sample wants a gradient of its own
            shape = list(g.shape)
            shape[-3] = channels
            gate = _fold(g.expand(shape), None, size, g.dim() - 3)
        folded_mask = mask if mask.dim() - (in_dims[5] is not None) == 1 else _fold(
            mask, in_dims[5], size, 1
        )
        if folded_mask is mask and in_dims[5] is not None:
            folded_mask = mask.select(in_dims[5], 0)
        dx, dg, dweight, dbias = _ScanBackward.apply(
            _fold(grad, in_dims[0], size, channel),
            _fold(x, in_dims[1], size, 1),
            gate,
            _fold(weight, in_dims[3], size, 1),
            _fold(bias, in_dims[4], size, 1),
            folded_mask,
            options,
            *needs,
        )
        if needs[0]:
            dg = _unfold(dg, size, g.dim() - (in_dims[2] is not None) - 3)
            logical = [s for i, s in enumerate(g.shape) if i != in_dims[2]]
            if logical[-3] == 1:
                dg = dg.sum(-3, keepdim=True)
        results = [_unfold(dx, size, 1), dg]
        results += [_unfold(t, size, 1) if need else t
                    for t, need in zip((dweight, dbias), needs[1:], strict=True)]
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
        keep_mask = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in tensors
        )
        return torch.ops.gatedrnn.scan(*tensors, *options.args, keep_mask)[0]
    if is_plain(*tensors):
        return torch.ops.gatedrnn.scan(*tensors, *options.args, False)[0]
    stack = torch._C._functorch.get_interpreter_stack() or []
    if sum(level.key() == _JVP for level in stack) > 1:
        # PyTorch runs a Function's `jvp` with forward-mode AD switched off, so that the tangent of
        # a tangent would be zero without a word. The loop of plain operations has it.
        return _reference(*tensors, options)
    return _Scan.apply(*tensors, options, options.merge == "max")[0]


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether no derivative can be asked for: no gradients, no tangents, no function transforms."""
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return False
    return not torch.is_grad_enabled() or not any(
        t is not None and t.requires_grad for t in tensors
    )


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
