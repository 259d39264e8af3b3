"""The cases of gpu_check.py, in a child: `check_cases.py STEP DEVICE NAME...` reports each.

Steps: facts, smoke, performance, ways, profile; and calls, which Nsight Compute watches.
"""

import functools
import gc
import os
import sys
from pathlib import Path

sys.path += [str(Path(__file__).resolve().parents[n] / f) for n, f in ((1, ""), (2, "benchmarks"))]

from case_runs import serve


class Bench:
    """bench_cuda's measurements by name; what they share is made when first needed."""

    def __init__(self, device):
        import bench_cuda

        self.tool, self.on_gpu = bench_cuda, device == "cuda"
        self.pace = dict(budget_s=0.1, rounds=15) if self.on_gpu else dict(budget_s=0.02, rounds=3)
        self.names = (self.tool.LOOP_GRAPH,)

    @functools.cached_property
    def prepared(self):
        return self.tool.prepare(self.on_gpu, self.pace)

    def shape_and_dtype(self, name):
        shape, dtype = name.rsplit(" ", 1)
        return self.tool.shapes.by_name(shape), self.tool.DTYPES[dtype]

    def tidily(self, measure, name):
        """Gives the memory of a case back: graphs keep much of it."""
        try:
            return measure(name)
        finally:
            gc.collect()
            if self.on_gpu:
                self.tool.torch.cuda.empty_cache()

    def performance(self, name):
        scratch, copy = self.prepared
        if name == "copy":
            return {"copy": copy}
        if name == "clamp":
            return {"rows": self.tool.bench_clamp(self.on_gpu, self.pace, scratch)}
        rows, left_out = self.tool.bench(
            *self.shape_and_dtype(name),
            self.names,
            self.on_gpu,
            copy,
            self.pace,
            scratch,
            ("forward", "backward"),
        )
        return {"rows": rows, "left_out": left_out}

    def ways(self, name):
        scratch, copy = self.prepared
        shape, dtype = self.shape_and_dtype(name)
        return {"rows": self.tool.bench_ways(shape, dtype, self.on_gpu, copy, self.pace, scratch)}

    def profile(self, name):
        """The slowest operations of a few calls, by PyTorch's profiler."""
        import torch

        kinds = [torch.profiler.ProfilerActivity.CPU]
        kinds += [torch.profiler.ProfilerActivity.CUDA] if self.on_gpu else []
        self.calls(name)
        with torch.profiler.profile(activities=kinds) as profile:
            for _ in range(4):
                self.calls(name)
        key = "self_cuda_time_total" if self.on_gpu else "self_cpu_time_total"
        return {"table": profile.key_averages().table(sort_by=key, row_limit=12)}

    def calls(self, name):
        """One forward pass and one training step: what Nsight Compute watches."""
        shape, dtype = self.shape_and_dtype(name)
        inputs = self.tool.shapes.make_inputs(shape, dtype, device="cuda" if self.on_gpu else "cpu")
        runner = self.tool.peers.torch_runner(self.tool.spatial_gated_rnn, inputs)
        runner.forward()
        runner.train()
        if self.on_gpu:
            self.tool.torch.cuda.synchronize()
        return {}


def facts(device):
    import timing
    import torch

    found = {"machine": timing.facts(torch.get_num_threads())}
    if device == "cuda":
        torch.ones(1, device="cuda").sum().item()
        found["gpu"] = timing.gpu_facts()
    return found


def smoke_names():
    import small_grid

    return list(small_grid.CASES)


def main(step, device, *names):
    os.environ["GATEDRNN_TEST_DEVICE"] = device
    if step == "smoke":
        import small_grid

        small_grid.poison_memory()
        small_grid.torch.set_num_threads(1)
        serve(small_grid.CASES, names)
    elif step == "facts":
        first, second = names
        serve({first: functools.partial(facts, device), second: smoke_names}, names)
    else:
        bench = Bench(device)
        measure = getattr(bench, step)
        cases = {name: functools.partial(bench.tidily, measure, name) for name in names}
        serve(cases, names, (AssertionError, bench.tool.peers.WrongResult))


if __name__ == "__main__":
    main(*sys.argv[1:])
