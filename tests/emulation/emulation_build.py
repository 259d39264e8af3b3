"""Builds CUDA sources as C++ against the emulation, and loads them as torch ops.

With GATEDRNN_EMULATION_SANITIZE=1 they are built under sanitizers (of addresses, and of the
alignment that vector accesses need on a GPU), with whose run time the process must have started.
"""

import functools
import importlib.util
import os
import shlex
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from build_cache import ROOT, build_lock, digest
from torch.utils import cpp_extension

SPEC = importlib.util.spec_from_file_location("build_cuda", ROOT / "build_cuda.py")
build_cuda = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(build_cuda)
Unit = build_cuda.Unit

HERE = ROOT / "tests/emulation"
BUILD = ROOT / "build/emulation"
SANITIZED = os.environ.get("GATEDRNN_EMULATION_SANITIZE", "") not in ("", "0")
SANITIZE = "address,alignment" if SANITIZED else ""
CXX = shlex.split(os.environ.get("CXX") or "g++")  # the compiler, or what starts it before it
JOBS = int(os.environ.get("MAX_JOBS") or 0) or 2
KEPT = 14 * 24 * 3600  # seconds that a file in BUILD is kept after its last use

FLAGS = [
    *("-x", "c++", "-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden"),
    *("-Wall", "-Wextra", "-Werror=switch", "-Wno-unknown-pragmas"),
    *("-DGATEDRNN_EMULATION", "-DGATEDRNN_WITH_CUDA=1"),
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # as in setup.py
    *(f"-I{path}" for path in (HERE, ROOT / "csrc")),
    *(flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)),
]
if SANITIZE:
    # Checks as calls, and none of the layout of stacks: the compiler takes half the time.
    FLAGS += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    FLAGS += ["--param=asan-instrumentation-with-call-threshold=0", "--param=asan-stack=0"]

# Every access of a kernel calls into accesses.cpp, where the address sanitizer has no use for that.
KERNEL_FLAGS = ["-O1", *([] if SANITIZE else ["-fsanitize=thread"])]
EXECUTOR_FLAGS = ["-O2"]
# Translated kernels (translated_build.py) are long: to optimise them takes more time than it saves.
# Arithmetic is a GPU's, and addresses are numbers.
TRANSLATED_FLAGS = ["-O0", "-g0", "-w", "-fwrapv", "-ffp-contract=off"]

EXECUTOR = sorted(HERE.glob("*.cpp"))
KERNELS = build_cuda.units(ROOT / "csrc/cuda")
CSRC = [ROOT / "csrc", ROOT / "csrc/cuda"]  # whose headers the kernels include


def load(name: str, sources: list[Path | Unit]) -> None:
    """Builds `sources` and the executor where they have changed, and loads the library."""
    with build_lock("emulation"):
        library = build(name, sources)
    torch.ops.load_library(str(library))


def build(name: str, sources: list[Path | Unit]) -> Path:
    return link(name, in_parallel(compiled, [*sources, *EXECUTOR]))


def in_parallel(make, sources: list) -> list[Path]:
    BUILD.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(JOBS) as pool:
        return list(pool.map(make, sources))


def link(name: str, objects: list[Path]) -> Path:
    """The library of these objects. What nobody has used for long is removed."""
    for path in BUILD.iterdir():
        with suppress(FileNotFoundError):  # other processes clear up too
            if path.stat().st_mtime < time.time() - KEPT:
                path.unlink()
    library = BUILD / f"{name}-{digest(*(path.name for path in objects))}.so"
    if not is_there(library):
        command = [*CXX, "-shared", *objects]
        command += [*(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch_cpu"]
        command += [*([f"-fsanitize={SANITIZE}"] if SANITIZE else []), "-o"]
        written(command, library).rename(library)
    return library


def compiled(source: Path | Unit) -> Path:
    """The object of a source. Its name has a digest of everything that it was made from."""
    name, source, defines = source if isinstance(source, Unit) else Unit(source.stem, source)
    more = {".cu": KERNEL_FLAGS, ".cpp": EXECUTOR_FLAGS, ".cc": TRANSLATED_FLAGS}[source.suffix]
    flags = [*FLAGS, *more, *defines]
    folders = [HERE] if more is TRANSLATED_FLAGS else [HERE, *CSRC]

    def made_of() -> str:
        return digest(source.read_text(), headers(*folders), compiler(), torch.__version__, *flags)

    made_from = made_of()
    target = BUILD / f"{name}-{made_from}.o"
    if not is_there(target):
        part = written([*CXX, *flags, "-c", source, "-o"], target)
        if made_of() != made_from:
            part.unlink()
            raise RuntimeError(f"{source} or a header has changed while it was compiled")
        part.rename(target)
    return target


def is_there(path: Path) -> bool:
    """Whether a file was built before; that it is used now is noted."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def written(command: list, target: Path) -> Path:
    """What `command` writes. Rename it when it is complete: other processes may build it too."""
    part = target.with_suffix(f".{os.getpid()}{target.suffix}")
    command = [str(word) for word in (*command, part)]
    plain = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(command, capture_output=True, text=True, env=plain)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr}")
    return part


def headers(*folders: Path) -> str:
    files = sorted(path for folder in folders for path in folder.iterdir())
    included = (path for path in files if path.suffix in (".h", ".inc", ".cuh"))
    return "\0".join(path.read_text() for path in included)


@functools.cache
def compiler() -> str:
    return subprocess.run([*CXX, "--version"], capture_output=True, text=True, check=True).stdout
