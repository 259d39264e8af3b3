"""What ``inspect`` says of a split: counts, class shares, sizes, problems, and a contact sheet."""

import io

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from faceparse.inference import image_io

from . import points
from .faces import DataError
from .files import open_image
from .labels import mapped

PICTURED = 24
ACROSS = 4  # faces in a row of the sheet
TILE = 160  # pixels
JUDGED = 200  # faces looked at to tell left from right


def describe(source, split, faces, records, *, progress=True):
    """Lines about a split, and lines about what is wrong with it.

    Args:
        source: the data set's module.
        faces: ``data.Faces``, opened with ``skip_bad``.
        records: all of the split as ``source.find`` returns them, or None if it is drawn.
        progress: show a progress bar on a terminal.
    """
    published = source.COUNTS[split]
    listed = len(faces.images) if records is None else len(records)
    if published is None:
        comparison = "no published number"
    else:
        comparison = f"{'drawn by default' if records is None else 'published'} {published}"
    lines = [f"faces: {listed} ({comparison}), {len(faces.images)} opened"]
    if len(faces.images):
        lines += ["pixels of a class: " + _shares(faces)]
    problems = list(faces.skipped)
    if records is not None:
        sizes = list(_sizes(source, records[: len(faces.images) + len(faces.skipped)], progress))
        if sizes:
            lines.append("image sizes: " + _size_range(sizes))
        problems += _repeated(source, split, records)
    lines += _sides(faces)
    return lines, problems


def overlap(name, found):
    """Lines about photographs that two splits share.

    Args:
        found: split to records.
    """
    owner, lines = {}, []
    for split, records in found.items():
        for record in records:
            other = owner.setdefault(record.image, split)
            if other != split:
                lines.append(f"{name}: {record.image} is in two splits, {other} and {split}")
    return lines


def _shares(faces):
    count = torch.zeros(256, dtype=torch.int64)
    for labels in faces.labels.split(500):
        count += torch.bincount(labels.flatten(), minlength=256)
    shares = 100 * count / count.sum()
    names = faces.label_set.names
    return ", ".join(f"{name} {share:.2f} %" for name, share in zip(names, shares, strict=False))


def _sizes(source, records, progress):
    """Width and height of each photograph that can be opened."""
    title = f"{source.NAME} sizes"
    for record in tqdm(records, title, disable=None if progress else True, leave=False):
        try:
            with open_image(source.NAME, record.image, record.origin) as image:
                yield image_io.upright_size(image)
        except DataError:
            continue


def _size_range(sizes):
    sizes = np.array(sizes)
    rows = (("smallest", sizes.min(0)), ("median", np.median(sizes, 0)), ("largest", sizes.max(0)))
    return ", ".join(f"{word} {int(width)} x {int(height)}" for word, (width, height) in rows)


def _repeated(source, split, records):
    seen, lines = set(), []
    for record in records:
        if record.image in seen:
            lines.append(f"{source.NAME}: {record.origin} names {record.image} twice ({split})")
        seen.add(record.image)
    return lines


def _sides(faces):
    """How often the left eye is where it belongs, on the viewer's right."""
    fine = faces.label_set.fine
    if fine is None:
        return []
    judged = [mapped(labels.numpy(), fine) for labels in faces.labels[:JUDGED]]
    found = np.array([points.from_labels(labels) for labels in judged])
    if faces.points is None or not len(found):
        return []
    right = found[:, 0, 0] > found[:, 1, 0]
    both = ~np.isnan(found[:, :2, 0]).any(1)
    return [f"left eye on the viewer's right: {int(right[both].sum())} of {int(both.sum())} faces"]


def contact_sheet(faces):
    """Photographs with their labels laid over, as the bytes of a PNG.

    Args:
        faces: ``data.Faces``; some of them, evenly over the split, are shown.
    """
    count = min(PICTURED, len(faces.images))
    chosen = np.linspace(0, len(faces.images) - 1, count).round().astype(int)
    sheet = Image.new("RGB", (2 * ACROSS * TILE, max(1, -(-count // ACROSS)) * TILE))
    colours = np.array(faces.label_set.colours, np.uint8)
    for place, i in enumerate(chosen.tolist()):
        photo = Image.fromarray(faces.images[i].permute(1, 2, 0).contiguous().numpy())
        painted = Image.fromarray(colours[faces.labels[i].numpy()])
        x, y = 2 * TILE * (place % ACROSS), TILE * (place // ACROSS)
        for shift, picture in ((0, photo), (TILE, Image.blend(photo, painted, 0.55))):
            tile = picture.resize((TILE, TILE), Image.Resampling.BILINEAR)
            sheet.paste(tile, (x + shift, y))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", pnginfo=image_io.mark())
    return buffer.getvalue()
