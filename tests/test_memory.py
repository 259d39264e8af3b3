"""Poisoned memory is poisoned, and what a training step keeps is inputs and one byte an element.
Where memory runs out, a call raises, and the next one works."""

import ctypes
import os
import platform
import sys
from pathlib import Path

import children
import pytest
import torch

from gatedrnn import SpatialGatedRNN
from gatedrnn._options import GATE_ACTIVATIONS, Options, op_arguments
from gatedrnn.functional import spatial_gated_rnn


def test_uninitialised_tensors_are_nan():
    assert torch.empty(1000).isnan().all()
    assert torch.empty((2, 3, 4, 5), memory_format=torch.channels_last).isnan().all()
    assert torch.ops.aten.empty.memory_format([9], dtype=torch.bfloat16).isnan().all()


def test_scratch_memory_is_poisoned():
    # The library reads the variable with getenv, once; conftest.py sets it before the import.
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_char_p
    assert getenv(b"GATEDRNN_POISON_SCRATCH") == b"1"


def saved(function):
    """The storages that autograd keeps for backward: {address: bytes}."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return kept, result


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("merge", ["max", "mean", "sum", None])
@pytest.mark.parametrize("gate_activation", GATE_ACTIVATIONS)
def test_autograd_saves_inputs_and_one_byte_an_element(merge, gate_activation, dtype):
    x = torch.randn(2, 4, 24, 36, dtype=dtype, requires_grad=True)
    g = torch.rand(2, 4, 24, 36, dtype=dtype, requires_grad=True)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.randn(4, 4, 4, dtype=state, requires_grad=True)
    bias = torch.randn(4, 4, dtype=state, requires_grad=True)
    inputs = {t.data_ptr(): t.untyped_storage().nbytes() for t in (x, g, weight, bias)}
    kept, y = saved(
        lambda: spatial_gated_rnn(x, g, weight, bias, merge=merge, gate_activation=gate_activation)
    )
    assert inputs.items() <= kept.items()
    others = {address: size for address, size in kept.items() if address not in inputs}
    assert sum(others.values()) == (x.numel() if merge == "max" else 0)
    assert y.data_ptr() not in kept


def test_layer_saves_weights_beside_its_inputs():
    layer = SpatialGatedRNN(8)
    x, g = torch.randn(2, 8, 40, 40), torch.rand(2, 8, 40, 40)
    kept, _ = saved(lambda: layer(x, g))
    maps = {x.data_ptr(), g.data_ptr()}
    assert maps <= kept.keys()
    # The mask, and a few matrices of the weight's size, some of them in float64.
    rest = sum(size for address, size in kept.items() if address not in maps)
    assert rest <= x.numel() + 20 * layer.raw_weight.numel() * 8


def test_nothing_is_saved_without_gradients():
    x = torch.randn(1, 2, 5, 5)
    kept, y = saved(lambda: spatial_gated_rnn(x, x, torch.zeros(4, 2, 2)))
    assert kept == {}
    assert y.grad_fn is None


class Mallinfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]  # fmt: skip


def live_heap():
    """Bytes that are allocated and not freed."""
    mallinfo2 = ctypes.CDLL("libc.so.6").mallinfo2
    mallinfo2.restype = Mallinfo
    found = mallinfo2()
    return found.uordblks + found.hblkhd


def steps():
    x, g = torch.randn(2, 1, 4, 5, 6)
    weight, bias = torch.randn(4, 4, 2), torch.randn(4, 4)
    arguments = op_arguments(Options((0, 1, 2, 3), "max", "tanh", "clamp"))
    ops = torch.ops.gatedrnn
    y, mask = ops.scan(x, g, weight, bias, *arguments, True)
    _, kept = ops.clamp_spectral(weight, True)
    layer, leaf = SpatialGatedRNN(4), x.clone().requires_grad_()
    return {
        "scan": lambda: ops.scan(x, g, weight, bias, *arguments, True),
        "scan_backward": lambda: ops.scan_backward(
            y, x, g, weight, bias, mask, *arguments, True, True, True
        ),
        "clamp_spectral": lambda: ops.clamp_spectral(weight, True),
        "clamp_spectral_backward": lambda: ops.clamp_spectral_backward(weight, weight, kept),
        "training step": lambda: torch.autograd.grad(
            layer(leaf, g).sum(), [leaf, *layer.parameters()]
        ),
    }


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the heap is measured in glibc")
@pytest.mark.parametrize("name", steps())
def test_no_call_leaves_memory_behind(name):
    step, count = steps()[name], 2_000 if name == "training step" else 20_000
    for _ in range(200):
        step()
    before = live_heap()
    for _ in range(count):
        step()
    # One `str` argument of an op alone left 48 bytes behind. Python's own caches vary a little.
    assert (live_heap() - before) / count < 8


def test_memory_that_is_not_there_is_named_in_bytes():
    huge = torch.zeros(1, 1, 1, 1).expand(1 << 20, 1, 1 << 15, 1 << 10)
    with pytest.raises(RuntimeError, match=f"out of memory: cannot allocate {1 << 47} bytes"):
        spatial_gated_rnn(huge, None, torch.ones(4, 1, 1))
    spatial_gated_rnn(huge[:1, :, :2, :2], None, torch.ones(4, 1, 1))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space, reads /proc")
def test_call_without_memory_raises_and_the_next_one_works():
    script = Path(__file__).with_name("memory_limits.py")
    # One heap for all threads: a thread's own would be address space that nothing uses.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    result = children.run([sys.executable, script, 12], env=environment, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
