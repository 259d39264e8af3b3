"""Every kernel on small maps, both passes, against the float64 reference.

Runs all cases under compute-sanitizer (sanitize.py); gpu_check.py runs them by name.
"""

import functools
import os
import sys
from pathlib import Path

os.environ.setdefault("GATEDRNN_POISON_SCRATCH", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from comparison import BF16, DTYPES, F32, F64, clamp_norm, within_norm
from scan_cases import a_case
from test_scan import check

KNOWN_BLOCKS = (1, 2, 4, 8, 16)  # compiled by themselves; the general kernel takes the others
# (block, odd sizes and more than one tile each way, whole tiles that move in packs)
SHAPES = (
    (1, (2, 2, 19, 37), (1, 2, 16, 128)),
    (2, (1, 4, 18, 5), (1, 8, 32, 48)),
    (4, (1, 4, 33, 20), (1, 8, 32, 48)),
    (8, (2, 8, 17, 34), (1, 8, 32, 48)),
    (16, (1, 16, 20, 17), (1, 16, 32, 48)),
    (5, (1, 5, 18, 19), (1, 5, 16, 32)),
    (40, (1, 40, 9, 17), (1, 40, 16, 16)),
)
OPTIONS = (
    dict(merge="max", gate="channel", gate_activation="clamp"),
    dict(merge="sum", gate="pixel", gate_activation="tanh", x_layout="channels_last"),
    dict(merge=None, gate="direction_channel", gate_activation="sigmoid", nonlinearity="tanh"),
)


def ways(block, dtype):
    """The ways forward that serve a scan without a nonlinearity (csrc/cuda/forward.cu)."""
    yield "wavefront"
    if block in KNOWN_BLOCKS and dtype != F64:
        yield "strips"
    if block == 1 and dtype != F64:
        yield "chunks"


def scan_both_passes(way, block, shapes, dtype):
    before = os.environ.get("GATEDRNN_FORWARD")
    os.environ["GATEDRNN_FORWARD"] = way
    try:
        for shape in shapes:
            for options in OPTIONS:
                if way == "chunks":
                    options = {**options, "nonlinearity": "identity"}
                check(a_case(shape=shape, block=block, dtype=dtype, **options))
    finally:
        del os.environ["GATEDRNN_FORWARD"]
        if before is not None:
            os.environ["GATEDRNN_FORWARD"] = before


def clamp_both_passes(k):
    generator = torch.Generator().manual_seed(k)
    weight, grad = torch.randn(2, 4, k, k, generator=generator, dtype=F64)
    results = []
    for clamp in (lambda w: clamp_norm(w, "spectral"), within_norm):
        leaf = weight.clone().requires_grad_()
        clamped = clamp(leaf)
        results.append((clamped.detach(), *torch.autograd.grad(clamped, leaf, grad)))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def all_cases():
    """name -> function"""
    found = {}
    for dtype in (F32, BF16, *(d for d in DTYPES if d not in (F32, BF16))):
        for block, *shapes in SHAPES:
            for way in ways(block, dtype):
                name = f"{way}, block {block}, {str(dtype)[6:]}"
                found[name] = functools.partial(scan_both_passes, way, block, shapes, dtype)
    for k in (2, 7, 32, 40):
        found[f"clamp, block {k}"] = functools.partial(clamp_both_passes, k)
    return found


CASES = all_cases()


def poison_memory():
    """Uninitialised memory reads as NaN, as in all tests (conftest.py)."""
    torch.set_deterministic_debug_mode("error")
    torch.utils.deterministic.fill_uninitialized_memory = True


def main():
    poison_memory()
    for name, case in CASES.items():
        if name.endswith(", float16"):  # as bfloat16, and the tool is slow
            continue
        print(name, flush=True)
        case()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    print("small grid: done")


if __name__ == "__main__":
    main()
