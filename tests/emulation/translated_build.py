"""Builds the emulated kernels so that what nvcc made of them runs: their PTX, translated to C++.

As a program, with nvcc and an architecture: makes the objects of the translations alone.
"""

import importlib.util
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from emulation_build import (
    BUILD,
    EXECUTOR,
    ROOT,
    compiled,
    digest,
    headers,
    in_parallel,
    is_there,
    link,
    written,
)
from ptx import kernels, translate

SPEC = importlib.util.spec_from_file_location("build_cuda", ROOT / "build_cuda.py")
build_cuda = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(build_cuda)

KERNELS = sorted((ROOT / "csrc/cuda").glob("*.cu"))


def load(nvcc: str, architecture: str) -> None:
    """torch.ops.gatedrnn_translated: the ops of torch.ops.gatedrnn_emulation, of which each kernel
    that is launched is what `nvcc` makes of it for the architecture."""
    ptx, translated = translations(nvcc, architecture)
    host = in_parallel(compiled, [*KERNELS, *EXECUTOR, ops()])
    symbols = [name for path in ptx for name in kernels(path.read_text())]
    objects = [*in_parallel(partial(globalized, symbols), host[: len(KERNELS)]), *translated]
    torch.ops.load_library(str(link("translated", [*objects, *host[len(KERNELS) :]])))


def translations(nvcc: str, architecture: str) -> tuple[list[Path], list[Path]]:
    """The kernels' PTX, and the objects of what it was translated to."""
    ptx = in_parallel(partial(compiled_to_ptx, nvcc, architecture), KERNELS)
    return ptx, in_parallel(translated_object, ptx)


def compiled_to_ptx(nvcc: str, architecture: str, source: Path) -> Path:
    command = [nvcc, *build_cuda.FLAGS, f"-I{ROOT / 'csrc'}", "-ptx", f"-arch={architecture}"]
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    made_from = digest(source.read_text(), headers(ROOT / "csrc"), version, *command)
    target = BUILD / f"{source.stem}-{architecture}-{made_from}.ptx"
    if not is_there(target):
        written([*command, source, "-o"], target).rename(target)
    return target


def translated_object(ptx: Path) -> Path:
    return compiled(with_text(ptx.with_suffix(".cc"), translate(ptx.read_text(), str(ptx))))


def ops() -> Path:
    """The source of the ops under another name, for both libraries are loaded."""
    text = f'#define gatedrnn_emulation gatedrnn_translated\n#include "{ROOT}/csrc/ops.cpp"\n'
    return with_text(BUILD / f"ops-{digest(text, (ROOT / 'csrc/ops.cpp').read_text())}.cpp", text)


def globalized(symbols: list[str], kernels: Path) -> Path:
    """The object, of whose kernels none is hidden in a nameless namespace."""
    target = kernels.with_suffix(f".{digest(*symbols)}.o")
    if not is_there(target):
        command = ["objcopy", *(f"--globalize-symbol={name}" for name in symbols), kernels]
        written(command, target).rename(target)
    return target


def with_text(path: Path, text: str) -> Path:
    if not is_there(path) or path.read_text() != text:
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(text)
        part.rename(path)
    return path


if __name__ == "__main__":
    translations(*sys.argv[1:])
