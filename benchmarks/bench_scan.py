"""Times the scan against its peers and the machine's limits: table, JSON and plot."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import older_build
import peers
import roofline
import shapes
import timing
import torch

import gatedrnn
from gatedrnn._options import Options, op_arguments
from gatedrnn.functional import spatial_gated_rnn

OURS = "gatedrnn"
PHASES = ("forward", "backward", "train")
SECTIONS = ("scan", "sizes", "layer")
LAYOUTS = {
    "contiguous": (OURS, torch.contiguous_format),
    "channels_last": (f"{OURS} channels_last", torch.channels_last),
}
DTYPES = {str(d)[6:]: d for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16)}
# In the sweep over sizes a peer is left out once a call of it is expected to take longer (seconds).
SLOWEST_CALL = 1.0
# The sweep compares gradients with the reference up to this size: beyond, it needs too much memory.
LARGEST_CHECKED = 256
RESULTS = Path(__file__).resolve().parent / "results"


def load_contenders(shape, inputs, layouts, peer_names, gradients=True):
    """Ours in each layout, then the peers; all checked against the reference.

    Args:
        gradients: whether gradients are checked too.

    Returns:
        (dict of name -> Runner, dict of name -> word why it is missing)

    Raises:
        peers.WrongResult: if one of them computes something else.
    """
    wanted = peers.expected(inputs, gradients)
    runners, missing = {}, {}
    for layout in layouts:
        name, memory_format = LAYOUTS[layout]
        maps = {k: getattr(inputs, k).to(memory_format=memory_format) for k in ("x", "g", "grad")}
        runners[name] = peers.torch_runner(spatial_gated_rnn, dataclasses.replace(inputs, **maps))
    for name in peer_names:
        runner = peers.PEERS[name](shape, inputs)
        (missing if isinstance(runner, str) else runners)[name] = runner
    for name, runner in runners.items():
        checked = runner if gradients else dataclasses.replace(runner, backward=None, train=None)
        peers.check(name, checked, wanted, inputs.x.dtype)
    return runners, missing


def row(shape, phase, name, times, first, limit, dtype):
    """One result: sizes, seconds, ratio to ours, work a second and its share of the limits."""
    seconds = times[name].median
    flops, moved = shape.flops(phase), shape.fewest_bytes(phase, dtype.itemsize)
    # The measured peak is that of float32, in which 16-bit maps are computed too.
    peak = None if dtype == torch.float64 else limit["flops"]
    return {
        "shape": shape.name,
        "sizes": [shape.n, shape.c, shape.h, shape.w],
        "groups": shape.groups,
        "phase": phase,
        "contender": name,
        **times[name].as_dict(),
        "ratio": seconds / times[first].median,
        "gflops": flops / seconds / 1e9,
        "fma_share": flops / seconds / peak if peak else None,
        "copy_share": moved / seconds / limit["bytes"],
    }


def bench_scan(chosen, dtype, layouts, peer_names, limit, pace):
    """Every contender, shape and phase. Returns (rows, list of what was left out and why)."""
    rows, left_out = [], []
    for shape in chosen:
        print(f"\n{shape}, {str(dtype)[6:]}", flush=True)
        inputs = shapes.make_inputs(shape, dtype)
        runners, missing = load_contenders(shape, inputs, layouts, peer_names)
        first = next(iter(runners))
        left_out += [f"{name} at {shape.name}: {why}" for name, why in missing.items()]
        for phase in PHASES:
            calls = {n: getattr(r, phase) for n, r in runners.items() if getattr(r, phase)}
            times = timing.measure(calls, **pace)
            new = [row(shape, phase, name, times, first, limit, dtype) for name in times]
            print_rows(new)
            rows += new
        for name, why in missing.items():
            print(f"  {name}: left out, {why}")
    return rows, left_out


def bench_sizes(batch, sizes, dtype, layouts, peer_names, against, limit, pace):
    """Forward and training at (1, 8, S, S), after a batch of small images: cost against size.

    Args:
        batch: the shape that every cost per pixel is compared with.
        against: an OlderBuild to compare with, or None.
    """
    rows, last, left_out = [], {}, []
    print("\ncost against size at (1,8,S,S)", flush=True)
    for shape in (batch, *map(shapes.square, sizes)):
        print(f"\n{shape}", flush=True)
        inputs = shapes.make_inputs(shape, dtype)
        gradients = shape.h <= LARGEST_CHECKED
        able = [n for n in peer_names if last.get(n, 0) * shape.pixels <= SLOWEST_CALL]
        left_out += [
            f"{name} at {shape.name}: over {SLOWEST_CALL:g} s a call"
            for name in peer_names
            if name not in able
        ]
        runners, missing = load_contenders(shape, inputs, layouts, able, gradients)
        left_out += [f"{name} at {shape.name}: {why}" for name, why in missing.items()]
        if against:
            runners[against.name] = against.runner(shape, dtype)
        first = next(iter(runners))
        for phase in ("forward", "train"):
            calls = {n: getattr(r, phase) for n, r in runners.items() if getattr(r, phase)}
            times = timing.measure(calls, clock=older_build.clock, **pace)
            new = [row(shape, phase, name, times, first, limit, dtype) for name in times]
            for each in new:
                each["ns_per_pixel"] = each["median"] / shape.pixels * 1e9
                each["limit_ns_per_pixel"] = limit_seconds(shape, phase, limit, dtype) * 1e9
                last[each["contender"]] = each["median"] / shape.pixels
            print_rows(new)
            rows += new
    print_to_batch(rows)
    return rows, left_out


def limit_seconds(shape, phase, limit, dtype):
    """Seconds a pixel below which no implementation can be: the longer of arithmetic and memory."""
    peak = None if dtype == torch.float64 else limit["flops"]
    arithmetic = shape.flops(phase) / peak if peak else 0
    memory = shape.fewest_bytes(phase, dtype.itemsize) / limit["bytes"]
    return max(arithmetic, memory) / shape.pixels


def print_to_batch(rows):
    """Ours at every size: ns a pixel, and its ratio to the batch of small images."""
    for contender, phase in dict.fromkeys((each["contender"], each["phase"]) for each in rows):
        if not contender.startswith(OURS):
            continue
        mine = [e for e in rows if (e["contender"], e["phase"]) == (contender, phase)]
        for each in mine:
            each["to_batch"] = each["ns_per_pixel"] / mine[0]["ns_per_pixel"]
        costs = (f"{e['shape']} {e['ns_per_pixel']:.2f} ({e['to_batch']:.2f}x)" for e in mine)
        print(f"  {contender}, {phase}, ns a pixel: {', '.join(costs)}")


def bench_layer(shape, pace):
    """What the public layer adds to the bare op, its clamp's share, and what it adds to a training
    step of the function; float32."""
    inputs = shapes.make_inputs(shape)
    layer = gatedrnn.SpatialGatedRNN(shape.c, groups=shape.groups)
    weight, bias = layer.weight.detach().clone(), torch.zeros(4, shape.c)
    x, g = (t.detach().requires_grad_() for t in (inputs.x, inputs.g))
    parameters = list(layer.parameters())
    leaves = [t.clone().requires_grad_() for t in (weight, bias)]
    options = (*op_arguments(Options((0, 1, 2, 3), "max", gate_activation="clamp")), False)

    def function(x, g, weight, bias):
        return spatial_gated_rnn(x, g, weight, bias, gate_activation="clamp")

    def train_layer():
        return torch.autograd.grad(layer(x, g), [x, g, *parameters], inputs.grad)

    def train_functional():
        return torch.autograd.grad(function(x, g, *leaves), [x, g, *leaves], inputs.grad)

    with torch.no_grad():
        calls = {
            "layer": lambda: layer(inputs.x, inputs.g),
            "clamp": lambda: layer.weight,
            "functional": lambda: function(inputs.x, inputs.g, weight, bias),
            "op": lambda: torch.ops.gatedrnn.scan(inputs.x, inputs.g, weight, bias, *options),
        }
        times = timing.measure(calls, **pace)
    times |= timing.measure(
        {"train layer": train_layer, "train functional": train_functional}, **pace
    )
    bare = times["op"].median
    result = {
        "shape": shape.name,
        "times": {name: each.as_dict() for name, each in times.items()},
        "layer_adds": times["layer"].median - bare,
        "functional_adds": times["functional"].median - bare,
        "clamp_share": times["clamp"].median / times["layer"].median,
        "layer_adds_in_training": times["train layer"].median - times["train functional"].median,
    }
    print(f"\nlayer at {shape}:")
    print("  " + ", ".join(f"{n} {each.median * 1e6:.1f} us" for n, each in times.items()))
    print(
        f"  layer adds {result['layer_adds'] * 1e6:.1f} us to the op,"
        f" its clamp is {result['clamp_share']:.1%} of its time; in training the layer adds"
        f" {result['layer_adds_in_training'] * 1e6:.1f} us to the function",
        flush=True,
    )
    return result


def print_rows(rows):
    for each in rows:
        share = "" if each["fma_share"] is None else f"{each['fma_share']:6.1%} FMA"
        print(
            f"  {each['phase']:9}{each['contender']:23}{each['median'] * 1e3:10.3f} ms"
            f" [{each['low'] * 1e3:.3f}, {each['high'] * 1e3:.3f}]".ljust(70)
            + f"{each['ratio']:8.2f}x {each['gflops']:8.2f} GFLOP/s {share}"
            f" {each['copy_share']:6.1%} copy",
            flush=True,
        )


def markdown(rows):
    """Milliseconds and ratio to ours: a line for each shape and phase, a column a contender."""
    names = list(dict.fromkeys(each["contender"] for each in rows))
    lines = [f"| shape | phase | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    cells = {(each["shape"], each["phase"], each["contender"]): each for each in rows}
    for shape, phase in dict.fromkeys((each["shape"], each["phase"]) for each in rows):
        found = [cells.get((shape, phase, name)) for name in names]
        texts = ["-" if c is None else f"{c['median'] * 1e3:.3g} ({c['ratio']:.2f})" for c in found]
        lines.append(f"| {shape} | {phase} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def plot(rows, path):
    """Time a pixel against size, ours, each peer and the machine's limit, on logarithmic axes."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("no plot: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    squares = [each for each in rows if each["shape"] != rows[0]["shape"]]
    ticks = sorted({each["sizes"][2] for each in squares})
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    for axes, phase in zip(panels, ("forward", "train"), strict=True):
        found = [each for each in squares if each["phase"] == phase]
        for name in dict.fromkeys(each["contender"] for each in found):
            mine = sorted(
                (each["sizes"][2], each["ns_per_pixel"])
                for each in found
                if each["contender"] == name
            )
            width = 2.5 if name == OURS else 1.2
            axes.loglog(*zip(*mine, strict=True), "o-", label=name, linewidth=width)
        limit = found[0]["limit_ns_per_pixel"]
        axes.axhline(limit, color="black", linestyle=":", label="limit of the machine")
        shown = [t for t in ticks if t & (t - 1) == 0] or ticks
        axes.set_xticks(shown, [str(t) for t in shown])
        axes.minorticks_off()
        axes.set(title=phase, xlabel="S, for x of (1, 8, S, S)", ylabel="ns a pixel")
        axes.grid(alpha=0.3)
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__)
    known = f"of {', '.join(shapes.SHAPES)}, or N,C,H,W[,groups]"
    parser.add_argument("--shapes", nargs="+", metavar="SHAPE", help=known)
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=peers.PEERS,
        metavar="PEER",
        help=f"of {', '.join(map(repr, peers.PEERS))}; none: ours alone",
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--sizes", nargs="+", type=int, help="S of the sweep over (1,8,S,S)")
    parser.add_argument(
        "--against",
        type=Path,
        metavar="DIR",
        help="compare sizes with another build: DIR holds its gatedrnn, compiled",
    )
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=int, help="default: all cores of this process")
    parser.add_argument("--budget", type=float, help="seconds for a contender, shape and phase")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("--out", type=Path, help=f"default: {RESULTS.name}/; with --quick: nothing")
    args = parser.parse_args(argv)
    quick = args.quick
    args.out = args.out or (None if quick else RESULTS)
    args.budget = args.budget or (0.02 if quick else 0.6)
    args.sizes = args.sizes or ((16, 32) if quick else shapes.SIZES)
    if args.peers is None:
        args.peers = ["torch loop", "torch batched"] if quick else list(peers.PEERS)
    if args.against and not (args.against / "gatedrnn").is_dir():
        parser.error(f"--against must name a directory that holds gatedrnn, got {args.against}")
    try:
        names = args.shapes or (("tiny",) if quick else shapes.DEFAULT)
        args.shapes = [shapes.by_name(name) for name in names]
        if min(args.sizes) < 1:
            raise ValueError(f"--sizes must be at least 1, got {min(args.sizes)}")
        args.threads = timing.use_threads(args.threads)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv=None):
    args = parse(argv)
    dtype = DTYPES[args.dtype]
    pace = {"budget_s": args.budget, "rounds": 3 if args.quick else 15}
    limit = roofline.limits(args.threads, *((0.05, 64) if args.quick else (1.0, 256)))
    report = {"machine": timing.facts(args.threads), "dtype": args.dtype, "limits": limit}
    for name, value in report["machine"].items():
        print(f"{name}: {value}")
    print(roofline.describe(limit))
    if (report["machine"]["load"] or 0) > 0.5:
        print("load is above 0.5: quote nothing that was measured beside other work")
    left_out = []
    try:
        if "scan" in args.sections:
            report["scan"], why = bench_scan(
                args.shapes, dtype, args.layouts, args.peers, limit, pace
            )
            left_out += why
        if "sizes" in args.sections:
            with older_build.start(args.against, args.threads) as against:
                batch = shapes.by_name("tiny" if args.quick else "face-8")
                report["sizes"], why = bench_sizes(
                    batch, args.sizes, dtype, args.layouts, args.peers, against, limit, pace
                )
            left_out += why
    except peers.WrongResult as error:
        print(f"bench_scan: nothing is timed while a result is wrong: {error}", file=sys.stderr)
        return 1
    if "layer" in args.sections:
        at = ("tiny",) if args.quick else ("parser-1", "face-8")
        report["layer"] = [bench_layer(shapes.by_name(name), pace) for name in at]
    report["left_out"] = left_out
    if "scan" in report:
        print("\nmilliseconds (ratio to ours)\n" + markdown(report["scan"]))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "scan.json").write_text(json.dumps(report, indent=1) + "\n")
        if "scan" in report:
            (args.out / "scan.md").write_text(markdown(report["scan"]))
        if "sizes" in report:
            plot(report["sizes"], args.out / "sizes.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
