SHELL := /bin/bash
.SHELLFLAGS := -eo pipefail -c
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check docs readme picture

.venv: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[tasks,minilm,ray,feed,dev]'
	touch $@

demo: .venv
	$(BIN)/perturbed run hubble

test: .venv
	$(BIN)/pytest

check: .venv
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/readme.py --check
	$(BIN)/mkdocs build --strict --quiet --site-dir "$$(mktemp -d)"

readme: .venv
	$(BIN)/python docs/readme.py

picture: .venv
	$(BIN)/python docs/picture.py
