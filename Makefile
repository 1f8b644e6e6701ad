# `make demo` and `make test` are all that a fresh machine needs; each makes the virtual environment first.
# `make test-core` takes a minute; `make test-oldest` runs the same tests with the oldest torch that is promised.
# `make study ARGS="fewshot --quick"` runs `python -m studies fewshot --quick` in it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MARK := $(VENV)/.installed

OLDEST := .venv-oldest
# two tests at a time, each on one core; those of a file share what they set up
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile
CORE := -m "not distributed and not slow" --ignore=tests/comparison --ignore=tests/integrations --ignore=tests/studies

.PHONY: venv demo study test test-core test-oldest lint fmt package clean

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
	$(BIN)/ruff check src studies tests benchmarks examples
	$(BIN)/ruff format --check src studies tests benchmarks examples
	$(BIN)/mypy
	$(BIN)/mypy examples/*.py

fmt: venv
	$(BIN)/ruff check --fix src studies tests benchmarks examples
	$(BIN)/ruff format src studies tests benchmarks examples

# wheel and sdist, installed into an empty environment, run the quickstart there
package: venv
	$(BIN)/python tests/check_package.py

clean:
	rm -rf $(VENV) $(OLDEST) .pytest_cache .ruff_cache .mypy_cache
