"""Trains a few steps in each process that torchrun starts, and writes each one's weights."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "face_parsing"))

import torch

from faceparse.data import open_dataset
from faceparse.inference.face_crops import Whole
from faceparse.training import loop
from faceparse.training.config import Settings
from faceparse.training.distributed import Processes


def main(out, batch_size):
    device = torch.device("cpu")
    processes = Processes()
    faces = open_dataset("synthetic", None, "train", limit=10, progress=False)
    settings = Settings(model="rnn-g", epochs=2, batch_size=int(batch_size), background=5, clip=1.0)
    view = Whole(faces)
    state = loop.new_state(settings, view.facts(), faces=10, world=processes.world)
    nothing = faces._replace(images=faces.images[:0], labels=faces.labels[:0])
    options = {"device": device, "processes": processes, "save": lambda state, *, best: None}
    with processes.connected(device):
        loop.train(state, faces, nothing, view=view, **options)
    torch.save(
        {"model": state["model"], "history": state["history"], "step": state["step"]},
        Path(out) / f"{processes.world}-{processes.rank}.pt",
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
