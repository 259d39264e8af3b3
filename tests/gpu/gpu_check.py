"""Everything that a GPU can tell of the kernels, in eight minutes: `make gpu-check`.

Builds, tests every kernel, measures, and runs the GPU tests for as long as time is left. Each case
runs in a child process with a time limit. The report is written after every case. Needs no PyTorch
itself, so that nothing that happens there ends it.
"""

import argparse
import contextlib
import functools
import hashlib
import os
import queue
import re
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path += [str(Path(__file__).resolve().parents[n] / f) for n, f in ((1, ""), (2, "benchmarks"))]

import check_report
import timing
from case_runs import CRASHED, CUT, FAULTS, HUNG, OK, STOP, WRONG, Child, Interrupted, run_cases

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LIBRARY = ROOT / "build/gpu"
BUILD = ["make", "-C", str(ROOT), f"GPU_PYTHON={sys.executable}", str(LIBRARY / ".installed")]
CASES = [sys.executable, str(HERE / "check_cases.py")]
TESTS = ROOT / "tests"
PYTEST = [sys.executable, "-m", "pytest", "-v", "-m", "", "--tb=short", "--maxfail=10"]
SANITIZER = [sys.executable, str(HERE / "sanitize.py")]

# Seconds that a step may take; the tests have what is left.
BUDGETS = {"build": 240, "facts": 40, "smoke": 60, "performance": 110, "ways": 50, "profile": 70}
LIMITS = {"facts": 40, "smoke": 20, "performance": 40, "ways": 20, "profile": 40}  # of a case
START = 60  # until a child's first case begins
SILENCE = 90  # seconds without a line from pytest: its test hangs
SIDE_BY_SIDE = 4  # processes that share the GPU, where nothing is timed

# The most telling first.
SHAPES = ("parser-1", "batch-64", "plane-1024-full", "plane-1024", "multi-face", "batch-128")
SHAPES += ("wide-256",)
# For the choice of a way: some with few lines, some with many, in between, and other block sizes.
WAYS = (*SHAPES, "4,8,128,128", "face-8", "16,8,128,128", "parser-40", "wide-16", "diagonal-32")
NOT_RUN = "not run"


class Check:
    """The report, and the time that is left."""

    def __init__(self, args):
        self.args, self.on_gpu = args, args.device == "cuda"
        self.slowness = 1 if self.on_gpu else 20  # a dry run is to end, however busy the machine
        self.end = time.monotonic() + args.seconds
        self.lock = threading.Lock()
        self.smoke_names = []
        self.report = {
            "facts": {},
            "commit": args.commit,
            "sources": digest_of_sources(),
            "clocks": {},
            "steps": {},
            "cases": [],
            "copy": None,
            "performance": {"rows": [], "left_out": []},
            "ways": {"rows": []},
            "profile": {},
        }

    def save(self):
        check_report.save(self.report, self.args.out)

    def environment(self):
        kept = {"GATEDRNN_TEST_DEVICE": self.args.device, "PYTHONUNBUFFERED": "1"}
        if self.on_gpu:
            kept["PYTHONPATH"] = str(LIBRARY)
        return os.environ | kept

    def step(self, name, function):
        """Runs a step within its time; whether the rest can go on."""
        begin = time.monotonic()
        until = min(self.end, begin + self.slowness * BUDGETS.get(name, self.args.seconds))
        entry = self.report["steps"][name] = {"status": "running", "seconds": 0, "detail": ""}
        self.save()
        print(f"== {name}", flush=True)
        try:
            entry["status"], entry["detail"] = function(self, until)
        except Interrupted:
            entry["status"] = CUT
            raise
        except Exception as error:  # a fault of this script must not end the report
            entry["status"], entry["detail"] = CRASHED, f"{type(error).__name__}: {error}"
        finally:
            entry["seconds"] = time.monotonic() - begin
            with self.lock:
                self.save()
        print(f"== {name}: {entry['status']}, {entry['seconds']:.0f} s {entry['detail']}")
        if name == "facts":
            return bool(self.report["facts"])
        return name != "build" or entry["status"] in (OK, NOT_RUN)

    def note(self, step, keep, name, status, result, detail):
        """Reports a case; `keep` takes what it has measured."""
        with self.lock:
            case = {"step": step, "name": name, "status": status, "detail": detail}
            self.report["cases"].append(case)
            if result is not None and keep:
                keep(name, result)
            self.save()
        print(f"{step}, {name}: {status} {detail}", flush=True)

    def run(self, step, names, until, keep=None, workers=1):
        """Runs cases of check_cases.py; the step's status."""
        command = [*CASES, step, self.args.device]
        report = functools.partial(self.note, step, keep)

        def work(part):
            limit, start = (self.slowness * seconds for seconds in (LIMITS[step], START))
            run_cases(command, part, limit, until, report, self.environment(), start)

        parts = [names[i::workers] for i in range(workers)]
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(work, filter(None, parts)))
        return self.summary(step), ""

    def summary(self, step):
        found = {case["status"] for case in self.report["cases"] if case["step"] == step}
        return next((status for status in (*FAULTS, CUT) if status in found), OK)


def digest_of_sources():
    """Names the kernels where there is no git."""
    found = hashlib.sha256()
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.is_file():
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


def read_lines(child, until, silence, on_line):
    """Hands on the child's lines until its end; OK, HUNG or CUT."""
    last = time.monotonic()
    try:
        while (line := child.next_line(min(last + silence, until) - time.monotonic())) is not None:
            last = time.monotonic()
            on_line(line)
    except queue.Empty:
        return CUT if time.monotonic() >= until else HUNG
    return OK


# ---- steps -------------------------------------------------------------------------------------


def build(check, until):
    if not check.on_gpu:
        return NOT_RUN, "a dry run uses the library at hand"
    lines = []
    child = Child(BUILD)
    ended = read_lines(child, until, BUDGETS["build"], lines.append)
    code = child.end()
    if ended != OK:
        return HUNG, f"not done after {BUDGETS['build']} s: {' '.join(lines[-3:])}"
    if code:
        return CRASHED, "\n".join(lines[-20:])
    return OK, ""


def facts(check, until):
    def keep(name, result):
        if name == "facts":
            check.report["facts"] = result
        else:
            check.smoke_names = result

    status = check.run("facts", ["facts", "names of the small cases"], until, keep)
    if check.on_gpu:
        check.report["clocks"]["before"] = timing.gpu_state()
    return status


def smoke(check, until):
    names = check.smoke_names
    if check.args.quick:
        names = names[:: max(len(names) // 3, 1)]
    return check.run("smoke", names, until, workers=SIDE_BY_SIDE if check.on_gpu else 1)


def performance(check, until):
    def keep(name, result):
        check.report["copy"] = result.get("copy", check.report["copy"])
        for kind in ("rows", "left_out"):
            check.report["performance"][kind] += result.get(kind, [])

    shapes = ("tiny",) if check.args.quick else SHAPES
    names = [f"{shape} {dtype}" for dtype in ("float32", "bfloat16") for shape in shapes]
    status = check.run("performance", ["copy", "clamp", *names], until, keep)
    if check.on_gpu:
        check.report["clocks"]["after the measurements"] = timing.gpu_state()
    return status


def ways(check, until):
    def keep(name, result):
        check.report["ways"]["rows"] += result["rows"]

    shapes = ("tiny",) if check.args.quick else WAYS
    return check.run("ways", [f"{shape} float32" for shape in shapes], until, keep)


def worst_shapes(report):
    """The two that miss their targets by most."""
    known = [row for row in report["targets"] if row["miss"] and row["what"].split()[0] in SHAPES]
    known.sort(key=lambda row: -row["miss"])
    names = [row["what"].split()[0] for row in known] + ["batch-64", "plane-1024-full"]
    return list(dict.fromkeys(names))[:2]


def profile(check, until):
    """By Nsight Compute where it is installed and works, else by PyTorch."""
    shapes = ("tiny",) if check.args.quick else worst_shapes(check.report)
    names, ncu = [f"{shape} float32" for shape in shapes], shutil.which("ncu")
    for name in names if ncu and check.on_gpu else ():
        target = check.args.out / f"gpu_check-{name.replace(' ', '-')}.ncu-rep"
        command = [ncu, "--clock-control", "none", "--set", "full", "--launch-count", "6"]
        command += ["--kernel-name", "regex:(wavefront|strip|chunk|backward)_kernel"]
        command += ["--force-overwrite", "--export", str(target), *CASES, "calls", "cuda", name]
        lines = []
        child = Child(command, check.environment())
        ended = read_lines(child, until, LIMITS["profile"], lines.append)
        done = child.end() == 0 and ended == OK and target.exists()
        check.report["profile"][name] = f"{target.name}" if done else "\n".join(lines[-5:])
    left = [name for name in names if not check.report["profile"].get(name, "").endswith("ncu-rep")]

    def keep(name, result):
        before = check.report["profile"].get(name, "")
        check.report["profile"][name] = f"{before}\n{result['table']}"

    return check.run("profile", left, until, keep) if left else (OK, "")


def run_tests(check, until, file):
    """One pytest: its counts, and by name what failed, or was running when it hung or crashed."""
    seen, bad, running = {}, [], ""

    def on_line(line):
        nonlocal running
        running = line[:200] if "::" in line else running
        if found := re.match(r"(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b", line):
            seen[found[2]] = seen.get(found[2], 0) + 1
            if found[2] in ("FAILED", "ERROR"):
                bad.append(found[1])

    child = Child([*PYTEST, file], check.environment(), TESTS)
    status = read_lines(child, until, check.slowness * SILENCE, on_line)
    code = child.end()
    if status == HUNG:
        with contextlib.suppress(queue.Empty):
            on_line(child.next_line(1) or "")  # the test's name, in a line without an end
    if status == OK and code not in (0, 5):  # 5: no test was chosen
        status = WRONG if code == 1 else CRASHED
    told = [", ".join(f"{count} {kind.lower()}" for kind, count in seen.items()), *bad]
    if status in (HUNG, CRASHED):
        told.append(f"at {running or 'the start'}, exit code {code}")
    if status == CUT and bad:
        status = WRONG
    check.note("suite", None, file, status, None, "; ".join(filter(None, told)))


def sanitize(check, until):
    """compute-sanitizer over all kernels; slow, and no fault if time does not suffice."""
    lines = []
    child = Child(SANITIZER, check.environment())
    ended = read_lines(child, until, check.args.seconds, lines.append)
    code = child.end(patience=25)  # it ends a process group of its own
    status = ended if ended != OK else WRONG if code else OK
    check.note("suite", None, "compute-sanitizer", status, None, "; ".join(lines[-4:]))


def suite(check, until):
    def work(file):
        if time.monotonic() < until:
            run_tests(check, until, file)
        else:
            check.note("suite", None, file, CUT, None, "")

    workers = SIDE_BY_SIDE if check.on_gpu else 1
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, check.args.tests))
    if time.monotonic() < until:
        sanitize(check, until)
    else:
        check.note("suite", None, "compute-sanitizer", CUT, None, "")
    return check.summary("suite"), ""


# ---- command -----------------------------------------------------------------------------------


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run")
    parser.add_argument("--quick", action="store_true", help="a few cases of each step")
    parser.add_argument("--seconds", type=float, default=460, help="in all")
    parser.add_argument("--profile", action="store_true", help="of the two worst shapes")
    parser.add_argument("--tests", nargs="*", default=[], help="files for pytest, best first")
    parser.add_argument("--commit", help="for the report, where there is no git")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    check = Check(args)
    steps = [build, facts, smoke, performance, ways, *([profile] if args.profile else []), suite]
    try:
        complete = all(check.step(function.__name__, function) for function in steps)
    except Interrupted:
        print("gpu_check: interrupted")
        return 1
    wrong = check_report.faults(check.report)
    if not complete:
        wrong.append("nothing more can run")
    print(f"\nreport: {args.out / 'gpu_check.md'}")
    print("\n".join(wrong) if wrong else "no faults")
    return 1 if wrong else 0


def command(argv=None):
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: STOP.set())
    return main(argv)


if __name__ == "__main__":
    sys.exit(command())
