"""The scan against the float64 reference: output and every gradient, over all shapes and options."""

import pytest
import torch
from comparison import BF16, DTYPES, F32, F64, HALF, assert_close, run, storage
from hypothesis import given
from hypothesis import strategies as st
from scan_cases import cases, exact

from gatedrnn.functional import spatial_gated_rnn
from gatedrnn.reference import spatial_gated_rnn as reference

NAMES = ("dx", "dg", "dweight", "dbias")


def check(case):
    tensors = case.tensors()
    truth = exact(tensors)
    grad = case.grad(truth)
    before = [storage(t).clone() for t in (*tensors, grad) if t is not None]
    y, grads = run(spatial_gated_rnn, tensors, grad, **case.options)
    after = [storage(t) for t in (*tensors, grad) if t is not None]
    assert all(map(torch.equal, before, after)), "an input or an incoming gradient was written to"

    # In a cascade the reference too rounds every stage's map to x's dtype.
    rounded = case.stages > 1 and case.dtype in HALF
    expected, expected_grads = run(
        reference, tensors if rounded else truth, grad if rounded else grad.double(), **case.options
    )
    assert_close(y, expected.double(), stages=case.stages, what="y")
    if case.nonlinearity == "relu" and case.dtype != F64:
        return  # rounding decides which pixels are off: test_scan_exact.py has those gradients
    for name, ours, theirs in zip(NAMES, grads, expected_grads, strict=True):
        if ours is not None:
            assert_close(ours, theirs.double(), stages=case.stages, what=name)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_scan_matches_reference(data, dtype):
    check(data.draw(cases(dtype)))


@given(data=st.data())
def test_scan_of_nothing_matches_reference(data):
    check(data.draw(cases(F64, images=(0, 1, 2), sizes=(0, 0, 3), blocks=(1, 2, 17))))


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@given(data=st.data())
def test_scan_with_many_channels_matches_reference(data, dtype):
    # Their tiles do not fit in the cache for a whole line: every chunk is packed by itself.
    check(data.draw(cases(dtype, images=(1,), sizes=(3, 33, 50), blocks=(64, 128), channels=128)))
