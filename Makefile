# Everything from a fresh clone, with Python and a C++ compiler: `make help`.
#
# Paths are relative, so that a checkout may lie anywhere. A stamp in the environment stands for
# one installed extra; it is remade when what the library is built from has changed.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.13.0

SANITIZERS := address,undefined
SANITIZED := build/sanitize
NATIVE := setup.py build_cuda.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)
CXX_FILES := $(filter %.cpp %.h %.inc %.cu %.cuh, \
  $(NATIVE) $(wildcard tests/emulation/*.* tests/aarch64/*.*))

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet

.DELETE_ON_ERROR:
.PHONY: help demo test test-all test-aarch64 mutants gpu-check test-gpu sanitize wheel
.PHONY: bench bench-gpu bench-parser docs lint format clean

help:
	@echo "make demo      build, check, train a small face parser and parse drawn faces (build/demo)"
	@echo "make test      build, and run the default tests: 11 minutes from a fresh clone, 5 after that"
	@echo "make test-all  run every test, in random order"
	@echo "make test-aarch64  compile the portable kernels for aarch64 and test them in QEMU"
	@echo "make mutants   check that the default tests notice each of some small faults"
	@echo "make gpu-check build, test and measure on a GPU within eight minutes, with a report"
	@echo "make test-gpu  run the kernel tests on a GPU; fails without one"
	@echo "make sanitize  run the kernel tests under the address and undefined-behaviour sanitizers"
	@echo "make wheel     build dist/*.whl for Linux, and test it next to PyTorch $(WHEEL_TORCHES)"
	@echo "make bench     time the scan against its peers and this machine's limits"
	@echo "make bench-parser  time the face parsers and a step of their training"
	@echo "make bench-gpu time the scan on a GPU against its targets"
	@echo "make docs      build the documentation in build/site; fails on a broken link"
	@echo "make lint      check style and types"
	@echo "make format    rewrite Python and C++ in the project's style"
	@echo "make clean     remove what these targets made"
	@echo
	@echo "PYTHON=$(PYTHON) makes the environment VENV=$(VENV) once; TORCH=$(TORCH) goes into it."
	@echo "GPU_PYTHON=python3 lets the GPU targets use, offline, an environment that has PyTorch"
	@echo "with CUDA, numpy, pytest, hypothesis, setuptools and ninja."

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install torch==$(TORCH) "setuptools>=77" ninja
	@touch $@

# .installed-EXTRA: the package, editable, with that extra of pyproject.toml.
$(VENV)/.installed-%: $(NATIVE) | $(VENV)/.torch
	$(PIP) install --no-build-isolation --editable ".[$*]"
	@touch $@

$(VENV)/.installed-bench: $(NATIVE) | $(VENV)/.torch
	$(PIP) install --no-build-isolation --editable ".[bench]" || { \
	  echo "make: not every peer can be installed here; going on without those"; \
	  $(PIP) install --no-build-isolation --editable ".[examples]"; }
	@touch $@

demo: $(VENV)/.installed-examples
	$(PY) -m gatedrnn
	$(PY) examples/face_parsing/train.py --all --dataset synthetic --limit 480 --epochs 12 --jobs 2 \
	  --out build/demo
	$(PY) examples/face_parsing/data.py draw --out build/demo/drawn
	$(PY) examples/face_parsing/predict.py --models build/demo build/demo/drawn \
	  --out build/demo/parsed || [ $$? -eq 3 ]
	@echo "pictures in build/demo/parsed; OpenCV's detector sees no face in about half of the drawings"

# Processes that run tests, side by side.
WORKERS ?= 2
PYTEST := $(PY) -m pytest -n $(WORKERS) --dist worksteal

test: $(VENV)/.installed-test
	$(PYTEST) $(PYTEST_ARGS)

test-all: $(VENV)/.installed-test
	HYPOTHESIS_PROFILE=$${HYPOTHESIS_PROFILE:-all} $(PYTEST) -m "" -p randomly $(PYTEST_ARGS)

AARCH64 := aarch64-linux-gnu-g++ qemu-aarch64
.PHONY: has-aarch64
has-aarch64:
	@for tool in $(AARCH64); do command -v $$tool >/dev/null || { \
	  echo "make: $$tool is missing: apt install g++-aarch64-linux-gnu qemu-user"; exit 1; }; done
test-aarch64: has-aarch64 $(VENV)/.installed-test
	$(PY) -m pytest -m "" $(PYTEST_ARGS) tests/aarch64

mutants: $(VENV)/.installed-test
	$(PY) tests/mutants.py $(MUTANTS_ARGS)

# The instrumented library is built and installed apart from the ordinary one. Its run time must be
# loaded before Python's, libstdc++ with it so that exceptions can be followed. Leaks are not
# looked for: CPython and PyTorch keep memory until the process ends, by design. bin/pytest, unlike
# -m pytest, does not put this folder, which holds the ordinary library, before PYTHONPATH; and
# --capture=sys lets a sanitizer's report through.
RUNTIME = $(foreach lib,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(lib).so))
sanitize: $(VENV)/.installed-test
	rm -rf $(SANITIZED)
	GATEDRNN_SANITIZE=$(SANITIZERS) $(PIP) install --no-build-isolation --no-deps --target $(SANITIZED) .
	LD_PRELOAD="$(RUNTIME)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  GATEDRNN_SANITIZE=$(SANITIZERS) HYPOTHESIS_PROFILE=sanitize PYTHONPATH=$(SANITIZED) \
	  $(PY) $(VENV)/bin/pytest -m "" --capture=sys \
	  tests/test_install.py::test_library_has_the_sanitizers_asked_for tests/test_scan.py

# The wheel is tested in environments that hold only PyTorch. They are kept, since pip's own choice
# of PyTorch has CUDA and takes 7 GB; an index of CPU builds in PIP_EXTRA_INDEX_URL avoids that.
# auditwheel leaves PyTorch's libraries out: the user's own PyTorch brings them.
WHEEL_TORCHES ?= 2.10.0 2.13.0
BESIDE := build/wheel/torch-

$(BESIDE)%/.torch: | $(VENV)/.torch
	$(PY) -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check --quiet install torch==$*
	@touch $@

wheel: $(VENV)/.installed-wheel $(WHEEL_TORCHES:%=$(BESIDE)%/.torch)
	rm -rf build/wheel/raw dist/gatedrnn-*.whl
	GATEDRNN_CUDA=$${GATEDRNN_CUDA:-0} $(PIP) wheel --no-build-isolation --no-deps \
	  --wheel-dir build/wheel/raw .
	PATH="$(abspath $(VENV)/bin):$$PATH" $(PY) -m auditwheel repair \
	  --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist build/wheel/raw/*.whl
	for torch in $(WHEEL_TORCHES); do \
	  $(BESIDE)$$torch/bin/python -m pip --disable-pip-version-check --quiet install \
	    --no-index --force-reinstall --no-deps dist/gatedrnn-*.whl && \
	  $(BESIDE)$$torch/bin/python tests/wheel_check.py || exit 1; done
	@ls dist/gatedrnn-*.whl

# The package goes into a folder beside the environment, which may be read-only. Never from this
# folder, whose sources would hide it.
GPU_PYTHON ?= $(abspath $(PY))
GPU_NEEDS := $(if $(filter $(abspath $(PY)),$(GPU_PYTHON)),$(VENV)/.installed-test)
GPU_LIB := $(abspath build/gpu)
# The most telling first: gpu-check runs them for as long as its time lasts.
GPU_TESTS := gpu/test_paths.py gpu/test_queue.py $(addprefix test_,$(addsuffix .py, \
  scan autograd)) gpu/test_gpu_package.py $(addprefix test_,$(addsuffix .py, \
  scan_exact scan_isolation norms module func growth))
.PHONY: has-gpu
has-gpu: | $(GPU_NEEDS)
	@$(GPU_PYTHON) -c "import torch; raise SystemExit(not torch.cuda.is_available())" || { \
	  echo "make: $(GPU_PYTHON) sees no GPU: nothing is built or run"; exit 1; }
$(GPU_LIB)/.installed: $(NATIVE) $(wildcard gatedrnn/*) | has-gpu $(GPU_NEEDS)
	rm -rf $(GPU_LIB)
	GATEDRNN_CUDA=1 $(GPU_PYTHON) -m pip install --quiet --no-build-isolation --no-deps \
	  --target $(GPU_LIB) .
	@touch $@

test-gpu: $(GPU_LIB)/.installed
	cd tests && GATEDRNN_TEST_DEVICE=cuda HYPOTHESIS_PROFILE=all PYTHONPATH=$(GPU_LIB) \
	  $(GPU_PYTHON) -m pytest -m "" $(PYTEST_ARGS) $(GPU_TESTS)
	cd tests && GATEDRNN_TEST_DEVICE=cuda PYTHONPATH=$(GPU_LIB) $(GPU_PYTHON) gpu/sanitize.py

# Builds by this Makefile's own rule, within its time. GPU_CHECK=profile adds a profile.
gpu-check: | has-gpu
	$(GPU_PYTHON) tests/gpu/gpu_check.py $(if $(filter profile,$(GPU_CHECK)),--profile) \
	  $(CHECK_ARGS) --tests $(GPU_TESTS)

bench-gpu: $(GPU_LIB)/.installed
	cd benchmarks && PYTHONPATH=$(GPU_LIB) $(GPU_PYTHON) bench_cuda.py $(BENCH_ARGS)

bench: $(VENV)/.installed-bench
	$(PY) benchmarks/bench_scan.py

bench-parser: $(VENV)/.installed-examples
	$(PY) examples/face_parsing/benchmarks/bench_parser.py $(BENCH_ARGS)

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

lint: $(VENV)/.installed-lint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)
	$(PY) -m mypy

format: $(VENV)/.installed-lint
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

clean:
	rm -rf $(VENV) build dist gatedrnn.egg-info gatedrnn/_C.*.so
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
