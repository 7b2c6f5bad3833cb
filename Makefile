# `make` lists the targets. All but gpu work in a virtual environment of their own, .venv, made on first use.
#
#   PYTHON=python3.12    the Python that .venv is made with (3.10 or later), or the one that `make gpu` runs
#   TORCH_INDEX=URL      the package index that torch comes from, for another build of it than the default one
#   ARGS="..."           more arguments for pytest, demo, verify or bench, e.g. make test ARGS="-k solve -x"
#   OLDEST_TORCH, NEWEST_TORCH    what wheel-check builds with and tests with
#   FMK_CUDA, FMK_DEBUG, TORCH_CUDA_ARCH_LIST, ...    see setup.py

PYTHON ?= python3
OUT ?= out
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
OLDEST_TORCH ?= torch==2.11.0
NEWEST_TORCH ?= torch
SOURCES := $(shell find csrc $(wildcard torch-ext/*.cpp) -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help demo test verify bench gpu lint format sanitize wheel-check clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

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

lint: $(VENV)/installed  ## check style and types: ruff, clang-format and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(SOURCES)
	$(VENV)/bin/mypy

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

# Both venvs stay in build/wheel-check. Builds of torch with CUDA take gigabytes; TORCH_INDEX may name one without.
CHECK := build/wheel-check
wheel-check: $(VENV)/installed  ## build a wheel with OLDEST_TORCH and test it with NEWEST_TORCH, away from the checkout
	rm -rf $(CHECK)/dist $(CHECK)/source
	$(RUN) -m build --no-isolation --sdist --outdir $(CHECK)/dist
	mkdir -p $(CHECK)/source && tar xf $(CHECK)/dist/*.tar.gz -C $(CHECK)/source --strip-components 1
	test -d $(CHECK)/oldest || $(PYTHON) -m venv $(CHECK)/oldest
	$(CHECK)/oldest/bin/pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(OLDEST_TORCH)"
	$(CHECK)/oldest/bin/pip install --quiet "setuptools>=77,<82" wheel pybind11 ninja build numpy
	cd $(CHECK)/source && ../oldest/bin/python -m build --no-isolation --wheel --outdir ../dist
	rm -rf $(CHECK)/source/fmkernels $(CHECK)/source/build
	test -d $(CHECK)/newest || $(PYTHON) -m venv $(CHECK)/newest
	$(CHECK)/newest/bin/pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(NEWEST_TORCH)"
	grep -vE '^(torch|triton|setuptools)==' requirements.txt > $(CHECK)/requirements.txt
	$(CHECK)/newest/bin/pip install --quiet -r $(CHECK)/requirements.txt
	$(CHECK)/newest/bin/pip install --quiet --no-deps -r requirements-peers.txt
	for python in "$(CURDIR)/$(CHECK)/oldest/bin/python" "$(CURDIR)/$(CHECK)/newest/bin/python"; do \
	$$python -m pip install --quiet --no-deps --force-reinstall $(CHECK)/dist/*.whl && \
	(cd / && $$python -m fmkernels info && $$python -m fmkernels verify) || exit 1; done
	cd $(CHECK)/source && ../newest/bin/python -m pytest tests -q -p no:cacheprovider $(ARGS)

clean:  ## remove everything built, .venv too
	rm -rf $(VENV) build *.egg-info fmkernels/_*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/installed: requirements.txt requirements-peers.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fmkernels needs Python 3.10 or later: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' requirements.txt)"
	$(PIP) install -r requirements.txt
	$(PIP) install --no-deps -r requirements-peers.txt
	@touch $@

$(VENV)/built: $(VENV)/installed setup.py pyproject.toml $(SOURCES)
	$(PIP) install --no-build-isolation --no-deps -e .
	@touch $@
