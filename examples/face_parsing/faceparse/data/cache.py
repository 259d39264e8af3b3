"""The cache of decoded faces: one .npy of records, mapped into memory, and a .json next to it.

The .json is written last, so that its presence means a complete .npy. The file's name holds a
fingerprint of all that the content depends on; a file is never changed, only replaced.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import stat
import tempfile
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .faces import DataError
from .files import note

try:
    import fcntl
except ImportError:  # not a POSIX system: leftovers are told by their age alone
    fcntl = None

FORMAT = 1
# A folder that holds the cache's files only. The user's folder may hold other files.
FOLDER = "gatedrnn-faces"
PRIVATE = 0o700  # the mode of the folder: photographs of people are nobody else's business
READ_ONLY = 0o400  # the mode of a whole file
NAME = re.compile(
    r"[a-z-]+-(train|validation|test)-[a-z]+-\d+-(all|\d+)-[0-9a-f]{20}"
    r"\.(npy|json|[0-9a-f]{12}\.tmp)"
)
FRESH = 60  # seconds for which an unlocked temporary is left alone: it may be about to be locked
OLD = 2 * 24 * 3600  # seconds after which one is removed where files cannot be locked
CHUNK = 1 << 24


class Key(NamedTuple):
    """What a cache file is for. Another file of the same key is a stale one."""

    dataset: str
    split: str
    labels: str
    side: int
    limit: int | None
    root: str

    def stem(self):
        count = "all" if self.limit is None else self.limit
        return f"{self.dataset}-{self.split}-{self.labels}-{self.side}-{count}"


def default_folder():
    """$GATEDRNN_CACHE, else gatedrnn in $XDG_CACHE_HOME, else in ~/.cache.

    A user without a home directory gets a folder of their own among the temporary files.
    """
    if os.environ.get("GATEDRNN_CACHE"):
        return Path(os.environ["GATEDRNN_CACHE"])
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "gatedrnn"
    try:
        return Path.home() / ".cache" / "gatedrnn"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"gatedrnn-{os.getuid()}"


def checked_folder(folder, root):
    """The folder for the cache's files, as a Path: ``FOLDER`` in ``folder``. It may not exist yet.

    Raises:
        DataError: it is at or below the data set's root, which is not ours to write to; or another
            user owns it and could plant files in it.
    """
    folder = Path(folder)
    try:
        place, root = folder.expanduser().resolve(), Path(root).resolve()
    except (RuntimeError, OSError) as error:  # no such user, a loop of links
        raise DataError(f"cannot use the cache folder {folder} for {root}: {error}") from None
    if place == root or root in place.parents:
        raise DataError(f"the cache folder {folder} lies in the data set's own folder {root}")
    _check_owner(place, ours=(0,))  # root's is as good: /tmp
    _check_owner(place / FOLDER)
    return place / FOLDER


def _check_owner(folder, ours=()):
    """Refuse a folder of another user; ``ours`` are users who are trusted as well."""
    try:
        status = os.lstat(folder)
    except OSError:  # not there yet, or found unusable later
        return
    if stat.S_ISLNK(status.st_mode):  # somebody else may choose where it leads
        raise DataError(f"the cache folder {folder} must not be a link")
    if hasattr(os, "geteuid") and status.st_uid not in (os.geteuid(), *ours):
        raise DataError(
            f"the cache folder {folder} must be yours, it belongs to user {status.st_uid}: "
            "choose another with --cache DIR, or --no-cache"
        )


def record_type(side):
    """The type of one face in the file."""
    return np.dtype(
        [("image", "u1", (3, side, side)), ("label", "u1", (side, side)), ("points", "<f4", (5, 2))]
    )


def fingerprint(root, records, rule):
    """A digest of the format, the cutting rule and every source file's name, size and time."""
    digest = hashlib.sha256(repr((FORMAT, rule)).encode())
    prefix = len(str(root)) + 1  # Path.relative_to is slow for some hundred thousand files
    for record in records:
        for path in record.files():
            path = str(path)
            try:
                status = os.stat(path)
                facts = (status.st_size, status.st_mtime_ns)
            except OSError:
                facts = None
            digest.update(repr((path[prefix:], facts)).encode())
    return digest.hexdigest()[:20]


def open_or_fill(folder, key, root, records, rule, rows, decoder, *, skip_bad):
    """The faces of a cache file, which is written first where there is none.

    Args:
        folder: from :func:`checked_folder`.
        rows: called without arguments; yields the faces as ``load.Decoder.rows`` does.
        decoder: ``load.Decoder``, for what it skipped.

    Returns:
        A structured array (N,) of ``record_type``, mapped copy-on-write, and the skipped lines;
        None and () where the cache cannot be written, with a note on the error stream.
    """
    with contextlib.suppress(OSError):  # not there yet
        folder.chmod(PRIVATE)
    mark = fingerprint(root, records, rule)
    path = folder / f"{key.stem()}-{mark}.npy"
    found = _open(path, key.side)
    # Without skip_bad, decoding again ends at the bad file, with its error.
    if found is not None and (skip_bad or not found[1]):
        return found
    try:
        folder.parent.mkdir(PRIVATE, parents=True, exist_ok=True)
        folder.mkdir(PRIVATE, exist_ok=True)
        remove_leftovers(folder)
        with _temporary(folder, path.stem) as file:
            kept = _write(file, rows(), len(records), key.side)
            skipped = list(decoder.skipped)
            if decoder.trouble or fingerprint(root, records, rule) != mark:
                note(f"{key.root} changed or failed while it was read; it is not cached")
                return None, ()
            facts = {"count": kept, "crc32": _crc32(file), "skipped": skipped}
            facts |= {"size": os.path.getsize(file.name), "key": key._asdict()}
            # On disk before the .json that vouches for it.
            os.fsync(file.fileno())
            if fcntl:  # a program that cuts a mapped file off ends all that read it, by SIGBUS
                os.fchmod(file.fileno(), READ_ONLY)
            os.replace(file.name, path)
        with _temporary(folder, path.stem) as file:
            file.write(json.dumps(facts, indent=1).encode())
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path.with_suffix(".json"))
    except OSError as error:
        note(f"cannot write the cache in {folder} ({error.strerror or error}); decoding to memory")
        return None, ()
    _remove_stale(folder, key, path)
    found = _open(path, key.side)
    if found is None:
        note(f"the cache in {folder} does not keep what is written; decoding to memory")
    return found or (None, ())


def _open(path, side):
    """The faces and skipped lines of a cache file, or None where there is none that is whole."""
    try:
        facts = json.loads(path.with_suffix(".json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError):
        facts = None
    try:
        with open(path, "rb") as file:  # what is checked is mapped, also if the name is taken over
            whole = os.fstat(file.fileno()).st_size == facts["size"]
            array = _map(file, side) if whole and _crc32(file) == facts["crc32"] else None
        if array is not None and 0 <= facts["count"] <= len(array):
            return array[: facts["count"]], tuple(facts["skipped"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    note(f"the cache file {path} is damaged; it is made anew")
    return None


def _write(file, rows, count, side):
    """Write the good rows; returns their number. The rest of ``count`` rows are zeros.

    Plain writes: on a full disk these fail, where a mapped file would end the process.
    """
    row_type = record_type(side)
    header = {"descr": np.lib.format.dtype_to_descr(row_type), "fortran_order": False}
    np.lib.format.write_array_header_1_0(file, header | {"shape": (count,)})
    start, kept = file.tell(), 0
    for row in rows:
        if row is not None:
            for value, kind in zip(row, ("u1", "u1", "<f4"), strict=True):
                file.write(np.ascontiguousarray(value, kind).data)
            kept += 1
    file.flush()
    file.truncate(start + count * row_type.itemsize)
    return kept


def _map(file, side):
    """The records in an open .npy file, mapped copy-on-write; None if they are of another type."""
    file.seek(0)
    np.lib.format.read_magic(file)
    shape, _, found = np.lib.format.read_array_header_1_0(file)
    if found != record_type(side):
        return None
    return np.memmap(file, found, mode="c", offset=file.tell(), shape=shape)


def _crc32(file):
    value = 0
    file.seek(0)
    while chunk := file.read(CHUNK):
        value = zlib.crc32(chunk, value)
    return value


@contextlib.contextmanager
def _temporary(folder, stem):
    """A new file of this process alone, locked while it is open, and removed if it is still there.

    The lock goes with the process, however that ends.
    """
    path = folder / f"{stem}.{secrets.token_hex(6)}.tmp"
    try:
        with open(path, "x+b") as file:
            if fcntl:
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(file, fcntl.LOCK_EX)
            yield file
    finally:
        path.unlink(missing_ok=True)


def remove_leftovers(folder):
    """Remove what killed writers left: temporaries that no process has locked, lone .npy files."""
    for path in _files_of(folder):
        with contextlib.suppress(OSError):
            age = time.time() - path.stat().st_mtime
            lone = path.suffix == ".npy" and not path.with_suffix(".json").exists()
            if age > FRESH and (lone or (path.suffix == ".tmp" and _abandoned(path, age))):
                path.unlink()


def _files_of(folder):
    """The files in a folder whose names are those that this module makes."""
    return [path for path in folder.iterdir() if NAME.fullmatch(path.name)]


def _abandoned(path, age):
    """Whether the writer of a temporary is gone."""
    if fcntl:
        with open(path, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                return False
            except OSError:
                pass
    return age > OLD


def _remove_stale(folder, key, path):
    """Remove the files of the same key that have another fingerprint."""
    for other in _files_of(folder):
        if other.suffix != ".json" or other.stem == path.stem:
            continue
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if json.loads(other.read_text())["key"] == key._asdict():
                other.unlink()
                other.with_suffix(".npy").unlink(missing_ok=True)
