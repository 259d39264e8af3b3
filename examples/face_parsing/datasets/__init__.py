"""The data sets by name; each loader returns a ``Faces`` tuple of tensors in memory."""

from . import lfw_pl, synthetic
from .faces import SIDE, DataError, Faces
from .labels import COARSE, FINE, LABEL_SETS, LabelSet

__all__ = ["COARSE", "DATASETS", "FINE", "LABEL_SETS", "SIDE", "DataError", "Faces", "LabelSet"]
__all__ += ["SPLITS", "open_dataset"]

SPLITS = ("train", "validation", "test")
DATASETS = {"synthetic": synthetic.load, "lfw-pl": lfw_pl.load}


def open_dataset(name, root, split, *, limit=None, labels="coarse", skip_bad=False, progress=True):
    """Load one split of a data set into memory.

    Args:
        name: a key of ``DATASETS``.
        root: the folder that holds the data set; not used by ``"synthetic"``.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        limit: take the first ``limit`` faces of the split only.
        labels: ``"coarse"`` (background, skin, hair) or ``"fine"`` (eleven classes).
        skip_bad: leave out files that cannot be used, and list them in ``Faces.skipped``.
        progress: show a progress bar on a terminal.

    Returns:
        Faces.

    Raises:
        DataError: a folder or file is missing or damaged (one line, naming it).
        ValueError: unknown name, split or label set.
    """
    for what, value, known in (
        ("data set", name, DATASETS),
        ("split", split, SPLITS),
        ("label set", labels, LABEL_SETS),
    ):
        if value not in known:
            raise ValueError(f"{what} must be one of {', '.join(known)}, got {value!r}")
    return DATASETS[name](
        root, split, limit=limit, labels=labels, skip_bad=skip_bad, progress=progress
    )
