"""Files that are whole or not there: atomic writing, and the checkpoint's own format."""

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch

from faceparse.data.files import note
from faceparse.inference.face_crops import Layout

from .config import FIELDS, check

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing is locked
    fcntl = None

TEMPORARY = ".gatedrnn-tmp"  # in the names of files that are not whole yet
PATIENCE = 5.0  # seconds that a process which was told to stop has to let go of its folder
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF, errno.ENOSYS)
_numbers = itertools.count()
KIND = "gatedrnn training, version 4"
LARGEST = 2**53  # of a state's numbers; up to there, a float holds every integer
# name: type of each entry; see train.py for what they hold.
ENTRIES = {
    "settings": dict,
    "classes": list,
    "side": int,
    "layout": dict,
    "faces": int,
    "world": int,
    "epoch": int,
    "batch": int,
    "step": int,
    "seconds": float,
    "sums": dict,
    "seen": int,
    "history": list,
    "best": float,
    "model": dict,
    "average": dict,
    "optimizer": dict,
    "scaler": dict,
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line and names the file."""


_held = set()  # descriptors of the folders that this process holds
if hasattr(os, "register_at_fork"):
    # A worker that outlives a killed process would hold the folder for it.
    os.register_at_fork(after_in_child=lambda: [os.close(_held.pop()) for _ in range(len(_held))])


@contextlib.contextmanager
def claimed(folder):
    """Hold a folder for this process, and make it if need be.

    If it was made here and is empty at the end, it is removed.

    Raises:
        CheckpointError: it is no folder, or another process holds it.
    """
    handle, made = _hold(folder)
    _held.add(handle)
    try:
        for path in folder.glob(f".*{TEMPORARY}*"):  # of a process that was killed
            with contextlib.suppress(OSError):
                path.unlink()
        yield
    finally:
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # while it is still held, so that nobody works in it
        _held.discard(handle)
        os.close(handle)


def _hold(folder):
    """The descriptor of a folder, locked until the process ends; and whether it was made here."""
    until = time.monotonic() + PATIENCE
    made = False
    while True:
        try:
            made = not folder.exists() or made
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder, os.O_RDONLY)
        except (FileExistsError, NotADirectoryError):
            raise CheckpointError(f"--out must be a folder, {folder} is not") from None
        try:
            if fcntl:
                _lock(handle, folder)
            if os.path.samestat(os.fstat(handle), os.stat(folder)):
                return handle, made
        except FileNotFoundError:
            pass  # whoever held it before has removed it
        except BlockingIOError:
            if time.monotonic() > until:
                os.close(handle)
                raise CheckpointError(f"another process is writing to {folder}") from None
            time.sleep(0.1)
        os.close(handle)


def _lock(handle, folder):
    """Lock a folder, or print a note where its file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        note(f"{folder} cannot be locked ({error.strerror}): let only one run write to it")


def temporary_beside(path):
    """Where a file is written before it gets its name: a short name, with the same ending.

    :func:`claimed` removes what a killed process has left.
    """
    return path.with_name(f".{os.getpid()}-{next(_numbers)}{TEMPORARY}{path.suffix}")


def write_atomically(path, data):
    """Write bytes so that ``path`` holds either its old content or all of the new.

    A file next to the target takes the bytes and then the target's name; a crash or a full disk
    leaves the old file as it was.
    """
    path = Path(path)
    temporary = temporary_beside(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:  # after a KeyboardInterrupt too
        with contextlib.suppress(OSError):
            temporary.unlink()


def save(path, state):
    """Write a training state (a dict with ``ENTRIES``) atomically."""
    assert state.keys() == ENTRIES.keys()
    write(path, KIND, state)


def load(path):
    """Read a training state back, onto the CPU.

    Raises:
        CheckpointError: no such file, damaged, or not written by :func:`save`.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    state = read(path, KIND)
    for name, kind in ENTRIES.items():
        value = state.get(name)
        low = 0 if kind is int else -1
        if type(value) is not kind or (kind in (int, float) and not low <= value <= LARGEST):
            raise CheckpointError(f"checkpoint {path} has no usable entry '{name}'")
    unknown = state["settings"].keys() - FIELDS.keys()
    if unknown:
        raise CheckpointError(f"checkpoint {path}: unknown setting {min(unknown)!r}")
    for name in FIELDS:
        try:
            state["settings"][name] = check(name, state["settings"].get(name))
        except ValueError as error:
            raise CheckpointError(f"checkpoint {path}: {error}") from None
    for name, good in _contents(state).items():
        if not good:
            raise CheckpointError(f"checkpoint {path} has no usable entry '{name}'")
    return state


def _contents(state):
    """By entry, whether one of the right type has the right content."""
    begun = {bool(state[name]) for name in ("batch", "seen", "sums")}  # all of an epoch's, or none
    whole = state["settings"]["view"] == "whole"
    return {
        "classes": all(isinstance(name, str) for name in state["classes"]),
        "layout": not state["layout"] if whole else _is_layout(state["layout"]),
        "sums": len(begun) == 1 and _are_numbers(state["sums"]),
        "history": len(state["history"]) == state["epoch"]
        and all(map(_are_numbers, state["history"])),
        "model": all(isinstance(value, torch.Tensor) for value in state["model"].values()),
        "average": all(isinstance(value, torch.Tensor) for value in state["average"].values()),
    }


def _are_numbers(values):
    return isinstance(values, dict) and all(type(value) is float for value in values.values())


def _is_layout(value):
    try:
        Layout.of(value)
    except (KeyError, OverflowError, TypeError, ValueError):
        return False
    return True


# A file is three lines and then numbers: its kind; the SHA-256 of all after that line; the state
# as JSON, with a tensor's type and shape in its place; the tensors' numbers, one after the other.
# No pickle and no archive: nothing in a file can run, unpack to more than it is, or name a tensor
# without its numbers.
TYPES = {"float32": np.dtype("<f4"), "int64": np.dtype("<i8")}


def write(path, kind, state):
    """Write a state atomically, for :func:`read`.

    Args:
        kind: one line that tells what the state is.
        state: a dict of dicts with names as keys, lists, strings, numbers, None and tensors of
            ``TYPES``; every number is finite.
    """
    tensors = []

    def placeholder(tensor):
        name = str(tensor.dtype).removeprefix("torch.")
        tensors.append(tensor.detach().cpu().numpy().astype(TYPES[name]).tobytes())
        return {"tensor": [name, list(tensor.shape)]}

    text = json.dumps(state, default=placeholder, allow_nan=False)
    content = b"".join([text.encode(), b"\n", *tensors])
    digest = hashlib.sha256(content).hexdigest()
    write_atomically(path, f"{kind}\n{digest}\n".encode() + content)


def read(path, kind):
    """The state that :func:`write` wrote, onto the CPU.

    Raises:
        CheckpointError: damaged, of another kind, or with a number that is not finite.
    """
    line = f"{kind}\n".encode()
    with open(path, "rb") as file:
        if file.read(len(line)) != line:
            raise CheckpointError(f"{path} is not a checkpoint of this program, or is damaged")
        digest, _, content = file.read().partition(b"\n")
    if digest != hashlib.sha256(content).hexdigest().encode():
        raise CheckpointError(f"{path} is damaged: its content does not have the digest in line 2")
    try:
        return _decode(content)
    except (KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a checkpoint of this program: {error}") from None


def _decode(content):
    """The state in all that the digest is of."""
    text, _, numbers = content.partition(b"\n")
    start = 0

    def tensor_of(found):
        nonlocal start
        if found.keys() != {"tensor"}:
            return found
        name, shape = found["tensor"]
        if not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError("a tensor's shape is not one")
        count = math.prod(shape)  # of Python's integers: nothing wraps around
        array = np.frombuffer(numbers, TYPES[name], count, start).reshape(shape)
        start += array.nbytes
        if not np.isfinite(array).all():
            raise ValueError("a weight is not finite")
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))

    # Called for an object once it has been read, so for tensors in their order.
    state = json.loads(
        text, object_hook=tensor_of, parse_float=finite_float, parse_constant=finite_float
    )
    if not isinstance(state, dict) or start != len(numbers):
        raise ValueError("its parts do not fit")
    return state


def finite_float(text):
    """A float of its text.

    Raises:
        ValueError: it is NaN or infinite, or no number.
    """
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not finite")
    return value
