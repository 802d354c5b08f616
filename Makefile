# medgen's few commands. Each does its own set-up: on a fresh machine `make demo` or `make test` is all you type.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.medgen-ready
OUT    ?= out/demo

# Everything after set-up is local: no hub is asked. Each of pytest's processes gets its share of the cores.
WORKERS ?= 2
ENV = HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
TEST_ENV = $(ENV) OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: help setup demo test lint format clean
.DEFAULT_GOAL := help

help:  ## show this list
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

# uv lives inside .venv, so nothing outside this folder is changed. The stamp makes a second run start at once.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "medgen needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V). Say: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(BIN)/uv || { $(BIN)/python -m ensurepip >/dev/null; $(BIN)/python -m pip install -q uv; }
	$(BIN)/uv pip install --python $(BIN)/python -c constraints.txt -e '.[digital,xformers,dev]'
	@touch $@

setup: $(READY)  ## create .venv with the tested versions

demo: $(READY)  ## sample, fine-tune, resume, evaluate; ends with the path of one HTML page
	@$(ENV) $(BIN)/medgen demo --out $(OUT)

test: lint  ## every check: ruff, mypy, import-linter, pytest
	$(TEST_ENV) $(BIN)/pytest -n $(WORKERS) --dist loadfile --durations=15

lint: $(READY)  ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

format: $(READY)  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv, caches and outputs
	rm -rf $(VENV) out build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
