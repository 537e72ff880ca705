# Needs make and Python >= 3.10; everything else goes into .venv, at the versions of constraints.txt.

SHELL := /bin/bash
PYTHON ?= python3
ARGS ?=
PYTEST_ARGS ?=
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PEER := .venv-peer
GPU := .venv-gpu
WHEELS := .gpu-wheels
GPU_PYTHON ?= 3.12
INSTALL := -m pip install --quiet --disable-pip-version-check --no-input
PIP := $(BIN)/python $(INSTALL)
INPUTS := pyproject.toml constraints.txt
# PyTorch starts a thread per core in every process; the processes are the parallelism here.
THREADS := OMP_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help train test lint format docs bench bench-peer gpu gpu-wheels clean

help:  ## show this text
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

# The DeepMind Control Suite is installed where an environment of it, or an agent's default, asks for it.
DMC_AGENTS := $(patsubst agents/%/__init__.py,%,$(shell grep -l '"env_id": "dmc/' agents/*/__init__.py))
train: $(VENV)/$(if $(strip $(foreach word,$(DMC_AGENTS) dm_control dmc/,$(findstring $(word),$(ARGS)))),.dmc,.core)  ## train an agent: make train ARGS="pipps --help" (default: pipps)
	@$(BIN)/python -m scripts.train $(or $(strip $(ARGS)),pipps)

test: $(VENV)/.dev  ## run the tests: make test PYTEST_ARGS="-m slow -k rssm"
	@$(THREADS) $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

lint: $(VENV)/.dev  ## check style (ruff), types (mypy) and spelling
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/codespell

format: $(VENV)/.dev  ## rewrite the code as make lint wants it
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: $(VENV)/.docs  ## build the documentation into build/docs; every warning is an error
	@$(THREADS) $(BIN)/python -m sphinx --fail-on-warning --keep-going --nitpicky --quiet -b html docs build/docs
	@echo "open build/docs/index.html"

bench: $(VENV)/.dev  ## time a policy gradient of each estimator: make bench ARGS="dreamer"
	@$(BIN)/python -m totalprop bench $(ARGS)

bench-peer: $(PEER)/.sheeprl  ## install sheeprl into .venv-peer, for make bench ARGS="dreamer" to compare with

# From the carried wheels where there are some, beside the machine's own PyTorch; else from the network.
CARRIED := $(wildcard $(WHEELS)/*.whl)
gpu: $(if $(CARRIED),$(GPU)/.installed,$(VENV)/.dev)  ## test, time and train on a GPU in 9 minutes: make gpu OUT=results/gpu ARGS="--minutes 4"
	@$(if $(CARRIED),$(GPU),$(VENV))/bin/python -m totalprop gpu $(if $(OUT),--out "$(OUT)") $(ARGS)

gpu-wheels:  ## fill .gpu-wheels with what make gpu needs on a machine without a network
	@"$(PYTHON)" -m scripts.gpu.carried gather $(WHEELS) --python $(GPU_PYTHON)

clean:  ## remove .venv, .venv-peer, .venv-gpu, .gpu-wheels, caches and build leftovers; runs/ stays
	@rm -rf $(VENV) $(PEER) $(GPU) $(WHEELS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# python3 -m venv exists on Debian without ensurepip, so that is what we ask for.
$(VENV)/.created $(PEER)/.created:
	@command -v "$(PYTHON)" >/dev/null 2>&1 || { \
	  echo "error: '$(PYTHON)' was not found; install Python 3.10 or newer, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: '$(PYTHON)' is $$("$(PYTHON)" -V 2>&1), totalprop needs 3.10 or newer; name one: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "error: '$(PYTHON)' has no venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@"$(PYTHON)" -m venv --clear $(@D)
	@touch $@

# One stamp per set of dependencies, touched last, so that an interrupted install is redone.
$(VENV)/.core: $(INPUTS) | $(VENV)/.created
	@echo "Installing totalprop into $(VENV) (once; PyTorch is large, so it takes a minute or more) ..."
	@$(PIP) -c constraints.txt -e .
	@touch $@

$(VENV)/.dmc: $(INPUTS) | $(VENV)/.created
	@echo "Installing totalprop and the DeepMind Control Suite into $(VENV) (once; a minute or more) ..."
	@$(PIP) -c constraints.txt -e '.[dmc]'
	@touch $@ $(VENV)/.core

$(VENV)/.dev: $(INPUTS) | $(VENV)/.created
	@echo "Installing totalprop and its test tools into $(VENV) (once; it takes a minute or more) ..."
	@$(PIP) -c constraints.txt -e '.[dev,dmc]'
	@touch $@ $(VENV)/.core $(VENV)/.dmc

# Beside the test tools, which are there already where CI has run the tests.
$(VENV)/.docs: $(INPUTS) | $(VENV)/.created
	@"$(BIN)/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: the documentation needs Python 3.11 or newer, this is $$("$(BIN)/python" -V 2>&1); name one: make clean docs PYTHON=python3.12" >&2; exit 1; }
	@echo "Installing totalprop and Sphinx into $(VENV) (once) ..."
	@$(PIP) -c constraints.txt -e '.[docs]'
	@touch $@ $(VENV)/.core

# sheeprl's dependencies contradict constraints.txt, so the peer has an environment of its own.
$(PEER)/.sheeprl: constraints-peer.txt | $(PEER)/.created
	@echo "Installing sheeprl into $(PEER) (once; it takes a minute or more) ..."
	@$(PEER)/bin/python $(INSTALL) -c constraints-peer.txt sheeprl
	@touch $@

$(GPU)/.installed: $(CARRIED)
	@echo "Installing $(WHEELS) into $(GPU), beside the packages of $(PYTHON) (once, without a network) ..."
	@"$(PYTHON)" -m scripts.gpu.carried install $(WHEELS) $(GPU)
	@touch $@
