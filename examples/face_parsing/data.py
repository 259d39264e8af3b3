"""Look at a data set before training on it, or draw photographs to try a parser on."""

import io
import sys
from pathlib import Path

from PIL import Image

from faceparse import cli
from faceparse.console import say
from faceparse.data import (
    DATASETS,
    LABEL_SETS,
    LABELS,
    OWN,
    SPLITS,
    DataError,
    default_folder,
    open_dataset,
    report,
)
from faceparse.inference import image_io
from faceparse.training import checkpoint

ENLARGED = 3  # times, of what is drawn: the cascade finds few of the small ones


def inspect(args):
    """Print what is in a data set, write contact sheets, and end with an error on any problem."""
    source = DATASETS[args.dataset]
    splits = [args.split] if args.split else SPLITS
    labels = args.labels or most_classes(source.TABLE)
    sheets = {split: sheet_path(args, split, several=len(splits) > 1) for split in splits}
    found, problems = {}, []
    for split in splits:
        if hasattr(source, "find"):
            found[split] = source.find(args.root, split)
        faces = open_dataset(
            args.dataset,
            args.root,
            split,
            limit=args.limit,
            labels=labels,
            skip_bad=True,
            cache=None if args.no_cache else default_folder(),
        )
        lines, wrong = report.describe(source, split, faces, found.get(split))
        if len(faces.images):
            checkpoint.write_atomically(sheets[split], report.contact_sheet(faces))
            lines.append(f"contact sheet: {sheets[split]}")
        else:
            wrong.append(f"{args.dataset}: no usable face in the {split} split")
        say(f"{args.dataset}, {split}")
        for line in lines:
            say(f"  {line}")
        for line in wrong:
            say(f"  problem: {line}")
        problems += wrong
    shared = report.overlap(args.dataset, found)
    for line in shared:
        say(f"problem: {line}")
    problems += shared
    if problems and not args.skip_bad:
        raise DataError(f"{args.dataset}: {len(problems)} problems, listed above")


def draw(args):
    """Write synthetic faces of the test split as pictures, enlarged, for want of photographs."""
    faces = open_dataset("synthetic", None, "test", limit=args.count)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise DataError(f"--out must be a folder, {args.out} is not") from None
    for i, image in enumerate(faces.images):
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        buffer = io.BytesIO()
        size = (ENLARGED * picture.width, ENLARGED * picture.height)
        picture.resize(size, Image.Resampling.BICUBIC).save(buffer, "png")
        checkpoint.write_atomically(args.out / f"drawn-{i:03d}.png", buffer.getvalue())
    say(f"{args.count} pictures in {args.out}")


def most_classes(table):
    """The labels to show of a set: fine where there are any, else coarse, else its own."""
    return next((name for name in ("fine", "coarse") if table.into(LABEL_SETS[name])), OWN)


def sheet_path(args, split, *, several):
    """Where the contact sheet of a split goes.

    Raises:
        DataError: that is in the data set's own folder, or would write over another file.
    """
    path = args.out or Path(f"{args.dataset}-{split}.png")
    if path.suffix.lower() != ".png":
        raise DataError(f"--out must be a .png file, got {path}")
    if args.out and several:
        path = path.with_name(f"{path.stem}-{split}{path.suffix}")
    if args.root is not None:
        try:
            root, place = Path(args.root).resolve(), path.resolve()
        except (RuntimeError, OSError) as error:  # a loop of links
            raise DataError(f"cannot use --root {args.root}: {error}") from None
        if root in place.parents:
            raise DataError(f"will not write {path} into the data set's own folder: give --out")
    if not path.parent.is_dir():
        raise DataError(f"no folder {path.parent} to write {path.name} in")
    if path.is_dir() or (args.out is None and path.exists() and not image_io.is_ours(path)):
        raise DataError(f"{path} exists, and this program did not write it: give --out")
    return path


def main():
    parser = cli.Parser(description=__doc__)
    actions = parser.add_subparsers(required=True, metavar="{inspect,draw}")
    command = actions.add_parser("inspect", help="counts, sizes, problems and pictures of a set")
    command.add_argument("--dataset", choices=DATASETS, required=True)
    command.add_argument("--root", metavar="DIR", help="the folder that holds the data set")
    command.add_argument("--split", choices=SPLITS, help="default: all three")
    command.add_argument(
        "--limit", type=cli.number(int, 1), help="open N faces of each split at most"
    )
    command.add_argument("--labels", choices=LABELS, help="default: fine where there are any")
    command.add_argument(
        "--out",
        type=cli.path,
        metavar="FILE.png",
        help="default: DATASET-SPLIT.png in this folder",
    )
    command.add_argument("--no-cache", action="store_true", help="decode anew, write no cache")
    command.add_argument("--skip-bad", action="store_true", help="problems are no failure")
    command.set_defaults(run=inspect)
    command = actions.add_parser("draw", help="synthetic faces as pictures")
    command.add_argument(
        "--out", type=cli.path, metavar="DIR", required=True, help="where they are written"
    )
    command.add_argument(
        "--count", type=cli.number(int, 1, 10_000), default=8, help="how many; default: 8"
    )
    command.set_defaults(run=draw)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    sys.exit(cli.exit_code(main))
