"""The augmented batches of an epoch: the same for any number of workers and of processes."""

import signal
import traceback
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .transforms import draw


class Batch(NamedTuple):
    """One process's part of a batch."""

    images: torch.Tensor  # (n, 3, H, W) float32, channels_last
    labels: torch.Tensor  # (n, H, W) uint8
    points: torch.Tensor | None  # (n, 5, 2) in pixels, NaN where not seen; None in the whole view
    seeds: torch.Tensor  # (n,) int64, one an image, for what the losses draw
    faces: torch.Tensor  # (n,) int64, which faces of the split these are

    def to(self, device):
        """The same with images, labels and points on a device."""
        moved = self._asdict()
        for name in ("images", "labels", "points"):
            if moved[name] is not None:
                moved[name] = moved[name].to(device, non_blocking=True)
        return Batch(**moved)


class Epoch(Dataset):
    """The batches of one epoch, by number.

    Batch i depends on (seed, epoch, i) alone, so that training can go on from any batch. Of its
    ``world * batch_size`` faces, process ``rank`` of ``world`` gets every ``world``-th.
    """

    def __init__(self, faces, view, *, batch_size, seed, epoch, rank=0, world=1):
        self.faces, self.view, self.seed, self.epoch = faces, view, seed, epoch
        self.rank, self.world = rank, world
        order = torch.randperm(len(faces.images), generator=generator(seed, epoch, 0))
        self.chosen = order.split(world * batch_size)
        # A last batch with fewer faces than processes would leave one with nothing to do.
        if len(self.chosen) > 1 and len(self.chosen[-1]) < world:
            self.chosen = self.chosen[:-1]

    def __len__(self):
        return len(self.chosen)

    def __getitem__(self, i):
        chosen = self.chosen[i]
        draws = draw(
            len(chosen),
            self.view.size,
            generator=generator(self.seed, self.epoch, 1 + i),
            strength=self.view.strength,
        )
        rows = slice(self.rank, None, self.world)
        chosen, draws = chosen[rows], draws.part(rows)
        images, labels, points = self.view.batch(self.faces, chosen, draws)
        images = images.contiguous(memory_format=torch.channels_last)  # as network_input
        return Batch(images, labels, points, draws.seeds, chosen)


def generator(*key):
    """A CPU generator that depends on a tuple of integers."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(seed >> 1)  # manual_seed takes a signed number


def shared(batch):
    """A batch in shared memory, moved there by the worker itself.

    PyTorch would do it in a thread of the worker. If memory is short there, the batch is lost, and
    the training waits for it forever. Here, it is an error that reaches the training.
    """
    for tensor in batch:
        if tensor is not None:
            tensor.share_memory_()
    return batch


def batches(epoch, *, start=0, workers=0, pin_memory=False):
    """Yields the batches from number ``start`` on, made by ``workers`` processes."""
    loader = DataLoader(
        epoch,
        batch_size=None,
        sampler=range(start, len(epoch)),
        num_workers=workers,
        collate_fn=shared if workers else None,
        pin_memory=pin_memory,
    )
    # A signal to the whole group stops the training between two steps, and the workers must last
    # till then: they inherit these as blocked, so that there is no moment at which one kills them.
    signals = (signal.SIGINT, signal.SIGTERM)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        iterator = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        yield from iterator
    except BaseException as error:
        # The error's frames hold the iterator, and its end is what stops the workers. Left to
        # Python's exit, they would be waited for without end, as they hear no SIGTERM.
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        del iterator
