"""`SpatialGatedRNN`: the layer, whose weight is held within a norm of one on every call."""

import copy
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from .functional import DTYPES, HALF, check_options, prepared, refuse_proxy, scan_checked
from .norms import NORMS, WeightConstraint, clamp_norm, is_sharded
from .reference import DIRECTIONS, Direction, GateActivation, Integration, Merge, Nonlinearity


class SpatialGatedRNN(nn.Module):
    """Four-directional spatially variant RNN, Eq. (3), with |g| and the norm of w within one.

    The math is in :func:`gatedrnn.functional.spatial_gated_rnn`. The scan always uses
    :attr:`weight`, which is the stored parameter `raw_weight` with its norm clamped, so that a
    linear recurrence cannot grow faster than linearly, whatever an optimizer did to the parameter:
    ||h_i|| <= ||h_{i-1}|| + ||x_i|| + ||b||.

    Args:
        channels: C of x.
        groups: w is block diagonal with `groups` blocks; `groups=channels` is one scalar a channel.
        directions: D different names of `gatedrnn.DIRECTIONS`; weight, bias and g follow its order.
        integration: "parallel" or "cascade".
        merge: "max", "mean", "sum", or None for the stacked maps (N, D, C, H, W).
        nonlinearity: "identity", "tanh", "relu" or "sigmoid".
        bias: whether to learn b (D, C).
        weight_constraint: "spectral" or "frobenius", the norm of each block, held at <= 1; or None.
        gate_activation: holds |g| <= 1 inside the scan: "clamp", "tanh" or "sigmoid"; or None.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: an option is not known, or `groups` does not divide `channels`.
        TypeError: `dtype` is not supported.

    Example:
        >>> layer = SpatialGatedRNN(8)
        >>> layer(torch.randn(2, 8, 64, 48), torch.rand(2, 8, 64, 48)).shape
        torch.Size([2, 8, 64, 48])
    """

    raw_weight: nn.Parameter
    bias: nn.Parameter | None
    _is_fsdp_managed_module = False  # set by fully_shard and FullyShardedDataParallel

    def __init__(
        self,
        channels: int,
        *,
        groups: int = 1,
        directions: Sequence[Direction] = DIRECTIONS,
        integration: Integration = "parallel",
        merge: Merge | None = "max",
        nonlinearity: Nonlinearity = "identity",
        bias: bool = True,
        weight_constraint: WeightConstraint | None = "spectral",
        gate_activation: GateActivation | None = "clamp",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        channels = _positive("channels", channels)
        groups = _positive("groups", groups)
        if not isinstance(bias, bool):
            raise ValueError(f"bias must be True or False, got {bias!r}")
        if (dtype or torch.get_default_dtype()) not in DTYPES:
            raise TypeError(f"dtype must be float64, float32, bfloat16 or float16, got {dtype}")
        if channels % groups:
            raise ValueError(f"groups must divide channels ({channels}), got {groups}")
        if weight_constraint not in NORMS:
            raise ValueError(
                "weight_constraint must be one of 'spectral', 'frobenius' or None, "
                f"got {weight_constraint!r}"
            )
        self.channels = channels
        self.groups = groups
        self.directions = check_options(
            directions, integration, merge, nonlinearity, gate_activation
        )
        self.integration = integration
        self.merge = merge
        self.nonlinearity = nonlinearity
        self.weight_constraint = weight_constraint
        self.gate_activation = gate_activation
        d = len(self.directions)
        size = channels // groups
        self.raw_weight = nn.Parameter(torch.empty(d, channels, size, device=device, dtype=dtype))
        self.bias = (
            nn.Parameter(torch.empty(d, channels, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """w near 0.9 times the identity, which passes a state on for some ten pixels; b = 0."""
        raw = self.raw_weight
        eye = torch.eye(raw.shape[2], dtype=raw.dtype, device=raw.device).repeat(self.groups, 1)
        if is_sharded(raw):
            from ._sharding import replicated

            eye = replicated(eye, raw)
        with torch.no_grad():
            raw.normal_(std=0.02).add_(eye, alpha=0.9)
            if self.bias is not None:
                self.bias.zero_()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(
                "SpatialGatedRNN: weight is computed from raw_weight and can't be set: set "
                "layer.raw_weight, or fill it in place, as torch.nn.init does"
            )
        super().__setattr__(name, value)

    @property
    def weight(self) -> Tensor:
        """The weight (D, C, C // groups) that the scan uses: clamped, float32 for a 16-bit layer.

        Each access computes a new tensor from `raw_weight`. To change the weight, change
        `raw_weight`: what is written into this tensor, say by `torch.nn.init`, is lost.

        A weight rounded to 16 bits after the clamp could have a norm of 1.002, which over a line of
        4096 pixels is a factor of thousands.
        """
        return clamp_norm(self._unclamped(), self.weight_constraint)

    def _unclamped(self) -> Tensor:
        if self._is_fsdp_managed_module:
            from ._sharding import check_whole

            check_whole(self)
        raw: Tensor = self.raw_weight
        return raw.float() if raw.dtype in HALF else raw

    @torch.no_grad()
    def project_(self) -> "SpatialGatedRNN":
        """Replaces the stored parameter by its clamped self, say after an optimizer step.

        With `fully_shard` every process projects its own shard. In `FullyShardedDataParallel` call
        it inside of `summon_full_params`.

        Raises:
            RuntimeError: the change would be lost: FSDP has gathered a copy of the parameter, or
                `raw_weight` is computed by pruning or a parametrization.
        """
        if self._is_fsdp_managed_module:
            from ._sharding import check_stored

            check_stored(self)
        elif "raw_weight" not in self._parameters | self._buffers:
            raise RuntimeError(
                "SpatialGatedRNN: project_ must change raw_weight, which pruning or a "
                "parametrization computes; leave project_ out (the weight is clamped on every "
                "call), or make raw_weight permanent first, as torch.nn.utils.prune.remove does"
            )
        self.raw_weight.copy_(self.weight)
        return self

    def forward(self, x: Tensor, g: Tensor | None = None) -> Tensor:
        """x (N, C, H, W), g as in `spatial_gated_rnn` or None for Eq. (1); the merged maps."""
        if isinstance(x, Tensor):
            self._check(x)
        else:
            refuse_proxy(x)
        bias: Tensor | None = self.bias
        if bias is not None and bias.dtype in HALF:
            bias = bias.float()
        options = prepared(
            self.directions, self.integration, self.merge, self.nonlinearity, self.gate_activation
        )
        weight, norm = self._unclamped(), self.weight_constraint
        if type(self).weight is not SpatialGatedRNN.weight:  # a subclass computes its own
            weight, norm = self.weight, None
        return scan_checked(x, g, weight, bias, norm, options, self.integration)

    def _check(self, x: Tensor) -> None:
        if x.dim() == 4 and x.shape[1] != self.channels:
            last = ": permute (N, H, W, C) by x.permute(0, 3, 1, 2)"
            raise RuntimeError(
                f"SpatialGatedRNN: x must be (N, C, H, W) with the layer's C = {self.channels} "
                f"channels, got {tuple(x.shape)}{last if x.shape[3] == self.channels else ''}"
            )
        own = self.raw_weight.dtype
        if x.dtype == own or (own == torch.float32 and x.dtype in HALF):
            return
        device = x.device.type
        autocast = device != "meta" and torch.is_autocast_enabled(device)
        if own not in DTYPES:
            clamp_norm(self.raw_weight, self.weight_constraint)  # refuses it
        if (autocast and torch.float64 not in (x.dtype, own)) or x.dtype not in DTYPES:
            return
        raise TypeError(
            f"SpatialGatedRNN: x must have the layer's dtype {own}"
            + (" or 16 bits" if own == torch.float32 else "")
            + f", got {x.dtype}: convert the layer by layer.to(x.dtype), or x by x.to({own})"
        )

    def extra_repr(self) -> str:
        options = f"{self.channels}, groups={self.groups}, directions={self.directions}"
        for name in (
            "integration",
            "merge",
            "nonlinearity",
            "weight_constraint",
            "gate_activation",
        ):
            options += f", {name}={getattr(self, name)!r}"
        return options + f", bias={self.bias is not None}"


def fold_weight_constraint(model: nn.Module) -> nn.Module:
    """A copy of `model` in which every layer's stored weight is the clamped one.

    For inference and export: nothing is left to clamp on a call, and a graph traced of the copy
    has no singular value decomposition in it. Pruning and parametrizations of a layer become
    permanent in the copy.

    Args:
        model: a network that holds `SpatialGatedRNN` layers, or such a layer.

    Returns:
        the copy, whose layers have `weight_constraint=None`. Under `torch.no_grad` it gives the
        same maps, bit for bit. The stored weight of a 16-bit layer becomes float32.

    Raises:
        RuntimeError: a hook other than pruning computes a layer's `raw_weight`.

    Example:
        >>> folded = fold_weight_constraint(SpatialGatedRNN(8))
        >>> folded.weight is folded.raw_weight
        True
    """
    # What hooks compute, as those of pruning do, is no leaf, and deepcopy refuses it.
    computed = {
        id(t): t.detach().clone()
        for module in model.modules()
        for t in vars(module).values()
        if isinstance(t, Tensor) and not t.is_leaf
    }
    model = copy.deepcopy(model, computed)
    for layer in model.modules():
        if isinstance(layer, SpatialGatedRNN):
            _make_permanent(layer)
            # Not project_, which would round the weight of a 16-bit layer.
            with torch.no_grad():
                layer.raw_weight = nn.Parameter(layer.weight, layer.raw_weight.requires_grad)
            layer.weight_constraint = None
    return model


def _make_permanent(layer: SpatialGatedRNN) -> None:
    """Replaces parametrizations and pruning by the parameters that they compute."""
    names = ("raw_weight", "bias")
    if parametrize.is_parametrized(layer):
        # Not remove_parametrizations: it changes the class, which a copy shares with its model.
        with torch.enable_grad():
            found = [name for name in names if parametrize.is_parametrized(layer, name)]
            values = {name: getattr(layer, name) for name in found}
        layer.__class__ = parametrize.type_before_parametrizations(layer)
        del layer.parametrizations
        for name, value in values.items():
            layer.register_parameter(name, nn.Parameter(value.detach(), value.requires_grad))
    for name in names:
        if f"{name}_mask" in layer._buffers:
            prune.remove(layer, name)
    if "raw_weight" not in layer._parameters:
        raise RuntimeError(
            "fold_weight_constraint: raw_weight must be a parameter, got one that a hook computes; "
            "remove the hook first, say by torch.nn.utils.remove_weight_norm(layer, 'raw_weight')"
        )


def _positive(argument: str, given: Any) -> int:
    """`given` as an int of at least 1; a bool is none."""
    try:
        value = 0 if isinstance(given, bool) else operator.index(given)
    except TypeError:
        value = 0
    if value < 1:
        raise ValueError(f"{argument} must be a positive integer, got {given!r}")
    return value
