"""The reference loop against numbers worked by hand, scipy's filter, and symmetry.

What is worked by hand is asked of the scan as well.
"""

import math

import pytest
import scipy.signal
import torch
from comparison import F64

from gatedrnn import DIRECTIONS, functional, reference

LEFT, RIGHT, DOWN, UP = DIRECTIONS

both = pytest.mark.parametrize(
    "rnn",
    [reference.spatial_gated_rnn, functional.spatial_gated_rnn],
    ids=["reference", "scan"],
)


def line(*values):
    """A one-channel image of one row: (1, 1, 1, W)."""
    return torch.tensor(values, dtype=F64)[None, None, None]


def one(value):
    """A weight (1, 1, 1) for one direction."""
    return torch.full((1, 1, 1), value, dtype=F64)


X, G, B = line(1, 2, 3), line(0.5, 0.5, 2), torch.ones(1, 1, dtype=F64)

# w = 0.5, b = 1: h_1 = 1 + 0.5 * 1, h_2 = 2 + 0.5 * (0.75 + 1), h_3 = 3 + 2 * (1.4375 + 1); from
# the right 3 + 2 * 1, 2 + 0.5 * (2.5 + 1), 1 + 0.5 * (1.875 + 1); a column of one pixel: x + g b.
MAPS = {
    LEFT: [1.5, 2.875, 7.875],
    RIGHT: [2.4375, 3.75, 5],
    DOWN: [1.5, 2.5, 5],
    UP: [1.5, 2.5, 5],
}


@both
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_direction_gives_numbers_worked_by_hand(rnn, direction):
    y = rnn(X, G, one(0.5), B, directions=[direction])
    assert y.flatten().tolist() == MAPS[direction]


@both
@pytest.mark.parametrize(
    ("direction", "along"), [(DOWN, LEFT), (UP, RIGHT), (LEFT, DOWN), (RIGHT, UP)]
)
def test_column_is_a_row_on_end(rnn, direction, along):
    y = rnn(X.mT, G.mT, one(0.5), B, directions=[direction])
    assert y.flatten().tolist() == MAPS[along]


@both
@pytest.mark.parametrize(
    ("merge", "expected"),
    [
        ("max", [2.4375, 3.75, 7.875]),
        ("sum", [3.9375, 6.625, 12.875]),
        ("mean", [1.96875, 3.3125, 6.4375]),
        (None, [*MAPS[RIGHT], *MAPS[LEFT]]),
    ],
)
def test_merge_gives_numbers_worked_by_hand(rnn, merge, expected):
    weight, bias = one(0.5).expand(2, 1, 1), B.expand(2, 1)
    y = rnn(X, G, weight, bias, directions=[RIGHT, LEFT], merge=merge)
    assert y.shape == ((1, 2, 1, 1, 3) if merge is None else (1, 1, 1, 3))
    assert y.flatten().tolist() == expected


@both
@pytest.mark.parametrize(
    ("name", "theta"),
    [
        ("identity", lambda a: a),
        ("tanh", math.tanh),
        ("relu", lambda a: max(a, 0.0)),
        ("sigmoid", lambda a: 1 / (1 + math.exp(-a))),
    ],
)
def test_nonlinearity_is_applied_to_every_state(rnn, name, theta):
    h1 = theta(-1.0)
    h2 = theta(0.5 - 2 * h1)
    h3 = theta(-0.25 - 2 * h2)
    y = rnn(line(-1, 0.5, -0.25), None, one(-2.0), directions=[LEFT], nonlinearity=name)
    assert y.flatten().tolist() == pytest.approx([h1, h2, h3], rel=1e-15)


@both
@pytest.mark.parametrize(
    ("name", "norm"),
    [
        (None, lambda g: g),
        ("clamp", lambda g: min(max(g, -1.0), 1.0)),
        ("tanh", math.tanh),
        ("sigmoid", lambda g: 1 / (1 + math.exp(-g))),
    ],
)
def test_gate_activation_is_applied_to_every_gate(rnn, name, norm):
    h1 = 1 + norm(-3.0) * 1
    h2 = 2 + norm(0.25) * (0.5 * h1 + 1)
    h3 = 3 + norm(1.5) * (0.5 * h2 + 1)
    y = rnn(X, line(-3, 0.25, 1.5), one(0.5), B, directions=[LEFT], gate_activation=name)
    assert y.flatten().tolist() == pytest.approx([h1, h2, h3], rel=1e-15)


@both
def test_weight_multiplies_the_channels_of_its_group(rnn):
    # Two pixels of (1, 10, 100, 1000); a row of w times (1, 10) or (100, 1000), x_2 = 0.
    x = torch.zeros(1, 4, 1, 2, dtype=F64)
    x[0, :, 0, 0] = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    weight = torch.tensor([[[1, 2], [3, 4], [5, 6], [7, 8]]], dtype=F64)
    y = rnn(x, None, weight, directions=[LEFT])
    assert y[0, :, 0, 1].tolist() == [21, 43, 6500, 8700]


@both
def test_gate_forms_are_maps_of_pixel_channel_and_direction(rnn):
    # Two pixels, two channels, x = 1, w = identity, no bias: the second pixel on a line is 1 + g.
    x = torch.ones(1, 2, 1, 2, dtype=F64)
    weight = torch.eye(2, dtype=F64).expand(2, 2, 2)
    options = dict(directions=[LEFT, RIGHT], merge=None)

    def seconds(g):
        y = rnn(x, g, weight, **options)
        return [y[0, 0, :, 0, 1].tolist(), y[0, 1, :, 0, 0].tolist()]

    pixels = torch.tensor([3.0, 4.0], dtype=F64)
    assert seconds(None) == [[2, 2], [2, 2]]
    assert seconds(pixels.view(1, 1, 1, 2)) == [[5, 5], [4, 4]]
    channels = torch.tensor([[3.0, 4.0], [5.0, 6.0]], dtype=F64)
    assert seconds(channels.view(1, 2, 1, 2)) == [[5, 7], [4, 6]]
    assert seconds(channels.view(1, 2, 1, 1, 2)) == [[5, 5], [6, 6]]  # a row per direction
    each = torch.tensor([[[3.0, 4.0], [5.0, 6.0]], [[7.0, 8.0], [9.0, 10.0]]], dtype=F64)
    assert seconds(each.view(1, 2, 2, 1, 2)) == [[5, 7], [8, 10]]


@both
def test_cascade_feeds_each_map_to_the_next_direction(rnn):
    # From the left with w = 0.5: (1, 2.5, 4.25). Of that from the right with w = -1, b = 1:
    # 4.25 + 1, then 2.5 + (1 - 5.25), then 1 + (1 + 1.75).
    weight = torch.tensor([0.5, -1.0], dtype=F64).view(2, 1, 1)
    bias = torch.tensor([[0.0], [1.0]], dtype=F64)
    y = rnn(X, None, weight, bias, directions=[LEFT, RIGHT], integration="cascade")
    assert y.flatten().tolist() == [3.75, -1.75, 5.25]


@both
def test_gradients_are_those_worked_by_hand(rnn):
    # L = h_2 = x_2 + g_2 (w h_1 + b), h_1 = x_1 + g_1 b.
    x1, x2, g1, g2, w, b = 2.0, 3.0, 0.5, -0.75, 1.5, 0.25
    h1 = x1 + g1 * b
    tensors = [line(x1, x2), line(g1, g2), one(w), torch.full((1, 1), b, dtype=F64)]
    leaves = [t.requires_grad_() for t in tensors]
    rnn(*leaves, directions=[LEFT])[..., 1].sum().backward()
    assert [t.grad.flatten().tolist() for t in leaves] == [
        [g2 * w, 1.0],
        [g2 * w * b, w * h1 + b],
        [g2 * h1],
        [g2 * (w * g1 + 1)],
    ]


@both
@pytest.mark.parametrize("w", [0.9, -1.0, 0.3])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_scalar_scan_is_a_recursive_filter(rnn, w, direction):
    x = torch.randn(2, 1, 9, 13, dtype=F64, generator=torch.Generator().manual_seed(0))
    axis = 3 if direction in (LEFT, RIGHT) else 2
    flips = [axis] if direction in (RIGHT, UP) else []
    filtered = scipy.signal.lfilter([1], [1, -w], x.flip(flips).numpy(), axis=axis)
    expected = torch.from_numpy(filtered).flip(flips)
    y = rnn(x, None, one(w), directions=[direction])
    torch.testing.assert_close(y, expected, rtol=1e-14, atol=1e-14)


def random_inputs(directions=4):
    generator = torch.Generator().manual_seed(1)
    sizes = ((2, 3, 4, 5), (2, directions, 3, 4, 5), (directions, 3, 3), (directions, 3))
    return [torch.randn(size, dtype=F64, generator=generator) for size in sizes]


@both
@pytest.mark.parametrize("merge", ["max", "sum"])
@pytest.mark.parametrize(
    ("turn", "order"),
    [
        (lambda t: t.flip(-1), [1, 0, 2, 3]),
        (lambda t: t.flip(-2), [0, 1, 3, 2]),
        (lambda t: t.mT, [2, 3, 0, 1]),
        (lambda t: t.rot90(1, (-2, -1)), [2, 3, 1, 0]),
    ],
    ids=["flip_width", "flip_height", "transpose", "quarter_turn"],
)
def test_turned_image_gives_the_turned_map(rnn, merge, turn, order):
    x, g, weight, bias = random_inputs()
    y = rnn(x, g, weight, bias, merge=merge)
    turned = rnn(turn(x), turn(g[:, order]), weight[order], bias[order], merge=merge)
    torch.testing.assert_close(turned, turn(y), rtol=1e-13, atol=1e-13)


@both
def test_order_of_directions_is_that_of_weight_bias_and_gates(rnn):
    x, g, weight, bias = random_inputs()
    maps = rnn(x, g, weight, bias, merge=None)
    order = [2, 0, 3]
    some = rnn(
        x, g[:, order], weight[order], bias[order],
        directions=[DIRECTIONS[d] for d in order], merge=None,
    )  # fmt: skip
    torch.testing.assert_close(some, maps[:, order], rtol=0, atol=0)


@both
def test_tied_maximum_shares_its_gradient(rnn):
    # Without a bias all four directions agree on an image of one pixel; of two, three agree: the
    # fourth has another pixel before it, which lifts (x > 0) or lowers (x < 0) it.
    x = torch.tensor([[[[1.0]]]], dtype=F64)
    weight = torch.full((4, 1, 1), 0.5, dtype=F64)
    bias = torch.zeros(4, 1, dtype=F64, requires_grad=True)
    rnn(x, None, weight, bias).backward()
    assert bias.grad.flatten().tolist() == [0.25] * 4

    bias = torch.zeros(4, 1, dtype=F64, requires_grad=True)
    rnn(line(-1, 3), None, weight, bias)[..., 1].backward()
    assert bias.grad.flatten().tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3], rel=1e-15)


@both
def test_maximum_propagates_nan(rnn):
    y = rnn(line(1, math.nan, 3), None, one(0.5).expand(2, 1, 1), directions=[LEFT, DOWN])
    assert y.isnan().flatten().tolist() == [False, True, True]


@both
@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0), (0, 2, 0, 0)])
@pytest.mark.parametrize("merge", ["max", "mean", "sum", None])
def test_empty_image_gives_an_empty_map_and_zero_gradients(rnn, shape, merge):
    x = torch.zeros(shape, dtype=F64, requires_grad=True)
    weight = torch.ones(4, 2, 2, dtype=F64, requires_grad=True)
    bias = torch.ones(4, 2, dtype=F64, requires_grad=True)
    y = rnn(x, x.detach(), weight, bias, merge=merge)
    assert y.shape == (shape if merge else (shape[0], 4, *shape[1:]))
    grads = torch.autograd.grad(
        y.sum(), (x, weight, bias), allow_unused=True, materialize_grads=True
    )
    assert grads[0].shape == shape
    assert not grads[1].any()
    assert not grads[2].any()
