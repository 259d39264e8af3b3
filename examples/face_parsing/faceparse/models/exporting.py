"""Writes a network as a file that runs without the example, and compares both."""

import contextlib
import logging
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import gatedrnn
from faceparse.data import transforms
from faceparse.training import checkpoint

TOLERANCE = 1e-4  # of an output, in float32
CALLS = 20  # that are timed


class ExportError(RuntimeError):
    """Nothing was written; the message is one line and says why."""


class Comparison(NamedTuple):
    """What was written, next to the network that it was made of."""

    difference: float  # the largest of any output
    frames: float  # a second
    network_frames: float


class FromPixels(nn.Module):
    """A network with what goes before it, and of its results the first: logits, or key points."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        """Images (N, 3, H, W) uint8 to logits (N, classes, H, W) or points (N, P, 2)."""
        return self.network(transforms.network_input(images))[0]


def export_network(network, example, path, kind, *, dynamic=True):
    """Write a network, run what was written, and give it its name if both agree.

    Args:
        network: takes one tensor and returns one, or a tuple of some. It is put into evaluation
            mode.
        example: an input of it (N, ...), on the CPU.
        path: of the file, which is whole or as it was before.
        kind: "export" (torch.export), "aoti" (AOTInductor) or "onnx".
        dynamic: whether N may be any number; all other sizes are the example's.

    Returns:
        Comparison.

    Raises:
        ExportError: the two differ by more than ``TOLERANCE``, or the kind needs what is not here.
    """
    write, load = KINDS[kind]
    network = network.eval()
    # Its last size of a batch is traced: a size of one would be taken for a constant.
    inputs = [example[:1], torch.cat([example, example[:1]])] if dynamic else [example]
    sizes = ({0: torch.export.Dim("images", min=1)},) if dynamic else None
    with torch.no_grad(), quiet_torch(), tempfile.TemporaryDirectory() as folder:
        folded = gatedrnn.fold_weight_constraint(network)
        program = torch.export.export(folded, (inputs[-1],), dynamic_shapes=sizes)
        file = Path(folder, f"network{ENDINGS[kind]}")
        write(program, file)
        written = load(file)
        difference = max(largest_difference(written, network, images) for images in inputs)
        if not difference <= TOLERANCE:  # nor NaN
            raise ExportError(f"what was written differs from the network by {difference:.2g}")
        frames = frames_a_second([written, network], inputs[0])
        checkpoint.write_atomically(path, file.read_bytes())
    return Comparison(difference, *frames)


@contextlib.contextmanager
def quiet_torch():
    """Without what torch says of its own affairs while it exports."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def largest_difference(written, network, images):
    pairs = zip(outputs_of(written, images), outputs_of(network, images), strict=True)
    return max((ours - theirs).abs().max().item() for ours, theirs in pairs)


def outputs_of(network, images):
    result = network(images)
    return [result] if isinstance(result, torch.Tensor) else result


def frames_a_second(networks, images):
    """Of each network, by the median of calls that take turns."""
    seconds = [[] for _ in networks]
    for _ in range(CALLS):
        for network, each in zip(networks, seconds, strict=True):
            start = time.perf_counter()
            network(images)
            each.append(time.perf_counter() - start)
    return [len(images) / statistics.median(each) for each in seconds]


def write_export(program, file):
    torch.export.save(program, file)


def load_export(file):
    return torch.export.load(file).module()


def write_aoti(program, file):
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.exc import InductorError

    try:
        aoti_compile_and_package(program, package_path=str(file))
    except InductorError as error:  # the usual one: there is no compiler
        raise ExportError(f"aoti: {str(error).splitlines()[0]}") from None


def load_aoti(file):
    from torch._inductor import aoti_load_package

    return aoti_load_package(str(file))


def write_onnx(program, file):
    import gatedrnn.onnx

    try:
        table = gatedrnn.onnx.translation_table()
    except ImportError as error:
        raise ExportError(str(error)) from None
    options = dict(custom_translation_table=table, external_data=False, verbose=False)
    torch.onnx.export(program, f=file, **options)


def load_onnx(file):
    # Or it writes a device id into the home folder, and sends facts to its maker.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError:
        raise ExportError("onnx: what was written needs onnxruntime to be tried") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # as many as the network has
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: list(map(torch.from_numpy, session.run(None, {name: images.numpy()})))


KINDS = {
    "export": (write_export, load_export),
    "aoti": (write_aoti, load_aoti),
    "onnx": (write_onnx, load_onnx),
}
ENDINGS = {"export": ".pt2", "aoti": ".aoti.pt2", "onnx": ".onnx"}
