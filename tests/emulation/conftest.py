"""The scan, run by the CUDA kernels on the CPU."""

import sys
from types import SimpleNamespace

import pytest
import torch

# Kernels become position-independent ELF objects and their faults are caught as signals.
collect_ignore_glob = [] if sys.platform == "linux" else ["test_*.py"]


@pytest.fixture(scope="session")
def emulated_ops():
    """torch.ops.gatedrnn with the emulated CUDA kernels behind `scan` and `scan_backward`."""
    from emulation_build import ROOT, load

    csrc = ROOT / "csrc"
    load("kernels", [csrc / "ops.cpp", csrc / "cpu/norms.cpp", *sorted(csrc.glob("cuda/*.cu"))])
    emulation = torch.ops.gatedrnn_emulation
    return SimpleNamespace(
        scan=emulation.scan,
        scan_backward=emulation.scan_backward,
        clamp_spectral=torch.ops.gatedrnn.clamp_spectral,
    )


@pytest.fixture
def emulated(emulated_ops, monkeypatch):
    monkeypatch.setattr(torch.ops, "gatedrnn", emulated_ops)
