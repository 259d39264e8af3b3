"""compute-sanitizer's memcheck and racecheck over small_grid.py.

Prints NOT RUN and goes on where the tool is missing or refuses the device; fails on findings, and
where a run is not done in time.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path += [str(Path(__file__).parents[1])]

import children

GRID = Path(__file__).with_name("small_grid.py")
FOUND = 77  # the exit code asked of the tool for findings
# Without PyTorch's cache every tensor is an allocation of its own, whose ends the tool knows.
ENVIRONMENT = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
PROBE = "import torch; torch.ones(9, device='cuda').sum().item(); print('probe: done')"
MINUTES = 15  # for one tool


def find_tool():
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    folders = [os.path.join(home, "bin") for home in homes if home]
    path = os.pathsep.join([*folders, os.environ.get("PATH", "")])
    return shutil.which("compute-sanitizer", path=path)


def run(tool, kind, *arguments):
    """(exit code, output) of this Python under the tool; None for a run out of time."""
    command = [tool, "--tool", kind, "--error-exitcode", str(FOUND), sys.executable, *arguments]
    try:
        result = children.run(
            command, env=ENVIRONMENT, stderr=subprocess.STDOUT, timeout=60 * MINUTES
        )
    except subprocess.TimeoutExpired:
        return None, f"not done after {MINUTES:g} minutes"
    return result.returncode, result.stdout


def check(tool, kind):
    """Whether nothing was found, or the tool does not work here."""
    code, output = run(tool, kind, "-c", PROBE)
    if code is None:
        print(f"compute-sanitizer {kind}: FAILED on a program of PyTorch alone, {output}")
        return False
    if code != 0 or "probe: done" not in output:
        last = (output.strip().splitlines() or ["no output"])[-1]
        print(f"compute-sanitizer {kind}: NOT RUN, it fails on a program of PyTorch alone: {last}")
        return True
    code, output = run(tool, kind, str(GRID))
    if code is None:
        print(f"compute-sanitizer {kind}: FAILED, {output}")
        return False
    if code == 0 and "small grid: done" in output:
        print(f"compute-sanitizer {kind}: nothing found")
        return True
    print(output[-20_000:])
    print(f"compute-sanitizer {kind}: FAILED, exit code {code}")
    return False


def main():
    tool = find_tool()
    if tool is None:
        print("compute-sanitizer: NOT RUN, the tool is not on PATH nor at CUDA_HOME")
        return 0
    good = {kind: check(tool, kind) for kind in ("memcheck", "racecheck")}
    return 0 if all(good.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
