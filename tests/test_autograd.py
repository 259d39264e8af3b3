"""Derivatives: numerical checks over the option grid, tangents, function transforms, ties."""

import itertools

import pytest
import torch
from comparison import DEVICE, F64, spatial_gated_rnn, within_norm
from scan_cases import GATE_ACTIVATIONS, NONLINEARITIES
from tiers import pairwise, sampled
from torch.autograd import gradcheck, gradgradcheck

from gatedrnn import DIRECTIONS
from gatedrnn._options import MERGES as ALL_MERGES
from gatedrnn._options import Options, op_arguments
from gatedrnn.reference import spatial_gated_rnn as reference

GATES = {None: None, "channel": (2, 4), "pixel": (2, 1), "each": (2, 3, 4), "each_pixel": (2, 3, 1)}
MERGES = [*ALL_MERGES, "cascade"]


def options_of(merge, nonlinearity="identity", gate_activation=None, directions=DIRECTIONS[1:]):
    options = dict(
        directions=directions, nonlinearity=nonlinearity, gate_activation=gate_activation
    )
    if merge == "cascade":
        return options | dict(integration="cascade")
    return options | dict(merge=merge)


def inputs_for(gate="channel", *, bias=True, block=2, size=(3, 2), seed=0, directions=3, n=2):
    """x, g, weight, bias in float64, all wanting gradients; gates keep away from -1 and 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=F64)

    shape = GATES[gate]
    g = None
    if shape is not None:
        shape = (n, *(directions if s == 3 and len(shape) == 3 else s for s in shape[1:]))
        g = normal(*shape, *size)
        g = torch.where((g.abs() - 1).abs() < 0.05, 0.5, g)
    weight = within_norm(normal(directions, 4, block))
    tensors = (normal(n, 4, *size), g, weight, normal(directions, 4) if bias else None)
    return [None if t is None else t.requires_grad_() for t in tensors]


def function_of(tensors, options, rnn=spatial_gated_rnn):
    """The scan as a function of those tensors that are there, and these tensors."""
    there = [i for i, t in enumerate(tensors) if t is not None]

    def function(*given):
        full = [None] * 4
        for i, t in zip(there, given, strict=True):
            full[i] = t
        return rnn(*full, **options)

    return function, tuple(tensors[i] for i in there)


OPTIONS = ("gate", "merge", "nonlinearity", "gate_activation", "bias")
PAIRS = pairwise(tuple(GATES), MERGES, NONLINEARITIES, GATE_ACTIVATIONS, (True, False))


@pytest.mark.parametrize(OPTIONS, PAIRS)
def test_first_derivatives_are_those_of_finite_differences(
    gate, merge, nonlinearity, gate_activation, bias
):
    function, tensors = function_of(
        inputs_for(gate, bias=bias), options_of(merge, nonlinearity, gate_activation)
    )
    assert gradcheck(function, tensors, fast_mode=True, check_forward_ad=True)


@pytest.mark.parametrize(OPTIONS, sampled(PAIRS, 8))
def test_second_derivatives_are_those_of_finite_differences(
    gate, merge, nonlinearity, gate_activation, bias
):
    function, tensors = function_of(
        inputs_for(gate, bias=bias), options_of(merge, nonlinearity, gate_activation)
    )
    assert gradgradcheck(function, tensors, fast_mode=True, check_fwd_over_rev=True)


@pytest.mark.parametrize(
    ("merge", "nonlinearity", "gate"),
    sampled(
        [
            ("max", "identity", "channel"),
            ("sum", "tanh", "each_pixel"),
            ("cascade", "sigmoid", "pixel"),
        ],
        1,
    ),
)
def test_whole_jacobians_are_those_of_finite_differences(merge, nonlinearity, gate):
    options = options_of(merge, nonlinearity, "tanh", DIRECTIONS[1:3])
    function, tensors = function_of(inputs_for(gate, directions=2, n=1), options)
    assert gradcheck(function, tensors, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, tensors, check_fwd_over_rev=True)


def nested_gradients(rnn, tensors, options, orders):
    """The gradients of orders 1, 2, ... of sum(y^3) along fixed cotangents."""
    leaves = [t.detach().requires_grad_() for t in tensors if t is not None]
    function, _ = function_of(tensors, options, rnn)
    value = function(*leaves).pow(3).sum()
    found = []
    for order in range(orders):
        grads = torch.autograd.grad(value, leaves, create_graph=True, materialize_grads=True)
        found.append([t.detach() for t in grads])
        value = sum((t.pow(2) * (1 + i + order)).sum() for i, t in enumerate(grads))
    return found


@pytest.mark.parametrize("merge", ["max", "sum", None, "cascade"])
@pytest.mark.parametrize("nonlinearity", ["identity", "tanh"])
def test_third_order_is_that_of_the_reference(merge, nonlinearity):
    options = options_of(merge, nonlinearity, "clamp")
    tensors = inputs_for()
    ours = nested_gradients(spatial_gated_rnn, tensors, options, 3)
    expected = nested_gradients(reference, tensors, options, 3)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=4))[1:])
def test_gradient_is_computed_only_where_it_is_asked_for(needed):
    tensors = [
        t.detach().requires_grad_(need) for t, need in zip(inputs_for(), needed, strict=True)
    ]
    spatial_gated_rnn(*tensors, **options_of("max")).pow(2).sum().backward()
    others = [t.detach().requires_grad_() for t in tensors]
    reference(*others, **options_of("max")).pow(2).sum().backward()
    for ours, theirs, need in zip(tensors, others, needed, strict=True):
        assert (ours.grad is not None) == need
        if need:
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_backward_kernel_skips_what_is_not_needed():
    x, g, weight, bias = (t.detach() for t in inputs_for())
    options = op_arguments(Options((1, 2, 3), "max"))
    y, mask = torch.ops.gatedrnn.scan(x, g, weight, bias, *options, True)
    for needs in itertools.product([False, True], repeat=3):
        results = torch.ops.gatedrnn.scan_backward(y, x, g, weight, bias, mask, *options, *needs)
        assert [t.numel() > 0 for t in results[1:]] == list(needs)


def test_double_backward_through_a_tie_is_that_of_the_reference():
    # g = 0 ties all directions; gates beyond it are free of ties. d/dg of the shares is zero.
    def second(rnn):
        x, g, weight, bias = (t.detach() for t in inputs_for(bias=True))
        g = g.clone()
        g[:, :, :2] = 0
        leaves = [t.clone().requires_grad_() for t in (x, g, weight, bias)]
        y = rnn(*leaves, **options_of("max"))
        grads = torch.autograd.grad(y.pow(2).sum(), leaves, create_graph=True)
        value = sum(t.pow(2).sum() for t in grads)
        return grads, torch.autograd.grad(value, leaves)

    ours, expected = second(spatial_gated_rnn), second(reference)
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("gate_activation", [None, "clamp"])
def test_gates_of_exactly_one_have_the_gradient_of_the_reference(gate_activation):
    tensors = inputs_for()
    tensors[1] = tensors[1].detach().sign().requires_grad_()
    function, given = function_of(tensors, options_of("sum", gate_activation=gate_activation))
    expected, _ = function_of(
        tensors, options_of("sum", gate_activation=gate_activation), reference
    )
    ours = torch.autograd.grad(function(*given).sum(), given)
    torch.testing.assert_close(ours, torch.autograd.grad(expected(*given).sum(), given))


def test_backward_twice_through_a_freed_graph_is_refused():
    y = spatial_gated_rnn(*inputs_for(), **options_of("max"))
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_input_changed_in_place_before_backward_is_refused():
    x, g, weight, bias = inputs_for()
    changed = (g * 1).to(DEVICE)
    y = spatial_gated_rnn(x, changed, weight, bias, **options_of("max"))
    changed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
