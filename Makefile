# What CI runs, people run. Everything works in .venv, which the first target makes.
#
#   PYTHON=python3.12   the Python to make .venv with
#   TORCH=torch==2.13.0 what pip installs as torch; for a CPU or CUDA build of your choice, see README.md

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help install install-dev quickstart test test-container lint format clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "gpt2hpc needs Python 3.11 or newer; set PYTHON=python3.12, say"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "no venv module: on Debian and Ubuntu, apt install python3-venv"; exit 1; }

$(VENV)/installed: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check '$(TORCH)'
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[train]'
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[train,dev]'
	@touch $@

install: $(VENV)/installed ## make .venv with torch and gpt2hpc

install-dev: $(VENV)/installed-dev ## the same with what the tests need

quickstart: install ## text in, trained GPT-2 out, preempted and resumed on the way: five minutes on two cores
	PATH="$(CURDIR)/$(BIN):$$PATH" sh examples/quickstart.sh

test: install-dev ## all tests but those of the container image
	$(BIN)/python -m pytest --ignore=tests/container

test-container: install-dev ## build the Apptainer image and use it: on Debian, as root
	TORCH='$(TORCH)' $(BIN)/python -m pytest tests/container

lint: install-dev ## ruff and mypy strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install-dev ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv and caches; data/ and runs/ stay
	rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
