# make demo    install, then the whole pipeline on the embedded model
# make test    install, then every test
# PYTHON=... picks the interpreter (3.11 or later); it all goes into .venv and is done once.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
STAMPS := $(VENV)/.stamps
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
WORKERS ?= 2
ROUNDS ?= 300
MUTATIONS ?= 200
MODEL ?= demo
TRAIN ?= builtin
JUDGE ?= builtin:eval

.PHONY: help demo test test-quick test-slow test-torch zoo mutants lint fuzz fuzz-formats systems-tables docs clean

help:
	@sed -n '/^#/!q;s/^# //p' Makefile

demo: $(STAMPS)/tool
	$(BIN)/moe-tool demo

test: $(STAMPS)/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS)

test-quick: $(STAMPS)/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) -m "not slow"

test-slow: $(STAMPS)/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) -m "slow and not zoo"

# Exactness must not hang on the compiled kernels: the same tests with torch's products.
test-torch: $(STAMPS)/test
	OMP_NUM_THREADS=1 MOE_TOOL_KERNELS=torch $(BIN)/python -m pytest -q -n $(WORKERS)

# Every model type of transformers; make test takes one of each family.
zoo: $(STAMPS)/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) -m "" tests/zoo

# Wrong changes one by one, in a copy: the tests named beside each have to notice it.
mutants: $(STAMPS)/test
	$(BIN)/python -m tests.mutants.run

lint: $(STAMPS)/lint
	$(BIN)/ruff check .
	$(BIN)/mypy

# The compiled kernels on buffers of exactly the promised size, under sanitizers.
fuzz:
	@mkdir -p build
	$(CXX) -std=c++17 -O1 -g -w -ffp-contract=off -fsanitize=address,undefined -fno-sanitize-recover=all -fno-sanitize=alignment \
	  -Imoe_tool/native tests/native/fuzz.cpp $(filter-out %/module.cpp,$(wildcard moe_tool/native/*.cpp)) \
	  -pthread -o build/fuzz
	build/fuzz $(ROUNDS)

# Quantized checkpoints with one thing wrong: refused with a sentence, or read right.
fuzz-formats: $(STAMPS)/test
	OMP_NUM_THREADS=1 MUTATIONS=$(MUTATIONS) $(BIN)/python -m pytest -q -n $(WORKERS) tests/fuzz_formats

# The tables of docs/systems.md for one model; TRAIN is what is measured beforehand, JUDGE what is judged.
systems-tables: $(STAMPS)/test
	$(BIN)/python benchmarks/systems_tables.py $(MODEL) $(TRAIN:%=--train %) $(JUDGE:%=--judge %)

docs: $(STAMPS)/tool
	$(BIN)/python docs/make_reference.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "moe-tool needs Python 3.11 or later, $(PYTHON) is older: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	"$(PYTHON)" -m venv $(VENV)

# torch is named with its version so that a CPU wheel is taken where pip knows one; a bare dependency may pull gigabytes of CUDA.
$(STAMPS)/tool: pyproject.toml constraints.txt $(wildcard moe_tool/native/*.cpp moe_tool/native/*.h moe_tool/native/*.inc) | $(BIN)/python
	@mkdir -p $(STAMPS)
	$(PIP) torch==2.13.0 -e .
	@touch $@

$(STAMPS)/test: $(STAMPS)/tool
	$(PIP) -e '.[test]'
	@touch $@

$(STAMPS)/lint: $(STAMPS)/tool
	$(PIP) -e '.[lint]'
	@touch $@
