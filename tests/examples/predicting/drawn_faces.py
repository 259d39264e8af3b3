"""Drawn faces, and networks that see the same in all of them, without any training."""

import functools
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from faceparse.data import FINE, geometry
from faceparse.data.synthetic import draw_face
from faceparse.inference import face_crops
from faceparse.models import Outputs, Points

SKIN, HAIR = FINE.names.index("skin"), FINE.names.index("hair")
FOUND = (7, 9, 16)  # faces that OpenCV's cascade finds when they are twice as large
SHAPE = np.array([[150, 110], [100, 110], [125, 140], [145, 170], [105, 170]], float)
BOXES = {"eye": (-35, -50, 70, 70), "nose": (-35, -50, 70, 70), "mouth": (-60, -30, 120, 60)}
LAYOUT = face_crops.Layout(SHAPE, {name: tuple(map(float, box)) for name, box in BOXES.items()})


class Network(torch.nn.Module):
    """A function instead of a trained network."""

    def __init__(self, function):
        super().__init__()
        self.function, self.where = function, torch.nn.Parameter(torch.zeros(1))

    def forward(self, images):
        return self.function(images)


def skin_over_hair(images):
    """The left half of what the first stage sees is skin, the right half hair."""
    logits = torch.zeros(len(images), 3, *images.shape[2:])
    logits[:, 1, :, :64] = logits[:, 2, :, 64:] = 9
    return Outputs(logits)


def usual_points(images):
    """The mean shape, where it lies in a box that fits it."""
    seen = (
        geometry.apply(face_crops.box_of(face_crops.box_about(SHAPE)), SHAPE) / face_crops.BOX_SIZE
    )
    return Points(torch.from_numpy(seen).float().expand(len(images), 5, 2))


@functools.cache
def drawn(index, side=256):
    """A face (side, side, 3) uint8 and its points (5, 2)."""
    image, _, points = draw_face((0, 2), index)
    return cv2.resize(image, (side, side)), points * (side / image.shape[0])


def write_face(path, index=FOUND[0], **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(drawn(index)[0]).save(path, **options)
    return path


def write_blank(path):
    Image.new("RGB", (64, 48), "gray").save(path)
    return path


def labels_of(path):
    return np.array(Image.open(path))


def files(folder):
    return sorted(path.name for path in Path(folder).iterdir())
