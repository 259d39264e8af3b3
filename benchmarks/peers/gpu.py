"""Contenders on a GPU: CUDA graphs of a function, and our kernels a direction at a time."""

import functools

import torch

from gatedrnn.functional import spatial_gated_rnn
from gatedrnn.reference import DIRECTIONS

from . import Runner, torch_runner


def one_at_a_time(x, g, weight, bias):
    """Our own kernels, used plainly: four calls, each with one direction, and the maximum."""
    maps = [
        spatial_gated_rnn(x, g, weight[d : d + 1], bias[d : d + 1], directions=[direction])
        for d, direction in enumerate(DIRECTIONS)
    ]
    return functools.reduce(torch.maximum, maps)


def captured(call):
    """call() as a graph; its result is the same memory every time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # PyTorch asks for a warm-up
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # On the stream of the warm-up, where the forward of a held backward has run too.
    with torch.cuda.graph(graph, stream=stream):
        result = call()

    # The graph reads what `call` holds: the saved tensors of a forward before the capture.
    def replay(_held=call):
        graph.replay()
        return result

    return replay


def graph_runner(function, inputs, gradients=True):
    """As `torch_runner`, each phase captured in a CUDA graph."""
    if not gradients:
        return Runner(captured(torch_runner(function, inputs).forward))
    phases = ("forward", "backward", "train")
    return Runner(*(captured(getattr(torch_runner(function, inputs), name)) for name in phases))
