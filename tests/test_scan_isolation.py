"""NaN and infinity stay on their own line, in their own group, and pass through merges."""

import itertools
import math

import pytest
import torch
from comparison import DTYPES, F32, F64, run, spatial_gated_rnn, state_of

from gatedrnn import DIRECTIONS
from gatedrnn._options import GATE_ACTIVATIONS, NONLINEARITIES
from gatedrnn.reference import spatial_gated_rnn as reference

OPPOSITE = dict(zip(DIRECTIONS, [DIRECTIONS[i] for i in (1, 0, 3, 2)], strict=True))

# (N, C, H, W) and block: more than one tile of channels, ragged lanes, more than one chunk.
SHAPES = [((2, 6, 5, 19), 2), ((1, 4, 37, 6), 1), ((2, 32, 6, 18), 16), ((1, 16, 3, 40), 8)]


def after(direction, i, j):
    """The pixels that the state of pixel (i, j) flows to."""
    return {
        "left_to_right": (i, slice(j + 1, None)),
        "right_to_left": (i, slice(0, j)),
        "top_to_bottom": (slice(i + 1, None), j),
        "bottom_to_top": (slice(0, i), j),
    }[direction]


def touched(shape, block, directions, n, c, i, j):
    """Per direction (N, D, C, H, W): the channel at the pixel, and its group along the line."""
    mask = torch.zeros(shape[0], len(directions), *shape[1:], dtype=torch.bool)
    group = slice(c // block * block, c // block * block + block)
    for d, direction in enumerate(directions):
        mask[n, d, c, i, j] = True
        h, w = after(direction, i, j)
        mask[n, d, group, h, w] = True
    return mask


def inputs_for(shape, block, dtype, seed=0):
    """x, g, weight, bias; no weight and no gate is near zero, so that nothing can stop a NaN."""
    generator = torch.Generator().manual_seed(seed)
    n, c, h, w = shape
    state = state_of(dtype)
    x = torch.randn(shape, generator=generator).to(dtype)
    g = (0.5 + 0.5 * torch.rand(shape, generator=generator)).to(dtype)
    weight = (0.5 + torch.rand(4, c, block, generator=generator)).to(state) / block
    bias = torch.randn(4, c, generator=generator).to(state)
    return [x, g, weight, bias]


def assert_touches(bad, clean, mask):
    """`bad` is not finite where the mask is set, and as `clean`, bit for bit, elsewhere."""
    assert torch.equal(~bad.isfinite(), mask)
    assert torch.equal(bad[~mask], clean[~mask])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "block"), SHAPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_bad_input_stays_on_its_lines(shape, block, value, dtype):
    tensors = inputs_for(shape, block, dtype)
    clean = spatial_gated_rnn(*tensors, merge=None)
    n, c, i, j = shape[0] - 1, shape[1] // 2, shape[2] // 2, shape[3] // 3
    tensors[0][n, c, i, j] = value
    mask = touched(shape, block, DIRECTIONS, n, c, i, j)
    assert_touches(spatial_gated_rnn(*tensors, merge=None), clean, mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_nan_stays_on_the_line_of_a_single_direction(direction, nonlinearity, dtype):
    shape, block = SHAPES[0]
    x, g, weight, bias = inputs_for(shape, block, dtype)
    options = dict(directions=[direction], nonlinearity=nonlinearity)
    clean = spatial_gated_rnn(x, g, weight[:1], bias[:1], **options)
    x[0, 3, 2, 7] = math.nan
    mask = touched(shape, block, [direction], 0, 3, 2, 7)[:, 0]
    assert_touches(spatial_gated_rnn(x, g, weight[:1], bias[:1], **options), clean, mask)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("merge", ["max", "mean", "sum"])
@pytest.mark.parametrize("pixel", [(0, 0), (2, 7), (4, 18)])
def test_merge_passes_nan_of_any_direction(merge, pixel, dtype):
    shape, block = SHAPES[0]
    tensors = inputs_for(shape, block, dtype)
    clean = spatial_gated_rnn(*tensors, merge=merge)
    tensors[0][(1, 0, *pixel)] = math.nan
    mask = touched(shape, block, DIRECTIONS, 1, 0, *pixel).any(1)
    assert_touches(spatial_gated_rnn(*tensors, merge=merge), clean, mask)


@pytest.mark.parametrize("gate_activation", GATE_ACTIVATIONS)
def test_nan_gate_stays_on_its_lines(gate_activation):
    shape, block = SHAPES[0]
    tensors = inputs_for(shape, block, F32)
    options = dict(merge=None, gate_activation=gate_activation)
    clean = spatial_gated_rnn(*tensors, **options)
    tensors[1][0, 2, 1, 5] = math.nan
    mask = touched(shape, block, DIRECTIONS, 0, 2, 1, 5)
    assert_touches(spatial_gated_rnn(*tensors, **options), clean, mask)


@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_nan_weight_stays_in_its_group_and_direction(shape, block):
    tensors = inputs_for(shape, block, F32)
    clean = spatial_gated_rnn(*tensors, merge=None)
    c = shape[1] // 2
    tensors[2][2, c] = math.nan
    mask = torch.zeros_like(clean, dtype=torch.bool)
    # w meets h_0 = 0 at the first pixel: NaN * 0 there, in the rows of w that hold it.
    mask[:, 2, c] = True
    mask[:, 2, c // block * block : c // block * block + block, 1:] = True
    bad = spatial_gated_rnn(*tensors, merge=None)
    assert torch.equal(bad[~mask], clean[~mask])
    assert torch.equal(~bad.isfinite()[:, 2, :, 1:], mask[:, 2, :, 1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_nan_gradient_stays_on_its_lines(shape, block, dtype):
    tensors = inputs_for(shape, block, dtype)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    _, clean = run(spatial_gated_rnn, tensors, grad, merge="sum")
    n, c, i, j = 0, shape[1] - 1, shape[2] // 2, shape[3] // 2
    grad[n, c, i, j] = math.nan
    _, bad = run(spatial_gated_rnn, tensors, grad, merge="sum")
    # The adjoint runs against each direction.
    mask = touched(shape, block, [OPPOSITE[d] for d in DIRECTIONS], n, c, i, j).any(1)
    assert_touches(bad[0], clean[0], mask)
    assert_touches(bad[1], clean[1], mask)
    other = torch.arange(shape[1]) // block != c // block
    for k in (2, 3):
        assert torch.equal(bad[k][:, other], clean[k][:, other])
        assert bad[k][:, ~other].isnan().any()


@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_nan_state_reaches_gradients_of_its_lines_only(shape, block):
    tensors = inputs_for(shape, block, F32)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    _, clean = run(spatial_gated_rnn, tensors, grad, merge="sum")
    n, c, i, j = 0, 0, shape[2] // 2, shape[3] // 2
    tensors[0][n, c, i, j] = math.nan
    _, bad = run(spatial_gated_rnn, tensors, grad, merge="sum")
    assert torch.equal(bad[0], clean[0])  # theta is the identity: dx does not see h
    # dg_i = delta_i (w h_{i-1} + b): from the next pixel on.
    mask = touched(shape, block, DIRECTIONS, n, c, i, j).any(1)
    mask[n, c, i, j] = False
    assert_touches(bad[1], clean[1], mask)
    other = torch.arange(shape[1]) // block != c // block
    assert torch.equal(bad[2][:, other], clean[2][:, other])
    assert torch.equal(bad[3], clean[3])


@pytest.mark.parametrize("nonlinearity", ["relu", "tanh", "sigmoid"])
@pytest.mark.parametrize("lines", [32, 33, 5])  # the last register of lines full, and not
def test_infinite_bias_stays_in_its_channel(lines, nonlinearity):
    # Saturated, its state and all gradients are finite.
    x, g, weight, bias = inputs_for((1, 8, lines, 4), 8, F32)
    weight, bias = weight[:1].abs(), bias[:1]
    bias[0, 0] = -math.inf
    options = dict(directions=DIRECTIONS[:1], nonlinearity=nonlinearity)
    _, grads = run(spatial_gated_rnn, (x, g, weight, bias), torch.ones_like, **options)
    _, expected = run(reference, (x, g, weight, bias), torch.ones_like, **options)
    for ours, theirs in zip(grads[2:], expected[2:], strict=True):
        assert torch.equal(ours.isfinite(), theirs.isfinite())


def check_special_values_as_reference(nonlinearity, gate_activation):
    """NaN, inf and -inf stand in the result and in each gradient where the reference has them."""
    options = dict(merge="sum", nonlinearity=nonlinearity, gate_activation=gate_activation)
    for block, where, value in itertools.product([1, 2], range(4), [math.nan, math.inf, -math.inf]):
        x, g, weight, bias = inputs_for((1, 4, 18, 17), block, F32)
        grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
        (x, g, bias, grad)[where].flatten()[3] = value
        y, grads = run(spatial_gated_rnn, (x, g, weight, bias), grad, **options)
        expected, expected_grads = run(reference, (x, g, weight, bias), grad, **options)
        for ours, theirs in zip([y, *grads], [expected, *expected_grads], strict=True):
            special = torch.where(theirs.isfinite(), 0, theirs)
            found = torch.where(ours.isfinite(), 0, ours)
            torch.testing.assert_close(found, special, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("gate_activation", GATE_ACTIVATIONS)
def test_special_values_stand_where_the_reference_has_them(gate_activation, nonlinearity):
    check_special_values_as_reference(nonlinearity, gate_activation)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sigmoid_of_minus_infinity_is_zero(dtype):
    # A gate closed by -inf is closed to an infinite state too: 0 * inf is NaN, tiny * inf is not.
    x = torch.full((1, 1, 1, 20), -math.inf, dtype=dtype)
    weight = torch.zeros(1, 1, 1, dtype=dtype)
    options = dict(directions=DIRECTIONS[:1], nonlinearity="sigmoid")
    assert torch.equal(spatial_gated_rnn(x, None, weight, **options), torch.zeros_like(x))


NAN, INF = math.nan, math.inf


def check_gradient_of_maximum(gates, grad, expected, block):
    """dx and dg of a single pixel, where direction d has h = x + g_d: dg is the share of d."""
    x, bias = torch.ones(1, block, 1, 1), torch.ones(4, block)
    g = torch.tensor(gates).view(1, 4, 1, 1, 1).repeat(1, 1, block, 1, 1)
    tensors = (x, g, torch.zeros(4, block, block), bias)
    _, (dx, dg, *_) = run(spatial_gated_rnn, tensors, torch.full_like(x, grad))
    shares = torch.tensor(expected).view(1, 4, 1, 1, 1).expand_as(g)
    assert torch.equal(dx, torch.full_like(x, grad)) or math.isnan(grad)
    torch.testing.assert_close(dg, shares, rtol=0, atol=0, equal_nan=True)


MAXIMA = [  # g, dL/dy, dg
    ([1.0, 2.0, 2.0, 0.0], INF, [0.0, INF, INF, 0.0]),
    ([1.0, 2.0, 2.0, 0.0], NAN, [0.0, NAN, NAN, 0.0]),
    ([INF, 1.0, INF, -INF], 6.0, [3.0, 0.0, 3.0, 0.0]),
    ([NAN, 1.0, 2.0, 0.0], 6.0, [6.0, 0.0, 0.0, 0.0]),
    ([1.0, 2.0, NAN, INF], 6.0, [0.0, 0.0, 6.0, 0.0]),
]


@pytest.mark.parametrize("block", [1, 8])
@pytest.mark.parametrize(("gates", "grad", "expected"), MAXIMA)
def test_maximum_gives_its_gradient_to_who_attains_it(gates, grad, expected, block):
    check_gradient_of_maximum(gates, grad, expected, block)


@pytest.mark.parametrize("grad", [6.0, INF, NAN])
def test_gradient_of_several_nan_reaches_only_those(grad):
    x, bias, gates = torch.ones(1, 1, 1, 1), torch.ones(4, 1), torch.tensor([1, NAN, 2, NAN])
    tensors = (x, gates.view(1, 4, 1, 1, 1), torch.zeros(4, 1, 1), bias)
    _, (_, dg, *_) = run(spatial_gated_rnn, tensors, torch.full_like(x, grad))
    shares = dg.flatten()
    assert shares[[0, 2]].eq(0).all()
    torch.testing.assert_close(shares.sum().item(), grad, equal_nan=True)


@pytest.mark.parametrize("value", [NAN, INF])
def test_gradient_meets_a_special_weight_at_the_end_of_a_line_too(value):
    # w^T e is 0 * w there; the reference has no such product.
    tensors = (torch.ones(1, 1, 2, 5), None, torch.full((1, 1, 1), value), torch.zeros(1, 1))
    options = dict(directions=DIRECTIONS[:1], merge="sum")
    _, (dx, *_) = run(spatial_gated_rnn, tensors, torch.ones_like, **options)
    _, (expected, *_) = run(reference, tensors, torch.ones_like, **options)
    assert torch.equal(expected[..., -1], torch.ones(1, 1, 2))
    assert dx[..., -1].isnan().all()


@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_nan_under_a_maximum_leaves_gradients_of_other_lines(shape, block):
    tensors = inputs_for(shape, block, F32)
    n, c, i, j = shape[0] - 1, shape[1] // 2, shape[2] // 2, shape[3] // 3
    tensors[0][n, c, i, j] = NAN
    y, (dx, dg, *_) = run(spatial_gated_rnn, tensors, torch.ones_like)
    assert dx.isfinite().all()
    lines = touched(shape, block, DIRECTIONS, n, c, i, j).any(1)
    assert torch.equal(y.isnan(), lines)
    assert dg[~lines].isfinite().all()
