# Two commands for a newcomer: `make demo` shows the product, `make test` checks it. Both make .venv when it is missing.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
SOURCES := sphereify tests examples benchmarks documentation
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
# The markers of pyproject.toml, each a kind of test that `make test` leaves to `make check`.
MARKED := exhaustive or zoo or export or processes or triton or papers or browser or docs or strangers

.PHONY: demo test check docs zoo zoo-full strangers lint types unmarked marked release-check clean

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh

# mypy has no cache in a fresh clone and takes as long as a fifth of the tests, so it runs beside them.
test: lint
	$(MAKE) --no-print-directory --jobs 2 types unmarked

# Everything. `make test check` in one command runs the unmarked tests once; of these, `marked` repeats only the tests with
# Hypothesis, with ten times as many examples.
check: test marked

# The site of docs/ in site/, where each warning is an error. A test of `check` builds it, too, into a folder of its own.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "written to site/; $(BIN)/python -m http.server --directory site shows it"

# One architecture of each structure converted, and the smallest of each model file run with real weights.
zoo: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.zoo --jobs $(JOBS)

# The same, with every architecture converted.
zoo-full: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.zoo --all --jobs $(JOBS)

# Networks of a dozen other libraries, from small configurations; it installs these libraries.
strangers: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[strangers]'
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.strangers --jobs $(JOBS)

lint: $(VENV)/.installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/lint-imports

types: $(VENV)/.installed
	$(BIN)/mypy

unmarked: $(VENV)/.installed
	$(PYTEST) -m "not ($(MARKED))"

marked: $(VENV)/.installed
	HYPOTHESIS_PROFILE=thorough $(PYTEST) -m "($(MARKED) or hypothesis) and not strangers"

# What must be right before a release: the tree, the version, the files that users install.
release-check: $(VENV)/.installed
	$(BIN)/python -m tests.release

clean:
	rm -rf $(VENV) demo build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
