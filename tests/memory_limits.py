"""Runs each call under many limits of memory: `python memory_limits.py LIMITS`.

A limited call must succeed or raise. After that, the same call without a limit must be right. Each
limit has its own process, forked before PyTorch starts a thread. Prints the exit codes of each
call: SUCCEEDED, RAISED, WRONG, or the negative number of a signal.
"""

import collections
import ctypes
import os
import resource
import sys
import threading

import torch

from gatedrnn import SpatialGatedRNN
from gatedrnn.functional import spatial_gated_rnn


def forward(height, width):
    x, weight = torch.ones(1, 8, height, width), torch.eye(8).repeat(4, 1, 1)
    return lambda: [spatial_gated_rnn(x, None, weight)]


def backward(height, width):
    x = torch.ones(1, 96, height, width, requires_grad=True)
    weight = torch.eye(96).repeat(4, 1, 1).requires_grad_()
    grad = torch.ones_like(x)

    def call():
        y = spatial_gated_rnn(x, x, weight, gate_activation="tanh")
        return torch.autograd.grad(y, (x, weight), grad)

    return call


def half_backward(height, width):
    x = torch.ones(2, 8, height, width, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.eye(8).repeat(4, 1, 1).requires_grad_()
    grad = torch.ones_like(x)
    return lambda: torch.autograd.grad(spatial_gated_rnn(x, x, weight), (x, weight), grad)


def project(groups, _):
    layer = SpatialGatedRNN(32 * groups, groups=groups)

    def call():
        layer.raw_weight.data.fill_(1)
        return [layer.project_().raw_weight.detach()]

    return call


def project_backward(groups, _):
    layer = SpatialGatedRNN(32 * groups, groups=groups)
    layer.raw_weight.data.fill_(1)
    grad = torch.ones_like(layer.raw_weight)
    return lambda: torch.autograd.grad(layer.weight, layer.raw_weight, grad)


# Size under test; a small one, which loads modules and starts threads; bytes that are enough.
CASES = {
    forward: ((64, 600), (40, 40), 4 << 20),
    backward: ((33, 20), (33, 2), 10 << 20),
    half_backward: ((64, 150), (40, 40), 8 << 20),
    project: ((32, 0), (2, 0), 1 << 20),
    project_backward: ((32, 0), (2, 0), 2 << 20),
}
SUCCEEDED, RAISED, WRONG = range(3)


def in_thread(call):
    """What the call returns. The thread's scratch memory is freed with the thread."""
    results = []
    thread = threading.Thread(target=lambda: results.extend(call()))
    thread.start()
    thread.join()
    return results


def outcome(call, small, expected, threads, bytes_more):
    """SUCCEEDED, RAISED or WRONG: of a call that may take `bytes_more` than this process has."""
    torch.set_num_threads(threads)
    small()
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + bytes_more, hard))
    try:
        results, result = call(), SUCCEEDED
    except Exception:
        results, result = expected, RAISED
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    right = all(
        torch.equal(ours, theirs)
        for tensors in (results, call())
        for ours, theirs in zip(tensors, expected, strict=True)
    )
    return result if right else WRONG


def main(limits):
    # Larger pieces come from the system, not from freed memory, so that the limit counts.
    mmap_threshold = -3
    ctypes.CDLL(None).mallopt(mmap_threshold, 8192)
    torch.set_num_threads(1)
    failed = False
    for make, (size, small_size, enough) in CASES.items():
        call, small = make(*size), make(*small_size)
        expected = in_thread(call)
        for threads in (1, 2):
            counts = collections.Counter()
            for i in range(limits):
                child = os.fork()
                if child == 0:
                    os._exit(outcome(call, small, expected, threads, enough * i // limits))
                counts[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])] += 1
            print(f"{make.__name__}, {threads} threads: {dict(counts)}", flush=True)
            failed |= set(counts) != {SUCCEEDED, RAISED}
    return failed


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
