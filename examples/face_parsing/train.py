"""Train a first-stage face parser: train.py, without arguments, learns synthetic faces with RNN-G.

Writes to --out: last.pt (at least after every epoch), best.pt (the best on the validation faces),
metrics.json, faces.png, losses.png.
"""

import argparse
import contextlib
import os
import sys

# PyTorch allocates and frees maps of tens of megabytes in every step. On huge pages the kernel
# hands them out faster: a tenth of a step at batches of 10, a quarter at 40. Read by torch once.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

from faceparse import cli
from faceparse.data import DATASETS
from faceparse.inference.face_crops import PARTS
from faceparse.training import checkpoint, config
from faceparse.training.checkpoint import CheckpointError
from faceparse.training.config import Settings, SettingsError
from faceparse.training.distributed import Processes
from faceparse.training.runs import default_out, run, train_chain


def parse_arguments():
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--stage", type=int, choices=(1, 2), help="2: a part of the face, by --part"
    )
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--part", choices=PARTS, help="with --stage 2: --model part --view PART")
    task.add_argument(
        "--points", action="store_true", help="the key points: --model points --view box"
    )
    task.add_argument(
        "--all", action="store_true", help="all networks of the two stages, into one face parser"
    )
    parser.add_argument(
        "--jobs",
        type=cli.number(int, 1, 64),
        help="with --all: trainings at a time; default: 1",
    )
    parser.add_argument(
        "--config", metavar="FILE", type=cli.path, help="a TOML file of settings; options win"
    )
    config.add_options(parser, without=["mix"])
    parser.add_argument(
        "--mix",
        metavar="NAME=DIR",
        action="append",
        default=[],
        type=mixed_set,
        help="train on the training faces of this set too; may be repeated",
    )
    cli.add_data_arguments(parser)
    parser.add_argument("--out", type=cli.path, help="default: the next free runs/DATASET-MODEL")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument(
        "--workers",
        type=cli.number(int, 0, 256),
        default=0,
        help="processes that make the batches; default: 0, this one does",
    )
    parser.add_argument("--tensorboard", action="store_true", help="log to OUT/tensorboard too")
    args = parser.parse_args()
    if (args.stage == 2) != (args.part is not None):
        parser.error("--stage 2 and --part PART go together")
    if args.stage == 1 and args.points:
        parser.error("--stage 1 and --points do not go together")
    if args.jobs is not None and not args.all:
        parser.error("--jobs goes with --all")
    return args


def named_task(args, given):
    """The settings with those that --part or --points stands for.

    Raises:
        SettingsError: the command line or the file says otherwise.
    """
    task = {}
    if args.part:
        task = {"model": "part", "view": args.part}
    elif args.points:
        task = {"model": "points", "view": "box"}
    for name, value in task.items():
        if given.get(name, value) != value:
            named = f"--part {args.part}" if args.part else "--points"
            option = config.option(name)
            raise SettingsError(f"{named} means {option} {value}, not {given[name]}")
    return given | task


def mixed_set(text):
    """An argparse type: (name, root) of a data set; one that is drawn needs no root."""
    name, _, root = text.partition("=")
    if name not in DATASETS:
        known = ", ".join(DATASETS)
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR with NAME one of {known}")
    if not root and hasattr(DATASETS[name], "find"):
        raise argparse.ArgumentTypeError(f"{text!r} needs the folder of {name}: {name}=DIR")
    return name, root or None


def main():
    args = parse_arguments()
    cli.require("matplotlib")  # for the pictures at the end of a training
    given = config.read_file(args.config) if args.config else {}
    given = named_task(args, given | config.given_options(args))
    names = ",".join(name for name, _ in args.mix)
    if args.all:
        train_chain(args, given)
        return
    if given.get("mix", names) != names:
        raise SettingsError(f"the file mixes {given['mix']!r}: name them with --mix NAME=DIR")
    given["mix"] = names
    processes = Processes()
    out = args.out or default_out(Settings(**given), resume=args.resume)
    if args.resume and not (out / "last.pt").is_file():
        raise CheckpointError(f"no checkpoint at {out / 'last.pt'}")
    # The first process writes, and so it alone holds the folder.
    with checkpoint.claimed(out) if processes.first else contextlib.nullcontext():
        run(args, given, out, processes)


if __name__ == "__main__":
    sys.exit(cli.exit_code(main))
