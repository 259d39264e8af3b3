"""The portable CPU kernels, cross-compiled for aarch64 and run by QEMU, against the reference.

It is the code that Apple's and AWS Graviton's processors run. `make test-aarch64` runs this file.
"""

import shutil
import struct
import subprocess
from pathlib import Path

import children
import pytest
import torch
from build_cache import ROOT, build_lock, digest
from comparison import DTYPES, F64, LAYOUTS, assert_close, run, state_of, storage
from scan_cases import GATES, a_case, exact
from tiers import pairwise

from gatedrnn import DIRECTIONS
from gatedrnn._options import (
    GATE_ACTIVATIONS,
    MERGES,
    NONLINEARITIES,
    Options,
    direction_code,
    op_arguments,
)
from gatedrnn.reference import spatial_gated_rnn as reference

CXX, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"
# As setup.py, and one file that needs no libraries of the machine that it runs on.
FLAGS = ["-std=c++20", "-O3", "-Wall", "-Wextra", "-Werror", "-static", "-pthread"]
FLAGS += [f"-I{ROOT / 'csrc'}"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.build,
    pytest.mark.timeout(1500),  # the first one compiles the kernels
    pytest.mark.skipif(
        not (shutil.which(CXX) and shutil.which(QEMU)), reason=f"needs {CXX} and {QEMU}"
    ),
]


@pytest.fixture(scope="session")
def driver() -> Path:
    """The program of scan_case.cpp; it is compiled again when a source has changed."""
    folder = ROOT / "build/aarch64"
    folder.mkdir(parents=True, exist_ok=True)
    sources = [Path(__file__).with_name("scan_case.cpp"), *sorted(ROOT.glob("csrc/cpu/*.cpp"))]
    headers = [*sorted(ROOT.glob("csrc/*.h")), *sorted(ROOT.glob("csrc/cpu/*.[hi]*"))]
    compiler = children.run([CXX, "--version"], check=True).stdout
    made_from = digest(*(path.read_text() for path in [*sources, *headers]), compiler, *FLAGS)
    program = folder / f"scan_case-{made_from}"
    with build_lock("aarch64"):
        if not program.exists():
            part = program.with_suffix(".part")
            children.run([CXX, *FLAGS, *sources, "-o", part], timeout=1400, check=True)
            part.rename(program)
    return program


def given_tensor(tensor, strides):
    """What scan_case.cpp reads of a tensor: strides, its first byte, and its memory."""
    if tensor is None:
        return struct.pack("7q", *[0] * 7)
    memory = storage(tensor).numpy().tobytes()
    first = tensor.storage_offset() * tensor.element_size()
    return struct.pack("7q", *strides, first, len(memory)) + memory


def map_strides(tensor):
    """(N, D, C, H, W) strides of a map, as csrc/ops.cpp gives them: 0 where D or C is 1."""
    if tensor is None:
        return [0] * 5
    sizes, strides = tensor.shape, list(tensor.stride())
    if tensor.dim() == 4:
        sizes, strides = (sizes[0], 1, *sizes[1:]), [strides[0], 0, *strides[1:]]
    return [0 if i in (1, 2) and sizes[i] == 1 else strides[i] for i in range(5)]


def scan(driver, case, x, g, weight, bias, grad):
    """y, dx, dg, dweight and dbias of the aarch64 kernels."""
    codes = tuple(direction_code(name) for name in case.directions)
    options = Options(codes, case.merge, case.nonlinearity, case.gate_activation)
    directions, *rest = op_arguments(options)
    d = len(directions)
    per_direction = g is not None and g.dim() == 5 and d > 1
    per_channel = g is not None and g.shape[-3] > 1
    numbers = [
        DTYPES.index(x.dtype),
        *x.shape,
        weight.shape[2],
        d,
        *directions,
        *rest,
        per_direction,
        per_channel,
    ]

    y = torch.empty_like(grad, memory_format=torch.contiguous_format)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dg = None if g is None else torch.empty_like(g, memory_format=torch.contiguous_format)
    if case.x_layout == "channels_last":
        dx = dx.contiguous(memory_format=torch.channels_last)
        y = dx if y.dim() == 4 else y
    data = struct.pack(f"{len(numbers)}q", *numbers)
    for tensor in (x, g):
        data += given_tensor(tensor, map_strides(tensor))
    for tensor in (weight, bias):
        tensor = None if tensor is None else tensor.to(state_of(x.dtype)).contiguous()
        data += given_tensor(tensor, [0] * 5)
    data += given_tensor(grad, map_strides(grad))
    for tensor in (y, dx, dg):
        data += struct.pack("5q", *map_strides(tensor))

    done = subprocess.run([QEMU, driver], input=data, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    output, results = bytearray(done.stdout), []
    state = state_of(x.dtype)
    for like, dtype in ((y, x.dtype), (dx, x.dtype), (dg, x.dtype), (weight, state), (bias, state)):
        size = 0 if like is None else like.numel() * dtype.itemsize
        values = torch.frombuffer(output[:size], dtype=dtype) if size else None
        results.append(values if like is None else values.as_strided(like.shape, like.stride()))
        del output[:size]
    assert output == b""
    return results


def check(driver, case):
    tensors = case.tensors()
    truth = exact(tensors)
    grad = case.grad(truth)
    y, *grads = scan(driver, case, *tensors, grad)
    expected, expected_grads = run(reference, truth, grad.double(), **case.options)
    assert_close(y, expected, what="y")
    if case.nonlinearity == "relu" and case.dtype != F64:
        return  # rounding decides which pixels are off
    for name, ours, theirs in zip(
        ("dx", "dg", "dweight", "dbias"), grads, expected_grads, strict=True
    ):
        if ours is not None:
            assert_close(ours, theirs, what=name)


GRID = pairwise(
    DTYPES,
    (1, 2, 3, 4, 5, 8, 9, 16, 17, 33),  # K, the channels of a block
    ((1, 1, 1), (2, 1, 17), (1, 17, 1), (2, 7, 33), (1, 16, 40)),  # N, H, W
    MERGES,
    NONLINEARITIES,
    GATES,
    GATE_ACTIVATIONS,
    LAYOUTS,
    (True, False),
)


@pytest.mark.parametrize(
    ("dtype", "block", "shape", "merge", "nonlinearity", "gate", "activation", "layout", "bias"),
    GRID,
)
def test_aarch64_scan_matches_reference(
    driver, dtype, block, shape, merge, nonlinearity, gate, activation, layout, bias
):
    n, h, w = shape
    case = a_case(
        dtype=dtype,
        shape=(n, 2 * block, h, w),
        block=block,
        merge=merge,
        nonlinearity=nonlinearity,
        gate=gate,
        gate_activation=activation,
        bias=bias,
        x_layout=layout,
        g_layout=layout,
        grad_layout=layout,
    )
    check(driver, case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_aarch64_scan_of_one_direction_matches_reference(driver, direction, dtype):
    check(driver, a_case(dtype=dtype, directions=(direction,), merge="sum"))


def test_aarch64_driver_runs_the_portable_kernels(driver):
    done = children.run([QEMU, driver, "--capability"])
    assert done.stdout == "portable\n", done.stderr
