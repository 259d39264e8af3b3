"""Set-up of every test run: poisoned memory, hypothesis profiles, facts of the build in the header.

Uninitialised memory reads as NaN: in tensors through PyTorch's deterministic mode, in the kernels'
scratch memory through a variable that they read once, hence before the package is imported.
"""

import os

os.environ["GATEDRNN_POISON_SCRATCH"] = "1"
os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # of onnxruntime, which would write to the home folder
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # without it cuBLAS is not deterministic

import hypothesis
import pytest
import torch
from comparison import DEVICE

from gatedrnn import _C

# As torch.use_deterministic_algorithms(True), which also imports torch.compile: three seconds.
torch.set_deterministic_debug_mode("error")
torch.utils.deterministic.fill_uninitialized_memory = True

# The tensors are small: threads would wait for each other longer than they work. What depends on
# threads sets their number itself.
torch.set_num_threads(1)

_COMMON = dict(deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
# The same examples on every run, so that a change is judged by what it changed.
hypothesis.settings.register_profile("default", max_examples=25, derandomize=True, **_COMMON)
hypothesis.settings.register_profile("all", max_examples=100, derandomize=True, **_COMMON)
# Sanitizers, and the other instruction sets: every path, few examples.
hypothesis.settings.register_profile("sanitize", max_examples=20, derandomize=True, **_COMMON)
# New examples on every run, for a long look after the kernels have changed.
hypothesis.settings.register_profile("thorough", max_examples=1000, **_COMMON)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_addoption(parser, pluginmanager):
    # A GPU machine may lack pytest-timeout, whose setting is in pyproject.toml.
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", "ignored: pytest-timeout is not installed")


def pytest_configure(config):
    if not config.pluginmanager.hasplugin("timeout"):
        config.addinivalue_line("markers", "timeout(seconds): ignored")
    # A run that was to test a GPU must not pass by skipping.
    if DEVICE not in ("cpu", "cuda"):
        raise pytest.UsageError(f"GATEDRNN_TEST_DEVICE must be cpu or cuda, got {DEVICE!r}")
    if DEVICE == "cuda" and _C.build_info()["cuda_version"] is None:
        raise pytest.UsageError(f"{_C.__file__} was built without CUDA")
    if DEVICE == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("GATEDRNN_TEST_DEVICE is cuda, but PyTorch sees no GPU")
    # PyTorch's own: the decompositions of forward-mode AD, and torch.export.
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit.*is deprecated:DeprecationWarning")
    config.addinivalue_line("filterwarnings", "ignore:`isinstance.treespec, LeafSpec:FutureWarning")


def pytest_report_header():
    info = _C.build_info()
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else info["cpu_capability"]
    return f"gatedrnn: {device}, sanitizers: {info['sanitizers']}"


@pytest.fixture(autouse=True)
def fixed_seed():
    """Random numbers of a test do not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture
def threads():
    """`torch.set_num_threads`, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
