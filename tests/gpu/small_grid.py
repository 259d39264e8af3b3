"""Every kernel once, on small maps: what compute-sanitizer watches (sanitize.py)."""

import itertools
import sys
from pathlib import Path

import torch

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from comparison import BF16, F32, F64
from gpu_cases import assert_all_close, forward_and_backward, make_inputs, truth

from gatedrnn import SpatialGatedRNN

torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True

# Block sizes known when compiled, and any; odd sizes, more than one tile each way.
SHAPES = [((2, 2, 19, 37), 1), ((1, 4, 18, 5), 2), ((1, 4, 33, 20), 4), ((2, 8, 17, 34), 8)]
SHAPES += [((1, 16, 20, 17), 16), ((1, 5, 18, 19), 5), ((1, 40, 9, 17), 40)]

for (shape, block), dtype in itertools.product(SHAPES, (F32, BF16, F64)):
    for merge, gate_activation, pixel in (("sum", "clamp", False), (None, "tanh", True)):
        x, g, weight, bias, grad = make_inputs(shape, block, dtype)
        g = g[:, :1] if pixel else g
        grad = grad if merge else grad[:, None].expand(-1, 4, -1, -1, -1)
        options = dict(merge=merge, gate_activation=gate_activation)
        tensors = (x, g, weight, bias, grad)
        assert_all_close(forward_and_backward(*tensors, **options), truth(tensors, **options))
    last = [t.contiguous(memory_format=torch.channels_last) for t in (x, grad[:, 0])]
    forward_and_backward(last[0], None, weight, bias, last[1], merge="max", gate_activation=None)

layer = SpatialGatedRNN(8, groups=2).cuda()
maps = make_inputs((2, 8, 17, 18), 8)[:2]
layer(*maps).sum().backward()
with torch.no_grad():
    layer(*maps)
torch.cuda.synchronize()
print("small grid: done")
