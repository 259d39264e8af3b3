"""The directions of one scan on two devices at the same time.

Directions are independent until they are merged, and may run on several GPUs (section 3.1 of the
paper): here rows on one and columns on another. Gradients flow back through the copies. Where there
are not two GPUs, the one there is, or the CPU, takes both halves: `python examples/two_devices.py`
checks the result and says what it ran on.
"""

import torch
from torch import Tensor

from gatedrnn import DIRECTIONS
from gatedrnn.functional import spatial_gated_rnn

HALVES = (DIRECTIONS[:2], DIRECTIONS[2:])  # rows, columns


def scan_on(devices, x: Tensor, g: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`spatial_gated_rnn(x, g, weight, bias)` with each half of the directions on its own device.

    Args:
        devices: two devices, for rows and for columns.
        x, g: (N, C, H, W), on any device.
        weight, bias: (4, C, C // groups) and (4, C), in the order of `DIRECTIONS`.

    Returns:
        (N, C, H, W), on x's device: the maximum over the four directions. The gradient of a tie
        between rows and columns is halved between them, however many directions are in it.
    """
    maps = []
    for device, names, half in zip(devices, HALVES, (slice(0, 2), slice(2, 4)), strict=True):
        # Kernels are queued, not waited for: the second device starts while the first one works.
        inputs = [t.to(device, non_blocking=True) for t in (x, g, weight[half], bias[half])]
        maps.append(spatial_gated_rnn(*inputs, directions=names))
    rows, columns = (half.to(x.device, non_blocking=True) for half in maps)
    return torch.maximum(rows, columns)


def two_devices() -> tuple[torch.device, torch.device]:
    """Two GPUs if there are two, else one device twice."""
    count = torch.cuda.device_count()
    names = ("cuda:0", f"cuda:{min(count, 2) - 1}") if count else ("cpu", "cpu")
    return torch.device(names[0]), torch.device(names[1])


def main() -> None:
    devices = two_devices()
    torch.manual_seed(0)
    x, g = torch.randn(2, 8, 96, 128), torch.rand(2, 8, 96, 128)
    weight, bias = torch.eye(8).repeat(4, 1, 1) * 0.9, torch.randn(4, 8) / 10
    x, g, weight, bias = (t.to(devices[0]) for t in (x, g, weight, bias))
    y = scan_on(devices, x, g, weight, bias)
    torch.testing.assert_close(y, spatial_gated_rnn(x, g, weight, bias))
    print(f"rows on {devices[0]}, columns on {devices[1]}: as on one device")


if __name__ == "__main__":
    main()
