# Every target makes what it needs: an environment in .venv with the pinned tools (constraints.txt), and the
# package in it, editable, with its native code built. Needs python3, a C++ compiler and a package index.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
EXTRAS := timm,torchvision,demo,bench,peers,dev
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
TEST_CPP := $(shell find tests/emulation tests/bf16 tests/sanitizers tests/triton -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.c')

# One thread in each test process, or their thread pools fight over the cores.
TEST_PROCESSES ?= 2
PYTEST_ARGS ?=

# GPUs to build the CUDA kernels for, where there is an nvcc: this machine's, else the H100. Each takes a core one or two
# minutes, so that the whole list of csrc/toolchain.py is left to `make wheel`.
export TORCH_CUDA_ARCH_LIST ?= $(or $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>&- | sort -u),9.0a)
WHEEL_CUDA_ARCH_LIST ?=

.PHONY: native demo test test-all test-latest sanitize bench gpu gpu-kernels report build lint format coverage-table kernels prediction machine-code wheel clean help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 18

$(VENV)/.requirements: constraints.txt pyproject.toml
	@echo "==> environment in $(VENV), torch first (a large download the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --constraint constraints.txt torch setuptools wheel ninja
	@touch $@

# A library that does not build is an error, and so is one that the tests do not find. Only CUDA's may be missing: where
# there is no nvcc.
REQUIRE := EFFNET_KERNELS_REQUIRE_NATIVE=1

native: $(VENV)/.requirements
	@$(REQUIRE) $(BIN)/python -m csrc.build

$(VENV)/.installed: $(VENV)/.requirements setup.py | native
	@echo "==> effnet_kernels[$(EXTRAS)]"
	@$(REQUIRE) $(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[$(EXTRAS)]'
	@$(BIN)/effnet-kernels info
	@touch $@

build: native $(VENV)/.installed  ## install the package and build of its native code what has changed

demo: build  ## run stock and patched models on a photograph; writes out/
	@$(BIN)/effnet-kernels demo --out out $(DEMO_ARGS)

test: build  ## run the test suite, without what is marked exhaustive
	-@$(BIN)/python -m csrc.build emulation  # with all cores; where it cannot be, the tests say why
	-@$(BIN)/python -m csrc.build emulated_cpu
	@echo "==> tests, $(TEST_PROCESSES) processes"
	@$(REQUIRE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist worksteal $(PYTEST_ARGS)

test-all: override PYTEST_ARGS += --exhaustive
test-all: test  ## run what `make test` leaves out, too: all combinations, compilers, rehearsals

# The newest torch, in an environment of its own: constraints-latest.txt says which. The libraries are those of `make
# build`, and the package is the source tree. Of the suite: whatever asks torch or Triton for something, the longest first.
LATEST := build/latest
LATEST_TESTS := tests/test_ahead_of_time.py tests/test_internals.py tests/patching tests/modules tests/training \
	tests/ops/test_registration.py tests/ops/test_gradients.py tests/ops/test_autocast.py tests/triton \
	--exhaustive --ignore=tests/training/test_bounds.py --ignore=tests/triton/test_numbers.py

$(LATEST)/.requirements: constraints-latest.txt
	@echo "==> environment in $(LATEST): the newest torch (a large download the first time)"
	@test -x $(LATEST)/bin/python || $(PYTHON) -m venv $(LATEST)
	@$(LATEST)/bin/python -m pip --disable-pip-version-check --quiet install --requirement constraints-latest.txt
	@touch $@

test-latest: build $(LATEST)/.requirements  ## run what asks torch for something on the newest torch
	@echo "==> tests on the newest torch, $(TEST_PROCESSES) processes"
	@$(REQUIRE) OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR) $(LATEST)/bin/python -m pytest -q -n $(TEST_PROCESSES) \
		--dist worksteal $(or $(PYTEST_ARGS),$(LATEST_TESTS))

sanitize: build  ## run the tests of the native and the emulated kernels under AddressSanitizer
	@$(BIN)/python -m csrc.build sanitized
	@$(BIN)/python -m tests.sanitizers $(PYTEST_ARGS)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.emulation.asan -q --exhaustive tests/cuda $(PYTEST_ARGS)

bench: build  ## measure ops, blocks and models; writes benchmarks/results/
	@$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-columns=median,iqr,rounds -q $(BENCH_ARGS)

gpu-kernels: build  ## compile the kernels of `make gpu` where there is no GPU, and say how to take them there
	@$(BIN)/python -m benchmarks.gpu_kernels $(GPU_ARGS)

gpu:  ## on a GPU, in the environment as it is: test the kernels natively and measure; GPU_ARGS=first (docs/gpu.md)
	@$(PYTHON) -m benchmarks.gpu $(GPU_ARGS)

report: build  ## turn benchmarks/results/ into the tables and plots of the documentation
	@$(BIN)/python -m benchmarks.report

lint: build  ## check style and types, Python and C++
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run -Werror $(CPP) $(TEST_CPP)

format: build  ## format Python and C++ in place
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(CPP) $(TEST_CPP)

coverage-table: build  ## regenerate docs/coverage.md: which blocks of which models are fused
	@$(BIN)/python docs/coverage.py

kernels: build  ## compile every Triton kernel for every generation of GPU and inspect the code (an hour)
	@$(BIN)/python -m benchmarks.ahead_of_time

prediction: build  ## regenerate the predicted GPU times in docs/performance.md
	@$(BIN)/python -m benchmarks.gpu_prediction

machine-code: build  ## regenerate the costs of the CUDA kernels in docs/performance.md; needs nvcc, and sm_90a built
	@$(BIN)/python -m benchmarks.machine_code --write

wheel: build  ## build the source distribution and the wheel into dist/
	@$(REQUIRE) EFFNET_KERNELS_PORTABLE=1 TORCH_CUDA_ARCH_LIST="$(WHEEL_CUDA_ARCH_LIST)" $(BIN)/python -m build --no-isolation

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist out *.egg-info effnet_kernels/*.so
