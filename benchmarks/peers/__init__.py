"""The peers by name, the form that each takes, and the check it must pass before it is timed."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gatedrnn.reference import spatial_gated_rnn as reference


@dataclass
class Runner:
    """One contender with its inputs bound. Calls return when the work is done.

    forward() gives y; backward() the gradients of x, g, weight, bias from a forward done earlier;
    train() is both, (y, gradients). A peer without gradients has None for the last two.
    """

    forward: Callable[[], Any]
    backward: Callable[[], Any] | None = None
    train: Callable[[], Any] | None = None
    to_torch: Callable[[Any], torch.Tensor] = torch.as_tensor


class WrongResult(Exception):
    """A contender that does not compute what the reference computes."""


# name -> (module, loader in it); a loader(shape, inputs) gives a Runner, or a word why not.
_PEERS = {
    "torch loop": ("torch_loop", "load_per_direction"),
    "torch batched": ("torch_loop", "load_batched"),
    "torch compiled": ("torch_loop", "load_compiled"),
    "jax scan": ("jax_scan", "load"),
    "numba": ("numba_scan", "load"),
}


def _loader(module, name):
    def load(shape, inputs):
        try:
            found = importlib.import_module(f".{module}", __name__)
        except ModuleNotFoundError as error:
            return f"not installed ({error.name})"
        return getattr(found, name)(shape, inputs)

    return load


PEERS = {peer: _loader(*where) for peer, where in _PEERS.items()}


def torch_runner(function, inputs):
    """Runner of a differentiable torch function(x, g, weight, bias)."""
    leaves = tuple(t.detach().requires_grad_() for t in inputs.tensors())
    held = []  # the graph that backward() walks again and again

    def forward():
        with torch.no_grad():
            return function(*inputs.tensors())

    def backward():
        if not held:
            held.append(function(*leaves))
        return torch.autograd.grad(held[0], leaves, inputs.grad, retain_graph=True)

    def train():
        y = function(*leaves)
        return y, torch.autograd.grad(y, leaves, inputs.grad)

    return Runner(forward, backward, train)


def expected(inputs, gradients=True):
    """y and, if asked for, the gradients of x, g, weight, bias, by the reference."""
    if not gradients:
        with torch.no_grad():
            return (reference(*inputs.tensors()),)
    leaves = tuple(t.detach().contiguous().requires_grad_() for t in inputs.tensors())
    y = reference(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, inputs.grad)


# Largest relative error in the Euclidean norm. Rounding alone gives 1e-7 (float32) to values. A
# gradient may differ more, without fault, at the few pixels where two directions come so close
# that rounding decides which one is the maximum; a wrong transpose, index or sign is off by 1.
_TOLERANCE = {
    torch.float64: (1e-12, 1e-10),
    torch.float32: (1e-5, 2e-2),
    torch.bfloat16: (2e-2, 1e-1),
    torch.float16: (2e-3, 5e-2),
}


def _far(given, wanted, tolerance):
    """None if `given` equals `wanted`, else what is wrong with it."""
    if given.shape != wanted.shape:
        return f"has shape {tuple(given.shape)}, not {tuple(wanted.shape)}"
    wanted = wanted.double()
    error = (given.double() - wanted).norm() / wanted.norm().clamp(min=1e-30)
    return None if error <= tolerance else f"is off by {error:.1e}, at most {tolerance:.0e} allowed"


def check(name, runner, wanted, dtype):
    """Compare all that `runner` computes with `wanted`, the result of `expected`.

    Raises:
        WrongResult: naming the contender, the tensor and the error.
    """
    for_values, for_gradients = _TOLERANCE[dtype]
    names = ("y", "dx", "dg", "dweight", "dbias")
    calls = {"forward": (runner.forward(),)}
    if runner.train is not None:
        y, gradients = runner.train()
        calls["train"] = (y, *gradients)
        calls["backward"] = (None, *runner.backward())
    for phase, results in calls.items():
        for what, given, truth in zip(names, results, wanted, strict=False):
            if given is None:
                continue
            tolerance = for_values if what == "y" else for_gradients
            fault = _far(runner.to_torch(given), truth, tolerance)
            if fault:
                raise WrongResult(f"{name}, {phase}: {what} {fault}")
