"""Builds gatedrnn._C, the one native library of the package; all metadata is in pyproject.toml.

GATEDRNN_SANITIZE=address,undefined builds an instrumented library (see `make sanitize`).
"""

import json
import os
import subprocess
import sys
from glob import glob
from importlib import metadata

from setuptools import Extension, setup

TORCH = (2, 10)  # the oldest PyTorch that the library is built against and runs with
TORCH_REQUIREMENT = "torch>={}.{}".format(*TORCH)
SANITIZE = os.environ.get("GATEDRNN_SANITIZE", "")
WINDOWS = os.name == "nt"


def target_paths() -> list[str]:
    """sys.path of the environment that is installed into.

    pip's isolated build shares its interpreter and hides its packages behind PYTHONPATH and
    PYTHONNOUSERSITE; without these two the interpreter tells where they are.
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
    return json.loads(answer.stdout)


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
    flags = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"]
    if SANITIZE:
        # -fno-wrapv undoes Python's own flag, which would hide signed overflow.
        flags += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-wrapv"]
        flags += ["-O1", "-g1", "-fno-omit-frame-pointer"]
    return flags


def native_library() -> Extension:
    # The one place where sources are listed: CUDA adds its .cu files and their "nvcc" flags here.
    sources = ["csrc/ops.cpp", "csrc/bindings.cpp", *sorted(glob("csrc/cpu/*.cpp"))]
    return Extension(
        "gatedrnn._C",
        sources=sources,
        depends=sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.inc", recursive=True)),
        include_dirs=[os.path.abspath("csrc")],
        define_macros=[
            # The stable ABI of this PyTorch and of every later one.
            ("TORCH_TARGET_VERSION", "0x{:02x}{:02x}000000000000".format(*TORCH)),
            ("GATEDRNN_SANITIZE", SANITIZE.replace(",", "+") or "none"),
        ],
        # Its C functions are all that is used of PyTorch. Never torch_python: it has no stable ABI.
        libraries=["torch_cpu"],
        extra_compile_args={"cxx": compile_flags()},
        extra_link_args=[f"-fsanitize={SANITIZE}"] if SANITIZE else [],
        language="c++",
    )


def build_command() -> type:
    """PyTorch's build_ext (ninja, later nvcc), imported only by commands that compile."""
    if find_torch() is None:
        sys.exit(
            f"gatedrnn: building needs {TORCH_REQUIREMENT}, which {sys.prefix} does not have: "
            "install it, or build without --no-build-isolation"
        )
    from torch.utils import cpp_extension

    class BuildNative(cpp_extension.BuildExtension):
        def build_extensions(self) -> None:
            for extension in self.extensions:
                # torch's headers hold pybind11's as well. As system headers: their warnings are
                # not ours.
                extension.define_macros.append(
                    ("GATEDRNN_VERSION", self.distribution.get_version())
                )
                for path in cpp_extension.include_paths():
                    if WINDOWS:
                        extension.include_dirs.append(path)
                    else:
                        extension.extra_compile_args["cxx"] += ["-isystem", path]
                extension.library_dirs += cpp_extension.library_paths()
            super().build_extensions()

    return BuildNative


compiles = not {"egg_info", "dist_info", "sdist"} & set(sys.argv)
isolated_without_torch = not compiles and find_torch() is None

setup(
    ext_modules=[native_library()],
    cmdclass={"build_ext": build_command()} if compiles else {},
    # A build requirement only where there is no PyTorch to build against: never a second one.
    setup_requires=[TORCH_REQUIREMENT] if isolated_without_torch else [],
    # Instrumented objects stay apart from ordinary ones.
    options={"build": {"build_base": "build/sanitize-objects"}} if SANITIZE else {},
)
