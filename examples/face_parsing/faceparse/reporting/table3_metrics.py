"""Measures the whole chain as Table 3 of the paper does: eleven classes, two stages or one."""

from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from faceparse.data import FINE, DataError
from faceparse.data.labels import CLASSES
from faceparse.inference import face_crops

from .metrics import accuracy, confusion_matrix, f_of, point_errors

OVERALL = ("eyes", "brows", "nose", "upper_lip", "in_mouth", "lower_lip")


def groups_of(names):
    """What has an F of its own, and its classes among ``names``: they count as one."""
    groups = {}
    for name in names:
        for group in CLASSES[name].measured:
            groups.setdefault(group, []).append(name)
    return groups


def table_scores(matrix, names=FINE.names):
    """Accuracy over all classes, and the F-measures of Table 3, as fractions.

    Every F is ``2 TP / (2 TP + FP + FN)``. A group of classes counts as one: a left eye that is
    called a right one is right. Overall adds up TP, FP and FN of the six groups in ``OVERALL``:
    skin and hair stay out, and the mouth counts by its three parts.

    Args:
        matrix: (C, C) of ``confusion_matrix``.
        names: of the classes.
    """
    places = {
        group: [names.index(name) for name in members]
        for group, members in groups_of(names).items()
    }
    counts = {group: _counts(matrix, classes) for group, classes in places.items()}
    f = {name: f_of(*count) for name, count in counts.items()}
    f["overall"] = f_of(*(sum(counts[name][i] for name in OVERALL) for i in range(3)))
    return {"accuracy": accuracy(matrix), "f": f}


def _counts(matrix, classes):
    """TP, FP and FN of some classes as one."""
    hits = matrix[classes][:, classes].sum().item()
    return hits, matrix[:, classes].sum().item() - hits, matrix[classes].sum().item() - hits


def check_points(faces):
    """DataError unless the faces have key points, which Table 3 is measured with."""
    if faces.points is None:
        raise DataError("the two stages need key points, and this data set has none")


class Located(NamedTuple):
    """Where the key points of a split were found."""

    points: np.ndarray  # (N, 5, 2), in pixels of the faces' images
    detected: int  # faces in which the detector found a box

    def errors(self, faces):
        """(N, 5), see ``metrics.point_errors``."""
        return point_errors(torch.from_numpy(self.points), faces.points.double())


def locate(parser, faces, *, progress=True):
    """Key points by detector and network; where there is no box, from where faces usually lie."""
    check_points(faces)
    side = faces.images.shape[-1]
    usual = face_crops.box_about(
        face_crops.complete(np.full((5, 2), np.nan), parser.layout.shape, side)
    )
    points, detected = [], 0
    bar = tqdm(faces.images, "key points", disable=None if progress else True, leave=False)
    for image in bar:
        boxes = parser.detect(image)
        detected += bool(len(boxes))
        points.append(parser.find_points([image], [boxes[0] if len(boxes) else usual])[0])
    return Located(np.stack(points), detected)


def true_points(parser, faces):
    """The points of the faces' labels (N, 5, 2), those not seen where the mean shape has them."""
    check_points(faces)
    side = faces.images.shape[-1]
    return face_crops.complete(faces.points.double().numpy(), parser.layout.shape, side)


def measure(parser, faces, points, *, progress=True):
    """:func:`table_scores` of a parser on faces whose key points are given.

    Args:
        parser: ``FaceParser``.
        faces: ``Faces`` with the parser's labels; pixels are compared at their size.
        points: (N, 5, 2).
    """
    count = len(parser.names)
    matrix = torch.zeros(count, count, dtype=torch.int64)
    rows = zip(faces.images, faces.labels, points, strict=True)
    bar = tqdm(rows, "faces", len(points), disable=None if progress else True, leave=False)
    for image, labels, p in bar:
        parsed = parser(image, points=p).labels
        matrix += confusion_matrix(parsed, labels, count)
    return table_scores(matrix, parser.names)


def summary(parser, faces, *, points="predicted", progress=True):
    """What evaluate.py prints of the chain.

    Args:
        points: "predicted", or "true" for those of the labels.
    """
    result = {
        "parameters": sum(p.numel() for net in parser.networks.values() for p in net.parameters()),
        "points": points,
    }
    if points == "true":
        known = true_points(parser, faces)
    else:
        located = locate(parser, faces, progress=progress)
        known = located.points
        errors = located.errors(faces)
        result |= {"detected": located.detected, "error": {"mean": errors.nanmean().item()}}
    return result | measure(parser, faces, known, progress=progress)
