# make demo: the main job on a real model. make reproduce ROW=...: a row of our results again. make test: the tests.
# They set everything up by themselves, in .venv.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo reproduce test test-all check lint architectures bench clean

# PyTorch goes first: the CPU build where pip knows one, and nothing later replaces it.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo,dev]"
	touch $@

demo: $(READY)
	$(BIN)/python demo/run.py

# Repeats a row of a published table and says whether it matches; without ROW, lists the rows.
reproduce: $(READY)
	$(BIN)/python demo/reproduce.py $(ROW)

# Fast tests, one process for each logical core (`-n auto` takes the physical ones). JOBS=0 runs them in one process.
# Each process, and each that it starts, computes with one thread.
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
test: $(READY)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest -m "not slow" -n $(JOBS) --dist worksteal

test-all: $(READY)
	$(BIN)/pytest

# Before a commit: lint, types, and the fast tests of what changed since SINCE, for as long as 90 seconds.
SINCE ?= main
check: lint
	timeout --foreground 90 $(BIN)/pytest -x -m "not slow" $$($(BIN)/python tests/changed.py $(SINCE)) \
	    || { [ $$? = 124 ] && echo "No failure in 90 seconds; make test runs the rest."; }

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Makes docs/architectures.md again. Its second table rounds a tiny model of every class of transformers: some minutes.
architectures: $(READY)
	PYTHONPATH=tests/helpers $(BIN)/python tests/every_architecture.py docs/architectures.md

bench: $(READY)
	$(BIN)/python benchmarks/hadamard.py
	$(BIN)/python benchmarks/forward_equivalents.py
	$(BIN)/python benchmarks/memory_by_depth.py

clean:
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
