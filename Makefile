# make demo | test | test-all | lint | docs | bench-simulation | bench-devices | bench-shrink | clean
# PYTHON=python3.12 picks the Python
#
# All of it happens in .venv, made on first use with `python3 -m venv` and brought up to date when
# pyproject.toml or constraints.txt change. Pip's own environment variables are honoured.

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq install -c constraints.txt

# One stamp per Python version: with another PYTHON the environment is made anew; without PYTHON,
# whatever is there is used.
MADE := $(firstword $(wildcard $(VENV)/made-*))
ifneq ($(origin PYTHON),undefined)
MADE :=
endif
PYTHON ?= python3
ifeq ($(MADE),)
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
MADE := $(VENV)/made-$(or $(VERSION),nothing)
endif

.PHONY: help demo test test-slow test-all lint docs bench-simulation bench-devices bench-shrink clean
.DELETE_ON_ERROR:

help:
	@echo "make demo      compare the collaborations on handwritten digits, and write a report"
	@echo "make test      the tests (minutes)"
	@echo "make test-all  the tests, the slow ones too"
	@echo "make lint      ruff, mypy --strict and the docs check"
	@echo "make docs      write the generated parts of the docs anew"
	@echo "make bench-simulation   Kitestring's simulation beside Flower's and pfl-research's (half an hour)"
	@echo "make bench-devices      training and predicting without torch, beside torch and ONNX Runtime's examples (10 minutes)"
	@echo "make bench-shrink       distilling, pruning and quantising, beside other libraries (hours; needs Shakespeare, QMNIST)"
	@echo "make clean     remove .venv, .bench, caches and built packages"

demo: $(VENV)/compare
	@$(BIN)/kitestring compare digits --fresh

# One thread per test process: two processes share two cores.
test: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not slow"

test-slow: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m slow

test-all: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m ""

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict src/kitestring
	$(BIN)/python docs/check.py

docs: $(VENV)/dev
	$(BIN)/python docs/check.py --write

bench-simulation: $(VENV)/compare
	@$(BIN)/python benchmarks/simulation/run.py

bench-devices: $(VENV)/compare
	@$(BIN)/python benchmarks/devices/run.py

bench-shrink: $(VENV)/compare
	@$(BIN)/python benchmarks/shrink/run.py

clean:
	rm -rf $(VENV) .bench build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests docs benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/made-%:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "Kitestring needs Python 3.11 or newer, and $(PYTHON) is $(or $(VERSION),not there).\
	  Name another: make PYTHON=python3.12" | tr -s '\t ' ' '; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# hatchling comes first, so that it is pinned as well: pip would build with the newest.
$(VENV)/compare: $(MADE) pyproject.toml constraints.txt
	@echo "Installing into $(VENV) (minutes on the first run; PyTorch is most of it) ..."
	@$(PIP) hatchling
	@$(PIP) --no-build-isolation -e '.[compare]'
	@touch $@

$(VENV)/dev: $(VENV)/compare
	@echo "Installing the developers' tools ..."
	@$(PIP) --no-build-isolation -e '.[compare,dev]'
	@touch $@
