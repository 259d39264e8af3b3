"""The ops as PyTorch sees them: opcheck, fake tensors, torch.compile, torch.export, autocast."""

import itertools

import pytest
import torch
from comparison import BF16, DTYPES, F16, F32, F64, LAYOUTS, assert_close, laid_out, run
from tiers import pairwise, sampled
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from gatedrnn import DIRECTIONS, SpatialGatedRNN, fold_weight_constraint
from gatedrnn._options import MERGES, Options, op_arguments
from gatedrnn.functional import spatial_gated_rnn
from gatedrnn.reference import spatial_gated_rnn as reference

SHAPE = (2, 4, 5, 6)
GATES = {
    None: None,
    "channel": SHAPE,
    "pixel": (2, 1, 5, 6),
    "each": (2, 3, 4, 5, 6),
    "each_pixel": (2, 3, 1, 5, 6),
}


def tensors_for(gate="channel", dtype=F32, layout="contiguous", *, bias=True, grad=True):
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=generator)

    state = F64 if dtype == F64 else F32
    g = GATES[gate]
    tensors = [
        laid_out(normal(*SHAPE).to(dtype), layout),
        None if g is None else laid_out(normal(*g).to(dtype), layout),
        (normal(3, 4, 2) / 3).to(state),
        normal(3, 4).to(state) if bias else None,
    ]
    return [None if t is None else t.detach().requires_grad_(grad) for t in tensors]


CODES = [2, 0, 1]
NAMES = [DIRECTIONS[code] for code in CODES]


OPCHECKS = pairwise(tuple(GATES), MERGES, DTYPES)


@pytest.mark.parametrize(("gate", "merge", "dtype"), sampled(OPCHECKS, 3))
def test_scan_op_passes_opcheck(gate, merge, dtype):
    tensors = tensors_for(gate, dtype, "channels_last", bias=merge != "sum")
    # Autograd in 16 bits is compared with its own rounding elsewhere; opcheck knows no tolerance.
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    tests += ["test_aot_dispatch_dynamic"]
    torch.library.opcheck(
        torch.ops.gatedrnn.scan.default,
        (*tensors, *op_arguments(Options(CODES, merge, "tanh", "clamp")), True),
        test_utils=tests,
    )


BACKWARD_OPCHECKS = pairwise(
    ("contiguous", "channels_last", "sliced"),
    MERGES,
    ((True, True, True), (False, True, False), (False, False, False)),
)


@pytest.mark.parametrize(("layout", "merge", "needs"), sampled(BACKWARD_OPCHECKS, 4))
def test_backward_op_passes_opcheck(layout, merge, needs):
    x, g, weight, bias = tensors_for("channel", F32, layout, grad=False)
    options = op_arguments(Options(CODES, merge, "tanh", "clamp"))
    y, mask = torch.ops.gatedrnn.scan(x, g, weight, bias, *options, True)
    torch.library.opcheck(
        torch.ops.gatedrnn.scan_backward.default,
        (torch.randn_like(y), x, g, weight, bias, mask, *options, *needs),
        test_utils=["test_schema", "test_faketensor"],
    )


@pytest.mark.parametrize("dtype", sampled([F32, F64], 1))
def test_ops_of_the_clamp_pass_opcheck(dtype):
    weight = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    for keep, grad in ((True, True), (True, False), (False, False)):
        given = weight.clone().requires_grad_(grad)
        torch.library.opcheck(torch.ops.gatedrnn.clamp_spectral.default, (given, keep))
    _, kept = torch.ops.gatedrnn.clamp_spectral(weight, True)
    torch.library.opcheck(
        torch.ops.gatedrnn.clamp_spectral_backward.default, (weight + 1, weight, kept)
    )


def geometry(tensors):
    return [(t.shape, t.stride(), t.dtype) for t in tensors]


GEOMETRIES = pairwise(LAYOUTS, ("contiguous", "channels_last", "permuted"), MERGES, (F64, BF16))


@pytest.mark.parametrize(("x_layout", "g_layout", "merge", "dtype"), sampled(GEOMETRIES, 14))
def test_fake_results_have_the_geometry_of_real_ones(x_layout, g_layout, merge, dtype):
    for shape in (SHAPE, (2, 1, 5, 6), (2, 4, 1, 1), (1, 4, 1, 6), (0, 4, 5, 6), (2, 4, 0, 6)):
        x = laid_out(torch.zeros(shape, dtype=dtype), x_layout)
        g = laid_out(torch.zeros(shape, dtype=dtype), g_layout)
        state = F64 if dtype == F64 else F32
        weight = torch.zeros(3, shape[1], 1, dtype=state)
        bias = torch.zeros(3, shape[1], dtype=state)
        options = op_arguments(Options(CODES, merge, "identity", "clamp"))

        def both(x, g, weight, bias, options=options):
            y, mask = torch.ops.gatedrnn.scan(x, g, weight, bias, *options, True)
            grads = torch.ops.gatedrnn.scan_backward(
                y, x, g, weight, bias, mask, *options, True, True, True
            )
            return [y, mask, *grads]

        real = both(x, g, weight, bias)
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fake = both(*(mode.from_tensor(t) for t in (x, g, weight, bias)))
        assert geometry(fake) == geometry(real)
        meta = both(*(t.to("meta") for t in (x, g, weight, bias)))
        if x_layout in ("contiguous", "channels_last"):  # .to("meta") keeps these strides alone
            assert geometry(meta)[0] == geometry(real)[0]


def test_meta_tensors_go_through_the_function():
    tensors = [t.to("meta") for t in tensors_for("each", grad=False)]
    leaves = [t.requires_grad_() for t in tensors]
    y = spatial_gated_rnn(*leaves, directions=NAMES)
    y.sum().backward()
    assert y.shape == SHAPE
    assert [t.grad.shape for t in leaves] == [t.shape for t in leaves]
    cascade = spatial_gated_rnn(*leaves, directions=NAMES, integration="cascade")
    assert cascade.shape == SHAPE


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


COMPILED = pairwise(tuple(GATES), ("max", "mean", "sum", None, "cascade"))


@pytest.mark.parametrize(("gate", "merge"), sampled(COMPILED, 7))
def test_compiled_function_has_the_same_bits_forward_and_backward(gate, merge):
    options = dict(directions=NAMES, gate_activation="tanh", nonlinearity="tanh")
    options |= dict(integration="cascade") if merge == "cascade" else dict(merge=merge)
    tensors = tensors_for(gate, layout="channels_last")

    def function(*tensors):
        return spatial_gated_rnn(*tensors, **options)

    y, grads = run(function, tensors, torch.ones_like)
    y_compiled, grads_compiled = run(compiled(function), tensors, torch.ones_like)
    assert y_compiled.stride() == y.stride()
    torch.testing.assert_close(y_compiled, y, rtol=0, atol=0)
    torch.testing.assert_close(grads_compiled, grads, rtol=0, atol=0)


@pytest.mark.parametrize("weight_constraint", ["spectral", "frobenius", None])
def test_compiled_layer_trains_as_the_plain_one(weight_constraint):
    layer = SpatialGatedRNN(4, groups=2, weight_constraint=weight_constraint)
    generator = torch.Generator().manual_seed(0)
    layer.raw_weight.data.copy_(torch.randn(layer.raw_weight.shape, generator=generator))
    x, g = (torch.randn(SHAPE, generator=generator) for _ in range(2))

    def gradients(module):
        layer.zero_grad()
        y = module(x, g)
        y.pow(2).sum().backward()
        return y.detach(), [p.grad.clone() for p in layer.parameters()]

    torch.testing.assert_close(gradients(compiled(layer)), gradients(layer))


def test_compiled_layer_serves_changing_sizes():
    layer = SpatialGatedRNN(4)
    module = compiled(layer, dynamic=True)
    for shape in ((2, 4, 5, 6), (3, 4, 9, 7), (1, 4, 17, 33)):
        x = torch.randn(shape)
        torch.testing.assert_close(module(x, x), layer(x, x))
    with torch.no_grad():
        torch.testing.assert_close(module(x, x), layer(x, x))


def test_compiled_by_inductor_between_other_operations():
    layer = SpatialGatedRNN(4)
    x = torch.randn(SHAPE)

    def function(x):
        return torch.relu(layer(x * 2, torch.sigmoid(x)) + 1).sum()

    torch._dynamo.reset()
    try:
        value = torch.compile(function, fullgraph=True)(x)
    except Exception as error:
        if "compiler" not in str(error).lower():
            raise
        pytest.skip("inductor finds no working C++ compiler here")
    torch.testing.assert_close(value, function(x))


def test_compile_with_double_backward_is_refused():
    x = torch.randn(SHAPE, requires_grad=True)
    layer = SpatialGatedRNN(4)
    y = compiled(layer)(x, x)
    (grad,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        grad.sum().backward()


def of_dual_numbers(function, x, t):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, t))).tangent


TRANSFORMS = {
    "grad": lambda f, x, t: torch.func.grad(lambda x: f(x).square().sum())(x),
    "vjp": lambda f, x, t: (lambda y, pull: pull(y.cos())[0])(*torch.func.vjp(f, x)),
    "jvp": lambda f, x, t: torch.func.jvp(f, (x,), (t,))[1],
    "dual": of_dual_numbers,
    "hessian times vector": lambda f, x, t: torch.func.jvp(
        torch.func.grad(lambda x: f(x).square().sum()), (x,), (t,)
    )[1],
    "vmap": lambda f, x, t: torch.func.vmap(f)(torch.stack([x, t])),
}


@pytest.mark.parametrize(
    ("transform", "of"), sampled(itertools.product(TRANSFORMS, ("x", "weight")), 3)
)
def test_transforms_inside_of_a_compiled_function_are_not_lost(transform, of):
    layer = SpatialGatedRNN(4, groups=2).double()
    generator = torch.Generator().manual_seed(0)
    raw, other = (torch.randn(4, 4, 2, generator=generator, dtype=F64) for _ in range(2))
    x, t = (torch.randn(SHAPE, generator=generator, dtype=F64) for _ in range(2))

    def function(value):
        given = {"raw_weight": value} if of == "weight" else {"raw_weight": raw}
        return torch.func.functional_call(layer, given, (x if of == "weight" else value,))

    def transformed(a, b):
        return TRANSFORMS[transform](function, a, b)

    given = (raw, other) if of == "weight" else (x, t)
    torch._dynamo.reset()
    result = torch.compile(transformed, backend="aot_eager")(*given)
    torch.testing.assert_close(result, transformed(*given))
    assert result.abs().max() > 1e-3


def test_compiled_function_sees_dual_numbers_that_come_later():
    x, t = torch.randn(SHAPE, dtype=F64), torch.randn(SHAPE, dtype=F64)
    weight = torch.randn(4, 4, 2, dtype=F64, generator=torch.Generator().manual_seed(0))

    def function(x):
        return spatial_gated_rnn(x, None, weight, None)

    torch._dynamo.reset()
    module = torch.compile(function, backend="aot_eager")
    module(x)
    torch.testing.assert_close(of_dual_numbers(module, x, t), of_dual_numbers(function, x, t))


@pytest.mark.parametrize("merge", ["max", "sum"])
def test_gradients_that_were_not_foreseen_are_right(merge):
    # Inside of vmap nothing seems to require a gradient; and a graph may be exported without.
    layer = SpatialGatedRNN(4, groups=2, merge=merge).double()
    with torch.no_grad():
        layer.raw_weight.mul_(2)
    x = torch.randn(2, *SHAPE, dtype=F64, generator=torch.Generator().manual_seed(0))

    def ensemble(raw):
        def one(raw, x):
            return torch.func.functional_call(layer, {"raw_weight": raw}, (x,))

        return torch.func.vmap(one)(raw, x).square().sum()

    raw = torch.stack([layer.raw_weight, layer.raw_weight * 0.3]).detach().requires_grad_()
    torch._dynamo.reset()
    (grad,) = torch.autograd.grad(torch.compile(ensemble, backend="aot_eager")(raw), raw)
    torch.testing.assert_close(grad, torch.autograd.grad(ensemble(raw), raw)[0])

    with torch.no_grad():
        exported = torch.export.export(layer, (x[0],)).module()
    for module in (exported, layer):
        module(x[0]).square().sum().backward()
    torch.testing.assert_close(exported.raw_weight.grad, layer.raw_weight.grad)


def test_second_derivative_of_the_bare_clamp_is_refused():
    weight = (torch.eye(2) * 2).repeat(2, 2, 1).requires_grad_()
    clamped, _ = torch.ops.gatedrnn.clamp_spectral(weight, True)
    (grad,) = torch.autograd.grad(clamped.square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="the bare op, have no second derivative"):
        grad.sum().backward()


def test_bare_scan_has_derivatives_of_second_order():
    x = torch.randn(SHAPE, dtype=F64).requires_grad_()
    weight = torch.randn(1, 4, 2, dtype=F64).requires_grad_()

    def bare(x, weight):
        arguments = op_arguments(Options((0,), "sum", "tanh"))
        return torch.ops.gatedrnn.scan(x, None, weight, None, *arguments, True)[0]

    assert torch.autograd.gradgradcheck(bare, (x, weight))


@pytest.mark.parametrize("strict", [False, True])
def test_exported_layer_gives_the_same_map(strict, tmp_path):
    layer = SpatialGatedRNN(4, merge="mean").eval()
    x, g = torch.randn(SHAPE), torch.randn(SHAPE)
    n, h, w = (torch.export.Dim(name, min=1) for name in ("n", "h", "w"))
    sizes = {0: n, 2: h, 3: w}
    program = torch.export.export(layer, (x, g), dynamic_shapes=(sizes, sizes), strict=strict)
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    for shape in (SHAPE, (1, 4, 9, 3)):
        x, g = torch.randn(shape), torch.randn(shape)
        torch.testing.assert_close(loaded(x, g), layer(x, g))


def test_exported_folded_layer_is_the_scan_alone():
    x = torch.randn(SHAPE)
    program = torch.export.export(fold_weight_constraint(SpatialGatedRNN(4)), (x, x))
    operations = [n.target for n in program.run_decompositions().graph.nodes if n.op != "output"]
    computed = {t for t in operations if isinstance(t, torch._ops.OpOverload)}
    checks = {torch.ops.aten._assert_tensor_metadata.default}
    assert computed - checks == {torch.ops.gatedrnn.scan.default}


AUTOCAST = [
    # x, g, autocast's type, result
    (F32, F32, BF16, F32),
    (BF16, F32, BF16, BF16),
    (F32, BF16, BF16, BF16),
    (BF16, BF16, BF16, BF16),
    (F16, F32, BF16, BF16),
    (F32, F16, F16, F16),
    (F16, BF16, F16, F16),
]


@pytest.mark.parametrize(("x_dtype", "g_dtype", "autocast", "result"), AUTOCAST)
@pytest.mark.parametrize("weight_dtype", [F32, BF16])
def test_autocast_casts_maps_together_and_keeps_weights(
    x_dtype, g_dtype, autocast, result, weight_dtype
):
    x, g, weight, bias = tensors_for(grad=False)
    inputs = (x.to(x_dtype), g.to(g_dtype), weight.to(weight_dtype), bias.to(weight_dtype))
    with torch.autocast("cpu", dtype=autocast):
        y, grads = run(spatial_gated_rnn, inputs, torch.ones_like, directions=NAMES, merge="sum")
    assert y.dtype == result
    assert [t.dtype for t in grads] == [t.dtype for t in inputs]
    seen = [t.to(result).double() for t in inputs[:2]] + [t.double() for t in inputs[2:]]
    assert_close(y, reference(*seen, directions=NAMES, merge="sum"))


def test_autocast_leaves_float64_alone():
    tensors = tensors_for(dtype=F64, grad=False)
    with torch.autocast("cpu", dtype=BF16):
        assert spatial_gated_rnn(*tensors, directions=NAMES).dtype == F64


@pytest.mark.parametrize("which", [1, 2, 3])
def test_autocast_casts_no_float64_to_fit_a_map(which):
    # As torch.nn.functional.conv2d, which leaves a float64 weight alone and then refuses it.
    tensors = tensors_for(grad=False)
    tensors[which] = tensors[which].double()
    name = ("g", "weight", "bias")[which - 1]
    with (
        torch.autocast("cpu", dtype=BF16),
        pytest.raises(TypeError, match=f"{name} must have x's dtype .*, got torch.float64"),
    ):
        spatial_gated_rnn(*tensors, directions=NAMES)


def test_layer_of_float64_refuses_other_maps_under_autocast_too():
    layer, x = SpatialGatedRNN(4, dtype=F64), torch.zeros(SHAPE)
    with torch.autocast("cpu", dtype=BF16):
        assert layer(x.double()).dtype == F64
        with pytest.raises(TypeError, match="x must have the layer's dtype"):
            layer(x)


def test_layer_trains_under_autocast():
    conv, layer = torch.nn.Conv2d(3, 4, 3, padding=1), SpatialGatedRNN(4)
    image = torch.randn(2, 3, 5, 6)
    with torch.autocast("cpu", dtype=BF16):
        y = layer(conv(image), conv(image))
        loss = y.float().pow(2).mean()
    assert y.dtype == BF16
    loss.backward()
    assert {p.grad.dtype for p in (*conv.parameters(), *layer.parameters())} == {F32}
    assert all(p.grad.isfinite().all() for p in (*conv.parameters(), *layer.parameters()))


@pytest.mark.parametrize("flag", [True, False])
def test_inference_mode_and_no_grad_build_no_graph(flag):
    x, g, weight, bias = tensors_for()
    with torch.inference_mode(flag), torch.no_grad():
        y = spatial_gated_rnn(x, g, weight, bias, directions=NAMES)
    assert y.grad_fn is None
    assert y.is_inference() == flag


FORMS = {
    "function": lambda x, g: spatial_gated_rnn(x, g, torch.full((3, 4, 2), 0.3), directions=NAMES),
    "layer": SpatialGatedRNN(4, directions=NAMES),
    "16 bits": SpatialGatedRNN(4, directions=NAMES, dtype=BF16),
    "frobenius": SpatialGatedRNN(4, directions=NAMES, weight_constraint="frobenius"),
}
DYNAMICS = {"static": dict(dynamic=False), "automatic": {}, "marked": {}, "all": dict(dynamic=True)}
SHAPES = pairwise(
    tuple(DYNAMICS), tuple(GATES), tuple(FORMS), ("contiguous", "channels_last"), (True, False)
)


@pytest.mark.parametrize(("dynamic", "gate", "form", "layout", "training"), sampled(SHAPES, 4))
def test_compiled_form_takes_every_size(dynamic, gate, form, layout, training):
    function = FORMS[form]
    module = compiled(function, **DYNAMICS[dynamic])
    dtype = BF16 if form == "16 bits" else F32
    for n, height, width in ((1, 9, 13), (3, 9, 13), (3, 6, 5)):
        generator = torch.Generator().manual_seed(n)
        x, g = (
            None
            if shape is None
            else laid_out(torch.randn(shape, generator=generator).to(dtype), layout)
            for shape in (
                (n, 4, height, width),
                GATES[gate] and (n, *GATES[gate][1:-2], height, width),
            )
        )
        if dynamic == "marked":
            for t in (x, g):
                if t is not None:
                    torch._dynamo.mark_dynamic(t, (t.dim() - 2, t.dim() - 1))
        x.requires_grad_(training)
        y, expected = module(x, g), function(x, g)
        assert y.stride() == expected.stride()
        torch.testing.assert_close(y, expected, rtol=0, atol=0)
        if training:
            ours, theirs = (
                torch.autograd.grad(t.float().square().sum(), x)[0] for t in (y, expected)
            )
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


class OfChosen(torch.nn.Module):
    """The layer, of as many images as have a score above one half."""

    def __init__(self):
        super().__init__()
        self.layer = SpatialGatedRNN(4)

    def forward(self, images, scores):
        chosen = images[scores > 0.5]
        return self.layer(chosen, chosen)


@pytest.mark.parametrize("layout", sampled(["channels_last", "contiguous", "sliced"], 1))
def test_batch_that_depends_on_data_is_compiled_and_exported(layout):
    model, scores = OfChosen(), torch.tensor([0.9, 0.1, 0.8, 0.7])
    images = laid_out(torch.randn(4, 4, 5, 6), layout)
    expected = model(images, scores)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        results = [compiled(model)(images, scores)]
    results.append(torch.export.export(model, (images, scores)).module()(images, scores))
    for y in results:
        assert y.stride() == expected.stride()
        torch.testing.assert_close(y, expected, rtol=0, atol=0)


def test_compiled_autograd_takes_the_whole_backward_pass():
    layer, x = SpatialGatedRNN(4), torch.randn(SHAPE)

    def gradients():
        layer.zero_grad()
        layer(x, x).square().sum().backward()
        return [p.grad for p in layer.parameters()]

    expected = gradients()
    torch._dynamo.reset()
    with torch._dynamo.compiled_autograd._enable(
        torch.compile(backend="aot_eager", fullgraph=True)
    ):
        torch.testing.assert_close(gradients(), expected)


def test_flops_of_a_scan_are_counted():
    layer, x = SpatialGatedRNN(4, groups=2), torch.randn(SHAPE, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x, x).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    pixels = 2 * 5 * 6 * 4 * 4  # of all directions and channels
    # Forward: two products for w h, one for the gate. Backward: w h again, w^T e, e h^T and three
    # for gates.
    assert counts[torch.ops.gatedrnn.scan] == 2 * pixels * 3
    assert counts[torch.ops.gatedrnn.scan_backward] == 2 * pixels * (2 + 2 + 2 + 3)
