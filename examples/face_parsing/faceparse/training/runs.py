"""One training, or all of a face parser's, from the options to the files in its folder."""

import json
from pathlib import Path

from faceparse import cli
from faceparse.console import say
from faceparse.data import DATASETS, DRAWN, LABEL_SETS, SPLITS, DataError
from faceparse.data.faces import label_set_for
from faceparse.inference import face_parser
from faceparse.inference.face_crops import Layout, how_to_open, make_view, parts_of
from faceparse.models import PointsNet
from faceparse.reporting import evaluation, plots, table3_metrics

from . import checkpoint, config
from .checkpoint import CheckpointError
from .config import Settings, SettingsError
from .jobs import Job, config_file, train_all
from .loop import new_state, train

VALIDATED = 200  # faces, at most, measured after each epoch
PICTURED = 6


def write_results(out, state, faces, *, device):
    """metrics.json, faces.png and losses.png, of the best weights; returns what the first holds."""
    path, test = out / "best.pt", faces["test"]
    best = checkpoint.load(path)
    model = evaluation.load_model(best, device, path=path)
    settings = state["settings"]
    result = evaluation.summary_of(
        settings["model"], model, test, best, settings["dataset"], faces.get, path
    )
    result["seconds"] = round(state["seconds"], 2)
    result["epochs"] = state["epoch"]
    text = json.dumps(result, indent=2) + "\n"
    checkpoint.write_atomically(out / "metrics.json", text.encode())
    images = test.images[:PICTURED]
    if isinstance(model, PointsNet):
        points = {"truth": test.points, "prediction": evaluation.predict_points(model, test.images)}
        plots.save_points(out / "faces.png", test.images, points, shown=PICTURED)
    else:
        predicted, gate = evaluation.predict(model, images)
        plots.save_faces(
            out / "faces.png",
            images,
            {"truth": test.labels[:PICTURED], "prediction": predicted},
            gate,
            label_set=test.label_set,
        )
    plots.save_losses(out / "losses.png", state["history"])
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
        option = config.option(name)
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
        faces[split] = cli.open_faces(
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


def train_chain(args, given):
    """All that ``FaceParser`` needs, trained or gone on with; it lies in OUT/face_parser.pt then.

    Raises:
        SettingsError: a setting that each network has of its own, or an option of one training.
    """
    for name in ("model", "view"):
        if name in given:
            raise SettingsError(f"--all has a {config.option(name)} for each network")
    for name in ("config", "resume", "tensorboard", "mix", "workers"):
        if getattr(args, name):
            raise SettingsError(f"--all and --{name} do not go together")
    dataset = given.get("dataset", "helen")
    if args.root is None and dataset not in DRAWN:
        raise SettingsError(f"--root DIR is needed: the folder that holds {dataset}")
    labels = given.pop("labels", "fine")
    if labels not in LABEL_SETS or not parts_of(LABEL_SETS[labels]):
        raise SettingsError(f"--all needs labels with parts of the face, got --labels {labels}")
    label_set_for(dataset, DATASETS[dataset].TABLE, labels)
    args.out, args.jobs = args.out or Path("runs") / f"{dataset}-face-parser", args.jobs or 1
    needed = {
        name: Job(name, config_file(f"table-3/{name}"), args.root)
        for name in face_parser.networks_of(LABEL_SETS[labels])
    }
    with checkpoint.claimed(args.out):
        train_all(args, needed.values(), given)
        states = {name: checkpoint.load(args.out / name / "best.pt") for name in needed}
        path = face_parser.save(args.out, states, labels=labels)
        parser = face_parser.FaceParser.load(args.out, device=args.device)
        faces = cli.open_faces(
            args, dataset, "test", limit=given.get("limit"), **how_to_open("face", labels)
        )
        result = {
            "dataset": dataset,
            "faces": len(faces.images),
            **table3_metrics.summary(parser, faces),
        }
        text = json.dumps(result, indent=2) + "\n"
        checkpoint.write_atomically(args.out / "metrics.json", text.encode())
    say(*evaluation.as_lines(result))
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
        if processes.first:
            say(f"{len(view.classes)} classes: {', '.join(view.classes)}")
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
        say(*evaluation.as_lines(write_results(out, state, stills, device=device)))
        say(f"results in {out}")
        cli.report_skipped(*faces.values())
