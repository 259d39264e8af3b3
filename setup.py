"""Builds gatedrnn._C, the one native library of the package; all metadata is in pyproject.toml.

GATEDRNN_SANITIZE=address,undefined builds an instrumented library (see `make sanitize`);
GATEDRNN_CUDA and TORCH_CUDA_ARCH_LIST are build_cuda.py's.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from importlib import metadata
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # not there in pip's build
import build_cuda

TORCH = (2, 10)  # the oldest PyTorch that the library is built against and runs with
TORCH_REQUIREMENT = "torch>={}.{}".format(*TORCH)
SANITIZE = os.environ.get("GATEDRNN_SANITIZE", "")
WINDOWS = os.name == "nt"


def target_paths() -> list[str]:
    """sys.path of the environment that is installed into.

    pip's isolated build shares its interpreter and hides its packages behind PYTHONPATH and
    PYTHONNOUSERSITE; without these two the interpreter tells where they are. `installer_paths`
    adds what only the installer knows.
    """
    hidden = ("PYTHONPATH", "PYTHONNOUSERSITE")
    query = "import json, sys; print(json.dumps(sys.path[1:]))"
    answer = subprocess.run(
        [sys.executable, "-c", query],
        env={name: value for name, value in os.environ.items() if name not in hidden},
        cwd=sys.prefix,
        capture_output=True,
        check=True,
    )
    return [*json.loads(answer.stdout), *installer_paths(Path("/proc") / str(os.getppid()))]


def installer_paths(process: Path) -> list[str]:
    """Folders of packages that the installer was started with, from its entry in /proc (Linux).

    They are those of the user's PYTHONPATH. The build of uv has its own interpreter. For uv they
    are those of the environment that it installs into: the active one, or `.venv` of its folder.
    """
    try:
        entries = (process / "environ").read_bytes().split(b"\0")
        folder = os.readlink(process / "cwd")
        program = os.path.basename(os.readlink(process / "exe"))
    except OSError:
        return []
    found = dict(entry.split(b"=", 1) for entry in entries if b"=" in entry)
    environment = {os.fsdecode(name): os.fsdecode(value) for name, value in found.items()}
    paths = [p for p in environment.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(p)]
    if program == "uv":
        venv = environment.get("VIRTUAL_ENV") or os.path.join(folder, ".venv")
        packages = sysconfig.get_path("purelib", "posix_prefix", {"base": venv})
        paths += [packages] if os.path.isdir(packages) else []
    return paths


def torch_version(paths: list[str]) -> str | None:
    """Version of the PyTorch on these paths, None where there is none new enough to build with."""
    found = next(iter(metadata.distributions(name="torch", path=paths)), None)
    if found is None:
        return None
    major, minor = found.version.split(".")[:2]
    return found.version if (int(major), int(minor)) >= TORCH else None


def find_torch() -> str | None:
    """Makes torch importable from the target environment if the build does not see one itself."""
    version = torch_version(sys.path)
    if version is None:
        paths = target_paths()
        version = torch_version(paths)
        if version is not None:
            # Last, so that the isolated build's own setuptools and ninja go first.
            sys.path.extend(path for path in paths if path not in sys.path)
    return version


def compile_flags() -> list[str]:
    if WINDOWS:
        return ["/std:c++20", "/O2", "/W3", "/EHsc", "/permissive-"]
    # No -march: kernel files choose their instruction sets by pragma, the library when it starts.
    flags = [
        "-std=c++20",
        "-O3",
        "-g0",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        "-Werror=switch",
    ]
    if SANITIZE:
        # -fno-wrapv undoes Python's own flag, which would hide signed overflow.
        flags += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-wrapv"]
        flags += ["-O1", "-g1", "-fno-omit-frame-pointer"]
    return flags


def check_compiler(command: str) -> None:
    """Ends the build with one line if the C++ compiler cannot build the library."""
    compiler = shlex.split(command)
    if not compiler or shutil.which(compiler[0]) is None:
        why = f"{command!r} is not there"
    else:
        source = "#include <Python.h>\n#include <type_traits>\n"
        source += "static_assert(std::is_same_v<std::remove_cvref_t<const int&>, int>);\n"
        paths = [f"-I{sysconfig.get_path(name)}" for name in ("include", "platinclude")]
        error = build_cuda.compile_error("trial.cpp", source, *compiler, "-std=c++20", *paths)
        why = f"{command!r} does not compile: {error}" if error else None
    if why:
        sys.exit(
            f"gatedrnn: building needs GCC or Clang with C++20, and Python's headers; {why}. "
            "Install them (Debian and Ubuntu: apt install g++ python3-dev), or name the compiler: "
            "CXX=clang++"
        )


def native_library() -> Extension:
    # The one place where sources are listed; build_cuda.py adds the objects of csrc/cuda/*.cu.
    sources = ["csrc/ops.cpp", "csrc/bindings.cpp", *sorted(glob("csrc/cpu/*.cpp"))]
    return Extension(
        "gatedrnn._C",
        sources=sources,
        depends=sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.inc", recursive=True)),
        include_dirs=[os.path.abspath("csrc")],
        define_macros=[
            # The stable ABI of this PyTorch and of every later one.
            ("TORCH_TARGET_VERSION", "0x{:02x}{:02x}000000000000".format(*TORCH)),
        ],
        # Its C functions are all that is used of PyTorch. Never torch_python: it has no stable ABI.
        libraries=["torch_cpu"],
        extra_compile_args={"cxx": compile_flags()},
        extra_link_args=[f"-fsanitize={SANITIZE}"] if SANITIZE else [],
        language="c++",
    )


def write_facts(facts: dict[str, str], folder: Path) -> str:
    """What csrc/bindings.cpp tells of this build. A header: a flag would be every file's."""
    header = folder / "facts" / "build_facts.h"
    text = "".join(f"#define GATEDRNN_{name} {value}\n" for name, value in facts.items())
    if not header.exists() or header.read_text() != text:
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text(text)
    return str(header.parent)


def build_command() -> type:
    """PyTorch's build_ext (with ninja), imported only by commands that compile."""
    if find_torch() is None:
        sys.exit(
            f"gatedrnn: building needs {TORCH_REQUIREMENT}, which {sys.prefix} does not have: "
            "install it, or build without --no-build-isolation"
        )
    import torch
    from torch.utils import cpp_extension

    class BuildNative(cpp_extension.BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            if not WINDOWS:
                usual = "c++" if self.use_ninja else sysconfig.get_config_var("CXX")
                check_compiler(os.environ.get("CXX") or usual or "c++")
            # An editable installation's own is gone after it, and with it what need not be compiled
            # again. Instrumented objects stay apart from ordinary ones, and each PyTorch's.
            kind = ["objects", SANITIZE.replace(",", "+"), self.plat_name]
            kind += [sys.implementation.cache_tag, torch.__version__]
            # Those with CUDA too: an interrupted build must not leave objects of the other kind.
            self.toolkit = build_cuda.choose_toolkit(torch, bool(SANITIZE))
            kind += ["cuda"] if self.toolkit else []
            self.build_temp = os.path.join("build", "-".join(filter(None, kind)))
            self.force = True  # without ninja nobody compares the flags of a build with the last's

        def build_extensions(self) -> None:
            (extension,) = self.extensions
            facts = {
                "VERSION": f'"{self.distribution.get_version()}"',
                "SANITIZERS": f'"{SANITIZE.replace(",", "+") or "none"}"',
            }
            toolkit = self.toolkit
            extension.define_macros.append(("GATEDRNN_WITH_CUDA", "1" if toolkit else "0"))
            if toolkit:
                names = build_cuda.choose_architectures(toolkit, torch)
                print(f"gatedrnn: CUDA {toolkit.version} ({toolkit.nvcc}) for {', '.join(names)}")
                folder = Path(self.build_temp, "cuda")
                extension.extra_objects += build_cuda.compile_objects(toolkit, names, folder)
                # Its own CUDA runtime, which no other library sees.
                extension.extra_link_args += [toolkit.runtime, "-ldl", "-lrt", "-lpthread"]
                extension.extra_link_args.append("-Wl,--exclude-libs,libcudart_static.a")
                facts["CUDA_VERSION"] = f'"{toolkit.version}"'
                facts["CUDA_ARCHITECTURES"] = ", ".join(f'"{name}"' for name in names)
            extension.include_dirs.append(write_facts(facts, Path(self.build_temp).absolute()))
            # torch's headers hold pybind11's as well. As system headers: their warnings are
            # not ours.
            for path in cpp_extension.include_paths():
                if WINDOWS:
                    extension.include_dirs.append(path)
                else:
                    extension.extra_compile_args["cxx"] += ["-isystem", path]
            extension.library_dirs += cpp_extension.library_paths()
            super().build_extensions()

    return BuildNative


class BuildPython(build_py):
    """Starts from an empty folder: one of an earlier build may hold files that are gone since."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "gatedrnn", ignore_errors=True)
        super().run()


def build_requirements() -> list[str]:
    """What an isolated build fetches in addition to pyproject.toml's packages.

    A PyTorch if the environment has none, and an nvcc if GATEDRNN_CUDA asks for CUDA.
    """
    if find_torch() is None:
        return [TORCH_REQUIREMENT, *build_cuda.requirements(None)]
    if build_cuda.cuda_mode() != "1":
        return []
    import torch

    return build_cuda.requirements(torch.version.cuda)


compiles = not {"egg_info", "dist_info", "sdist"} & set(sys.argv)

setup(
    ext_modules=[native_library()],
    cmdclass={"build_py": BuildPython} | ({"build_ext": build_command()} if compiles else {}),
    setup_requires=[] if compiles else build_requirements(),
    # An instrumented library stays apart from an ordinary one.
    options={"build": {"build_base": "build/sanitize-objects"}} if SANITIZE else {},
)
