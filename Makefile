# Every target sets up .venv by itself: once, and again when pyproject.toml or constraints.txt change.
#
#   make demo CONCEPT=cat               another concept
#   make install PYTHON=python3.12      another interpreter
#   make test PYTHON=python3.13 VENV=.venv-3.13    another interpreter in an environment of its own
#   make install EXTRAS=                only what running needs, no development tools

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev
CONCEPT ?= dog

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOWEST := $(VENV)-lowest

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-devices test-lowest lint hooks clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

install: $(STAMP) ## set up .venv

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.$(if $(EXTRAS),[$(EXTRAS)])'
	@touch $@

demo: $(STAMP) ## remove a concept from the embedded model and score it
	$(BIN)/lit-unlearn demo --concept "$(CONCEPT)"

# Text that is opened without an encoding is read in another one on Windows; Python then warns, which fails a test.
test test-slow test-devices test-lowest: export PYTHONWARNDEFAULTENCODING = 1

# One process for each core, which keeps to one thread (tests/conftest.py). A process that has no tests left takes some
# of another's; until then neighbours stay together and share what they prepare.
test: $(STAMP) ## run the quick tests
	$(BIN)/python -m pytest -m "not slow" -n auto --dist worksteal

test-slow: $(STAMP) ## run the slow tests
	$(BIN)/python -m pytest -m "slow and not exhaustive"

test-devices: $(STAMP) ## run every recipe on pretended devices, which takes ten minutes
	$(BIN)/python -m pytest tests/devices -m exhaustive -n auto --dist worksteal

test-lowest: $(LOWEST)/.installed ## run the quick tests with the oldest packages that pyproject.toml allows
	$(LOWEST)/bin/python -m pytest -m "not slow" -n auto --dist worksteal

# torch is from PyPI and brings CUDA, 6 GB in all. For the processor alone, where PyTorch's index can be reached:
# UV_TORCH_BACKEND=cpu make test-lowest.
$(LOWEST)/.installed: $(STAMP)
	$(BIN)/uv venv --clear --python $(BIN)/python $(LOWEST)
	$(BIN)/uv pip install --python $(LOWEST)/bin/python --resolution lowest-direct --editable '.[dev]'
	@touch $@

lint: $(STAMP) ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

hooks: $(STAMP) ## check every commit before it is made
	$(BIN)/pre-commit install

clean: ## remove what builds and tests leave; environments, logs and checkpoints stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
