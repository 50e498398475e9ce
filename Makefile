# Every target sets up .venv by itself: once, and again when pyproject.toml or constraints.txt change.
#
#   make demo CONCEPT=cat               another concept
#   make install PYTHON=python3.12      another interpreter
#   make install EXTRAS=                only what running needs, no development tools

PYTHON ?= python3
EXTRAS ?= dev
CONCEPT ?= dog

BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow lint hooks clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

install: $(STAMP) ## set up .venv

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.$(if $(EXTRAS),[$(EXTRAS)])'
	@touch $@

demo: $(STAMP) ## remove a concept from the embedded model and score it
	$(BIN)/lit-unlearn demo --concept "$(CONCEPT)"

# Text that is opened without an encoding is read in another one on Windows; Python then warns, which fails a test.
test test-slow: export PYTHONWARNDEFAULTENCODING = 1

# One process for each core, which keeps to one thread (tests/conftest.py). A process that has no tests left takes some
# of another's; until then neighbours stay together and share what they prepare.
test: $(STAMP) ## run the quick tests
	$(BIN)/python -m pytest -m "not slow" -n auto --dist worksteal

test-slow: $(STAMP) ## run the slow tests
	$(BIN)/python -m pytest -m slow

lint: $(STAMP) ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

hooks: $(STAMP) ## check every commit before it is made
	$(BIN)/pre-commit install

clean: ## remove what builds and tests leave; .venv, logs and checkpoints stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
