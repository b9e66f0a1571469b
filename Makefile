# Every target does its own set-up: a virtual environment, uv from PyPI in it, and pinned packages.
PYTHON ?= python3
BIN := .venv/bin
TEST := $(BIN)/python -m pytest --jaxtyping-packages=distilclip,beartype.beartype -n 2 --dist loadgroup

.PHONY: demo test test-slow check format layout bench clean

demo: .venv/installed
	$(BIN)/distilclip demo --out runs/demo

test: .venv/installed
	OMP_NUM_THREADS=1 $(TEST) -m "not slow"

test-slow: .venv/installed
	OMP_NUM_THREADS=1 $(TEST) -m slow

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

layout: .venv/installed
	$(BIN)/python -m tests.layout --write

bench: .venv/installed
	$(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/run_all.py

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q uv
	$(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv runs
