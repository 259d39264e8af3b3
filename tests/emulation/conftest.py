"""The package's ops, run by the CUDA kernels on the CPU."""

import inspect
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


@pytest.fixture(scope="session", autouse=True)
def sanitized_kernel_tests(request):
    """Kernel tests under the sanitizers, beside all others here: they and their build take long."""
    # Every test's fixturenames has this one, being automatic: those of the run started here too.
    wanted = (inspect.signature(item.function).parameters for item in request.session.items)
    if not any("sanitized_kernel_tests" in names for names in wanted):
        yield None
        return
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
