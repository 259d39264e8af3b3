"""Cases without rounding, compared bit for bit: small integers, ties, the functions' edges."""

import math

import pytest
import torch
from comparison import DTYPES, F32, F64, HALF, LAYOUTS, laid_out, run, spatial_gated_rnn, state_of
from hypothesis import given
from hypothesis import strategies as st

from gatedrnn import DIRECTIONS
from gatedrnn.reference import spatial_gated_rnn as reference


@st.composite
def integer_cases(draw, dtype):
    """Small integers in every tensor; a row of w has one entry, so that states stay small."""
    block = draw(st.sampled_from([1, 2, 3, 8, 16, 17]))
    c = block * draw(st.integers(1, 2))
    n, h, w = draw(st.integers(1, 2)), *draw(st.tuples(*[st.sampled_from([1, 3, 8, 17])] * 2))
    directions = draw(st.permutations(DIRECTIONS))[: draw(st.integers(1, 4))]
    d = len(directions)
    merges = ["max", "max", "sum", None] + ["mean"] * (d != 3)  # a third is not exact
    options = dict(
        directions=directions,
        merge=draw(st.sampled_from(merges)),
        nonlinearity=draw(st.sampled_from(["identity", "relu"])),
        gate_activation=draw(st.sampled_from([None, "clamp"])),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def integers(largest, *size):
        return torch.randint(-largest, largest + 1, size, generator=generator).to(dtype)

    layout = st.sampled_from(LAYOUTS)
    x = laid_out(integers(2, n, c, h, w), draw(layout))
    shape = draw(st.sampled_from([(n, c, h, w), (n, 1, h, w), (n, d, c, h, w), (n, d, 1, h, w)]))
    largest = 3 if options["gate_activation"] == "clamp" else 1
    g = laid_out(integers(largest, *shape), draw(layout))
    column = torch.randint(block, (d, c, 1), generator=generator)
    weight = torch.zeros(d, c, block, dtype=dtype).scatter_(2, column, integers(1, d, c, 1))
    bias = integers(1, d, c)
    # Divisible by the number of directions in a tie; with a sum of 17 pixels below 2^24.
    grad_shape = (n, d, c, h, w) if options["merge"] is None else (n, c, h, w)
    grad = laid_out(12 * integers(1, *grad_shape), draw(layout))
    weight, bias = (t.to(state_of(dtype)) for t in (weight, bias))
    return (x, g, weight, bias), grad, options


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_integers_are_scanned_exactly(data, dtype):
    tensors, grad, options = data.draw(integer_cases(dtype))
    y, grads = run(spatial_gated_rnn, tensors, grad, **options)
    exact = [t.double() for t in tensors]
    expected, expected_grads = run(reference, exact, grad.double(), **options)
    assert torch.equal(y, expected.to(dtype))
    for ours, theirs in zip(grads, expected_grads, strict=True):
        assert torch.equal(ours, theirs.to(ours.dtype))  # 16 bits: one rounding, at the end


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_a_tie_is_split_evenly(dtype):
    # With g = 0 every direction's map is x: four winners. Downwards and upwards lose where b < 0.
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]], dtype=dtype)
    weight = torch.ones(4, 1, 1, dtype=dtype)
    for bias, winners in (([0, 0, 0, 0], 4), ([0, 0, 0, -1], 3), ([0, 0, -1, -1], 2)):
        b = torch.tensor(bias, dtype=dtype)[:, None]
        g = torch.zeros_like(x) if winners == 4 else None
        inputs = (x, g, weight * 0, b)
        y, (dx, _, _, db) = run(spatial_gated_rnn, inputs, torch.full_like(x, 12))
        assert torch.equal(y, x)
        assert torch.equal(dx, torch.full_like(x, 12))
        if g is None:
            won = torch.tensor(bias)[:, None] == 0
            assert torch.equal(db, won * torch.tensor(4 * 12 / winners, dtype=dtype))


EDGES = [0.0, 1e-30, -1e-20, 1e-6, -1e-3, 0.1, -0.3, 0.5, -0.62, 0.7, 1.0, -2.5, 9.0, -9.1, 20.0]
EDGES += [-30.0, 44.0, -50.0, 88.0, -88.8, 90.0, -104.0, 350.0, -700.0, 710.0, -750.0, 1e30, -1e30]
EDGES += [math.inf, -math.inf, math.nan]

# Error relative to the value itself, which an absolute bound would hide near zero: a few roundings.
RELATIVE = {F64: 1e-15, F32: 5e-7}


def sweep(dtype):
    """Edges, and a fine line of values through the interesting range."""
    values = torch.cat([torch.tensor(EDGES, dtype=F64), torch.linspace(-12, 12, 4001, dtype=F64)])
    return values.to(dtype)


def assert_values(actual, exact, dtype):
    rounding = torch.finfo(dtype).eps / 2 if dtype in HALF else 0
    relative = RELATIVE[state_of(dtype)] + rounding
    # The sigmoid of less than -87 (-708 in float64) may stop short of the subnormal numbers.
    smallest = 2 * torch.finfo(dtype).smallest_normal
    torch.testing.assert_close(
        actual.double(), exact, rtol=relative, atol=smallest, equal_nan=True, check_dtype=False
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "function"),
    [("tanh", torch.tanh), ("sigmoid", torch.sigmoid), ("relu", torch.relu)],
)
def test_nonlinearity_is_that_of_torch(name, function, dtype):
    x = sweep(dtype)[None, None, :, None]
    weight = torch.zeros(1, 1, 1, dtype=dtype)
    y = spatial_gated_rnn(
        x, None, weight, directions=["left_to_right"], nonlinearity=name, merge="sum"
    )
    assert_values(y, function(x.double()), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("tanh", torch.tanh),
        ("sigmoid", torch.sigmoid),
        ("clamp", lambda g: torch.where(g.abs() <= 1, g, g.detach().clamp(-1, 1))),
    ],
)
def test_gate_activation_is_that_of_torch(name, function, dtype):
    # With x = 0, w = 0, b = 1 the map is the normed gate itself.
    g = sweep(dtype)[None, None, :, None]
    state = state_of(dtype)
    inputs = (torch.zeros_like(g), g, torch.zeros(1, 1, 1, dtype=state), torch.ones(1, 1).to(state))
    options = dict(directions=["left_to_right"], gate_activation=name)
    y, (_, dg, _, _) = run(spatial_gated_rnn, inputs, torch.ones_like, **options)
    exact = g.double().requires_grad_()
    expected = function(exact)
    (slope,) = torch.autograd.grad(expected, exact, torch.ones_like(exact))
    assert_values(y, expected.detach(), dtype)
    # 1 - tanh^2 and y (1 - y) lose their last digits where the gate saturates: an absolute bound.
    tolerance = 1e-15 if dtype == F64 else 2e-7
    rounding = torch.finfo(dtype).eps / 2 if dtype in HALF else 0
    torch.testing.assert_close(
        dg.double(), slope, rtol=rounding, atol=tolerance, equal_nan=True, check_dtype=False
    )


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_clamp_has_derivative_one_at_one_exactly(dtype, sign):
    eps = torch.finfo(dtype).eps
    g = sign * torch.tensor([1, 1 + eps, 1 - eps / 2], dtype=dtype)[None, None, :, None]
    state = state_of(dtype)
    inputs = (torch.zeros_like(g), g, torch.zeros(1, 1, 1, dtype=state), torch.ones(1, 1).to(state))
    options = dict(directions=["left_to_right"], gate_activation="clamp")
    _, (_, dg, _, _) = run(spatial_gated_rnn, inputs, torch.ones_like, **options)
    assert dg.flatten().tolist() == [1, 0, 1]
