"""`python -m gatedrnn`: the facts of this installation and a check of the scan, for bug reports."""

import platform
import random
import sys
import time
from typing import Any

import torch

from . import _C
from .functional import spatial_gated_rnn
from .reference import DIRECTIONS
from .reference import spatial_gated_rnn as reference

# Largest error against the float64 reference, relative to the largest value (at least 1): some
# tens of roundings, which in 16 bits happen where maps and gradients are stored.
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 5e-5,
    torch.bfloat16: 4e-2,
    torch.float16: 5e-3,
}
CASES = 16
# Where two directions come closer than this, rounding decides which one is the maximum.
CLEAR = 1e-3


def gpus() -> range:
    return range(torch.cuda.device_count() if torch.cuda.is_available() else 0)


def cuda_build() -> str:
    info = _C.build_info()
    if info["cuda_version"] is not None:
        return f"{info['cuda_version']}, for {', '.join(info['cuda_architectures'])}"
    if torch.version.cuda is None:
        return (
            "not built: this PyTorch has none (GATEDRNN_CUDA=1 at installation builds it even so)"
        )
    return "not built: install again with GATEDRNN_CUDA=1, which says what is lacking"


def facts() -> dict[str, str]:
    info = _C.build_info()
    return {
        "gatedrnn": info["version"],
        "PyTorch": f"{torch.__version__} (built with {info['torch_version']})",
        "Python": platform.python_version(),
        "system": platform.platform(),
        "compiler": f"{info['compiler']}, C++ {info['cxx_standard']}",
        "instructions": f"{info['cpu_capability']} (built: {', '.join(info['cpu_capabilities'])})",
        "CUDA": cuda_build(),
        "GPUs": ", ".join(torch.cuda.get_device_name(i) for i in gpus()) or "none visible",
        "sanitizers": info["sanitizers"],
        "threads": str(torch.get_num_threads()),
    }


def largest_error(
    device: str, dtype: torch.dtype, channels_last: bool, rng: random.Random
) -> float:
    """Largest relative error of one random scan and its gradients against the CPU's reference."""
    n, groups, block = rng.randint(1, 2), rng.randint(1, 2), rng.randint(1, 5)
    c, h, w = groups * block, rng.randint(1, 19), rng.randint(1, 19)
    directions = rng.sample(DIRECTIONS, rng.randint(1, 4))
    d = len(directions)
    options: dict[str, Any] = {
        "directions": directions,
        "nonlinearity": rng.choice(["identity", "tanh"]),
        "gate_activation": rng.choice(["clamp", "tanh", "sigmoid"]),
    }
    if rng.random() < 0.25:
        options["integration"] = "cascade"
    else:
        options["merge"] = rng.choice(["max", "mean", "sum", None])

    generator = torch.Generator().manual_seed(rng.getrandbits(32))

    def normal(*size: int) -> torch.Tensor:
        values = torch.randn(size, generator=generator).to(dtype)
        if channels_last and len(size) == 4:
            values = values.contiguous(memory_format=torch.channels_last)
        return values

    x = normal(n, c, h, w)
    gate_shapes = [(n, c, h, w), (n, 1, h, w), (n, d, c, h, w), (n, d, 1, h, w)]
    g = normal(*rng.choice(gate_shapes))
    weight, bias = normal(d, c, block) / (2 * block**0.5), normal(d, c)
    inputs = [value.to(device).detach().requires_grad_() for value in (x, g, weight, bias)]
    exact = [value.detach().double().requires_grad_() for value in (x, g, weight, bias)]

    y = spatial_gated_rnn(*inputs, **options)
    expected = reference(*exact, **options)
    grad = normal(*y.shape)
    if options.get("merge") == "max" and d > 1:
        with torch.no_grad():
            first, second = (
                reference(*exact, **{**options, "merge": None}).topk(2, 1).values.unbind(1)
            )
        grad = grad * (first - second > CLEAR)
    y.backward(grad.to(device))
    expected.backward(grad.double())

    error = 0.0
    for ours, truth in zip(
        [y, *(value.grad for value in inputs)],
        [expected, *(value.grad for value in exact)],
        strict=True,
    ):
        assert ours is not None
        assert truth is not None
        difference = (ours.cpu().double() - truth).abs().max() / truth.abs().max().clamp(min=1)
        # NaN would lose every comparison.
        error = max(error, difference.nan_to_num(float("inf")).item())
    return error


def self_check(device: str) -> bool:
    start = time.perf_counter()
    rng = random.Random(0)
    errors = dict.fromkeys(TOLERANCES, 0.0)
    for case in range(CASES):
        dtype = list(TOLERANCES)[case % len(TOLERANCES)]
        channels_last = case // len(TOLERANCES) % 2 == 1
        errors[dtype] = max(errors[dtype], largest_error(device, dtype, channels_last, rng))
    seconds = time.perf_counter() - start

    print(f"{device}: {CASES} scans and their gradients against the reference, {seconds:.1f} s")
    for dtype, error in errors.items():
        name = str(dtype).removeprefix("torch.")
        print(f"  {name:<13} largest error {error:.1e}, allowed {TOLERANCES[dtype]:.0e}")
    return all(error <= TOLERANCES[dtype] for dtype, error in errors.items())


def main() -> int:
    for name, value in facts().items():
        print(f"{name:<13} {value}")
    devices = ["cpu"]
    if _C.build_info()["cuda_version"] is not None:
        devices += [f"cuda:{index}" for index in gpus()]
    print("self-check")
    good = True
    for device in devices:
        try:
            good = self_check(device) and good
        except RuntimeError as error:  # such as a GPU that nothing was compiled for
            print(f"{device}: {error}")
            good = False
    print("OK" if good else "FAILED")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
