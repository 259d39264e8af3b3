"""The layer under FSDP, and DTensor parameters. Importing this imports torch.distributed.tensor."""

from typing import TYPE_CHECKING

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from .norms import clamp_norm

if TYPE_CHECKING:
    from .modules import SpatialGatedRNN


def clamp_shards(weight: DTensor, norm: str) -> Tensor:
    """`clamp_norm` of a DTensor (D, C, K), as a DTensor.

    A shard of whole directions has whole blocks, so each process clamps its own shard. Any other
    placement could split a block: such a weight is gathered first.
    """
    mesh = weight.device_mesh
    placements = [p if p.is_shard(0) else Replicate() for p in weight.placements]
    local = weight.redistribute(mesh, placements).to_local()
    return DTensor.from_local(
        clamp_norm(local, norm),
        mesh,
        placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )


def replicated(tensor: Tensor, like: DTensor) -> DTensor:
    """`tensor`, which every process holds, as a DTensor on the mesh of `like`."""
    mesh = like.device_mesh
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def check_whole(layer: "SpatialGatedRNN") -> None:
    """Refuses what FullyShardedDataParallel leaves in a layer: a flat piece, or a freed tensor."""
    raw = layer.raw_weight
    freed = not layer._fsdp_use_orig_params and raw.untyped_storage().nbytes() == 0
    if raw.dim() != 3 or freed:
        raise RuntimeError(_GATHER)


def check_stored(layer: "SpatialGatedRNN") -> None:
    """Refuses a copy of raw_weight that FSDP has gathered, and drops later with every change."""
    check_whole(layer)
    raw = layer.raw_weight
    if not layer._fsdp_use_orig_params or hasattr(raw, "_fsdp_flattened"):
        if "raw_weight" not in layer._parameters:  # a view of the flat parameter
            raise RuntimeError(_GATHER)
    # A mesh of two dimensions without names is fully_shard's own: reshard_after_forward=int.
    elif not isinstance(raw, DTensor) or (
        raw.device_mesh.ndim == 2 and raw.device_mesh.mesh_dim_names is None
    ):
        raise RuntimeError(
            "SpatialGatedRNN: project_ must change the sharded raw_weight, got FSDP's gathered "
            "copy, which is dropped later; call reshard() of the FSDP module first"
        )


_GATHER = (
    "SpatialGatedRNN: FullyShardedDataParallel has raw_weight in pieces; use weight and project_ "
    "inside `with FullyShardedDataParallel.summon_full_params(model):`"
)
