"""torch.func and forward-mode AD: values of tangents, batches and higher derivatives."""

import itertools
import threading

import pytest
import torch
from comparison import BF16, F32, F64, spatial_gated_rnn
from test_autograd import GATES, MERGES, function_of, inputs_for, options_of
from tiers import pairwise, sampled
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

from gatedrnn import DIRECTIONS, SpatialGatedRNN, _ops
from gatedrnn.reference import spatial_gated_rnn as reference


def close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def plain(tensors):
    return [None if t is None else t.detach() for t in tensors]


def directional(tensors, options, tangents):
    """The directional derivative of the reference, by two reverse passes: no forward mode here."""
    function, given = function_of(plain(tensors), options, reference)
    given = tuple(t.requires_grad_() for t in given)
    y = function(*given)
    cotangent = torch.zeros_like(y, requires_grad=True)
    grads = torch.autograd.grad(y, given, cotangent, create_graph=True, materialize_grads=True)
    product = sum((t * u).sum() for t, u in zip(grads, tangents, strict=True))
    return torch.autograd.grad(product, cotangent)[0]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("way", ["func", "dual"])
def test_tangent_is_the_directional_derivative(way, merge, gate):
    options = options_of(merge, "tanh", "clamp")
    function, given = function_of(plain(inputs_for(gate)), options)
    generator = torch.Generator().manual_seed(7)
    tangents = tuple(torch.randn(t.shape, generator=generator, dtype=F64) for t in given)
    if way == "func":
        y, tangent = jvp(function, given, tangents)
    else:
        with forward_ad.dual_level():
            y = function(*map(forward_ad.make_dual, given, tangents))
            y, tangent = forward_ad.unpack_dual(y)
    expected, _ = function_of(plain(inputs_for(gate)), options, reference)
    close(y, expected(*given))
    close(tangent, directional(inputs_for(gate), options, tangents))
    assert tangent.abs().max() > 0.1


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("merge", ["max", None])
def test_tangent_of_one_input_alone(which, merge):
    tensors = plain(inputs_for())
    tangents = [torch.zeros_like(t) for t in tensors]
    tangents[which] = torch.randn_like(tensors[which])

    def function(t):
        return spatial_gated_rnn(*tensors[:which], t, *tensors[which + 1 :], **options_of(merge))

    _, tangent = jvp(function, (tensors[which],), (tangents[which],))
    close(tangent, directional(tensors, options_of(merge), tangents))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_tangent_has_the_dtype_of_the_map(dtype):
    x, g, weight, bias = plain(inputs_for())
    args = (x.to(dtype), g.to(dtype), weight.float(), bias.float())
    y, tangent = jvp(lambda *t: spatial_gated_rnn(*t, **options_of("max")), args, args)
    assert y.dtype == tangent.dtype == dtype
    exact = [t.double() for t in args]
    expected = directional(exact, options_of("max"), exact)
    tolerance = 1e-5 if dtype == F32 else torch.finfo(dtype).eps
    torch.testing.assert_close(tangent.double(), expected, rtol=tolerance, atol=tolerance)


def batched(tensor, size, dim):
    """`size` different tensors like `tensor`, stacked along `dim`."""
    return torch.stack([tensor * (1 - 0.25 * i) for i in range(size)], dim)


IN_DIMS = [dims for dims in itertools.product([None, 0], repeat=4) if any(d == 0 for d in dims)]
IN_DIMS += [(1, 1, 1, 1), (2, 3, 1, 2), (-1, -1, -1, -1), (None, 2, 3, None), (4, None, None, 0)]


VMAPS = pairwise(["max", None, "cascade"], ["channel", "pixel", "each", "each_pixel"], IN_DIMS)


@pytest.mark.parametrize(("merge", "gate", "in_dims"), sampled(VMAPS, 20))
def test_vmap_is_a_loop(merge, gate, in_dims):
    size = 3
    tensors = plain(inputs_for(gate))
    stacked = [
        t if dim is None else batched(t, size, dim) for t, dim in zip(tensors, in_dims, strict=True)
    ]
    options = options_of(merge)
    ours = vmap(lambda *t: spatial_gated_rnn(*t, **options), in_dims)(*stacked)

    def sample(i):
        return [
            t if dim is None else t.select(dim, i) for t, dim in zip(stacked, in_dims, strict=True)
        ]

    close(ours, torch.stack([reference(*sample(i), **options) for i in range(size)]))


def test_vmap_without_gate_and_bias_is_a_loop():
    x, _, weight, _ = plain(inputs_for())
    xs = batched(x, 3, 1)
    ours = vmap(lambda t: spatial_gated_rnn(t, None, weight, **options_of("max")), 1, 2)(xs)
    expected = [reference(t, None, weight, **options_of("max")) for t in xs.unbind(1)]
    close(ours, torch.stack(expected, 2))


def test_nested_vmap_is_a_nested_loop():
    x, g, weight, bias = plain(inputs_for())
    xs, gs = batched(x, 2, 0), batched(g, 3, 0)
    options = options_of("mean")
    over_gates = vmap(lambda a, b: spatial_gated_rnn(a, b, weight, bias, **options), (None, 0))
    ours = vmap(over_gates, (0, None))(xs, gs)
    expected = [torch.stack([reference(a, b, weight, bias, **options) for b in gs]) for a in xs]
    close(ours, torch.stack(expected))


SHARED = pairwise(
    [(), (1,), (0,), (2, 3), (1, 2, 3), (0, 1, 3)],
    ["max", None, "cascade"],
    [None, "channel", "pixel", "each_pixel"],
)


@pytest.mark.parametrize(("shared", "merge", "gate"), sampled(SHARED, 8))
def test_gradients_per_sample_are_those_of_a_loop(shared, merge, gate):
    options = options_of(merge, "tanh", "clamp")
    tensors = plain(inputs_for(gate))
    dims = tuple(None if i in shared else 0 for i in range(4) if tensors[i] is not None)
    function, given = function_of(tensors, options)
    expected, _ = function_of(tensors, options, reference)
    stacked = [t if dim is None else batched(t, 3, dim) for t, dim in zip(given, dims, strict=True)]
    if all(dim is None for dim in dims):
        pytest.skip("nothing is mapped without a gate")
    wanted = tuple(range(len(given)))

    def loss(rnn):
        return lambda *t: rnn(*t).pow(2).sum()

    ours = vmap(grad(loss(function), wanted), dims)(*stacked)
    samples = [
        [t if dim is None else t[i] for t, dim in zip(stacked, dims, strict=True)] for i in range(3)
    ]
    loop = [grad(loss(expected), wanted)(*sample) for sample in samples]
    close(ours, tuple(torch.stack(t) for t in zip(*loop, strict=True)))


def test_vmapped_cotangents_are_a_loop():
    function, given = function_of(plain(inputs_for()), options_of("max"))
    y, pull = vjp(function, *given)
    cotangents = torch.randn(5, *y.shape, dtype=F64)
    loop = zip(*(pull(c) for c in cotangents), strict=True)
    close(vmap(pull)(cotangents), tuple(torch.stack(t) for t in loop))


@pytest.mark.parametrize("transform", [jacrev, jacfwd])
@pytest.mark.parametrize("merge", ["max", "sum", None, "cascade"])
def test_jacobian_is_that_of_the_reference(transform, merge):
    tensors = plain(inputs_for(size=(2, 2), n=1))
    function, given = function_of(tensors, options_of(merge, "tanh", "tanh"))
    expected, _ = function_of(tensors, options_of(merge, "tanh", "tanh"), reference)
    wanted = (0, 1, 2, 3)
    close(transform(function, wanted)(*given), jacrev(expected, wanted)(*given))


@pytest.mark.parametrize("merge", ["max", "sum", "cascade"])
@pytest.mark.parametrize(
    "second", [hessian, lambda f, n: jacrev(jacrev(f, n), n), lambda f, n: jacrev(jacfwd(f, n), n)],
    ids=["hessian", "reverse_over_reverse", "reverse_over_forward"],
)  # fmt: skip
def test_hessian_is_that_of_the_reference(second, merge):
    tensors = plain(inputs_for(size=(2, 2), n=1))
    options = options_of(merge, "sigmoid", "tanh")
    function, given = function_of(tensors, options)
    expected, _ = function_of(tensors, options, reference)
    wanted = (0, 1, 2, 3)
    ours = second(lambda *t: function(*t).pow(2).sum(), wanted)(*given)
    theirs = jacrev(jacrev(lambda *t: expected(*t).pow(2).sum(), wanted), wanted)(*given)
    close(ours, theirs)


def test_layer_goes_through_functional_call():
    layer = SpatialGatedRNN(4, dtype=F64)
    x = torch.randn(3, 1, 4, 5, 4, dtype=F64)
    parameters = dict(layer.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x, x)).pow(2).mean()

    ours = vmap(grad(loss), (None, 0))(parameters, x)
    for i in range(3):
        layer.zero_grad()
        layer(x[i], x[i]).pow(2).mean().backward()
        close({k: t[i] for k, t in ours.items()}, {k: p.grad for k, p in parameters.items()})


def test_layer_has_a_tangent_through_its_clamp():
    torch.manual_seed(2)
    layer = SpatialGatedRNN(3, merge="sum", dtype=F64)  # smooth, unlike a maximum
    layer.raw_weight.data.mul_(1.7)
    x = torch.randn(1, 3, 4, 5, dtype=F64)
    value = layer.raw_weight.detach().clone()
    direction = torch.randn(value.shape, dtype=F64)

    def function(weight):
        return torch.func.functional_call(layer, {"raw_weight": weight}, (x, x))

    _, tangent = jvp(function, (value,), (direction,))
    step = 1e-6
    difference = (function(value + step * direction) - function(value - step * direction)).detach()
    torch.testing.assert_close(tangent.detach(), difference / (2 * step), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("half", [BF16, torch.float16])
def test_tangent_under_autocast_has_the_state_s_precision(half):
    # h_i = 400 i, its tangent 400 (1 + ... + (i - 1)): no 16-bit number.
    x = torch.full((1, 2, 1, 300), 400.0)
    g, weight = torch.ones_like(x), torch.eye(2)[None]

    def function(g):
        return spatial_gated_rnn(x, g, weight, directions=["left_to_right"])

    with torch.autocast("cpu", half):
        _, tangent = jvp(function, (g,), (g,))
        assert tangent[0, :, 0, -1].tolist() == [400 * 299 * 300 / 2] * 2
        forward_over_reverse = jvp(grad(lambda g: function(g).sum()), (g,), (g,))[1]
    expected = jvp(grad(lambda g: function(g).sum()), (g,), (g,))[1]
    assert torch.equal(forward_over_reverse, expected)


@pytest.mark.parametrize("way", ["func", "dual"])
def test_backward_pass_with_tangents_under_autocast_has_the_state_s_precision(way):
    # A gradient is linear in its cotangent, so the tangent of one is a gradient again.
    x = torch.full((1, 2, 1, 60), 400.0)
    g, weight = torch.ones_like(x).requires_grad_(), torch.eye(2)[None]
    if way == "func":
        y, pull = vjp(lambda g: spatial_gated_rnn(x, g, weight, directions=DIRECTIONS[:1]), g)
    else:
        y = spatial_gated_rnn(x, g, weight, directions=DIRECTIONS[:1])

        def pull(cotangent):
            return torch.autograd.grad(y, g, cotangent)

    ones = torch.ones_like(y)
    with torch.autocast("cpu", BF16):
        if way == "func":
            _, (tangent,) = jvp(pull, (ones,), (ones,))
        else:
            with forward_ad.dual_level():
                (dg,) = pull(forward_ad.make_dual(ones, ones))
                tangent = forward_ad.unpack_dual(dg).tangent
    # delta_i h_{i-1}, with delta_i = 61 - i and h_{i-1} = 400 (i - 1): mostly no 16-bit numbers.
    i = torch.arange(1, 61)
    assert torch.equal(tangent, (400 * (i - 1) * (61 - i)).float().expand_as(x))


def test_second_gradient_under_autocast_is_that_without():
    layer, x, g = SpatialGatedRNN(8), torch.randn(1, 8, 6, 30), torch.rand(1, 8, 6, 30)

    def second(autocast):
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(layer(leaf, g).square().sum(), leaf, create_graph=True)
        with torch.autocast("cpu", BF16, enabled=autocast):
            return torch.autograd.grad(first.square().sum(), [leaf, *layer.parameters()])

    assert all(map(torch.equal, second(True), second(False)))


def hessian_vector(layer, x):
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad((first * first.detach()).sum(), x, create_graph=True)[0]


SOME = [(needed,) for needed in itertools.product([False, True], repeat=4) if any(needed)]


@pytest.mark.parametrize("needed", sampled(SOME, 6))
@pytest.mark.parametrize("merge", ["max", "sum"])
def test_second_derivative_of_a_layer_for_some_of_its_inputs(merge, needed):
    layer = SpatialGatedRNN(4, merge=merge, dtype=F64)
    x, g, _, bias = plain(inputs_for(directions=4))
    raw = 1.5 * torch.randn(4, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(3))

    def ours(x, g, raw, bias):
        return torch.func.functional_call(layer, {"raw_weight": raw, "bias": bias}, (x, g))

    def theirs(x, g, raw, bias):
        norm = torch.linalg.matrix_norm(raw, 2).clamp(min=1)[:, None, None]
        return reference(x, g, raw / norm, bias, merge=merge, gate_activation="clamp")

    def derivatives(function):
        leaves = [
            t.clone().requires_grad_(need)
            for t, need in zip((x, g, raw, bias), needed, strict=True)
        ]
        wanted = [t for t in leaves if t.requires_grad]
        first = torch.autograd.grad(function(*leaves).pow(3).sum(), wanted, create_graph=True)
        return *first, *torch.autograd.grad(sum(t.square().sum() for t in first), wanted)

    close(derivatives(ours), derivatives(theirs))


def all_gradients(loss, layer, x):
    return torch.autograd.grad(loss, [x, *layer.parameters()])


def test_second_derivative_goes_through_hooks_on_saved_tensors():
    layer, x = SpatialGatedRNN(4), torch.randn(2, 4, 5, 6, requires_grad=True)
    layer.raw_weight.data.mul_(2)
    expected = all_gradients(hessian_vector(layer, x).square().sum(), layer, x)
    with torch.autograd.graph.save_on_cpu():
        ours = all_gradients(hessian_vector(layer, x).square().sum(), layer, x)
    assert all(map(torch.equal, ours, expected))
    inside = checkpoint(lambda x: hessian_vector(layer, x).square().sum(), x, use_reentrant=False)
    assert all(map(torch.equal, all_gradients(inside, layer, x), expected))


def test_vmap_of_an_empty_batch_is_empty():
    layer = SpatialGatedRNN(4)
    raw, xs = layer.raw_weight.detach(), torch.zeros(0, 2, 4, 5, 6)

    def loss(raw, x):
        return torch.func.functional_call(layer, {"raw_weight": raw}, (x, x)).sum()

    assert vmap(layer)(xs).shape == xs.shape
    assert vmap(grad(lambda x: layer(x).sum()))(xs).shape == xs.shape
    assert vmap(grad(loss), (None, 0))(raw, xs).shape == (0, *raw.shape)
    none = raw.new_zeros(0, *raw.shape)
    assert vmap(grad(loss), (0, None))(none, xs.new_zeros(2, 4, 5, 6)).shape == none.shape
    shared = grad(lambda raw: vmap(loss, (None, 0))(raw, xs).sum())(raw)
    assert torch.equal(shared, torch.zeros_like(raw))


def test_dual_level_of_another_thread_changes_no_bits(monkeypatch):
    layer, x = SpatialGatedRNN(4), torch.randn(2, 4, 25, 26, requires_grad=True)
    expected = all_gradients(layer(x).square().sum(), layer, x)
    opened, done = threading.Event(), threading.Event()

    def hold():
        with forward_ad.dual_level():
            opened.set()
            done.wait()

    # The kernels alone: a composite of operations would give almost the same numbers, slowly.
    monkeypatch.setattr(_ops, "adjoint", None)
    monkeypatch.setattr(_ops, "by_reference", None)
    thread = threading.Thread(target=hold)
    thread.start()
    try:
        opened.wait()
        ours = all_gradients(layer(x).square().sum(), layer, x)
    finally:
        done.set()
        thread.join()
    assert all(map(torch.equal, ours, expected))


def test_losers_of_a_maximum_have_no_gradient_of_second_order_either():
    # As in the kernel: what does not attain the maximum gets 0, of an infinite gradient too.
    x, gates = torch.ones(1, 1, 1, 1), torch.tensor([1.0, 2.0]).view(1, 2, 1, 1, 1)
    inputs = (x, gates, torch.zeros(2, 1, 1), torch.ones(2, 1))
    options = _ops.Options((0, 1), "max")
    mask = torch.full((1, 1, 1, 1), 2, dtype=torch.uint8)
    _, dg, *_ = _ops.adjoint(torch.full_like(x, float("inf")), *inputs, mask, options)
    assert dg.flatten().tolist() == [0, float("inf")]


@pytest.mark.parametrize("which", [0, 2, 3])
def test_vmap_of_a_single_channel_is_a_loop(which):
    tensors = [torch.randn(1, 1, 3, 4), None, torch.randn(4, 1, 1), torch.randn(4, 1)]
    dims = tuple(0 if i == which else None for i in range(4))
    stacked = [batched(t, 3, 0) if i == which else t for i, t in enumerate(tensors)]

    def loss(rnn):
        return grad(lambda *t: rnn(*t).square().sum(), which)

    def sample(i):
        return [t[i] if j == which else t for j, t in enumerate(stacked)]

    for ours, theirs in (
        (spatial_gated_rnn, reference),
        (loss(spatial_gated_rnn), loss(reference)),
    ):
        expected = torch.stack([theirs(*sample(i)) for i in range(3)])
        torch.testing.assert_close(vmap(ours, dims)(*stacked), expected)


@pytest.mark.parametrize("merge", MERGES)
def test_second_derivative_through_a_frozen_linear_scan(merge):
    # dx depends on grad and on the weight alone, and neither requires a gradient.
    weight = torch.randn(3, 2, 2, dtype=F64) / 2
    leaf = torch.randn(1, 2, 3, 3, dtype=F64).requires_grad_()

    def second(rnn):
        y = rnn(leaf**2, None, weight, **options_of(merge))
        (first,) = torch.autograd.grad(y.sum(), leaf, create_graph=True)
        return torch.autograd.grad((first**2).sum(), leaf)[0]

    close(second(spatial_gated_rnn), second(reference))
