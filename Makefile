# Each target makes .venv and installs under the committed constraints; a repeat costs nothing.
PYTHON ?= python3
CONSTRAINTS ?= $(if $(shell command -v nvidia-smi),constraints/gpu.txt,constraints/cpu.txt)
BIN := .venv/bin

.PHONY: setup demo test test-all lint clean

setup: .venv/.stamp-run

.venv/bin/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'kinkajou needs Python 3.11 or newer: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv .venv

.venv/.stamp-run: .venv/bin/python pyproject.toml $(CONSTRAINTS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e .
	touch $@

.venv/.stamp-dev: .venv/.stamp-run constraints/dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -c constraints/dev.txt -e '.[dev]'
	touch $@

demo: .venv/.stamp-run
	$(BIN)/kinkajou demo $(ARGS)

test: .venv/.stamp-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-all: .venv/.stamp-dev
	$(BIN)/python -m pytest $(ARGS)

clean:
	rm -rf .venv demo
