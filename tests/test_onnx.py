"""Exports to ONNX, run by ONNX Runtime and compared with the reference."""

import itertools
import random
import sys

import children
import hypothesis
import onnx
import onnxruntime
import pytest
import torch
from comparison import BF16, F16, F32, F64, assert_close
from hypothesis import strategies as st

import gatedrnn
import gatedrnn.onnx
from gatedrnn import DIRECTIONS, SpatialGatedRNN
from gatedrnn._options import GATE_ACTIVATIONS, NONLINEARITIES
from gatedrnn.reference import spatial_gated_rnn as reference

CHANNELS = 4
GATES = ("none", "channel", "pixel", "direction_channel", "direction_pixel")
SIZES = [(2, 5, 7), (1, 1, 1), (3, 8, 1), (1, 1, 6)]  # N, H, W


def forms():
    """Options of layers, with the kind of their gates: each value of an option in some of them."""
    draw = random.Random(1418)  # which brings most pairs of values together
    merges = ("max", "mean", "sum", None, "cascade")
    for merge, nonlinearity in zip(merges * 2, itertools.cycle(NONLINEARITIES)):
        options = dict(
            groups=draw.choice([1, 2, CHANNELS]),
            directions=draw.sample(DIRECTIONS, draw.choice([4, 3, 2, 1])),
            nonlinearity=nonlinearity,
            bias=draw.choice([True, False]),
            weight_constraint=draw.choice(["spectral", "frobenius", None]),
            gate_activation=draw.choice(GATE_ACTIVATIONS),
        )
        options |= dict(integration="cascade") if merge == "cascade" else dict(merge=merge)
        yield draw.choice(GATES), options


FORMS = list(forms())


def filled(layer):
    """With weights that the clamp changes, though none lets a line grow, and a bias."""
    with torch.no_grad():
        layer.raw_weight.normal_(std=1.0 if layer.weight_constraint else 0.2)
        if layer.bias is not None:
            layer.bias.normal_(std=0.3)
    return layer


class Layers(torch.nn.Module):
    """Many layers on the same maps: one export serves many tests."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            filled(SpatialGatedRNN(CHANNELS, **options)) for _, options in FORMS
        )

    def forward(self, x, g):
        """x (N, C, H, W), g (N, 4, C, H, W)."""
        pairs = zip(self.layers, FORMS, strict=True)
        return tuple(layer(x, gate_of(g, *form)) for layer, form in pairs)


def gate_of(g, kind, options):
    if kind == "none":
        return None
    channels = slice(0, 1 if kind.endswith("pixel") else CHANNELS)
    if kind.startswith("direction"):
        return g[:, : len(options["directions"]), channels]
    return g[:, 0, channels]


def expected_of(layer, x, g):
    names = ("directions", "integration", "merge", "nonlinearity", "gate_activation")
    options = {name: getattr(layer, name) for name in names}
    tensors = (x, g, layer.weight.detach(), layer.bias)
    return reference(*(None if t is None else t.detach().double() for t in tensors), **options)


def maps_of(n, h, w, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, CHANNELS, h, w, generator=generator)
    # Some gates are beyond the clamp, and some at its bounds.
    return x, (1.5 * torch.randn(n, 4, CHANNELS, h, w, generator=generator)).clamp(-2, 1)


def session_of(program):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    data = program.model_proto.SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def run(session, *tensors):
    names = [value.name for value in session.get_inputs()]
    feeds = {name: t.numpy() for name, t in zip(names, tensors, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, feeds)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Layers()


@pytest.fixture(scope="module")
def program(model):
    any_size = torch.export.Dim.DYNAMIC
    sizes = ({0: any_size, 2: any_size, 3: any_size}, {0: any_size, 3: any_size, 4: any_size})
    return gatedrnn.onnx.export(model, maps_of(2, 3, 4), dynamic_shapes=sizes, verbose=False)


@pytest.fixture(scope="module")
def session(program):
    return session_of(program)


@pytest.fixture(scope="module")
def results(session):
    return {size: run(session, *maps_of(*size)) for size in SIZES}


@pytest.mark.parametrize("i", range(len(FORMS)))
def test_form_gives_the_reference_s_map_at_every_size(i, model, results):
    for size in SIZES:
        x, g = maps_of(*size)
        expected = expected_of(model.layers[i], x, gate_of(g, *FORMS[i]))
        assert_close(results[size][i], expected, what=f"{FORMS[i]} at {size}")


@hypothesis.settings(max_examples=15)
@hypothesis.given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40)),
    seed=st.integers(0, 2**16),
)
def test_any_size_gives_the_layers_maps(size, seed, model, session):
    x, g = maps_of(*size, seed=seed)
    with torch.no_grad():
        for form, ours, theirs in zip(FORMS, run(session, x, g), model(x, g), strict=True):
            assert_close(ours, theirs.double(), what=f"{form} at {size}")


def test_operators_are_standard_and_weights_constant(program):
    onnx.checker.check_model(program.model_proto, full_check=True)
    assert len(program.model.functions) == 0
    nodes = list(program.model.graph.all_nodes())
    assert {node.domain for node in nodes} == {""}
    names = [value.name for node in nodes for value in node.outputs]
    assert len(set(names)) == len(names)
    scans = [node for node in nodes if node.op_type == "Scan"]
    assert len(scans) == sum(len(options["directions"]) for _, options in FORMS)
    for scan in scans:
        product = scan.attributes["body"].as_graph()[0]
        assert product.op_type in ("MatMul", "Mul")
        assert product.inputs[0].const_value is not None


def test_nan_and_infinite_gates_go_where_the_reference_has_them(model, session):
    x, g = maps_of(2, 5, 7)
    x[0, 1, 2, 3] = g[1, 0, 0, 4, 1] = g[1, 2, 3, 1, 1] = float("nan")
    g[0, :, 2, 1, 1] = float("inf")
    for form, layer, y in zip(FORMS, model.layers, run(session, x, g), strict=True):
        expected = expected_of(layer, x, gate_of(g, *form))
        torch.testing.assert_close(
            y.double(),
            expected,
            rtol=1e-5,
            atol=1e-5,
            equal_nan=True,
            msg=lambda m, f=form: f"{f}: {m}",
        )


def test_no_image_gives_no_map(model, session):
    x, g = maps_of(0, 5, 7)
    with torch.no_grad():
        expected = model(x, g)
    assert [y.shape for y in run(session, x, g)] == [y.shape for y in expected]


class EachType(torch.nn.Module):
    """A layer in each type; the maps are cast to it here, for NumPy has no bfloat16."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            filled(SpatialGatedRNN(CHANNELS, merge="mean")).to(dtype)
            for dtype in (F64, F32, BF16, F16)
        )

    def forward(self, x, g):
        """x, g (N, C, H, W) float64."""
        results = []
        for layer in self.layers:
            dtype = layer.bias.dtype
            results.append(layer(x.to(dtype), g.to(dtype)).to(F64))
        return tuple(results)


def test_maps_of_every_type_have_the_state_s_precision():
    torch.manual_seed(0)
    model = EachType()
    x, g = maps_of(2, 5, 7)
    x, g = x.double(), g[:, 0].double()
    results = run(session_of(gatedrnn.onnx.export(model, (x, g), verbose=False)), x, g)
    for layer, y in zip(model.layers, results, strict=True):
        dtype = layer.bias.dtype
        assert_close(y.to(dtype), expected_of(layer, x.to(dtype), g.to(dtype)))


class Twice(torch.nn.Module):
    """One layer called twice and weights that are computed: nothing is named twice."""

    def __init__(self):
        super().__init__()
        self.layer = SpatialGatedRNN(CHANNELS, groups=2, weight_constraint=None)

    def forward(self, x, weight):
        return gatedrnn.spatial_gated_rnn(
            self.layer(self.layer(x)) + self.layer(x), None, weight * 2
        )


@pytest.mark.parametrize("optimize", [False, True])
def test_table_serves_an_export_of_one_s_own(optimize):
    # With gradients on, so that the scan is asked for a mask, too.
    model = Twice()
    x, weight = torch.randn(1, CHANNELS, 3, 4), torch.randn(4, CHANNELS, CHANNELS) / 8
    table = gatedrnn.onnx.translation_table()
    program = torch.onnx.export(
        torch.export.export(model, (x, weight)),
        custom_translation_table=table,
        optimize=optimize,
        verbose=False,
    )
    (y,) = run(session_of(program), x, weight)
    torch.testing.assert_close(y, model(x, weight), rtol=0, atol=1e-5)


def test_export_leaves_the_network_alone_and_takes_further_translations(tmp_path):
    model = torch.nn.Sequential(torch.nn.Dropout(), filled(SpatialGatedRNN(CHANNELS))).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(1, CHANNELS, 3, 4)
    asked = []

    def relu(value):
        from onnxscript import opset18

        asked.append(value)
        return opset18.Relu(value)

    gatedrnn.onnx.export(
        torch.nn.Sequential(model, torch.nn.ReLU()),
        (x,),
        tmp_path / "layer.onnx",
        custom_translation_table={torch.ops.aten.relu.default: relu},
        verbose=False,
    )
    assert len(asked) == 1
    assert model.training
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    session = onnxruntime.InferenceSession(tmp_path / "layer.onnx")
    (y,) = run(session, x)
    torch.testing.assert_close(y, model.eval()(x).relu(), rtol=0, atol=1e-5)


def test_packages_are_asked_for_by_name_and_imported_late(monkeypatch):
    code = "import sys, gatedrnn.onnx; assert not {'onnx', 'onnxscript'} & sys.modules.keys()"
    children.run([sys.executable, "-c", code], check=True, cwd=sys.prefix)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match="pip install onnx onnxscript"):
        gatedrnn.onnx.translation_table()


@pytest.mark.slow
def test_export_of_pytorch_alone_names_the_one_of_the_package(tmp_path):
    layer, x = SpatialGatedRNN(4), torch.randn(1, 4, 5, 6)
    with pytest.raises(Exception, match=r"use gatedrnn\.onnx\.export"):
        torch.onnx.export(layer, (x,), tmp_path / "layer.onnx", dynamo=True)


def test_module_is_an_attribute_of_the_package():
    assert gatedrnn.onnx is sys.modules["gatedrnn.onnx"]
    with pytest.raises(AttributeError, match="has no attribute 'onx'"):
        gatedrnn.onx  # noqa: B018
