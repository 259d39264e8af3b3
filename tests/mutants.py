"""Applies each small fault of mutants.toml to a copy of the project; the default tests must fail.

All work happens in build/mutants. Results are kept there, so that an interrupted run goes on.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "tests/mutants.toml"
WORK = ROOT / "build/mutants"
TREE = WORK / "tree"
LIBRARY = WORK / "library"  # the library of the unchanged sources
LOG = WORK / "last-output.txt"  # of the last build or test run
RESULTS = WORK / "results.json"
SECONDS = 20 * 60  # for one run of pytest
KEYS = {"name": str, "file": str, "find": str, "replace": str, "first": list}
CRASHES = tuple(-s for s in (signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGSEGV))
TIMED_OUT = None


def load_mutants() -> tuple[list[dict], list[str]]:
    """The mutants, and what is wrong with them, one line each."""
    mutants, wrong, names = tomllib.loads(TABLE.read_text("utf-8"))["mutant"], [], set()
    for i, mutant in enumerate(mutants, start=1):
        types = {key: type(value) for key, value in mutant.items()}
        if types != KEYS or not all(isinstance(path, str) for path in mutant["first"]):
            wrong.append(f"mutant {i}: needs exactly the keys {', '.join(KEYS)} of the right types")
            continue
        name, file = mutant["name"], ROOT / mutant["file"]
        if name in names:
            wrong.append(f"{name!r}: another mutant has this name")
        names.add(name)
        missing = [path for path in mutant["first"] if not (ROOT / path).is_file()]
        wrong += [f"{name!r}: there is no test file {path}" for path in missing]
        if not file.is_file():
            wrong.append(f"{name!r}: there is no file {mutant['file']}")
        elif (count := file.read_text("utf-8").count(mutant["find"])) != 1:
            wrong.append(f"{name!r}: {mutant['file']} must hold `find` once, it does {count} times")
    return mutants, wrong


def digest_of(mutant: dict) -> str:
    text = json.dumps(mutant, sort_keys=True) + (ROOT / mutant["file"]).read_text("utf-8")
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, "utf-8")
    temporary.replace(path)


def synchronise() -> None:
    """Makes TREE the checkout's files. What is equal stays, with its time; builds stay too."""
    command = ["git", "ls-files", "-z", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = {name for name in listed.split("\0") if name and (ROOT / name).is_file()}
    TREE.mkdir(parents=True, exist_ok=True)
    for path in sorted(TREE.rglob("*")):
        name = path.relative_to(TREE).as_posix()
        kept = name in names or name.startswith("build/") or is_library(name)
        if path.is_file() and not kept:
            path.unlink()
    for name in names:
        source, target = ROOT / name, TREE / name
        if not target.is_file() or target.read_bytes() != source.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())  # with a new time, so that it is compiled
        shutil.copymode(source, target)


def is_library(name: str) -> bool:
    return re.fullmatch(r"gatedrnn/_C\..*(so|pyd)", name) is not None


def run(command: list[str], seconds: float | None = None) -> int | None:
    """The exit status of a command in TREE, TIMED_OUT after `seconds`; its output goes to LOG."""
    scripts = os.path.dirname(sys.executable)  # of ninja
    environment = os.environ | {
        "PATH": scripts + os.pathsep + os.environ.get("PATH", ""),
        "PYTHONPATH": str(TREE),
        "PYTHONDONTWRITEBYTECODE": "1",  # bytecode of a mutant could outlive it
    }
    with open(LOG, "w") as log:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=TREE,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return TIMED_OUT
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def build() -> bool:
    return run(["setup.py", "build_ext", "--inplace"]) == 0


def run_tests(files: list[str], workers: int, *, caches: bool = False) -> int | None:
    parallel = ["-n", str(workers)] if workers else []
    quick = [] if caches else ["-p", "no:cacheprovider"]
    return run(["-m", "pytest", "-x", "-q", "-rfE", *parallel, *quick, *files], SECONDS)


def copy_library(source: Path, target: Path) -> None:
    """Copies gatedrnn/_C*, whose old file a process that has it open goes on to use."""
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if is_library(f"gatedrnn/{path.name}"):
            temporary = target / f"{path.name}.tmp"
            shutil.copy2(path, temporary)
            temporary.replace(target / path.name)


def first_failure() -> str | None:
    """The first test that failed, from pytest's summary."""
    found = re.search(
        r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$", LOG.read_text(errors="replace"), re.M
    )
    return found and found[1]


def verdict(mutant: dict, workers: int) -> tuple[str, str]:
    """killed, survived or error, and the test that noticed or what went wrong; TREE is mutated."""
    native = mutant["file"].startswith("csrc/")
    # The tests of the emulation compile csrc/cuda themselves.
    if native and not mutant["file"].startswith("csrc/cuda/") and not build():
        return "error", f"the build failed, see {kept_log(mutant)}"
    for files in (mutant["first"], []):
        status = run_tests(files, workers)
        if status is TIMED_OUT:
            return "killed", "by the time limit"
        if status in CRASHES:
            return "killed", f"by {signal.Signals(-status).name}"
        # pytest-xdist ends with 2 where -x has stopped the tests.
        if status in (1, 2) and (test := first_failure()):
            return "killed", test
        if status not in (0, 5):  # 5: every test of the files is slow
            return "error", f"pytest ended with {status}, see {kept_log(mutant)}"
    return ("survived", "") if status == 0 else ("error", "pytest found no test")


def kept_log(mutant: dict) -> str:
    log = WORK / f"{digest_of(mutant)}.txt"
    shutil.copyfile(LOG, log)
    return str(log.relative_to(ROOT))


def try_mutant(mutant: dict, workers: int) -> dict:
    path, start = TREE / mutant["file"], time.monotonic()
    text = path.read_bytes()
    mutated = text.decode().replace(mutant["find"], mutant["replace"])
    try:
        path.write_bytes(mutated.encode())
        result, by = verdict(mutant, workers)
    finally:
        path.write_bytes(text)
        copy_library(LIBRARY, TREE / "gatedrnn")
    return {"result": result, "by": by, "seconds": round(time.monotonic() - start)}


def table_of(mutants: list[dict], results: dict[str, dict]) -> str:
    lines = ["| mutant | file | result | noticed by | seconds |", "|---|---|---|---|---|"]
    for mutant in mutants:
        row = results.get(digest_of(mutant), {"result": "not run", "by": "", "seconds": ""})
        cells = mutant["name"], mutant["file"], row["result"], row["by"], str(row["seconds"])
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def try_all(mutants: list[dict], results: dict[str, dict], args: argparse.Namespace) -> None:
    synchronise()
    print("building the unchanged sources", flush=True)
    if not build():
        sys.exit(f"mutants: the unchanged sources don't build, see {LOG}")
    copy_library(TREE / "gatedrnn", LIBRARY)
    if not args.skip_baseline:
        print("running the default tests on the unchanged sources", flush=True)
        if (status := run_tests([], args.workers, caches=True)) != 0:
            sys.exit(f"mutants: the unchanged sources fail the tests ({status}), see {LOG}")
    for i, mutant in enumerate(mutants, start=1):
        key = digest_of(mutant)
        known = results.get(key, {}).get("result") == "killed"
        if not known:
            results[key] = try_mutant(mutant, args.workers)
            write_atomically(RESULTS, json.dumps(results, indent=1))
        row = results[key]
        took = "known" if known else f"{row['seconds']} s"
        line = f"{row['result']} ({took})  {mutant['name']}  {row['by']}".rstrip()
        print(f"{i}/{len(mutants)}  {line}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    parser.add_argument("--only", metavar="TEXT", default="", help="those with TEXT in the name")
    parser.add_argument("--fresh", action="store_true", help="forget all results")
    parser.add_argument(
        "--skip-baseline", action="store_true", help="don't test the unchanged sources first"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes of pytest; 0: one, no -n")
    args = parser.parse_args()
    mutants, wrong = load_mutants()
    if wrong:
        sys.exit("\n".join([f"mutants: {TABLE} has faults:", *wrong]))
    mutants = [mutant for mutant in mutants if args.only.lower() in mutant["name"].lower()]
    if not mutants:
        sys.exit(f"mutants: no name contains {args.only!r}")
    if args.list:
        print("\n".join(f"{mutant['file']}: {mutant['name']}" for mutant in mutants))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if args.fresh:
        RESULTS.unlink(missing_ok=True)
    results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {}
    try:
        try_all(mutants, results, args)
    except KeyboardInterrupt:
        print("\nmutants: stopped; the results so far are kept", file=sys.stderr)
        return 130
    table = table_of(mutants, results)
    print(f"\n{table}", end="")
    write_atomically(WORK / "table.md", table)
    return int(any(results[digest_of(mutant)]["result"] != "killed" for mutant in mutants))


if __name__ == "__main__":
    sys.exit(main())
