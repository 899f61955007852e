# make quickstart | test | test-all | drill | lint | clean
# Every target makes the virtual environment that it needs; nothing is installed a second time.
# Another Python: make test PYTHON=python3.12

PYTHON ?= python3
TAG := -c 'import sys; print("py%d%d" % sys.version_info[:2])' 2>/dev/null
PYTAG := $(shell $(PYTHON) $(TAG))
ifeq ($(PYTAG),)
# pyenv's `python3.12` only runs where that version is activated; look where it is installed.
override PYTHON := $(lastword $(sort $(wildcard ~/.pyenv/versions/*/bin/$(PYTHON))))
PYTAG := $(shell test -n "$(PYTHON)" && $(PYTHON) $(TAG))
endif
ifeq ($(PYTAG),)
$(error PYTHON does not run; give a Python of 3.11 or later, e.g. make test PYTHON=python3.12)
endif

VENV := .venv/$(PYTAG)
BIN := $(VENV)/bin
# The tested versions of that Python; without such a file, the ranges of pyproject.toml.
CONSTRAINTS := $(wildcard constraints/$(PYTAG).txt)
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet \
  $(addprefix --constraint ,$(CONSTRAINTS))

QUICKSTART_DIR ?= runs/quickstart
# More flags for the training and for the samples, e.g. QUICKSTART_ARGS="--config.train.steps=20"
QUICKSTART_ARGS ?=
SAMPLE_ARGS ?=
PYTEST_ARGS ?=
# Tests compile on one core each, so two processes halve their time; a file stays in one of them. A
# file whose process died is begun again by a new one, and the test that ended it with it: once.
PYTEST_WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest -q -n $(PYTEST_WORKERS) --dist loadfile --max-worker-restart 1

.PHONY: quickstart test test-all drill lint clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/.installed
	$(BIN)/moejax train --config quickstart --workdir $(QUICKSTART_DIR) $(QUICKSTART_ARGS)
	$(BIN)/moejax eval --workdir $(QUICKSTART_DIR)
	$(BIN)/moejax sample --workdir $(QUICKSTART_DIR) $(SAMPLE_ARGS)
	@echo "the picture: $$(ls -t $(QUICKSTART_DIR)/samples/*/text2image.png | head -1)"

test: $(VENV)/.installed-test
	$(PYTEST) -m "not slow and not gpu and not tpu" $(PYTEST_ARGS)

test-all: $(VENV)/.installed-test
	$(PYTEST) -m "not gpu and not tpu" $(PYTEST_ARGS)

drill: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -s -m slow tests/train/test_kill_drill.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf .venv .cache .pytest_cache .ruff_cache build dist

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "installing moejax into $(VENV) ..."
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-%: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "installing moejax[$*] into $(VENV) ..."
	$(INSTALL) --editable ".[$*]"
	@touch $@ $(VENV)/.installed
