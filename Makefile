PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/demo

.PHONY: docs demo test test-slow test-gpu gpu-kit lint types bench clean

demo: $(VENV)/installed  ## train, trace, cut, repair and export a ResNet-20 on real digit images
	$(BIN)/python train.py fit -c configs/experiment/digits_demo.yaml --run_dir $(RUN)
	$(BIN)/python train.py report --run_dir $(RUN)

test: $(VENV)/installed lint  ## style and the default test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/installed  ## the tests that take minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m slow

CORE := $(addprefix tests/,measurement scores structure replace task train models data test_on_device.py)
DEVICE ?= cuda
PROCESSES ?= $(shell n=$$(nproc); echo $$((n < 12 ? n : 12)))

test-gpu: $(VENV)/installed  ## the core's tests on a CUDA device (DEVICE=far: on none); runs/gpu.md has the table
	mkdir -p runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(CORE) -m "gpu or not slow" --device $(DEVICE) --table runs/gpu.md -n $(PROCESSES) --dist loadfile

KIT := runs/gpu-kit
KIT_PYTHON ?= 3.12
KIT_PLATFORMS := $(foreach n,17 24 27 28 31 34,--platform manylinux_2_$(n)_$(shell uname -m)) --platform manylinux2014_$(shell uname -m)

gpu-kit: $(VENV)/installed  ## what test-gpu needs beside torch, for a machine without a network with KIT_PYTHON: pieces of 60 MiB
	rm -rf $(KIT) && mkdir -p $(KIT)/wheels
	$(BIN)/python -m pip freeze --exclude-editable | grep -v -E '^(torch|torchvision|triton)==|^(nvidia|cuda)-' > $(KIT)/wheels.txt
	$(BIN)/python -m pip download --disable-pip-version-check -q --no-deps --only-binary :all: --python-version $(KIT_PYTHON) $(KIT_PLATFORMS) -d $(KIT)/wheels -r $(KIT)/wheels.txt
	tar -C $(KIT) -cf - wheels.txt wheels | split -b 60M - $(KIT)/wheels.tar.
	rm -r $(KIT)/wheels
	@echo "there, in the repository, with torch and torchvision installed:"
	@echo "  cat $(KIT)/wheels.tar.* | tar x; pip install --no-index --find-links wheels -r wheels.txt"
	@echo '  make -o .venv/installed BIN=$$(dirname $$(command -v python)) test-gpu'

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
