"""The norm of the recurrent weight, held within one (section 3.2 of the paper).

A weight (D, C, K) holds D * C / K square blocks of K x K. A block whose norm is at most one is
left as it is, bit for bit; a larger one is divided by its norm.
"""

from typing import TYPE_CHECKING, Any, Literal, TypeGuard, get_args

import torch
from torch import Tensor

from ._derivatives import unit_clamp
from ._ops import (
    DEVICES,
    has_nested_tangents,
    is_differentiated,
    is_transformed,
    no_autograd,
)

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

WeightConstraint = Literal["spectral", "frobenius"]
NORMS: tuple[WeightConstraint | None, ...] = (*get_args(WeightConstraint), None)
SMALL = 32  # larger blocks go to LAPACK on the CPU, and to batched matrix products on a GPU
MAX_SQUARINGS = 26  # as kMaxSquarings in csrc/scan.h


def clamp_norm(weight: Tensor, norm: str | None) -> Tensor:
    """Divides every block of `weight` by max(1, its norm).

    Args:
        weight: (D, C, K), float32 or float64; C is a multiple of K. May be a DTensor.
        norm: "spectral" (largest singular value), "frobenius", or None to return `weight` itself.

    Returns:
        (D, C, K), of the same dtype, each block with a norm of at most 1 + 1e-5. Differentiable to
        any order where the norm is below one, or where the largest singular value is simple. Where
        that is repeated and above one, the first derivative is a subgradient; higher ones are not
        finite there, for the spectral norm has none.

    Raises:
        ValueError: `norm` is not known.
        TypeError: `weight` has another dtype.
    """
    if norm not in NORMS:
        raise ValueError(
            f"weight_constraint must be one of 'spectral', 'frobenius' or None, got {norm!r}"
        )
    if weight.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"weight must be float32 or float64, got {weight.dtype}")
    if norm is None:
        return weight
    if torch.compiler.is_exporting():
        from . import _tracing

        if _tracing.in_onnx_export():
            raise RuntimeError(
                "SpatialGatedRNN: torch.onnx.export has no operators for the scan and the clamp of "
                "its weight: use gatedrnn.onnx.export, which has"
            )
    if is_sharded(weight):
        from ._sharding import clamp_shards

        return clamp_shards(weight, norm)
    if weight.shape[-1] == 1:
        return unit_clamp(weight)
    if norm == "spectral" and has_native_clamp(weight):
        compiling = torch.compiler.is_compiling()
        if no_autograd(weight) or (compiling and not is_differentiated()):
            keep = torch.is_grad_enabled() and weight.requires_grad
            clamped: Tensor = torch.ops.gatedrnn.clamp_spectral(weight.contiguous(), keep)[0]
            return clamped
        if not is_transformed(weight):
            return _SpectralClamp.apply(weight.contiguous())  # type: ignore[no-any-return, no-untyped-call]
    return _by_operations(weight, norm)


def has_native_clamp(weight: Tensor) -> bool:
    """Whether the op clamps the spectral norm of `weight`."""
    native = weight.is_cpu or _has_kernel(weight)
    return native and 1 < weight.shape[-1] <= SMALL and not is_sharded(weight)


def _blocks(weight: Tensor) -> Tensor:
    """(D, C, K) -> (D * C / K, K, K)."""
    d, c, k = weight.shape
    return weight.reshape(d * c // k, k, k)


def _by_operations(weight: Tensor, norm: str) -> Tensor:
    """The clamp by PyTorch's operations, of either norm, with derivatives in every mode."""
    blocks = _blocks(weight).double()
    if norm == "frobenius":
        # In units of the largest element, whose square could overflow. The clamp inside keeps every
        # derivative finite where the norm is small, zero included.
        unit = blocks.detach().abs().amax((1, 2)).clamp(min=1)
        squares = (blocks / unit[:, None, None]).square().sum((1, 2))
        scale = squares.clamp(min=unit**-2).rsqrt() / unit
    else:
        scale = spectral_norm(blocks).clamp(min=1).reciprocal()
    return (blocks * scale[:, None, None]).to(weight.dtype).reshape(weight.shape)


class _SpectralClamp(torch.autograd.Function):
    """The clamp and its derivative by the native ops, and its higher derivatives by operations."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        clamped: Tensor
        clamped, kept = torch.ops.gatedrnn.clamp_spectral(weight, True)
        ctx.save_for_backward(weight, kept)
        return clamped

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        weight, kept = ctx.saved_tensors
        if no_autograd(grad, weight):
            first: Tensor
            first = torch.ops.gatedrnn.clamp_spectral_backward(grad.contiguous(), weight, kept)
            return first
        # The same in operations that can be differentiated, written out: torch.func.vjp of the
        # clamp refuses hooks on saved tensors, such as those of checkpoints.
        blocks, grads = (_blocks(t).double() for t in (weight, grad))
        blocks, finite = _finite(blocks)
        sigma, u, v = _TopSingular.apply(blocks)  # type: ignore[no-untyped-call]
        sigma = sigma[:, None, None]
        along = (grads * blocks).sum((1, 2), keepdim=True)
        above = (grads - along / sigma * _outer(u, v)) / sigma
        result = torch.where(sigma > 1, above, grads)
        result = torch.where(finite[:, None, None], result, float("nan"))
        return result.to(weight.dtype).reshape(weight.shape)


def spectral_norm(blocks: Tensor) -> Tensor:
    """The largest singular value of each block, or some number below one where it is below one.

    Args:
        blocks: (B, K, K).

    Returns:
        (B,), NaN for a block that is not finite. Where the norm is at most one its derivatives are
        zero: there the clamp is the identity, and the norm's own derivatives need not be finite.
    """
    blocks, finite = _finite(blocks)
    if no_autograd(blocks):  # no vectors are needed
        sigma = _top_singular(blocks)[0] if _on_gpu(blocks) else _largest(blocks)
    elif _on_gpu(blocks) and torch.compiler.is_compiling() and not is_differentiated():
        # A compiled graph has first derivatives only, for which u and v are constants.
        _, u, v = _top_singular(blocks.detach())
        sigma = (u * _times(blocks, v)).sum(1)
    elif torch.compiler.is_compiling() or has_nested_tangents():
        # Dynamo refuses a Function that has a jvp, and in a Function tangents have no tangents.
        large = (_largest(blocks.detach()) > 1)[:, None, None]
        sigma = _largest(torch.where(large, blocks, _dummy_block(blocks)))
    else:
        sigma = _TopSingular.apply(blocks)[0]  # type: ignore[no-untyped-call]
    return torch.where(finite, sigma, float("nan"))


def _largest(blocks: Tensor) -> Tensor:
    values: Tensor = torch.linalg.svdvals(blocks)
    return values[:, 0]


def _finite(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The blocks, with dummies for those that are not finite; and which are finite, (B,)."""
    finite = torch.isfinite(blocks.detach()).all(2).all(1)
    return torch.where(finite[:, None, None], blocks, _dummy_block(blocks)), finite


def _dummy_block(blocks: Tensor) -> Tensor:
    """A block for each of `blocks`. Its largest singular value is simple, and below one."""
    dummy = torch.zeros_like(blocks, requires_grad=False)
    dummy[:, 0, 0] = 0.5
    return dummy


def is_sharded(t: Tensor) -> TypeGuard["DTensor"]:
    """Whether `t` is a DTensor, told without an import of torch.distributed."""
    return hasattr(t, "device_mesh")


def _on_gpu(t: Tensor) -> bool:
    return t.is_cuda


def _has_kernel(t: Tensor) -> bool:
    return _on_gpu(t) and "cuda" in DEVICES


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """(B, K, K) times (B, K)."""
    return (matrices @ vectors[:, :, None])[:, :, 0]


def _top_singular(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sigma (B,), u and v (B, K) of blocks (B, K, K), as in `_TopSingular`."""
    if _has_kernel(blocks) and blocks.shape[-1] <= SMALL:
        kept = torch.ops.gatedrnn.clamp_spectral(blocks.contiguous(), True)[1]
        u, v = kept[:, 1:].chunk(2, 1)
        return kept[:, 0], u, v
    if _on_gpu(blocks):
        return _top_singular_by_squaring(blocks)
    u, sigma, vh = torch.linalg.svd(blocks)
    return sigma[:, 0], u[:, :, 0], vh[:, 0]


def _top_singular_by_squaring(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`_top_singular` by matrix products alone.

    Unlike a GPU's singular value decomposition, nothing here waits for the device, so that a CUDA
    graph can capture it. The number of squarings is fixed for the same reason. The Gram matrix is
    squared until only the eigenspace of its largest eigenvalue is left (csrc/cpu/norms.cpp).

    sigma is |w v| of a unit vector v: never above the norm, and below it by 1e-8 of it at most.
    """
    unit = _nonzero(blocks.abs().amax((1, 2)))  # so that no square overflows
    scaled = blocks / unit[:, None, None]
    power = scaled.mT @ scaled
    for n in range(MAX_SQUARINGS):
        if n % 4 == 0:
            # The largest diagonal element bounds every element of a Gram matrix. Four squarings
            # after it is 1, elements are at most K^15.
            power = power / _nonzero(power.diagonal(dim1=1, dim2=2).amax(1))[:, None, None]
        power = power @ power
    # The column of the largest diagonal element is the longest. A zero block has any vector.
    longest = power.diagonal(dim1=1, dim2=2).argmax(1)
    v = _unit_vectors(power.take_along_dim(longest[:, None, None], 2)[:, :, 0])
    image = _times(scaled, v)
    return image.norm(dim=1) * unit, _unit_vectors(image), v


def _nonzero(t: Tensor) -> Tensor:
    return torch.where(t > 0, t, 1)


def _unit_vectors(vectors: Tensor) -> Tensor:
    """Each vector divided by its length; the first unit vector for a zero one."""
    length = vectors.norm(dim=1, keepdim=True)
    first = torch.zeros_like(vectors)
    first[:, 0] = 1
    return torch.where(length > 0, vectors / _nonzero(length), first)


class _TopSingular(torch.autograd.Function):
    """The largest sigma of each block, with u and v: w v = sigma u and w^T u = sigma v.

    Where sigma is at most one, the result is that of a dummy block.

    The second derivatives of `torch.linalg.svd` divide by the gaps between all singular values.
    Here only the gap below the largest counts.

    z = [u; v] is an eigenvector of J = [[0, w], [w^T, 0]]. So d sigma = u^T dw v, and
    dz = (sigma - J)^+ dJ z.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sigma, u, v = _top_singular(w)
        large, first = sigma > 1, torch.zeros_like(u)
        first[:, 0] = 1
        return (
            torch.where(large, sigma, 0.5),
            torch.where(large[:, None], u, first),
            torch.where(large[:, None], v, first),
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs, *output)
        ctx.save_for_forward(*inputs, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, sigma_grad: Tensor | None, u_grad: Tensor | None, v_grad: Tensor | None
    ) -> Tensor:
        w, sigma, u, v = _unpack_saved(*ctx.saved_tensors)
        if sigma_grad is None:
            sigma_grad = torch.zeros_like(sigma)
        if u_grad is None and v_grad is None:  # a first derivative
            return _outer(sigma_grad[:, None] * u, v)
        u_grad = torch.zeros_like(u) if u_grad is None else u_grad
        v_grad = torch.zeros_like(v) if v_grad is None else v_grad
        p, q = _pseudo_solve(w, sigma, u, v, u_grad, v_grad)
        return _outer(sigma_grad[:, None] * u + p, v) + _outer(u, q)

    @staticmethod
    def jvp(ctx: Any, w_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        w, sigma, u, v = _unpack_saved(*ctx.saved_tensors)
        along_u = _times(w_t, v)  # dJ z = [dw v; dw^T u]
        along_v = _times(w_t.mT, u)
        u_t, v_t = _pseudo_solve(w, sigma, u, v, along_u, along_v)
        return (u * along_u).sum(1), u_t, v_t


def _unpack_saved(w: Tensor, sigma: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return torch.where((sigma > 1)[:, None, None], w, _dummy_block(w)), sigma, u, v


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a[:, :, None] * b[:, None, :]


def _pseudo_solve(
    w: Tensor, sigma: Tensor, u: Tensor, v: Tensor, top: Tensor, bottom: Tensor
) -> tuple[Tensor, Tensor]:
    """(sigma - J)^+ [top; bottom], as its two halves (B, K)."""
    k = w.shape[1]
    z = torch.cat([u, v], 1) * 0.5**0.5
    right = torch.cat([top, bottom], 1)
    right = right - z * (z * right).sum(1, keepdim=True)
    zero = torch.zeros_like(w)
    j = torch.cat([torch.cat([zero, w], 2), torch.cat([w.mT, zero], 2)], 1)
    eye = torch.eye(2 * k, dtype=w.dtype, device=w.device)
    matrix = sigma[:, None, None] * (eye + _outer(z, z)) - j
    # Of a repeated largest value the matrix is singular: the first derivative, which asks nothing
    # of it, must not answer NaN.
    asked = (right != 0).any(1)
    with torch.no_grad():
        regular = torch.linalg.inv_ex(matrix)[1] == 0
    matrix = torch.where((asked | regular)[:, None, None], matrix, eye)
    solution = torch.linalg.solve_ex(matrix, right[:, :, None])[0][:, :, 0]
    return solution[:, :k], solution[:, k:]
