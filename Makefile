# `make` lists the targets. All but gpu work in a virtual environment of their own, .venv, made on first use.
#
#   PYTHON=python3.12    the Python that .venv is made with (3.10 or later), or the one that `make gpu` runs
#   TORCH_INDEX=URL      the package index that torch comes from, for another build of it than the default one
#   ARGS="..."           more arguments for pytest, demo, verify or bench, e.g. make test ARGS="-k solve -x"
#   FMK_CUDA, FMK_DEBUG, TORCH_CUDA_ARCH_LIST, ...    see setup.py

PYTHON ?= python3
OUT ?= out
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help demo test verify bench gpu lint format sanitize clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/built  ## train and sample a small flow, with pictures
	$(RUN) -m fmkernels demo $(ARGS)

test: $(VENV)/built  ## run the tests
	$(RUN) -m pytest tests $(ARGS)

verify: $(VENV)/built  ## compare every kernel here with its reference
	$(RUN) -m fmkernels verify $(ARGS)

bench: $(VENV)/built  ## measure every kernel here against its peers
	$(RUN) -m fmkernels bench $(ARGS)

gpu:  ## on a GPU machine: test and measure there with the Python at hand, results in OUT=out
	$(PYTHON) benchmarks/gpu.py --out "$(OUT)" $(ARGS)

lint: $(VENV)/installed  ## check style: ruff and clang-format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(SOURCES)

format: $(VENV)/installed  ## apply that style
	$(VENV)/bin/ruff check --fix-only .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(SOURCES)

# ASan must be loaded before everything else, with libstdc++, or it finds no __cxa_throw; and pytest must leave the file
# descriptors alone (--capture=sys), or the report is lost when ASan ends the process.
sanitize: $(VENV)/built  ## run the tests of the C++ kernels under AddressSanitizer and UBSan
	FMK_SANITIZE=1 FMK_CUDA=0 $(RUN) setup.py --quiet build_ext --build-lib build/sanitize
	FMK_LIBRARY="$(CURDIR)/build/sanitize/fmkernels/_C.so" \
	LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	$(RUN) -m pytest tests -m sanitize -q --capture=sys $(ARGS)

clean:  ## remove everything built, .venv too
	rm -rf $(VENV) build *.egg-info fmkernels/_*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fmkernels needs Python 3.10 or later: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' requirements.txt)"
	$(PIP) install -r requirements.txt
	@touch $@

$(VENV)/built: $(VENV)/installed setup.py pyproject.toml $(SOURCES)
	$(PIP) install --no-build-isolation --no-deps -e .
	@touch $@
