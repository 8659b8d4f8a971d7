# Two commands for a newcomer: `make demo` shows the product, `make test` checks it. Both make .venv when it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test zoo lint clean

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

zoo: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.zoo
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.zoo --real

lint: $(VENV)/.installed
	$(BIN)/ruff check sphereify tests examples benchmarks
	$(BIN)/ruff format --check sphereify tests examples benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) demo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
