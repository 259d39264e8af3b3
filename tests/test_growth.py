"""The layer's promise that its states grow at most linearly, on lines of 4096 pixels."""

import itertools

import pytest
import torch
from comparison import DTYPES, F32, F64, HALF, through
from hypothesis import given
from hypothesis import strategies as st
from tiers import sampled

from gatedrnn import DIRECTIONS, SpatialGatedRNN

T = 4096


def weights(kind, d, c, k, generator):
    """(D, C, K) whose clamped selves have norm one and keep a state from shrinking."""
    normal = torch.randn(d * c // k, k, k, generator=generator, dtype=F64)
    if kind == "identity":
        made = torch.eye(k, dtype=F64).expand_as(normal)
    elif kind == "orthogonal":
        made = torch.linalg.qr(normal)[0]
    elif kind == "rank_one":  # v v^T: what is along v stays
        v = normal[:, :, :1]
        made = v * v.mT
    elif kind == "huge":
        made = 1e4 * normal
    else:  # "mean": every entry 1 / K
        made = torch.ones_like(normal) / k
    return made.reshape(d, c, k)


def line_norms(values, axis):
    """Norms over the channels of a line, in float64: (N, C, H, W) -> (N, lines, T)."""
    norms = values.double().pow(2).sum(1).sqrt()
    return norms if axis == 3 else norms.mT


def bound(x, bias, direction, stages_before=None):
    """sum of ||x_j|| + ||b|| up to every pixel of a direction, times (1 + 1e-5)^T."""
    axis = 3 if direction in DIRECTIONS[:2] else 2
    reverse = direction in (DIRECTIONS[1], DIRECTIONS[3])
    steps = line_norms(x, axis) if stages_before is None else stages_before
    steps = steps + bias.double().norm()
    steps = steps.flip(-1).cumsum(-1).flip(-1) if reverse else steps.cumsum(-1)
    return steps * (1 + 1e-5) ** T


def rounding(dtype):
    """One rounding of every output, which moves a norm by as much, and the state's own error."""
    eps = torch.finfo(dtype).eps / 2 if dtype in HALF else 0
    return 1 + eps + T * torch.finfo(F64 if dtype == F64 else F32).eps


@st.composite
def layers(draw, dtype, **options):
    c, k = draw(st.sampled_from([(1, 1), (4, 4), (6, 3), (8, 8), (17, 17), (4, 1)]))
    kind = draw(st.sampled_from(["identity", "orthogonal", "rank_one", "huge", "mean"]))
    gates = draw(st.sampled_from(["one", "minus_one", "signs", "beyond", "none"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    d = len(options["directions"])
    gate_activation = draw(st.sampled_from(["clamp", "clamp", "tanh", "sigmoid"]))
    layer = SpatialGatedRNN(
        c, groups=c // k, gate_activation=gate_activation, dtype=dtype, **options
    )
    layer.raw_weight.data.copy_(weights(kind, d, c, k, generator))
    layer.bias.data.copy_(0.01 * torch.randn(d, c, generator=generator, dtype=F64))
    wide = draw(st.booleans())
    shape = (1, c, 2, T) if wide else (1, c, T, 2)
    # All pushes point the same way, or only the first pixels push, so that states do grow.
    x = torch.rand(shape, generator=generator, dtype=F64) * draw(st.sampled_from([0.01, 1.0]))
    g = {
        "one": torch.ones(shape),
        "minus_one": -torch.ones(shape),
        "signs": torch.randn(shape, generator=generator).sign(),
        "beyond": 5 * torch.randn(shape, generator=generator),
        "none": None,
    }[gates]
    return layer, x.to(dtype), None if g is None else g.to(dtype)


@pytest.mark.parametrize(
    ("nonlinearity", "dtype"),
    sampled(itertools.product(("identity", "tanh", "relu"), DTYPES), 4),
)
@given(data=st.data())
def test_state_grows_at_most_linearly(data, nonlinearity, dtype):
    options = dict(directions=DIRECTIONS, merge=None, nonlinearity=nonlinearity)
    layer, x, g = data.draw(layers(dtype, **options))
    with torch.no_grad():
        maps = through(layer, x, g)
    for d, direction in enumerate(DIRECTIONS):
        axis = 3 if d < 2 else 2
        limit = bound(x, layer.bias.detach()[d], direction) * rounding(dtype)
        assert (line_norms(maps[:, d], axis) <= limit).all()


@pytest.mark.parametrize("dtype", sampled(DTYPES, 2))
@given(data=st.data())
def test_merged_maps_are_bounded_by_their_merge(data, dtype):
    merge = data.draw(st.sampled_from(["max", "mean", "sum"]))
    layer, x, g = data.draw(layers(dtype, directions=DIRECTIONS, merge=merge))
    with torch.no_grad():
        y = through(layer, x, g).double()
    limits = []
    for d, direction in enumerate(DIRECTIONS):
        limit = bound(x, layer.bias.detach()[d], direction) * rounding(dtype)
        limits.append(limit if d < 2 else limit.mT)
    limits = torch.stack(limits)
    if merge == "max":  # per channel
        assert (y.abs().amax(1) <= limits.amax(0)).all()
    else:
        assert (y.norm(dim=1) <= (limits.mean(0) if merge == "mean" else limits.sum(0))).all()


@pytest.mark.parametrize("dtype", sampled(DTYPES, 2))
@given(data=st.data())
def test_cascade_grows_stage_by_stage(data, dtype):
    directions = data.draw(st.permutations(DIRECTIONS))[: data.draw(st.integers(2, 4))]
    layer, x, g = data.draw(layers(dtype, directions=directions, integration="cascade"))
    with torch.no_grad():
        y = through(layer, x, g)
    if dtype == torch.float16 and not y.isfinite().all():
        return  # growth of degree D is beyond what float16 can hold: 65504
    steps = x.double().pow(2).sum(1).sqrt()  # (N, H, W)
    for d, direction in enumerate(directions):
        along_width = direction in DIRECTIONS[:2]
        steps = steps if along_width else steps.mT
        limit = bound(x, layer.bias.detach()[d], direction, steps) * rounding(dtype)
        steps = limit if along_width else limit.mT
    assert (y.double().pow(2).sum(1).sqrt() <= steps).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_sigmoid_states_are_within_sqrt_of_channels(dtype):
    layer = SpatialGatedRNN(9, nonlinearity="sigmoid", merge=None, dtype=dtype)
    x = 100 * torch.randn(1, 9, 2, T, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = through(layer, x.to(dtype), torch.ones_like(x).to(dtype))
    assert (maps.double().pow(2).sum(2).sqrt() <= 3).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bound_is_nearly_attained(dtype):
    # w = identity, g = 1, x > 0 along one direction: the norm grows by ||x|| at every pixel, so the
    # bound above is not idle.
    layer = SpatialGatedRNN(4, directions=["left_to_right"], bias=False, dtype=dtype)
    layer.raw_weight.data.copy_(3 * torch.eye(4))
    x = torch.full((1, 4, 1, T), 2.0**-6, dtype=dtype)
    with torch.no_grad():
        y = through(layer, x, torch.ones_like(x))
    torch.testing.assert_close(
        y[0, :, 0, -1].double(), torch.full((4,), 64.0, dtype=F64), rtol=2e-3, atol=0
    )


@pytest.mark.parametrize("dtype", HALF)
def test_weight_of_16_bits_does_not_grow_past_one_by_rounding(dtype):
    # 1.002, a norm of one rounded to bfloat16, would come to e^8 on this line.
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        q = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0]
        layer = SpatialGatedRNN(8, directions=["left_to_right"], bias=False, dtype=dtype)
        layer.raw_weight.data.copy_(q)
        x = torch.zeros(1, 8, 1, T, dtype=dtype)
        x[0, :, 0, 0] = torch.randn(8, generator=generator)
        with torch.no_grad():
            norms = through(layer, x).double().norm(dim=1).flatten()
        assert norms.max() <= norms[0] * (1 + 1e-5) ** T * rounding(dtype) ** 2
