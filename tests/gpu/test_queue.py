"""How calls are queued: streams, graphs, other devices, no waiting, the same bits on every run."""

import pytest
import torch
from comparison import BF16, DTYPES, F32
from gpu_cases import (
    OPTIONS,
    SHAPES,
    assert_all_close,
    forward_and_backward,
    make_inputs,
    truth,
)

from gatedrnn import SpatialGatedRNN
from gatedrnn.functional import spatial_gated_rnn

# A merge by sum: rounding cannot choose another maximum than the reference's.
SUM = dict(merge="sum")
LONG = 200_000_000  # cycles of a GPU's clock, some tenth of a second


@pytest.fixture
def no_waiting():
    """Fails what makes the host wait for the device, as far as PyTorch knows of it."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_work_goes_to_the_current_stream_and_nobody_waits():
    tensors = make_inputs((2, 8, 40, 33), 8)
    expected = truth(tensors, **SUM)
    forward_and_backward(*tensors, **SUM)  # loads the kernels, which may wait
    late = [torch.full_like(t, float("nan")) for t in tensors]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        # What reads the inputs on another stream, or too early, reads NaN.
        torch.cuda._sleep(LONG)
        for empty, values in zip(late, tensors, strict=True):
            empty.copy_(values)
        results = forward_and_backward(*late, **SUM)
        done = side.record_event()
    assert not done.query(), "a call waited for the device"
    side.synchronize()
    assert_all_close(results, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_op_and_function_do_not_wait(shape, block, dtype, no_waiting):
    torch.cuda.set_sync_debug_mode("default")
    tensors = make_inputs(shape, block, dtype)
    torch.cuda.set_sync_debug_mode("error")
    forward_and_backward(*tensors)
    with torch.no_grad():
        spatial_gated_rnn(*tensors[:4], merge=None)
        spatial_gated_rnn(*tensors[:4], integration="cascade")


@pytest.mark.parametrize("weight_constraint", ["spectral", "frobenius", None])
@pytest.mark.parametrize("groups", [1, 4, 8])
def test_layer_does_not_wait(groups, weight_constraint, no_waiting):
    torch.cuda.set_sync_debug_mode("default")
    layer = SpatialGatedRNN(8, groups=groups, weight_constraint=weight_constraint).cuda()
    x = make_inputs((1, 8, 20, 24), 8)[0]
    torch.cuda.set_sync_debug_mode("error")
    layer(x, x).sum().backward()
    with torch.no_grad():
        layer(x, x)
    layer.project_()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_bits_are_the_same_on_every_run(shape, block, dtype):
    tensors = make_inputs(shape, block, dtype)
    expected = forward_and_backward(*tensors)
    noise, side = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()
    for run in range(10):
        if run >= 5:  # beside other work, which takes some of the multiprocessors
            with torch.cuda.stream(side):
                for _ in range(5):
                    noise @ noise
        assert all(map(torch.equal, forward_and_backward(*tensors), expected))
    torch.cuda.synchronize()


def captured(function):
    """function() as a graph; PyTorch asks for a warm-up on another stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_graph_of_both_passes_replays_with_new_inputs(shape, block, dtype):
    tensors = make_inputs(shape, block, dtype)
    graph, results = captured(lambda: forward_and_backward(*tensors))
    for seed in (1, 2, 3):
        for held, values in zip(tensors, make_inputs(shape, block, dtype, seed), strict=True):
            held.copy_(values)
        graph.replay()
        graph.replay()
        assert all(map(torch.equal, results, forward_and_backward(*tensors)))


def test_graph_of_a_forward_replays_with_new_inputs():
    tensors = make_inputs((1, 8, 64, 64), 8)
    with torch.no_grad():
        graph, y = captured(lambda: spatial_gated_rnn(*tensors[:4], **OPTIONS))
        for seed in (1, 2):
            for held, values in zip(
                tensors, make_inputs((1, 8, 64, 64), 8, seed=seed), strict=True
            ):
                held.copy_(values)
            graph.replay()
            assert torch.equal(y, spatial_gated_rnn(*tensors[:4], **OPTIONS))


def parameter_gradients(layer, call, x, g):
    layer.zero_grad()
    x, g = (t.detach().requires_grad_() for t in (x, g))
    y = call(x, g)
    y.pow(2).sum().backward()
    return [t.clone() for t in (y.detach(), x.grad, g.grad, *(p.grad for p in layer.parameters()))]


def test_graphed_layer_trains_as_the_plain_one():
    layer = SpatialGatedRNN(8).cuda()
    x, g, *_ = make_inputs((2, 8, 20, 24), 8)
    samples = tuple(t.detach().clone().requires_grad_() for t in (x, g))
    graphed = torch.cuda.make_graphed_callables(SpatialGatedRNN(8).cuda(), samples)
    graphed.load_state_dict(layer.state_dict())
    ours = parameter_gradients(graphed, graphed, x, g)
    assert all(map(torch.equal, ours, parameter_gradients(layer, layer, x, g)))


@pytest.mark.parametrize("weight_constraint", ["spectral", None])
def test_layer_compiled_to_graphs_trains_as_the_plain_one(weight_constraint):
    layer = SpatialGatedRNN(8, weight_constraint=weight_constraint).cuda()
    torch._dynamo.reset()
    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    for seed in range(5):  # eager, recorded, then replayed
        x, g, *_ = make_inputs((2, 8, 20, 24), 8, seed=seed)
        torch.compiler.cudagraph_mark_step_begin()
        ours = parameter_gradients(layer, compiled, x, g)
        expected = parameter_gradients(layer, layer, x, g)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("current", [0, 1])
def test_tensors_may_be_on_another_device_than_the_current_one(current):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    expected = truth(make_inputs((2, 8, 40, 33), 8), **SUM)
    with torch.cuda.device(current):
        for device in ("cuda:0", "cuda:1"):
            results = forward_and_backward(*make_inputs((2, 8, 40, 33), 8, device=device), **SUM)
            assert {t.device for t in results} == {torch.device(device)}
            assert_all_close(results, expected)
        assert torch.cuda.current_device() == current
