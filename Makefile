# make train   sets everything up and trains MnistNet on real digits
# make test    sets everything up and runs the whole test suite
# make help    the rest
#
# PYTHON chooses the interpreter that .venv is made from; ARGS goes to the command that is run.

PYTHON ?= python3
VENV := .venv
ifeq ($(origin CXX),default)
CXX := c++
endif
BIN := $(VENV)/bin
export MAX_JOBS ?= $(shell nproc 2>/dev/null || echo 2)
# Tests in as many processes as there are cores; ARGS=-n0 runs them in one, as a debugger needs it.
test test-abi sanitize: export PYTEST_ADDOPTS := -n auto --maxprocesses 8 --dist worksteal $(PYTEST_ADDOPTS)
# While working on the kernels, the oldest and one recent card do; `pip install .` compiles for all.
export TORCH_CUDA_ARCH_LIST ?= 7.5;9.0+PTX

CXX_FILES := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)
FORMATTED := $(CXX_FILES) $(wildcard benchmarks/*.cpp)
# What a build depends on. Python files need none: the checkout itself is what is imported.
SOURCES := $(CXX_FILES) setup.py pyproject.toml fastnet/_version.py $(wildcard build_backend/*.py)
BUILT := $(VENV)/.built

.PHONY: help train test build bench plot gallery lint format emulation sanitize gpu-report test-abi test-install clean

train: build ## train MnistNet on real digits (ARGS="--epochs 3")
	$(BIN)/fastnet train mnist-net $(ARGS)

test: build emulation ## run the test suite (ARGS="-k linear")
	$(BIN)/python -m pytest $(ARGS)

build: $(BUILT) ## make .venv, install what is pinned, compile the kernels

emulation: build/emulation/plain/library.so build/emulation/plain/faults ## the CUDA kernels, for the host

sanitize: build $(foreach kind,address thread,build/emulation/$(kind)/library.so build/emulation/$(kind)/faults) ## run the CUDA kernels under sanitizers
	sh tests/sanitize.sh $(ARGS)

bench: build ## time everything against native torch (ARGS=linear_relu)
	$(BIN)/fastnet bench $(ARGS)

plot: build ## put what was measured into the documents (ARGS=benchmarks/results/DEVICE.csv)
	$(BIN)/python -m benchmarks.plot $(ARGS)
	$(BIN)/python -m benchmarks.tables $(ARGS)

gallery: build ## run every training, and draw the README's pictures of them (ARGS="gan dcgan")
	$(BIN)/python docs/gallery.py $(ARGS)

gpu-report: ## build, test and time on the NVIDIA GPU that is here, in the Python that is here
	$(PYTHON) benchmarks/gpu_report.py $(ARGS)

lint: $(VENV)/.installed ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

format: $(VENV)/.installed ## put style and formatting right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

test-abi: build emulation ## run the op tests with this build under another torch
	PYTHON=$(PYTHON) sh tests/abi.sh

test-install: ## pip install . into an empty environment, and run the README's example there
	PYTHON=$(PYTHON) sh tests/install.sh

clean: ## remove what was built; .venv stays
	rm -rf build fastnet/*.so *.egg-info $(BUILT)

help:
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(BUILT): $(VENV)/.installed $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

$(VENV)/.installed: requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "fastnet: Python 3.10 or later is needed; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || \
		{ echo "fastnet: a C++ compiler is needed: install g++ (or set CXX)." >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || \
		{ echo "fastnet: $(PYTHON) cannot make a virtual environment: install python3-venv." >&2; exit 1; }
	$(BIN)/pip install --quiet --requirement requirements-dev.txt
	@touch $@

# The CUDA kernels as host code (csrc/emulation): plain for the tests, and under sanitizers.
EMULATION_FILES := $(wildcard csrc/emulation/*.cpp) $(wildcard csrc/cuda/*.cu)
SANITIZERS_address := -fsanitize=address,undefined -fno-sanitize-recover=undefined
SANITIZERS_thread := -fsanitize=thread
CXX_EMULATION = $(CXX) -std=c++20 -O1 -g -Wall -Wno-unknown-pragmas -Wno-psabi -DFASTNET_EMULATION \
	$(SANITIZERS_$(*)) $$($(BIN)/python build_backend/cuda_toolkit.py)
TORCH = $$($(BIN)/python -c 'import torch, os; print(os.path.dirname(torch.__file__))')

build/emulation/%/library.so: $(VENV)/.installed $(CXX_FILES) $(wildcard csrc/emulation/*)
	@mkdir -p $(@D)
	$(CXX_EMULATION) -fPIC -shared -fvisibility=hidden -DUSE_CUDA \
		-DTORCH_TARGET_VERSION=0x020a000000000000 -isystem $(TORCH)/include \
		-x c++ $(EMULATION_FILES) -o $@ -L$(TORCH)/lib -ltorch_cpu

build/emulation/%/faults: $(VENV)/.installed $(wildcard csrc/emulation/*) tests/emulation_faults.cpp
	@mkdir -p $(@D)
	$(CXX_EMULATION) -Icsrc/emulation -x c++ csrc/emulation/device.cpp tests/emulation_faults.cpp -o $@
