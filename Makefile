# Every target sets up what it needs: .venv with torch and all tools on the first call, the kernels' libraries whenever csrc changed.
# Needs python3 (3.11 or newer, with venv and headers), g++ 12 or newer, make, and a network the first time; nvcc for CUDA.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

BIN := .venv/bin
PYTHON := $(BIN)/python
CPP := $(shell find csrc tests/cuda_emulation -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2> /dev/null)
TOOLS := .venv/.tools
EXTENSION := crossvit_kernels/_build.json
PACKAGE := .venv/.package
RELEASE := .venv/.release
# Which PyTorch a new .venv gets, such as TORCH='torch==2.11.* numpy<2.4'.
TORCH := torch>=2.11
# MkDocs' theme announces on every run that it will have a successor.
BUILD_DOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

help:  ## This list
	@sed -nE 's/^([a-z0-9-]+):.*## (.*)/make \1\t\2/p' Makefile | expand -t 20

bench: $(PACKAGE)  ## CrossViT-9 and 15-dagger against timm, torch.compile, ONNX Runtime and OpenVINO: table, JSON, plot (10 to 14 minutes)
	$(PYTHON) -m benchmarks.throughput --model crossvit_9_240,crossvit_15_dagger_240 --batch 1,8 --dtype float32,bfloat16 \
		--kernels reference,auto --peers all --json benchmarks/results/throughput.json

BASE := HEAD~1
compare: $(PACKAGE)  ## Ops and models beside another commit, in turn; fails where one is slower (BASE=HEAD~1; OPS=, CASES=, ROUNDS=, TOLERANCE=, JSON=)
	$(PYTHON) -m benchmarks.compare --base '$(BASE)' $(if $(OPS),--ops '$(OPS)') $(if $(CASES),--cases '$(CASES)') \
		$(if $(ROUNDS),--rounds '$(ROUNDS)') $(if $(TOLERANCE),--tolerance '$(TOLERANCE)') $(if $(JSON),--json '$(JSON)')

demo: $(PACKAGE)  ## A small CrossViT learns handwritten digits, on the kernels and the reference; five fusions compared (6 minutes)
	$(PYTHON) -m benchmarks.demo

OUT := benchmarks/results
gpu:  ## On a machine with an NVIDIA GPU, with its python3 and no network: build, tests, compute-sanitizer, figures (8 minutes; OUT=DIR)
	python3 -m benchmarks.gpu --out $(OUT)

# Two processes, files in their order: much of it is Python that uses one core. A waiting thread of the kernels leaves its core to the other one.
test: $(PACKAGE)  ## The tests (those marked gpu skip where there is no GPU)
	OMP_WAIT_POLICY=passive $(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15

check: $(PACKAGE)  ## ruff, mypy, clang-format, which imports run which way, how long files and functions are, and the documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/lint-imports --no-logo
	$(PYTHON) tests/support/house.py
	$(BUILD_DOCS)

docs: $(PACKAGE)  ## The documentation in build/site/index.html, to be opened from the disk; a broken link or formula fails
	$(BUILD_DOCS)
	@echo "Open build/site/index.html"

format:  $(PACKAGE)  ## Rewrite the sources as ruff and clang-format want them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

build: $(PACKAGE)  ## The environment, the C++ and the CUDA kernels

cuda-report: $(PACKAGE)  ## Registers, memory, spills and instructions of every CUDA kernel, per architecture (JSON=FILE)
	$(PYTHON) -m benchmarks.inspect.cuda_report $(if $(JSON),--json $(JSON))

# A package of its own in build/sanitize, with its own objects, tested from there: the one in use stays as it is.
SANITIZED := build/sanitize
OP_TESTS := layer_norm_linear layer_norm_mlp linear_residual self_attention bicubic_resize patch_embed cls_cross_attention cls_fusion
sanitize: $(PACKAGE)  ## The op tests, and wrong calls of every native op, on C++ and emulated CUDA kernels compiled with -fsanitize
	rm -rf $(SANITIZED)
	CROSSVIT_KERNELS_SANITIZE=address,undefined $(PYTHON) setup.py -q \
		build_py --build-lib $(SANITIZED) build_ext --build-lib $(SANITIZED)
	cp -r tests pyproject.toml $(SANITIZED)
	cd $(SANITIZED) && \
	export LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 && \
	CROSSVIT_HOSTILE_CALLS=1000 $(CURDIR)/$(PYTHON) -m pytest --durations=5 -k "cpu or cuda or test_rule" \
		tests/ops/test_hostile_calls.py tests/cpu_kernels/test_instruction_sets.py $(OP_TESTS:%=tests/ops/test_%.py)

random-calls: $(PACKAGE)  ## CALLS=200000 random calls of the ops on every backend, held to the reference; SEED=0
	$(PYTHON) tests/support/random_calls.py --calls $(or $(CALLS),200000) --seed $(or $(SEED),0)

test-machines: $(PACKAGE)  ## The op tests as on other machines: instruction sets, threads, MKL's and oneDNN's code, 20 seeds each (45 minutes; SEEDS=20)
	OMP_WAIT_POLICY=passive $(PYTHON) tests/support/machines.py --seeds $(or $(SEEDS),20)

wheel: $(RELEASE)  ## A wheel for every Python and every PyTorch from 2.11 on, in dist, checked; with CUDA kernels where nvcc is found
	$(call build_wheel,$(shell uname -m))

wheel-aarch64: $(RELEASE)  ## The same for an aarch64, by Debian's cross compiler g++-aarch64-linux-gnu, without CUDA kernels
	$(call build_wheel,aarch64,CXX=aarch64-linux-gnu-g++ _PYTHON_HOST_PLATFORM=linux-aarch64)

# For a machine, with the variables that name another one than this to setup.py. What fails a check stays in dist/<machine>.
define build_wheel
	rm -rf dist/$(1) dist/*$(1).whl
	$(2) $(PYTHON) -W 'ignore:setup.py install is deprecated' setup.py -q bdist_wheel --dist-dir dist/$(1)
	PATH=$(CURDIR)/$(BIN):$$PATH .ci/repair-wheel dist/$(1)/*.whl dist/$(1)/repaired
	PATH=$(CURDIR)/$(BIN):$$PATH .ci/check-wheel dist/$(1)/repaired/*.whl
	mv dist/$(1)/repaired/*.whl dist
	rm -r dist/$(1)
endef

sdist: $(RELEASE)  ## The sources as a file in dist, with all that their tests need
	rm -f dist/*.tar.gz
	$(PYTHON) setup.py -q sdist
	$(BIN)/twine check --strict dist/*.tar.gz

clean:  ## Remove what was built; .venv stays
	rm -rf build dist *.egg-info crossvit_kernels/*.so crossvit_kernels/_build.json
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

.PHONY: help bench compare demo gpu test check docs format build cuda-report sanitize random-calls test-machines wheel wheel-aarch64 sdist clean

$(PYTHON):
	python3 -m venv .venv

$(TOOLS): | $(PYTHON)
	@echo "Installing torch and what its extensions are built with (the first time 5 GB, about two minutes)"
	$(PYTHON) -m pip install -q --disable-pip-version-check $(TORCH:%='%') torchvision 'setuptools>=77' wheel pybind11
	touch $@

$(EXTENSION): $(TOOLS) setup.py $(wildcard csrc/*.py) $(CPP)
	$(PYTHON) setup.py -q build_ext --inplace

$(PACKAGE): pyproject.toml | $(EXTENSION)
	$(PYTHON) -m pip install -q --disable-pip-version-check --no-build-isolation -e '.[test,docs]'
	touch $@

# The tools alone: the wheel and the sdist are made of the sources, whether or not they are built here.
$(RELEASE): pyproject.toml | $(TOOLS)
	$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("$<", "rb"))["project"]["optional-dependencies"]["release"], sep="\n")' > $@.txt
	$(PYTHON) -m pip install -q --disable-pip-version-check -r $@.txt
	touch $@
