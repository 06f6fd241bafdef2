# make demo | demo-align | test | lint | bench | gpu-check | kernel-objects
#
# make gpu-check OPS="moe_gate moe_permute" checks these alone; OBJECTS=, WHEELS=, OUT= (folders), COMMIT=, see
# docs/gpu_check.md. It sets up no .venv: where there is none, it runs with python3 and needs no network.
#
# The first call of another goal sets up .venv; later calls redo only what changed. PY=python3 uses an
# environment that is already there instead. TORCH=<requirement> overrides the choice of torch.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
ifeq ($(MAKECMDGOALS)$(wildcard $(VENV)/bin/python),gpu-check)
PY ?= $(PYTHON)
endif
PY ?= $(VENV)/bin/python

# Without an NVIDIA driver the CPU build of torch is enough.
ifneq ($(wildcard /proc/driver/nvidia/version),)
TORCH ?= torch>=2.11
else
TORCH ?= torch==2.13.0
endif

ifeq ($(PY),$(VENV)/bin/python)
READY := $(VENV)/.built
TOOLS := $(VENV)/.tools
INSTALLED := --installed
endif
NATIVE_SOURCES := CMakeLists.txt pyproject.toml $(shell find csrc third_party -type f 2>/dev/null)

.PHONY: demo demo-align test lint bench gpu-check kernel-objects
.DELETE_ON_ERROR:

demo: $(READY)
	$(PY) -m dscoder demo

demo-align: $(READY)
	$(PY) -m dscoder demo --align

test: $(READY)
	$(PY) -m pytest -n 2

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.h' 'tests/*.cpp' 'tests/*.cu' | xargs -r $(dir $(PY))clang-format --dry-run --Werror

# All of them, or OPS="moe_gate rope"; keeps the run under benchmarks/results/<device>/.
bench: $(READY)
	$(PY) -m dscoder bench $(OPS) --out "$$($(PY) -m benchmarks.result_file)"

# The environment of make has an up-to-date dscoder; for any other Python it is built below build/gpu-check.
gpu-check: $(READY)
	$(PY) -m benchmarks.gpu_check $(OPS) $(INSTALLED) $(if $(OBJECTS),--objects $(OBJECTS)) \
		$(if $(WHEELS),--wheels $(WHEELS)) $(if $(OUT),--out $(OUT)) $(if $(COMMIT),--commit $(COMMIT))

# Needs nvcc, not a GPU: what a machine with a GPU then links in place of compiling.
kernel-objects: $(TOOLS)
	$(PY) -m benchmarks.kernel_objects

$(VENV)/.torch:
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'dscoder needs Python 3.11 or later, this is ' + sys.version"
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade "pip>=25.1"
	$(PY) -m pip install --quiet "$(TORCH)"
	touch $@

$(VENV)/.tools: $(VENV)/.torch pyproject.toml
	$(PY) -m pip install --quiet --group build --group dev
	$(PY) -m pip install --quiet --no-deps nvidia-cutlass==4.2.0.0
	touch $@

$(VENV)/.built: $(VENV)/.tools $(NATIVE_SOURCES)
	$(PY) -m pip install --quiet --no-build-isolation --editable ".[pretrain]"
	touch $@
