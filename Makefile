# Every target does its own set-up: a virtual environment, uv from PyPI in it, and pinned packages.
PYTHON ?= python3
BIN := .venv/bin
TEST := $(BIN)/python -m pytest --jaxtyping-packages=distilclip,beartype.beartype -n 2 --dist loadgroup

.PHONY: demo test test-slow test-versions torture fuzz audit check format layout bench results docs clean

demo: .venv/installed
	$(BIN)/distilclip demo --out runs/demo

test: .venv/installed
	OMP_NUM_THREADS=1 $(TEST) -m "not slow"

test-slow: .venv/installed
	OMP_NUM_THREADS=1 $(TEST) -m slow

# The oldest supported packages on the oldest Python, and the newest on the newest, each with its own environment.
test-versions: .venv/installed
	for set in "3.11 lowest-direct" "3.13 highest"; do set -- $$set; \
	$(BIN)/uv venv -q --clear --python $$1 .venv-$$1 && \
	$(BIN)/uv pip install -q --python .venv-$$1/bin/python --resolution $$2 -e '.[dev]' && \
	OMP_NUM_THREADS=1 .venv-$$1/bin/python -m pytest -q -n 2 --dist loadgroup -W ignore::DeprecationWarning -W ignore::FutureWarning -m "not slow and not browser" || exit 1; done

# Every fault drill in full, about three hours; writes docs/reliability.md. Finished drills in runs/torture are kept.
torture: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults

# 12,000 made-up and damaged inputs, about 10 minutes.
fuzz: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults fuzz

audit: .venv/installed
	$(BIN)/python -m tests.audit

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

# The tables of docs/results.md: about an hour and a half; with ICONS=FOLDER as long again.
results: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python comparisons/results.py --icons "$(ICONS)"

# The manual, with Sphinx; warnings are errors.
docs: .venv/installed
	$(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[docs]'
	$(BIN)/python -m sphinx -q -W --keep-going -E -b html docs runs/manual
	@echo "The manual: runs/manual/index.html"

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q uv
	$(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv .venv-* runs
