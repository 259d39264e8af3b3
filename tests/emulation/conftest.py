"""The package's ops, run by the CUDA kernels on the CPU."""

import sys
from pathlib import Path

import pytest
import torch
from comparison import DEVICE

from gatedrnn import _ops

# Stacks, guards and faults are those of Linux; a GPU runs the kernels themselves.
collect_ignore_glob = [] if sys.platform == "linux" and DEVICE == "cpu" else ["test_*.py"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker("ptx" if item.path.stem == "test_ptx" else "emulation")
            # The first one compiles the kernels, the others may wait for it.
            item.add_marker(pytest.mark.timeout(1500))


@pytest.fixture(scope="session")
def emulated_ops():
    """torch.ops.gatedrnn_emulation: the ops of torch.ops.gatedrnn, with the emulated kernels."""
    from emulation_build import KERNELS, ROOT, load

    load("kernels", [ROOT / "csrc/ops.cpp", *KERNELS])
    _ops.register("gatedrnn_emulation")
    return torch.ops.gatedrnn_emulation


@pytest.fixture
def emulated(emulated_ops, monkeypatch):
    """The package's ops run the emulated kernels."""
    monkeypatch.setattr(torch.ops, "gatedrnn", emulated_ops)
