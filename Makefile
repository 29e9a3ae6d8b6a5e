# `make demo` fills a hole in an example photo, `make test` runs the tests. Both make their own environment first.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n auto
BIN := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/.demo-installed
	$(BIN)/python examples/demo.py --output demo_output

test: $(VENV)/.dev-installed
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) demo_output build dist src/*.egg-info

$(VENV)/.torch-installed: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	touch $@

# Each set of extras has a stamp of its own, so that the demo does not wait for what only the tests need.
$(VENV)/.demo-installed: $(VENV)/.torch-installed setup.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[examples]"
	touch $@

$(VENV)/.dev-installed: $(VENV)/.torch-installed setup.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@
