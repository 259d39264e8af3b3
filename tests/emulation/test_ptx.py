"""What nvcc has made of the kernels, translated and emulated, against the float64 reference.

Two compilers need not make the same of a source, and a GPU runs what nvcc makes. Releases
13.0 and 13.5 drop the statement that follows a loop without braces under an `if constexpr` that
does not hold, in a lambda that is a template.
"""

import pytest
import test_cuda_norms
import torch
from comparison import BF16, DTYPES, F16, F32, F64
from ptx import translate
from scan_cases import GATES
from test_cuda_kernels import GATE_NORMS, MERGES, NONLINEARITIES, PROCESSORS, a_case
from test_norms import KINDS
from test_scan import check
from translated_build import load

from gatedrnn import DIRECTIONS
from gatedrnn import norms as package_norms

KNOWN_BLOCKS, OTHER_BLOCKS = (1, 2, 4, 8, 16), (3, 20)


@pytest.fixture(scope="session")
def translated_ops(translation):
    if isinstance(translation, str):
        pytest.skip(translation)
    _, errors = translation.communicate()
    assert translation.returncode == 0, errors
    load(*translation.args[-2:])
    return torch.ops.gatedrnn_translated


@pytest.fixture
def translated(translated_ops, monkeypatch):
    """The package's ops run the translated kernels."""
    monkeypatch.setattr(torch.ops, "gatedrnn", translated_ops)


@pytest.fixture(params=PROCESSORS)
def check_one(translated, monkeypatch, request):
    monkeypatch.setenv("GATEDRNN_EMULATION_MULTIPROCESSORS", request.param)
    return lambda **changes: check(a_case(**changes))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("block", [*KNOWN_BLOCKS, *OTHER_BLOCKS])
def test_block_sizes_and_layouts(check_one, block, layout):
    layouts = dict(x_layout=layout, g_layout=layout, grad_layout=layout)
    channels = max(block, 8 // block * block)
    whole = (48, 64) if block < 16 else (32, 48)
    for size, dtype in ((whole, F32), ((32, 16), BF16), ((17, 33), F32), ((19, 18), BF16)):
        check_one(shape=(2, channels, *size), block=block, dtype=dtype, **layouts)


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("gate", GATES)
def test_gates_and_merges(check_one, gate, merge):
    number = GATES.index(gate) + MERGES.index(merge)
    options = dict(gate=gate, merge=merge, dtype=(F32, BF16, F16)[number % 3], seed=1)
    block = KNOWN_BLOCKS[number % 5]
    check_one(**options, shape=(1, max(2 * block, 8), 32, 48), block=block)
    check_one(**options, shape=(2, 3, 16, 128), block=1)  # whole rows
    check_one(**options, shape=(1, 6, 32, 17), block=3)
    check_one(gate=gate, merge=merge, dtype=F64, shape=(1, 6, 17, 18), block=3)


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("gate_norm", GATE_NORMS)
def test_nonlinearities_and_gate_norms(check_one, gate_norm, nonlinearity):
    options = dict(gate_norm=gate_norm, nonlinearity=nonlinearity)
    for block in (*KNOWN_BLOCKS, 3):
        check_one(**options, shape=(1, max(block, 8 // block * block), 16, 20), block=block)
    check_one(**options, shape=(1, 6, 9, 17), block=6, dtype=F64, gate="direction_pixel")


@pytest.mark.parametrize("block", [*KNOWN_BLOCKS, *OTHER_BLOCKS])
@pytest.mark.parametrize("directions", [DIRECTIONS[:1], DIRECTIONS[3:], DIRECTIONS[1:3]])
def test_directions(check_one, directions, block):
    for number, dtype in enumerate(DTYPES):
        merge = MERGES[(number + block) % len(MERGES)]
        shape = (2, max(block, 8 // block * block), 32, 20)
        check_one(directions=directions, shape=shape, block=block, dtype=dtype, merge=merge)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("kind", KINDS)
def test_spectral_norms(translated, kind, dtype, monkeypatch):
    monkeypatch.setattr(package_norms, "_has_kernel", lambda t: True)
    test_cuda_norms.test_norm_is_held_within_one(kind, dtype)
    if dtype == F64:
        test_cuda_norms.test_singular_vectors_belong_to_the_largest_value(kind)
    if kind == "normal":
        test_cuda_norms.assert_derivative_is_that_of_operations(8, dtype)


def test_what_is_not_known_is_an_error_of_that_line():
    text = ".entry toy()\n{\n\t.reg .b32 %r<2>;\n\tmov.u32 %r1, 1;\n\tbrev.b32 %r1, %r1;\n}\n"
    with pytest.raises(ValueError, match=r"toy\.ptx:5: cannot translate 'brev.b32 %r1, %r1'"):
        translate(text, "toy.ptx")
