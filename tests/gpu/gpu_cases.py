"""Inputs on the GPU, with the float64 truth beside them."""

import torch
from comparison import F32, F64, assert_close, state_of, within_norm

from gatedrnn.functional import spatial_gated_rnn
from gatedrnn.reference import spatial_gated_rnn as reference

# Shapes and block sizes for every kernel: block sizes known when compiled, and any; more tiles than
# one; a single line.
SHAPES = [
    ((2, 8, 40, 33), 8),
    ((1, 8, 64, 64), 8),
    ((3, 6, 17, 70), 1),
    ((2, 4, 5, 6), 2),
    ((1, 16, 33, 40), 16),
    ((2, 10, 20, 19), 5),
    ((1, 40, 34, 18), 40),
    ((4, 8, 1, 50), 4),
]
OPTIONS = dict(merge="max", gate_activation="tanh")


def make_inputs(shape, block, dtype=F32, seed=0, device="cuda"):
    """x, g, weight, bias and an incoming gradient."""
    generator = torch.Generator().manual_seed(seed)
    n, c, h, w = shape

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=F64)

    weight = within_norm(normal(4, c, block) * block**-0.5)
    maps = [normal(n, c, h, w).to(dtype) for _ in range(3)]
    x, g, grad = maps
    tensors = (x, g, weight.to(state_of(dtype)), 0.3 * normal(4, c).to(state_of(dtype)), grad)
    return [t.to(device) for t in tensors]


def forward_and_backward(x, g, weight, bias, grad, rnn=spatial_gated_rnn, **options):
    """[y, dx, dg, dweight, dbias]; g and dg may be None."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, g, weight, bias)]
    y = rnn(*leaves, **(OPTIONS | options))
    grads = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], grad))
    return [y.detach(), *(None if t is None else next(grads) for t in leaves)]


def truth(tensors, **options):
    """The same by the float64 reference on the CPU."""
    return forward_and_backward(*(t.cpu().double() for t in tensors), rnn=reference, **options)


def assert_all_close(results, expected):
    for name, ours, theirs in zip(
        ("y", "dx", "dg", "dweight", "dbias"), results, expected, strict=True
    ):
        assert_close(ours.cpu(), theirs, what=name)
