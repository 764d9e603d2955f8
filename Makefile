# The verbs of this repository. Each one makes the virtual environment it needs.

VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
STEP := sh tools/step

# What the installed package is made of: a change in any of these installs it again.
NATIVE := $(wildcard CMakeLists.txt) $(shell find src -name '*.cpp' -o -name '*.h' 2>/dev/null)
SOURCES := pyproject.toml $(NATIVE) $(shell find src -type f ! -name '*.pyc' ! -name '*.so' 2>/dev/null)

.PHONY: demo test test-slow bench soak peers lint format native docs clean help

help:
	@echo "make demo       install into $(VENV), serve the bundled model, stream one answer"
	@echo "make test       every check of a change (what CI runs)"
	@echo "make test-slow  the long tests"
	@echo "make bench      the benchmarks, each beside its peer"
	@echo "make soak       45 minutes of a mixed load: memory, descriptors, pages, latency"
	@echo "make peers      build the systems the benchmarks compare with, under .peers"
	@echo "make lint       ruff, mypy, import directions, sizes, bans"
	@echo "make format     let ruff format and fix what it can"
	@echo "make native     build the native kernels in place, for work on them"
	@echo "make docs       write the generated reference pages"

demo: $(VENV)/.installed
	@$(BIN)/python tools/demo.py

test: lint chromium
	@$(BIN)/python -m pytest -q -rfs

test-slow: $(VENV)/.test-installed
	@$(BIN)/python -m pytest -q -m slow

bench: $(VENV)/.test-installed
	@$(BIN)/python -m benchmarks.serving
	@$(BIN)/python -m benchmarks.decode
	@$(BIN)/python -m benchmarks.kernels
	@$(BIN)/python -m pytest -q -m peer

soak: $(VENV)/.test-installed
	@$(BIN)/python -m benchmarks.soak

# Half an hour the first time; what is built is left alone. PEERS="llama.cpp" builds only that.
peers: $(VENV)/.test-installed
	@$(BIN)/python -m tools.peers --torch "$(TORCH)" $(PEERS)

lint: $(VENV)/.test-installed
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/python tools/check_size.py
	@$(BIN)/python tools/check_bans.py

format: $(VENV)/.test-installed
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

native: $(VENV)/.test-installed
	@$(STEP) "Building the native kernels" $(BIN)/pip install --no-deps --force-reinstall -e .

docs: $(VENV)/.test-installed
	@$(BIN)/python tools/gen_reference.py

.PHONY: chromium
chromium:
	@sh tools/get_chromium

$(BIN)/python:
	@$(STEP) "Making $(VENV)" $(PYTHON) -m venv $(VENV)

# Torch first and pinned, so that no resolver below takes one the project was not tried with.
$(VENV)/.torch: | $(BIN)/python
	@$(STEP) "Installing PyTorch" $(BIN)/pip install "$(TORCH)"
	@touch $@

$(VENV)/.installed: $(SOURCES) | $(VENV)/.torch
	@if [ -e $(VENV)/.test-installed ]; then $(MAKE) --no-print-directory $(VENV)/.test-installed; \
	else $(STEP) "Building and installing Coppice" $(BIN)/pip install .; fi
	@touch $@

$(VENV)/.test-installed: pyproject.toml $(NATIVE) | $(VENV)/.torch
	@$(STEP) "Building and installing Coppice and its test tools" $(BIN)/pip install -e ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
