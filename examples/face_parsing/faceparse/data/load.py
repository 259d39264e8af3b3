"""Decodes a split of a set on disk: read, cut, resize, map the labels; or opens its cache."""

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from faceparse.inference import image_io

from . import cache as caches
from . import files, photo_crops, points
from .faces import DataError, Faces, label_set_for
from .labels import POINTS_MIRROR, mapped

FARTHEST = 0.5  # of landmarks from the labelled parts, in radii of the face


def load(
    source,
    root,
    split,
    *,
    limit=None,
    labels="coarse",
    side=None,
    skip_bad=False,
    progress=True,
    cache=None,
    workers=None,
):
    """One split of a data set; see :func:`data.open_dataset`.

    Args:
        source: a loader module, such as ``lfw_pl``.
    """
    label_set_for(source.NAME, source.TABLE, labels)  # refused before any file is looked for
    if cache is not None and root is not None:
        cache = caches.checked_folder(cache, root)
    records = source.find(root, split)
    published = source.COUNTS[split]
    if published not in (None, len(records)):
        files.note(
            f"{Path(root) / source.LISTS[split]} lists {len(records)} faces, "
            f"the published list {published} ({split})"
        )
    records = records[:limit]
    side = side or source.SIDE
    decoder = Decoder(source, labels, skip_bad, side)
    bar = dict(desc=f"{source.NAME} {split}", total=len(records))
    bar["disable"] = None if progress else True

    def rows():
        return tqdm(decoder.rows(records, workers), **bar)

    if cache is None or not records:
        arrays = _in_memory(rows(), len(records), side)
        return _faces(*arrays, decoder)
    key = caches.Key(source.NAME, split, labels, side, limit, str(Path(root).resolve()))
    rule = (source.CUT, photo_crops.RULE, source.TABLE, decoder.table, Image.__version__)
    rule = repr(rule)
    stored, skipped = caches.open_or_fill(
        cache, key, Path(root), records, rule, rows, decoder, skip_bad=skip_bad
    )
    if stored is None:  # said by open_or_fill
        decoder.skipped.clear()
        return _faces(*_in_memory(rows(), len(records), side), decoder)
    decoder.skipped[:] = skipped
    return _faces(stored["image"], stored["label"], np.array(stored["points"]), decoder)


def _in_memory(rows, count, side):
    """Images (N, 3, S, S), labels (N, S, S) and points (N, 5, 2) of the rows that are good."""
    arrays = (
        np.empty((count, 3, side, side), np.uint8),
        np.empty((count, side, side), np.uint8),
        np.empty((count, 5, 2), np.float32),
    )
    kept = 0
    for row in rows:
        if row is not None:
            for array, value in zip(arrays, row, strict=True):
                array[kept] = value
            kept += 1
    return tuple(array[:kept] for array in arrays)


def _faces(images, labels, key_points, decoder):
    has_points = decoder.source.TABLE.fine is not None
    return Faces(
        images=torch.from_numpy(images),
        labels=torch.from_numpy(labels),
        label_set=decoder.label_set,
        points=torch.from_numpy(key_points) if has_points else None,
        skipped=tuple(decoder.skipped),
    )


class Decoder:
    """Decodes records of one set with one kind of labels, and remembers the bad ones."""

    def __init__(self, source, labels, skip_bad, side):
        self.source, self.skip_bad, self.side = source, skip_bad, side
        self.label_set, self.table = label_set_for(source.NAME, source.TABLE, labels)
        self.skipped = []
        self.trouble = False  # a file could not be read for a reason that may pass

    def rows(self, records, workers=None):
        """Yields (image (3, S, S), labels (S, S), points (5, 2)), or None for a face left out.

        Raises:
            DataError: the first bad face in the records' order, unless ``skip_bad``.
        """
        # Threads suffice: Pillow releases the interpreter lock. The window bounds what waits in
        # memory when the reader is slower than the decoders.
        workers = workers or max(2, min(16, os.cpu_count() or 1))
        pool = ThreadPoolExecutor(workers)
        waiting, rest = deque(), iter(records)
        try:
            for record in rest:
                waiting.append(pool.submit(self._try, record))
                if len(waiting) >= 8 * workers:
                    yield self._keep(waiting.popleft().result())
            while waiting:
                yield self._keep(waiting.popleft().result())
        finally:
            pool.shutdown(cancel_futures=True)

    def _try(self, record):
        try:
            return self.decode(record)
        except DataError as error:
            return error

    def _keep(self, result):
        if not isinstance(result, DataError):
            return result
        if not self.skip_bad:
            raise result
        self.skipped.append(str(result))
        cause = result.__cause__
        if isinstance(cause, OSError) and cause.errno and not isinstance(cause, FileNotFoundError):
            self.trouble = True
        return None

    def decode(self, record):
        """One face: image (3, S, S) uint8, labels (S, S) uint8, points (5, 2) float32."""
        source, name = self.source, self.source.NAME
        with files.open_image(name, record.image, record.origin) as image:
            labels, key_points = source.read(record)
            source.sizes_fit(name, record, image_io.upright_size(image), labels.shape[::-1])
            if source.TABLE.fine is not None:
                found = points.from_labels(mapped(labels, source.TABLE.fine))
                if key_points is not None:
                    _check_fit(name, record, key_points, found)
                elif points.exchanged(found):
                    key_points = found[list(POINTS_MIRROR)]
                    labels = mapped(labels, source.TABLE.mirror)
                else:
                    key_points = found
            try:
                place = photo_crops.PLACES[source.CUT](labels, source.TABLE, self.side)
            except ValueError as error:
                raise DataError(f"{name}: {record.labels[0]} {error}") from None
            try:
                pixels = photo_crops.image_at(image, labels.shape[::-1], place, self.side)
            except Exception as error:
                raise files.unreadable(name, record.image, record.origin, error) from error
        labels = photo_crops.labels_at(labels, place, self.side)
        if key_points is None:
            key_points = np.full((5, 2), np.nan, np.float32)
        return (
            pixels.transpose(2, 0, 1),
            mapped(labels, self.table),
            ((key_points - place[:2]) * place.scale).astype(np.float32),
        )


def _check_fit(name, record, key_points, found):
    """Refuse landmarks that are not at the labelled parts, as those of another photograph are."""
    off = points.distance(key_points, found)
    if off > FARTHEST:
        raise DataError(
            f"{name}: {record.landmarks} must have landmarks within {FARTHEST} of the face's "
            f"radius from the parts in {record.labels[0]}, got {off:.2f}"
        )
