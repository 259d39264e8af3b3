"""The CUDA build: what decides it, and a wheel of it, compiled once, with the PyTorch here."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import children
import fatbin
import pytest
import torch
from build_cache import build_lock, digest

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("build_cuda", ROOT / "build_cuda.py")
build_cuda = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(build_cuda)

TOOLKIT = build_cuda.Toolkit("nvcc", "13.0", ("75", "80", "86", "90", "100", "120"), "libcudart.a")


def torch_with(cuda, *capabilities):
    """As much of torch as the build looks at."""
    gpus = SimpleNamespace(
        is_available=lambda: bool(capabilities),
        device_count=lambda: len(capabilities),
        get_device_capability=lambda index: capabilities[index],
    )
    return SimpleNamespace(version=SimpleNamespace(cuda=cuda), cuda=gpus)


@pytest.fixture
def environment(monkeypatch):
    for name in ("GATEDRNN_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    return lambda **values: [monkeypatch.setenv(*item) for item in values.items()]


@pytest.mark.parametrize(
    ("asked", "cuda", "found", "built", "says"),
    [
        ("", "13.0", True, True, ""),
        ("", "12.8", True, True, "nvcc is 13.0, PyTorch's CUDA 12.8"),
        ("", None, True, False, "CPU only: this PyTorch has no CUDA"),
        ("", "13.0", False, False, "CPU only: no nvcc, although this PyTorch has CUDA 13.0"),
        ("1", None, True, True, ""),
        ("0", "13.0", True, False, "CPU only: GATEDRNN_CUDA is 0"),
    ],
)
def test_cuda_is_built_where_it_can_be_or_as_asked(
    asked, cuda, found, built, says, environment, monkeypatch, capsys
):
    def find_toolkit():
        if not found:
            raise build_cuda.ToolkitError("no nvcc")
        return TOOLKIT

    monkeypatch.setattr(build_cuda, "find_toolkit", find_toolkit)
    monkeypatch.setattr(sys, "platform", "linux")
    environment(GATEDRNN_CUDA=asked)
    assert (build_cuda.choose_toolkit(torch_with(cuda), False) is TOOLKIT) == built
    said = capsys.readouterr().out
    assert says in said if says else said == ""


# What answers as nvcc does, as far as the build asks; {trial} is how it compiles.
NVCC = """#!/bin/sh
case "$*" in
  *--version*) printf "Cuda compilation tools, release {release}, V{release}.1\\n" ;;
  *--list-gpu-arch*) printf 'compute_90\ncompute_120\ncompute_100\n' ;;
  *--dryrun*) echo "#$ TOP={top}" ;;
  *) {trial} ;;
esac
"""


def toolkit_in(top, release="13.0", trial=":", runtime=True):
    """A folder that looks like a CUDA toolkit; its nvcc."""
    nvcc, library = top / "bin" / "nvcc", top / "lib" / "libcudart_static.a"
    for file in (nvcc, library):
        file.parent.mkdir(parents=True)
    nvcc.write_text(NVCC.format(release=release, top=top, trial=trial))
    nvcc.chmod(0o755)
    if runtime:
        library.touch()
    return str(nvcc)


@pytest.fixture
def no_nvcc(environment, monkeypatch):
    """As on a machine that has no CUDA toolkit."""
    which = shutil.which
    hidden = ("nvcc", "/usr/local/cuda/bin/nvcc")
    monkeypatch.setattr(shutil, "which", lambda name: None if name in hidden else which(name))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys, "path", [])
    return environment


def copy_sources(to):
    """What the package is built from."""
    for folder in ("csrc", "gatedrnn"):
        ignore = shutil.ignore_patterns("_C.*.so", "__pycache__")
        shutil.copytree(ROOT / folder, to / folder, ignore=ignore)
    for name in ("setup.py", "build_cuda.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to)


PACKAGES = "cuda-toolkit[nvcc,nvvm,crt,cudart,cccl]"


@pytest.mark.parametrize(
    ("cuda", "remedy"),
    [
        (None, f"; pip install '{PACKAGES}==13.0.*' brings an nvcc"),
        ("13.2", f"; pip install '{PACKAGES}==13.2.*' brings an nvcc"),
        ("12.8", ""),
    ],
)
def test_without_nvcc_the_error_says_what_brings_one(cuda, remedy, no_nvcc, capsys):
    lacks = "nvcc is not at CUDA_HOME or CUDA_PATH, on PATH, at /usr/local/cuda or among the Python"
    no_nvcc(GATEDRNN_CUDA="1")
    expected = f"gatedrnn: GATEDRNN_CUDA is 1, but {lacks} packages{remedy}"
    with pytest.raises(SystemExit, match=f"^{re.escape(expected)}$"):
        build_cuda.choose_toolkit(torch_with(cuda), False)
    if cuda:
        no_nvcc(GATEDRNN_CUDA="")
        assert build_cuda.choose_toolkit(torch_with(cuda), False) is None
        said = capsys.readouterr().out
        assert f"{lacks} packages, although this PyTorch has CUDA {cuda}\n" in said
        assert f"CUDA tensors will run the slow reference loop{remedy}\n" in said


@pytest.mark.parametrize(
    ("asked", "cuda", "packages"),
    [
        ("1", "13.0", [f"{PACKAGES}==13.0.*"]),
        ("1", None, [f"{PACKAGES}==13.0.*"]),
        ("1", "12.8", []),
        ("", "13.0", []),
        ("0", "13.0", []),
    ],
)
def test_nvcc_is_fetched_only_if_asked_for_and_missing(asked, cuda, packages, no_nvcc, tmp_path):
    no_nvcc(GATEDRNN_CUDA=asked)
    assert build_cuda.requirements(cuda) == packages
    toolkit_in(tmp_path)
    no_nvcc(CUDA_HOME=str(tmp_path))
    assert build_cuda.requirements(cuda) == []


@pytest.mark.parametrize("asked", ["1", ""])
def test_isolated_build_asks_pip_for_the_packages(asked, environment, tmp_path):
    copy_sources(tmp_path)
    environment(GATEDRNN_CUDA=asked)
    code = """
import shutil
which = shutil.which
shutil.which = lambda name: None if name.endswith("nvcc") else which(name)
from setuptools import build_meta
print(build_meta.get_requires_for_build_editable())
"""
    command = [sys.executable, "-c", code]
    result = children.run(command, cwd=tmp_path, check=True)
    packages = build_cuda.packages_with_nvcc(torch.version.cuda) if asked else []
    assert result.stdout.splitlines()[-1] == str(packages)


def test_first_toolkit_that_serves_is_taken(no_nvcc, monkeypatch, tmp_path):
    faults = {
        "old": ({"release": "11.8"}, "is older than 12.0, which C++20 needs"),
        "odd": ({"release": "\\377"}, "does not answer as nvcc does"),
        "bare": ({"runtime": False}, "has no libcudart_static.a"),
        "unfit": (
            {"trial": "echo 'host_config.h: error: unsupported GNU version' >&2; exit 1"},
            "does not compile: host_config.h: error: unsupported GNU version",
        ),
        "mute": ({"trial": "exit 3"}, "returned non-zero exit status 3."),
    }
    for name, (options, _) in faults.items():
        packages = tmp_path / "of [python]" / name
        toolkit_in(packages / "nvidia" / "cu13", **options)
        sys.path.append(str(packages))
    with pytest.raises(build_cuda.ToolkitError) as error:
        build_cuda.find_toolkit()
    for said, (_, why) in zip(str(error.value).split("; "), faults.values(), strict=True):
        assert said.endswith(why)

    sys.path += [None, b"/", "a\0b", str(tmp_path)]
    nvcc = toolkit_in(tmp_path / "nvidia" / "cu13")
    found = build_cuda.find_toolkit()
    assert found[:3] == (nvcc, "13.0", ("90", "100", "120"))
    assert found.runtime == str(tmp_path / "nvidia" / "cu13" / "lib" / "libcudart_static.a")
    at_home = toolkit_in(tmp_path / "home", release="12.4")
    no_nvcc(CUDA_HOME=str(tmp_path / "home"))
    assert build_cuda.find_toolkit().nvcc == at_home


def test_nvcc_that_is_passed_over_is_named(no_nvcc, capsys, tmp_path):
    wrong = tmp_path / "wrong" / "bin" / "nvcc"
    no_nvcc(CUDA_HOME=str(wrong.parents[1]))
    with pytest.raises(build_cuda.ToolkitError, match=f"^{wrong} is not there$"):
        build_cuda.find_toolkit()
    old = toolkit_in(tmp_path / "old", release="11.8")
    no_nvcc(CUDA_PATH=str(tmp_path / "old"))
    sys.path.append(str(tmp_path))
    toolkit_in(tmp_path / "nvidia" / "cu13")
    build_cuda.find_toolkit()
    assert capsys.readouterr().out == (
        f"gatedrnn: passed over: {wrong} is not there\n"
        f"gatedrnn: passed over: {old} is older than 12.0, which C++20 needs\n"
    )


def test_other_values_of_the_variable_are_refused(environment):
    environment(GATEDRNN_CUDA="yes")
    with pytest.raises(SystemExit, match="GATEDRNN_CUDA must be 0 or 1, got 'yes'"):
        build_cuda.choose_toolkit(torch_with("13.0"), False)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("9.0", ["sm_90"]),
        ("8.0;9.0+PTX", ["sm_80", "sm_90", "compute_90"]),
        ("7.5 8.6,12.0+PTX", ["sm_75", "sm_86", "sm_120", "compute_120"]),
        ("9.0a;9.0a", ["sm_90a"]),
        ("Hopper;8.0", ["sm_90", "compute_90", "sm_80"]),
        ("Blackwell", ["sm_100", "sm_120", "compute_120"]),  # this nvcc knows not all of it
    ],
)
def test_architectures_are_those_of_the_list(asked, expected, environment):
    environment(TORCH_CUDA_ARCH_LIST=asked)
    assert build_cuda.choose_architectures(TOOLKIT, torch_with("13.0", (8, 0))) == expected


@pytest.mark.parametrize("asked", ["Kepler", "Ada", "hopper", "9", "5.0", "13.0", "9.0+SASS"])
def test_lists_that_nvcc_does_not_know_are_refused(asked, environment):
    environment(TORCH_CUDA_ARCH_LIST=asked)
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST"):
        build_cuda.choose_architectures(TOOLKIT, torch_with(None))


def test_architectures_without_a_list_are_those_of_the_gpus(environment):
    beside = torch_with("13.0", (9, 0), (8, 0), (9, 0), (12, 1))
    expected = ["sm_80", "sm_90", "compute_120"]  # 12.1, which this nvcc does not know, runs PTX
    assert build_cuda.choose_architectures(TOOLKIT, beside) == expected
    environment(TORCH_CUDA_ARCH_LIST="native")
    assert build_cuda.choose_architectures(TOOLKIT, beside) == expected


def test_architectures_without_a_gpu_are_all_that_nvcc_knows(environment):
    expected = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
    assert build_cuda.choose_architectures(TOOLKIT, torch_with("13.0")) == expected
    broken = torch_with("13.0")
    broken.cuda.is_available = lambda: 1 / 0
    assert build_cuda.choose_architectures(TOOLKIT, broken) == expected


# ---- with nvcc ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toolkit():
    try:
        return build_cuda.find_toolkit()
    except build_cuda.ToolkitError as error:
        pytest.skip(f"no CUDA toolkit: {error}")


@pytest.mark.slow
@pytest.mark.build
def test_objects_are_compiled_again_only_when_they_must(toolkit, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    sources = tmp_path / "csrc" / "cuda"
    sources.mkdir(parents=True)
    (sources / "toy.cuh").write_text("constexpr int kValue = 1;\n")
    (sources / "toy.cu").write_text(
        '#include "cuda/toy.cuh"\n__global__ void toy(int* p) { *p = kValue; }\n'
    )

    def compiles(*architectures):
        (built,) = build_cuda.compile_objects(toolkit, list(architectures), Path("objects $ 1"))
        assert sorted(fatbin.architectures(built)) == sorted(architectures)
        return "no work to do" not in capfd.readouterr().out

    assert compiles("sm_90")
    assert not compiles("sm_90")
    monkeypatch.setenv("MAX_JOBS", "4")
    assert not compiles("sm_90")
    assert compiles("sm_90", "compute_90")
    (sources / "toy.cuh").write_text("constexpr int kValue = 2;\n")
    assert compiles("sm_90", "compute_90")


@pytest.mark.parametrize("source", sorted((ROOT / "csrc").rglob("cuda/*")), ids=lambda p: p.name)
def test_what_if_constexpr_decides_stands_in_braces_or_on_one_line(source):
    # In a generic lambda nvcc (seen: 13.0 and 13.5) silently drops the statement after a
    # bare loop that such an `if` discards; g++, and so the emulation, keeps it.
    text = source.read_text()
    for start in re.finditer(r"if constexpr \(", text):
        end, depth = start.end(), 1
        while depth:
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        decided = text[end:].lstrip().split("\n", 1)[0]
        one_line = decided.endswith(";") and not re.match(r"(for|while|do|if|switch)\b", decided)
        line = text.count("\n", 0, start.start()) + 1
        assert decided.startswith("{") or one_line, f"{source.name}:{line}: {decided}"


def wheel_test(test):
    """Marks a test of the CUDA wheel, which takes minutes to compile where it is not kept."""
    for mark in (pytest.mark.slow, pytest.mark.build, pytest.mark.timeout(1800)):
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def wheel(toolkit, tmp_path_factory):
    """What the build printed, and the folder of an unpacked wheel for sm_90."""
    sources = tmp_path_factory.mktemp("sources")
    copy_sources(sources)
    contents = [path.read_bytes().hex() for path in sorted(sources.rglob("*")) if path.is_file()]
    made_from = digest(*contents, *map(str, toolkit), torch.__version__, sys.version)
    kept = ROOT / "build" / f"cuda-wheel-{made_from}"
    with build_lock("cuda-wheel"):
        if not (kept / "output.txt").is_file():
            build_wheel(sources, kept)
    return (kept / "output.txt").read_text(), kept / "unpacked"


def build_wheel(sources, kept):
    for old in kept.parent.glob("cuda-wheel-*"):
        shutil.rmtree(old)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(sources)!r})"
    variables = {
        "GATEDRNN_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": "9.0",
        "NVCC_APPEND_FLAGS": "-Werror all-warnings -Xcompiler -Wall,-Wextra,-Werror -Xptxas -v",
    }
    result = children.run(
        [sys.executable, "-c", code],
        cwd=sources,
        env={**os.environ, **variables},
        stderr=subprocess.STDOUT,
        timeout=1500,
    )
    assert result.returncode == 0, result.stdout
    (archive,) = sources.glob("*.whl")
    zipfile.ZipFile(archive).extractall(kept / "unpacked")
    (kept / "output.txt").write_text(result.stdout)


@wheel_test
def test_wheel_holds_machine_code_for_the_architectures_asked_for(wheel):
    (library,) = (wheel[1] / "gatedrnn").glob("_C.*.so")
    held = fatbin.architectures(library)
    assert set(held) == {"sm_90"}
    assert len(held) == len(build_cuda.units(ROOT / "csrc" / "cuda"))


@wheel_test
def test_kernels_of_known_block_sizes_spill_no_registers(wheel):
    # ptxas -v prints the mangled name of each function, then its spills. The name of a kernel has
    # KernelTraits<float, K, ...>, where K is the block size. K = 0, any size, may spill.
    entries = re.findall(
        r"Function properties for (\S+)\n.*?(\d+) bytes spill stores, (\d+) bytes spill loads",
        wheel[0],
    )
    spills, blocks = {}, set()
    for name, stores, loads in entries:
        block = re.search(r"KernelTraitsI[fd]Li(\d+)E", name)
        blocks.add(int(block[1]) if block else None)
        if not (block and int(block[1]) == 0) and int(stores) + int(loads):
            spills[name] = f"{stores} bytes stored, {loads} loaded"
    assert {0, 1, 2, 4, 8, 16} <= blocks
    assert spills == {}


@wheel_test
def test_cuda_build_serves_cpu_tensors_beside_this_pytorch(wheel, toolkit):
    environment = {**os.environ, "PYTHONPATH": str(wheel[1]), "LD_BIND_NOW": "1"}
    code = "from gatedrnn import _C; i = _C.build_info(); "
    code += "print(_C.__file__, i['cuda_version'], *i['cuda_architectures'])"
    result = children.run(
        [sys.executable, "-c", code],
        cwd=sys.prefix,
        env=environment,
        check=True,
    )
    path, *facts = result.stdout.split()
    assert Path(path).is_relative_to(wheel[1])
    assert facts == [toolkit.version, "sm_90"]
    # All that test_install.py asks of a library; not from the checkout, which holds another.
    chosen = ["test_install.py", "-k", "library_ or build_info or command_prints"]
    result = children.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "", *chosen],
        cwd=ROOT / "tests",
        env=environment,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout
