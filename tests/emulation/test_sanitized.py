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
torch.ops.gatedrnn_toys.run({}, {}, [{}])
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
    ("toy", "report"),
    [
        (("device_access", "numbers", 999), None),
        (("device_access", "numbers", 1000), "WRITE of size 4"),
        (("device_access", "numbers", -1), "WRITE of size 4"),
        (("shared_access", "torch.tensor([14, 0, 0]).int()", 60), None),
        (("shared_access", "torch.tensor([15, 0, 0]).int()", 60), "READ of size 4"),
    ],
)
def test_overrun_of_one_element_is_reported(toy, report):
    name, data, number = toy
    done = sanitized("-c", TOY.format(repr(name), data, number))
    if report is None:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode != 0
        for part in ("AddressSanitizer", report, f"{name}_kernel"):
            assert part in done.stderr


def test_kernels_touch_nothing_but_their_tensors():
    tests = ["match_reference and not nonlinearity and not bias1", "small_shared_memory"]
    done = sanitized(
        *("-m", "pytest", "-q", "--capture=sys", "-k", " or ".join(tests)),
        "tests/emulation/test_cuda_kernels.py",
        HYPOTHESIS_PROFILE="sanitize",
    )
    assert done.returncode == 0, done.stdout + done.stderr
