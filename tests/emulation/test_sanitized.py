"""The emulated kernels under the sanitizers, and that these see what they are there for."""

import pytest
from sanitized import start

TESTS = "tests/emulation/test_cuda_kernels.py"

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


pytestmark = pytest.mark.slow


def finish(process):
    """Exit code, output and errors of a process, once it has ended."""
    if process is None:
        pytest.skip("the compiler has no sanitizers")
    out, err = process.communicate()
    return process.returncode, out, err


@pytest.mark.parametrize(
    ("name", "data", "inside", "outside", "report"),
    [
        ("device_access", "numbers", 999, 1000, "WRITE of size 4"),
        ("device_access", "numbers", 0, -1, "WRITE of size 4"),
        ("shared_access", "torch.tensor([14, 0, 0]).int()", 60, 56, "READ of size 4"),
    ],
)
def test_access_one_element_outside_is_reported(name, data, inside, outside, report):
    code, out, err = finish(start("-c", TOY.format(name, data, inside, outside)))
    assert code != 0
    assert out == "inside\n", err
    for part in ("AddressSanitizer", report, f"{name}_kernel"):
        assert part in err


def test_kernels_touch_nothing_but_their_tensors():
    chosen = "sizes_around or small_shared or (layouts and transposed)"
    arguments = ["-m", "pytest", "-q", "-m", "", "--capture=sys", "-k", chosen, TESTS]
    code, out, err = finish(start(*arguments, HYPOTHESIS_PROFILE="sanitize"))
    assert code == 0, out + err
    assert " passed" in out
