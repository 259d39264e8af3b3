"""Five key points of a face from a fine label map."""

import numpy as np

from .labels import FINE, POINTS, mapped

PART = {name: FINE.names.index(name) for name in FINE.names}
LIPS = ("upper lip", "inner mouth", "lower lip")
TIP_SHARE = 0.4  # the tip is the middle of this lowest part of the nose
NEEDED = [name in ("left eye", "right eye", "nose", *LIPS) for name in FINE.names]


def from_labels(labels):
    """Eye centres, nose tip and mouth corners.

    An eye's centre is the centroid of its label. Up and across are told by the eyes: the nose tip
    is the middle of the nose's lowest part, the mouth's corners are the ends of lips and interior.

    Args:
        labels: (H, W) uint8, in FINE.

    Returns:
        (5, 2) float32: x, y in the order of ``labels.POINTS``, as in ``Faces.points``; NaN where
        the part is absent.
    """
    places = np.flatnonzero(mapped(labels, NEEDED).view(bool))
    kinds = labels.ravel()[places]
    rows, columns = np.divmod(places, labels.shape[1])
    pixels = np.stack([columns, rows], 1) + 0.5
    points = np.full((len(POINTS), 2), np.nan, np.float32)
    for i, eye in enumerate(("left eye", "right eye")):
        on = kinds == PART[eye]
        if on.any():
            points[i] = pixels[on].mean(0)

    across = points[0] - points[1]  # to the subject's left
    length = np.hypot(*across)
    across = across / length if length > 0 else np.array([1.0, 0.0])
    down = np.array([-across[1], across[0]])
    # Where left and right are mixed up in the labels, down is still away from the eyes.
    middle = points[:2].mean(0)
    if len(pixels) and not np.isnan(middle).any():
        below = pixels[(kinds != PART["left eye"]) & (kinds != PART["right eye"])]
        if len(below) and (below.mean(0) - middle) @ down < 0:
            down = -down
    nose = pixels[kinds == PART["nose"]]
    if len(nose):
        depth = nose @ down
        points[2] = nose[depth >= depth.max() - TIP_SHARE * np.ptp(depth)].mean(0)
    mouth = pixels[np.isin(kinds, [PART[lip] for lip in LIPS])]
    if len(mouth):
        along = mouth @ across
        points[3] = mouth[along > along.max() - 0.5].mean(0)
        points[4] = mouth[along < along.min() + 0.5].mean(0)
    return points


def exchanged(points):
    """Whether left and right are exchanged in a face's points (5, 2), as if seen in a mirror.

    In a tenth of CelebAMask-HQ's faces they are, in all labels alike.
    """
    below = points[2:][~np.isnan(points[2:, 0])]
    if np.isnan(points[:2]).any() or not len(below):
        return False
    across, down = points[0] - points[1], below.mean(0) - points[:2].mean(0)
    return bool(across[0] * down[1] < across[1] * down[0])


def distance(points, others):
    """How far a face's points (5, 2) are from others: the median, in radii of the face.

    The radius is the mean distance of the points from their middle. 0 with fewer than two points
    that both have.
    """
    seen = ~np.isnan(points + others).any(1)
    if seen.sum() < 2:
        return 0.0
    radius = np.hypot(*(points - points.mean(0)).T).mean()
    return float(np.median(np.hypot(*(points - others)[seen].T)) / radius)
