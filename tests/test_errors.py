"""Every error message: it names the argument, the rule and what was given."""

import re
import warnings

import pytest
import torch

from gatedrnn import SpatialGatedRNN, functional
from gatedrnn.functional import spatial_gated_rnn
from gatedrnn.norms import clamp_norm

X = torch.zeros(2, 6, 4, 5)
W = torch.zeros(4, 6, 3)


def says(kind, message):
    return pytest.raises(kind, match="^" + re.escape(message) + "$")


OPTIONS = [
    (
        dict(directions={"left_to_right"}),
        "directions must be a list or tuple of names, got {'left_to_right'}",
    ),
    (
        dict(directions="left_to_right"),
        "directions must be a list or tuple of names, got 'left_to_right'",
    ),
    (dict(directions=[]), "directions must name at least one direction, got none"),
    (
        dict(directions=["left_to_right", "up"]),
        "directions must be names out of 'left_to_right', 'right_to_left', 'top_to_bottom' or "
        "'bottom_to_top', got 'up'",
    ),
    (
        dict(directions=[0]),
        "directions must be names out of 'left_to_right', 'right_to_left', 'top_to_bottom' or "
        "'bottom_to_top', got 0",
    ),
    (
        dict(directions=["top_to_bottom", "top_to_bottom"]),
        "directions must be different from each other, got ('top_to_bottom', 'top_to_bottom')",
    ),
    (
        dict(integration="serial"),
        "integration must be one of 'parallel' or 'cascade', got 'serial'",
    ),
    (dict(merge="avg"), "merge must be one of 'max', 'mean', 'sum' or None, got 'avg'"),
    (
        dict(nonlinearity="gelu"),
        "nonlinearity must be one of 'identity', 'tanh', 'relu' or 'sigmoid', got 'gelu'",
    ),
    (
        dict(nonlinearity=None),
        "nonlinearity must be one of 'identity', 'tanh', 'relu' or 'sigmoid', got None",
    ),
    (
        dict(gate_activation="softmax"),
        "gate_activation must be one of 'clamp', 'tanh', 'sigmoid' or None, got 'softmax'",
    ),
    (
        dict(integration="cascade", merge="sum"),
        "merge must be left at its default with integration='cascade', whose result is the last "
        "direction's map, got 'sum'",
    ),
    (
        dict(integration="cascade", merge=None),
        "merge must be left at its default with integration='cascade', whose result is the last "
        "direction's map, got None",
    ),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS)
def test_unknown_option_is_refused_by_function_and_layer(options, message):
    with says(ValueError, message):
        spatial_gated_rnn(X, None, W, **options)
    with says(ValueError, message):
        SpatialGatedRNN(6, **options)


LAYER = [
    (dict(channels=0), "channels must be a positive integer, got 0"),
    (dict(channels=2.0), "channels must be a positive integer, got 2.0"),
    (dict(channels=True), "channels must be a positive integer, got True"),
    (dict(channels=6, groups=0), "groups must be a positive integer, got 0"),
    (dict(channels=6, groups=4), "groups must divide channels (6), got 4"),
    (dict(channels=6, bias="no"), "bias must be True or False, got 'no'"),
    (
        dict(channels=6, weight_constraint="l1"),
        "weight_constraint must be one of 'spectral', 'frobenius' or None, got 'l1'",
    ),
]


def test_layer_of_unsupported_dtype_is_refused():
    message = "dtype must be float64, float32, bfloat16 or float16, got torch.complex64"
    with says(TypeError, message):
        SpatialGatedRNN(6, dtype=torch.complex64)


def test_layer_names_x_when_its_channels_are_wrong():
    message = (
        "SpatialGatedRNN: x must be (N, C, H, W) with the layer's C = 8 channels, got (1, 4, 2, 2)"
    )
    with says(RuntimeError, message):
        SpatialGatedRNN(8)(torch.zeros(1, 4, 2, 2))


@pytest.mark.parametrize(("options", "message"), LAYER)
def test_bad_layer_is_refused(options, message):
    with says(ValueError, message):
        SpatialGatedRNN(**options)


def test_unknown_norm_is_refused():
    message = "weight_constraint must be one of 'spectral', 'frobenius' or None, got 'max'"
    with says(ValueError, message):
        clamp_norm(W, "max")


def dtype_message(argument, dtype):
    return f"{argument} must be float64, float32, bfloat16 or float16, got {dtype}"


TENSORS = [
    (dict(x=[1.0]), TypeError, "x must be a tensor, got list"),
    (dict(g=0.5), TypeError, "g must be a tensor, got float"),
    (dict(weight=None), TypeError, "weight must be a tensor, got NoneType"),
    (dict(bias=(1, 2)), TypeError, "bias must be a tensor, got tuple"),
    (dict(x=X.long()), TypeError, dtype_message("x", "torch.int64")),
    (dict(x=X.to(torch.complex64)), TypeError, dtype_message("x", "torch.complex64")),
    (dict(g=X.bool()), TypeError, dtype_message("g", "torch.bool")),
    (dict(weight=W.int()), TypeError, dtype_message("weight", "torch.int32")),
    (
        dict(bias=torch.zeros(4, 6, dtype=torch.float8_e5m2)),
        TypeError,
        dtype_message("bias", "torch.float8_e5m2"),
    ),
    (dict(x=X.to_sparse()), TypeError, "x must be a dense tensor, got torch.sparse_coo"),
    (
        dict(g=X.to("meta")),
        RuntimeError,
        "g must be on x's device cpu, got meta",
    ),
    (dict(weight=W.to("meta")), RuntimeError, "weight must be on x's device cpu, got meta"),
    (dict(x=X[0]), RuntimeError, "x must be (N, C, H, W), got (6, 4, 5)"),
    (
        dict(x=X[:, :0]),
        RuntimeError,
        "x must have at least one channel, got (2, 0, 4, 5)",
    ),
    (
        dict(x=X[:, :0], weight=W[:, :0]),
        RuntimeError,
        "x must have at least one channel, got (2, 0, 4, 5)",
    ),
    (
        dict(weight=W[:3]),
        RuntimeError,
        "weight must be (D, C, C // groups) = (4, 6, 6 // groups) for 4 directions and x "
        "(2, 6, 4, 5), got (3, 6, 3)",
    ),
    (
        dict(weight=W[:, :5]),
        RuntimeError,
        "weight must be (D, C, C // groups) = (4, 6, 6 // groups) for 4 directions and x "
        "(2, 6, 4, 5), got (4, 5, 3)",
    ),
    (
        dict(weight=W[0]),
        RuntimeError,
        "weight must be (D, C, C // groups) = (4, 6, 6 // groups) for 4 directions and x "
        "(2, 6, 4, 5), got (6, 3)",
    ),
    (
        dict(weight=torch.zeros(4, 6, 4)),
        RuntimeError,
        "weight's last size must divide the 6 channels, got (4, 6, 4)",
    ),
    (
        dict(weight=torch.zeros(4, 6, 0)),
        RuntimeError,
        "weight's last size must divide the 6 channels, got (4, 6, 0)",
    ),
    (
        dict(bias=torch.zeros(4)),
        RuntimeError,
        "bias must be (D, C) = (4, 6), got (4,)",
    ),
    (
        dict(bias=torch.zeros(4, 6, 1)),
        RuntimeError,
        "bias must be (D, C) = (4, 6), got (4, 6, 1)",
    ),
    *[
        (
            dict(g=torch.zeros(shape)),
            RuntimeError,
            f"g must be (N, 1|C, H, W) or (N, D, 1|C, H, W) for x (2, 6, 4, 5) and D = 4 "
            f"directions, "
            f"got {shape}",
        )
        for shape in [
            (2, 4, 5),
            (2, 3, 4, 5),
            (1, 6, 4, 5),
            (2, 6, 4, 4),
            (2, 6, 5, 5),
            (2, 3, 6, 4, 5),
            (2, 4, 2, 4, 5),
            (2, 1, 6, 4, 5),
            (),
        ]
    ],
    (
        dict(g=X.double()),
        TypeError,
        "g must have x's dtype torch.float32, got torch.float64: convert one of them by .to(dtype)",
    ),
    (
        dict(weight=W.double()),
        TypeError,
        "weight must have x's dtype torch.float32, or float32 next to a 16-bit x, got "
        "torch.float64: convert "
        "one of them by .to(dtype)",
    ),
    (
        dict(x=X.bfloat16(), bias=torch.zeros(4, 6).half()),
        TypeError,
        "bias must have x's dtype torch.bfloat16, or float32 next to a 16-bit x, got "
        "torch.float16: convert "
        "one of them by .to(dtype)",
    ),
    (
        dict(x=X.double(), weight=W.double(), bias=torch.zeros(4, 6)),
        TypeError,
        "bias must have x's dtype torch.float64, or float32 next to a 16-bit x, got "
        "torch.float32: convert "
        "one of them by .to(dtype)",
    ),
]


@pytest.mark.parametrize(("change", "kind", "message"), TENSORS)
def test_bad_tensor_is_refused(change, kind, message):
    tensors = dict(x=X, g=None, weight=W, bias=None) | change
    with says(kind, "spatial_gated_rnn: " + message):
        spatial_gated_rnn(**tensors)


def test_weights_in_float32_beside_16_bit_maps_are_fine():
    for dtype in (torch.bfloat16, torch.float16):
        assert spatial_gated_rnn(X.to(dtype), None, W, torch.zeros(4, 6)).dtype == dtype


def test_options_are_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        spatial_gated_rnn(X, None, W, None, ["left_to_right"])
    with pytest.raises(TypeError, match="positional"):
        SpatialGatedRNN(6, 2)


def test_layer_of_another_dtype_is_refused():
    layer = SpatialGatedRNN(6)
    layer.raw_weight = torch.nn.Parameter(layer.raw_weight.detach().to(torch.complex64))
    with pytest.raises(TypeError, match=r"weight must be float32 or float64, got torch\.complex64"):
        layer(X)


def test_device_without_kernels_is_told_once():
    functional._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="^gatedrnn has no kernels for 'cuda' tensors: this runs"):
        functional._warn_once("cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        functional._warn_once("cuda")
    functional._warn_once.cache_clear()


@pytest.mark.parametrize(
    ("built", "capability", "told"),
    [
        (("sm_80", "sm_90", "compute_90"), (9, 0), False),
        (("sm_80", "compute_90"), (8, 6), False),
        (("sm_90a",), (9, 0), False),
        (("sm_80", "sm_90a", "compute_90"), (9, 1), True),
        (("sm_90", "compute_90"), (10, 0), True),
        (("sm_86", "compute_86"), (8, 0), True),
        (("compute_120",), (12, 1), True),
    ],
)
def test_gpu_that_must_compile_ptx_is_told_once(built, capability, told, monkeypatch):
    monkeypatch.setattr(functional, "ARCHITECTURES", built)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    functional._warn_of_ptx.cache_clear()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        functional._warn_of_ptx(0)
        functional._warn_of_ptx(0)
    functional._warn_of_ptx.cache_clear()
    assert len(seen) == told
    assert all("has no machine code for this GPU" in str(each.message) for each in seen)


def test_trace_in_grad_mode_names_the_way_out():
    layer, x = SpatialGatedRNN(4), torch.randn(1, 4, 5, 6)
    with pytest.raises(RuntimeError, match=r"trace under torch\.no_grad\(\), or use torch\.export"):
        torch.jit.trace(layer, (x,))
    with torch.no_grad():
        traced = torch.jit.trace(layer, (x,))
        torch.testing.assert_close(traced(x), layer(x))


def test_symbolic_trace_names_the_way_out():
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, SpatialGatedRNN) or super().is_leaf_module(module, name)

    network = torch.nn.Sequential(SpatialGatedRNN(4))
    with pytest.raises(TypeError, match="Make SpatialGatedRNN a leaf"):
        torch.fx.symbolic_trace(network)
    x = torch.randn(1, 4, 5, 6)
    traced = torch.fx.GraphModule(network, Tracer().trace(network))
    torch.testing.assert_close(traced(x), network(x))


def test_weight_cannot_be_set():
    layer = SpatialGatedRNN(4)
    for value in (torch.zeros(4, 4, 4), torch.nn.Parameter(torch.zeros(4, 4, 4))):
        with pytest.raises(AttributeError, match=r"weight is computed from raw_weight.*set layer"):
            layer.weight = value


@pytest.mark.parametrize("own", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_layer_takes_maps_of_its_dtype_and_float32_those_of_16_bits(own, given):
    layer, x = SpatialGatedRNN(4, dtype=own), torch.zeros(1, 4, 5, 6, dtype=given)
    if given == own or (own == torch.float32 and given != torch.float64):
        assert layer(x).dtype == given
    else:
        message = rf"x must have the layer's dtype {own}.*got {given}: convert the layer by"
        with pytest.raises(TypeError, match=message):
            layer(x)
    if own not in (torch.float64,) and given != torch.float64:
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)


def test_messages_name_the_remedy():
    layer = SpatialGatedRNN(8)
    with pytest.raises(
        RuntimeError, match=r"got \(1, 5, 6, 8\): permute.*x\.permute\(0, 3, 1, 2\)"
    ):
        layer(torch.zeros(1, 5, 6, 8))
    x = torch.zeros(1, 8, 5, 6)
    with pytest.raises(RuntimeError, match=r"got \(1, 4, 5, 6\): give .* as g\.unsqueeze\(2\)"):
        layer(x, torch.zeros(1, 4, 5, 6))
    assert layer(x, torch.zeros(1, 4, 5, 6).unsqueeze(2)).shape == x.shape


def test_layer_on_meta_refuses_another_dtype():
    layer = SpatialGatedRNN(2, device="meta")
    with pytest.raises(TypeError, match="x must have the layer's dtype"):
        layer(torch.empty(1, 2, 3, 3, dtype=torch.float64, device="meta"))
