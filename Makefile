# `make demo` and `make test` need nothing but Python 3.11 to 3.13, git and make; `make help` lists the rest.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
MODEL := examples/shakespeare-mamba-hf
PROMPT ?= First Citizen:
# Ranks of the demo: all GPUs, or two processes on a CPU.
TP ?= $(shell $(BIN)/python -c "import torch; print(torch.cuda.device_count() or 2)")
# Test processes: one a core, up to four (tests start processes of their own).
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); [ $$n -lt 4 ] && echo $$n || echo 4)

# The checkout itself must stay off Python's path: its folder kernels/ has the name of a published package.
export PYTHONSAFEPATH = 1

.PHONY: help demo test lint format clean
.DEFAULT_GOAL := help

help:  ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/'

demo: $(VENV)/.installed  ## generate Shakespeare from the trained example model over two ranks, or all GPUs
	$(BIN)/tp-mamba generate $(MODEL) --tp $(TP) --prompt "$(PROMPT)" --dtype float32 --max-new-tokens 400 \
	  --temperature 0.8 --top-p 0.95 --seed 1

test: $(VENV)/.installed-dev  ## run every test; those for GPUs are skipped where there is none
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist worksteal

lint: $(VENV)/.installed-dev  ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# mypy cannot follow an editable install: show it the package in the layout that a wheel has.
	@rm -rf build/typecheck && mkdir -p build/typecheck/tp_mamba
	@ln -s $(CURDIR)/tp_mamba/* $(CURDIR)/kernels $(CURDIR)/launch build/typecheck/tp_mamba/
	@ln -s $(CURDIR)/benchmarks build/typecheck/
	cd build/typecheck && MYPYPATH=. $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p tp_mamba -p benchmarks

format: $(VENV)/.installed-dev  ## let ruff fix what it can, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what was built here, but not .venv
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "tp-mamba needs Python 3.11 to 3.13, and $(PYTHON) is not: name one, as in make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install -c constraints.txt -e ".[dev]"
	@touch $@
