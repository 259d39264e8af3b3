"""The installed package: what the library needs, what it says of itself, and how it is built."""

import os
import re
import runpy
import shutil
import sys
import sysconfig
import tarfile
import venv
from importlib import metadata
from pathlib import Path

import children
import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from tiers import sampled

import gatedrnn
from gatedrnn import _C
from gatedrnn import __main__ as command

ROOT = Path(__file__).parents[1]
INFO = _C.build_info()

reads_elf = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("nm") is None, reason="needs ELF and binutils"
)


def run(*arguments, cwd=sys.prefix, **environment):
    # Never in the source folder, which Python would import from before the installed package.
    return children.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        timeout=120,
    )


@reads_elf
def test_library_needs_only_the_stable_abi_of_torch():
    listing = children.run(["nm", "-D", "--undefined-only", _C.__file__], check=True)
    names = [line.split()[1] for line in listing.stdout.splitlines()]
    assert "aoti_torch_library_init_def" in names  # or nm has told nothing
    # c10::, at::, torch:: as a mangled name spells them, also inside template arguments.
    unstable = re.compile(r"^_Z.*(?<!\d)(3c10|2at(?=\d)|5torch|6caffe2)")
    assert [name for name in names if unstable.match(name)] == []


@reads_elf
def test_library_does_not_link_torch_python():
    listing = children.run(["readelf", "-d", _C.__file__], check=True)
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", listing.stdout)
    assert [name for name in needed if "torch" in name or "c10" in name] == ["libtorch_cpu.so"]


@reads_elf
def test_library_needs_no_cuda_library():
    # It contains its own CUDA runtime, and finds PyTorch's stream when a CUDA tensor comes. So one
    # library also loads next to a CPU-only PyTorch.
    needed = children.run(["readelf", "-d", _C.__file__], check=True)
    assert re.findall(r"\(NEEDED\).*(?:cuda|c10)", needed.stdout) == []
    names = children.run(["nm", "-D", _C.__file__], check=True).stdout.split()
    assert [name for name in names if re.match(r"(__)?cu[A-Z]|(__)?cuda[A-Z]", name)] == []


@reads_elf
def test_library_exports_only_its_module():
    listing = children.run(["nm", "-D", "--defined-only", _C.__file__], check=True)
    ours = [name for name in listing.stdout.split() if "gatedrnn" in name]
    assert ours == []
    assert "PyInit__C" in listing.stdout


def test_version_has_one_source():
    version = metadata.version("gatedrnn")
    assert gatedrnn.__version__ == INFO["version"] == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_build_info_names_the_instruction_sets():
    assert INFO["cxx_standard"] >= 202002
    assert INFO["cpu_capability"] in INFO["cpu_capabilities"]
    assert INFO["cpu_capabilities"][-1] == "portable"


def test_build_info_tells_of_cuda():
    version, architectures = INFO["cuda_version"], INFO["cuda_architectures"]
    assert (version is None) == (architectures == ())
    assert version is None or re.fullmatch(r"\d+\.\d+", version)
    assert all(re.fullmatch(r"(sm|compute)_\d+[af]?", name) for name in architectures)


@pytest.mark.parametrize("capability", sampled(INFO["cpu_capabilities"][::-1], 1))
def test_capability_is_lowered_by_the_environment(capability):
    code = "import gatedrnn._C as c; print(c.build_info()['cpu_capability'])"
    known = INFO["cpu_capabilities"]
    best = known.index(INFO["cpu_capability"])
    expected = known[max(best, known.index(capability))]
    result = run("-c", code, GATEDRNN_CPU_CAPABILITY=capability)
    assert result.stdout.strip() == expected, result.stderr


def test_library_has_the_sanitizers_asked_for():
    asked = os.environ.get("GATEDRNN_SANITIZE") or "none"
    assert INFO["sanitizers"] == asked.replace(",", "+")


@pytest.mark.slow  # test_wheel_installs_and_checks_itself runs the command too
def test_command_prints_the_facts_and_checks_itself():
    result = run("-m", "gatedrnn")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == "OK"
    cuda = f"{INFO['cuda_version']}, for" if INFO["cuda_version"] else "not built: "
    for fact in (INFO["version"], INFO["compiler"], f"{INFO['cpu_capability']} (built: ", cuda):
        assert fact in result.stdout


@pytest.mark.parametrize("fault", [1e-2, float("nan")])
def test_command_fails_on_a_wrong_scan(monkeypatch, capsys, fault):
    scan = command.spatial_gated_rnn
    monkeypatch.setattr(command, "spatial_gated_rnn", lambda *a, **k: scan(*a, **k) + fault)
    assert command.main() == 1
    assert capsys.readouterr().out.splitlines()[-1] == "FAILED"


@pytest.mark.parametrize(
    "arguments", sampled([(("-m", "gatedrnn"),), (("-c", "import gatedrnn"),)], 1)
)
def test_source_folder_without_library_says_so(tmp_path, arguments):
    ignore = shutil.ignore_patterns("_C.*", "__pycache__")
    shutil.copytree(ROOT / "gatedrnn", tmp_path / "gatedrnn", ignore=ignore)
    # -S: without the installed package.
    packages = str(metadata.distribution("torch").locate_file(""))
    result = run("-S", *arguments, cwd=tmp_path, PYTHONPATH=packages)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert "gatedrnn's native module is not in" in last
    assert "pip install" in last
    if arguments[0] == "-m":
        assert len(result.stderr.splitlines()) == 1


@pytest.mark.slow
def test_folder_of_the_package_s_name_is_not_taken_for_it(tmp_path):
    (tmp_path / "gatedrnn").mkdir()  # a checkout, seen from the folder that holds it
    result = run("-c", "from gatedrnn import SpatialGatedRNN", cwd=tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def isolated_build(tmp_path):
    """A copy of the sources, and pip's build isolation: setuptools alone, shown by PYTHONPATH."""
    sources, overlay = tmp_path / "sources", tmp_path / "overlay"
    shutil.copytree(ROOT / "csrc", sources / "csrc")
    (sources / "gatedrnn").mkdir()
    shutil.copy(ROOT / "gatedrnn" / "py.typed", sources / "gatedrnn")
    names = ("setup.py", "build_cuda.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
    for name in names:
        shutil.copy(ROOT / name, sources)
    site_packages = metadata.distribution("torch").locate_file("")
    for package in ("setuptools", "_distutils_hack"):
        shutil.copytree(site_packages / package, overlay / package)
    hidden = {str(site_packages), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (overlay / "sitecustomize.py").write_text(
        f"import sys\nsys.path[:] = [path for path in sys.path if path not in {hidden!r}]\n"
    )

    def build(code, python=sys.executable):
        result = children.run(
            [python, "-c", f"from setuptools import build_meta\n{code}"],
            cwd=sources,
            env={**os.environ, "PYTHONPATH": str(overlay), "PYTHONNOUSERSITE": "1"},
            timeout=120,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()[-1]

    return build


@pytest.fixture
def setup_script(monkeypatch):
    """The names of setup.py, which here builds nothing."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.setattr("sys.argv", ["setup.py", "egg_info"])
    monkeypatch.setattr("sys.path", [*sys.path])
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.fixture
def check_compiler(setup_script):
    return setup_script["check_compiler"]


def test_packages_of_the_installer_are_found(setup_script, tmp_path):
    find = setup_script["installer_paths"]
    packages = {}
    for name in ("active", "project/.venv"):
        path = sysconfig.get_path("purelib", "posix_prefix", {"base": str(tmp_path / name)})
        Path(path).mkdir(parents=True)
        packages[name] = path
    process = tmp_path / "process"
    process.mkdir()
    (process / "cwd").symlink_to(tmp_path / "project")
    active = f"VIRTUAL_ENV={tmp_path / 'active'}"
    for program, environment, expected in (
        (
            "uv",
            ["PYTHONPATH=/one:relative:/two", "ODD", active],
            ["/one", "/two", packages["active"]],
        ),
        ("uv", [active], [packages["active"]]),
        ("uv", ["HOME=/root"], [packages["project/.venv"]]),
        ("uv", ["VIRTUAL_ENV=/missing"], []),
        # pip installs into the environment of its interpreter, whichever is active.
        ("python3", ["PYTHONPATH=/one", active], ["/one"]),
    ):
        (process / "exe").unlink(missing_ok=True)
        (process / "exe").symlink_to(f"/bin/{program}")
        (process / "environ").write_text("\0".join(environment))
        assert find(process) == expected
    assert find(tmp_path / "no process") == []


def a_compiler(folder, *lines):
    """A program that can be given as CXX."""
    path = folder / "cxx"
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(os.name == "nt", reason="the compiler is not at CXX")
def test_compiler_that_can_build_passes(check_compiler):
    assert check_compiler(os.environ.get("CXX", "c++")) is None


@pytest.mark.skipif(os.name == "nt", reason="the compiler is not at CXX")
@pytest.mark.parametrize(
    ("lines", "why"),
    [
        (None, "is not there"),
        (["echo 'cc1plus: error: unrecognized option'; exit 1"], "cc1plus: error: unrecognized"),
        (["echo 'trial.cpp:1:10: fatal error: Python.h: None'; exit 1"], "Python.h: None"),
        (["exit 4"], "returned non-zero exit status 4"),
    ],
)
def test_compiler_that_cannot_build_is_one_line(check_compiler, tmp_path, lines, why):
    command = a_compiler(tmp_path, *lines) if lines else str(tmp_path / "cxx")
    with pytest.raises(SystemExit) as stop:
        check_compiler(command)
    (line,) = stop.value.code.splitlines()
    assert line.startswith("gatedrnn: building needs GCC or Clang with C++20")
    assert command in line
    assert why in line
    assert "apt install g++" in line


@pytest.mark.skipif(os.name == "nt", reason="the compiler is not at CXX")
@pytest.mark.build
@pytest.mark.slow
def test_build_without_a_compiler_ends_in_one_line(tmp_path):
    for name in ("setup.py", "build_cuda.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "gatedrnn").mkdir()
    environment = {"CXX": str(tmp_path / "cxx"), "PYTHONWARNINGS": "ignore"}
    result = run(tmp_path / "setup.py", "build_ext", cwd=tmp_path, **environment)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("gatedrnn: building needs GCC or Clang with C++20")


@pytest.mark.build
def test_wheel_installs_and_checks_itself(tmp_path):
    # Built in the checkout, so that what the editable installation compiled serves here too.
    built = f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    removed = ROOT / "build" / built / "gatedrnn" / "removed_since.py"
    removed.parent.mkdir(parents=True, exist_ok=True)
    removed.touch()
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheel = ["wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", tmp_path, ROOT]
    children.run([*pip, *wheel], timeout=280, check=True)
    (archive,) = tmp_path.glob("gatedrnn-*.whl")
    folder = tmp_path / "installed"
    install = ["install", "--no-index", "--no-deps", "--target", folder, archive]
    children.run([*pip, *install], check=True)

    # Dynamo takes as long to import as the rest of PyTorch.
    code = "import sys, gatedrnn; assert 'torch._dynamo' not in sys.modules; "
    code += "print(gatedrnn._C.__file__)"
    found = run("-c", code, PYTHONPATH=str(folder))
    assert Path(found.stdout.strip()).is_relative_to(folder), found.stderr
    result = run("-m", "gatedrnn", PYTHONPATH=str(folder))
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == "OK"
    shipped = {path.name for path in (folder / "gatedrnn").iterdir() if path.suffix != ".so"}
    sources = {path.name for path in (ROOT / "gatedrnn").iterdir() if path.suffix != ".so"}
    assert shipped - {"__pycache__"} == sources - {"__pycache__"}


def test_isolated_build_uses_the_torch_of_the_target(isolated_build):
    code = "import importlib.util\nassert importlib.util.find_spec('torch') is None\n"
    code += "print(build_meta.get_requires_for_build_wheel())"
    assert isolated_build(code) == "[]"


def test_isolated_build_asks_for_torch_where_there_is_none(isolated_build, tmp_path):
    venv.create(tmp_path / "bare", symlinks=True)
    folder = "Scripts" if os.name == "nt" else "bin"
    code = "print(build_meta.get_requires_for_build_wheel())"
    assert isolated_build(code, tmp_path / "bare" / folder / "python") == "['torch>=2.10']"


def test_source_archive_holds_every_native_source(isolated_build, tmp_path):
    name = isolated_build(f"print(build_meta.build_sdist({str(tmp_path)!r}))")
    with tarfile.open(tmp_path / name) as archive:
        held = {path.split("/", 1)[1] for path in archive.getnames() if "/" in path}
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert {path.relative_to(ROOT).as_posix() for path in sources} <= held


# The first release without the named fault, for what reads a file or a request from a stranger.
FIXED = {
    "torch": "2.10",  # CVE-2026-24747: memory corrupted by torch.load with weights_only
    "pillow": "12.3",  # CVE-2026-59197 to CVE-2026-59200
    "opencv-python-headless": "4.12",  # CVE-2025-53644: a JPEG writes outside its memory
    "gradio": "6.7",  # CVE-2026-28414: a request reads any file, on Windows
    "python-multipart": "0.0.27",  # CVE-2026-42561: an upload with endless headers
}


def test_lower_bounds_are_at_least_the_fixed_releases():
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    required = [Requirement(line) for lines in [project["dependencies"], *extras] for line in lines]
    for name, fixed in FIXED.items():
        found = [r for r in required if r.name == name]
        assert found, f"{name} is not required"
        for requirement in found:
            bounds = [Version(s.version) for s in requirement.specifier if s.operator == ">="]
            assert max(bounds, default=Version("0")) >= Version(fixed), requirement
