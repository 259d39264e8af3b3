"""Every parser of the tables by name: a network, and what makes labels of its maps.

``None`` takes the maximum; ``crf`` and ``graph-cut`` refine the maps of a network, with parameters
searched on the validation split and kept next to the checkpoint; ``detect`` finds the faces of a
scene and parses each by the network for single faces.
"""

import json
import sys
import zlib

import torch
from tqdm import tqdm

from faceparse.console import say
from faceparse.data import transforms
from faceparse.models import MODELS, SECOND_STAGE
from faceparse.training import checkpoint
from faceparse.training.losses import resize_labels

from . import crf, detect, graph_cut

PARSERS = {name: (name, None) for name in (*MODELS, *SECOND_STAGE)} | {
    "cnn-crf": ("cnn-s", "crf"),
    "mo": ("mo", "graph-cut"),
    "det+rnn-g": ("rnn-g", "detect"),
}
SEARCHED = 60  # validation images
TRIALS = 60


def needs_graph_cut(name):
    """Whether a parser by its name, or None, needs the package maxflow."""
    return name is not None and PARSERS[name][1] == "graph-cut"


@torch.inference_mode()
def maps(model, images):
    """Class probabilities (N, classes, h, w) and, or None, those of no boundary (N, 1, h', w')."""
    device = next(model.parameters()).device
    probabilities, open_gates = [], []
    for image in images.split(1):
        output = model(transforms.network_input(image.to(device)))
        probabilities.append(output.logits.softmax(1).cpu())
        if output.gate_logit is not None:
            open_gates.append(output.gate_logit.sigmoid().cpu())
    return torch.cat(probabilities), torch.cat(open_gates) if open_gates else None


def make(name, model, validation, *, path, state):
    """The function of a parser that refines or detects.

    Args:
        name: a key of ``PARSERS``.
        model: its network, ready to evaluate.
        validation: called without arguments for the validation faces.
        path: the checkpoint's file. NAME.json next to it keeps what the search found.
        state: the checkpoint, whose weights that file must be for.

    Returns:
        a function of images (N, 3, H, W) uint8 to labels (N, h, w) uint8, and the parameters as a
        dict, or None where there are none.
    """
    _, refinement = PARSERS[name]
    if refinement == "detect":
        detector = detect.open_detector()

        def parse_scenes(images):
            scenes = tqdm(images, "scenes", leave=False, disable=None)
            parsed = [detect.parse_scene(model, image, detector=detector) for image in scenes]
            # At the size at which the networks for scenes are compared.
            return resize_labels(torch.stack(parsed), [side // 2 for side in images.shape[2:]])

        return parse_scenes, None
    faces = validation()
    file = path.with_name(f"{name}.json")
    known = {
        "weights": _digest(state["average"]),
        "classes": state["classes"],
        "images": _digest({"images": faces.images[:SEARCHED]}),
        "trials": TRIALS,
    }
    found = kept(file, known, refinement)
    if found is None:
        found = search(refinement, model, faces, seed=0)
        text = json.dumps(known | {"parameters": found}, indent=2) + "\n"
        try:
            checkpoint.write_atomically(file, text.encode())
        except OSError as error:
            say(f"note: what was found is not kept: {error}", file=sys.stderr)
    return refiner(refinement, model, found), found


def kept(file, known, refinement):
    """The parameters in a file that an earlier search for the same wrote, or None."""
    try:
        content = json.loads(file.read_text())
        if {key: content[key] for key in known} != known:
            return None
        found = content["parameters"]
        if refinement == "crf":
            parameters = crf.CrfParameters(**found)
            parameters.check()
            return parameters._asdict()
        if not 0 <= found["smoothness"] <= graph_cut.LARGEST:
            return None
        return {"smoothness": found["smoothness"]}
    except (KeyError, OSError, RecursionError, TypeError, ValueError):
        return None  # none, or damaged: it is searched again


def _digest(tensors):
    """A checksum of tensors by name."""
    value = 0
    for tensor in tensors.values():
        value = zlib.crc32(tensor.contiguous().cpu().numpy().tobytes(), value)
    return value


def search(refinement, model, faces, *, seed):
    """The parameters that are best on ``faces``, as a dict for a JSON file."""
    images, labels = faces.images[:SEARCHED], faces.labels[:SEARCHED]
    probabilities, no_boundary = maps(model, images)
    if refinement == "crf":
        best, _ = crf.search(probabilities, images, labels, trials=TRIALS, seed=seed, progress=True)
        return best._asdict()
    best, _ = graph_cut.search(probabilities, no_boundary, labels, progress=True)
    return {"smoothness": best}


def refiner(refinement, model, found):
    """The function that parses images with known parameters."""

    def parse(images):
        probabilities, no_boundary = maps(model, images)
        if refinement == "crf":
            return crf.refine(probabilities, images, crf.CrfParameters(**found), progress=True)
        return graph_cut.expand(probabilities, no_boundary, **found, progress=True)

    return parse
