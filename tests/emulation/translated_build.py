"""Builds the emulated kernels so that what nvcc made of them runs: their PTX, translated to C++."""

import functools
import os
import subprocess
from functools import partial
from pathlib import Path

import torch
from build_cache import ROOT, build_lock, digest
from emulation_build import (
    BUILD,
    CSRC,
    EXECUTOR,
    KERNELS,
    Unit,
    build_cuda,
    compiled,
    headers,
    in_parallel,
    is_there,
    link,
    written,
)
from ptx import kernels, translate

from gatedrnn import _ops

ToolkitError = build_cuda.ToolkitError
ARCHITECTURE = os.environ.get("GATEDRNN_PTX_ARCHITECTURE", "sm_90")


def find_nvcc() -> str:
    """The nvcc that a build would take; ToolkitError says why there is none."""
    return build_cuda.find_toolkit().nvcc


def load(nvcc: str, sources: list[Unit]):
    """The ops of torch.ops.gatedrnn_emulation, whose kernels in `sources` are what `nvcc` makes of
    them; to launch another kernel is an error."""
    name = "translated" if sources == KERNELS else "translated_" + "_".join(s.name for s in sources)
    return load_once(nvcc, tuple(sources), name)


@functools.cache
def load_once(nvcc: str, sources: tuple[Unit, ...], name: str):
    with build_lock("emulation"):
        ptx = in_parallel(partial(compiled_to_ptx, nvcc), list(sources))
        translated = in_parallel(translated_object, ptx)
        host = in_parallel(compiled, [*KERNELS, *EXECUTOR, ops(name)])
        symbols = [symbol for path in ptx for symbol in kernels(path.read_text())]
        visible = in_parallel(partial(globalized, symbols), host[: len(KERNELS)])
        library = link(name, [*visible, *translated, *host[len(KERNELS) :]])
    torch.ops.load_library(str(library))
    _ops.register(f"gatedrnn_{name}")
    return getattr(torch.ops, f"gatedrnn_{name}")


def compiled_to_ptx(nvcc: str, unit: Unit) -> Path:
    command = [nvcc, *build_cuda.FLAGS, *unit.defines, f"-I{ROOT / 'csrc'}"]
    command += ["-ptx", f"-arch={ARCHITECTURE}"]
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    made_from = digest(unit.source.read_text(), headers(*CSRC), version, *command)
    target = BUILD / f"{unit.name}-{ARCHITECTURE}-{made_from}.ptx"
    if not is_there(target):
        written([*command, unit.source, "-o"], target).rename(target)
    return target


def translated_object(ptx: Path) -> Path:
    return compiled(with_text(ptx.with_suffix(".cc"), translate(ptx.read_text(), str(ptx))))


def ops(name: str) -> Path:
    """The source of the ops under another name: a process may load several such libraries."""
    text = f'#define gatedrnn_emulation gatedrnn_{name}\n#include "{ROOT}/csrc/ops.cpp"\n'
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
