PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/demo

.PHONY: docs demo test test-slow test-gpu lint types bench clean

demo: $(VENV)/installed  ## train, trace, cut, repair and export a ResNet-20 on real digit images
	$(BIN)/python train.py fit -c configs/experiment/digits_demo.yaml --run_dir $(RUN)
	$(BIN)/python train.py report --run_dir $(RUN)

test: $(VENV)/installed lint  ## style and the default test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/installed  ## the tests that take minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m slow

CORE := $(addprefix tests/,measurement scores structure replace task train models data test_on_device.py)
DEVICE ?= cuda

test-gpu: $(VENV)/installed  ## the core's tests on a CUDA device (DEVICE=far: on none); runs/gpu.md has the table
	mkdir -p runs
	$(BIN)/python -m pytest $(CORE) -m "gpu or not slow" --device $(DEVICE) --table runs/gpu.md

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

types: $(VENV)/installed  ## mypy alone, a part of lint
	$(BIN)/mypy

bench: $(VENV)/installed  ## every script of benchmarks/, one table: benchmarks/results.md
	$(BIN)/python benchmarks/run_all.py

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[test]' -c constraints.txt
	touch $@

docs: $(VENV)/docs  ## the site, in site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(VENV)/docs: $(VENV)/installed
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[docs]' -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV) site .pytest_cache .ruff_cache .mypy_cache
