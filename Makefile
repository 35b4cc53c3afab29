# make setup | demo | study | test | test-fast | lint | clean
#
# Needs Python 3.11 or newer, pip, make and a C compiler.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell command -v python3.11 || command -v python3)
STAMP := $(VENV)/.installed

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# What runs here needs no network: models and data are made on the spot.
offline := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
pytest := $(offline) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0

.PHONY: help setup demo study test test-fast lint clean
help:
	@echo "make setup      create $(VENV) with everything below (a second time: nothing to do)"
	@echo "make demo       the small world end to end, into runs/demo"
	@echo "make study      the trial of the method, about two hours, into runs/study; goes on where it stopped"
	@echo "make test       the whole test suite, as CI runs it"
	@echo "make test-fast  the same without the slow tests"
	@echo "make lint       ruff and pyright"
	@echo "make clean      remove caches and build outputs; keeps $(VENV) and runs/"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $(PYTHON) is older than Python 3.11: run make PYTHON=/path/to/python3.11" >&2; exit 2; }
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,export]'
	@touch $@

demo: $(STAMP)
	$(offline) $(BIN)/grace demo

study: $(STAMP)
	$(offline) $(BIN)/python -m grace.study

test: $(STAMP)
	$(pytest)

test-fast: $(STAMP)
	$(pytest) -m 'not slow'

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
