"""Train and measure every row of a table of the paper: reproduce.py --table 1 --root DIR.

Writes to --out: a folder for each training, table.json, table.md and table.png (the labels of each
row). Run again, it goes on where it was stopped.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import checkpoint
import commands
import evaluate
import parsers
import pictures
import torch
from checkpoint import CheckpointError
from datasets import DataError
from tables import MEASURES, TABLES
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
PICTURED = 6
POLL_SECONDS = 0.2


class Training(NamedTuple):
    """One call of train.py."""

    name: str  # of its folder
    config: Path
    root: Path


def folder_of(root, dataset):
    """ROOT/DATASET where there is such a folder, else ROOT itself."""
    return root / dataset if (root / dataset).is_dir() else root


def trainings(table, root, rows):
    """The training that each of these rows needs; two rows may need the same."""
    needed = {}
    for key in rows:
        row = table.rows[key]
        name = Path(row.config).name
        if row.dataset is None:
            where = folder_of(root, table.dataset)
        else:
            name, where = f"{name}-{row.dataset}", root / row.dataset
        needed[key] = Training(name, HERE / "configs" / f"{row.config}.toml", where)
    return needed


def start(args, training):
    """train.py for one training, or to go on with it, in a process of its own."""
    out = args.out / training.name
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(HERE / "train.py"), "--config", str(training.config)]
    command += ["--root", str(training.root), "--out", str(out)]
    command += ["--device", str(args.device), "--cache", str(args.cache)]
    for name in ("epochs", "limit"):
        if getattr(args, name) is not None:
            command += [f"--{name}", str(getattr(args, name))]
    for name in ("skip_bad", "no_cache"):
        if getattr(args, name):
            command.append("--" + name.replace("_", "-"))
    if (out / "last.pt").exists():
        command.append("--resume")
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with open(out / "log.txt", "ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def check_epochs(args, needed):
    """CheckpointError before anything is trained, if a training cannot be made as long as asked."""
    for training in needed.values():
        path = args.out / training.name / "last.pt"
        if args.epochs is None or not path.exists():
            continue
        before = checkpoint.load(path)["settings"]
        if before["schedule"] != "constant" and before["epochs"] != args.epochs:
            raise CheckpointError(
                f"{path} was trained with --epochs {before['epochs']} and a {before['schedule']} "
                f"schedule, which cannot be made {args.epochs}: choose another --out"
            )


def train_all(args, needed):
    """Train what is not trained yet, ``args.jobs`` at a time.

    Raises:
        CheckpointError: names the first that failed. The others are stopped, and save first.
    """
    waiting = list(dict.fromkeys(needed.values()))
    running = {}
    bar = tqdm(desc="trainings", total=len(waiting), disable=None)
    try:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                training = waiting.pop(0)
                running[training] = start(args, training)
            time.sleep(POLL_SECONDS)
            for training, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[training]
                bar.update()
                if process.returncode:
                    log = args.out / training.name / "log.txt"
                    lines = log.read_text(errors="replace").splitlines()
                    last = lines[-1] if lines else "no output"
                    if process.returncode < 0:
                        last = f"ended by signal {-process.returncode}"
                    raise CheckpointError(f"training {training.name} failed ({log}): {last}")
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        bar.close()


def measure(args, table, needed):
    """The result of every row, and what the figure shows.

    Returns:
        results by row, the test faces, labels of the first ``PICTURED`` by row's name in print, and
        the gate map of RNN-G, or None.
    """
    faces = {}

    def faces_of(split):
        if split not in faces:
            faces[split] = commands.open_faces(
                args,
                table.dataset,
                split,
                root=folder_of(args.root, table.dataset),
                limit=args.limit,
            )
            if not len(faces[split].images):
                raise DataError(f"{table.dataset}: no usable face in the {split} split")
        return faces[split]

    test = faces_of("test")
    results, columns, gate = {}, {}, None
    for key, training in tqdm(needed.items(), "rows", disable=None):
        row = table.rows[key]
        path = args.out / training.name / "best.pt"
        state = checkpoint.load(path)
        model = evaluate.load_model(state, args.device, path=path)
        result = evaluate.summary_of(row.parser, model, test, state, table.dataset, faces_of, path)
        parse = parse_function(row.parser, model, path, state, faces_of)
        result["frames_per_second"] = round(frames_per_second(parse, test.images), 1)
        results[key] = result
        shown = test.images[:PICTURED]
        columns[row.title] = parse(shown)
        if key == "rnn-g":
            _, gate = evaluate.predict(model, shown)
    return results, test, columns, gate


def parse_function(name, model, path, state, faces_of):
    """images (N, 3, H, W) uint8 to labels, by a parser's name."""
    if parsers.PARSERS[name][1] is None:
        return lambda images: evaluate.predict(model, images)[0]
    parse, _ = parsers.make(name, model, lambda: faces_of("validation"), path=path, state=state)
    return parse


def frames_per_second(parse, images, *, seconds=2.0):
    """One image at a time, labels included; the median over at most ``seconds``."""
    times, end = [], time.perf_counter() + seconds
    for i in range(10_000):
        image = images[i % len(images)][None]
        start = time.perf_counter()
        parse(image)
        times.append(time.perf_counter() - start)
        if times[-1] + start > end and i >= 3:
            break
    return 1 / torch.tensor(times).median().item()


def as_markdown(table, results):
    """The table: ours, and the paper's in brackets."""
    head = ["%"] + [table.rows[key].title for key in results]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for i, measure in enumerate(MEASURES):
        cells = [measure if measure == "accuracy" else f"F-{measure}"]
        for key, result in results.items():
            value = result["accuracy"] if measure == "accuracy" else result["f"][measure]
            ours = "-" if value is None else f"{100 * value:.2f}"
            paper = table.rows[key].printed
            cells.append(ours if paper is None else f"{ours} ({paper[i]:.2f})")
        lines.append("| " + " | ".join(cells) + " |")
    for fact, label in (("parameters", "parameters"), ("frames_per_second", "frames/s, batch 1")):
        cells = [label] + [f"{result[fact]:,}" for result in results.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main():
    parser = commands.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", choices=TABLES, required=True)
    commands.add_data_arguments(parser)
    parser.add_argument("--epochs", type=commands.number(int, 1), help="default: the configs'")
    parser.add_argument("--limit", type=commands.number(int, 1), help="use N images of each split")
    parser.add_argument(
        "--jobs",
        type=commands.number(int, 1, 64),
        default=1,
        help="trainings at a time; default: 1",
    )
    parser.add_argument("--rows", nargs="+", help="some rows only")
    parser.add_argument("--out", type=Path, help="default: runs/table-N")
    args = parser.parse_args()
    if args.root is None:
        parser.error("--root DIR is needed: the folder that holds the data sets")
    table = TABLES[args.table]
    rows = args.rows or list(table.rows)
    for row in rows:
        if row not in table.rows:
            parser.error(f"--rows: table {args.table} has {', '.join(table.rows)}; got {row!r}")
    args.root = Path(args.root)
    args.out = args.out or Path("runs") / f"table-{args.table}"
    needed = trainings(table, args.root, rows)
    for row, training in needed.items():
        if not training.root.is_dir():
            raise DataError(
                f"{table.rows[row].title} needs {training.root}, and there is no such folder"
            )
    # As Ctrl-C, so that the trainings are stopped, too.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with checkpoint.claimed(args.out):
            check_epochs(args, needed)
            train_all(args, needed)
            write_table(args, table, *measure(args, table, needed), whole=rows == list(table.rows))
    finally:
        signal.signal(signal.SIGTERM, before)


def write_table(args, table, results, test, columns, gate, *, whole):
    """table.json, table.md and table.png; of some rows only, with their names in place of table."""
    stem = "table" if whole else ",".join(results)
    text = (
        f"# {table.title}: ours (the paper's)\n\n{as_markdown(table, results)}\n{table.remark} "
        f"Frames/s on {args.device}, {torch.get_num_threads()} threads, "
        f"PyTorch {torch.__version__}.\n"
    )
    write = checkpoint.write_atomically
    write(args.out / f"{stem}.json", (json.dumps(results, indent=2) + "\n").encode())
    write(args.out / f"{stem}.md", text.encode())
    pictures.save_faces(
        args.out / f"{stem}.png",
        test.images[:PICTURED],
        {"truth": test.labels[:PICTURED], **columns},
        gate,
        label_set=test.label_set,
    )
    print(text)
    print(f"results in {args.out}")


if __name__ == "__main__":
    sys.exit(commands.exit_code(main))
