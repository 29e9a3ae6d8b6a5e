# `make demo` removes an object from an example photo, `make test` runs the quick tests, `make test-all` all of them.
# Each makes its own environment first.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n auto
BIN := $(VENV)/bin

.PHONY: demo test test-all test-floor lint space browser clean

demo: $(VENV)/.demo-installed
	$(BIN)/python examples/demo.py --output demo_output

test: $(VENV)/.dev-installed
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m "not slow"

test-all: $(VENV)/.dev-installed
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# Models, pipelines and loaders with the oldest diffusers and peft that are allowed, in an environment of their own.
test-floor:
	$(MAKE) VENV=$(VENV)-floor FLOOR="-c constraints-floor.txt" \
		PYTEST_ARGS="$(PYTEST_ARGS) tests/models tests/pipelines tests/loaders" test

lint: $(VENV)/.dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# What `moebius space push` uploads: the app, its card, and the package as a wheel.
space:
	rm -rf build/space build/lib build/bdist*
	mkdir -p build/space
	$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir build/space .
	cp -r spaces/app.py spaces/README.md spaces/screenshots build/space/
	cd build/space && echo "./$$(ls diffusers_moebius-*.whl)[demo]" > requirements.txt

# The static page with the bundled model: a folder for any web server, or for a Space with `sdk: static`.
browser: $(VENV)/.dev-installed
	cd spaces/browser && npm ci --no-audit --no-fund && npm run build
	$(BIN)/moebius export nano spaces/browser/dist/models/nano --dtype float16
	cp -r spaces/browser/README.md spaces/browser/screenshots spaces/browser/dist/

clean:
	rm -rf $(VENV) $(VENV)-floor demo_output build dist src/*.egg-info
	rm -rf spaces/browser/dist spaces/browser/node_modules

$(VENV)/.torch-installed: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -n "$(TORCH_INDEX)" || test "$$(uname -s)" != Linux || echo "If torch brings CUDA where you want none: \
	make TORCH_INDEX=URL, the index of CPU builds that pytorch.org/get-started names."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		$(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	touch $@

# Each set of extras has a stamp of its own, so that the demo does not wait for what only the tests need.
$(VENV)/.demo-installed: $(VENV)/.torch-installed setup.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[examples]"
	touch $@

$(VENV)/.dev-installed: $(VENV)/.torch-installed setup.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(FLOOR) -e ".[dev]"
	touch $@
