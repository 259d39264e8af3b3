"""Export to ONNX: a scan becomes standard operators, with one `Scan` for each of its directions.

What is written so runs without PyTorch and without this package. Writing it needs the packages
`onnx` and `onnxscript`, which an export imports.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch

from ._options import ALONG_WIDTH, DIRECTIONS, FROM_END, Options, options_of
from .modules import fold_weight_constraint

# Operators; None where a value stays as it is.
_NONLINEARITY = {"identity": None, "tanh": "Tanh", "relu": "Relu", "sigmoid": "Sigmoid"}
_GATE_ACTIVATION = {None: None, "clamp": "Clip", "tanh": "Tanh", "sigmoid": "Sigmoid"}
_MERGE = {"max": "Max", "mean": "Add", "sum": "Add"}  # of two maps; a mean is divided at the end


def export(model: torch.nn.Module, args: tuple[Any, ...], f: Any = None, **options: Any) -> Any:
    """Exports a network with `SpatialGatedRNN` layers to ONNX, for inference.

    It copies the network, puts the copy into evaluation mode, and stores the clamped weights as
    constants (`gatedrnn.fold_weight_constraint`). Then it calls `torch.onnx.export`. The
    file runs without PyTorch and without gatedrnn.

    Args:
        model: the network. It does not change.
        args: example inputs, as a tuple. All sizes are fixed but those that `dynamic_shapes`
            names: N, which may then be 0, and H and W of a scan, which are at least 1.
        f: the file to write, or None.
        options: any other option of `torch.onnx.export`.

    Returns:
        torch.onnx.ONNXProgram.

    Raises:
        ImportError: `onnx` or `onnxscript` is not installed.

    Example:
        >>> layer, x, g = SpatialGatedRNN(8), torch.randn(2, 8, 64, 48), torch.rand(2, 8, 64, 48)
        >>> program = gatedrnn.onnx.export(layer, (x, g), "layer.onnx")
    """
    table = translation_table() | (options.pop("custom_translation_table", None) or {})
    model = fold_weight_constraint(model).eval()
    with torch.no_grad():
        return torch.onnx.export(
            model, args, f, dynamo=True, custom_translation_table=table, **options
        )


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The scan's `custom_translation_table`, for a `torch.onnx.export` of one's own.

    Make one for each export. Layers with a spectral norm must be folded before
    (`gatedrnn.fold_weight_constraint`): ONNX has no singular values.

    Raises:
        ImportError: `onnx` or `onnxscript` is not installed.
    """
    try:
        import onnx  # noqa: F401
        from onnxscript import evaluator, ir
    except ImportError as error:
        raise ImportError(
            "the export to ONNX needs two more packages: pip install onnx onnxscript",
            name=error.name,
        ) from None
    numbers = itertools.count()

    def scan(
        x: Any,
        g: Any,
        weight: Any,
        bias: Any,
        directions: list[int],
        merge: int,
        nonlinearity: int,
        gate_activation: int,
        keep_mask: bool,
    ) -> tuple[Any, Any]:
        node = _Nodes(ir)
        options = options_of(directions, merge, nonlinearity, gate_activation)
        y = _scan(node, f"scan_{next(numbers)}", x, g, weight, bias, options)
        mask = node("Constant", value=ir.tensor([], ir.DataType.UINT8))  # only a backward reads it
        # torch.onnx has set an evaluator that records what is called. A Scan cannot be called: the
        # schema does not say how many results it has, and the evaluator makes one of them.
        evaluator.default().nodes.extend(node.tape.nodes)
        return y, mask

    return {torch.ops.gatedrnn.scan.default: scan}


class _Nodes:
    """Makes nodes and keeps them in order."""

    def __init__(self, ir: Any) -> None:
        self.ir, self.tape = ir, ir.tape.Tape()

    def __call__(self, kind: str, *inputs: Any, **attributes: Any) -> Any:
        return self.tape.op(kind, inputs, attributes)

    def constant(self, values: Any, dtype: Any = None) -> Any:
        """int64 unless `dtype` says otherwise."""
        return self("Constant", value=self.ir.tensor(values, dtype or self.ir.DataType.INT64))

    def cast(self, value: Any, before: Any, after: Any) -> Any:
        return value if before == after else self("Cast", value, to=int(after))

    def applied(self, kind: str | None, value: Any, *others: Any) -> Any:
        """`value` itself where `kind` is None."""
        return value if kind is None else self(kind, value, *others)


def _scan(node: _Nodes, name: str, x: Any, g: Any, weight: Any, bias: Any, options: Options) -> Any:
    """y (N, C, H, W), or (N, D, C, H, W) without a merge, of the op's own arguments.

    In between C is (G, K), G blocks of K channels: w h is then one product for blocks of any size.
    """
    maps, state = x.dtype, weight.dtype  # the state of 16-bit maps is float32
    d, c, k = weight.shape

    def sized(*between: int) -> Any:  # the shape (N, *between, H, W)
        parts = node("Shape", x, end=1), node.constant(between), node("Shape", x, start=2)
        return node("Concat", *parts, axis=0)

    def in_blocks(gate: Any) -> Any:  # (N, 1|C, H, W) to (N, 1|G, 1|K, H, W)
        if channels == c:
            return node("Reshape", gate, blocks, allowzero=1)
        return node("Unsqueeze", gate, node.constant([1]))

    blocks = sized(c // k, k)
    gates: list[Any] = [None] * d
    if g is not None:
        rank, channels = len(g.shape), g.shape[-3]
        g = _activated(node, node.cast(g, maps, state), state, options.gate_activation)
        if rank == 4:
            gates = [in_blocks(g)] * d
        else:
            gates = [in_blocks(node("Gather", g, node.constant(i), axis=1)) for i in range(d)]
    lines = node("Reshape", node.cast(x, maps, state), blocks, allowzero=1)
    weight = node("Reshape", weight, node.constant([d, c // k, k, k]))
    if bias is not None:
        bias = node("Reshape", bias, node.constant([d, c // k, k, 1]))
    results = []
    for i, code in enumerate(options.directions):
        w = node("Gather", weight, node.constant(i))
        b = None if bias is None else node("Gather", bias, node.constant(i))
        gated = gates[i] is not None
        body = _step(
            node.ir, f"{name}_{DIRECTIONS[code]}", state, w, b, k, gated, options.nonlinearity
        )
        inputs = [lines, gates[i]] if gated else [lines]
        results.append(_direction(node, body, inputs, code, state))

    if options.merge is None:
        y = node("Concat", *(node("Unsqueeze", h, node.constant([1])) for h in results), axis=1)
    else:
        y = functools.reduce(functools.partial(node, _MERGE[options.merge]), results)
    if options.merge == "mean":
        y = node("Div", y, node.constant(float(d), state))
    shape = sized(d, c) if options.merge is None else sized(c)
    return node.cast(node("Reshape", y, shape, allowzero=1), state, maps)


def _activated(node: _Nodes, g: Any, state: Any, gate_activation: str | None) -> Any:
    kind = _GATE_ACTIVATION[gate_activation]
    bounds = [node.constant(bound, state) for bound in (-1.0, 1.0)] if kind == "Clip" else []
    return node.applied(kind, g, *bounds)


def _direction(node: _Nodes, body: Any, inputs: list[Any], code: int, state: Any) -> Any:
    """h (N, G, K, H, W) of one direction; `inputs` are x likewise, and g (N, 1|G, 1|K, H, W)."""
    axis, backwards = 4 if ALONG_WIDTH[code] else 3, int(FROM_END[code])
    pixel = node("Shape", inputs[0], end=axis), node("Shape", inputs[0], start=axis + 1)
    h_0 = node(
        "ConstantOfShape", node("Concat", *pixel, axis=0), value=node.ir.tensor([0.0], state)
    )
    attributes = dict(
        body=body,
        num_scan_inputs=len(inputs),
        scan_input_axes=[axis] * len(inputs),
        scan_input_directions=[backwards] * len(inputs),
        scan_output_axes=[axis],
        scan_output_directions=[backwards],
    )
    return node.tape.op_multi_out("Scan", [h_0, *inputs], attributes, num_outputs=2)[1]


def _step(
    ir: Any, name: str, state: Any, w: Any, b: Any, k: int, gated: bool, nonlinearity: str
) -> Any:
    """The body of a Scan: (h_{i-1}, x_i[, g_i]) to (h_i, h_i), Eq. (3), for all lines at once.

    h and x are (N, G, K, L), g (N, 1|G, 1|K, L); w (G, K, K) and b (G, K, 1) are the outer graph's.
    """
    node = _Nodes(ir)
    inputs = [ir.Value(type=ir.TensorType(state)) for _ in range(2 + gated)]
    h, x, *g = inputs
    u = node("Mul" if k == 1 else "MatMul", w, h)
    u = u if b is None else node("Add", u, b)
    u = node("Mul", g[0], u) if gated else u
    h = node.applied(_NONLINEARITY[nonlinearity], node("Add", x, u))
    outputs = [h, node("Identity", h)]  # two results may not have one name
    # Nor may two values of a model, and the exporter would name these as those of the outer graph.
    for i, value in enumerate([*inputs, *(made.outputs[0] for made in node.tape.nodes)]):
        value.name = f"{name}_{i}"
    return ir.Graph(inputs, outputs, nodes=node.tape.nodes, name=name)
