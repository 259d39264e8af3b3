"""The layer over two processes, with DistributedDataParallel and FSDP: as over one, on all maps."""

import gc
import os
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from comparison import within_norm
from torch.nn.parallel import DistributedDataParallel

from gatedrnn import SpatialGatedRNN

fsdp = pytest.importorskip("torch.distributed.fsdp", exc_type=ImportError)
tensor = pytest.importorskip("torch.distributed.tensor", exc_type=ImportError)
fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg", exc_type=ImportError)

WORLD = 2

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")


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


def train_sharded(rank):
    """The same with the parameters in shards, and a projection after each step."""
    layer, x, g = parts()
    fsdp.fully_shard(layer, mesh=tensor.init_device_mesh("cpu", (WORLD,)))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        mine = slice(2 * rank, 2 * rank + 2)
        layer(x[mine], g[mine]).pow(2).mean().backward()
        optimizer.step()
        layer.project_()
    assert layer.raw_weight.to_local().shape == (2, 4, 2)  # two of the directions
    return {"raw_weight": layer.raw_weight, "weight": layer.weight, "bias": layer.bias}


def work(rank, folder):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    layer = train(rank)
    state = {"grads": [p.grad for p in layer.parameters()], "state": layer.state_dict()}
    state["sharded"] = {name: t.full_tensor().detach() for name, t in train_sharded(rank).items()}
    torch.save(state, Path(folder) / f"{rank}.pt")
    # The DDP module must be freed before the group: as the group's last owner it can deadlock.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def trained_alone(after_step=lambda layer: None):
    layer, x, g = parts()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        layer(x, g).pow(2).mean().backward()
        optimizer.step()
        after_step(layer)
    return layer


def test_two_processes_train_as_one():
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (folder,), nprocs=WORLD, daemon=True)
        results = [torch.load(os.path.join(folder, f"{rank}.pt")) for rank in range(WORLD)]
    layer = trained_alone()
    for parameter, first, second in zip(
        layer.parameters(), results[0]["grads"], results[1]["grads"], strict=True
    ):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, parameter.grad)
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(results[0]["state"][name], value)

    def project(layer):
        layer.raw_weight.data.copy_(within_norm(layer.raw_weight.detach()))

    layer = trained_alone(project)
    for result in results:
        torch.testing.assert_close(result["sharded"]["raw_weight"], layer.raw_weight.detach())
        torch.testing.assert_close(result["sharded"]["weight"], layer.raw_weight.detach())
        torch.testing.assert_close(result["sharded"]["bias"], layer.bias.detach())


@pytest.fixture
def mesh():
    """Four processes, of which this is the first; nothing is sent, so only states are tested."""
    dist.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=4)
    yield tensor.init_device_mesh("cpu", (4,))
    dist.destroy_process_group()


def test_projection_of_a_gathered_copy_is_refused(mesh):
    first, second = network = torch.nn.Sequential(SpatialGatedRNN(4), SpatialGatedRNN(4))
    fsdp.fully_shard(first, mesh=mesh, reshard_after_forward=2)
    fsdp.fully_shard(network, mesh=mesh)
    with torch.no_grad():
        network(torch.zeros(1, 4, 2, 3))
    assert first.raw_weight.device_mesh.shape == (2, 2)  # halves, which the backward pass gathers
    assert not isinstance(second.raw_weight, tensor.DTensor)
    for layer in network:
        with pytest.raises(RuntimeError, match=r"call reshard\(\) of the FSDP module first$"):
            layer.project_()
    first.reshard()
    network.reshard()
    for layer in network:
        assert layer.project_() is layer


@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_pieces_of_a_parameter_are_refused_with_the_way_out(mesh, use_orig_params):
    network = fsdp.FullyShardedDataParallel(
        torch.nn.Sequential(SpatialGatedRNN(4, weight_constraint="frobenius")),
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
    )
    layer = network.module[0]
    way_out = r"`with FullyShardedDataParallel\.summon_full_params\(model\):`$"
    with pytest.raises(RuntimeError, match=way_out):
        layer.weight  # noqa: B018
    with pytest.raises(RuntimeError, match=way_out):
        layer.project_()
    network(torch.zeros(1, 4, 2, 3)).sum().backward()
    with pytest.raises(RuntimeError, match=way_out):
        layer.project_()
    with fsdp.FullyShardedDataParallel.summon_full_params(network):
        assert layer.weight.shape == (4, 4, 4)
        assert layer.project_() is layer


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_shards_made_on_the_meta_device_are_initialised(mesh):
    layer = SpatialGatedRNN(6, groups=2, device="meta")
    fsdp.fully_shard(layer, mesh=mesh)
    layer.to_empty(device="cpu").reset_parameters()
    shard = layer.raw_weight.to_local().detach()
    assert shard.shape == (1, 6, 3)
    assert (shard - 0.9 * torch.eye(3).repeat(2, 1)).abs().max() < 0.1
    assert not layer.bias.to_local().any()


def test_shard_that_cuts_blocks_is_gathered_for_the_clamp(mesh):
    layer = SpatialGatedRNN(4)
    fsdp.fully_shard(layer, mesh=mesh, shard_placement_fn=lambda parameter: tensor.Shard(1))
    assert layer.weight.placements == (tensor.Replicate(),)
    assert layer.project_().raw_weight.placements == (tensor.Shard(1),)
