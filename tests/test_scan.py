"""The scan against the float64 reference: output and every gradient, over shapes and options."""

import pytest
import torch
from comparison import (
    BF16,
    DTYPES,
    F32,
    F64,
    HALF,
    assert_close,
    placed,
    run,
    spatial_gated_rnn,
    storage,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_cases import a_case, cases, exact
from tiers import sampled

from gatedrnn.reference import spatial_gated_rnn as reference

NAMES = ("dx", "dg", "dweight", "dbias")
FEWER = settings(max_examples=max(settings.default.max_examples // 4, 3))


def check(case):
    tensors = case.tensors()
    truth = exact(tensors)
    grad = case.grad(truth)
    *given, given_grad = map(placed, (*tensors, grad))
    before = [storage(t).clone() for t in (*given, given_grad) if t is not None]
    y, grads = run(spatial_gated_rnn, given, given_grad, **case.options)
    after = [storage(t) for t in (*given, given_grad) if t is not None]
    assert all(map(torch.equal, before, after)), "an input or an incoming gradient was written to"

    # In a cascade the reference too rounds every stage's map to x's dtype.
    rounded = case.stages > 1 and case.dtype in HALF
    expected, expected_grads = run(
        reference, tensors if rounded else truth, grad if rounded else grad.double(), **case.options
    )
    levels = dict(stages=case.stages, maps=case.dtype)
    assert_close(y, expected.double(), **levels, what="y")
    if case.nonlinearity == "relu" and case.dtype != F64:
        return  # rounding decides which pixels are off: test_scan_exact.py has those gradients
    for name, ours, theirs in zip(NAMES, grads, expected_grads, strict=True):
        if ours is not None:
            assert_close(ours, theirs.double(), **levels, what=name)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_scan_matches_reference(data, dtype):
    check(data.draw(cases(dtype)))


@given(data=st.data())
def test_scan_of_nothing_matches_reference(data):
    check(data.draw(cases(F64, images=(0, 1, 2), sizes=(0, 0, 3), blocks=(1, 2, 17))))


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@FEWER
@given(data=st.data())
def test_scan_with_many_channels_matches_reference(data, dtype):
    # Tiles of a whole line do not fit in the cache: every chunk of a line is packed by itself.
    check(data.draw(cases(dtype, images=(1,), sizes=(3, 33, 50), blocks=(64, 128), channels=128)))


@pytest.mark.parametrize(
    ("dtype", "shape", "merge", "gate"),
    sampled(
        [
            (BF16, (1, 8, 2100, 2), "mean", "direction_pixel"),
            (F32, (1, 8, 3, 5000), "max", "channel"),
            (F32, (1, 20, 2500, 1), "max", "direction_channel"),
            (F64, (2, 1, 2, 4100), None, "pixel"),
        ],
        2,
    ),
)
def test_scan_of_long_lines_matches_reference(dtype, shape, merge, gate):
    layouts = dict(g_layout="channels_last", grad_layout="transposed")
    check(a_case(dtype=dtype, shape=shape, block=shape[1], merge=merge, gate=gate, **layouts))


def dense(shape, memory_format=torch.contiguous_format):
    return torch.empty(shape, memory_format=memory_format).stride()


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (2, 1, 5, 4), (2, 3, 1, 1), (1, 3, 5, 1)])
def test_results_follow_the_memory_format_of_their_model(shape):
    x = torch.randn(shape)
    g = torch.rand(shape)
    weight, bias = torch.randn(4, shape[1], 1), torch.zeros(4, shape[1])
    last = dict(memory_format=torch.channels_last)
    ambiguous = x.is_contiguous(**last)  # then contiguous wins
    for x_last, g_last in ((False, False), (True, False), (False, True), (True, True)):
        inputs = (
            x.contiguous(**last) if x_last else x,
            g.contiguous(**last) if g_last else g,
            weight,
            bias,
        )
        y, (dx, dg, _, _) = run(spatial_gated_rnn, inputs, torch.randn_like)
        x_strides = dense(shape, **last) if x_last and not ambiguous else dense(shape)
        g_strides = dense(shape, **last) if g_last and not ambiguous else dense(shape)
        assert (y.stride(), dx.stride(), dg.stride()) == (x_strides, x_strides, g_strides)
        maps = spatial_gated_rnn(*inputs, merge=None)
        assert maps.stride() == dense((shape[0], 4, *shape[1:]))


def test_results_of_other_strides_are_contiguous():
    x = torch.randn(2, 3, 4, 5).mT
    assert spatial_gated_rnn(x, x, torch.zeros(4, 3, 3)).stride() == dense((2, 3, 5, 4))


@pytest.mark.parametrize("merge", ["max", "mean", "sum", None])
def test_gradient_of_a_sum_is_that_of_ones(merge):
    # y.sum().backward() hands back one number with all strides zero.
    generator = torch.Generator().manual_seed(3)
    inputs = [
        torch.randn(size, generator=generator, dtype=F64)
        for size in ((2, 3, 6, 5), (2, 3, 6, 5), (4, 3, 3), (4, 3))
    ]
    leaves = [t.clone().requires_grad_() for t in inputs]
    spatial_gated_rnn(*leaves, merge=merge, gate_activation="tanh").sum().backward()
    _, expected = run(reference, inputs, torch.ones_like, merge=merge, gate_activation="tanh")
    for leaf, theirs in zip(leaves, expected, strict=True):
        assert_close(leaf.grad, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "block"), [((7, 8, 65, 70), 8), ((1, 6, 70, 33), 2), ((2, 64, 40, 41), 64)]
)
def test_bits_do_not_depend_on_threads_or_run(dtype, shape, block, threads):
    generator = torch.Generator().manual_seed(4)
    n, c, h, w = shape
    x, g, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    weight = torch.randn(4, c, block, generator=generator) / (2 * block**0.5)
    bias = torch.randn(4, c, generator=generator)
    inputs = (x, g, weight.to(F64 if dtype == F64 else F32), bias.to(F64 if dtype == F64 else F32))

    def bits():
        y, grads = run(spatial_gated_rnn, inputs, grad, gate_activation="clamp")
        return [y, *grads]

    threads(1)
    expected = bits()
    for count in (1, 2, 3, 3):
        threads(count)
        assert all(map(torch.equal, bits(), expected)), f"{count} threads"
