"""DistributedDataParallel over two processes: the gradients of the whole batch, in both."""

import gc
import os
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from gatedrnn import SpatialGatedRNN

WORLD = 2

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this PyTorch has no gloo"
)


def parts():
    """The layer and the whole batch, the same in every process."""
    torch.manual_seed(0)
    layer = SpatialGatedRNN(4, groups=2)
    layer.raw_weight.data.mul_(1.5)  # so that the clamp is at work
    return layer, torch.randn(2 * WORLD, 4, 6, 5), torch.randn(2 * WORLD, 1, 6, 5)


def train(rank):
    """Two steps on this process's half of the batch; the layer."""
    layer, x, g = parts()
    if rank:  # DDP hands out the parameters of process 0
        layer.raw_weight.data.zero_()
    module = DistributedDataParallel(layer)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        mine = slice(2 * rank, 2 * rank + 2)
        module(x[mine], g[mine]).pow(2).mean().backward()
        optimizer.step()
    return layer


def work(rank, folder):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    layer = train(rank)
    state = {"grads": [p.grad for p in layer.parameters()], "state": layer.state_dict()}
    torch.save(state, Path(folder) / f"{rank}.pt")
    # The DDP module must be freed before the group: as the group's last owner it can deadlock.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_train_as_one():
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (folder,), nprocs=WORLD, daemon=True)
        results = [torch.load(os.path.join(folder, f"{rank}.pt")) for rank in range(WORLD)]
    layer, x, g = parts()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        layer(x, g).pow(2).mean().backward()
        optimizer.step()
    for parameter, first, second in zip(
        layer.parameters(), results[0]["grads"], results[1]["grads"], strict=True
    ):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, parameter.grad)
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(results[0]["state"][name], value)
