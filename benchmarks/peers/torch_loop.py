"""The scan as a loop of PyTorch operations: a direction at a time, all four at once, compiled.

Maps are laid out as (T, B, K, M): a step's slice is contiguous; B are directions times groups, each
with a K x K block of weights; M = N * L are the lines, the long axis of the matrix product.
"""

import torch

from . import torch_runner

# Unrolled whole, a loop of 128 steps compiles for minutes; eight steps at a time take seconds and
# already fuse what can be fused.
_COMPILED_STEPS = 8


def _step(x, g, w, b, h):
    """Eq. (3) for one pixel of every line. x, g, h (B, K, M); w (B, K, K); b (B, K, 1)."""
    # A 1 x 1 product is a multiplication, which baddbmm does not know.
    u = torch.addcmul(b, w, h) if w.shape[-1] == 1 else torch.baddbmm(b, w, h)
    return torch.addcmul(x, g, u)


def _loop(x, g, w, b):
    """Eq. (3) along T. x, g (T, B, K, M) -> h (T, B, K, M)."""
    h = torch.zeros_like(x[0])
    maps = []
    # unbind, because the gradient of x[t] would be a whole map of zeros for every t.
    for x_t, g_t in zip(x.unbind(0), g.unbind(0), strict=True):
        h = _step(x_t, g_t, w, b, h)
        maps.append(h)
    return torch.stack(maps)


def _some_steps(x, g, w, b, h):
    """As `_loop`, for a few steps that start from h."""
    maps = []
    for x_t, g_t in zip(x.unbind(0), g.unbind(0), strict=True):
        h = _step(x_t, g_t, w, b, h)
        maps.append(h)
    return torch.stack(maps), h


def _compiled_loop():
    import torch._functorch.config as functorch

    functorch.donated_buffer = False  # a held graph is walked again and again
    torch._dynamo.reset()  # or the shapes timed before count towards its limit of versions
    # Sizes are known when compiling.
    steps = torch.compile(_some_steps, fullgraph=True, dynamic=False)

    def loop(x, g, w, b):
        # As the later h do, or the first steps would be compiled apart.
        h = torch.zeros_like(x[0]).requires_grad_(torch.is_grad_enabled() and x.requires_grad)
        maps = []
        pairs = zip(x.split(_COMPILED_STEPS), g.split(_COMPILED_STEPS), strict=True)
        for x_t, g_t in pairs:
            part, h = steps(x_t, g_t, w, b, h)
            maps.append(part)
        return torch.cat(maps)

    return loop


def _lines(v, axis, groups):
    """(N, C, H, W) -> (T, G, K, M) for lines along `axis` (2 or 3)."""
    v = v.permute(axis, 1, 0, 5 - axis)  # (T, C, N, L)
    return v.reshape(v.shape[0], groups, v.shape[1] // groups, -1)


def _maps(h, axis, like):
    """(T, G, K, M) -> (N, C, H, W), the inverse of `_lines`."""
    n, c = like.shape[:2]
    h = h.reshape(h.shape[0], c, n, -1)
    return h.permute((2, 1, 0, 3) if axis == 2 else (2, 1, 3, 0))


def _blocks(weight, bias):
    """weight (D, C, K), bias (D, C) -> (D, G, K, K), (D, G, K, 1)."""
    d, c, k = weight.shape
    return weight.view(d, c // k, k, k), bias.view(d, c // k, k, 1)


def _with_float32_state(function):
    """Carry 16-bit maps in float32, as the reference does."""

    def run(x, g, weight, bias):
        if x.dtype not in (torch.bfloat16, torch.float16):
            return function(x, g, weight, bias)
        return function(x.float(), g.float(), weight.float(), bias.float()).to(x.dtype)

    return run


@_with_float32_state
def per_direction(x, g, weight, bias):
    """Four loops, one after another, and the maximum of their maps."""
    w, b = _blocks(weight, bias)
    maps = []
    for d, axis in enumerate((3, 3, 2, 2)):
        x_d, g_d = (_lines(v, axis, w.shape[1]) for v in (x, g))
        if d % 2:
            h = _loop(x_d.flip(0), g_d.flip(0), w[d], b[d]).flip(0)
        else:
            h = _loop(x_d.contiguous(), g_d.contiguous(), w[d], b[d])
        maps.append(_maps(h, axis, x))
    return torch.stack(maps).amax(0)


def _both_ways(x, g, w, b, axes, loop):
    """The directions along each of `axes`, forth and back, in one loop; one merged map an axis."""
    groups = w.shape[1]

    def stacked(v):
        lines = [_lines(v, axis, groups) for axis in axes]
        return torch.cat([way for line in lines for way in (line, line.flip(0))], 1)

    h = loop(stacked(x), stacked(g), w.flatten(0, 1), b.flatten(0, 1)).split(groups, 1)
    return [
        _maps(torch.maximum(h[2 * i], h[2 * i + 1].flip(0)), axis, x) for i, axis in enumerate(axes)
    ]


def batched(x, g, weight, bias, loop=_loop):
    """All directions that have lines of one length in one loop: four if H = W, else two and two."""
    w, b = _blocks(weight, bias)
    if x.shape[2] == x.shape[3]:
        maps = _both_ways(x, g, w, b, (3, 2), loop)
    else:
        maps = [
            *_both_ways(x, g, w[:2], b[:2], (3,), loop),
            *_both_ways(x, g, w[2:], b[2:], (2,), loop),
        ]
    return torch.maximum(*maps)


def load_per_direction(shape, inputs):
    return torch_runner(per_direction, inputs)


def load_batched(shape, inputs):
    return torch_runner(_with_float32_state(batched), inputs)


def load_compiled(shape, inputs):
    if max(shape.h, shape.w) > 128:
        return "sizes up to 128 only (compile time)"
    loop = _compiled_loop()
    runner = torch_runner(_with_float32_state(lambda *t: batched(*t, loop=loop)), inputs)
    try:
        runner.forward()
        runner.train()
    except Exception as error:  # whatever a missing or broken compiler makes PyTorch raise
        return f"does not compile ({type(error).__name__})"
    return runner
