"""Every row of a table of the paper, measured, and the table written."""

import json
import time
from pathlib import Path

import torch
from tqdm import tqdm

from faceparse import cli
from faceparse.console import say
from faceparse.data import DataError, geometry
from faceparse.inference import face_parser, postprocess
from faceparse.inference.face_crops import FRAME, FRAME_TO_FACE, SIDE, Layout, frame_of, how_to_open
from faceparse.inference.face_parser import FaceParser
from faceparse.training import checkpoint
from faceparse.training.jobs import Job, config_file

from . import evaluation, plots, table3_metrics

PICTURED = 6


def folder_of(root, dataset):
    """ROOT/DATASET where there is such a folder, else ROOT itself."""
    return root / dataset if (root / dataset).is_dir() else root


def jobs_of(table, root, rows):
    """By row, the job of each of its networks, by role; two rows may need the same."""
    needed = {}
    for key in rows:
        row = table.rows[key]
        configs = row.config if isinstance(row.config, dict) else {"": row.config}
        needed[key] = {}
        for role, file in configs.items():
            name, where = Path(file).name, folder_of(root, table.dataset)
            if row.dataset is not None:
                name, where = f"{name}-{row.dataset}", root / row.dataset
            needed[key][role] = Job(name, config_file(file), where)
    return needed


def measure(args, table, needed):
    """The result of every row of a table of the first stage, and what the figure shows.

    Returns:
        results by row, the test faces, labels of the first ``PICTURED`` by row's name in print, and
        the gate map of RNN-G, or None.
    """
    faces = {}

    def faces_of(split):
        if split not in faces:
            faces[split] = cli.open_faces(
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
    for key, networks in tqdm(needed.items(), "rows", disable=None):
        row = table.rows[key]
        (job,) = networks.values()
        path = args.out / job.name / "best.pt"
        state = checkpoint.load(path)
        model = evaluation.load_model(state, args.device, path=path)
        result = evaluation.summary_of(
            row.parser, model, test, state, table.dataset, faces_of, path
        )
        parse = parse_function(row.parser, model, path, state, faces_of)
        result["frames_per_second"] = round(frames_per_second(parse, test.images), 1)
        results[key] = result
        shown = test.images[:PICTURED]
        columns[row.title] = parse(shown)
        if key == "rnn-g":
            _, gate = evaluation.predict(model, shown)
    return results, test, columns, gate


def measure_chain(args, table, needed):
    """The same of a table whose rows are both stages; and the errors of the key points."""
    faces = cli.open_faces(
        args,
        table.dataset,
        "test",
        root=folder_of(args.root, table.dataset),
        limit=args.limit,
        **how_to_open("face", "fine"),
    )
    if not len(faces.images):
        raise DataError(f"{table.dataset}: no usable face in the test split")
    results, columns, errors = {}, {}, None
    for key, networks in tqdm(needed.items(), "rows", disable=None):
        paths = {role: args.out / t.name / "best.pt" for role, t in networks.items()}
        states = {role: checkpoint.load(path) for role, path in paths.items()}
        if key == "two-stage":
            face_parser.save(args.out, states)
        models = {
            role: evaluation.load_model(state, args.device, path=paths[role])
            for role, state in states.items()
        }
        parser = FaceParser.of(models, Layout.of(states["face"]["layout"]), device=args.device)
        located = table3_metrics.locate(parser, faces)
        errors = located.errors(faces)
        results[key] = {
            "parameters": sum(p.numel() for m in models.values() for p in m.parameters()),
            "detected": located.detected,
            "error": {"mean": errors.nanmean().item()},
            **table3_metrics.measure(parser, faces, located.points),
            "true_points": table3_metrics.measure(
                parser, faces, table3_metrics.true_points(parser, faces)
            ),
        }
        results[key]["frames_per_second"] = round(aligned_frames_per_second(parser, faces), 1)
        columns[table.rows[key].title] = torch.stack(
            [
                parser(image, points=p).labels
                for image, p in zip(faces.images[:PICTURED], located.points[:PICTURED], strict=True)
            ]
        )
    plots.save_error_curve(args.out / "points.png", errors)
    return results, faces, columns, None


def aligned_frames_per_second(parser, faces):
    """Of both stages alone, from an aligned picture of the first stage's size."""
    points = parser.layout.shape * (SIDE / FRAME)
    frame = frame_of(table3_metrics.true_points(parser, faces)[0], parser.layout)
    m = geometry.compose(FRAME_TO_FACE, frame)
    picture = geometry.view(faces.images[0], m, (SIDE, SIDE)).to(torch.uint8)
    return frames_per_second(lambda image: parser(image[0], points=points), picture[None])


def parse_function(name, model, path, state, faces_of):
    """images (N, 3, H, W) uint8 to labels, by a parser's name."""
    if postprocess.PARSERS[name][1] is None:
        return lambda images: evaluation.predict(model, images)[0]
    parse, _ = postprocess.make(name, model, lambda: faces_of("validation"), path=path, state=state)
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
    head = ["%"] + [table.rows[key].title for key in results] + list(table.others)
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for i, measure in enumerate(table.measures):
        cells = [measure if measure == "accuracy" else f"F-{measure}"]
        for key, result in results.items():
            value = result["accuracy"] if measure == "accuracy" else result["f"][measure]
            ours = "-" if value is None else f"{100 * value:.2f}"
            paper = table.rows[key].printed
            cells.append(ours if paper is None else f"{ours} ({paper[i]:.2f})")
        cells += [f"({printed[i]:.2f})" for printed in table.others.values()]
        lines.append("| " + " | ".join(cells) + " |")
    facts = {"parameters": "parameters", "frames_per_second": "frames/s, batch 1"}
    for fact, label in facts.items():
        cells = [label] + [f"{result[fact]:,}" for result in results.values()]
        cells += ["-"] * len(table.others)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_table(args, table, results, test, columns, gate, *, whole):
    """table.json, table.md and table.png; of some rows only, with their names instead of table."""
    stem = "table" if whole else ",".join(results)
    text = (
        f"# {table.title}: ours (the paper's)\n\n{as_markdown(table, results)}\n{table.remark} "
        f"Frames/s on {args.device}, {torch.get_num_threads()} threads, "
        f"PyTorch {torch.__version__}.\n"
    )
    write = checkpoint.write_atomically
    write(args.out / f"{stem}.json", (json.dumps(results, indent=2) + "\n").encode())
    write(args.out / f"{stem}.md", text.encode())
    plots.save_faces(
        args.out / f"{stem}.png",
        test.images[:PICTURED],
        {"truth": test.labels[:PICTURED], **columns},
        gate,
        label_set=test.label_set,
    )
    say(*text.splitlines(), f"results in {args.out}")
