"""Python processes in which the emulated kernels run under sanitizers."""

import os
import subprocess
import sys
from pathlib import Path

from emulation_build import CXX, HERE, ROOT


def library(name: str) -> str:
    command = [*CXX, f"-print-file-name=lib{name}.so"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def start(*arguments: str, **environment: str) -> subprocess.Popen | None:
    """A Python of these arguments with the sanitizers' run time, None where there is none."""
    libraries = [library(name) for name in ("asan", "ubsan", "stdc++")]
    if not all(Path(path).is_absolute() for path in libraries):
        return None
    environment = (
        os.environ
        | {
            "LD_PRELOAD": " ".join(libraries),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps memory until it ends
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "GATEDRNN_EMULATION_SANITIZE": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
        }
        | environment
    )
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, *arguments], env=environment, cwd=ROOT, **pipes)
