"""Peak extra memory of one training step, ours and the peers', in units of x's size."""

import argparse
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import peers
import shapes
import timing

from gatedrnn.functional import spatial_gated_rnn

OURS = "gatedrnn"
DEFAULT_PEERS = ("torch loop", "torch batched")
RESULTS = Path(__file__).resolve().parent / "results"


def _status(field):
    """A field of /proc/self/status in bytes, or None where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)


def _largest_so_far():
    """The process's peak resident memory in bytes."""
    peak = _status("VmHWM:")
    if peak is not None:
        return peak
    import resource  # absent on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _runner(name, shape, inputs):
    if name == OURS:
        return peers.torch_runner(spatial_gated_rnn, inputs)
    return peers.PEERS[name](shape, inputs)


def child(name, shape, threads):
    """Runs one step at `shape` in a new process. Prints the memory beyond its inputs."""
    timing.use_threads(threads)
    tiny = shapes.SHAPES["tiny"]
    warm = _runner(name, tiny, shapes.make_inputs(tiny))
    if isinstance(warm, str):
        print(json.dumps({"missing": warm}))
        return
    if warm.train is None:
        print(json.dumps({"missing": "no gradients"}))
        return
    warm.train()  # libraries, thread pools and code exist before the count begins
    inputs = shapes.make_inputs(shape)
    runner = _runner(name, shape, inputs)
    if isinstance(runner, str):
        print(json.dumps({"missing": runner}))
        return
    # Forget the peak of making the inputs. Where that cannot be done, the count starts from the
    # largest so far and may come out too small.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = _largest_so_far()
    kept = runner.train()
    print(json.dumps({"bytes": _largest_so_far() - before}))
    del kept


def measure(name, shape, threads):
    """Bytes of a step at `shape` beyond its inputs, or a word why there are none."""
    command = [sys.executable, __file__, "--child", name, "--shape", _sizes(shape)]
    command += ["--threads", str(threads)]
    # Every map gets its own pages, which return when it is freed. So the heap hides nothing.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return f"failed: {last}"
    answer = json.loads(done.stdout.splitlines()[-1])
    return answer.get("missing") or answer["bytes"]


def _sizes(shape):
    return f"{shape.n},{shape.c},{shape.h},{shape.w},{shape.groups}"


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__)
    known = f"of {', '.join(shapes.SHAPES)}, or N,C,H,W[,groups]"
    parser.add_argument("--shape", default="4,16,256,256", help=f"{known}; large, or noise rules")
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=peers.PEERS,
        default=DEFAULT_PEERS,
        metavar="PEER",
        help=f"of {', '.join(map(repr, peers.PEERS))}",
    )
    parser.add_argument("--threads", type=int, help="default: all cores of this process")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--child", choices=(OURS, *peers.PEERS), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        args.shape = shapes.by_name(args.shape)
        args.threads = timing.use_threads(args.threads)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv=None):
    args = parse(argv)
    if args.child:
        child(args.child, args.shape, args.threads)
        return 0
    unit = args.shape.elements * 4
    print(f"{args.shape}, float32: x has {unit / 2**20:.1f} MiB. Peak of a step beyond the inputs")
    print("and the incoming gradient; y, dx and dg, which are asked for, are 3 of it.")
    report = {"machine": timing.facts(args.threads), "x_bytes": unit, "sizes": _sizes(args.shape)}
    report["peak"] = {}
    for name in (OURS, *args.peers):
        peak = measure(name, args.shape, args.threads)
        if isinstance(peak, str):
            print(f"  {name:16} {peak}")
            continue
        report["peak"][name] = {"bytes": peak, "in_x": peak / unit}
        print(f"  {name:16} {peak / unit:7.2f} x  ({peak / 2**20:.1f} MiB)", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "memory.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
