"""Train a first-stage face parser: train.py, without arguments, learns synthetic faces with RNN-G.

Writes to --out: checkpoint.pt (after every epoch), metrics.json, faces.png, losses.png.
"""

import json
import math
import os
import sys
import time
from pathlib import Path

# PyTorch allocates and frees maps of tens of megabytes in every step. On huge pages the kernel
# hands them out faster: a tenth of a step at batches of 10, a quarter at 40. Read by torch once.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import checkpoint
import evaluate
import pictures
import torch
from checkpoint import CheckpointError
from datasets import SPLITS, DataError, open_dataset
from losses import parser_losses
from metrics import accuracy
from models import MODELS, build_model
from tqdm import tqdm
from transforms import augment

DEFAULTS = {"dataset": "synthetic", "model": "rnn-g", "limit": None, "seed": 0}
DEFAULTS |= {"batch_size": 10, "lr": 4e-3}
EPOCHS = {"synthetic": 20, "lfw-pl": 30}
WARM_UP = 50  # steps
AVERAGING = 8  # the average spans about the last 1 / (AVERAGING + 1) of all steps so far
VALIDATED = 200  # faces, at most, measured after each epoch
PICTURED = 6


def new_state(settings):
    """A training that has not begun, as ``checkpoint.save`` takes it."""
    torch.manual_seed(settings["seed"])
    model = build_model(settings["model"], len(settings["classes"]))
    generator = torch.Generator().manual_seed(settings["seed"])
    return {
        "settings": settings,
        "epoch": 0,
        "step": 0,
        "seconds": 0.0,  # in train_epoch
        "history": [],
        "model": model.state_dict(),
        "average": {name: value.clone() for name, value in model.state_dict().items()},
        "optimizer": torch.optim.Adam(model.parameters()).state_dict(),
        "generator": generator.get_state(),
        "global_generator": torch.get_rng_state(),
    }


def train(state, train_faces, validation_faces, *, epochs, device, save):
    """Continue ``state`` to ``epochs`` epochs.

    No step depends on how many are to follow: the learning rate is constant after the warm-up, and
    in place of a decay the weights are averaged. So a run that was cut off, and one that is made
    longer, give the very bits of one straight run (on the CPU, same number of threads).

    Args:
        state: from :func:`new_state` or ``checkpoint.load``; brought up to date in place.
        train_faces, validation_faces: ``datasets.Faces``.
        save: called with the state after every epoch.

    Raises:
        CheckpointError: the state does not fit its own settings.
        FloatingPointError: the loss of an epoch is not finite; the epoch is not saved.
    """
    settings = state["settings"]
    model = build_model(settings["model"], len(settings["classes"])).to(device)
    average = build_model(settings["model"], len(settings["classes"])).to(device)
    optimizer = torch.optim.Adam(model.parameters())
    generator = torch.Generator()
    try:
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        words = " ".join(str(error).split())
        raise CheckpointError(
            f"the checkpoint's state does not fit its settings: {words}"
        ) from None
    torch.set_rng_state(state["global_generator"])

    for epoch in range(state["epoch"] + 1, epochs + 1):
        start = time.perf_counter()
        step, losses = train_epoch(
            model,
            average,
            optimizer,
            train_faces,
            settings=settings,
            step=state["step"],
            generator=generator,
            title=f"epoch {epoch}/{epochs}",
        )
        seconds = time.perf_counter() - start
        if not all(map(math.isfinite, losses.values())):
            raise FloatingPointError(f"epoch {epoch}: the loss is not finite ({losses})")
        row = dict(losses)
        if len(validation_faces.images):
            row["validation"] = accuracy(evaluate.confusion(average, validation_faces))
        state.update(
            epoch=epoch,
            step=step,
            seconds=state["seconds"] + seconds,
            history=[*state["history"], row],
            model=model.state_dict(),
            average=average.state_dict(),
            optimizer=optimizer.state_dict(),
            generator=generator.get_state(),
            global_generator=torch.get_rng_state(),
        )
        save(state)
        print(f"epoch {epoch}/{epochs}  " + "  ".join(f"{k} {v:.4f}" for k, v in row.items()))


def train_epoch(model, average, optimizer, faces, *, settings, step, generator, title):
    """One pass over ``faces``; returns the step count and the mean losses by name."""
    device = next(model.parameters()).device
    totals = {}
    batches = torch.randperm(len(faces.images), generator=generator).split(settings["batch_size"])
    for chosen in tqdm(batches, title, leave=False, disable=None):
        images, labels, _ = augment(
            faces.images[chosen].to(device),
            faces.labels[chosen].to(device),
            label_set=faces.label_set,
            generator=generator,
        )
        step += 1
        for group in optimizer.param_groups:
            group["lr"] = settings["lr"] * min(1, step / WARM_UP)
        losses = parser_losses(model(images), labels, generator=generator)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        update_average(average, model, step)
        for name, loss in losses.items():
            totals[name] = totals.get(name, 0) + loss.detach() * len(chosen)
    return step, {name: total.item() / len(faces.images) for name, total in totals.items()}


@torch.no_grad()
def update_average(average, model, step):
    """Polynomial-decay averaging: the weight of a step is proportional to about step ** 8."""
    share = (AVERAGING + 1) / (AVERAGING + step)
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), share)


def write_results(out, state, test_faces, *, device):
    """metrics.json, faces.png and losses.png; returns what metrics.json holds."""
    model = evaluate.load_model(state, device, path=out / "checkpoint.pt")
    result = evaluate.summary(model, test_faces, state, state["settings"]["dataset"])
    text = json.dumps(result, indent=2) + "\n"
    checkpoint.write_atomically(out / "metrics.json", text.encode())
    images = test_faces.images[:PICTURED]
    predicted, gate = evaluate.predict(model, images)
    pictures.save_faces(
        out / "faces.png",
        images,
        test_faces.labels[:PICTURED],
        predicted,
        gate,
        label_set=test_faces.label_set,
    )
    pictures.save_losses(out / "losses.png", state["history"])
    return result


def parse_arguments():
    parser = evaluate.Parser(description=__doc__.splitlines()[0])
    evaluate.add_data_arguments(parser)
    number = evaluate.number
    parser.add_argument("--model", choices=MODELS, help="default: rnn-g")
    parser.add_argument("--epochs", type=number(int, 1), help=f"default: {EPOCHS}")
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 1), help="default: 0")
    parser.add_argument("--batch-size", type=number(int, 1, 2**20), help="default: 10")
    parser.add_argument("--lr", type=number(float, 1e-9, 1e3), help="of Adam; default: 4e-3")
    parser.add_argument("--out", type=Path, help="default: the next free runs/DATASET-MODEL")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    return parser.parse_args()


def default_out(dataset, model, *, resume):
    """The first runs/DATASET-MODEL[-2, -3, ...] without a checkpoint; to resume, the one before."""
    names = [f"{dataset}-{model}"]
    while (Path("runs") / names[-1] / "checkpoint.pt").exists():
        names.append(f"{dataset}-{model}-{len(names) + 1}")
    return Path("runs") / names[-2 if resume and len(names) > 1 else -1]


def open_run(args):
    """The folder and the state to continue, None for a new run, after all checks on the two."""
    given = {name: getattr(args, name) for name in DEFAULTS}
    out = args.out or default_out(
        given["dataset"] or DEFAULTS["dataset"],
        given["model"] or DEFAULTS["model"],
        resume=args.resume,
    )
    path = out / "checkpoint.pt"
    if not args.resume:
        if path.exists():
            raise CheckpointError(f"{path} exists: add --resume, or choose another --out")
        return out, None
    state = checkpoint.load(path)
    # An option left out means "as before"; one given must say what was trained with.
    for name, value in given.items():
        before = state["settings"].get(name)
        if value is not None and value != before:
            option = "--" + name.replace("_", "-")
            raise CheckpointError(f"{path} was trained with {option} {before}, not {value}")
    if args.epochs is not None and args.epochs < state["epoch"]:
        raise CheckpointError(
            f"{path} has {state['epoch']} epochs, more than --epochs {args.epochs}"
        )
    return out, state


def main():
    args = parse_arguments()
    out, state = open_run(args)
    settings = (
        dict(state["settings"])
        if state
        else DEFAULTS
        | {name: getattr(args, name) for name in DEFAULTS if getattr(args, name) is not None}
    )
    dataset = settings["dataset"]
    faces = {}
    for split in SPLITS:
        limit = settings["limit"]
        if split == "validation":
            limit = min(limit or VALIDATED, VALIDATED)
        faces[split] = open_dataset(dataset, args.root, split, limit=limit, skip_bad=args.skip_bad)
        if not len(faces[split].images) and split != "validation":
            raise DataError(f"{dataset}: no usable face in the {split} split")
    count = len(faces["train"].images)

    if state is None:
        settings["epochs"] = args.epochs or EPOCHS[dataset]
        settings["faces"] = count
        settings["classes"] = list(faces["train"].label_set.names)
        state = new_state(settings)
        out.mkdir(parents=True, exist_ok=True)
        checkpoint.save(out / "checkpoint.pt", state)
    elif settings["faces"] != count:
        raise CheckpointError(
            f"{out / 'checkpoint.pt'} was trained on {settings['faces']} faces, here are {count}"
        )
    elif args.epochs:
        state["settings"]["epochs"] = args.epochs

    train(
        state,
        faces["train"],
        faces["validation"],
        epochs=state["settings"]["epochs"],
        device=args.device,
        save=lambda state: checkpoint.save(out / "checkpoint.pt", state),
    )
    print(evaluate.as_text(write_results(out, state, faces["test"], device=args.device)))
    print(f"results in {out}")
    evaluate.report_skipped(*faces.values())


if __name__ == "__main__":
    sys.exit(evaluate.exit_code(main))
