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
    """A layer that spreads x along rows and columns, through gates: Eq. (3).

    Along each line of a direction, with h_0 = 0:

        h_i = theta(x_i + g_i * (w h_{i-1} + b))

    The layer stores the parameter `raw_weight` and scans with `weight`, which is `raw_weight`
    with its norm clamped. So a state grows at most linearly along a line, whatever an optimizer
    did to the parameter: ||h_i|| <= ||h_{i-1}|| + ||x_i|| + ||b||.

    Args:
        channels: C, the channels of x.
        groups: w is block diagonal with `groups` blocks. `groups=channels` is one number per
            channel.
        directions: D different names of `gatedrnn.DIRECTIONS`. weight, bias and g follow their
            order.
        integration: "parallel": every direction reads x, and their maps are merged. "cascade":
            each direction reads the map of the direction before, and the last map is the result.
        merge: "max", "mean", "sum", or None for the maps themselves, (N, D, C, H, W). A cascade
            merges nothing.
        nonlinearity: theta: "identity", "tanh", "relu" or "sigmoid".
        bias: whether to learn b, (D, C).
        weight_constraint: the norm of each block that stays at or below one: "spectral",
            "frobenius", or None for no constraint.
        gate_activation: keeps |g| at or below one, inside the scan: "clamp" (to [-1, 1]), "tanh",
            "sigmoid", or None for g as given.
        device: of the parameters.
        dtype: of the parameters: float64, float32, bfloat16 or float16.

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
        """Sets w to 0.9 times the identity plus a little noise, and b to 0.

        With open gates, a tenth of a state is left after 22 pixels.
        """
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
        """The clamped weight that the scan uses, (D, C, C // groups); float32 for a 16-bit layer.

        Each access computes a new tensor from `raw_weight`. To change the weight, change
        `raw_weight`. Changes to this tensor, for example by `torch.nn.init`, are lost.

        A weight rounded to 16 bits after the clamp could have a norm of 1.002. Over a line of 4096
        pixels that is a factor of thousands.
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
        """Writes the clamped weight into `raw_weight`, as the paper does after each update.

        This is optional, since every call clamps the weight. With `fully_shard`, each process
        projects its own shard. In `FullyShardedDataParallel`, call it inside `summon_full_params`.

        Returns:
            the layer.

        Raises:
            RuntimeError: the change would be lost. FSDP has gathered a copy of the parameter, or
                pruning or a parametrization computes `raw_weight`.
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
        """Scans x.

        Args:
            x: (N, C, H, W), in the layer's dtype. A float32 layer also takes bfloat16 and float16.
            g: the gates, in x's dtype: (N, C, H, W), (N, 1, H, W), (N, D, C, H, W) or
                (N, D, 1, H, W). None stands for g = 1, Eq. (1).

        Returns:
            (N, C, H, W) in x's dtype and memory format; with merge=None (N, D, C, H, W).

        Raises:
            RuntimeError: a shape or a device does not fit.
            TypeError: a dtype does not fit.
        """
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
    """Copies `model` for inference or export, and stores each layer's clamped weight in the copy.

    The copy clamps nothing when it is called. Pruning and parametrizations of a layer become
    permanent in it.

    Args:
        model: a network with `SpatialGatedRNN` layers, or such a layer. It does not change.

    Returns:
        the copy. Its layers have `weight_constraint=None`. Under `torch.no_grad` it gives the same
        bits as `model`. The stored weight of a 16-bit layer becomes float32.

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
