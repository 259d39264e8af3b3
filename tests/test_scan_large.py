"""Offsets and sizes above 2^31 elements, and the other instruction sets of this processor."""

import mmap
import os
import re
import sys
from pathlib import Path

import children
import pytest
import torch
from comparison import BF16, assert_close, run, within_norm

from gatedrnn import _C
from gatedrnn.functional import spatial_gated_rnn
from gatedrnn.reference import spatial_gated_rnn as reference

sanitized = pytest.mark.skipif(
    "GATEDRNN_SANITIZE" in os.environ, reason="the sanitizers' shadow memory leaves no room"
)
FAR = 2**31 + 24
MAP_NORESERVE = 0x4000  # of Linux; Python names it from 3.13 on


def far_view(shape, dim, generator):
    """Random values with a stride above 2^31 elements in `dim`, of size 2; pages in between are
    promised by the system and never touched."""
    strides = list(torch.empty(shape).stride())
    strides[dim] = FAR
    size = 2 * (FAR + 4096)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = torch.frombuffer(mmap.mmap(-1, size * 2, flags=flags), dtype=BF16)
    view = memory.as_strided(shape, strides)
    return view.copy_(torch.randn(shape, generator=generator))


def check_far_pixels(dim, block):
    """Checks a scan of maps with a stride above 2^31 elements in `dim`."""
    generator = torch.Generator().manual_seed(5)
    shape = [3, 4, 5, 6]
    shape[dim] = 2
    x, g, grad = (far_view(shape, dim, generator) for _ in range(3))
    weight = within_norm(torch.randn(4, shape[1], block, generator=generator)).float()
    bias = torch.randn(4, shape[1], generator=generator)
    options = dict(merge="sum", gate_activation="tanh")
    y, grads = run(spatial_gated_rnn, (x, g, weight, bias), grad, **options)
    exact = [t.double() for t in (x, g, weight, bias)]
    expected, expected_grads = run(reference, exact, grad.double(), **options)
    for ours, theirs in zip([y, *grads], [expected, *expected_grads], strict=True):
        assert_close(ours, theirs)


@sanitized
@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is promised, not given")
@pytest.mark.parametrize("dim", range(4))
def test_offsets_above_2_to_31_reach_the_right_pixels(dim):
    check_far_pixels(dim, block=2)


def available_bytes():
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return 0
    return int(re.search(r"MemAvailable: *(\d+) kB", text)[1]) * 1024


@sanitized
@pytest.mark.skipif(
    available_bytes() < 20 * 2**30, reason="needs 20 GB of free memory for a map of 2^31 elements"
)
@pytest.mark.slow
@pytest.mark.parametrize("images", [2**11 + 1, 1])
def test_map_of_more_than_2_to_31_elements_is_right(images, monkeypatch, threads):
    if images == 1 and os.environ.get("HYPOTHESIS_PROFILE") != "thorough":
        pytest.skip("takes a minute: HYPOTHESIS_PROFILE=thorough")
    # To fill some gigabytes with NaN first takes longer than to scan them.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    threads(os.cpu_count())
    # One strip of 2^20 pixels, repeated over channels (in one image) or over images.
    generator = torch.Generator().manual_seed(6)
    copies = 2**11 + 1
    strip = torch.randn(1, 1, 64, 2**14, generator=generator).to(BF16)
    n, c = images, copies // images
    weight, bias = torch.tensor([[[0.5]]]), torch.tensor([[0.25]])
    options = dict(directions=["bottom_to_top"])
    y = spatial_gated_rnn(
        strip.expand(n, c, 64, 2**14), None, weight.expand(1, c, 1), bias.expand(1, c), **options
    )
    assert y.numel() > 2**31
    expected = reference(strip.double(), None, weight.double(), bias.double(), **options)
    flat = y.view(copies, 64, 2**14)
    assert_close(flat[0], expected[0, 0])
    for k in range(1, copies):
        assert torch.equal(flat[k], flat[0])


@sanitized
@pytest.mark.parametrize(
    "chosen", ["scan_matches_reference", pytest.param("not long_lines", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", _C.build_info()["cpu_capabilities"])
def test_instruction_set_passes_the_same_tests(name, chosen):
    info = _C.build_info()
    built = info["cpu_capabilities"]
    if built.index(name) < built.index(info["cpu_capability"]):
        pytest.skip(f"this processor has no {name}")
    if name == info["cpu_capability"]:
        pytest.skip(f"{name} is what every other test runs with")
    # Memory from the heap is filled too, with bytes that make huge numbers.
    environment = dict(
        GATEDRNN_CPU_CAPABILITY=name, HYPOTHESIS_PROFILE="sanitize", MALLOC_PERTURB_="129"
    )
    files = ["test_scan.py", "test_scan_exact.py", "test_scan_isolation.py"]
    result = children.run(
        [*(sys.executable, "-m", "pytest"), *("-p", "no:cacheprovider", "-k", chosen), *files],
        cwd=Path(__file__).parent,
        env={**os.environ, **environment},
        timeout=280,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
    assert " passed" in result.stdout
    assert f"gatedrnn: {name}, " in result.stdout
