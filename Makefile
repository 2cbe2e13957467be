# hpcgpt: `make help` lists the targets. Needs python3 (3.11 or later), make and a network for pip.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# For `make shards`, `make train` and `make bundle`.
CORPUS ?=
OUT ?= data/shards
TOKENIZER ?= gpt2
VAL ?= 0.01
CONFIG ?= gpt2-124m
ARGS ?=
SHARDS ?=
# From the command line only: an environment has these names for other purposes, as Docker's images of Python.
ARCH :=
PYTHON_VERSION :=

# PYTHONPATH of a loaded module: pip would take what is there for installed, and leave it out.
CLEAN := env -u PYTHONPATH -u PYTHONHOME

# pip would compile all modules to bytecode, 12,000; training imports 3,000. They are compiled here, once, and not by all
# ranks of the first job: by two processes, which begin with different modules.
PIP_FLAGS := --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
IMPORT := $(CLEAN) -u PYTHONDONTWRITEBYTECODE $(BIN)/python -c
COMPILE := { $(IMPORT) 'import sympy, wandb' & $(IMPORT) 'import hpcgpt.training.attempt, torch._inductor.compile_fx'; made=$$?; wait $$! && exit $$made; }

# pytest rewrites the tests' assertions, which takes each of its processes ten seconds, and keeps the result as bytecode.
PYTEST := env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest

# One target after the other, since several install into the same environment; `test` says what it makes at the same time.
ifndef AT_ONCE
.NOTPARALLEL:
endif
.DEFAULT_GOAL := help
.PHONY: help install quickstart bundle shards train test test-fast test-all check lab lab-packages lab-down

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1|/' | awk -F'|' '{printf "  make %-11s %s\n", $$1, $$2}'

install: $(VENV)/.installed ## make .venv with hpcgpt in it

# Ctrl-C while pip is upgraded must not remove it: venv would not write it again.
.PRECIOUS: $(VENV)/bin/pip
$(VENV)/bin/pip:
	@$(CLEAN) $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "hpcgpt needs Python 3.11 or later; name one: make PYTHON=python3.12 ..."; exit 2; }
	@echo "making $(VENV)"
	@$(CLEAN) $(PYTHON) -m venv $(VENV)
	@$(CLEAN) $(BIN)/pip install $(PIP_FLAGS) --upgrade pip || echo "so pip stays as it is" # pip 23, of Python 3.11, takes 12 s longer than 26

$(VENV)/.installed: pyproject.toml setup.py constraints.txt | $(VENV)/bin/pip
	@echo "installing hpcgpt and what it needs into $(VENV) (torch is large: a minute, or several)"
	@$(CLEAN) $(BIN)/pip install $(PIP_FLAGS) --editable .
	@$(COMPILE)
	@touch $@

$(VENV)/.installed-test: pyproject.toml setup.py constraints.txt | $(VENV)/bin/pip
	@echo "installing hpcgpt and what its tests need into $(VENV) (torch is large: a minute, or several)"
	@$(CLEAN) $(BIN)/pip install $(PIP_FLAGS) --editable '.[test]'
	@$(COMPILE)
	@touch $(VENV)/.installed $@

quickstart: install ## the whole way on this machine: download Shakespeare, make shards, train a small model, print samples, make a page
	@PYTHON=$(BIN)/python sh bundle/quickstart.sh $(ARGS)

bundle: install ## make one archive that installs and runs without a network: [ARCH=aarch64] [PYTHON_VERSION=3.12] [SHARDS=...] [TOKENIZER=...]
	@$(BIN)/python bundle/make_bundle.py $(if $(ARCH),--arch $(ARCH)) $(if $(PYTHON_VERSION),--python-version $(PYTHON_VERSION)) $(if $(SHARDS),--shards $(SHARDS)) $(if $(filter-out gpt2,$(TOKENIZER)),--tokenizer $(TOKENIZER)) $(ARGS)

shards: install ## turn text into token shards: make shards CORPUS=~/novels [OUT=data/shards] [TOKENIZER=gpt2] [VAL=0.01] [ARGS=...]
	@test -n "$(CORPUS)" || { echo "name the text: make shards CORPUS=~/novels"; exit 2; }
	@$(BIN)/python -m data_prep.make_shards $(CORPUS) --out $(OUT) --tokenizer $(TOKENIZER) $(if $(VAL),--val-fraction $(VAL)) $(ARGS)

train: install ## train on this machine: make train [CONFIG=gpt2-124m] [ARGS='--train.steps 100']
	@$(BIN)/python -m hpcgpt.train $(CONFIG) $(ARGS)

check: $(VENV)/.installed-test ## run the linter, the formatter and the type checker
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

test-fast: $(VENV)/.installed-test ## run the tests that start no other process and take no seconds: a minute and a half
	@LAB=0 $(PYTEST) -m 'not processes and not slurm and not slow and not long' --numprocesses 2 $(ARGS)

test: ## run all tests but the longest, with a real Slurm if one can run here (LAB=0: without; nothing is installed)
	@$(MAKE) --silent --no-print-directory $(if $(filter -j%,$(MAKEFLAGS)),,--jobs 2) AT_ONCE=1 $(VENV)/.installed-test lab-packages
	@$(BIN)/python -m compileall -q hpcgpt data_prep # once, and not in each process that the tests start
	@LAB=$(LAB) $(PYTEST) $(if $(ARGS),$(ARGS),-m 'not long' --numprocesses 5)

lab-packages: | $(VENV)/bin/pip
ifneq ($(LAB),0)
	@$(BIN)/python slurm/lab/lab.py check --install || echo "so the tests that need a Slurm will be reported as skipped"
endif

test-all: test ## then also the longest: drills, large samples of damage, races of many rounds
	@LAB=$(LAB) $(PYTEST) -m 'long and not alone' --numprocesses 2; first=$$?; LAB=$(LAB) $(PYTEST) -m 'long and alone' && exit $$first

lab: install ## start a real four-node Slurm on this machine (as root; it installs its Debian packages)
	@$(BIN)/python slurm/lab/lab.py up $(if $(filter 0,$(LAB)),,--install)

lab-down: install ## remove that Slurm without a trace
	@$(BIN)/python slurm/lab/lab.py down
