# The two commands of a fresh clone: `make demo` and `make test`. Both set up what they need.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
RUN    := JAX_PLATFORMS=cpu $(BIN)/python

.PHONY: demo test check lint types fast catalog clean
.DELETE_ON_ERROR:

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)  ## trains a small ViT on digits and writes its report
	$(BIN)/python -m experiments.train --config=configs/vision/vit.py:digits --workdir=runs/demo

test: $(STAMP)  ## the whole suite
	$(BIN)/python -m pytest -n 2
	$(BIN)/python -m pytest -n 2 tests/eight

check: lint types fast  ## what every commit passes: lint, types, fast tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

fast: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m 'not slow'

catalog: $(STAMP)  ## writes CATALOG.md from effjax/catalog
	$(BIN)/python -m experiments.papers --markdown > CATALOG.md

clean:
	rm -rf $(VENV) runs build dist *.egg-info
