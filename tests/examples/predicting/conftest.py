"""predict.py in a folder of its own, with a parser that needs no training."""

import functools

import predict
import pytest
from drawn_faces import LAYOUT, Network, skin_over_hair, usual_points
from example_scripts import call

from faceparse.inference.face_parser import FaceParser


@pytest.fixture(autouse=True)
def parser(monkeypatch):
    """What --models gives: the halves of an upright square about the face are skin and hair."""
    networks = {"face": Network(skin_over_hair), "points": Network(usual_points)}
    made = FaceParser(networks, LAYOUT)
    monkeypatch.setattr(FaceParser, "load", lambda folder, *, device: made)
    return made


@pytest.fixture
def run(monkeypatch, tmp_path):
    """predict.py in a folder of its own, with results in ``parsed`` there; gives its exit code."""
    monkeypatch.chdir(tmp_path)
    return functools.partial(call, monkeypatch, predict, "--models", "models")
