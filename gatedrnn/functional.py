"""`spatial_gated_rnn`: the checks, autocast and integration; the scan itself is in `_ops`."""

import functools
import warnings
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from ._ops import ARCHITECTURES, DEVICES, by_reference, runs_natively, scan
from ._options import GATE_ACTIVATIONS, MERGES, NONLINEARITIES, Options, direction_code
from ._plain import plain_scan
from .norms import clamp_norm
from .reference import DIRECTIONS, Direction, GateActivation, Integration, Merge, Nonlinearity

INTEGRATIONS: tuple[Integration, ...] = get_args(Integration)
HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float64, torch.float32, *HALF)


def spatial_gated_rnn(
    x: Tensor,
    g: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    directions: Sequence[Direction] = DIRECTIONS,
    integration: Integration = "parallel",
    merge: Merge | None = "max",
    nonlinearity: Nonlinearity = "identity",
    gate_activation: GateActivation | None = None,
) -> Tensor:
    """Scans x along rows and columns, in up to four directions, and merges the maps.

    Along each line (a row or a column) of a direction, with h_0 = 0:

        a_i = x_i + g_i * (w h_{i-1} + b)          Eq. (3)
        h_i = theta(a_i)

    The function uses the weight as given. `SpatialGatedRNN` keeps its norm within one.

    Args:
        x: (N, C, H, W), float64, float32, bfloat16 or float16, any strides. Any size but C may be
            0.
        g: the gates, in x's dtype. (N, C, H, W); (N, 1, H, W), one for all channels;
            (N, D, C, H, W) or (N, D, 1, H, W), separate for each direction; or None for g = 1,
            Eq. (1). With 4 dimensions, the second one is always the channels, also if D = C.
        weight: (D, C, C // groups), in x's dtype, or float32 next to a 16-bit x. `weight[d, c, k]`
            multiplies channel `c // K * K + k` of h_{i-1}, with K = C // groups, as in a grouped
            convolution.
        bias: (D, C), in x's dtype, or float32 next to a 16-bit x; or None.
        directions: D different names of `gatedrnn.DIRECTIONS`, in the order of weight, bias and g.
        integration: "parallel": every direction reads x, and their maps are merged. "cascade":
            each direction reads the map of the direction before, and the last map is the result.
        merge: "max", "mean", "sum", or None for the maps themselves. A cascade merges nothing.
            "max" passes NaN on and splits the gradient of a tie evenly. Where the maximum is NaN,
            only directions whose map is NaN get a gradient; the others get exactly 0.
        nonlinearity: theta: "identity", "tanh", "relu" or "sigmoid".
        gate_activation: applied to g inside the scan: "clamp" (to [-1, 1]), "tanh", "sigmoid", or
            None.

    Returns:
        (N, C, H, W) in x's dtype. It is channels_last if x is, and x is not also contiguous. With
        merge=None, (N, D, C, H, W), contiguous. The bits are the same on every run and for any
        number of threads.

    Raises:
        TypeError: a dtype is not supported, or does not fit x's.
        ValueError: an option is unknown, or two options exclude each other.
        RuntimeError: a shape or a device does not fit x's.

    Example:
        >>> x, g = torch.randn(2, 8, 64, 48), torch.rand(2, 1, 64, 48)
        >>> weight = torch.eye(8).expand(4, 8, 8)
        >>> spatial_gated_rnn(x, g, weight).shape
        torch.Size([2, 8, 64, 48])
    """
    options = prepared(directions, integration, merge, nonlinearity, gate_activation)
    return scan_checked(x, g, weight, bias, None, options, integration)


def scan_checked(
    x: Tensor,
    g: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    norm: str | None,
    options: Options,
    integration: Integration,
) -> Tensor:
    """`spatial_gated_rnn` of a weight that is clamped to `norm`."""
    plain = runs_natively(x)
    arguments = (plain, x, g, weight, bias, norm, options)
    if not plain or integration == "cascade":
        _check_tensors(x, g, weight, bias, options)
        return (_parallel if integration == "parallel" else _cascade)(*arguments)
    try:
        return _parallel(*arguments)
    except Exception:
        # The op checks its arguments itself, and quickly. This improves its words.
        try:
            _check_tensors(x, g, weight, bias, options)
        except Exception as error:
            raise error from None
        raise


def _parallel(
    plain: bool,
    x: Tensor,
    g: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    norm: str | None,
    options: Options,
) -> Tensor:
    if torch.is_grad_enabled() and torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        raise RuntimeError(
            "spatial_gated_rnn: torch.jit.trace can't record gradients of a scan: trace under "
            "torch.no_grad(), or use torch.export"
        )
    x, g, weight, bias = _autocast(x, g, weight, bias)
    _check_dtypes(x, g, weight, bias)
    state = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = weight if weight.dtype == state else weight.to(state)
    bias = bias if bias is None or bias.dtype == state else bias.to(state)
    if plain:
        if x.is_cuda:
            _warn_of_ptx(x.get_device())
        return plain_scan(x, g, weight, bias, options, norm)
    weight = clamp_norm(weight, norm)
    if x.device.type in DEVICES:
        return scan(x, g, weight, bias, options)
    _warn_once(x.device.type)
    return by_reference(x, g, weight, bias, options)


def _cascade(
    plain: bool,
    x: Tensor,
    g: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    norm: str | None,
    options: Options,
) -> Tensor:
    if norm is not None:
        weight = clamp_norm(weight, norm)
    for d, code in enumerate(options.directions):
        g_d = g[:, d] if g is not None and g.dim() == 5 else g
        b_d = None if bias is None else bias[d : d + 1]
        stage = Options((code,), "sum", options.nonlinearity, options.gate_activation)
        x = _parallel(plain, x, g_d, weight[d : d + 1], b_d, None, stage)
    return x


def _prepare(
    directions: Sequence[Direction],
    integration: Integration,
    merge: Merge | None,
    nonlinearity: Nonlinearity,
    gate_activation: GateActivation | None,
) -> Options:
    names = check_options(directions, integration, merge, nonlinearity, gate_activation)
    if len(names) == 1 and merge is not None:
        merge = "sum"  # one map: nothing to merge, and no mask to keep
    codes = tuple(direction_code(name) for name in names)
    return Options(codes, merge, nonlinearity, gate_activation)


_prepare_once = functools.lru_cache(_prepare)


def prepared(directions: Sequence[Direction], *others: Any) -> Options:
    """The options of a call, checked."""
    if isinstance(directions, list):
        directions = tuple(directions)
    try:
        if not torch.compiler.is_compiling():  # Dynamo warns of every cache
            return _prepare_once(directions, *others)
    except TypeError:  # something that has no hash, which no option is
        pass
    return _prepare(directions, *others)


def check_options(
    directions: Sequence[Direction],
    integration: Integration,
    merge: Merge | None,
    nonlinearity: Nonlinearity,
    gate_activation: GateActivation | None,
) -> tuple[Direction, ...]:
    """Raises ValueError unless all options are known and fit; returns the directions' names."""
    if not isinstance(directions, (list, tuple)):  # a set has no order
        raise ValueError(f"directions must be a list or tuple of names, got {directions!r}")
    directions = tuple(directions)
    if not directions:
        raise ValueError("directions must name at least one direction, got none")
    for name in directions:
        _check_choice("directions", name, DIRECTIONS)
    if len(set(directions)) != len(directions):
        raise ValueError(f"directions must be different from each other, got {directions}")
    _check_choice("integration", integration, INTEGRATIONS)
    _check_choice("merge", merge, MERGES)
    _check_choice("nonlinearity", nonlinearity, NONLINEARITIES)
    _check_choice("gate_activation", gate_activation, GATE_ACTIVATIONS)
    if integration == "cascade" and merge != "max":
        raise ValueError(
            f"merge must be left at its default with integration='cascade', whose result is the "
            f"last direction's map, got {merge!r}"
        )
    return directions


def _check_choice(argument: str, given: object, known: tuple[str | None, ...]) -> None:
    if given is None and None in known:
        return
    if not isinstance(given, str) or given not in known:
        names = [repr(name) for name in known if name is not None]
        last = "None" if None in known else names.pop()
        what = "must be one of" if argument != "directions" else "must be names out of"
        raise ValueError(f"{argument} {what} {', '.join(names)} or {last}, got {given!r}")


def refuse_proxy(value: object) -> None:
    """Raises TypeError for what `torch.fx.symbolic_trace` puts in a tensor's place."""
    if isinstance(value, torch.fx.Proxy):
        raise TypeError(
            "spatial_gated_rnn: torch.fx.symbolic_trace can't trace a scan. Make SpatialGatedRNN a "
            "leaf: use a torch.fx.Tracer whose is_leaf_module is true for it; or use torch.export"
        )


def _check_tensors(
    x: Tensor,
    g: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    options: Options,
) -> None:
    for argument, tensor in (("x", x), ("g", g), ("weight", weight), ("bias", bias)):
        if tensor is None and argument in ("g", "bias"):
            continue
        if not isinstance(tensor, Tensor):
            refuse_proxy(tensor)
            raise TypeError(
                f"spatial_gated_rnn: {argument} must be a tensor, got {type(tensor).__name__}"
            )
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"spatial_gated_rnn: {argument} must be float64, float32, bfloat16 or float16, "
                f"got {tensor.dtype}"
            )
        if tensor.layout != torch.strided:
            raise TypeError(
                f"spatial_gated_rnn: {argument} must be a dense tensor, got {tensor.layout}"
            )
        if tensor.device != x.device:
            raise RuntimeError(
                f"spatial_gated_rnn: {argument} must be on x's device {x.device}, "
                f"got {tensor.device}"
            )
    if x.dim() != 4:
        raise RuntimeError(f"spatial_gated_rnn: x must be (N, C, H, W), got {tuple(x.shape)}")
    n, c, h, w = x.shape
    d = len(options.directions)
    if c == 0:
        raise RuntimeError(
            f"spatial_gated_rnn: x must have at least one channel, got {tuple(x.shape)}"
        )
    if weight.dim() != 3 or weight.shape[0] != d or weight.shape[1] != c:
        raise RuntimeError(
            f"spatial_gated_rnn: weight must be (D, C, C // groups) = ({d}, {c}, {c} // groups) "
            f"for {d} directions and x {tuple(x.shape)}, got {tuple(weight.shape)}"
        )
    if weight.shape[2] < 1 or c % weight.shape[2]:
        raise RuntimeError(
            f"spatial_gated_rnn: weight's last size must divide the {c} channels, "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None and not (bias.dim() == 2 and bias.shape[0] == d and bias.shape[1] == c):
        raise RuntimeError(
            f"spatial_gated_rnn: bias must be (D, C) = ({d}, {c}), got {tuple(bias.shape)}"
        )
    if g is not None:
        # Size by size: a tuple of symbolic sizes equals no other while Dynamo traces.
        fits = g.dim() in (4, 5) and g.shape[0] == n and g.shape[-2] == h and g.shape[-1] == w
        fits = fits and (g.shape[-3] == 1 or g.shape[-3] == c)
        fits = fits and (g.dim() == 4 or g.shape[1] == d)
        if not fits:
            per_direction = g.dim() == 4 and g.shape[1] == d
            raise RuntimeError(
                f"spatial_gated_rnn: g must be (N, 1|C, H, W) or (N, D, 1|C, H, W) for x "
                f"{tuple(x.shape)} and D = {d} directions, got {tuple(g.shape)}"
                + (": give a map for each direction as g.unsqueeze(2)" if per_direction else "")
            )


def _check_dtypes(x: Tensor, g: Tensor | None, weight: Tensor, bias: Tensor | None) -> None:
    if g is not None and g.dtype != x.dtype:
        raise TypeError(
            f"spatial_gated_rnn: g must have x's dtype {x.dtype}, got {g.dtype}: convert "
            "one of them by .to(dtype)"
        )
    for argument, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None or tensor.dtype == x.dtype:
            continue
        if tensor.dtype == torch.float32 and x.dtype in HALF:
            continue
        raise TypeError(
            f"spatial_gated_rnn: {argument} must have x's dtype {x.dtype}, or float32 next to a "
            f"16-bit x, got {tensor.dtype}: convert one of them by .to(dtype)"
        )


def _autocast(
    x: Tensor, g: Tensor | None, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Under autocast: 16-bit maps all take autocast's type; otherwise everything is float32.

    As in PyTorch's own operations, float64 is left alone.
    """
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x, g, weight, bias
    maps = torch.float32
    if x.dtype in HALF or (g is not None and g.dtype in HALF):
        maps = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)

    return (
        cast(x, maps),
        None if g is None else cast(g, maps),
        cast(weight, torch.float32),
        None if bias is None else cast(bias, torch.float32),
    )


@functools.cache
def _warn_once(device: str) -> None:
    remedy = "; `python -m gatedrnn` says how to get them" if device == "cuda" else ""
    warnings.warn(
        f"gatedrnn has no kernels for {device!r} tensors: this runs the reference loop, slowly"
        + remedy,
        stacklevel=3,
    )


@functools.cache
def _warn_of_ptx(index: int) -> None:
    """Says once for a GPU why its first calls are slow."""
    major, minor = torch.cuda.get_device_capability(index)
    codes = [name.removeprefix("sm_") for name in ARCHITECTURES if name.startswith("sm_")]
    # Machine code runs on later GPUs of its major version, unless it ends in a letter.
    plain = [int(code) for code in codes if code.isdecimal()]
    if any(code // 10 == major and code % 10 <= minor for code in plain):
        return
    if any(code.rstrip("af") == f"{major}{minor}" for code in codes):
        return
    warnings.warn(
        f"gatedrnn has no machine code for this GPU, of compute capability {major}.{minor}, only "
        f"{', '.join(ARCHITECTURES)}: the driver compiles each kernel at its first use, which may "
        f"take half a minute. Build it with TORCH_CUDA_ARCH_LIST={major}.{minor}",
        stacklevel=3,
    )
