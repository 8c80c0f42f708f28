# The two commands of a fresh clone: `make demo` and `make test`. Both set up what they need.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# Where this is set, every worker and every driver of the tests compiles all files of the library again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test parity check durations faults lint types fast catalog newest aot wheel clean
.DELETE_ON_ERROR:

$(STAMP): pyproject.toml .ci/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)  ## trains a small ViT on digits, accelerates it with three methods, and writes its report
	$(BIN)/python -m experiments.train --config=configs/vision/vit.py:digits --workdir=runs/demo
	$(BIN)/python -m experiments.accelerate --workdir=runs/demo \
		--method=token_transforming:macs=0.67 --method=tome:macs=0.67 --method=random:macs=0.67

test: $(STAMP)  ## the whole suite
	$(BIN)/python -m pytest -n 2
	$(BIN)/python -m pytest -n 2 tests/eight

parity: $(STAMP)  ## our models against timm, transformers and diffusers; installs torch
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt --editable '.[dev,parity]'
	$(BIN)/python -m pytest -n 2 --dist loadgroup tests/parity

check: lint types fast  ## what every commit passes: lint, types, fast tests

durations: $(STAMP)  ## times the whole suite and lists its long tests in tests/slow.txt
	$(BIN)/python -m pytest -n 2 --write-slow

faults: $(STAMP)  ## kills, damage and full disks at full length, with their figures
	$(BIN)/python -m tests.faults

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

fast: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m 'not slow'

catalog: $(STAMP)  ## writes CATALOG.md from effjax/catalog
	$(BIN)/python -m experiments.papers --markdown > CATALOG.md

newest: $(STAMP)  ## the shorter leg on another interpreter: make VENV=.venv-newest PYTHON=python3.12 newest
	$(BIN)/python -m pytest -n 2 -m 'not slow'
	$(BIN)/python -m pytest -n 2 tests/eight -k families

aot: $(STAMP)  ## compiles every kernel for TPUs and GPUs that are not here, and writes pallas_kernels/RESULTS.md
	$(BIN)/python -m pallas_kernels.aot --write

wheel: $(STAMP)  ## builds a wheel, and trains and asks the catalogue with it far from this folder
	rm -rf build/wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	$(PYTHON) -m venv build/wheel/clean
	build/wheel/clean/bin/python -m pip install --quiet --constraint .ci/constraints.txt build/wheel/*.whl
	cd build/wheel && clean/bin/python -P -m experiments.train --config=configs/vision/vit.py:smoke --workdir=run
	cd build/wheel && clean/bin/python -P -m experiments.papers vit

clean:
	rm -rf .venv .venv-newest runs build dist *.egg-info
