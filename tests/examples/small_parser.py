"""A face parser of untrained networks, with key points where faces have them on average.

`python small_parser.py SCRIPT ARGUMENT...` runs a script of the example with it; the script's
attempts to reach anything but this machine, and at its end its peak memory in kB, are printed on
the error stream.
"""

import runpy
import sys
from pathlib import Path

from example_scripts import EXAMPLE

if __name__ == "__main__":
    sys.path.insert(0, str(EXAMPLE))

import cv2
import numpy as np
import torch
from PIL import Image

from faceparse.data import FINE, geometry, open_dataset, synthetic
from faceparse.inference import detect, face_crops, face_parser
from faceparse.models import build_model

LEAVES = "leaves this machine:"
PEAK = "VmHWM:"
SIDE = 320  # pixels of a face


def save_parser(folder):
    """Write the bundle that ``FaceParser.load`` reads; hair is what it sees most of."""
    faces = open_dataset("synthetic", None, "train", limit=8, labels="fine", progress=False)
    layout = face_crops.learn_layout(faces, progress=False).as_dict()
    states = {}
    for name in face_parser.networks_of(FINE):
        model = {"points": "points", "face": "rnn-g"}.get(name, "part")
        count = {"points": 5, "face": 3}.get(name) or len(face_crops.PARTS[name].names) + 1
        side = 128 if name == "face" else 64
        with torch.random.fork_rng():
            torch.manual_seed(0)
            weights = build_model(model, count, side=side).state_dict()
        if name == "face":
            weights["head.weight"] *= 0.1
            weights["head.bias"] += torch.tensor([0.0, 0.0, 2.0])
        states[name] = {
            "settings": {"model": model},
            "classes": list(range(count)),
            "side": side,
            "layout": layout,
            "average": weights,
        }
    return face_parser.save(folder, states)


def place_points(parser, images, boxes):
    """In place of ``FaceParser.find_points``, whose network would have to be trained."""
    shape = parser.layout.shape
    usual = face_crops.box_of(face_crops.box_about(shape))
    maps = [geometry.compose(geometry.inverse(face_crops.box_of(box)), usual) for box in boxes]
    return np.array([geometry.apply(m, shape) for m in maps]).reshape(-1, *shape.shape)


def save_photo(path, *, faces=1):
    """Write a photograph of drawn faces side by side, all found by the detector; returns its path.

    A row of two is as wide as the detector searches without making it smaller.
    """
    row = np.zeros((SIDE, 0, 3), np.uint8)
    for i in range(50):
        face = cv2.resize(synthetic.draw_face(5, i)[0], (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
        longer = np.concatenate([row, face], 1)
        boxes = detect.detect(longer)
        if len(boxes) == longer.shape[1] // SIDE and boxes[:, 2].min() > 100:
            row = longer
        if row.shape[1] == faces * SIDE:
            Image.fromarray(row).save(path)
            return path
    raise AssertionError(f"the cascade finds fewer than {faces} of 50 faces")


def _watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        address = arguments[1] if event == "socket.connect" else arguments
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", None):
            print(LEAVES, event, address[0], file=sys.stderr)


def main():
    del sys.argv[0]
    face_parser.FaceParser.find_points = place_points
    sys.addaudithook(_watch)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        status = Path("/proc/self/status").read_text()
        print(PEAK, status.partition(PEAK)[2].split()[0], file=sys.stderr)


if __name__ == "__main__":
    main()
