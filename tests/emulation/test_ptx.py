"""What nvcc has made of the kernels, translated and emulated, against the float64 reference.

Two compilers need not make the same of a source, and a GPU runs what nvcc makes. Releases
13.0 and 13.5 drop the statement that follows a loop without braces under an `if constexpr` that
does not hold, in a lambda that is a template.
"""

import itertools

import pytest
import test_cuda_norms
import torch
from comparison import BF16, DTYPES, F32, F64
from ptx import translate
from scan_cases import MERGES, a_case
from test_cuda_kernels import PAIRS, PROCESSORS, check_pair
from test_norms import KINDS
from test_scan import check
from tiers import sampled
from translated_build import KERNELS, ToolkitError, find_nvcc, load

from gatedrnn import DIRECTIONS
from gatedrnn import norms as package_norms

KNOWN_BLOCKS, OTHER_BLOCKS = (1, 2, 4, 8, 16), (3, 20)


@pytest.fixture(scope="session")
def nvcc():
    try:
        return find_nvcc()
    except ToolkitError as error:
        pytest.skip(f"no CUDA toolkit: {error}")


@pytest.fixture
def translated(nvcc, monkeypatch):
    """The package's ops run the translated kernels, all of them."""
    monkeypatch.setattr(torch.ops, "gatedrnn", load(nvcc, KERNELS))


@pytest.fixture(params=PROCESSORS)
def check_one(translated, monkeypatch, request):
    monkeypatch.setenv("GATEDRNN_EMULATION_MULTIPROCESSORS", request.param)
    return lambda **changes: check(a_case(**changes))


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"block{pair[0]}")
def test_options_in_pairs(translated, pair, monkeypatch):
    monkeypatch.setenv("GATEDRNN_EMULATION_MULTIPROCESSORS", pair[6])
    check_pair(*pair)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("block", [*KNOWN_BLOCKS, *OTHER_BLOCKS])
def test_block_sizes_and_layouts(check_one, block, layout):
    layouts = dict(x_layout=layout, g_layout=layout, grad_layout=layout)
    channels = max(block, 8 // block * block)
    whole = (48, 64) if block < 16 else (32, 48)
    for size, dtype in ((whole, F32), ((32, 16), BF16), ((17, 33), F32), ((19, 18), BF16)):
        check_one(shape=(2, channels, *size), block=block, dtype=dtype, **layouts)


@pytest.mark.slow
@pytest.mark.parametrize("block", [*KNOWN_BLOCKS, *OTHER_BLOCKS])
@pytest.mark.parametrize("directions", [DIRECTIONS[:1], DIRECTIONS[3:], DIRECTIONS[1:3]])
def test_directions(check_one, directions, block):
    for number, dtype in enumerate(DTYPES):
        merge = MERGES[(number + block) % len(MERGES)]
        shape = (2, max(block, 8 // block * block), 32, 20)
        check_one(directions=directions, shape=shape, block=block, dtype=dtype, merge=merge)


# The clamp's kernels are short: they are translated alone, and sampled in the default tier.
@pytest.mark.parametrize(("kind", "dtype"), sampled(itertools.product(KINDS, (F32, F64)), 1))
def test_spectral_norms(nvcc, kind, dtype, monkeypatch):
    of_norms = [unit for unit in KERNELS if unit.name == "norms"]
    monkeypatch.setattr(torch.ops, "gatedrnn", load(nvcc, of_norms))
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
