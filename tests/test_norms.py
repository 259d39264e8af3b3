"""The clamp of the weight's norm: its bound for awkward weights, identity below, derivatives."""

import itertools

import pytest
import torch
from comparison import DEVICE, F32, F64, clamp_norm
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual

from gatedrnn import SpatialGatedRNN
from gatedrnn import norms as package

# The promise of the module; rounding a quotient to float32 takes 1e-7 of it.
BOUND = 1 + 1e-5


def norms(weight, kind="spectral"):
    """The norm of every block, computed in float64 by another route than the package's."""
    k = weight.shape[-1]
    blocks = weight.detach().double().reshape(-1, k, k)
    if kind == "frobenius":
        return blocks.pow(2).sum((1, 2)).sqrt()
    return torch.linalg.eigvalsh(blocks.mT @ blocks)[:, -1].clamp(min=0).sqrt()


def blocks(k, kind, generator):
    """(2, 2 k, k): four blocks of a kind that is awkward for an estimate of the norm."""
    normal = torch.randn(4, k, k, generator=generator, dtype=F64)
    if kind == "rank_one":
        made = normal[:, :, :1] * normal[:, :1, :]
    elif kind == "orthogonal":  # all singular values equal
        made = torch.linalg.qr(normal)[0]
    elif kind == "scaled_identity":
        made = (
            torch.eye(k, dtype=F64) * torch.tensor([0.5, 1.0, 1.5, -3.0], dtype=F64)[:, None, None]
        )
    elif kind == "nilpotent":  # all eigenvalues zero
        made = normal.triu(1)
    elif kind == "close":  # the two largest singular values differ in the last digits
        u, s, v = torch.linalg.svd(normal)
        s[:, :2] = s[:, :1] * torch.tensor([1.0, 1 - 1e-9], dtype=F64)[:k]
        made = u * s[:, None] @ v
    elif kind == "zero":
        made = torch.zeros_like(normal)
    elif kind == "entries_of_one":
        made = normal.sign()
    else:
        made = normal
    return made.reshape(2, 2 * k, k)


KINDS = (
    "normal", "rank_one", "orthogonal", "scaled_identity", "nilpotent", "close", "zero",
    "entries_of_one",
)  # fmt: skip
SCALES = (1e-30, 1e-3, 0.999999, 1.0, 1.000001, 30.0, 1e6, 1e18)


@pytest.mark.parametrize("norm", ["spectral", "frobenius"])
@pytest.mark.parametrize("dtype", [F32, F64])
@given(data=st.data())
def test_norm_of_any_weight_is_held_within_one(data, dtype, norm):
    k = data.draw(st.sampled_from([1, 2, 3, 8, 16, 33]))
    kind, scale = data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from(SCALES))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    weight = (blocks(k, kind, generator) * scale).to(dtype)
    before = weight.clone()
    clamped = clamp_norm(weight, norm)
    assert torch.equal(weight, before)
    assert clamped.dtype == dtype
    assert clamped.shape == weight.shape
    assert (norms(clamped, norm) <= BOUND).all()
    # Blocks above one keep their direction and come out at one, no lower.
    true, got = norms(weight, norm), norms(clamped, norm)
    above = true > 1 + 1e-5
    torch.testing.assert_close(got[above], torch.ones_like(got[above]), rtol=1e-5, atol=0)
    size = weight.shape[-1]
    flat = [t.double().reshape(4, size * size) for t in (weight, clamped)]
    ratio = true.clamp(min=1)[:, None]
    torch.testing.assert_close(flat[1] * ratio, flat[0], rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("norm", ["spectral", "frobenius"])
@pytest.mark.parametrize("dtype", [F32, F64])
@given(data=st.data())
def test_weight_within_one_is_left_bit_for_bit(data, dtype, norm):
    k = data.draw(st.sampled_from([1, 2, 8, 17]))
    kind = data.draw(st.sampled_from(KINDS))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    weight = blocks(k, kind, generator)
    largest = norms(weight, norm).clamp(min=1).repeat_interleave(k).reshape(2, 2 * k, 1)
    weight = (weight / largest * 0.99999).to(dtype)
    assert torch.equal(clamp_norm(weight, norm), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F32, F64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1.001, 1000.0])
def test_weight_of_a_layer_is_within_one_in_every_dtype(dtype, kind, scale):
    layer = SpatialGatedRNN(
        16, groups=2, dtype=dtype, directions=["left_to_right", "top_to_bottom"]
    )
    weight = blocks(8, kind, torch.Generator().manual_seed(0)) * scale
    layer.raw_weight.data.copy_(weight)
    assert layer.weight.dtype == (F64 if dtype == F64 else F32)
    assert (norms(layer.weight) <= BOUND).all()


def test_no_norm_returns_the_weight_itself():
    weight = torch.randn(1, 2, 2)
    assert package.clamp_norm(weight, None) is weight


@pytest.mark.parametrize("norm", ["spectral", "frobenius"])
def test_blocks_are_clamped_apart(norm):
    weight = torch.stack([torch.eye(2) * 0.5, torch.eye(2) * 4]).reshape(1, 4, 2)
    expected = 1.0 if norm == "spectral" else 0.5**0.5
    clamped = clamp_norm(weight, norm)
    assert torch.equal(clamped[:, :2], weight[:, :2])
    torch.testing.assert_close(clamped[:, 2:], torch.eye(2)[None] * expected)


def separated(scale):
    """Blocks (2, 6, 3) whose singular values are apart, the largest times `scale`."""
    weight = blocks(3, "normal", torch.Generator().manual_seed(4))
    u, s, v = torch.linalg.svd(weight.reshape(4, 3, 3))
    made = (u * torch.tensor([scale, 0.6, 0.3], dtype=F64)) @ v
    return made.reshape(2, 6, 3).requires_grad_()


def repeated_below_top():
    """Singular values 1.7, 0.4, 0.4, 0.4: the top is simple, the others are not."""
    generator = torch.Generator().manual_seed(5)
    u, v = (torch.linalg.qr(torch.randn(1, 4, 4, generator=generator, dtype=F64))[0] for _ in "uv")
    return (u * torch.tensor([1.7, 0.4, 0.4, 0.4], dtype=F64) @ v).requires_grad_()


ROW = torch.tensor([[1.0], [0.7], [-1.3]], dtype=F64)

SMOOTH = {
    "below": lambda: separated(0.9),
    "above": lambda: separated(1.8),
    "scaled_identity_below": lambda: (torch.eye(3, dtype=F64) * 0.9).expand(2, 3, 3).clone(),
    "zero": lambda: torch.zeros(1, 3, 3, dtype=F64),
    "repeated_below_top": repeated_below_top,
    "rank_one_above": lambda: torch.tensor([[1.0], [-2.0], [0.5]], dtype=F64).mT[:, None] * ROW,
    "diagonal": lambda: torch.tensor([0.3, -0.9, 1.7, -2.5], dtype=F64).view(1, 4, 1),
}  # fmt: skip


@pytest.mark.parametrize("norm", ["spectral", "frobenius"])
@pytest.mark.parametrize("name", SMOOTH)
def test_clamp_has_its_true_derivatives(name, norm):
    weight = SMOOTH[name]().detach().requires_grad_()
    if norm == "spectral":
        assert abs(norms(weight) - 1).min() > 0.05, "not a smooth point"

    def function(w):
        return clamp_norm(w, norm)

    assert gradcheck(function, weight, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, weight, check_fwd_over_rev=True, check_rev_over_rev=True)


def assert_derivative_is_that_of_operations(k, dtype):
    """The native op's first derivative, of blocks above the norm, below it, of one and at zero."""
    generator = torch.Generator().manual_seed(k)
    weight = blocks(k, "normal", generator).to(dtype)
    unit = norms(weight).to(dtype).repeat_interleave(k).view(2, 2 * k, 1)
    scale = torch.tensor([30, 0.9, 1.1, 0], dtype=dtype).repeat_interleave(k).view(2, 2 * k, 1)
    weight, cotangent = weight / unit * scale, torch.randn(weight.shape, generator=generator)
    _, vjp = torch.func.vjp(lambda w: package._by_operations(w, "spectral"), weight)
    _, kept = torch.ops.gatedrnn.clamp_spectral(weight, True)
    ours = torch.ops.gatedrnn.clamp_spectral_backward(cotangent.to(dtype), weight, kept)
    tolerance = 1e-6 if dtype == F32 else 1e-12
    expected = vjp(cotangent.to(dtype))[0]
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
    assert not torch.equal(ours, cotangent.to(dtype))


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("k", [2, 3, 8, 32])
def test_first_derivative_is_that_of_the_operations(k, dtype):
    assert_derivative_is_that_of_operations(k, dtype)


def test_a_step_asks_for_the_native_derivative_and_a_second_one_for_operations(monkeypatch):
    asked = []
    finite = package._finite
    monkeypatch.setattr(package, "_finite", lambda blocks: asked.append(1) or finite(blocks))
    weight = (torch.eye(3) * 2).expand(2, 3, 3).clone().requires_grad_()
    for create_graph in (False, True):
        value = package.clamp_norm(weight, "spectral").square().sum()
        torch.autograd.grad(value, weight, create_graph=create_graph)
        assert len(asked) == create_graph


def test_clamp_is_the_same_with_and_without_gradients():
    weight = blocks(8, "normal", torch.Generator().manual_seed(0)).float()
    with_gradients = package.clamp_norm(weight.clone().requires_grad_(), "spectral")
    assert torch.equal(package.clamp_norm(weight, "spectral"), with_gradients)


def by_svd(w):
    """The clamp of one block above the norm."""
    return w / torch.linalg.svdvals(w)[..., :1, None]


def test_products_with_the_hessian_and_tangents_of_tangents_are_those_of_an_svd():
    generator = torch.Generator().manual_seed(0)
    weight, v, t = (torch.randn(1, 3, 3, generator=generator, dtype=F64) for _ in range(3))
    weight = weight * 2
    assert norms(weight) > 1.5

    def value(clamp):
        return lambda w: clamp(w).pow(3).sum()

    def ours(w):
        return package.clamp_norm(w, "spectral")

    def twice(clamp):
        return torch.func.jvp(lambda w: torch.func.jvp(clamp, (w,), (v,))[1], (weight,), (t,))[1]

    _, expected = torch.autograd.functional.vhp(value(by_svd), weight, v)
    for product in (torch.autograd.functional.hvp, torch.autograd.functional.vhp):
        torch.testing.assert_close(product(value(ours), weight, v)[1], expected)
    torch.testing.assert_close(twice(ours), twice(by_svd))


def test_second_derivatives_are_there_under_hooks_on_saved_tensors():
    weight = (torch.eye(3, dtype=F64) * 2).repeat(1, 2, 1).requires_grad_()

    def derivative():
        value = package.clamp_norm(weight, "spectral").pow(3).sum()
        (grad,) = torch.autograd.grad(value, weight, create_graph=True)
        return grad

    with torch.autograd.graph.save_on_cpu():
        hooked = derivative()
    torch.testing.assert_close(hooked, derivative())


@pytest.mark.parametrize("scale", [0.1, 0.5, 0.999])
@pytest.mark.parametrize("norm", ["spectral", None])
def test_scaled_identity_has_finite_derivatives_of_three_orders(norm, scale):
    weight = (torch.eye(4, dtype=F64) * scale).expand(2, 4, 4).clone().requires_grad_()
    value = clamp_norm(weight, norm).pow(3).sum()
    w = weight.detach()
    for expected in (3 * w * w, 6 * w, torch.full_like(w, 6)):  # those of w^3 alone
        (grad,) = torch.autograd.grad(value, weight, create_graph=True)
        torch.testing.assert_close(grad, expected)  # and no NaN
        value = grad.sum()


@pytest.mark.parametrize("scale", [1.0, 1.5, 40.0])
@pytest.mark.parametrize("kind", ["scaled_identity", "orthogonal"])
def test_repeated_top_singular_value_has_a_finite_subgradient(kind, scale):
    weight = blocks(4, kind, torch.Generator().manual_seed(0)) * scale
    weight = weight.requires_grad_()
    cotangent = torch.randn(weight.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    (grad,) = torch.autograd.grad(clamp_norm(weight, "spectral"), weight, cotangent)
    assert grad.isfinite().all()
    # Along w itself the clamp above one is constant, whichever singular vectors were chosen.
    block_sums = (grad * weight.detach()).reshape(4, -1).sum(1)
    above = norms(weight) > 1
    torch.testing.assert_close(
        block_sums[above], torch.zeros_like(block_sums[above]), atol=1e-9, rtol=0
    )


def test_tangent_is_that_of_finite_differences_and_vmap_is_a_loop():
    weight, tangent = separated(1.8).detach(), blocks(3, "normal", torch.Generator().manual_seed(8))
    with dual_level():
        ours = unpack_dual(clamp_norm(make_dual(weight, tangent), "spectral")).tangent
    _, by_func = torch.func.jvp(lambda w: clamp_norm(w, "spectral"), (weight,), (tangent,))
    step = 1e-6
    difference = clamp_norm(weight + step * tangent, "spectral") - clamp_norm(
        weight - step * tangent, "spectral"
    )
    torch.testing.assert_close(ours, difference / (2 * step), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(by_func, ours, rtol=1e-14, atol=1e-14)

    batch = torch.stack([weight, 0.1 * weight, 5 * tangent])
    mapped = torch.func.vmap(lambda w: clamp_norm(w, "spectral"))(batch)
    loop = torch.stack([clamp_norm(w, "spectral") for w in batch])
    torch.testing.assert_close(mapped, loop, rtol=1e-14, atol=0)


@pytest.mark.parametrize("k", [1, 2, 7, 32])
def test_spectral_norm_is_the_largest_singular_value(k):
    made = torch.randn(5, k, k, dtype=F64, generator=torch.Generator().manual_seed(k))
    sigma = package.spectral_norm(made.to(DEVICE)).cpu()
    torch.testing.assert_close(sigma, norms(made), rtol=1e-12, atol=0)


@pytest.mark.parametrize("k", [2, 33])  # without LAPACK and with it
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("gradients", [False, True])
def test_block_that_is_not_finite_is_nan_and_alone(k, bad, gradients):
    weight = torch.eye(k).repeat(1, 2, 1) * 3
    weight[0, 0, 1] = bad
    clamped = clamp_norm(weight.requires_grad_(gradients), "spectral").detach()
    assert clamped[0, :k].isnan().all()
    torch.testing.assert_close(clamped[0, k:], torch.eye(k))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Every block is clamped as large ones are on a GPU: by batched matrix products."""
    monkeypatch.setattr(package, "SMALL", 0)
    monkeypatch.setattr(package, "_on_gpu", lambda t: True)


@pytest.mark.parametrize("kind", KINDS)
def test_squaring_finds_the_largest_singular_value_and_its_vectors(kind):
    for k, scale in itertools.product((1, 2, 33, 64), (1e-30, 1.0, 1e18)):
        w = blocks(k, kind, torch.Generator().manual_seed(k)).reshape(4, k, k) * scale
        sigma, u, v = package._top_singular_by_squaring(w.to(DEVICE))
        sigma, u, v = sigma.cpu(), u.cpu(), v.cpu()
        true = torch.linalg.svdvals(w)[:, 0]
        assert (sigma <= true * (1 + 1e-13)).all()  # only rounding adds to it
        torch.testing.assert_close(sigma, true, rtol=1e-8, atol=0)
        for vector in (u, v):
            torch.testing.assert_close(vector.norm(dim=1), torch.ones(4, dtype=F64))
        mapped = (w @ v[:, :, None])[:, :, 0]
        torch.testing.assert_close(mapped, sigma[:, None] * u, rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("kind", KINDS)
def test_large_block_on_a_gpu_is_held_within_one(kind, as_on_a_gpu):
    for k, scale in itertools.product((2, 33), (0.999999, 1.000001, 30.0)):
        weight = blocks(k, kind, torch.Generator().manual_seed(k)) * scale
        clamped, true = clamp_norm(weight, "spectral"), norms(weight)
        assert (norms(clamped) <= BOUND).all()
        within = (true < 1 - 1e-5).repeat_interleave(k).view(2, 2 * k)
        assert torch.equal(clamped[within], weight[within])
        ratio = true.clamp(min=1).repeat_interleave(k).view(2, 2 * k, 1)
        torch.testing.assert_close(clamped * ratio, weight, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", SMOOTH)
def test_large_block_on_a_gpu_has_its_true_derivatives(name, as_on_a_gpu):
    weight = SMOOTH[name]().detach().requires_grad_()

    def function(w):
        return clamp_norm(w, "spectral")

    assert gradcheck(function, weight, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(function, weight, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_large_block_on_a_gpu_that_is_not_finite_is_nan_and_alone(bad, as_on_a_gpu):
    weight = torch.eye(3).repeat(1, 2, 1) * 3
    weight[0, 0, 1] = bad
    clamped = clamp_norm(weight, "spectral")
    assert clamped[0, :3].isnan().all()
    torch.testing.assert_close(clamped[0, 3:], torch.eye(3))


def test_large_block_on_a_gpu_asks_the_device_for_no_value(as_on_a_gpu):
    # A fake tensor has no values: to read one, which would wait for the device, is an error.
    with FakeTensorMode():
        weight = torch.empty(2, 80, 40, requires_grad=True)
        clamped = package.clamp_norm(weight, "spectral")
        (grad,) = torch.autograd.grad(clamped.sum(), weight)
    assert clamped.shape == grad.shape == (2, 80, 40)


@pytest.mark.slow
def test_large_block_on_a_gpu_has_its_derivative_in_a_compiled_graph(as_on_a_gpu):
    weight = separated(1.8).detach().requires_grad_()
    cotangent = torch.randn(weight.shape, dtype=F64, generator=torch.Generator().manual_seed(2))

    def grad(function):
        return torch.autograd.grad(function(weight), weight, cotangent)[0]

    def clamp(w):
        return package.clamp_norm(w, "spectral")

    compiled = torch.compile(clamp, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(grad(compiled), grad(clamp), rtol=1e-7, atol=1e-7)
