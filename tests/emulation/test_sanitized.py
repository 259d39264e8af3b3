"""The emulated kernels under the sanitizers, in processes that were started with their run time."""

import os
import subprocess
import sys

import pytest
from emulation_build import CXX, HERE, ROOT

TOY = """
import torch
from emulation_build import HERE, load

load("toys", [HERE / "toy_kernels.cu"])
numbers = torch.zeros(1000, dtype=torch.int32)
torch.ops.gatedrnn_toys.run("{0}", {1}, [{2}])
print("inside", flush=True)
torch.ops.gatedrnn_toys.run("{0}", {1}, [{3}])
print("outside", flush=True)
"""


def library(name):
    command = [CXX, f"-print-file-name=lib{name}.so"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(path):
        pytest.skip(f"{CXX} has no {path}")
    return path


def sanitized(*command, **environment):
    preload = " ".join(library(name) for name in ("asan", "ubsan", "stdc++"))
    environment = (
        os.environ
        | environment
        | {
            "LD_PRELOAD": preload,
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "GATEDRNN_EMULATION_SANITIZE": "1",
            "PYTHONPATH": str(HERE),
        }
    )
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("name", "data", "inside", "outside", "report"),
    [
        ("device_access", "numbers", 999, 1000, "WRITE of size 4"),
        ("device_access", "numbers", 0, -1, "WRITE of size 4"),
        ("shared_access", "torch.tensor([14, 0, 0]).int()", 60, 56, "READ of size 4"),
    ],
)
def test_access_one_element_outside_is_reported(name, data, inside, outside, report):
    done = sanitized("-c", TOY.format(name, data, inside, outside))
    assert "inside\n" in done.stdout, done.stderr
    assert "outside\n" not in done.stdout
    for part in ("AddressSanitizer", report, f"{name}_kernel"):
        assert part in done.stderr


def test_kernels_touch_nothing_but_their_tensors():
    done = sanitized(
        *("-m", "pytest", "-q", "--capture=sys", "--durations=5"),
        *("-k", "sizes_around or small_shared or (layouts and transposed)"),
        "tests/emulation/test_cuda_kernels.py",
        HYPOTHESIS_PROFILE="sanitize",
    )
    assert done.returncode == 0, done.stdout + done.stderr
