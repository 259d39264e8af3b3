"""Train a first-stage face parser: train.py, without arguments, learns synthetic faces with RNN-G.

Writes to --out: last.pt (at least after every epoch), best.pt (the best on the validation faces),
metrics.json, faces.png, losses.png.
"""

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path

# PyTorch allocates and frees maps of tens of megabytes in every step. On huge pages the kernel
# hands them out faster: a tenth of a step at batches of 10, a quarter at 40. Read by torch once.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import checkpoint
import commands
import evaluate
import face_parser
import fine
import pictures
import settings as settings_module
from checkpoint import CheckpointError
from console import say
from datasets import DATASETS, DRAWN, FINE, SPLITS, DataError
from models import PointsNet
from processes import Processes
from settings import Settings, SettingsError
from training import new_state, train
from trainings import Training, config, train_all
from views import PARTS, Layout, how_to_open, make_view

VALIDATED = 200  # faces, at most, measured after each epoch
PICTURED = 6


def write_results(out, state, faces, *, device):
    """metrics.json, faces.png and losses.png, of the best weights; returns what the first holds."""
    path, test = out / "best.pt", faces["test"]
    best = checkpoint.load(path)
    model = evaluate.load_model(best, device, path=path)
    settings = state["settings"]
    result = evaluate.summary_of(
        settings["model"], model, test, best, settings["dataset"], faces.get, path
    )
    result["seconds"] = round(state["seconds"], 2)
    result["epochs"] = state["epoch"]
    text = json.dumps(result, indent=2) + "\n"
    checkpoint.write_atomically(out / "metrics.json", text.encode())
    images = test.images[:PICTURED]
    if isinstance(model, PointsNet):
        points = {"truth": test.points, "prediction": evaluate.predict_points(model, test.images)}
        pictures.save_points(out / "faces.png", test.images, points, shown=PICTURED)
    else:
        predicted, gate = evaluate.predict(model, images)
        pictures.save_faces(
            out / "faces.png",
            images,
            {"truth": test.labels[:PICTURED], "prediction": predicted},
            gate,
            label_set=test.label_set,
        )
    pictures.save_losses(out / "losses.png", state["history"])
    return result


class TensorBoard:
    """Writes the history to OUT/tensorboard, if asked to and if TensorBoard is installed."""

    def __init__(self, folder, *, history):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise SettingsError("--tensorboard needs the package tensorboard") from None
        try:
            self.writer = SummaryWriter(str(folder), purge_step=len(history) + 1)
        except UnicodeEncodeError:
            raise SettingsError(f"--tensorboard needs --out in UTF-8, got {folder}") from None

    def write(self, state):
        for name, value in state["history"][-1].items():
            self.writer.add_scalar(name, value, state["epoch"])
        self.writer.flush()


def parse_arguments():
    parser = commands.Parser(description=__doc__.splitlines()[0])
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
        type=commands.number(int, 1, 64),
        help="with --all: trainings at a time; default: 1",
    )
    parser.add_argument(
        "--config", metavar="FILE", type=commands.path, help="a TOML file of settings; options win"
    )
    settings_module.add_options(parser, without=["mix"])
    parser.add_argument(
        "--mix",
        metavar="NAME=DIR",
        action="append",
        default=[],
        type=mixed_set,
        help="train on the training faces of this set too; may be repeated",
    )
    commands.add_data_arguments(parser)
    parser.add_argument(
        "--out", type=commands.path, help="default: the next free runs/DATASET-MODEL"
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument(
        "--workers",
        type=commands.number(int, 0, 256),
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
            option = settings_module.option(name)
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


def default_out(wanted, *, resume):
    """The first runs/DATASET[-VIEW]-MODEL[-2, -3, ...] without a checkpoint; to resume, the last.

    Args:
        wanted: ``Settings``.
    """
    what = wanted.model if wanted.view in ("whole", "box") else f"{wanted.view}-{wanted.model}"
    names = [f"{wanted.dataset}-{what}"]
    while (Path("runs") / names[-1] / "last.pt").exists():
        names.append(f"{names[0]}-{len(names) + 1}")
    return Path("runs") / names[-2 if resume and len(names) > 1 else -1]


def open_run(args, given, out):
    """The state to continue, None for a new run, after all checks on the two.

    Args:
        args: of the command line.
        given: the settings that the command line or the file names.
        out: the folder.
    """
    path = out / "last.pt"
    if not args.resume:
        if path.exists():
            raise CheckpointError(f"{path} exists: add --resume, or choose another --out")
        return None
    state = checkpoint.load(path)
    before = state["settings"]
    # A setting left out means "as before"; one given must say what was trained with.
    for name, value in given.items():
        option = settings_module.option(name)
        if value == before[name]:
            continue
        if name == "epochs" and before["schedule"] != "constant":
            raise CheckpointError(
                f"{path} was trained with {option} {before[name]} and a {before['schedule']} "
                f"schedule, which cannot be made longer: not {value}"
            )
        if name == "epochs" and value >= state["epoch"]:
            before["epochs"] = value
        elif name == "epochs":
            raise CheckpointError(f"{path} has {state['epoch']} epochs, more than {option} {value}")
        else:
            words = [repr(v) if v == "" else v for v in (before[name], value)]
            raise CheckpointError(f"{path} was trained with {option} {words[0]}, not {words[1]}")
    return state


def open_splits(args, settings):
    """The three splits; all are read now, so that a bad file is found now."""
    faces = {}
    for split in SPLITS:
        limit = settings.limit
        if split == "validation":
            limit = min(limit or VALIDATED, VALIDATED)
        mix = args.mix if split == "train" else ()
        faces[split] = commands.open_faces(
            args,
            settings.dataset,
            split,
            limit=limit,
            mix=mix,
            **how_to_open(settings.view, settings.labels),
        )
        if not len(faces[split].images) and split != "validation":
            raise DataError(f"{settings.dataset}: no usable face in the {split} split")
    return faces


def main():
    args = parse_arguments()
    given = settings_module.read_file(args.config) if args.config else {}
    given = named_task(args, given | settings_module.given_options(args))
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


def train_chain(args, given):
    """All that ``FaceParser`` needs, trained or gone on with; it lies in OUT/face_parser.pt then.

    Raises:
        SettingsError: a setting that each network has of its own, or an option of one training.
    """
    for name in ("model", "view", "labels"):
        if name in given:
            raise SettingsError(f"--all has a {settings_module.option(name)} for each network")
    for name in ("config", "resume", "tensorboard", "mix", "workers"):
        if getattr(args, name):
            raise SettingsError(f"--all and --{name} do not go together")
    dataset = given.get("dataset", "helen")
    if args.root is None and dataset not in DRAWN:
        raise SettingsError(f"--root DIR is needed: the folder that holds {dataset}")
    if getattr(DATASETS[dataset], "TABLE", FINE).fine is None:
        raise SettingsError(f"--all needs eleven classes, and {dataset} has three")
    args.out, args.jobs = args.out or Path("runs") / f"{dataset}-face-parser", args.jobs or 1
    needed = {
        name: Training(name, config(f"table-3/{name}"), args.root) for name in face_parser.NETWORKS
    }
    with checkpoint.claimed(args.out):
        train_all(args, needed.values(), given)
        states = {name: checkpoint.load(args.out / name / "best.pt") for name in needed}
        path = face_parser.save(args.out, states)
        parser = face_parser.FaceParser.load(args.out, device=args.device)
        faces = commands.open_faces(
            args, dataset, "test", limit=given.get("limit"), **how_to_open("face", "fine")
        )
        result = {"dataset": dataset, "faces": len(faces.images), **fine.summary(parser, faces)}
        text = json.dumps(result, indent=2) + "\n"
        checkpoint.write_atomically(args.out / "metrics.json", text.encode())
    say(*evaluate.as_lines(result))
    say(f"face parser in {path}, {path.stat().st_size / 1e6:.2f} MB")


def run(args, given, out, processes):
    """Train as the command line says, in a folder that is this process's own."""
    device = processes.device(args.device)
    state = open_run(args, given, out)
    settings = Settings(**(state["settings"] if state else given))
    if (settings.view == "box") != (settings.model == "points"):
        raise SettingsError(
            "--view box and --model points go together, "
            f"got --view {settings.view} --model {settings.model}"
        )
    with processes.connected(device):
        faces = open_splits(args, settings)
        layout = Layout.of(state["layout"]) if state and state["layout"] else None
        view = make_view(settings.view, faces["train"], labels=settings.labels, layout=layout)
        stills = {split: view.still(faces[split]) for split in ("validation", "test")}
        count = len(faces["train"].images)
        facts = view.facts()
        if count < processes.world:
            raise DataError(f"{count} training faces are too few for {processes.world} processes")
        board = None

        def save(state, *, best):
            if processes.first:
                if best:  # first: a kill in between leaves last.pt one epoch behind, to be redone
                    checkpoint.save(out / "best.pt", state)
                checkpoint.save(out / "last.pt", state)
                if board and state["batch"] == 0 and state["history"]:
                    board.write(state)

        if state is None:
            state = new_state(settings, facts, faces=count, world=processes.world)
            save(state, best=True)
        for name, value in {**facts, "faces": count, "world": processes.world}.items():
            if state[name] != value:
                words = "processes" if name == "world" else name
                raise CheckpointError(
                    f"{out / 'last.pt'} was trained with {words} {state[name]}, here: {value}"
                )
        if args.tensorboard and processes.first:
            board = TensorBoard(out / "tensorboard", history=state["history"])
        train(
            state,
            faces["train"],
            stills["validation"],
            view=view,
            device=device,
            save=save,
            processes=processes,
            workers=args.workers,
        )
    if processes.first:
        say(*evaluate.as_lines(write_results(out, state, stills, device=device)))
        say(f"results in {out}")
        commands.report_skipped(*faces.values())


if __name__ == "__main__":
    sys.exit(commands.exit_code(main))
