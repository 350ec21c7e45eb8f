# `make demo` and `make test` set up everything they need; `make setup` sets up what development needs, and does no more.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: setup demo test lint types simulated report clean

setup: $(VENV)/.development

$(VENV)/.installed: pyproject.toml
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.development: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/gpupipe demo --output demo.mp4

test: setup lint types
	$(BIN)/python -m pytest tests --numprocesses 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The type checker does not know setuptools' package-dir mapping: give it the package as it is installed, by links.
# For Python 3.10 there are older packages only, whose types are wrong here and there.
types: setup
	mkdir -p build/types/gpupipe
	ln -sfn "$(CURDIR)"/gpupipe/* "$(CURDIR)"/kernels "$(CURDIR)"/models "$(CURDIR)"/benchmarks build/types/gpupipe/
	@if $(BIN)/python -c 'import sys; sys.exit(sys.version_info >= (3, 11))'; \
	then echo "types: not checked with Python 3.10"; \
	else cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml; fi

# The tests that need a GPU, on a simulated one; they are part of `make test`.
simulated: setup
	$(BIN)/python tests/simulated_gpu/run.py tests -m "cuda and not hardware"

# What the compiler makes of every GPU kernel on every architecture, without a GPU; fails on a spill or a stack frame.
report: setup
	$(BIN)/python -m gpupipe.kernels.report

clean:
	rm -rf $(VENV) build dist *.egg-info
