"""What bench_parser.py times: the parsers in every setting, their layers, and training steps."""

import importlib
import itertools
import time
import types
from collections import defaultdict
from typing import NamedTuple

import torch
from torch import nn

from faceparse import data
from faceparse.data import batches, transforms
from faceparse.inference import face_crops
from faceparse.models import build_model
from faceparse.training import losses
from gatedrnn import SpatialGatedRNN

CLASSES = 3
MODES = ("eager", "compiled", "frozen")  # frozen: compiled with the weights as constants
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# The share of pixels that must get the label that the plain network gives them.
AGREEMENT = {"float32": 0.999, "bfloat16": 0.9}
# What makes labels of a network's maps, or of a scene; all have weights that nobody trained.
REFINED = {
    "cnn-crf": ("cnn-s", "crf"),
    "mo-cut": ("mo", "graph_cut"),
    "det+rnn-g": ("rnn-g", "detect"),
}
# As Kraehenbuehl and Koltun choose them; the time hardly depends on them, but for the steps.
CRF = {
    "smooth_weight": 3.0,
    "smooth_sigma": 3.0,
    "appearance_weight": 10.0,
    "position_sigma": 80.0,
    "colour_sigma": 13.0,
    "steps": 5,
}
SMOOTHNESS = 1.0


class WrongResult(Exception):
    """A contender gives other labels than the plain network does."""


class Setting(NamedTuple):
    mode: str
    layout: str
    dtype: str


PLAIN = Setting("eager", "channels_last", "float32")


def photographs(side, batch):
    """Drawn faces (batch, 3, side, side) uint8; several side by side where they are larger."""
    per_row = side // data.SIDE
    faces = data.open_dataset("synthetic", None, "test", limit=batch * per_row**2).images
    rows = faces.unflatten(0, (batch, per_row, per_row)).permute(0, 3, 1, 4, 2, 5)
    return rows.reshape(batch, 3, side, side)


def network(name, side, images):
    """A network ready to evaluate, all of whose classes occur in ``images`` (normalised)."""
    torch.manual_seed(0)
    model = build_model(name, CLASSES, side=side).eval().requires_grad_(False)
    # Weights that nobody trained may give one class everywhere, which no error would change.
    last = [layer for layer in model.head.modules() if isinstance(layer, nn.Conv2d)][-1]
    last.bias -= model(images).logits.mean((0, 2, 3))
    return model


def convert(model, dtype):
    """A network whose convolutions, and the maps between layers, have ``dtype``.

    Normalisations and the recurrent layer keep float32 parameters next to 16-bit maps: rounded
    after the clamp, the norm of a weight could exceed one. Autocast computes the same, and casts
    the weights of the convolutions again in every call.
    """
    model.to(dtype)
    for module in model.modules():
        if isinstance(module, (SpatialGatedRNN, nn.BatchNorm2d)):
            module.float()
    return model


def networks(name, side, photos, *, modes, layouts, dtypes, threads):
    """One network in each setting: see :func:`in_settings`.

    Args:
        name: of the network.
        side: that the network is for.
        photos: (N, 3, side, side) uint8.
        threads: for which to compile.
    """
    images = transforms.normalise(photos)
    expected = labelling(network(name, side, images), images)()

    def make(setting):
        layout, dtype = LAYOUTS[setting.layout], DTYPES[setting.dtype]
        model = convert(network(name, side, images), dtype).to(memory_format=layout)
        given = images.to(dtype, memory_format=layout)
        return labelling(model, given, setting.mode, threads)

    return in_settings(name, make, expected, modes=modes, layouts=layouts, dtypes=dtypes)


def in_settings(name, make, expected, *, modes, layouts, dtypes):
    """What is made for each setting, once its labels have been compared.

    Args:
        name: what an error calls it.
        make: a function of a Setting to a call that gives labels.
        expected: labels.
        modes, layouts, dtypes: of MODES, LAYOUTS and DTYPES.

    Returns:
        (dict of Setting -> call, dict of Setting -> share of labels that differ, dict of Setting ->
        word why it does not run)

    Raises:
        WrongResult: one of them computes something else.
    """
    calls, differs, missing = {}, {}, {}
    for setting in map(Setting._make, itertools.product(modes, layouts, dtypes)):
        call = make(setting)
        try:
            labels = call()
        except RuntimeError as error:  # a compiler that is not there or fails
            if setting.mode == "eager":
                raise
            missing[setting] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            continue
        differs[setting] = (labels != expected).float().mean().item()
        if not differs[setting] <= 1 - AGREEMENT[setting.dtype]:
            raise WrongResult(
                f"{name} {' '.join(setting)}: {differs[setting]:.2%} of the labels are others"
            )
        calls[setting] = call
    return calls, differs, missing


def labelling(model, images, mode="eager", threads=None):
    """A call without arguments: one pass of ``images`` through ``model`` to labels."""
    parse = compiled(lambda given: model(given).logits.max(1).indices, mode, threads)

    @torch.inference_mode()
    def call():
        return parse(images)

    return call


def compiled(function, mode, threads):
    """The function as it is in a mode of MODES, for that number of threads."""
    if mode == "eager":
        return function
    # Compiled code hangs on the function's code: each contender gets its own, not one of a list
    # that is searched in every call.
    own = types.FunctionType(
        function.__code__.replace(), globals(), "parse", None, function.__closure__
    )
    # The number of threads is part of the code, but not of the key under which it is kept.
    options = {"freezing": mode == "frozen", "cpp.threads": threads or -1}
    return torch.compile(own, dynamic=False, options=options)


def refined(name, side, photos):
    """The call of a parser that refines maps or detects faces, or a word why there is none."""
    of, module = REFINED[name]
    if module == "detect" and side == data.SIDE:
        return "for scenes only"
    try:
        tool = importlib.import_module(f"faceparse.inference.{module}")
    except ModuleNotFoundError as error:
        return f"no module {error.name}"
    if module == "detect":
        # The network for single faces, given to those that the cascade finds.
        model = network(of, data.SIDE, transforms.normalise(photographs(data.SIDE, 1)))
        detector = tool.open_detector()
        return torch.inference_mode()(
            lambda: [tool.parse_scene(model, photo, detector=detector) for photo in photos]
        )
    images = transforms.normalise(photos).contiguous(memory_format=torch.channels_last)
    model = network(of, side, images)

    @torch.inference_mode()
    def call():
        output = model(images)
        probabilities = output.logits.softmax(1)
        if module == "crf":
            return tool.refine(probabilities, photos, tool.CrfParameters(**CRF), progress=False)
        no_boundary = output.gate_logit.sigmoid()
        return tool.expand(probabilities, no_boundary, smoothness=SMOOTHNESS, progress=False)

    return call


def kind(name, module):
    """To which part of a network's time an innermost module counts."""
    kinds = {
        SpatialGatedRNN: "scan",
        nn.ConvTranspose2d: "deconvolutions",
        nn.MaxPool2d: "pooling",
        nn.BatchNorm2d: "normalisation",
        nn.ReLU: "ReLU",
    }
    if isinstance(module, nn.Conv2d):
        return "heads" if name.rpartition(".")[2].endswith("head") else "convolutions"
    return next((part for of, part in kinds.items() if isinstance(module, of)), "the rest")


def layer_seconds(model, images):
    """Seconds of one pass, uncompiled, by kind of layer; what lies between them is the rest."""
    seconds, started, hooks = defaultdict(float), [], []

    def begin(*_):
        started.append(time.perf_counter())

    def end_of(part):
        def end(*_):
            seconds[part] += time.perf_counter() - started.pop()

        return end

    for name, module in model.named_modules():
        if next(module.children(), None) is None:
            hooks.append(module.register_forward_pre_hook(begin))
            hooks.append(module.register_forward_hook(end_of(kind(name, module))))
    try:
        with torch.inference_mode():
            start = time.perf_counter()
            logits = model(images).logits
            between = time.perf_counter()
            logits.max(1)
            end = time.perf_counter()
    finally:
        for hook in hooks:
            hook.remove()
    seconds["the rest"] += between - start - sum(seconds.values())
    seconds["maximum"] = end - between
    return dict(seconds)


def training_step(name, batch):
    """A call that takes one training step of a network on a ``Batch``, losses included."""
    torch.manual_seed(0)
    model = build_model(name, CLASSES, side=batch.images.shape[-1]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    seeds = batch.seeds.tolist()

    def step():
        found = losses.parser_losses(model(batch.images), batch.labels, seeds=seeds)
        optimizer.zero_grad()
        sum(loss.total / loss.count for loss in found.values()).backward()
        optimizer.step()

    return step


def epoch(batch_size, count):
    """An augmented epoch, in batches of ``batch_size``, of ``count`` drawn faces in memory."""
    faces = data.open_dataset("synthetic", None, "train", limit=count)
    return batches.Epoch(faces, face_crops.Whole(faces), batch_size=batch_size, seed=0, epoch=0)


def making_batches(an_epoch):
    """A call that makes the next batch, from the first again after the last."""
    numbers = itertools.cycle(range(len(an_epoch)))
    return lambda: an_epoch[next(numbers)]
