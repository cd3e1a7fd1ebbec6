# Set-up is part of every target: a machine with Python >= 3.11 and make needs nothing else.
# PYTHON=...     interpreter that creates .venv (default: the first of python3.x that is new enough)
# PIP_FLAGS=...  extra arguments for pip install, e.g. an index with CPU-only builds of torch
# DEMO_DIR=...   where the demo writes

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null && { echo $$p; break; }; done)
PIP_FLAGS ?=
DEMO_DIR ?= metaaug-demo
VENV := .venv
BIN := $(VENV)/bin
# Keyed on the content of pyproject.toml, not its date, so a fresh checkout accepts an installed .venv.
STAMP := $(VENV)/.installed-$(shell cksum < pyproject.toml | tr -d " ")

.PHONY: help install demo test matrix lint format docs clean
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n "s/^\([a-z]*\):.*## /  make \1\t/p" Makefile

install: $(STAMP) ## create .venv with everything the other targets need

$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 found; name one with PYTHON=..." >&2; exit 1; }
	@rm -f $(VENV)/.installed-*
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --editable ".[dev]"
	$(BIN)/python -m pip check
	$(BIN)/python scripts/check_install.py
	@touch $@

demo: $(STAMP) ## quantize, export and evaluate the shipped digits network
	$(BIN)/metaaug demo $(DEMO_DIR)

test: lint ## lint, types and all tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

matrix: $(STAMP) ## export every form and run it on twelve ONNX Runtime releases
	$(BIN)/python benchmarks/runtime_matrix.py

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## apply the formatter and the fixes ruff can make
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP) ## regenerate the reference pages
	$(BIN)/python scripts/generate_recipe_reference.py
	$(BIN)/python scripts/generate_cli_reference.py

clean: ## remove .venv, caches and build outputs
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
