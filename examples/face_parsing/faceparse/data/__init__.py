"""The data sets by name; each split becomes a ``Faces`` tuple of tensors."""

import torch

from . import (
    celebamask_hq,
    celebamask_mini,
    helen,
    lapa,
    lfw_pl,
    load,
    multi_face,
    synthetic,
    synthetic_multi,
)
from .cache import default_folder
from .faces import SIDE, DataError, Faces
from .labels import COARSE, EARS, FINE, LABEL_SETS, OWN, LabelSet

__all__ = [
    "COARSE",
    "DATASETS",
    "DRAWN",
    "EARS",
    "FINE",
    "LABELS",
    "LABEL_SETS",
    "SIDE",
    "DataError",
    "Faces",
    "LabelSet",
]
__all__ += ["OWN", "SPLITS", "default_folder", "open_dataset", "open_mixed"]

SPLITS = ("train", "validation", "test")
LABELS = (*LABEL_SETS, OWN)
DRAWN = {"synthetic": synthetic, "synthetic-multi": synthetic_multi}
ON_DISK = (lfw_pl, helen, celebamask_hq, celebamask_mini, lapa, multi_face)
# Each module has SIDE, and COUNTS by split (None where nothing is published).
DATASETS = DRAWN | {module.NAME: module for module in ON_DISK}


def open_dataset(
    name,
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
    """One split of a data set.

    Args:
        name: a key of ``DATASETS``.
        root: the folder that holds the data set; not used by those that are drawn.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        limit: take the first ``limit`` faces of the split only.
        labels: one of ``LABELS``: ``"coarse"`` (background, skin, hair), ``"fine"`` (eleven
            classes), ``"ears"`` (these and both ears) or ``"own"``, the set's own classes.
        side: pixels of the square that a photograph becomes, if not the set's own. Those that are
            drawn have their own size only.
        skip_bad: leave out files that cannot be used, and list them in ``Faces.skipped``.
        progress: show a progress bar on a terminal.
        cache: a folder for decoded faces, such as ``default_folder()``: they are written there
            once, and mapped into memory from then on. None decodes into memory. Not used by
            those that are drawn.
        workers: decoding threads; None for as many as there are processors.

    Returns:
        Faces.

    Raises:
        DataError: a folder or file is missing or damaged (one line, naming it), or the cache
            would lie in the data set's own folder.
        ValueError: unknown name, split or label set.
    """
    for what, value, known in (
        ("data set", name, DATASETS),
        ("split", split, SPLITS),
        ("label set", labels, LABELS),
    ):
        if value not in known:
            raise ValueError(f"{what} must be one of {', '.join(known)}, got {value!r}")
    options = dict(limit=limit, labels=labels, skip_bad=skip_bad, progress=progress)
    if name in DRAWN:
        return DRAWN[name].load(root, split, **options)
    return load.load(
        DATASETS[name], root, split, **options, side=side, cache=cache, workers=workers
    )


def open_mixed(specs, split, **options):
    """The same split of several data sets in one ``Faces``, in memory.

    Args:
        specs: (name, root) pairs.
        split, options: as in :func:`open_dataset`; ``limit`` is for each set.

    Returns:
        Faces. Its points are None if no set has any; a face without points has NaN.

    Raises:
        DataError: as :func:`open_dataset`.
        ValueError: no set, or sets whose faces differ in size or in classes.
    """
    specs = list(specs)
    sides = {name: DATASETS[name].SIDE for name, _ in specs if name in DATASETS}
    if not specs:
        raise ValueError("no data set to mix")
    if len(set(sides.values())) > 1:
        sizes = ", ".join(f"{name} ({side} x {side})" for name, side in sides.items())
        raise ValueError(f"sets of different sizes cannot be mixed: {sizes}")
    parts = [open_dataset(name, root, split, **options) for name, root in specs]
    if len({part.label_set.names for part in parts}) > 1:
        counts = ", ".join(
            f"{name} ({len(part.label_set.names)})"
            for (name, _), part in zip(specs, parts, strict=True)
        )
        raise ValueError(f"sets of different classes cannot be mixed: {counts}")
    points = None
    if any(part.points is not None for part in parts):
        missing = torch.full((1, 5, 2), torch.nan)
        points = torch.cat(
            [
                missing.expand(len(part.images), -1, -1) if part.points is None else part.points
                for part in parts
            ]
        )
    return Faces(
        images=torch.cat([part.images for part in parts]),
        labels=torch.cat([part.labels for part in parts]),
        label_set=parts[0].label_set,
        points=points,
        skipped=tuple(line for part in parts for line in part.skipped),
    )
