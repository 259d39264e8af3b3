"""Times another build of gatedrnn, in a process of its own: one process loads only one library."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import peers
import shapes
import timing
import torch


class OlderBuild:
    """A process that imports gatedrnn from a directory and times it on request."""

    def __init__(self, directory, threads):
        directory = Path(directory).resolve()
        self.name = f"gatedrnn of {directory.name}"
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(threads)],
            env=os.environ | {"PYTHONPATH": str(directory)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        home = json.loads(self._process.stdout.readline())
        if not Path(home).is_relative_to(directory):
            raise RuntimeError(f"{directory} must hold gatedrnn, but {home} was imported")

    def seconds(self, request):
        """Seconds of one call."""
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def runner(self, shape, dtype):
        """Its phases, as calls for `clock`."""
        sizes = [shape.n, shape.c, shape.h, shape.w, shape.groups]
        common = {"sizes": ",".join(map(str, sizes)), "dtype": str(dtype)[6:]}
        calls = (
            Call(self, common | {"phase": phase}) for phase in ("forward", "backward", "train")
        )
        return peers.Runner(*calls)

    def stop(self):
        self._process.stdin.close()
        self._process.wait()


class Call:
    """One unit of work in the other process."""

    def __init__(self, build, request):
        self._build, self._request = build, request

    def seconds(self, repeats):
        return self._build.seconds(self._request | {"repeats": repeats})

    def __call__(self):
        self.seconds(1)


@contextlib.contextmanager
def start(directory, threads):
    """The build in `directory` for as long as the context lasts; None without one."""
    build = OlderBuild(directory, threads) if directory else None
    try:
        yield build
    finally:
        if build:
            build.stop()


def clock(call, repeats):
    """Seconds of a call, taken in the process that makes it."""
    return call.seconds(repeats) if isinstance(call, Call) else timing.call_seconds(call, repeats)


def serve(threads):
    """Answers each request, a line of JSON, with seconds."""
    timing.use_threads(threads)
    import gatedrnn
    from gatedrnn.functional import spatial_gated_rnn

    print(json.dumps(gatedrnn.__file__), flush=True)
    known, runner = None, None
    for line in sys.stdin:
        request = json.loads(line)
        wanted = request["sizes"], request["dtype"]
        if wanted != known:
            dtype = getattr(torch, request["dtype"])
            inputs = shapes.make_inputs(shapes.by_name(request["sizes"]), dtype)
            known, runner = wanted, peers.torch_runner(spatial_gated_rnn, inputs)
        call = getattr(runner, request["phase"])
        print(json.dumps(timing.call_seconds(call, request["repeats"])), flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
