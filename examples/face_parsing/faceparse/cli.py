"""What the example's commands share: options, one-line errors, exit codes."""

import argparse
import faulthandler
import importlib.util
import math
import sys
from pathlib import Path

import torch

from faceparse.console import accept_every_name, printable, say
from faceparse.data import DATASETS, DataError, default_folder, open_dataset, open_mixed
from faceparse.inference.image_io import MAX_MEGAPIXELS, NoFaceError, PhotographError
from faceparse.training.checkpoint import CheckpointError
from faceparse.training.config import SettingsError
from faceparse.training.distributed import StoppedError

EXPECTED = (DataError, CheckpointError, SettingsError, StoppedError, FloatingPointError, OSError)
EXPECTED += (PhotographError,)
# Packages that only some commands need, and the extra of pyproject.toml that has each.
EXTRAS = {
    "gradio": "page",
    "matplotlib": "plot",
    "maxflow": "graph-cut",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
}
WRONG, FACELESS, INTERRUPTED = 2, 3, 130  # exit codes


class PackageError(Exception):
    """A package is not installed; the message is one line that names its extra."""


def require(*packages):
    """Checks, before any work, that packages of ``EXTRAS`` are installed.

    Raises:
        PackageError: one is not.
    """
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise PackageError(
                f"{name} is not installed: in the checkout, pip install -e '.[{EXTRAS[name]}]'"
            )


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line, without the usage in front."""

    def error(self, message):
        say(f"error: {one_line(message)}", file=sys.stderr)
        self.exit(WRONG)


def path(text):
    """An argparse type: a path, which an unset variable of a script is not."""
    if not text:
        raise argparse.ArgumentTypeError("a path must not be empty")
    return Path(text)


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
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        words = str(error).splitlines()[0].partition(". ")[0]
        raise argparse.ArgumentTypeError(f"cannot use device {text!r}: {words}") from None
    return found


def add_models_argument(parser):
    parser.add_argument(
        "--models", required=True, metavar="DIR", type=path, help="what train.py --all has written"
    )


def add_limit_argument(parser):
    parser.add_argument(
        "--max-megapixels",
        metavar="N",
        type=number(float, 1e-6),
        default=MAX_MEGAPIXELS,
        help="refuse larger photographs; default: %(default)s",
    )


def add_data_arguments(parser):
    """Where the data lie and how they are read; nothing of it changes a result."""
    parser.add_argument(
        "--root", metavar="DIR", type=path, help="the folder that holds the data set"
    )
    parser.add_argument("--skip-bad", action="store_true", help="leave out damaged files")
    parser.add_argument(
        "--cache",
        metavar="DIR",
        type=path,
        default=default_folder(),
        help=f"where decoded faces are kept; default: {printable(default_folder())}",
    )
    parser.add_argument("--no-cache", action="store_true", help="decode into memory every time")
    parser.add_argument("--device", type=device, default="cpu")


def open_faces(args, dataset, split, *, root=None, limit=None, mix=(), **options):
    """A split of the data set, opened as the options of :func:`add_data_arguments` say.

    Args:
        root: the data set's folder; None: ``args.root``.
        mix: (name, root) of further sets that join it.
        options: ``labels`` and ``side`` of ``open_dataset``.
    """
    root = root or args.root
    options |= dict(
        limit=limit,
        skip_bad=args.skip_bad,
        cache=None if args.no_cache else args.cache,
    )
    if not mix:
        return open_dataset(dataset, root, split, **options)
    try:
        return open_mixed([(dataset, root), *mix], split, **options)
    except ValueError as error:  # sizes that differ
        raise DataError(str(error)) from None


def add_dataset_argument(parser, **options):
    parser.add_argument("--dataset", choices=DATASETS, **options)


def report_skipped(*splits):
    """Say what --skip-bad left out, on the error stream."""
    skipped = [line for faces in splits for line in faces.skipped]
    if skipped:
        say(f"note: {len(skipped)} bad faces skipped, the first: {skipped[0]}", file=sys.stderr)


def one_line(error):
    """The words of an error that names a file, whatever stands in the file's name."""
    return " ".join(str(error).splitlines())


def exit_code(main):
    """Run ``main`` and turn what a user can cause into one line and an exit code."""
    accept_every_name()
    if sys.__stderr__ and not faulthandler.is_enabled():
        # What ends Python itself, such as a mapped file that another program cuts off.
        faulthandler.enable(sys.__stderr__)
    try:
        main()
    except (*EXPECTED, PackageError, NoFaceError) as error:
        say(f"error: {one_line(error)}", file=sys.stderr)
        return FACELESS if isinstance(error, NoFaceError) else WRONG
    except KeyboardInterrupt as stop:
        say(": ".join(["interrupted", *map(str, stop.args)]), file=sys.stderr)
        return INTERRUPTED
    return 0
