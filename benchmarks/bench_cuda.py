"""Times the scan on a GPU against its targets, a loop, CUDA graphs and the copy bandwidth."""

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import peers
import shapes
import timing
import torch
from bench_scan import DTYPES, PHASES, RESULTS
from peers import gpu, torch_loop
from targets import CLAMP, GRAPH, LOOP, LOOP_GRAPH, ONE, OURS, target_rows, target_table, time_table

from gatedrnn import _C, norms
from gatedrnn.functional import spatial_gated_rnn

WAYS = ("wavefront", "strips", "chunks")  # csrc/cuda/forward.cu
COMPILED = "torch compiled"
# Queued, a backward call of a compiled loop may take longer than the device is kept busy.
DEFAULT_PEERS = (LOOP, "torch batched", LOOP_GRAPH)
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
    found[COMPILED] = lambda inputs, grads: torch_loop.load_compiled(shape, inputs)
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
        if not ours and name not in names:
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


def sleeping_clock():
    return timing.device_clock(lambda: torch.cuda._sleep(400_000))  # some 0.2 ms


def device_clock(shape, dtype, scratch):
    if shape.fewest_bytes("forward", dtype.itemsize) < CACHED:
        return sleeping_clock()
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


def prepare(on_gpu, pace):
    """(memory that is zeroed between calls, bandwidth of a copy)."""
    # Larger than any L2 cache, and its zeroing longer than a call is queued on the host.
    device, megabytes = ("cuda", 512) if on_gpu else ("cpu", 1)
    scratch = torch.empty(megabytes << 20, dtype=torch.uint8, device=device)
    clock = {"clock": timing.device_clock(scratch.zero_)} if on_gpu else {}
    return scratch, copy_bandwidth(device, 2 * megabytes << 20, {**pace, **clock})


def bench(shape, dtype, names, on_gpu, copy, pace, scratch, phases=PHASES):
    """(rows, list of what was left out and why) of one shape and dtype."""
    print(f"\n{shape}, {str(dtype)[6:]}", flush=True)
    runners, missing = load_contenders(shape, dtype, names, on_gpu)
    clocks = {"": device_clock(shape, dtype, scratch)} if on_gpu else {"": wall_clock}
    if on_gpu and shape.fewest_bytes("forward", dtype.itemsize) < CACHED:
        clocks[", with the host"] = wall_clock
    rows = []
    for phase in phases:
        calls = {n: getattr(r, phase) for n, r in runners.items() if getattr(r, phase)}
        for suffix, clock in clocks.items():
            times = timing.measure(calls, **pace, clock=clock)
            moved = shape.fewest_bytes(phase, dtype.itemsize)
            for row in measured_rows(shape, dtype, phase + suffix, times, moved / copy):
                rows.append(row)
                print_row(row)
    for name, why in missing.items():
        print(f"  {name}: left out, {why}", flush=True)
    return rows, [f"{n} at {shape.name}, {str(dtype)[6:]}: {why}" for n, why in missing.items()]


def measured_rows(shape, dtype, phase, times, copy_seconds):
    """A row for each contender; ratios are to the first one."""
    first = next(iter(times.values())).median
    return [
        {
            "shape": shape.name,
            "sizes": [shape.n, shape.c, shape.h, shape.w],
            "groups": shape.groups,
            "dtype": str(dtype)[6:],
            "phase": phase,
            "contender": name,
            **taken.as_dict(),
            "ratio": taken.median / first,
            "copy_share": copy_seconds / taken.median,
        }
        for name, taken in times.items()
    ]


def forced(way, call):
    """`call`, with the forward pass made to go this way; the empty way is the scan's own choice."""

    def run():
        os.environ["GATEDRNN_FORWARD"] = way
        try:
            return call()
        finally:
            del os.environ["GATEDRNN_FORWARD"]

    return run


def bench_ways(shape, dtype, on_gpu, copy, pace, scratch):
    """Rows of the forward pass, each way that can serve the shape; the first one is the choice.

    Raises:
        peers.WrongResult: a way gives another result than the chosen one.
    """
    inputs = shapes.make_inputs(shape, dtype, device="cuda" if on_gpu else "cpu")
    forward = peers.torch_runner(spatial_gated_rnn, inputs).forward
    wanted, calls = forward(), {"chosen": forced("", forward)}
    for way in WAYS:
        call = forced(way, forward)
        try:
            peers.check(way, peers.Runner(call), (wanted,), dtype)
        except RuntimeError as error:
            if "cannot serve this scan" not in str(error):
                raise
            continue
        calls[way] = call
    clock = device_clock(shape, dtype, scratch) if on_gpu else wall_clock
    times = timing.measure(calls, **pace, clock=clock)
    moved = shape.fewest_bytes("forward", dtype.itemsize)
    return measured_rows(shape, dtype, "forward", times, moved / copy)


def bench_clamp(on_gpu, pace, scratch):
    """Rows of the spectral clamp of four matrices of 8 x 8."""
    weight = torch.randn(4, 8, 8, device=scratch.device)

    def clamp():
        with torch.no_grad():
            return norms.clamp_norm(weight, "spectral")

    calls = {OURS: clamp} | ({GRAPH: gpu.captured(clamp)} if on_gpu else {})
    clock = sleeping_clock() if on_gpu else wall_clock
    times = timing.measure(calls, **pace, clock=clock)
    same = {"shape": CLAMP, "dtype": "float32", "phase": "forward", "copy_share": None}
    return [
        same | {"contender": name, **taken.as_dict(), "ratio": taken.median / times[OURS].median}
        for name, taken in times.items()
    ]


def print_row(each):
    print(
        f"  {each['phase']:24}{each['contender']:25}{each['median'] * 1e6:12.1f} us"
        f" [{each['low'] * 1e6:.1f}, {each['high'] * 1e6:.1f}]".ljust(92)
        + f"{each['ratio']:9.2f}x {each['copy_share']:6.1%} copy",
        flush=True,
    )


# ---- command -----------------------------------------------------------------------------------


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__)
    known = f"of {', '.join(shapes.SHAPES)}, or N,C,H,W[,groups]"
    parser.add_argument("--shapes", nargs="+", metavar="SHAPE", help=known)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument(
        "--peers",
        nargs="*",
        metavar="PEER",
        default=DEFAULT_PEERS,
        help=f"these only; none: ours alone; not by default: {COMPILED!r}",
    )
    parser.add_argument("--budget", type=float, help="seconds for a contender, shape and phase")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("--out", type=Path, help=f"default: {RESULTS.name}/; with --quick: nothing")
    args = parser.parse_args(argv)
    args.out = args.out or (None if args.quick else RESULTS)
    args.budget = args.budget or (0.02 if args.quick else 0.3)
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
    report["targets"] = target_rows(report["rows"], report["copy"])
    tables = [time_table(report["rows"]), target_table(report["targets"])]
    if folder:
        timing.write_atomically(folder / "cuda.json", json.dumps(report, indent=1) + "\n")
        timing.write_atomically(folder / "cuda.md", "\n".join(tables))
    return tables


def main(argv=None):
    args = parse(argv)
    on_gpu = args.device == "cuda"
    pace = {"budget_s": args.budget, "rounds": 3 if args.quick else 15}
    report = {"machine": timing.facts(torch.get_num_threads())}
    report["gpu"] = timing.gpu_facts() if on_gpu else None
    for name, value in {**report["machine"], **(report["gpu"] or {})}.items():
        print(f"{name}: {value}")
    scratch, copy = prepare(on_gpu, pace)
    report["copy"] = copy
    print(f"copy, read and written: {copy / 1e9:.0f} GB/s")
    rows, left_out = report["rows"], report["left_out"] = bench_clamp(on_gpu, pace, scratch), []
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
