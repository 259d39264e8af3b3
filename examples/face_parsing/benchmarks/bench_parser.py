"""Times the face parsers: frames a second, where the time goes, and a step of training."""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch

EXAMPLE = Path(__file__).resolve().parents[1]
# The face parser's package, and the layer's benchmarks, whose `timing` serves here too.
sys.path[:0] = [str(EXAMPLE), str(EXAMPLE.parents[1] / "benchmarks")]

import chain_contenders  # noqa: E402
import parser_contenders as contenders  # noqa: E402
import timing  # noqa: E402

from faceparse.data.transforms import normalise  # noqa: E402
from faceparse.models import MODELS  # noqa: E402

SECTIONS = ("frames", "layers", "chain", "training")
BATCHES = {128: (1, 32), 512: (1, 4)}
TRAINED = ("cnn-s", "rnn-g")  # the step of the second is compared with that of the first
TRAINING_BATCHES = (10, 40)
# train.py asks for huge pages, which torch reads once; a single frame is slower on them.
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
RESULTS = Path(__file__).resolve().parent / "results"
# What is asked of RNN-G: frames a second, one at a time, with two threads; and its step to CNN-S's.
FRAMES_TARGET = {128: 500, 512: 40}
STEP_TARGET = 1.4
# And of the two stages, with two threads, one face at a time.
CHAIN_TARGET = {chain_contenders.ALIGNED: 300, chain_contenders.FROM_FRAME: 30}


def bench_frames(side, batch, threads, args, pace):
    """Frames a second of every parser in every setting, which take turns.

    Returns:
        (rows, list of what was left out and why)

    Raises:
        contenders.WrongResult: one of them computes something else.
    """
    print(f"\nframes, {side} x {side}, batch {batch}, threads {threads}", flush=True)
    photos = contenders.photographs(side, batch)
    calls, differing, left_out = {}, {}, []
    for name in args.models:
        if name in contenders.REFINED:
            call = contenders.refined(name, side, photos)
            if isinstance(call, str):
                left_out.append(f"{name} at {side}: {call}")
            else:
                calls[name, contenders.PLAIN] = call
            continue
        new, differs, missing = contenders.networks(
            name,
            side,
            photos,
            modes=args.modes,
            layouts=args.layouts,
            dtypes=args.dtypes,
            threads=threads,
        )
        left_out += [f"{name} at {side} {' '.join(at)}: {why}" for at, why in missing.items()]
        calls |= {(name, setting): call for setting, call in new.items()}
        differing |= {(name, setting): share for setting, share in differs.items()}
    rows = []
    for (name, setting), times in timing.measure(calls, **pace).items():
        rows.append(
            {
                "model": name,
                "side": side,
                "batch": batch,
                "threads": threads,
                **setting._asdict(),
                **times.as_dict(),
                "frames": batch / times.median,
                "differs": differing.get((name, setting)),
            }
        )
        print(
            f"  {name:10}{' '.join(setting):34}{times.median * 1e3:10.3f} ms"
            f" [{times.low * 1e3:.3f}, {times.high * 1e3:.3f}]".ljust(78)
            + f"{batch / times.median:9.1f} frames/s",
            flush=True,
        )
    for line in left_out:
        print(f"  left out: {line}")
    torch.compiler.reset()
    return rows, left_out


def bench_layers(name, side, batch, threads, rounds):
    """Where a network's time goes, by kind of layer: medians of ``rounds`` passes, and shares."""
    images = normalise(contenders.photographs(side, batch))
    images = images.contiguous(memory_format=torch.channels_last)
    model = contenders.network(name, side, images)
    contenders.layer_seconds(model, images)  # warm
    passes = [contenders.layer_seconds(model, images) for _ in range(rounds)]
    medians = {part: statistics.median(p[part] for p in passes) for part in passes[0]}
    total = sum(medians.values())
    shares = {part: seconds / total for part, seconds in medians.items()}
    print(
        f"  {name:10}{side} batch {batch} threads {threads}: "
        + ", ".join(f"{part} {share:.0%}" for part, share in by_size(shares).items()),
        flush=True,
    )
    where = {"model": name, "side": side, "batch": batch, "threads": threads}
    return {**where, "seconds": medians, "shares": shares}


def by_size(shares):
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def bench_chain(threads, args, pace):
    """Both stages and what goes before them: each step, then the whole in every setting.

    Returns:
        (rows, list of what was left out and why)

    Raises:
        contenders.WrongResult: a setting computes something else.
    """
    print(f"\ntwo stages, threads {threads}", flush=True)
    steps = chain_contenders.steps()
    plain = contenders.PLAIN
    calls = {(name, plain): call for name, (call, _) in steps.items()}
    settings, differs, missing = chain_contenders.settings(
        modes=args.modes, layouts=args.layouts, dtypes=args.dtypes, threads=threads
    )
    whole = chain_contenders.ALIGNED
    calls |= {(whole, setting): call for setting, call in settings.items() if setting != plain}
    rows = []
    for (name, setting), times in timing.measure(calls, **pace).items():
        faces = steps[name][1]
        rows.append(
            {
                "what": name,
                "faces": faces,
                "threads": threads,
                **setting._asdict(),
                **times.as_dict(),
                "frames": faces / times.median,
                "differs": differs.get(setting) if name == whole else None,
            }
        )
        print(
            f"  {name:32}{' '.join(setting):34}{times.median * 1e3:10.3f} ms"
            f" [{times.low * 1e3:.3f}, {times.high * 1e3:.3f}]{faces / times.median:9.1f} faces/s",
            flush=True,
        )
    left_out = [f"two stages, {' '.join(at)}: {why}" for at, why in missing.items()]
    for line in left_out:
        print(f"  left out: {line}")
    torch.compiler.reset()
    return rows, left_out


def bench_training(batch_size, threads, count, pace):
    """A step of each trained network at side 128, and the batches made for it, in turn."""
    print(f"\ntraining, batch {batch_size}, threads {threads}", flush=True)
    epoch = contenders.epoch(batch_size, count)
    calls = {name: contenders.training_step(name, epoch[0]) for name in TRAINED}
    calls["batches"] = contenders.making_batches(epoch)
    times = timing.measure(calls, **pace)
    rows = []
    for name, each in times.items():
        rows.append(
            {
                "what": name,
                "batch": batch_size,
                "threads": threads,
                **each.as_dict(),
                "images": batch_size / each.median,
                "ratio": each.median / times[TRAINED[0]].median,
            }
        )
        print(
            f"  {name:10}{each.median * 1e3:10.3f} ms [{each.low * 1e3:.3f}, {each.high * 1e3:.3f}]"
            f" {batch_size / each.median:9.1f} images/s {rows[-1]['ratio']:6.2f}x",
            flush=True,
        )
    return rows


def targets(report):
    """(words, what is asked, best measured or None) of each target."""
    found = []
    for side, asked in FRAMES_TARGET.items():
        for dtype in contenders.DTYPES:
            able = [
                each
                for each in report.get("frames", ())
                if (each["model"], each["side"], each["batch"]) == ("rnn-g", side, 1)
                and (each["threads"], each["dtype"]) == (2, dtype)
            ]
            best = max(able, key=lambda each: each["frames"], default=None)
            how = f", {best['mode']} {best['layout']}" if best else ""
            words = f"rnn-g {side} x {side}, batch 1, two threads, {dtype}{how}"
            measured = f"{best['frames']:.0f} frames/s" if best else "-"
            found.append((words, f">= {asked} frames/s", measured))
    for name, asked in CHAIN_TARGET.items():
        able = [
            each
            for each in report.get("chain", ())
            if (each["what"], each["threads"], each["dtype"]) == (name, 2, "float32")
        ]
        best = max(able, key=lambda each: each["frames"], default=None)
        how = f", {best['mode']} {best['layout']}" if best else ""
        measured = f"{best['frames']:.0f} frames/s" if best else "-"
        found.append((f"{name}, two threads, float32{how}", f">= {asked} frames/s", measured))
    for batch in TRAINING_BATCHES:
        ratios = [
            f"{each['ratio']:.2f}x ({each['threads']} threads)"
            for each in report.get("training", ())
            if (each["what"], each["batch"]) == ("rnn-g", batch)
        ]
        words = f"rnn-g, step of training to that of cnn-s, batch {batch}"
        found.append((words, f"<= {STEP_TARGET}x", ", ".join(ratios) or "-"))
    return found


def markdown(report):
    """Tables of all sections; of the frames, a column for each setting."""
    lines = []
    if report.get("frames"):
        rows = report["frames"]
        at = {}
        for each in rows:
            place = (each["model"], each["side"], each["batch"], each["threads"])
            setting = f"{each['mode']} {each['layout']} {each['dtype']}"
            at.setdefault(place, {})[setting] = each
        settings = list(dict.fromkeys(setting for cells in at.values() for setting in cells))
        head = ["model", "side", "batch", "threads", *settings]
        lines += ["Frames a second (quartiles):", "", *_head(head)]
        for place, cells in at.items():
            lines.append(_line([*place, *(_frames(cells.get(s)) for s in settings)]))
    if report.get("layers"):
        rows = report["layers"]
        parts = list(dict.fromkeys(part for each in rows for part in each["shares"]))
        head = ["model", "side", "batch", "threads", "ms", *parts]
        lines += ["", "Share of the time, uncompiled, channels_last, float32:", "", *_head(head)]
        for each in rows:
            total = f"{sum(each['seconds'].values()) * 1e3:.3g}"
            shares = [f"{each['shares'][p]:.1%}" if p in each["shares"] else "" for p in parts]
            place = [each[key] for key in ("model", "side", "batch", "threads")]
            lines.append(_line([*place, total, *shares]))
    if report.get("chain"):
        head = ["two stages", "mode", "layout", "dtype", "threads", "ms", "quartiles", "faces/s"]
        lines += ["", "From a photograph to eleven classes:", "", *_head(head)]
        for each in report["chain"]:
            cells = [each[key] for key in ("what", "mode", "layout", "dtype", "threads")]
            quartiles = f"{each['low'] * 1e3:.3g} - {each['high'] * 1e3:.3g}"
            cells += [f"{each['median'] * 1e3:.3g}", quartiles, f"{each['frames']:.4g}"]
            lines.append(_line(cells))
    if report.get("training"):
        head = ["side 128", "batch", "threads", "ms", "quartiles", "images/s", "to cnn-s"]
        lines += ["", "A step of training, and making the batch for it:", "", *_head(head)]
        for each in report["training"]:
            quartiles = f"{each['low'] * 1e3:.3g} - {each['high'] * 1e3:.3g}"
            cells = [each["what"], each["batch"], each["threads"], f"{each['median'] * 1e3:.3g}"]
            lines.append(
                _line([*cells, quartiles, f"{each['images']:.0f}", f"{each['ratio']:.2f}"])
            )
    lines += ["", *_head(["", "target", "measured"]), *map(_line, targets(report))]
    return "\n".join(lines).strip() + "\n"


def _frames(row):
    if row is None:
        return ""
    fast, slow = row["batch"] / row["low"], row["batch"] / row["high"]
    return f"{row['frames']:.4g} ({slow:.4g} - {fast:.4g})"


def _head(cells):
    return [_line(cells), "|" + "---|" * len(cells)]


def _line(cells):
    return f"| {' | '.join(map(str, cells))} |"


def compact(report):
    """The report as JSON with one line for each record."""
    lines = []
    for name, value in report.items():
        if isinstance(value, list) and value:
            text = "[\n" + ",\n".join(map(json.dumps, value)) + "\n]"
        else:
            text = json.dumps(value)
        lines.append(f"{json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def parse(argv):
    names = [*MODELS, *contenders.REFINED]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=names, default=names, metavar="MODEL",
                        help=f"of {', '.join(names)}")  # fmt: skip
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--sides", nargs="+", type=int, choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--batches", nargs="+", type=int, help="default: 1 and 32; at 512 1 and 4")
    parser.add_argument("--modes", nargs="+", choices=contenders.MODES)
    parser.add_argument("--layouts", nargs="+", choices=contenders.LAYOUTS)
    parser.add_argument("--dtypes", nargs="+", choices=contenders.DTYPES)
    parser.add_argument("--threads", nargs="+", type=int, help="default: 1 and 2, as there are")
    parser.add_argument("--budget", type=float, help="seconds for each contender")
    parser.add_argument("--quick", action="store_true", help="a trial run: uncompiled, one thread")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    parser.add_argument(
        "--out", type=Path, help=f"default: {RESULTS.name}/; with --quick or --json: nothing"
    )
    args = parser.parse_args(argv)
    quick = args.quick
    args.out = args.out or (None if quick or args.json else RESULTS)
    args.budget = args.budget or (0.02 if quick else 0.6)
    args.modes = args.modes or (("eager",) if quick else contenders.MODES)
    args.layouts = args.layouts or tuple(contenders.LAYOUTS)
    args.dtypes = args.dtypes or tuple(contenders.DTYPES)
    if min(args.batches or [1]) < 1:
        parser.error(f"--batches must be at least 1, got {min(args.batches)}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    args.threads = args.threads or ((1,) if quick else (1, 2)[:cores])
    # Cores are given up one by one, for a process does not get them back.
    args.threads = sorted(set(args.threads), reverse=True)
    if not 1 <= args.threads[-1] <= args.threads[0] <= cores:
        parser.error(f"--threads must be 1 to {cores} on this machine")
    return args


def run(args):
    """The report of all sections."""
    pace = {"budget_s": args.budget, "rounds": 3 if args.quick else 15}
    report = {"machine": timing.facts(args.threads), "left_out": []}
    for name, value in report["machine"].items():
        print(f"{name}: {value}")
    if (report["machine"]["load"] or 0) > 0.5:
        print("load is above 0.5: quote nothing that was measured next to other work")
    report |= {section: [] for section in args.sections}
    for threads in args.threads:
        timing.use_threads(threads)
        for side in args.sides:
            for batch in args.batches or (BATCHES[side][:1] if args.quick else BATCHES[side]):
                if "frames" in args.sections:
                    rows, why = bench_frames(side, batch, threads, args, pace)
                    report["frames"] += rows
                    report["left_out"] += why
                if "layers" in args.sections:
                    report["layers"] += [
                        bench_layers(name, side, batch, threads, 3 if args.quick else 25)
                        for name in args.models
                        if name in MODELS
                    ]
        if "chain" in args.sections:
            rows, why = bench_chain(threads, args, pace)
            report["chain"] += rows
            report["left_out"] += why
        if tuple(args.sections) == ("training",) and HUGE_PAGES in os.environ:
            for batch in (2,) if args.quick else TRAINING_BATCHES:
                count = batch if args.quick else 4 * batch
                report["training"] += bench_training(batch, threads, count, pace)
        elif "training" in args.sections:
            report["training"] += training_apart(args, threads)
    return report


def training_apart(args, threads):
    """The rows of the training section, measured in a process with train.py's environment."""
    command = [sys.executable, __file__, "--sections", "training", "--json"]
    command += ["--threads", str(threads), "--budget", str(args.budget)]
    command += ["--quick"] if args.quick else []
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, HUGE_PAGES: "1"}
    )
    return json.loads(done.stdout)["training"]


def main(argv=None):
    args = parse(argv)
    try:
        # With --json the object alone is on the standard output.
        with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
            report = run(args)
            text = markdown(report)
            if not args.json:
                print("\n" + text)
    except contenders.WrongResult as error:
        print(f"bench_parser: nothing is timed while a result is wrong: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(report))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "parser.json").write_text(compact(report))
        (args.out / "parser.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
