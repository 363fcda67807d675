# Three commands, which set up .venv first, and one with an environment of its own.
#   make run     the main job: GFlowNet fine-tuning of the shipped LM on arithmetic
#   make test    lint, format check, type check, tests
#   make setup   only the environment
#   make test-vllm   the tests of the vLLM engine, in .venv-vllm
#
# Variables:
#   ARGS         more arguments of the job, e.g. make run ARGS='--run mine learner.steps=50'
#   PYTHON       interpreter for .venv (3.11 to 3.13)
#   TORCH_INDEX  a further package index, e.g. https://download.pytorch.org/whl/cpu
# Other variables of yours, such as AMORTIZE_RUNS or RAY_ADDRESS, are for `amortize`, not for these.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help run test test-vllm setup

export PYTHON TORCH_INDEX

python := .venv/bin/python
stamp := .venv/.set-up

help:
	@sed -n 's/^# \{0,1\}//p' Makefile

run: $(stamp)
	@echo "run: amortize train tasks/arithmetic.toml $(ARGS)"
	@.ci/own-environment $(python) -m cluster train tasks/arithmetic.toml $(ARGS)

test: $(stamp)
	@echo "test: ruff check"
	@$(python) -m ruff check .
	@echo "test: ruff format --check"
	@$(python) -m ruff format --check .
	@echo "test: mypy"
	@$(python) -m mypy
	@echo "test: pytest, the fast tests on all cores, then the slow ones"
	@.ci/own-environment .ci/test $(ARGS)

test-vllm:
	@.ci/test-vllm $(ARGS)

setup: $(stamp)
	@echo "set-up: .venv is up to date"

# Touched last, so that an interrupted set-up is taken up again.
$(stamp): pyproject.toml constraints.txt .ci/setup .ci/find-python
	@.ci/setup
	@touch $@
