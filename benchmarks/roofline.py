"""The machine's own limits at a number of threads: float32 multiply-add peak, copy bandwidth."""

import argparse
import ctypes
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import timing

# A multiply-add takes about 4 cycles and two begin in each: at least 8 must be under way. Twelve
# or sixteen accumulators are enough and, with the two operands, fit the registers (16 or 32).
_SOURCE = r"""
#include <cstdint>
#include <thread>
#include <vector>
#if defined(__AVX512F__)
constexpr int kBytes = 64, kAccumulators = 16;
#define IN_REGISTER(v) asm volatile("" : "+v"(v))
#elif defined(__AVX__)
constexpr int kBytes = 32, kAccumulators = 12;
#define IN_REGISTER(v) asm volatile("" : "+x"(v))
#elif defined(__aarch64__)
constexpr int kBytes = 16, kAccumulators = 16;
#define IN_REGISTER(v) asm volatile("" : "+w"(v))
#else
#error no vector registers are known for this processor
#endif
typedef float Vector __attribute__((vector_size(kBytes)));
constexpr int kLanes = kBytes / 4;

static void run(int64_t steps, float scale, float shift, float* total) {
  // Whole vectors only: an accumulator indexed by lane would live in memory, not in a register.
  const Vector m = Vector{} + scale, s = Vector{} + shift;
  Vector acc[kAccumulators];
#pragma GCC unroll 16
  for (int i = 0; i < kAccumulators; ++i) acc[i] = Vector{} + float(i);
  for (int64_t t = 0; t < steps; ++t) {
#pragma GCC unroll 16
    for (int i = 0; i < kAccumulators; ++i) {
      acc[i] = acc[i] * m + s;
      // Opaque to the optimiser: each step is carried out, and stays in its register.
      IN_REGISTER(acc[i]);
    }
  }
  Vector sum{};
#pragma GCC unroll 16
  for (int i = 0; i < kAccumulators; ++i) sum += acc[i];
  *total = 0;
  for (int l = 0; l < kLanes; ++l) *total += sum[l];
}

extern "C" int64_t fma_run(int64_t steps, float scale, float shift, int threads, float* totals) {
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t) pool.emplace_back(run, steps, scale, shift, totals + t);
  for (auto& thread : pool) thread.join();
  return int64_t(kAccumulators) * kLanes * 2 * steps * threads;
}

extern "C" int accumulators() { return kAccumulators; }
extern "C" int lanes() { return kLanes; }
"""


def _compile(folder):
    """The loop as a shared library, or a word why there is none."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        return "no C++ compiler"
    source, library = Path(folder, "fma.cpp"), Path(folder, "fma.so")
    source.write_text(_SOURCE)
    flags = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
    built = subprocess.run(
        [compiler, *flags, "-pthread", str(source), "-o", str(library)],
        capture_output=True,
        text=True,
        check=False,
    )
    if built.returncode:
        return "does not compile here: " + (built.stderr.strip().splitlines() or ["?"])[0]
    loaded = ctypes.CDLL(str(library))
    loaded.fma_run.restype = ctypes.c_int64
    loaded.fma_run.argtypes = [
        ctypes.c_int64,
        ctypes.c_float,
        ctypes.c_float,
        ctypes.c_int,
        ctypes.POINTER(ctypes.c_float),
    ]
    return loaded


def fma_peak(threads, seconds=1.0):
    """Best float32 multiply-add rate of `threads` threads.

    Args:
        threads: how many run at once.
        seconds: time to spend, roughly.

    Returns:
        (flop/s, None), one multiply-add counted as two; or (None, a word why not).
    """
    with tempfile.TemporaryDirectory() as folder:
        library = _compile(folder)
        if isinstance(library, str):
            return None, library
        totals = (ctypes.c_float * threads)()
        # h <- h / 2 + 1 tends to 2 from anywhere: the sum proves that every step was taken.
        expected = 2.0 * library.accumulators() * library.lanes()
        steps, best, start = 1_000_000, 0.0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            began = time.perf_counter()
            flops = library.fma_run(steps, 0.5, 1.0, threads, totals)
            best = max(best, flops / (time.perf_counter() - began))
            if any(abs(total - expected) > 1e-3 * expected for total in totals):
                return None, f"wrong sums {list(totals)}, expected {expected}"
        return best, None


def copy_bandwidth(threads, seconds=1.0, mebibytes=256):
    """Best rate of a copy too large for the caches, in bytes read plus bytes written a second."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        source = torch.ones(mebibytes * 2**18)
        target = torch.zeros_like(source)
        target.copy_(source)
        samples, start = [], time.perf_counter()
        while len(samples) < 3 or time.perf_counter() - start < seconds:
            began = time.perf_counter()
            target.copy_(source)
            samples.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(before)
    # The lower quartile: the best of many is luck, the median of few is the neighbours' load.
    quick = statistics.quantiles(samples, n=4)[0]
    return 2 * source.numel() * 4 / quick


def limits(threads, seconds=1.0, mebibytes=256):
    """Both limits as plain values: flops, bytes (a second; flops may be None) and a note."""
    flops, note = fma_peak(threads, seconds)
    return {
        "flops": flops,
        "bytes": copy_bandwidth(threads, seconds, mebibytes),
        "threads": threads,
        "note": note,
    }


def describe(limit):
    """The limits in one line."""
    if limit["flops"] is None:
        peak = f"FMA peak: {limit['note']}"
    else:
        peak = f"FMA peak {limit['flops'] / 1e9:.0f} GFLOP/s"
    return f"{peak}, copy {limit['bytes'] / 1e9:.1f} GB/s, {limit['threads']} threads, float32"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, help="default: all cores of this process")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each limit")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    try:
        threads = timing.use_threads(args.threads)
    except ValueError as error:
        parser.error(str(error))
    limit = limits(threads, args.seconds)
    print(json.dumps(limit | {"machine": timing.facts(threads)}) if args.json else describe(limit))
    return 0


if __name__ == "__main__":
    sys.exit(main())
