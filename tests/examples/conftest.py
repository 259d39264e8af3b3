"""The example's modules import one another as top-level siblings, as its scripts do."""

import os
import signal
import sys

import pytest
import torch
from example_scripts import EXAMPLE, ROOT

sys.path.insert(0, str(EXAMPLE))


@pytest.fixture(autouse=True, scope="session")
def cache_of_the_tests(tmp_path_factory):
    """Decoded faces never go into the cache of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("GATEDRNN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def interrupts_are_heard():
    """Whoever runs the tests in the background may have SIGINT ignored, which is inherited."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def one_thread():
    """Bit-for-bit comparisons hold for one number of threads; one also keeps tiny runs quick."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def script_environment():
    """For the example's scripts in processes of their own."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
