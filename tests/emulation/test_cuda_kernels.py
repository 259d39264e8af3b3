"""The CUDA kernels, emulated, against the float64 reference: output and every gradient.

The default tier runs every kernel with every two options together; the grids are sampled there.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from comparison import BF16, DTYPES, F16, F32, F64, assert_close, run
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_cases import GATE_ACTIVATIONS, GATES, MERGES, NONLINEARITIES, a_case, cases
from test_scan import check
from test_scan_isolation import (
    MAXIMA,
    check_gradient_of_maximum,
    check_special_values_as_reference,
)
from test_scan_large import check_far_pixels
from tiers import pairwise, sampled

from gatedrnn import DIRECTIONS, SpatialGatedRNN
from gatedrnn.functional import spatial_gated_rnn
from gatedrnn.reference import spatial_gated_rnn as reference

pytestmark = pytest.mark.usefixtures("emulated")

FEW = settings(max_examples=max(settings.default.max_examples // 16, 3))
SIDES = (1, 2, 7, 15, 16, 17, 31, 32, 33, 40, 65)  # around one, two and four tiles
# A device of few processors has many lines for each, one of many has few: that chooses the kernel.
PROCESSORS = ("1", "132")


# Block sizes that have kernels of their own, and one of the general kernel.
BLOCKS = (1, 2, 4, 8, 16, 3)
PAIRS = pairwise(
    BLOCKS,
    GATES,
    MERGES,
    NONLINEARITIES,
    GATE_ACTIVATIONS,
    DTYPES,
    PROCESSORS,
    ("contiguous", "channels_last", "transposed"),
    (DIRECTIONS, DIRECTIONS[:1], DIRECTIONS[1:3], DIRECTIONS[3:]),
    ((17, 33), (16, 40), (32, 16)),  # ends within a tile; in packs alone; whole tiles
)


def check_pair(block, gate, merge, nonlinearity, gate_activation, dtype, processors, *others):
    """Checks one of PAIRS; the number of processors is the caller's."""
    layout, directions, size = others
    check(
        a_case(
            dtype=dtype,
            shape=(2, max(block, 8 // block * block), *size),
            block=block,
            directions=directions,
            merge=merge,
            nonlinearity=nonlinearity,
            gate=gate,
            gate_activation=gate_activation,
            x_layout=layout,
            g_layout=layout,
            grad_layout=layout,
        )
    )


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"block{pair[0]}")
def test_options_in_pairs_match_reference(pair, monkeypatch):
    monkeypatch.setenv("GATEDRNN_EMULATION_MULTIPROCESSORS", pair[6])
    check_pair(*pair)


@pytest.fixture
def check_all(monkeypatch):
    """Checks a case on devices of every size in PROCESSORS."""

    def checked(**changes):
        for processors in PROCESSORS:
            monkeypatch.setenv("GATEDRNN_EMULATION_MULTIPROCESSORS", processors)
            check(a_case(**changes))

    return checked


@pytest.mark.parametrize(("processors", "dtype"), sampled(itertools.product(PROCESSORS, DTYPES), 2))
@FEW
@given(data=st.data())
def test_kernels_match_reference(data, dtype, processors, monkeypatch):
    monkeypatch.setenv("GATEDRNN_EMULATION_MULTIPROCESSORS", processors)
    check(data.draw(cases(dtype)))


@FEW
@given(data=st.data())
def test_kernels_of_nothing_match_reference(data):
    check(data.draw(cases(F64, images=(0, 1, 2), sizes=(0, 0, 3), blocks=(1, 2, 17))))


@pytest.mark.slow
@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("gate", GATES)
def test_every_gate_and_merge_matches_reference(check_all, gate, merge, block):
    seed = GATES.index(gate) + MERGES.index(merge)
    dtype = (F32, BF16, F16)[seed % 3]
    check_all(gate=gate, merge=merge, dtype=dtype, shape=(2, 4, 17, 33), block=block, seed=seed)
    if block > 1:
        check(a_case(gate=gate, merge=merge, dtype=F64, shape=(1, 6, 17, 18), block=3))


@pytest.mark.slow
@pytest.mark.parametrize("block", [1, 2, 3, 4, 5, 8, 16, 20, 33, 64])
def test_every_block_size_matches_reference(check_all, block):
    for gate, bias in (("channel", True), ("direction_pixel", False)):
        for channels in (block, 3 * block) if block < 16 else (block,):
            check_all(shape=(1, channels, 19, 18), block=block, gate=gate, bias=bias)


@pytest.mark.parametrize(
    ("height", "width"), sampled(zip(SIDES, SIDES[5:] + SIDES[:5], strict=True), 1)
)
def test_sizes_around_tiles_match_reference(check_all, height, width):
    check_all(shape=(1, 8, height, width))
    check_all(shape=(1, 5, height, width), block=1, gate="direction_channel")
    check_all(shape=(1, 16, height, width), block=16, dtype=BF16, gate="pixel")
    check(a_case(shape=(1, 3, height, width), block=3, gate="direction_channel", merge=None))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 8, 2, 300), (1, 8, 300, 1), (1, 5, 1, 300)])
def test_long_thin_maps_match_reference(check_all, shape):
    for block in (1, shape[1]):
        check_all(shape=shape, block=block)
    check(a_case(shape=shape, block=shape[1], gate="pixel", grad_layout="expanded", merge=None))


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_every_set_of_directions_matches_reference(check_all, number):
    for directions in itertools.combinations(DIRECTIONS, number):
        for merge, block in (("max", 2), ("mean", 2), ("max", 1), (None, 1)):
            check_all(directions=directions[::-1], merge=merge, shape=(1, 4, 18, 20), block=block)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    sampled(itertools.product(("channels_last", "transposed", "sliced"), (F32, BF16)), 1),
)
def test_layouts_match_reference(check_all, dtype, layout):
    other = "channels_last" if layout == "transposed" else "contiguous"
    for x_layout, g_layout in ((layout, layout), (layout, other), (other, layout)):
        layouts = dict(x_layout=x_layout, g_layout=g_layout, grad_layout=layout)
        for block, gate in ((8, "direction_channel"), (1, "channel")):
            check_all(dtype=dtype, shape=(2, 8, 17, 20), block=block, gate=gate, **layouts)


@pytest.mark.parametrize(
    ("height", "width", "dtype"),
    sampled([(17, 16, F32), (16, 17, F32), (17, 16, BF16), (16, 17, BF16)], 2),
)
def test_packs_lie_at_multiples_of_their_size(check_all, dtype, height, width):
    # Padded by three: rows as long as no multiple of a pack, or that none begins.
    padded = dict.fromkeys(("x_layout", "g_layout", "grad_layout"), "padded")
    for block in (8, 1):
        check_all(dtype=dtype, shape=(2, 8, height, width), block=block, **padded)


@pytest.mark.parametrize(
    ("dim", "block", "processors"), sampled(itertools.product(range(4), (1, 2), PROCESSORS), 4)
)
def test_offsets_above_2_to_31_reach_the_right_pixels(dim, block, processors, monkeypatch):
    monkeypatch.setenv("GATEDRNN_EMULATION_MULTIPROCESSORS", processors)
    check_far_pixels(dim, block)


# Turing has 64 KiB. Less makes tiles of a single pixel, which otherwise take hundreds of channels.
@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [100, 64, 20])
@pytest.mark.parametrize("dtype", [F64, F32])
def test_small_shared_memory_matches_reference(check_all, dtype, kilobytes, monkeypatch):
    monkeypatch.setenv("GATEDRNN_EMULATION_SHARED_BYTES", str(kilobytes << 10))
    for channels, block in ((8, 1), (16, 16), (40, 40)) if kilobytes > 20 else ((40, 40),):
        shape = (1, channels, 9, 6)
        check_all(dtype=dtype, shape=shape, block=block, gate="direction_channel")


def test_threads_launch_one_kernel_with_unlike_shared_memory():
    # The limit belongs to the kernel. The emulation refuses to lower it under another's launch.
    cases = [a_case(shape=(1, 16, 17, 20), block=16, gate=gate) for gate in GATES[-2:] * 2]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(check, cases))


def test_more_lines_than_a_kernel_counts_are_refused():
    x = torch.zeros(1).expand(1, 1, 1 << 26, 1)
    with pytest.raises(RuntimeError, match="more lines than a call on a GPU can count"):
        spatial_gated_rnn(x, None, torch.zeros(4, 1, 1))


WAYS = [("wavefront", 1), ("wavefront", 8), ("strips", 1), ("strips", 16), ("chunks", 1)]


@pytest.mark.parametrize(("way", "block"), WAYS)
def test_forced_way_matches_reference(way, block, monkeypatch):
    monkeypatch.setenv("GATEDRNN_FORWARD", way)
    check(a_case(shape=(2, 16, 18, 20), block=block))


@pytest.mark.parametrize(("way", "block"), [("chunks", 2), ("strips", 3)])
def test_forced_way_that_cannot_serve_is_refused(way, block, monkeypatch):
    monkeypatch.setenv("GATEDRNN_FORWARD", way)
    with pytest.raises(RuntimeError, match=f"GATEDRNN_FORWARD is {way}, which cannot serve"):
        check(a_case(shape=(1, 6, 4, 5), block=block))


def test_unknown_way_is_refused(monkeypatch):
    monkeypatch.setenv("GATEDRNN_FORWARD", "tiles")
    with pytest.raises(RuntimeError, match="must be wavefront, strips or chunks, got 'tiles'"):
        check(a_case(shape=(1, 2, 4, 5), block=2))


def test_more_channels_than_shared_memory_holds_are_refused(monkeypatch):
    monkeypatch.setenv("GATEDRNN_EMULATION_SHARED_BYTES", "1000")
    x = torch.zeros(1, 64, 4, 4)
    with pytest.raises(RuntimeError, match="C / groups = 64 channels are more than"):
        spatial_gated_rnn(x, x, torch.zeros(4, 64, 64))


ORDERS = [
    (dtype, processors, *call)
    for call in (
        ((2, 6, 34, 20), 1, 6, None),
        ((3, 16, 33, 18), 8, 16, "max"),
        ((1, 20, 18, 3), 20, 1, "mean"),
        ((1, 16, 33, 33), 16, 1, "sum"),
    )
    for dtype, processors in ((F32, "132"), (BF16, "1"), (F32, "1"), (F64, "1"), (BF16, "132"))
]


@pytest.mark.parametrize(
    ("dtype", "processors", "shape", "block", "gate_channels", "merge"), sampled(ORDERS, 3)
)
def test_bits_do_not_depend_on_the_order_of_threads(
    dtype, processors, shape, block, gate_channels, merge, monkeypatch
):
    generator = torch.Generator().manual_seed(4)
    n, c, h, w = shape
    state = F64 if dtype == F64 else F32
    x = torch.randn(shape, generator=generator).to(dtype)
    g = torch.randn((n, gate_channels, h, w), generator=generator).to(dtype)
    weight = (torch.randn(4, c, block, generator=generator) / (2 * block**0.5)).to(state)
    bias = torch.randn(4, c, generator=generator).to(state)
    grad = torch.randn((n, 4, c, h, w), generator=generator).to(dtype)
    grad = grad if merge is None else grad[:, 0].contiguous()
    monkeypatch.setenv("GATEDRNN_EMULATION_MULTIPROCESSORS", processors)
    expected = None
    for seed, resident in enumerate(("1", "3", "16")):
        monkeypatch.setenv("GATEDRNN_EMULATION_SEED", str(seed))
        monkeypatch.setenv("GATEDRNN_EMULATION_RESIDENT_BLOCKS", resident)
        y, grads = run(
            spatial_gated_rnn, (x, g, weight, bias), grad, merge=merge, gate_activation="clamp"
        )
        bits = [y, *grads]
        expected = expected or bits
        assert all(map(torch.equal, bits, expected)), f"seed {seed}"


def test_layer_runs_on_the_kernels():
    torch.manual_seed(0)
    layer = SpatialGatedRNN(8, groups=2).double()
    x, g = torch.randn(2, 1, 8, 20, 18, dtype=F64)
    tensors = (x, g, layer.weight.detach(), layer.bias.detach())
    y, grads = run(lambda x, g: layer(x, g), (x, g), torch.ones_like)
    expected, expected_grads = run(reference, tensors, torch.ones_like, gate_activation="clamp")
    assert_close(y, expected)
    for ours, theirs in zip(grads, expected_grads, strict=False):
        assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("shape", "gate_layout", "dtype"),
    sampled(
        [
            (shape, gate_layout, dtype)
            for dtype in (F32, BF16)
            for shape, gate_layout in (
                ((2, 1, 18, 128), "contiguous"),
                ((2, 3, 17, 128), "contiguous"),
                ((1, 9, 5, 256), "contiguous"),
                ((1, 2, 33, 384), "contiguous"),
                ((1, 3, 16, 128), "channels_last"),
            )
        ],
        1,
    ),
)
def test_rows_in_pieces_match_reference(check_all, shape, gate_layout, dtype):
    # Of dense maps as wide as eight tiles, or a multiple of that, a task has pieces of one channel.
    check_all(shape=shape, block=1, dtype=dtype, g_layout=gate_layout)
    check_all(shape=shape, block=1, dtype=dtype, merge="sum", bias=False, gate_activation="tanh")
    for directions in (DIRECTIONS[1:2], DIRECTIONS[::2], DIRECTIONS[1:]):
        check_all(shape=shape, block=1, dtype=dtype, directions=directions)


SPECIAL = itertools.product(
    ((1000, 1e-20, 1, 0), (-1000, 1e-20, 1, 1e-30), (0.9, float("inf"), 1e-3, 1e-3)),
    (False, True),
    (110, 256),  # the latter is read in pieces
    (1, 3),
)


@pytest.mark.parametrize(("values", "upright", "width", "channels"), sampled(SPECIAL, 5))
def test_chunks_say_nan_or_infinity_only_where_the_loop_does(
    values, upright, width, channels, monkeypatch
):
    w, first, g, closed = values
    # What a chunk of 16 pixels multiplies its first state with overflows before a gate closes, or
    # underflows next to infinity.
    monkeypatch.setenv("GATEDRNN_EMULATION_MULTIPROCESSORS", "132")  # few lines for so many
    begin = 32 if upright or width == 110 else 160
    shape = (1, channels, 72 if upright else 40, width)
    x, gate = torch.zeros(shape), torch.full(shape, float(g))
    along_x, along_gate = (x.mT, gate.mT) if upright else (x, gate)
    lines = torch.linspace(1, 2, along_x.shape[-2]) * torch.arange(1, channels + 1).view(1, -1, 1)
    along_x[..., begin + (8 if first != float("inf") else -29)] = first * lines
    along_gate[..., begin + 14] = closed
    along_gate[..., begin + 15 :] = min(g, 1 / abs(w))
    for directions in (DIRECTIONS[::2], DIRECTIONS[:1], DIRECTIONS[2:3]):
        merge = "max" if len(directions) == 1 else None  # maps of each are not read in pieces
        weight = torch.full((len(directions), channels, 1), float(w))
        options = dict(directions=directions, merge=merge)
        ours, loop = (f(x, gate, weight, **options) for f in (spatial_gated_rnn, reference))
        torch.testing.assert_close(ours, loop, equal_nan=True)


@pytest.mark.parametrize(
    ("processors", "nonlinearity", "gate_activation"),
    sampled(
        [
            (processors, *options)
            for processors in PROCESSORS
            for options in zip(
                NONLINEARITIES, GATE_ACTIVATIONS[1:] + GATE_ACTIVATIONS[:1], strict=True
            )
        ],
        3,
    ),
)
def test_special_values_stand_where_the_reference_has_them(
    nonlinearity, gate_activation, processors, monkeypatch
):
    monkeypatch.setenv("GATEDRNN_EMULATION_MULTIPROCESSORS", processors)
    check_special_values_as_reference(nonlinearity, gate_activation)


@pytest.mark.parametrize("block", [1, 8])
def test_maximum_gives_its_gradient_to_who_attains_it(block):
    for gates, grad, expected in MAXIMA:
        check_gradient_of_maximum(gates, grad, expected, block)


@pytest.mark.parametrize("gate_channels", [1, 20])
def test_a_cut_gate_has_no_gradient_whatever_comes_in(gate_channels):
    x, grad = torch.randn(2, 1, 20, 18, 17).unbind(0)
    g = torch.full((1, gate_channels, 18, 17), 2.0, requires_grad=True)
    grad[0, 3, 5, 6] = float("nan")
    spatial_gated_rnn(x, g, torch.zeros(4, 20, 1), gate_activation="clamp").backward(grad)
    assert torch.equal(g.grad, torch.zeros_like(g))
