"""The package's ops, run by the CUDA kernels on the CPU."""

import os
import subprocess
import sys

import pytest
import torch
from comparison import DEVICE
from sanitized import start

# Stacks, guards and faults are those of Linux; a GPU runs the kernels themselves.
collect_ignore_glob = [] if sys.platform == "linux" and DEVICE == "cpu" else ["test_*.py"]


@pytest.fixture(scope="session")
def emulated_ops():
    """torch.ops.gatedrnn_emulation: the ops of torch.ops.gatedrnn, with the emulated kernels."""
    from emulation_build import ROOT, load

    csrc = ROOT / "csrc"
    load("kernels", [csrc / "ops.cpp", *sorted(csrc.glob("cuda/*.cu"))])
    return torch.ops.gatedrnn_emulation


@pytest.fixture
def emulated(emulated_ops, monkeypatch):
    """The package's ops run the emulated kernels."""
    monkeypatch.setattr(torch.ops, "gatedrnn", emulated_ops)


@pytest.fixture(scope="session")
def sanitized_kernel_tests():
    """A run of kernel tests under the sanitizers."""
    process = start(
        *("-m", "pytest", "-q", "--capture=sys", "--durations=5"),
        *("-k", "sizes_around or small_shared or (layouts and transposed)"),
        "tests/emulation/test_cuda_kernels.py",
        HYPOTHESIS_PROFILE="sanitize",
    )
    yield process
    if process is not None:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def translation():
    """A process that translates what nvcc makes of the kernels; why there is none, in words."""
    from translated_build import __file__, build_cuda

    try:
        nvcc = build_cuda.find_toolkit().nvcc
    except build_cuda.CannotBuild as error:
        yield f"no CUDA toolkit: {error}"
        return
    architecture = os.environ.get("GATEDRNN_PTX_ARCHITECTURE", "sm_90")
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, __file__, nvcc, architecture], **pipes) as process:
        yield process
        process.kill()


@pytest.fixture(scope="session", autouse=True)
def early_start(request):
    """Starts what takes minutes, to go on beside the tests that do without it."""
    wanted = {name for item in request.session.items for name in item.fixturenames}
    # Of pytest-xdist's workers, each of which would, only the one that waits for it starts it.
    if "PYTEST_XDIST_WORKER" not in os.environ:
        for name in ("sanitized_kernel_tests", "translation"):
            if name in wanted:
                request.getfixturevalue(name)
