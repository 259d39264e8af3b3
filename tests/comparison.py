"""What the tests share: the tolerances, tensors in any layout, and a run with every gradient.

The scan, the layer and the clamp run on the device under test, from CPU tensors and to them: what
they are compared with is computed on the CPU.
"""

import os

import torch

from gatedrnn import functional, norms

DEVICE = os.environ.get("GATEDRNN_TEST_DEVICE", "cpu")

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = (F64, F32, BF16, F16)
HALF = (BF16, F16)

# Error of the state, relative to the largest value of a tensor or 1, the inputs' own size: some
# fifty roundings (of 2^-53 and 2^-24), for a line's roundings add up along it, as a sum's do. The
# largest seen are under half of that.
STATE_TOLERANCE = {F64: 1e-14, F32: 5e-6}

# Where two directions come closer than this, rounding decides which one is the maximum, and a
# gradient is compared only where it cannot: the states' error is a hundred times smaller.
CLEAR = 1e-3


def state_of(dtype):
    """The type of the hidden state next to maps of `dtype`."""
    return F64 if dtype == F64 else F32


def assert_close(actual, expected, *, stages=1, maps=None, what="result"):
    """`actual` is `expected` (float64) but for the state's error and one rounding to 16 bits.

    With `stages` > 1 the maps between the stages of a cascade are of dtype `maps`; the roundings to
    16 bits there are carried on along the later stages' lines.
    """
    assert actual.shape == expected.shape, what
    if actual.numel() == 0:
        return
    size = expected.abs().max().clamp(min=1)
    allowed = STATE_TOLERANCE[state_of(actual.dtype)] * size
    if actual.dtype in HALF:
        allowed = allowed + torch.finfo(actual.dtype).eps / 2 * expected.abs()
    if maps in HALF:
        allowed = allowed + (stages - 1) * torch.finfo(maps).eps * size
    error = (actual.double() - expected).abs()
    good = error <= allowed  # NaN is not good either
    worst = torch.where(good, -1, error.nan_to_num(float("inf"))).argmax()
    assert good.all(), (
        f"{what}: {actual.flatten()[worst].item()!r} should be "
        f"{expected.flatten()[worst].item()!r} (size {size.item():.3g}, {actual.dtype})"
    )


def spatial_gated_rnn(*tensors, **options):
    given = [None if t is None else t.to(DEVICE) for t in tensors]
    return functional.spatial_gated_rnn(*given, **options).to("cpu")


def through(layer, *maps):
    """layer(x, g); gradients reach its parameters, which stay where they are."""
    parameters = {name: p.to(DEVICE) for name, p in layer.named_parameters()}
    given = tuple(None if t is None else t.to(DEVICE) for t in maps)
    return torch.func.functional_call(layer, parameters, given).to("cpu")


def clamp_norm(weight, norm):
    return norms.clamp_norm(weight.to(DEVICE), norm).to("cpu")


def placed(tensor):
    """`tensor` on the device under test, as it lies in memory: strides, gaps and all."""
    if tensor is None or tensor.device.type == DEVICE:
        return tensor
    memory = storage(tensor).to(DEVICE).view(tensor.dtype)
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def run(function, tensors, grad, **options):
    """y and the gradients (None for a tensor that is None) of `grad`, or of grad(y)."""
    if function is spatial_gated_rnn:
        function, tensors = functional.spatial_gated_rnn, map(placed, tensors)
        grad = grad if callable(grad) else placed(grad)
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y = function(*leaves, **options)
    if callable(grad):
        grad = grad(y)
    wanted = [t for t in leaves if t is not None]
    grads = iter(torch.autograd.grad(y, wanted, grad, allow_unused=True, materialize_grads=True))
    return y.detach().cpu(), [None if t is None else next(grads).cpu() for t in leaves]


LAYOUTS = ("contiguous", "channels_last", "transposed", "permuted", "sliced", "padded", "expanded")


def laid_out(values, layout):
    """`values` (rank 4 or 5) in memory as `layout` says; what lies between them is NaN."""
    rank = values.dim()
    match layout:
        case "contiguous":
            return values.contiguous()
        case "channels_last":  # for rank 5 likewise: the channels innermost
            return values.movedim(-3, -1).contiguous().movedim(-1, -3)
        case "transposed":
            return values.mT.contiguous().mT
        case "permuted":  # the images innermost
            return values.permute(*range(rank)[::-1]).contiguous().permute(*range(rank)[::-1])
        case "sliced":
            room = values.new_full([2 * size + 1 for size in values.shape], float("nan"))
            view = room[(slice(1, None, 2),) * rank]
        case "padded":
            room = values.new_full([size + 3 for size in values.shape], float("nan"))
            view = room[tuple(slice(2, 2 + size) for size in values.shape)]
        case "expanded":  # along channels: changes the values
            return values.narrow(-3, 0, 1).contiguous().expand(values.shape)
    return view.copy_(values)


def storage(tensor):
    """All bytes behind a tensor, also those that its strides leave out."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def within_norm(weight):
    """Each block of (D, C, K) divided by max(1, its spectral norm), in float64."""
    d, c, k = weight.shape
    blocks = weight.double().reshape(-1, k, k)
    norm = torch.linalg.matrix_norm(blocks, 2).clamp(min=1)
    return (blocks / norm[:, None, None]).reshape(d, c, k)
