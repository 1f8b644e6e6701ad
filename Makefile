# `make demo` and `make test` are all that a fresh machine needs; each makes the virtual environment first.
# `make test-core` takes a minute; `make test-oldest` runs the same tests with the oldest torch that is promised.
# `make docs` builds the documentation into site/.
# `make study ARGS="fewshot --quick"` runs `python -m studies fewshot --quick` in it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MARK := $(VENV)/.installed

OLDEST := .venv-oldest
DOCS := .venv-docs
# two tests at a time, each on one core; those of a file share what they set up
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile
CORE := -m "not distributed and not slow" --ignore=tests/comparison --ignore=tests/integrations --ignore=tests/studies

.PHONY: venv demo study test test-core test-oldest lint fmt package docs clean

venv: $(MARK)

$(MARK): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $(MARK)

demo: venv
	$(BIN)/sylinit demo

study: venv
	$(BIN)/python -m studies $(ARGS)

test: venv lint
	$(PYTEST)

test-core: venv
	$(PYTEST) $(CORE)

test-oldest: $(OLDEST)/.installed
	PYTHONPATH=src OMP_NUM_THREADS=1 $(OLDEST)/bin/pytest -n 2 --dist loadfile $(CORE)

$(OLDEST)/.installed: requirements-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check -r requirements-oldest.txt
	touch $@

lint: venv
	$(BIN)/ruff check src studies tests benchmarks examples docs
	$(BIN)/ruff format --check src studies tests benchmarks examples docs
	$(BIN)/mypy
	$(BIN)/mypy examples/*.py

fmt: venv
	$(BIN)/ruff check --fix src studies tests benchmarks examples docs
	$(BIN)/ruff format src studies tests benchmarks examples docs

# wheel and sdist, installed into an empty environment, run the quickstart there
package: venv
	$(BIN)/python tests/check_package.py

# needs no network once $(DOCS) is there, and neither does the site
docs: $(DOCS)/.installed
	rm -rf site
	$(DOCS)/bin/sphinx-build --quiet --fail-on-warning --keep-going --fresh-env --doctree-dir .doctrees docs site
	$(DOCS)/bin/python docs/check_site.py site

$(DOCS)/.installed: requirements-docs.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(DOCS) site docs/tables .doctrees .pytest_cache .ruff_cache .mypy_cache
