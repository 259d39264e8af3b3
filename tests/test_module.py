"""The layer: clamping on every call, its growth bound, and how it is stored, copied and cast."""

import copy
import pickle
import threading

import pytest
import torch
from comparison import BF16, DTYPES, F16, F32, F64, assert_close, through, within_norm
from hypothesis import given
from hypothesis import strategies as st
from tiers import pairwise
from torch.nn.utils import parametrize, prune

from gatedrnn import DIRECTIONS, SpatialGatedRNN, fold_weight_constraint, functional
from gatedrnn._options import GATE_ACTIVATIONS
from gatedrnn.reference import spatial_gated_rnn as reference


def layer_with(weight, bias=None, **options):
    """A layer whose parameters are given; its weight is clamped by the layer alone."""
    layer = SpatialGatedRNN(
        weight.shape[1], groups=weight.shape[1] // weight.shape[2], bias=bias is not None, **options
    )
    layer.raw_weight.data.copy_(weight)
    if bias is not None:
        layer.bias.data.copy_(bias)
    return layer


def clamped(weight, norm):
    """The weight that the layer promises, by a route of its own."""
    if norm == "spectral":
        return within_norm(weight)
    if norm is None:
        return weight.double()
    d, c, k = weight.shape
    blocks = weight.double().reshape(-1, k * k)
    return (blocks / blocks.norm(dim=1, keepdim=True).clamp(min=1)).reshape(d, c, k)


@pytest.mark.parametrize("weight_constraint", ["spectral", "frobenius", None])
@pytest.mark.parametrize("gate_activation", GATE_ACTIVATIONS)
@pytest.mark.parametrize("merge", ["max", None])
def test_layer_is_the_reference_of_its_clamped_weight(weight_constraint, gate_activation, merge):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 6, 3, dtype=F64, generator=generator)
    bias = torch.randn(3, 6, dtype=F64, generator=generator)
    x, g = (2 * torch.randn(2, 6, 5, 4, dtype=F64, generator=generator) for _ in range(2))
    options = dict(
        directions=[DIRECTIONS[3], DIRECTIONS[0], DIRECTIONS[1]],
        merge=merge,
        nonlinearity="tanh",
        gate_activation=gate_activation,
    )
    layer = layer_with(weight, bias, weight_constraint=weight_constraint, dtype=F64, **options)
    expected = reference(x, g, clamped(weight, weight_constraint), bias, **options)
    assert_close(through(layer, x, g).detach(), expected)
    torch.testing.assert_close(layer.weight.detach(), clamped(weight, weight_constraint))


def test_layer_without_gate_is_the_conventional_recurrence():
    layer = SpatialGatedRNN(3, dtype=F64)
    x = torch.randn(1, 3, 6, 7, dtype=F64, generator=torch.Generator().manual_seed(0))
    expected = reference(x, None, layer.weight.detach(), layer.bias.detach())
    assert_close(through(layer, x).detach(), expected)


def test_write_through_data_takes_effect_at_once():
    layer = SpatialGatedRNN(2)
    assert (layer.weight.detach() != 0).any()
    layer.raw_weight.data.copy_(100 * torch.eye(2).expand(4, 2, 2))
    assert torch.equal(layer.weight.detach(), torch.eye(2).expand(4, 2, 2))
    layer.raw_weight.data.zero_()
    assert not layer.weight.any()


def test_gradient_reaches_the_stored_parameter_through_the_clamp():
    weight = torch.eye(2, dtype=F64)[None] * torch.tensor([[[3.0], [0.5]]], dtype=F64)
    layer = layer_with(weight, directions=["left_to_right"], dtype=F64)
    x = torch.randn(1, 2, 1, 5, dtype=F64, generator=torch.Generator().manual_seed(0))
    through(layer, x).sum().backward()
    other = weight.clone().requires_grad_()
    sigma = torch.linalg.svdvals(other)[:, :1, None].clamp(min=1)
    reference(x, None, other / sigma, None, directions=["left_to_right"]).sum().backward()
    torch.testing.assert_close(layer.raw_weight.grad, other.grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_projection_stores_the_clamped_weight(dtype):
    layer = SpatialGatedRNN(4, dtype=dtype)
    layer.raw_weight.data.mul_(50)
    parameter = layer.raw_weight
    before = layer.weight.detach().clone()
    assert layer.project_() is layer
    assert layer.raw_weight is parameter
    assert parameter.requires_grad
    # Singular values have an error of some roundings, in float64 only to be seen.
    rounding = 8 * torch.finfo(dtype).eps if dtype == F64 else torch.finfo(dtype).eps
    torch.testing.assert_close(parameter.to(before.dtype), before, rtol=rounding, atol=0)
    torch.testing.assert_close(layer.weight, before, rtol=2 * rounding, atol=0)
    once = layer.raw_weight.detach().clone()
    layer.project_()
    torch.testing.assert_close(layer.raw_weight.detach(), once, rtol=rounding, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_of_any_dtype_scans_with_a_weight_in_the_state_type(dtype):
    layer = SpatialGatedRNN(3, dtype=dtype)
    state = F64 if dtype == F64 else F32
    assert layer.raw_weight.dtype == layer.bias.dtype == dtype
    assert layer.weight.dtype == state
    x = torch.randn(1, 3, 4, 5).to(dtype)
    y = through(layer, x, x)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert {p.grad.dtype for p in layer.parameters()} == {dtype}
    exact = [t.detach().double() for t in (x, x, layer.weight, layer.bias)]
    assert_close(y.detach(), reference(*exact, gate_activation="clamp"))


def test_cast_layer_is_a_layer_of_that_dtype():
    layer = SpatialGatedRNN(3).to(BF16)
    assert layer(torch.zeros(1, 3, 2, 2, dtype=BF16)).dtype == BF16
    assert layer.to(F16)(torch.zeros(1, 3, 2, 2, dtype=F16)).dtype == F16
    assert layer.double()(torch.zeros(1, 3, 2, 2, dtype=F64)).dtype == F64


@pytest.mark.parametrize("channels_last", [False, True])
def test_layer_keeps_the_memory_format(channels_last):
    layer = SpatialGatedRNN(3)
    x = torch.randn(2, 3, 4, 5)
    y = through(layer, x, x.sigmoid())
    if channels_last:
        moved = through(
            layer.to(memory_format=torch.channels_last),
            x.contiguous(memory_format=torch.channels_last),
            x.sigmoid(),
        )
        assert moved.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(moved, y)
    else:
        assert y.is_contiguous()


def test_new_layer_passes_a_state_on():
    torch.manual_seed(0)
    layer = SpatialGatedRNN(8, groups=2)
    assert layer.raw_weight.shape == (4, 8, 4)
    assert not layer.bias.any()
    near = layer.raw_weight.detach().reshape(8, 4, 4) - 0.9 * torch.eye(4)
    assert near.abs().max() < 0.1
    assert SpatialGatedRNN(2, bias=False).bias is None


def test_shapes_follow_channels_groups_and_directions():
    layer = SpatialGatedRNN(6, groups=3, directions=DIRECTIONS[1:])
    assert layer.weight.shape == (3, 6, 2)
    assert layer.bias.shape == (3, 6)
    diagonal = SpatialGatedRNN(6, groups=6)
    assert diagonal.weight.shape == (4, 6, 1)
    assert diagonal(torch.zeros(1, 6, 2, 3)).shape == (1, 6, 2, 3)
    assert SpatialGatedRNN(6, merge=None)(torch.zeros(2, 6, 2, 3)).shape == (2, 4, 6, 2, 3)


def test_text_of_a_layer_names_its_options():
    text = repr(SpatialGatedRNN(6, groups=2, merge="sum", bias=False))
    for part in ("6, groups=2", "merge='sum'", "weight_constraint='spectral'", "bias=False"):
        assert part in text


def trained(layer):
    """The layer after an optimizer step, so that no parameter is at its first value."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = torch.randn(1, layer.channels, 5, 6, generator=torch.Generator().manual_seed(2))
    through(layer, x, x).pow(2).mean().backward()
    optimizer.step()
    return layer, x


@pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy", "file"])
def test_layer_survives_a_round_trip(way, tmp_path):
    options = dict(groups=2, directions=DIRECTIONS[:3], nonlinearity="relu", merge="mean")
    layer, x = trained(SpatialGatedRNN(4, **options))
    if way == "state_dict":
        assert list(layer.state_dict()) == ["raw_weight", "bias"]
        other = SpatialGatedRNN(4, **options)
        assert other.load_state_dict(layer.state_dict()).missing_keys == []
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    elif way == "deepcopy":
        other = copy.deepcopy(layer)
    else:
        torch.save(layer.state_dict(), tmp_path / "layer.pt")
        other = SpatialGatedRNN(4, **options)
        other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    assert repr(other) == repr(layer)
    assert torch.equal(other(x, x), layer(x, x))
    other.raw_weight.data.zero_()
    assert layer.raw_weight.any()


class Halved(SpatialGatedRNN):
    """A subclass with a weight of its own."""

    @property
    def weight(self):
        return super().weight / 2


def test_scan_uses_the_weight_that_a_subclass_computes():
    layer, x = Halved(2, dtype=F64), torch.randn(1, 2, 3, 4, dtype=F64)
    expected = reference(x, None, within_norm(layer.raw_weight.detach()) / 2)
    torch.testing.assert_close(layer(x).detach(), expected)


def test_layer_on_the_meta_device_is_made_real_by_to_empty():
    layer = SpatialGatedRNN(4, device="meta")
    assert layer(torch.zeros(2, 4, 3, 5, device="meta")).shape == (2, 4, 3, 5)
    layer.to_empty(device="cpu").reset_parameters()
    assert layer(torch.zeros(2, 4, 3, 5)).isfinite().all()


@pytest.mark.parametrize("weight_constraint", ["spectral", "frobenius", None])
@pytest.mark.parametrize("dtype", DTYPES)
def test_folded_copy_has_nothing_to_clamp_and_the_same_maps(dtype, weight_constraint):
    layer, x = trained(SpatialGatedRNN(4, groups=2, weight_constraint=weight_constraint))
    network = torch.nn.Sequential(layer, torch.nn.ReLU(), layer).to(dtype)
    x = x.to(dtype)
    before = layer.raw_weight.detach().clone()
    folded = fold_weight_constraint(network)
    assert folded[0].weight_constraint is None
    assert folded[0].weight is folded[0].raw_weight
    assert folded[0] is folded[2]
    with torch.no_grad():
        assert torch.equal(folded(x), network(x))
        folded[0].raw_weight.zero_()
    assert layer.weight_constraint == weight_constraint
    assert torch.equal(layer.raw_weight, before)


PLAIN = pairwise(
    ("max", "mean", None, "cascade"),
    ("spectral", "frobenius", None),
    (1, 2, 4),
    (F64, F32, BF16),
    (None, "channel", "pixel", "each"),
)


@pytest.mark.parametrize(("merge", "weight_constraint", "groups", "dtype", "gate"), PLAIN)
def test_short_way_of_a_plain_call_gives_the_bits_of_the_long_one(
    merge, weight_constraint, groups, dtype, gate, monkeypatch
):
    options = dict(integration="cascade") if merge == "cascade" else dict(merge=merge)
    layer = SpatialGatedRNN(
        4, groups=groups, weight_constraint=weight_constraint, dtype=dtype, **options
    )
    layer.raw_weight.data.mul_(1.5)
    layer.bias.data.normal_()
    x = torch.randn(2, 4, 5, 6, dtype=dtype)
    g = torch.randn(2, *{"pixel": (1,), "each": (4, 4)}.get(gate, (4,)), 5, 6, dtype=dtype)
    g = None if gate is None else g

    def run():
        leaves = [t.clone().requires_grad_() for t in (x, g) if t is not None]
        y = layer(*leaves)
        with torch.no_grad():
            assert torch.equal(layer(*leaves), y)
        return y, *torch.autograd.grad(y.float().square().sum(), [*leaves, *layer.parameters()])

    plain = run()
    monkeypatch.setattr(functional, "runs_natively", lambda x: False)
    assert all(map(torch.equal, plain, run()))


def test_training_step_of_a_layer_is_one_node_of_the_graph():
    layer, x = SpatialGatedRNN(4), torch.zeros(1, 4, 2, 3, requires_grad=True)
    leaves = [node for node, _ in layer(x, x).grad_fn.next_functions if node is not None]
    assert {type(node).__name__ for node in leaves} == {"AccumulateGrad"}


def written(layer, way, values):
    """The layer, or a copy of it, whose stored weight is `values` now."""
    match way:
        case "data":
            layer.raw_weight.data.copy_(values)
        case "alias":
            layer.raw_weight.detach().numpy()[:] = values.numpy()
        case "no_grad":
            with torch.no_grad():
                layer.raw_weight.copy_(values)
        case "parameter":
            layer.raw_weight = torch.nn.Parameter(values.clone())
        case "state_dict" | "assign":
            state = layer.state_dict() | {"raw_weight": values.clone()}
            layer.load_state_dict(state, assign=way == "assign")
        case "optimizer":
            layer.raw_weight.grad = (layer.raw_weight - values).detach()
            torch.optim.SGD([layer.raw_weight], lr=1.0).step()
        case "thread":
            thread = threading.Thread(target=written, args=(layer, "data", values))
            thread.start()
            thread.join()
        case "deepcopy" | "pickle":
            copied = (
                copy.deepcopy(layer) if way == "deepcopy" else pickle.loads(pickle.dumps(layer))
            )
            written(layer, "data", torch.zeros_like(values))
            return written(copied, "data", values)
        case "project":
            written(layer, "data", values).project_()
        case "options":
            layer.directions = list(layer.directions)[::-1]
            layer.merge = "sum" if layer.merge == "max" else "max"
            layer.gate_activation = None if layer.gate_activation else "tanh"
            written(layer, "data", values)
        case "constraint":
            layer.weight_constraint = None if layer.weight_constraint else "spectral"
            written(layer, "data", values)
    return layer


WAYS = (
    "data", "alias", "no_grad", "parameter", "state_dict", "assign", "optimizer", "thread",
    "deepcopy", "pickle", "project", "options", "constraint",
)  # fmt: skip


@given(ways=st.lists(st.sampled_from(WAYS), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_no_call_sees_an_old_weight_or_option(ways, seed):
    generator = torch.Generator().manual_seed(seed)
    x, g = (torch.randn(1, 2, 3, 4, generator=generator) for _ in range(2))
    layer = SpatialGatedRNN(2, directions=DIRECTIONS[:3])
    for way in ways:
        values = torch.randn(3, 2, 2, generator=generator)
        layer = written(layer, way, values)
        expected = reference(
            x, g, clamped(layer.raw_weight.detach(), layer.weight_constraint).float(),
            directions=layer.directions, merge=layer.merge, gate_activation=layer.gate_activation,
        )  # fmt: skip
        if way != "project":
            torch.testing.assert_close(layer.raw_weight.detach(), values)
        torch.testing.assert_close(layer(x, g).detach(), expected, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(layer(x, g), expected, rtol=1e-4, atol=1e-4)


class Symmetric(torch.nn.Module):
    """A parametrization; it has no inverse."""

    def forward(self, weight):
        return weight.triu() + weight.triu(1).mT


def computed(way):
    """A layer whose raw_weight is computed from other parameters, and is in need of a clamp."""
    layer = SpatialGatedRNN(4)
    if way == "pruned":
        prune.random_unstructured(layer, "raw_weight", 0.5)
        prune.random_unstructured(layer, "bias", 0.5)
        layer.raw_weight_orig.data.mul_(3)  # what raw_weight shows of it is old until the next call
    elif way == "weight_constraint":
        torch.nn.utils.weight_norm(layer, "raw_weight")
    else:
        kind = Symmetric() if way == "parametrized" else torch.nn.Identity()
        parametrize.register_parametrization(layer, "raw_weight", kind)
        parametrize.register_parametrization(layer, "bias", torch.nn.Tanh())
        layer.parametrizations.raw_weight.original.data.mul_(3)
    return layer


@pytest.mark.parametrize("way", ["pruned", "parametrized", "identity"])
@pytest.mark.parametrize("called", [False, True])
def test_fold_makes_pruning_and_parametrizations_permanent(way, called):
    layer = computed(way)
    x = torch.randn(1, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    if called:
        layer(x).sum().backward()
    folded = fold_weight_constraint(torch.nn.Sequential(layer))[0]
    assert type(folded) is SpatialGatedRNN
    assert sorted(folded.state_dict()) == ["bias", "raw_weight"]
    with torch.no_grad():
        assert torch.equal(folded(x), layer(x))
    torch.testing.assert_close(
        folded.weight.detach(), within_norm(layer.raw_weight.detach()).float()
    )
    names = ["bias_orig", "raw_weight_orig"] if way == "pruned" else []
    assert sorted(layer._parameters) == names  # the layer itself is as it was


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_fold_refuses_what_it_cannot_make_permanent():
    with pytest.raises(RuntimeError, match=r"remove_weight_norm\(layer, 'raw_weight'\)$"):
        fold_weight_constraint(computed("weight_constraint"))


@pytest.mark.parametrize("way", ["pruned", "weight_constraint", "parametrized", "identity"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_projection_of_a_computed_weight_is_refused(way):
    with pytest.raises(RuntimeError, match=r"as torch\.nn\.utils\.prune\.remove does$"):
        computed(way).project_()


def test_projection_of_a_weight_that_is_a_buffer():
    layer = SpatialGatedRNN(2)
    weight = 3 * layer.raw_weight.detach()
    del layer.raw_weight
    layer.register_buffer("raw_weight", weight.clone())
    torch.testing.assert_close(layer.project_().raw_weight, within_norm(weight).float())
