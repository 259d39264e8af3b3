"""Cases of the scan for hypothesis: shapes, layouts, dtypes and options, and tensors to match."""

from dataclasses import dataclass

import torch
from comparison import CLEAR, F32, F64, HALF, LAYOUTS, laid_out, within_norm
from hypothesis import strategies as st

from gatedrnn import DIRECTIONS
from gatedrnn._options import GATE_ACTIVATIONS, MERGES, NONLINEARITIES
from gatedrnn.reference import spatial_gated_rnn as reference

# Around the lane counts, the tiles of 16 channels, the chunks of 16 pixels; odd; one.
SIZES = (1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 40, 65, 70)
BLOCKS = (1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33)
MOST_CHANNELS = 40
MOST_ELEMENTS = 40_000
GATES = (None, "channel", "pixel", "direction_channel", "direction_pixel")


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    weight_dtype: torch.dtype
    shape: tuple[int, int, int, int]
    block: int
    directions: tuple[str, ...]
    integration: str
    merge: str | None
    nonlinearity: str
    gate: str | None
    gate_activation: str | None
    bias: bool
    x_layout: str
    g_layout: str
    grad_layout: str
    seed: int

    @property
    def options(self):
        names = ("directions", "integration", "merge", "nonlinearity", "gate_activation")
        return {name: getattr(self, name) for name in names}

    @property
    def stages(self):
        return len(self.directions) if self.integration == "cascade" else 1

    def tensors(self):
        """x, g, weight, bias."""
        n, c, h, w = self.shape
        d = len(self.directions)
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*size):
            return torch.randn(size, generator=generator, dtype=F64)

        x = laid_out(normal(n, c, h, w).to(self.dtype), self.x_layout)
        g = None
        if self.gate is not None:
            channels = c if self.gate.endswith("channel") else 1
            size = (n, d, channels, h, w) if "direction" in self.gate else (n, channels, h, w)
            g = normal(*size)
            if self.gate_activation in (None, "clamp"):
                # A third of the gates is 1 or -1 exactly; the clamp also sees larger ones.
                unit = torch.rand(size, generator=generator) < 1 / 3
                g = g.clamp(-1, 1) if self.gate_activation is None else g
                g = torch.where(unit, g.sign(), g)
            g = laid_out(g.to(self.dtype), self.g_layout)
        weight = within_norm(normal(d, c, self.block) * self.block**-0.5).to(self.weight_dtype)
        bias = (0.3 * normal(d, c)).to(self.weight_dtype) if self.bias else None
        return x, g, weight, bias

    def grad(self, exact):
        """Incoming gradient for y, zero where rounding could choose another maximum."""
        n, c, h, w = self.shape
        per_direction = self.merge is None and self.integration == "parallel"
        size = (n, len(self.directions), c, h, w) if per_direction else self.shape
        generator = torch.Generator().manual_seed(self.seed + 1)
        values = torch.randn(size, generator=generator, dtype=F64)
        if self.merge == "max" and self.integration == "parallel" and self.dtype != F64:
            maps = reference(*exact, **{**self.options, "merge": None})
            top = maps.amax(1, keepdim=True) if maps.numel() else maps
            values = values * ~((maps < top) & (maps > top - CLEAR)).any(1)
        elif self.grad_layout == "expanded":  # as y.sum().backward() gives it
            return torch.ones((), dtype=self.dtype).expand(size)
        layout = "contiguous" if self.grad_layout == "expanded" else self.grad_layout
        return laid_out(values.to(self.dtype), layout)


def a_case(**changes):
    """An ordinary case but for these changes."""
    options = dict(
        dtype=F32,
        shape=(2, 8, 17, 33),
        block=8,
        directions=DIRECTIONS,
        integration="parallel",
        merge="max",
        nonlinearity="identity",
        gate="channel",
        gate_activation="clamp",
        bias=True,
        x_layout="contiguous",
        g_layout="contiguous",
        grad_layout="contiguous",
        seed=0,
    )
    options |= changes
    return Case(weight_dtype=F64 if options["dtype"] == F64 else F32, **options)


@st.composite
def cases(draw, dtype, *, images=(1, 2, 3), sizes=SIZES, blocks=BLOCKS, channels=MOST_CHANNELS):
    block = draw(st.sampled_from(blocks))
    c = block * draw(st.integers(1, max(channels // block, 1)))
    h, w = draw(st.sampled_from(sizes)), draw(st.sampled_from(sizes))
    n = draw(st.sampled_from(images))
    while n > 1 and n * c * h * w > MOST_ELEMENTS:
        n -= 1
    cascade = draw(st.sampled_from([False, False, False, True]))
    number = draw(st.sampled_from([4, 3, 2, 1]))
    layouts = st.sampled_from(LAYOUTS)
    return Case(
        dtype=dtype,
        weight_dtype=draw(st.sampled_from([F32, dtype])) if dtype in HALF else dtype,
        shape=(n, c, h, w),
        block=block,
        directions=tuple(draw(st.permutations(DIRECTIONS))[:number]),
        integration="cascade" if cascade else "parallel",
        merge="max" if cascade else draw(st.sampled_from(MERGES)),
        nonlinearity=draw(st.sampled_from(["identity", *NONLINEARITIES])),
        gate=draw(st.sampled_from(GATES)),
        gate_activation=draw(st.sampled_from(GATE_ACTIVATIONS)),
        bias=draw(st.booleans()),
        x_layout=draw(layouts),
        g_layout=draw(layouts),
        grad_layout=draw(layouts),
        seed=draw(st.integers(0, 2**16)),
    )


def exact(tensors):
    return [None if t is None else t.detach().double() for t in tensors]
