# Every target sets itself up: the first one makes .venv and installs there what it needs.
PYTHON ?= python3
# Another build of torch: make TORCH='torch==2.12.0' …
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# The tests start hundreds of processes; each would compile all of dsconv again if this were set outside.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help demo test lint types unit attacks fuzz crash hour fixtures upstream schemas docs aio bench clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install --quiet '$(TORCH)'
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(READY) ## train with ZeRO-3 on the CPU, merge the checkpoint, load it and generate
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python examples/zero3_demo.py demo

test: lint types unit ## the linter, the type checker and all tests

lint: $(READY) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY) ## mypy, strict
	$(BIN)/mypy

# One process of tests a core, up to 4; with a debugger, or to see the output as it comes: make unit ARGS='-n 0 -x'
unit: $(READY) ## the tests; the checkpoints they read are trained by the first run (2 to 3 minutes on 2 cores)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile $(ARGS)

attacks: $(READY) ## make every hostile file and give it to DeepSpeed, torch, picklescan and dsconv: 2 to 4 minutes
	DS_ACCELERATOR=cpu $(BIN)/python -W ignore -m attacks $(ARGS)

# How many broken files, and from which seed: make fuzz N=1000000 SEED=1
N ?= 100000
SEED ?= 0
fuzz: $(READY) ## break N files of every kind and count what becomes of them: 5 minutes for 100,000, or make fuzz N=1000000
	DS_ACCELERATOR=cpu $(BIN)/python -W ignore -m tests.fuzz --count $(N) --seed $(SEED) $(ARGS)

# How many places of each kind of run; there are 600 to 9,600: make crash POINTS=10000 is all of them
POINTS ?= 800
crash: $(READY) ## kill runs and fail system calls wherever a run changes the disk: 15 minutes, or make crash POINTS=60
	DS_ACCELERATOR=cpu $(BIN)/python -W ignore -m tests.crash --count $(POINTS) $(ARGS)

hour: $(READY) ## an hour of training in minutes: the Hub and S3 fail, watchers and conversions are killed: 8 minutes
	DS_ACCELERATOR=cpu $(BIN)/python -W ignore -m tests.hour $(ARGS)

fixtures: $(READY) ## train again the checkpoints that are kept in tests/data (compiles DeepSpeed's native ops)
	$(BIN)/python -m tests.fixtures.gloo native --slim --root tests/data/native_ops

upstream: $(READY) ## what changed in the sources that rules were read from; after a review: make upstream ARGS=--accept
	$(BIN)/python -m tests.upstream $(ARGS)

schemas: $(READY) ## write docs/schemas, the JSON Schemas of what --json prints
	$(BIN)/python -m tests.schemas

docs: $(READY) ## build the documentation into site/
	$(BIN)/python -c 'import material, mkdocstrings' 2>/dev/null || $(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/python -m mkdocs build --quiet

aio: $(READY) ## compile DeepSpeed's async_io op, with which the tests of NVMe run (needs libaio-dev; takes minutes)
	DS_ACCELERATOR=cpu $(BIN)/python -c 'from deepspeed.ops.op_builder import AsyncIOBuilder; AsyncIOBuilder().load()'

bench: $(READY) ## measure against the official script and cp: 40 GB of disk, half an hour
	$(BIN)/python -m benchmarks.zero_to_fp32 --plot docs/zero_to_fp32.svg

clean: ## remove what these targets made, but not .venv
	rm -rf demo tests/.cache .pytest_cache .ruff_cache .mypy_cache
