"""The CUDA part of the build: chooses whether to build, nvcc and architectures, and compiles.

The CUDA sources include nothing of PyTorch. So they are compiled here rather than by PyTorch's
build_ext, which refuses .cu files with a CPU-only PyTorch, or one of another CUDA version.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from glob import escape, glob
from pathlib import Path
from typing import NamedTuple

# The default without TORCH_CUDA_ARCH_LIST and without a visible GPU. nvcc may not know them all.
ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")
# PyTorch's names of GPU families. The members that nvcc knows are compiled, with PTX.
FAMILIES = {
    "Volta": ("70",),
    "Volta+Tegra": ("72",),
    "Turing": ("75",),
    "Ampere": ("80", "86"),
    "Ampere+Tegra": ("87",),
    "Ada": ("89",),
    "Hopper": ("90",),
    "Blackwell": ("100", "103", "120", "121"),
    "Blackwell+Tegra": ("110",),
}
MIN_ARCH = 70  # the first with acquire and release of global memory
NVCC = (12, 0)  # the oldest with C++20
# NVIDIA's Python packages that a build needs, and the first CUDA version that includes nvcc.
PACKAGES = "cuda-toolkit[nvcc,nvvm,crt,cudart,cccl]"
FIRST_PIP_NVCC = 13
FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Werror=switch", "-Icsrc"]
FLAGS += ["-DGATEDRNN_WITH_CUDA=1"]
# tile_kernels.cu is compiled once for each of these block sizes. 0 means any other size.
COMPILED_BLOCKS = (0, 1, 2, 4, 8, 16)


class Toolkit(NamedTuple):
    nvcc: str
    version: str  # of nvcc: "13.0"
    known: tuple[str, ...]  # architectures that it compiles for: "75", "80", ...
    runtime: str  # libcudart_static.a


class Unit(NamedTuple):
    """One run of the compiler."""

    name: str  # of the object
    source: Path
    defines: tuple[str, ...] = ()


class ToolkitError(Exception):
    """The CUDA toolkit cannot be used. The message gives the reason."""


def _output(*command: str) -> str:
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=120,  # nvcc takes about a second
        check=True,
    ).stdout


def find_toolkit() -> Toolkit:
    """The first usable CUDA toolkit of those at CUDA_HOME, CUDA_PATH, on PATH, at
    /usr/local/cuda and among the Python packages of the environment.

    Raises:
        ToolkitError: no toolkit was found, or none is usable.
    """
    if sys.platform != "linux":
        raise ToolkitError("CUDA is built on Linux only")
    homes = filter(None, (os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")))
    named = [os.path.join(home, "bin", "nvcc") for home in homes]
    candidates = [*named, "nvcc", "/usr/local/cuda/bin/nvcc"]
    for path in (path for path in sys.path if isinstance(path, str) and "\0" not in path):
        candidates += glob(os.path.join(escape(path), "nvidia", "cu*", "bin", "nvcc"))
    lacks = [f"{nvcc} is not there" for nvcc in named if shutil.which(nvcc) is None]
    for nvcc in dict.fromkeys(filter(None, map(shutil.which, candidates))):
        try:
            toolkit = _toolkit(nvcc)
        except ToolkitError as error:
            lacks.append(str(error))
        else:
            for lack in lacks:
                print(f"gatedrnn: passed over: {lack}", flush=True)
            return toolkit
    raise ToolkitError(
        "; ".join(lacks)
        or "nvcc is not at CUDA_HOME or CUDA_PATH, on PATH, at /usr/local/cuda or among the "
        "Python packages"
    )


def _toolkit(nvcc: str) -> Toolkit:
    try:
        version = re.search(r"release (\d+)\.(\d+)", _output(nvcc, "--version"))
        if version and tuple(map(int, version.groups())) < NVCC:
            raise ToolkitError(f"{nvcc} is older than {NVCC[0]}.{NVCC[1]}, which C++20 needs")
        known = re.findall(r"compute_(\d+)", _output(nvcc, "--list-gpu-arch"))
        # On PATH there may be a script or a link. Only nvcc itself knows its folder.
        top = re.search(r"TOP=(.+)", _output(nvcc, "--dryrun", "-x", "cu", os.devnull))
    except (OSError, subprocess.SubprocessError) as error:
        raise ToolkitError(f"{nvcc} does not run: {error}") from None
    if version is None or top is None or not known:
        raise ToolkitError(f"{nvcc} does not answer as nvcc does")
    folders = [escape(top[1].strip()) + f for f in ("/lib64", "/lib", "/targets/*/lib")]
    libraries = [glob(os.path.join(folder, "libcudart_static.a")) for folder in folders]
    runtime = next((os.path.realpath(found[0]) for found in libraries if found), None)
    if runtime is None:
        raise ToolkitError(f"the toolkit of {nvcc} has no libcudart_static.a")
    known = sorted(known, key=int)
    _try_to_compile(nvcc, f"sm_{known[-1]}")
    return Toolkit(nvcc, ".".join(version.groups()), tuple(known), runtime)


def _try_to_compile(nvcc: str, architecture: str) -> None:
    """Finds missing or mismatched parts, and a C++ compiler that nvcc refuses."""
    source = "#include <cuda_bf16.h>\n__global__ void kernel() {}\n"
    why = compile_error("trial.cu", source, nvcc, FLAGS[0], f"-arch={architecture}")
    if why:
        raise ToolkitError(f"{nvcc} does not compile: {why}")


def compile_error(name: str, source: str, *compiler: str) -> str | None:
    """Compiles a small source. Returns the error in one line, or None."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_text(source)
        try:
            _output(*compiler, "-c", str(path), "-o", str(path.with_suffix(".o")))
        except subprocess.CalledProcessError as error:
            found = re.search(r".*\b(error|fatal)\b.*", error.output)
            return (found[0] if found else error.output.strip() or str(error)).splitlines()[0]
        except (OSError, subprocess.SubprocessError) as error:
            return str(error)
    return None


def cuda_mode() -> str:
    """GATEDRNN_CUDA: "1" requires CUDA, "0" refuses it, "" builds it if possible."""
    value = os.environ.get("GATEDRNN_CUDA", "")
    if value not in ("", "0", "1"):
        sys.exit(f"gatedrnn: GATEDRNN_CUDA must be 0 or 1, got {value!r}")
    return value


def packages_with_nvcc(torch_cuda: str | None) -> list[str]:
    """The packages that bring nvcc for a PyTorch with this CUDA version (None: without CUDA).

    Empty if no package has it.
    """
    version = torch_cuda or f"{FIRST_PIP_NVCC}.0"
    there = sys.platform == "linux" and int(version.split(".")[0]) >= FIRST_PIP_NVCC
    return [f"{PACKAGES}=={version}.*"] if there else []


def requirements(torch_cuda: str | None) -> list[str]:
    """The packages that a build needs if it requires CUDA and finds no nvcc."""
    if cuda_mode() != "1":
        return []
    try:
        find_toolkit()
    except ToolkitError:
        return packages_with_nvcc(torch_cuda)
    return []


def choose_toolkit(torch, instrumented: bool) -> Toolkit | None:
    """The toolkit to build with, or None for the CPU only. Prints which, and why.

    GATEDRNN_CUDA=1 asks for it and =0 refuses it; otherwise it is built where PyTorch has CUDA.
    """
    wanted, cuda = cuda_mode(), torch.version.cuda
    if wanted == "0":
        return _cpu_only("GATEDRNN_CUDA is 0")
    if not wanted and cuda is None:
        return _cpu_only("this PyTorch has no CUDA")
    if not wanted and instrumented:
        return _cpu_only("the sanitizers see C++ only")
    try:
        toolkit = find_toolkit()
    except ToolkitError as error:
        remedy = [f"pip install '{name}' brings an nvcc" for name in packages_with_nvcc(cuda)]
        if wanted:
            sys.exit("; ".join([f"gatedrnn: GATEDRNN_CUDA is 1, but {error}", *remedy]))
        return _cpu_only(
            f"{error}, although this PyTorch has CUDA {cuda}",
            "; ".join(["CUDA tensors will run the slow reference loop", *remedy]),
        )
    if cuda and cuda.split(".")[0] != toolkit.version.split(".")[0]:
        print(
            f"gatedrnn: nvcc is {toolkit.version}, PyTorch's CUDA {cuda}: that is "
            "fine here, for the library holds its own CUDA runtime; the driver must know both"
        )
    return toolkit


def _cpu_only(why: str, *more: str) -> None:
    """Prints the reason. With `more` lines, it is framed."""
    lines = [f"gatedrnn: building for the CPU only: {why}", *(f"gatedrnn: {line}" for line in more)]
    rule = ["*" * max(map(len, lines))] if more else []
    print("\n".join(rule + lines + rule), flush=True)


def choose_architectures(toolkit: Toolkit, torch) -> list[str]:
    """What to compile for, as nvcc names it: "sm_90" is machine code, "compute_120" is PTX."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(",", " ").replace(";", " ").split()
    if asked and asked != ["native"]:
        return list(dict.fromkeys(name for each in asked for name in _parse_arch(each, toolkit)))
    visible = _visible(torch)
    if visible:
        return list(dict.fromkeys(_of_device(number, toolkit) for number in visible))
    numbers = [number for number in ARCHITECTURES if number in toolkit.known] or toolkit.known[-1:]
    return [f"sm_{number}" for number in numbers] + [f"compute_{numbers[-1]}"]


def _parse_arch(word: str, toolkit: Toolkit) -> list[str]:
    """An entry of TORCH_CUDA_ARCH_LIST, such as 8.6, 9.0a, 9.0+PTX or Hopper."""
    match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word, re.IGNORECASE)
    if match:
        asked, feature, ptx = (match[1] + match[2],), match[3].lower(), bool(match[4])
    elif word in FAMILIES:
        asked, feature, ptx = FAMILIES[word], "", True
    else:
        sys.exit(
            "gatedrnn: TORCH_CUDA_ARCH_LIST must be such as '8.0;9.0+PTX' or 'Ampere;Hopper', "
            f"got {word!r}"
        )
    numbers = [n + feature for n in asked if n in toolkit.known and int(n) >= MIN_ARCH]
    if not numbers:
        known = sorted(int(n) for n in toolkit.known if int(n) >= MIN_ARCH)
        names = ", ".join(f"{n // 10}.{n % 10}" for n in known)
        sys.exit(f"gatedrnn: TORCH_CUDA_ARCH_LIST has {word}, nvcc here knows {names}")
    return [f"sm_{n}" for n in numbers] + [f"compute_{numbers[-1]}"] * ptx


def _visible(torch) -> list[str]:
    try:
        if not torch.cuda.is_available():
            return []
        found = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
        return sorted({f"{major}{minor}" for major, minor in found}, key=int)
    except Exception:  # build even with a broken driver
        return []


def _of_device(number: str, toolkit: Toolkit) -> str:
    """Machine code for a GPU. If nvcc does not know the GPU, the newest PTX that it can run."""
    if number in toolkit.known:
        return f"sm_{number}"
    older = [known for known in toolkit.known if int(known) < int(number)]
    return f"compute_{max(older or toolkit.known, key=int)}"


def units(folder: Path = Path("csrc/cuda")) -> list[Unit]:
    """What is compiled of the CUDA sources in a folder."""
    found = []
    for source in sorted(folder.glob("*.cu")):
        if source.stem == "tile_kernels":
            for block in COMPILED_BLOCKS:
                name = f"{source.stem}_{block}"
                found.append(Unit(name, source, (f"-DGATEDRNN_BLOCK={block}",)))
        else:
            found.append(Unit(source.stem, source))
    return found


def compile_objects(toolkit: Toolkit, architectures: list[str], folder: Path) -> list[str]:
    """Compiles csrc/cuda/*.cu in parallel (MAX_JOBS). Objects that are up to date are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    compiled = units()
    objects = [str(folder / f"{unit.name}.o") for unit in compiled]
    flags = FLAGS + [_gencode(name) for name in architectures]
    rules = folder / "build.ninja"
    rules.write_text(
        "ninja_required_version = 1.3\n"
        f"builddir = {_escaped(str(folder))}\n"
        "rule nvcc\n"
        f"  command = {_shell(toolkit.nvcc)} -MD -MF $out.d -c $in -o $out {_shell(*flags)} "
        "$defines\n"
        "  depfile = $out.d\n"
        "  deps = gcc\n"
        + "".join(
            f"build {_escaped(target)}: nvcc {_escaped(str(unit.source))}\n"
            f"  defines = {_shell(*unit.defines)}\n"
            for target, unit in zip(objects, compiled, strict=True)
        )
    )
    given = os.environ.get("MAX_JOBS", "")
    jobs = int(given) if given.isdecimal() and int(given) else os.cpu_count() or 1
    environment = dict(os.environ)
    if jobs > len(compiled) and len(architectures) > 1:
        # Not in the command: ninja would compile again when the number of jobs changes.
        more = f"--threads {-(-jobs // len(compiled))}"
        environment["NVCC_APPEND_FLAGS"] = f"{os.environ.get('NVCC_APPEND_FLAGS', '')} {more}"
    command = [*_ninja(), "-v", "-j", str(jobs), "-f", str(rules)]
    sys.stdout.flush()
    if subprocess.run(command, env=environment).returncode:
        sys.exit("gatedrnn: nvcc failed, see above; GATEDRNN_CUDA=0 builds for the CPU only")
    return objects


def _gencode(name: str) -> str:
    return f"-gencode=arch=compute_{name.split('_')[1]},code={name}"


def _ninja() -> list[str]:
    found = shutil.which("ninja")
    command = [found] if found else [sys.executable, "-m", "ninja"]
    try:
        _output(*command, "--version")
    except (OSError, subprocess.CalledProcessError):
        sys.exit("gatedrnn: building for CUDA needs ninja: pip install ninja")
    return command


def _shell(*words: str) -> str:
    return shlex.join(words).replace("$", "$$")


def _escaped(path: str) -> str:
    return re.sub(r"([$ :])", r"$\1", path)
