# Every target sets up .venv first: once, and again when pyproject.toml or constraints.txt change.
#
#   make demo CONCEPT=cat               another concept
#   make demo MODEL=emoji-dit           a diffusion transformer with three text encoders
#   make install PYTHON=python3.12      another interpreter
#   make test PYTHON=python3.13 VENV=.venv-3.13    another interpreter in an environment of its own
#   make install EXTRAS=                only what is needed for running, no development tools

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev
CONCEPT ?= dog
MODEL ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOWEST := $(VENV)-lowest

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-devices test-lowest lint docs hooks clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

install: $(STAMP) ## set up .venv

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.$(if $(EXTRAS),[$(EXTRAS)])'
	@touch $@

demo: $(STAMP) ## remove a concept from the embedded model and score it
	$(BIN)/lit-unlearn demo --concept "$(CONCEPT)" $(if $(MODEL),--model "$(MODEL)")

# A file that is opened without an encoding is read in another one on Windows. With this variable Python warns of that,
# and a warning fails a test.
test test-slow test-devices test-lowest: export PYTHONWARNDEFAULTENCODING = 1

# One process per core, each with one thread (tests/conftest.py). A process that has no tests left takes some from
# another. Until then, neighbouring tests stay together and share what they prepare.
test: $(STAMP) ## run the quick tests
	$(BIN)/python -m pytest -m "not slow" -n auto --dist worksteal

# Tests of a file stay together: those of one file share a cluster, a browser or a trained model.
test-slow: $(STAMP) ## run the slow tests
	$(BIN)/python -m pytest -m "slow and not exhaustive" -n auto --dist loadfile

test-devices: $(STAMP) ## run every recipe on pretended devices (ten minutes)
	$(BIN)/python -m pytest tests/devices -m exhaustive -n auto --dist worksteal

test-lowest: $(LOWEST)/.installed ## run the quick tests with the oldest packages that pyproject.toml allows
	$(LOWEST)/bin/python -m pytest -m "not slow" -n auto --dist worksteal

# torch comes from PyPI with CUDA, 6 GB in all. If you need only the processor and PyTorch's index can be reached:
# UV_TORCH_BACKEND=cpu make test-lowest.
$(LOWEST)/.installed: $(STAMP)
	$(BIN)/uv venv --clear --python $(BIN)/python $(LOWEST)
	$(BIN)/uv pip install --python $(LOWEST)/bin/python --resolution lowest-direct --editable '.[dev]'
	@touch $@

lint: $(STAMP) ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(STAMP) ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo "To read it: $(BIN)/python -m http.server --directory site, then http://localhost:8000"

hooks: $(STAMP) ## check every commit before it is made
	$(BIN)/pre-commit install

clean: ## remove files left by builds and tests; environments, logs and checkpoints stay
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
