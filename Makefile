# What CI runs, people run. Everything works in .venv, which the first target makes.
#
#   PYTHON=python3.12   the Python to make .venv with
#   TORCH=torch==2.13.0 what pip installs as torch; for a CPU or CUDA build of your choice, see README.md
#   SEED=7 STRIKES=20 ROUNDS=1  for `make chaos`; without SEED a new one, which is printed first

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

# What the container image has beside the base: a package that is missing there cannot be added later.
IMAGE_EXTRAS := train fast tensorboard wandb
LOCK := docker/requirements.lock

# Two at once, but for those that measure or limit time.
CORE := $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile -m 'not alone' tests/unit tests/distributed
ALONE := $(BIN)/python -m pytest -m alone tests/distributed

SLURM_DIR ?= /tmp/gpt2hpc-slurm

STRIKES ?= 20
ROUNDS ?= 1

.PHONY: help install install-dev quickstart test test-core test-slurm test-container lint format lock clean
.PHONY: slurm-install slurm-up slurm-down chaos bench-data bench-checkpoint bench-evaluate bench-generate bench-memory bench-optimizers bench-train bench-gpu
.PHONY: bench-startup bench-scaling browser-install

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "gpt2hpc needs Python 3.11 or newer; set PYTHON=python3.12, say"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "no venv module: on Debian and Ubuntu, apt install python3-venv"; exit 1; }

$(VENV)/installed: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[train]'
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[train,fast,plot,tensorboard,wandb,dev]'
	@touch $@

install: $(VENV)/installed ## make .venv with torch and gpt2hpc
	@echo "installed: . $(VENV)/bin/activate"

install-dev: $(VENV)/installed-dev ## the same with what the tests need

quickstart: install ## text in, trained GPT-2 out, preempted and resumed on the way: five minutes on two cores
	PATH="$(CURDIR)/$(BIN):$$PATH" sh examples/quickstart.sh

test: install-dev slurm-install browser-install ## all tests, those on a real Slurm, in a real container image and in a real browser included
	$(CORE)
	$(ALONE)
	TORCH='$(TORCH)' $(BIN)/python -m pytest tests --ignore=tests/unit --ignore=tests/distributed

test-core: install-dev ## the tests that need none of these
	$(CORE)
	$(ALONE)

test-slurm: install-dev slurm-install ## the tests on a real Slurm; on Debian and Ubuntu, as root
	$(BIN)/python -m pytest tests/cluster

test-container: install-dev slurm-install ## build the images by buildah and Apptainer and use them, on a real Slurm too; on Debian, as root
	TORCH='$(TORCH)' $(BIN)/python -m pytest tests/container

chaos: install-dev slurm-install ## a run on a real Slurm, struck 25 times at random: the bytes of one that was left alone? SEED=… repeats; as root
	$(BIN)/python -m tests.cluster.chaos $(if $(SEED),--seed $(SEED)) --strikes $(STRIKES) --rounds $(ROUNDS)

slurm-install: ## Debian's Slurm and munge, and shellcheck; as root
	@sh tests/cluster/install.sh

browser-install: ## Debian's chromium, for the tests of reports; as root
	@sh tests/cluster/install.sh chromium:chromium

slurm-up: install-dev slurm-install ## a Slurm of your own on this machine, to try things out; as root
	@$(BIN)/python -m tests.cluster.slurm up $(SLURM_DIR)

slurm-down: install-dev ## end it
	@$(BIN)/python -m tests.cluster.slurm down $(SLURM_DIR)
	@echo "ended; its files are in $(SLURM_DIR) still"

bench-data: install-dev ## tokens/s of tokenizing and loading beside others', into bench/results; half an hour
	$(BIN)/python -m bench.tokenize
	$(BIN)/python -m bench.loader

bench-checkpoint: install-dev ## how long steps wait for a save, beside others' ways, into bench/results; ten minutes
	$(BIN)/python -m bench.checkpoint

bench-evaluate: install-dev ## HellaSwag's examples a second beside a plain loop, into bench/results; two minutes
	$(BIN)/python -m bench.evaluate

bench-generate: install-dev ## tokens/s of generating beside transformers and without a cache, into bench/results; two minutes
	$(BIN)/python -m bench.generate

bench-optimizers: install-dev ## loss after the same tokens, and tokens to the same loss, of optimizers, schedules and bf16 reduction, into bench/results; half an hour
	$(BIN)/python -m bench.optimizers

bench-memory: install-dev ## the memory of a rank by size and micro batch, beside the formula, into bench/results; ten minutes
	$(BIN)/python -m bench.memory

bench-train: install-dev ## training steps beside nanoGPT's way and transformers, and what is spent beside the steps, into bench/results; three quarters of an hour
	$(BIN)/python -m bench.train
	$(BIN)/python -m bench.overhead

bench-gpu: ## all that needs a GPU, into one file of bench/results; nine minutes, with the gpt2hpc that PYTHON has, or .venv
	@if [ -x $(BIN)/python ]; then $(BIN)/python -m bench.gpu; else $(PYTHON) -m bench.gpu; fi

bench-startup: install-dev ## seconds from process to first step by phase, with a cold and a warm compile cache, into bench/results; ten minutes
	$(BIN)/python -m bench.startup

bench-scaling: install-dev slurm-install ## steps of 1, 2 and 4 processes over slowed links, beside the plan's, into bench/results; as root; twenty minutes
	$(BIN)/python -m bench.scaling

lint: install-dev ## ruff and mypy strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install-dev ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch is in the resolution, for what it depends on, but not in the lock: it and what it brings for CUDA are installed before, from any index.
lock: install-dev ## docker/requirements.lock anew, by pyproject.toml and constraints.txt: for Python 3.11 and up, x86-64 and arm64
	printf '%s\n' '$(lastword $(TORCH))' 'setuptools>=77' | $(BIN)/uv pip compile --quiet --universal --python-version 3.11 \
		--generate-hashes --no-header --annotation-style line --constraint constraints.txt \
		$(IMAGE_EXTRAS:%=--extra %) pyproject.toml - --output-file $(LOCK).new >/dev/null
	{ echo '# Written by `make lock`: what the image installs after torch, each by its hash.'; \
		awk "/^[a-z]/ {keep = !/^(torch|triton|nvidia-|cuda-)|sys_platform == '(win32|emscripten)'/} keep" $(LOCK).new; } > $(LOCK)
	rm $(LOCK).new

clean: ## remove .venv and caches; data/ and runs/ stay
	rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
