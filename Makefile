PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint docs bench clean

demo: $(READY)  ## train one network on real images with BPTT, SLTT and SLTT-K, side by side
	$(BIN)/sltt demo

test: $(READY)  ## all the tests
	$(BIN)/python -m pytest -n 2

lint: $(READY)  ## format, rules, types, and who may import whom
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(READY)  ## the documentation site, into site/
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict

bench: $(READY)  ## the committed measurements, again
	$(BIN)/python benchmarks/neuron.py
	$(BIN)/python benchmarks/network.py
	$(BIN)/python benchmarks/digits.py
	$(BIN)/python benchmarks/conversion.py
	$(BIN)/python benchmarks/trainer_overhead.py
	$(BIN)/python benchmarks/tutorials.py

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed here (SpikingJelly 2.0 needs it): make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist site sltt-demo
