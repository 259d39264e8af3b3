"""What bench_parser.py times of the two stages: a photograph's face to its eleven classes."""

import cv2
import numpy as np
import parser_contenders as contenders
import torch
from parser_contenders import DTYPES, LAYOUTS, PLAIN
from torch import nn

from faceparse.data import (
    FINE,
    geometry,
    open_dataset,
    synthetic,
)
from faceparse.inference import face_crops
from faceparse.inference.face_parser import FaceParser, class_counts, networks_of, pictures_of
from faceparse.models import build_model, fuse_bn

NETWORKS, PARTS = networks_of(FINE), face_crops.parts_of(FINE)
ALIGNED, FROM_FRAME = "both stages, aligned 128 x 128", "640 x 480, detection to labels"
FACES = 8  # parsed at a time, where a batch is timed
FRAME = (480, 640)  # height and width of a camera's frame
FACE_IN_FRAME = 320  # pixels of the drawn face there


class Parser(FaceParser):
    """A face parser whose key points are looked for, and then taken from where faces have them.

    Nobody has trained its networks, and a face about points out of nowhere would be of any size.
    """

    def _look(self, images, maps):
        super()._look(images, maps)
        shape = self.layout.shape
        usual = face_crops.box_of(face_crops.box_about(shape))
        return geometry.apply(geometry.inverse(np.stack(maps)), geometry.apply(usual, shape))


class Converted(nn.Module):
    """A network in a setting, which takes float32 as before."""

    def __init__(self, network, setting, threads):
        super().__init__()
        self.kind = {
            "dtype": DTYPES[setting.dtype],
            "memory_format": LAYOUTS[setting.layout],
        }
        network = contenders.convert(network, self.kind["dtype"])
        self.network = network.to(memory_format=self.kind["memory_format"])
        self.run = contenders.compiled(lambda images: network(images), setting.mode, threads)

    def forward(self, images):
        return self.run(images.to(**self.kind))


def face_parser(setting=PLAIN, threads=None):
    """A parser whose networks are in a setting."""
    faces = open_dataset("synthetic", None, "train", limit=8, labels="fine", progress=False)
    networks = {}
    for name in NETWORKS:
        model = {"points": "points", "face": "rnn-g"}.get(name, "part")
        classes = class_counts(name, FINE)[0]
        torch.manual_seed(0)
        network = build_model(model, classes, side=face_crops.SIDE if name == "face" else 64)
        networks[name] = fuse_bn(network.eval().requires_grad_(False))
    parser = Parser(networks, face_crops.learn_layout(faces, progress=False))
    if setting != PLAIN:
        parser.parts = Converted(parser.parts, setting, threads)
        for name in ("points", "face"):
            networks[name] = Converted(networks[name], setting, threads)
    return parser


def aligned(layout):
    """A drawn face (3, 128, 128) uint8 that fills the aligned frame, and its points there."""
    faces = open_dataset("synthetic", None, "test", limit=1, labels="fine", progress=False)
    m = geometry.compose(
        face_crops.FRAME_TO_FACE, face_crops.frame_of(faces.points[0].double().numpy(), layout)
    )
    image = geometry.view(faces.images[0], m, (face_crops.SIDE, face_crops.SIDE))
    return image.round().to(torch.uint8), geometry.apply(face_crops.FRAME_TO_FACE, layout.shape)


def camera_frame(parser):
    """A frame (3, 480, 640) uint8 with a drawn face that the detector finds."""
    height, width = FRAME
    frame = np.full((height, width, 3), 96, np.uint8)
    top, left = (height - FACE_IN_FRAME) // 2, (width - FACE_IN_FRAME) // 2
    for i in range(50):
        face = synthetic.draw_face(5, i)[0]
        frame[top : top + FACE_IN_FRAME, left : left + FACE_IN_FRAME] = cv2.resize(
            face, (FACE_IN_FRAME, FACE_IN_FRAME), interpolation=cv2.INTER_CUBIC
        )
        image = torch.from_numpy(frame).permute(2, 0, 1).contiguous()
        if len(parser.detect(image)):
            return image
    raise AssertionError("the cascade finds none of 50 drawn faces")


def steps():
    """The chain and its parts, uncompiled: name to (call, faces that it parses)."""
    parser = face_parser()
    image, points = aligned(parser.layout)
    frame = camera_frame(parser)
    boxes = parser.detect(frame)[:1]
    (points_in_frame,) = parser.find_points([frame], boxes)
    pictures = {name: network_input(name) for name in NETWORKS}
    # Of the largest size each; what lies beyond the mouth's own is not looked at.
    beside = torch.cat([network_input("nose")] * sum(len(pictures_of(part)) for part in PARTS), 1)

    @torch.inference_mode()
    def networks(*names):
        for name in names:
            parser.networks[name](pictures[name])

    @torch.inference_mode()
    def one_pass():
        parser.parts(beside)

    many, many_points = [image] * FACES, [points] * FACES
    return {
        ALIGNED: (lambda: parser(image, points=points), 1),
        f"the same, {FACES} faces": (lambda: parser(many, points=many_points), FACES),
        "first stage's network alone": (lambda: networks("face"), 1),
        "second stage in one pass": (one_pass, 1),
        "its networks one by one": (lambda: networks(*PARTS), 1),
        FROM_FRAME: (lambda: parser(frame), 1),
        "detection in it": (lambda: parser.detect(frame), 1),
        "key points in it": (lambda: parser.find_points([frame], boxes), 1),
        "both stages in it": (lambda: parser(frame, points=points_in_frame), 1),
    }


def network_input(name):
    """What a network of the chain is shown of one face: of eyes two."""
    size = (face_crops.SIDE, face_crops.SIDE) if name == "face" else (64, 64)
    size = face_crops.PARTS[name].size if name in face_crops.PARTS else size
    images = torch.rand(2 if name == "eye" else 1, 3, *size) - 0.5
    return images.contiguous(memory_format=torch.channels_last)


def settings(*, modes, layouts, dtypes, threads):
    """Both stages of an aligned face in each setting: see ``parser_contenders.in_settings``."""
    plain = face_parser()
    image, points = aligned(plain.layout)

    def make(setting):
        parser = face_parser(setting, threads)
        return lambda: parser(image, points=points).labels

    expected = plain(image, points=points).labels
    return contenders.in_settings(
        "two stages", make, expected, modes=modes, layouts=layouts, dtypes=dtypes
    )
