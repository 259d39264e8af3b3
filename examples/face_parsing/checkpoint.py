"""Files that are whole or not there: atomic writing, and the checkpoint's own format."""

import contextlib
import errno
import io
import itertools
import os
import time
import zipfile
from pathlib import Path

import torch
from datasets.files import note
from settings import FIELDS, check

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing is locked
    fcntl = None

TEMPORARY = ".gatedrnn-tmp"  # in the names of files that are not whole yet
PATIENCE = 3.0  # seconds that a process which was told to stop has to let go of its folder
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF, errno.ENOSYS)
_numbers = itertools.count()
KIND = "gatedrnn face parser, version 3"
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
    """Hold a folder for this process, and make it if need be; an empty one is removed at the end.

    Raises:
        CheckpointError: it is no folder, or another process holds it.
    """
    handle = _hold(folder)
    _held.add(handle)
    try:
        for path in folder.glob(f".*{TEMPORARY}*"):  # of a process that was killed
            with contextlib.suppress(OSError):
                path.unlink()
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # while it is still held, so that nobody works in it
        _held.discard(handle)
        os.close(handle)


def _hold(folder):
    """The descriptor of a folder, made if need be, with a lock that is gone with the process."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder, os.O_RDONLY)
        except (FileExistsError, NotADirectoryError):
            raise CheckpointError(f"--out must be a folder, {folder} is not") from None
        try:
            if fcntl:
                _lock(handle, folder)
            if os.path.samestat(os.fstat(handle), os.stat(folder)):
                return handle
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

    A file beside the target takes the bytes and then the target's name; a crash or a full disk
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
    buffer = io.BytesIO()
    torch.save({"kind": KIND, **state}, buffer)
    write_atomically(path, buffer.getvalue())


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
        negative = kind is int and isinstance(value, int) and value < 0
        if not isinstance(value, kind) or negative:
            raise CheckpointError(f"checkpoint {path} has no usable entry '{name}'")
    if not all(isinstance(name, str) for name in state["classes"]):
        raise CheckpointError(f"checkpoint {path} has no usable entry 'classes'")
    if not finite(state["average"]):
        raise CheckpointError(f"checkpoint {path} holds weights that are not finite")
    unknown = state["settings"].keys() - FIELDS.keys()
    if unknown:
        raise CheckpointError(f"checkpoint {path}: unknown setting {min(map(str, unknown))!r}")
    for name in FIELDS:
        try:
            state["settings"][name] = check(name, state["settings"].get(name))
        except ValueError as error:
            raise CheckpointError(f"checkpoint {path}: {error}") from None
    return state


def finite(weights):
    """Whether no tensor of a ``state_dict`` has NaN or infinity in it."""
    tensors = [value for value in weights.values() if isinstance(value, torch.Tensor)]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def read(path, kind):
    """What ``torch.save`` wrote of a dict with ``"kind": kind``, onto the CPU, without that entry.

    Raises:
        CheckpointError: damaged, or of another kind.
    """
    try:
        # torch.load does not look at the checksums that torch.save wrote; zipfile does.
        with zipfile.ZipFile(path) as archive:
            whole = archive.testzip() is None
        state = torch.load(path, map_location="cpu", weights_only=True) if whole else None
    except Exception:  # a damaged file can make either reader raise nearly anything
        whole = False
    if not whole:
        raise CheckpointError(f"{path} is damaged, or not a checkpoint of this program")
    if not isinstance(state, dict) or state.pop("kind", None) != kind:
        raise CheckpointError(f"{path} is not a checkpoint of this program")
    return state
