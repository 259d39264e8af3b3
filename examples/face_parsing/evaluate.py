"""Measure a trained parser on the test split: evaluate.py --checkpoint F --dataset D --root DIR."""

import argparse
import json
import math
import sys

import checkpoint
import torch
import transforms
from checkpoint import CheckpointError
from datasets import DATASETS, SPLITS, DataError, open_dataset
from metrics import accuracy, confusion_matrix, f_measures
from models import build_model

BATCH = 100


@torch.inference_mode()
def predict(model, images):
    """The label of each pixel.

    Args:
        model: a network in ``models``.
        images: (N, 3, H, W) uint8, on any device.

    Returns:
        labels (N, H, W) uint8 and how open the gate is, (N, H/2, W/2): the mean of |G| over its
        channels, 0 to 1, or None without a gate; on the CPU.
    """
    device = next(model.parameters()).device
    labels, gates = [], []
    for batch in images.split(BATCH):
        output = model(transforms.normalise(batch.to(device)))
        labels.append(output.logits.argmax(1).to("cpu", torch.uint8))
        if output.gate is not None:
            gates.append(output.gate.abs().clamp(max=1).mean(1).cpu())
    return torch.cat(labels), torch.cat(gates) if gates else None


def confusion(model, faces):
    """The confusion matrix of a model over all ``faces``."""
    predicted, _ = predict(model, faces.images)
    return confusion_matrix(predicted, faces.labels, len(faces.label_set.names))


def summary(model, faces, state, dataset):
    """What metrics.json holds. Fractions; an F that does not exist (see metrics.py) is None.

    Args:
        model: the network with the state's averaged weights.
        faces: the test split.
        state: as ``checkpoint.load`` returns it.
        dataset: the name of the data set that ``faces`` come from.
    """
    matrix = confusion(model, faces)
    f = [None if math.isnan(value) else value for value in f_measures(matrix)]
    return {
        "dataset": dataset,
        "model": state["settings"]["model"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": state["epoch"],
        "seconds": round(state["seconds"], 2),
        "accuracy": accuracy(matrix),
        "f": dict(zip(faces.label_set.names, f, strict=True)),
    }


def load_model(state, device, *, path):
    """The network that a checkpoint describes, with its averaged weights, ready to evaluate."""
    try:
        model = build_model(state["settings"]["model"], len(state["settings"]["classes"]))
        model.load_state_dict(state["average"])
    except (KeyError, TypeError, ValueError, RuntimeError):
        raise CheckpointError(f"{path} holds no network that this program knows") from None
    return model.to(device).eval()


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line, without the usage in front."""

    def error(self, message):
        self.exit(2, f"error: {message}\n")


def number(kind, low, high=math.inf):
    """An argparse type: a number of ``kind`` in low .. high."""

    def convert(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in {low} .. {high}")
        return value

    convert.__name__ = kind.__name__  # argparse names the type by it
    return convert


def device(text):
    """An argparse type: a device that can be used here."""
    try:
        found = torch.device(text)
        torch.zeros(1, device=found).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        words = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"cannot use device {text!r}: {words}") from None
    return found


def add_data_arguments(parser):
    parser.add_argument("--dataset", choices=DATASETS, help="default: synthetic")
    parser.add_argument("--root", metavar="DIR", help="the folder that holds the data set")
    parser.add_argument("--limit", type=number(int, 1), help="use N faces of each split at most")
    parser.add_argument("--skip-bad", action="store_true", help="leave out damaged files")
    parser.add_argument("--device", type=device, default="cpu")


def report_skipped(*splits):
    """Say what --skip-bad left out, on the error stream."""
    skipped = [line for faces in splits for line in faces.skipped]
    if skipped:
        print(f"note: {len(skipped)} bad faces skipped, the first: {skipped[0]}", file=sys.stderr)


def exit_code(main):
    """Run ``main`` and turn what a user can cause into one line and an exit code."""
    try:
        main()
    except (DataError, CheckpointError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, metavar="FILE")
    add_data_arguments(parser)
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()

    state = checkpoint.load(args.checkpoint)
    model = load_model(state, args.device, path=args.checkpoint)
    dataset = args.dataset or state["settings"]["dataset"]
    faces = open_dataset(dataset, args.root, args.split, limit=args.limit, skip_bad=args.skip_bad)
    if not len(faces.images):
        raise DataError(f"{dataset}: no usable face in the {args.split} split")
    result = summary(model, faces, state, dataset)
    print(json.dumps(result) if args.json else as_text(result))
    report_skipped(faces)


def as_text(result):
    """The summary, one ``key: value`` a line."""
    lines = [f"{key}: {value}" for key, value in result.items() if key not in ("accuracy", "f")]
    lines.append(f"accuracy: {100 * result['accuracy']:.2f} %")
    for name, value in result["f"].items():
        lines.append(f"F {name}: " + ("-" if value is None else f"{100 * value:.2f} %"))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(exit_code(main))
