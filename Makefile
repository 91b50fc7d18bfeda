# Every target sets up what it needs: a virtual environment in .venv (VENV=path for another), torch from constraints.txt.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
JOBS   ?= 2

# A run in the folder is continued, or with ARGS=--overwrite deleted.
RESUME := $(if $(filter --overwrite,$(ARGS)),,--resume)

.PHONY: setup test lint pretrain clean
setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

test: $(READY)   ## the whole test suite
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

lint: $(READY)   ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

pretrain: $(READY)   ## the main job: a small LLaMA on real text, GaLoreAdamW beside AdamW
	$(BIN)/python examples/pretrain.py --compare adamw,galore --out runs/pretrain $(RESUME) $(ARGS)

clean:
	rm -rf $(VENV) build runs *.egg-info .pytest_cache .mypy_cache .ruff_cache
