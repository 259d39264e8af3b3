"""Files that are whole or not there: atomic writing, and the checkpoint's own format."""

import contextlib
import io
import os
import zipfile
from pathlib import Path

import torch
from settings import FIELDS, check

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing is locked
    fcntl = None

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


@contextlib.contextmanager
def claimed(folder):
    """Hold a folder for this process, and make it if need be; an empty one is removed at the end.

    Raises:
        CheckpointError: it is no folder, or another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except (FileExistsError, NotADirectoryError):
        raise CheckpointError(f"--out must be a folder, {folder} is not") from None
    try:
        try:
            if fcntl:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process
        except BlockingIOError:
            raise CheckpointError(f"another process is writing to {folder}") from None
        for path in folder.glob("*.[0-9]*.tmp*"):  # of a process that was killed
            path.unlink(missing_ok=True)
        yield
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):
            folder.rmdir()


def write_atomically(path, data):
    """Write bytes so that ``path`` holds either its old content or all of the new.

    A file beside the target takes the bytes and then the target's name; a crash or a full disk
    leaves the old file as it was.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None
    except BaseException:  # KeyboardInterrupt too
        temporary.unlink(missing_ok=True)
        raise


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
        if not isinstance(state.get(name), kind):
            raise CheckpointError(f"checkpoint {path} has no usable entry '{name}'")
    for name in FIELDS:
        try:
            state["settings"][name] = check(name, state["settings"].get(name))
        except ValueError as error:
            raise CheckpointError(f"checkpoint {path}: {error}") from None
    return state


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
