"""The package's ops, run by the CUDA kernels on the CPU."""

import sys

import pytest
import torch

# Stacks, guards and faults are those of Linux.
collect_ignore_glob = [] if sys.platform == "linux" else ["test_*.py"]


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
