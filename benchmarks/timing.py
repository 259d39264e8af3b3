"""Times contenders in turn within one run, and states the facts of the machine."""

import gc
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path


@dataclass
class Timing:
    """Seconds a call: median, quartiles and best over `rounds` samples of `repeats` calls."""

    median: float
    low: float  # first quartile
    high: float  # third quartile
    best: float
    rounds: int
    repeats: int

    def as_dict(self):
        return asdict(self)


# A sample that has lasted this long (seconds) ends, however few its calls: on a busy machine a
# call can take a hundred times what it took when the number of calls was chosen.
_LONGEST_SAMPLE = 0.1


def call_seconds(call, repeats):
    """Seconds of one of `repeats` calls."""
    start = now = time.perf_counter()
    done = 0
    while done < repeats and (done == 0 or now - start < _LONGEST_SAMPLE):
        call()
        done += 1
        now = time.perf_counter()
    return (now - start) / done


def device_clock(before):
    """A clock of the GPU: seconds a call takes there, by events around each.

    Args:
        before: queues work ahead of every call, out of the time taken: what evicts the caches, or
            keeps the device busy while the host queues the call, so that no waiting for the host
            is measured.
    """
    import torch

    def seconds(call, repeats):
        events = []
        for _ in range(repeats):
            before()
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            call()
            last.record()
            events.append((first, last))
        torch.cuda.synchronize()
        return sum(first.elapsed_time(last) for first, last in events) / repeats / 1e3

    return seconds


def _warm(call, clock):
    """Seconds a call takes, once it is warm; a long one is warm after its first time."""
    once = clock(call, 1)
    return once if once > _LONGEST_SAMPLE else min(clock(call, 1) for _ in range(2))


def measure(
    contenders, *, rounds=15, min_rounds=3, min_sample_s=2e-3, budget_s=2.0, clock=call_seconds
):
    """Time every contender once a round, round after round, so that all meet the same disturbance.

    Args:
        contenders: dict of name -> call without arguments that does one unit of work and waits
            for its end.
        rounds: samples of each contender, unless its time runs out before.
        min_rounds: samples taken unless they cost five times the budget.
        min_sample_s: a sample repeats short calls until it lasts this long (seconds).
        budget_s: seconds for one contender; once spent, it sits out the later rounds. All get at
            least one.
        clock: clock(call, repeats) gives the seconds of one call.

    Returns:
        dict of name -> Timing.
    """
    warm = {name: _warm(call, clock) for name, call in contenders.items()}
    repeats = {name: max(1, round(min_sample_s / max(s, 1e-7))) for name, s in warm.items()}
    samples = {name: [] for name in contenders}
    spent = dict.fromkeys(contenders, 0.0)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for done in range(rounds):
            for name, call in contenders.items():
                enough = budget_s if done >= min_rounds else 5 * budget_s
                if done and spent[name] > enough:
                    continue
                start = time.perf_counter()
                # Each library has its own thread pool, whose idle workers spin for some
                # milliseconds: let the previous contender's fall asleep, then wake ours.
                time.sleep(5e-3)
                if warm[name] < _LONGEST_SAMPLE:
                    call()
                samples[name].append(clock(call, repeats[name]))
                spent[name] += time.perf_counter() - start
    finally:
        if collecting:
            gc.enable()
    return {name: _summary(samples[name], repeats[name]) for name in contenders}


def _summary(samples, repeats):
    low, median, high = (
        statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    )
    return Timing(median, low, high, min(samples), len(samples), repeats)


def use_threads(threads):
    """Hold this process, and every thread pool it will start, to `threads` cores.

    Call it before torch, JAX or Numba start their pools: JAX sizes its own by the affinity alone.

    Args:
        threads: number of cores, or None for all that the process may use.

    Returns:
        The number in use.

    Raises:
        ValueError: fewer than one, or more than there are.
    """
    try:
        cores = sorted(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cores = list(range(os.cpu_count() or 1))
    threads = len(cores) if threads is None else threads
    if not 1 <= threads <= len(cores):
        raise ValueError(f"--threads must be 1 to {len(cores)} on this machine, got {threads}")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores[:threads])
    os.environ["NUMBA_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)
    return threads


def _cpu_model():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((li.split(":", 1)[1].strip() for li in lines if li.startswith("model name")), "?")


def _commit():
    """Short hash of the commit these benchmarks stand in, with a + if the tree was changed."""
    root = Path(__file__).resolve().parent

    def git(*words):
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvidia_smi(*fields):
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(
            query, capture_output=True, text=True, check=True, timeout=20
        ).stdout
        return dict(zip(fields, answer.splitlines()[0].split(", "), strict=True))
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return dict.fromkeys(fields, "unknown")


def gpu_state():
    """Clocks, power and temperature of the first GPU now, as nvidia-smi prints them."""
    return _nvidia_smi("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu")


def write_atomically(path, text):
    """A reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    part.replace(path)


def gpu_facts():
    """The current GPU, its driver and the CUDA versions, as plain values."""
    import torch

    properties = torch.cuda.get_device_properties()
    return {
        "name": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "l2": properties.L2_cache_size,
        "driver": _nvidia_smi("driver_version")["driver_version"],
        "cuda": torch.version.cuda,
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
    }


def facts(threads):
    """What a reader must know of where a number comes from.

    Returns:
        dict of plain values: date (UTC), cpu, cores, threads, simd, load, system, versions,
        build (of the extension), commit.
    """
    import torch

    packages = ("gatedrnn", "torch", "numpy", "jax", "numba")
    try:
        from gatedrnn import _C

        build = _C.build_info()
    except ImportError:
        build = None
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        "simd": torch.backends.cpu.get_cpu_capability(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: _version(name) for name in packages},
        "build": build,
        "commit": _commit(),
    }
