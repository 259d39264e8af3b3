"""The ways of a forward pass on shapes with many strips, whole tiles and more tasks than blocks."""

import pytest
import torch
from comparison import BF16, F32, F64
from gpu_cases import forward_and_backward, make_inputs
from scan_cases import a_case
from small_grid import ways
from test_scan import check

from gatedrnn import DIRECTIONS

# On 132 multiprocessors: by strips up to 264 of them, else the wavefront; whole tiles and parts of
# tiles; rows of 128 for the chunks' row segments. Then more tiles than resident blocks.
LARGE = (
    ((40, 8, 48, 36), 8),
    ((24, 16, 48, 36), 16),
    ((24, 16, 48, 36), 4),
    ((24, 16, 48, 36), 2),
    ((2, 8, 48, 128), 1),
    ((2, 8, 48, 52), 1),
    ((24, 8, 96, 96), 8),
    ((24, 16, 96, 96), 16),
    ((8, 16, 48, 256), 1),
)
BOTH = [(way, *case) for case in LARGE for way in ways(case[1], F32)]


@pytest.mark.parametrize("merge", ["max", "sum", None])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("shape", "block"), LARGE)
def test_large_shapes_match_reference(shape, block, dtype, merge):
    check(a_case(shape=shape, block=block, dtype=dtype, merge=merge))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("way", "shape", "block"), BOTH)
def test_forced_way_matches_reference(way, shape, block, dtype, monkeypatch):
    monkeypatch.setenv("GATEDRNN_FORWARD", way)
    check(a_case(shape=shape, block=block, dtype=dtype))
    check(a_case(shape=shape, block=block, dtype=dtype, directions=DIRECTIONS[1:2]))


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced"])
@pytest.mark.parametrize(("way", "shape", "block"), BOTH[::3])
def test_forced_way_takes_any_layout(way, shape, block, layout, monkeypatch):
    monkeypatch.setenv("GATEDRNN_FORWARD", way)
    check(a_case(shape=shape, block=block, x_layout=layout, g_layout=layout))


@pytest.mark.parametrize("dtype", [F32, F64])
def test_large_calls_on_two_streams_do_not_disturb_each_other(dtype):
    calls = [make_inputs(*case, dtype, seed) for seed, case in enumerate(LARGE[6:])]
    expected = [forward_and_backward(*tensors) for tensors in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    for _ in range(5):
        results = []
        for stream, tensors in zip(streams, calls, strict=True):
            with torch.cuda.stream(stream):
                results.append(forward_and_backward(*tensors))
        torch.cuda.synchronize()
        for ours, theirs in zip(results, expected, strict=True):
            assert all(map(torch.equal, ours, theirs))
