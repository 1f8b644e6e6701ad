# `make demo` and `make test` are all that a fresh machine needs; each makes the virtual environment first.
# `make study ARGS="fewshot --quick"` runs `python -m studies fewshot --quick` in it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MARK := $(VENV)/.installed

CORE := -m "not comparison and not distributed and not slow and not studies"

.PHONY: venv demo study test test-core lint fmt package clean

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
	$(BIN)/pytest

# without several processes, comparison and studies: after each edit
test-core: venv
	$(BIN)/pytest $(CORE)

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
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
