"""Several processes that train one model, as torchrun starts them; one alone is the usual case."""

import contextlib
import gc
import os
import signal
import traceback

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class StoppedError(Exception):
    """A training that cannot start or go on for want of a process; the message is one line."""


class Processes:
    """This process's place among those that torchrun started; rank 0 of 1 without torchrun."""

    def __init__(self):
        self.world = _number("WORLD_SIZE", 1)
        self.rank, self.local_rank = _number("RANK", 0), _number("LOCAL_RANK", 0)
        if self.world > 1:
            missing = {"RANK", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys()
            if missing:
                raise StoppedError(
                    f"WORLD_SIZE is {self.world} without {', '.join(sorted(missing))}: "
                    "start several processes by torchrun"
                )

    @property
    def first(self):
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def device(self, device):
        """The device of this process, where ``device`` names a kind."""
        if self.world > 1 and device.type == "cuda" and device.index is None:
            return torch.device("cuda", self.local_rank)
        return device

    @contextlib.contextmanager
    def connected(self, device):
        """Connect the processes for the time of a `with` block: gloo on the CPU, NCCL on GPUs.

        The end has an order that cannot hang. DistributedDataParallel also owns the process group.
        If it is the last owner, it waits for the group's threads while it holds Python's lock, and
        these may wait for that lock. So it is freed before the group, which waits without the lock.
        """
        if self.world == 1:
            yield
            return
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if cuda else "gloo")
        try:
            yield
            gc.collect()
            dist.barrier(device_ids=[device.index] if cuda else None)
        except BaseException as error:
            _clear_frames(error)
            gc.collect()
            raise
        finally:
            dist.destroy_process_group()

    def wrap(self, model, device):
        """The model whose backward pass averages the gradients over the processes.

        Statistics of batch normalisation are shared on GPUs; PyTorch cannot on the CPU, where each
        process has those of its own part, and evaluation those of rank 0.
        """
        if self.world == 1:
            return model
        if device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
            return DistributedDataParallel(model, device_ids=[device.index])
        return DistributedDataParallel(model)

    def add_up(self, tensor):
        """The sum of a small tensor over the processes, in all of them."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor


def _clear_frames(error):
    """Free the variables of the functions that an exception and its causes have left."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _number(name, default):
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise StoppedError(f"the environment's {name} must be a number, got {text!r}")
    return int(text)


class StopRequest:
    """Turns the first Ctrl-C (or SIGTERM) into a flag that the training reads between two steps.

    So the state that is saved is the one after a whole step: the next, whose sums tell the other
    processes too. A second one stops at once, and so does the first within :meth:`at_once`.
    """

    def __init__(self):
        self.requested = False
        self._at_once = False

    @contextlib.contextmanager
    def at_once(self):
        """Within this, the first request is a KeyboardInterrupt: for a wait that may not end."""
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def __enter__(self):
        self.before = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            # Ignored on purpose, as in a shell's background job: so it stays.
            if signal.getsignal(number) == signal.SIG_IGN:
                continue
            try:
                self.before[number] = signal.signal(number, self._request)
            except ValueError:  # not the main thread: whoever runs it there handles signals
                break
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _request(self, number, frame):
        self.requested = True
        signal.signal(number, signal.default_int_handler)
        if self._at_once:
            raise KeyboardInterrupt
