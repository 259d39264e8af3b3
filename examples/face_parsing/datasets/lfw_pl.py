"""LFW-PL: funneled LFW photographs with skin, hair and background labels, in the genuine layout.

root/lfw_funneled/<Name>/<Name>_%04d.jpg                   250 x 250
root/parts_lfw_funneled_gt_images/<Name>_%04d.ppm          colour-coded labels, same size
root/parts_train.txt, parts_validation.txt, parts_test.txt  lines "<Name> <number>"
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from .faces import SIDE, DataError, Faces
from .labels import COARSE, LFW_PL_COLOURS

HOME = "http://vis-www.cs.umass.edu/lfw/part_labels/"
IMAGES, LABELS = "lfw_funneled", "parts_lfw_funneled_gt_images"
LISTS = {
    "train": ("parts_train.txt", 1500),  # file, published count
    "validation": ("parts_validation.txt", 500),
    "test": ("parts_test.txt", 927),
}


def load(root, split, *, limit=None, labels="coarse", skip_bad=False, progress=True):
    """Decode one split of LFW-PL at 128 x 128; see :func:`datasets.open_dataset`."""
    if labels != "coarse":
        raise DataError(f"lfw-pl has coarse labels (background, skin, hair) only, not {labels!r}")
    if root is None:
        raise DataError(
            f"lfw-pl needs --root DIR, the folder that holds {IMAGES}/ and {LABELS}/; "
            f"described at {HOME}"
        )
    root = Path(root)
    list_name, published = LISTS[split]
    for name in (IMAGES, LABELS, list_name):
        if not (root / name).exists():
            raise DataError(f"lfw-pl: no '{name}' in {root} ({_found(root)}); described at {HOME}")

    names = _read_list(root / list_name)
    if len(names) != published:
        print(
            f"note: {root / list_name} lists {len(names)} faces, the published list {published}",
            file=sys.stderr,
        )
    names = names[:limit]

    images = np.empty((len(names), SIDE, SIDE, 3), np.uint8)
    label_maps = np.empty((len(names), SIDE, SIDE), np.uint8)
    skipped = []
    kept = 0
    # Threads suffice: the decoders release the interpreter lock. Results come in list order, so
    # that the error reported is always the first one of the list.
    pool = ThreadPoolExecutor(4)
    try:
        decoded = pool.map(lambda name: _decode(root, *name, list_name), names)
        bar = tqdm(decoded, f"lfw-pl {split}", len(names), disable=None if progress else True)
        for result in bar:
            if isinstance(result, DataError):
                if not skip_bad:
                    raise result
                skipped.append(str(result))
            else:
                images[kept], label_maps[kept] = result
                kept += 1
    finally:
        pool.shutdown(cancel_futures=True)
    return Faces(
        images=torch.from_numpy(images[:kept]).permute(0, 3, 1, 2).contiguous(),
        labels=torch.from_numpy(label_maps[:kept]),
        label_set=COARSE,
        skipped=tuple(skipped),
    )


def _found(root):
    """What lies in ``root``, in words, for an error message."""
    if not root.is_dir():
        return "there is no such folder"
    entries = sorted(p.name + "/" * p.is_dir() for p in root.iterdir())
    if not entries:
        return "the folder is empty"
    return "found " + ", ".join(entries[:8]) + (", ..." if len(entries) > 8 else "")


def _read_list(path):
    """The (name, number) rows of a list file. A name may hold '_', '-' or spaces."""
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"lfw-pl: cannot read {path}: {error}") from None
    for i, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        fields = line.rsplit(maxsplit=1)
        if len(fields) != 2 or not fields[1].isdecimal() or len(fields[1]) > 9:
            raise DataError(f"lfw-pl: {path} line {i}: expected '<Name> <number>', got {line!r}")
        rows.append((fields[0].strip(), int(fields[1])))
    return rows


def _decode(root, name, number, list_name):
    """One face as (image (128, 128, 3), labels (128, 128)), or the DataError that says why not."""
    stem = f"{name}_{number:04d}"
    image_path = root / IMAGES / name / f"{stem}.jpg"
    label_path = root / LABELS / f"{stem}.ppm"
    try:
        image = _open_rgb(image_path, list_name)
        colours = _open_rgb(label_path, list_name)
        if image.size != colours.size:
            raise DataError(
                f"lfw-pl: {label_path} is {colours.width} x {colours.height}, "
                f"its image {image_path} is {image.width} x {image.height}"
            )
        labels = Image.fromarray(_colours_to_labels(np.asarray(colours), label_path))
    except DataError as error:
        return error
    # Bilinear in Pillow averages over the whole source area, so shrinking does not alias.
    return (
        np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)),
        np.asarray(labels.resize((SIDE, SIDE), Image.Resampling.NEAREST)),
    )


def _open_rgb(path, list_name):
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"lfw-pl: {list_name} names a missing file, {path}") from None
    except Exception as error:  # a damaged file can make Pillow raise nearly anything
        words = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"lfw-pl: cannot decode {path}: {words}") from None


def _colours_to_labels(colours, path):
    """Colour-coded labels (H, W, 3) uint8 to indices (H, W) uint8."""
    packed = (colours.astype(np.uint32) << np.array([16, 8, 0], np.uint32)).sum(-1)
    labels = np.full(packed.shape, 255, np.uint8)
    for (red, green, blue), label in LFW_PL_COLOURS.items():
        labels[packed == (red << 16 | green << 8 | blue)] = label
    unknown = labels == 255
    if unknown.any():
        row, column = np.argwhere(unknown)[0]
        colour = tuple(int(v) for v in colours[row, column])
        raise DataError(
            f"lfw-pl: {path} holds the unknown colour {colour} at row {row}, column {column} "
            f"({int(unknown.sum())} such pixels)"
        )
    return labels
