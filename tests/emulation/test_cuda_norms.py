"""The CUDA kernels of the spectral clamp, emulated: its values, what it keeps, its derivative."""

import itertools

import pytest
import torch
from comparison import F32, F64
from test_norms import BOUND, KINDS, assert_derivative_is_that_of_operations, blocks, norms
from tiers import sampled

from gatedrnn import norms as package_norms
from gatedrnn.norms import clamp_norm

pytestmark = pytest.mark.usefixtures("emulated")
SCALES = (1e-30, 0.999999, 1.000001, 30.0, 1e18)
SIZES = ((1, SCALES), (2, SCALES), (8, SCALES), (32, SCALES[1:3]))  # 32 is the largest


@pytest.fixture(autouse=True)
def kernels_for_cpu_tensors(monkeypatch):
    monkeypatch.setattr(package_norms, "_has_kernel", lambda t: True)


def top_singular(blocks):
    kept = torch.ops.gatedrnn.clamp_spectral(blocks, True)[1]
    return kept[:, 0], *kept[:, 1:].chunk(2, 1)


@pytest.mark.parametrize(("kind", "dtype"), sampled(itertools.product(KINDS, (F32, F64)), 2))
def test_norm_is_held_within_one(kind, dtype):
    for k, scales in SIZES:
        for scale in scales:
            weight = (blocks(k, kind, torch.Generator().manual_seed(k)) * scale).to(dtype)
            clamped, kept = torch.ops.gatedrnn.clamp_spectral(weight, False)
            assert kept.numel() == 0
            true = norms(weight)
            assert clamped.dtype == dtype
            assert (norms(clamped) <= BOUND).all()
            kept = (true < 1 - 1e-5).repeat_interleave(k).view(2, 2 * k)
            assert torch.equal(clamped[kept], weight[kept])
            ratio = true.clamp(min=1).repeat_interleave(k).view(2, 2 * k, 1)
            torch.testing.assert_close(
                clamped.double() * ratio, weight.double(), rtol=1e-5, atol=1e-6 * scale
            )


@pytest.mark.parametrize("kind", sampled(KINDS, 2))
def test_singular_vectors_belong_to_the_largest_value(kind):
    for k, scales in SIZES:
        for scale in scales[::2]:
            w = blocks(k, kind, torch.Generator().manual_seed(k)).reshape(4, k, k) * scale
            sigma, u, v = top_singular(w)
            largest = torch.linalg.svdvals(w)[:, 0]
            torch.testing.assert_close(sigma, largest, rtol=1e-8, atol=0)
            for vector in (u, v):
                torch.testing.assert_close(vector.norm(dim=1), torch.ones(4, dtype=F64))
            mapped = (w @ v[:, :, None])[:, :, 0]
            torch.testing.assert_close(mapped, sigma[:, None] * u, rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_blocks_that_are_not_finite_are_nan_and_alone(value):
    weight = torch.eye(3).repeat(1, 3, 1) * 2
    weight[0, 4, 1] = value
    clamped, kept = torch.ops.gatedrnn.clamp_spectral(weight, True)
    assert clamped[0, 3:6].isnan().all()
    assert torch.equal(clamped[0, :3], torch.eye(3))
    assert torch.equal(clamped[0, 6:], torch.eye(3))
    gradient = torch.ops.gatedrnn.clamp_spectral_backward(clamped, weight, kept)
    assert gradient[0, 3:6].isnan().all()
    assert gradient[0, :3].isfinite().all()


@pytest.mark.parametrize("k", sampled([20, 32], 1))
def test_bits_do_not_depend_on_the_order_of_threads(k, monkeypatch):
    w = torch.randn(3, k, k, generator=torch.Generator().manual_seed(0), dtype=F64)

    def results():
        clamped, kept = torch.ops.gatedrnn.clamp_spectral(w, True)
        return clamped, kept, torch.ops.gatedrnn.clamp_spectral_backward(w + 1, w, kept)

    expected = results()
    for seed in "123":
        monkeypatch.setenv("GATEDRNN_EMULATION_SEED", seed)
        assert all(map(torch.equal, results(), expected))


@pytest.mark.parametrize("k", sampled([5, 32], 1))
def test_powers_that_stand_still_or_never_do_end_alike(k):
    # Singular values side by side need all squarings, one far above the others hardly any.
    generator = torch.Generator().manual_seed(k)
    u, _, v = torch.linalg.svd(torch.randn(2, k, k, generator=generator, dtype=F64))
    for second in (0.0, 0.5, 1 - 1e-5, 1 - 1e-8, 1.0):
        sigma = torch.full((k,), second, dtype=F64)
        sigma[0] = 1
        found, _, _ = top_singular(3 * u * sigma @ v)
        torch.testing.assert_close(found, torch.full_like(found, 3), rtol=1e-8, atol=0)


def test_derivatives_of_the_clamp_are_right():
    weight = torch.tensor([[[3.0, 1.0], [-0.5, 2.0]]], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: clamp_norm(w, "spectral"), weight)


@pytest.mark.parametrize(("k", "dtype"), sampled(itertools.product((2, 8, 32), (F32, F64)), 2))
def test_first_derivative_is_that_of_the_operations(k, dtype):
    assert_derivative_is_that_of_operations(k, dtype)


def test_block_that_is_too_large_is_an_error_with_a_remedy():
    message = "at most 32 channels on a GPU, got 33; use gatedrnn.norms.clamp_norm"
    with pytest.raises(RuntimeError, match=message):
        torch.ops.gatedrnn.clamp_spectral(torch.zeros(1, 33, 33), False)
