"""Times the scan on a GPU against its targets, a loop, CUDA graphs and the copy bandwidth."""

import argparse
import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import peers
import shapes
import timing
import torch
from bench_scan import DTYPES, OURS, PHASES, RESULTS
from peers import gpu, torch_loop

from gatedrnn import _C
from gatedrnn.functional import spatial_gated_rnn

GRAPH = f"{OURS}, graph"
ONE = "one direction at a time"
LOOP, LOOP_GRAPH = "torch loop", "torch batched, graph"
# Above these many elements no gradients of peers (memory), and no float64 truth (time).
MOST_FOR_PEERS = 2**26
MOST_FOR_TRUTH = 2**24
# Below this traffic a call finds its maps in the L2 cache, as after the layer before it.
CACHED = 8 << 20


# ---- contenders --------------------------------------------------------------------------------


def loaders(shape, dtype, on_gpu):
    """name -> function(inputs, gradients) giving a Runner, or a word why not."""

    def plain(function):
        return lambda inputs, gradients: peers.torch_runner(function, inputs)

    found = {OURS: plain(spatial_gated_rnn)}
    if on_gpu:
        found[GRAPH] = lambda inputs, grads: gpu.graph_runner(spatial_gated_rnn, inputs, grads)
    found[ONE] = plain(gpu.one_at_a_time)
    if dtype != torch.float32:  # the peers' 16-bit maps are float32 inside
        return found
    found[LOOP] = plain(torch_loop.per_direction)
    found["torch batched"] = plain(torch_loop.batched)
    if on_gpu:
        found[LOOP_GRAPH] = lambda inputs, grads: gpu.graph_runner(
            torch_loop.batched, inputs, grads
        )
    found["torch compiled"] = lambda inputs, grads: torch_loop.load_compiled(shape, inputs)
    return found


def truth(shape, inputs):
    """What peers.check compares with: the float64 reference, or for large maps a float32 loop."""
    if shape.elements <= MOST_FOR_TRUTH:
        return peers.expected(_cast(inputs, torch.float64))
    if shape.elements <= MOST_FOR_PEERS:
        y, gradients = peers.torch_runner(torch_loop.batched, _cast(inputs, torch.float32)).train()
        return y, *gradients
    # Whole, the graph of a loop would not fit: images are independent, but for weight and bias.
    parts = []
    for image in range(shape.n):
        names = ("x", "g", "grad")
        one = {name: getattr(inputs, name)[image : image + 1] for name in names}
        one = _cast(dataclasses.replace(inputs, **one), torch.float32)
        y, gradients = peers.torch_runner(torch_loop.batched, one).train()
        parts.append((y, *gradients))
    y, dx, dg, dweight, dbias = zip(*parts, strict=True)
    return (*map(torch.cat, (y, dx, dg)), sum(dweight), sum(dbias))


def _cast(inputs, dtype):
    fields = dataclasses.fields(inputs)
    return type(inputs)(*(getattr(inputs, field.name).to(dtype) for field in fields))


def load_contenders(shape, dtype, names, on_gpu):
    """(dict of name -> Runner, dict of name -> word why it is missing), all checked."""
    device = "cuda" if on_gpu else "cpu"
    inputs = shapes.make_inputs(shape, dtype, device=device)
    wanted = truth(shape, inputs)
    runners, missing = {}, {}
    for name, load in loaders(shape, dtype, on_gpu).items():
        ours = name in (OURS, GRAPH, ONE)
        if names is not None and not ours and name not in names:
            continue
        gradients = ours or shape.elements <= MOST_FOR_PEERS
        try:
            runner = load(inputs, gradients)
            if isinstance(runner, str):
                missing[name] = runner
                continue
            if not gradients:
                runner.backward = runner.train = None
            peers.check(name, runner, wanted, dtype)
            runners[name] = runner
        except peers.WrongResult as error:
            if ours:
                raise
            missing[name] = f"wrong: {error}"
        except Exception as error:
            if ours:
                raise
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    return runners, missing


# ---- measurements ------------------------------------------------------------------------------


def device_clock(shape, dtype, scratch):
    if shape.fewest_bytes("forward", dtype.itemsize) < CACHED:
        return timing.device_clock(lambda: torch.cuda._sleep(400_000))  # some 0.2 ms
    return timing.device_clock(scratch.zero_)  # the L2 cache is evicted


def wall_clock(call, repeats):
    """Seconds a call takes, its launch on the host included."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return (time.perf_counter() - start) / repeats


def copy_bandwidth(device, size, pace):
    """Bytes a second of a copy within the device's memory, read and written."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = timing.measure({"copy": lambda: target.copy_(source)}, **pace)
    return 2 * size / times["copy"].median


def bench(shape, dtype, names, on_gpu, copy, pace, scratch):
    """(rows, list of what was left out and why) of one shape and dtype."""
    print(f"\n{shape}, {str(dtype)[6:]}", flush=True)
    runners, missing = load_contenders(shape, dtype, names, on_gpu)
    clocks = {"": device_clock(shape, dtype, scratch)} if on_gpu else {"": wall_clock}
    if on_gpu and shape.fewest_bytes("forward", dtype.itemsize) < CACHED:
        clocks[", with the host"] = wall_clock
    rows = []
    for phase in PHASES:
        calls = {n: getattr(r, phase) for n, r in runners.items() if getattr(r, phase)}
        for suffix, clock in clocks.items():
            times = timing.measure(calls, **pace, clock=clock)
            for name, taken in times.items():
                rows.append(
                    {
                        "shape": shape.name,
                        "sizes": [shape.n, shape.c, shape.h, shape.w],
                        "groups": shape.groups,
                        "dtype": str(dtype)[6:],
                        "phase": phase + suffix,
                        "contender": name,
                        **taken.as_dict(),
                        "ratio": taken.median / times[OURS].median,
                        "copy_share": shape.fewest_bytes(phase, dtype.itemsize)
                        / taken.median
                        / copy,
                    }
                )
                print_row(rows[-1])
    for name, why in missing.items():
        print(f"  {name}: left out, {why}", flush=True)
    return rows, [f"{n} at {shape.name}, {str(dtype)[6:]}: {why}" for n, why in missing.items()]


def print_row(each):
    print(
        f"  {each['phase']:24}{each['contender']:25}{each['median'] * 1e6:12.1f} us"
        f" [{each['low'] * 1e6:.1f}, {each['high'] * 1e6:.1f}]".ljust(92)
        + f"{each['ratio']:9.2f}x {each['copy_share']:6.1%} copy",
        flush=True,
    )


# ---- targets -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """`measure` finds its value among the results, which raise KeyError where there is none."""

    what: str
    bound: float
    at_least: bool
    unit: str
    measure: object

    def row(self, results):
        try:
            value = self.measure(results)
        except KeyError:
            return {"what": self.what, "target": self.wanted(), "measured": "-", "met": None}
        met = value >= self.bound if self.at_least else value <= self.bound
        return {
            "what": self.what,
            "target": self.wanted(),
            "measured": self.text(value),
            "met": met,
        }

    def text(self, value):
        return f"{value:.0%}" if self.unit == "%" else f"{value:.3g} {self.unit}".rstrip()

    def wanted(self):
        return (">= " if self.at_least else "<= ") + self.text(self.bound)


class Results:
    """The rows by what they are of."""

    def __init__(self, rows):
        keys = ("shape", "dtype", "phase", "contender")
        self.rows = {tuple(row[key] for key in keys): row for row in rows}

    def seconds(self, shape, phase, contender=OURS, dtype="float32"):
        return self.rows[shape, dtype, phase, contender]["median"]

    def share(self, shape, phase):
        return self.rows[shape, "float32", phase, OURS]["copy_share"]

    def on_device(self, shape):
        """The least that a forward takes: of a graph no launch is waited for."""
        return min(self.seconds(shape, "forward", name) for name in (OURS, GRAPH))


def targets():
    found = []

    def add(what, bound, measure, *, at_least=False, unit=""):
        found.append(Target(what, bound, at_least, unit, measure))

    for shape, most in (("plane-1024", 0.60), ("plane-1024-full", 1.1)):
        add(f"{shape} forward", most, lambda r, s=shape: r.seconds(s, "forward") * 1e3, unit="ms")
        add(
            f"{shape} backward to forward",
            2.5,
            lambda r, s=shape: r.seconds(s, "backward") / r.seconds(s, "forward"),
            unit="x",
        )
    for shape in ("batch-128", "batch-64"):
        for phase, least in (("forward", 0.55), ("backward", 0.45)):
            add(
                f"{shape} {phase}, share of the copy bandwidth",
                least,
                lambda r, s=shape, p=phase: r.share(s, p),
                at_least=True,
                unit="%",
            )
    for shape, most in (("parser-1", 15), ("multi-face", 30)):
        add(f"{shape} forward", most, lambda r, s=shape: r.on_device(s) * 1e6, unit="us")
        for loop, ours, phase, least in (
            (LOOP, OURS, "forward, with the host", 100),
            (LOOP_GRAPH, GRAPH, "forward", 20),
        ):
            add(
                f"{shape} {phase}: {loop} to {ours}",
                least,
                lambda r, s=shape, p=phase, a=loop, b=ours: r.seconds(s, p, a) / r.seconds(s, p, b),
                at_least=True,
                unit="x",
            )
    for shape in ("batch-128", "batch-64", "plane-1024"):
        add(
            f"{shape} forward, bfloat16 to float32",
            0.65,
            lambda r, s=shape: r.seconds(s, "forward", OURS, "bfloat16") / r.seconds(s, "forward"),
            unit="x",
        )
    return found


def target_table(rows):
    lines = ["| | target | measured | met |", "|---|---|---|---|"]
    for row in rows:
        met = {True: "yes", False: "no", None: "-"}[row["met"]]
        lines.append(f"| {row['what']} | {row['target']} | {row['measured']} | {met} |")
    return "\n".join(lines) + "\n"


def time_table(rows):
    """Microseconds: a line for each shape, dtype and phase, a column a contender."""
    names = list(dict.fromkeys(each["contender"] for each in rows))
    lines = [f"| shape | dtype | phase | {' | '.join(names)} |", "|---" * (len(names) + 3) + "|"]
    cells = {
        (each["shape"], each["dtype"], each["phase"], each["contender"]): each for each in rows
    }
    for line in dict.fromkeys(key[:3] for key in cells):
        found = [cells.get((*line, name)) for name in names]
        texts = ["-" if c is None else f"{c['median'] * 1e6:.4g} ({c['ratio']:.2f})" for c in found]
        lines.append(f"| {' | '.join((*line, *texts))} |")
    return "\n".join(lines) + "\n"


# ---- command -----------------------------------------------------------------------------------


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__)
    known = f"of {', '.join(shapes.SHAPES)}, or N,C,H,W[,groups]"
    parser.add_argument("--shapes", nargs="+", metavar="SHAPE", help=known)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--peers", nargs="*", metavar="PEER", help="these only; none: ours alone")
    parser.add_argument("--budget", type=float, help="seconds for a contender, shape and phase")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("--out", type=Path, help=f"default: {RESULTS.name}/; with --quick: nothing")
    args = parser.parse_args(argv)
    args.out = args.out or (None if args.quick else RESULTS)
    args.budget = args.budget or (0.02 if args.quick else 0.3)
    if args.quick and args.peers is None:
        args.peers = [LOOP, "torch batched", LOOP_GRAPH]  # compiling takes too long
    try:
        names = args.shapes or (("tiny",) if args.quick else shapes.CUDA)
        args.shapes = [shapes.by_name(name) for name in names]
    except ValueError as error:
        parser.error(str(error))
    if args.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("PyTorch sees no GPU; --device cpu --quick is a dry run")
        if _C.build_info()["cuda_version"] is None:
            parser.error("this gatedrnn was built without CUDA")
    return args


def save(report, folder):
    """The tables of what is measured so far; they and the report are in `folder`, unless None."""
    report["targets"] = [target.row(Results(report["rows"])) for target in targets()]
    tables = [time_table(report["rows"]), target_table(report["targets"])]
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cuda.json").write_text(json.dumps(report, indent=1) + "\n")
        (folder / "cuda.md").write_text("\n".join(tables))
    return tables


def main(argv=None):
    args = parse(argv)
    on_gpu = args.device == "cuda"
    pace = {"budget_s": args.budget, "rounds": 3 if args.quick else 15}
    report = {"machine": timing.facts(torch.get_num_threads())}
    report["gpu"] = timing.gpu_facts() if on_gpu else None
    for name, value in {**report["machine"], **(report["gpu"] or {})}.items():
        print(f"{name}: {value}")
    # Larger than any L2 cache, and its zeroing longer than a call is queued on the host.
    megabytes = 512 if on_gpu else 1
    scratch = torch.empty(megabytes << 20, dtype=torch.uint8, device=args.device)
    clock = {"clock": timing.device_clock(scratch.zero_)} if on_gpu else {}
    size = (1 << 30) if on_gpu else (1 << 20)
    copy = report["copy"] = copy_bandwidth(args.device, size, {**pace, **clock})
    print(f"copy, read and written: {copy / 1e9:.0f} GB/s")
    rows, left_out = report["rows"], report["left_out"] = [], []
    try:
        for shape in args.shapes:
            for dtype in args.dtypes:
                new, why = bench(shape, DTYPES[dtype], args.peers, on_gpu, copy, pace, scratch)
                rows += new
                left_out += why
                tables = save(report, args.out)
                if on_gpu:
                    torch.cuda.empty_cache()
    except peers.WrongResult as error:
        print(f"bench_cuda: nothing is timed while a result is wrong: {error}", file=sys.stderr)
        return 1
    print("\nmicroseconds (ratio to ours)\n" + "\n".join(tables))
    return 0


if __name__ == "__main__":
    sys.exit(main())
