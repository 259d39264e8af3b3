"""The shapes that the benchmarks run, by name, and the inputs made for them."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """One problem: x (N, C, H, W), weights (4, C, C // groups)."""

    name: str
    n: int
    c: int
    h: int
    w: int
    groups: int = 1
    why: str = ""

    @property
    def pixels(self):
        return self.n * self.h * self.w

    @property
    def elements(self):
        return self.pixels * self.c

    def flops(self, phase):
        """Floating-point operations of four directions: forward, three times that back."""
        k = self.c // self.groups
        forward = self.pixels * 4 * (2 * self.c * k + 2 * self.c)
        return forward * {"forward": 1, "backward": 3, "train": 4}[phase]

    def fewest_bytes(self, phase, itemsize):
        """Bytes that no implementation can avoid: each map read or written once.

        Forward: x, g, y. Backward: x, g, grad and one byte of mask read, dx, dg written.
        """
        forward = 3 * itemsize * self.elements
        backward = (5 * itemsize + 1) * self.elements
        return {"forward": forward, "backward": backward, "train": forward + backward}[phase]

    def __str__(self):
        kind = {1: "", self.c: " diagonal"}.get(self.groups, f" {self.groups} groups")
        sizes = f"{self.n},{self.c},{self.h},{self.w}"
        title = self.name if self.name.startswith(sizes) else f"{self.name} ({sizes})"
        return f"{title}{kind}"


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", 2, 4, 9, 12, why="trial runs and tests"),
        Shape("parser-1", 1, 8, 64, 64, why="the parser's map, one frame"),
        Shape("parser-40", 40, 8, 64, 64, why="the parser's map, a training batch"),
        Shape("face-8", 8, 8, 128, 128, why="eight faces at input size"),
        Shape("wide-16", 8, 16, 128, 128, why="twice the channels"),
        Shape("one-256", 1, 16, 256, 256, why="fewer images than threads"),
        Shape("multi-face", 1, 8, 128, 128, why="one photograph of several faces"),
        Shape("ragged", 3, 8, 67, 121, why="no size a multiple of a vector"),
        Shape("full-32", 2, 32, 64, 64, why="many channels, full weights"),
        Shape("full-64", 2, 64, 64, 64, why="many channels, full weights"),
        Shape("full-128", 2, 128, 64, 64, why="many channels, full weights"),
        Shape("batch-128", 64, 8, 128, 128, why="GPU: memory bound, planes of 64 kB"),
        Shape("batch-64", 256, 8, 64, 64, why="GPU: memory bound, planes of 16 kB"),
        Shape("plane-1024", 16, 8, 1024, 1024, groups=8, why="GPU: large planes, diagonal"),
        Shape("plane-1024-full", 16, 8, 1024, 1024, why="GPU: large planes"),
        Shape("wide-256", 8, 16, 256, 256, why="GPU: twice the channels"),
        Shape("diagonal-32", 4, 32, 128, 128, groups=32, why="one scalar weight per channel"),
    )
}
DEFAULT = ("parser-1", "face-8", "wide-16", "one-256", "full-64", "diagonal-32")
CUDA = (
    "parser-1",
    "multi-face",
    "batch-64",
    "batch-128",
    "wide-256",
    "plane-1024",
    "plane-1024-full",
)
SIZES = (64, 128, 256, 512, 528, 1000, 1024, 2048, 4096)


def square(size):
    """The shape (1, 8, size, size), for cost against size."""
    return Shape(f"square-{size}", 1, 8, size, size, why="cost against size")


def by_name(name):
    """The shape called `name`; `N,C,H,W` or `N,C,H,W,groups` in digits makes one.

    Raises:
        ValueError: unknown name, or sizes that make no shape.
    """
    if name in SHAPES:
        return SHAPES[name]
    sizes = name.split(",")
    if len(sizes) in (4, 5) and all(size.strip().isdecimal() for size in sizes):
        shape = Shape(name.replace(" ", ""), *map(int, sizes))
        if shape.elements == 0 or shape.groups == 0 or shape.c % shape.groups:
            raise ValueError(
                f"a shape needs sizes of at least 1 and groups that divide C, got {name!r}"
            )
        return shape
    raise ValueError(f"unknown shape {name!r}; known: {', '.join(SHAPES)}, or N,C,H,W[,groups]")


@dataclass
class Inputs:
    """What every contender is given, in this order."""

    x: torch.Tensor  # (N, C, H, W)
    g: torch.Tensor  # (N, C, H, W), within [-1, 1]
    weight: torch.Tensor  # (4, C, C // groups), spectral norm 1: the largest that the layer allows
    bias: torch.Tensor  # (4, C)
    grad: torch.Tensor  # (N, C, H, W), gradient of the result

    def tensors(self):
        """The four differentiable inputs."""
        return self.x, self.g, self.weight, self.bias


def make_inputs(shape, dtype=torch.float32, seed=0, device="cpu"):
    """Random inputs of `shape`; the same for the same seed and device.

    Returns:
        Inputs, all contiguous and of `dtype`.
    """
    rng = torch.Generator(device).manual_seed(seed)
    options = dict(generator=rng, device=device)
    k = shape.c // shape.groups
    maps = (shape.n, shape.c, shape.h, shape.w)
    blocks = torch.randn(4, shape.groups, k, k, **options)
    blocks = blocks / torch.linalg.matrix_norm(blocks, 2)[..., None, None]
    parts = (
        torch.randn(maps, **options),
        torch.rand(maps, **options) * 2 - 1,
        blocks.reshape(4, shape.c, k),
        # Not zero: equal corner pixels would otherwise make ties, which peers may split otherwise.
        torch.randn(4, shape.c, **options) * 0.1,
        torch.randn(maps, **options),
    )
    return Inputs(*(part.to(dtype) for part in parts))
