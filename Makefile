# make demo, make test, make bench, make lint: each sets up what it needs in .venv first.
#   PYTHON       the Python (3.11 or newer) that .venv is made with
#   TORCH_INDEX  the index to take torch from, as in https://download.pytorch.org/whl/cpu; empty: pip's own
PYTHON ?= python3
CXX ?= g++
TORCH_INDEX ?=

BIN := .venv/bin
BUILD := build/native
SOURCES := $(shell find engine bridge benchmarks -name '*.cpp' -o -name '*.h')

.PHONY: demo test bench lint format build compiler clean

demo: build .venv/demo.stamp
	$(BIN)/heedful demo

test: build .venv/demo.stamp
	$(BIN)/ctest --test-dir $(BUILD) --output-on-failure --no-tests=ignore
	$(BIN)/python -m pytest

bench: build
	$(BIN)/heedful bench

lint: .venv/package.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(SOURCES)

format: .venv/package.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

# The engine and the bridge, in place: the package runs from src. Only what changed is compiled.
build: compiler .venv/package.stamp
	@test -f $(BUILD)/build.ninja || CXX=$(CXX) $(BIN)/cmake -S . -B $(BUILD) -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja
	@$(BIN)/cmake --build $(BUILD)
	@$(BIN)/cmake --install $(BUILD) --prefix src >/dev/null

compiler:
	@command -v $(CXX) >/dev/null || { echo "heedful needs a C++17 compiler: no $(CXX) on PATH (apt install g++, or make CXX=…)"; exit 1; }

.venv/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"heedful needs Python 3.11 or newer: $(PYTHON) is {v[0]}.{v[1]} (choose one with make PYTHON=…)")'
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo "heedful needs Python's venv module (apt install python3-venv)"; exit 1; }

.venv/requirements.stamp: requirements/dev.txt requirements/constraints.txt | .venv/bin/python
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install --no-deps --index-url $(TORCH_INDEX) $$(grep '^torch==' requirements/dev.txt))
	$(BIN)/python -m pip install -r requirements/dev.txt -c requirements/constraints.txt
	@touch $@

.venv/package.stamp: pyproject.toml .venv/requirements.stamp
	$(BIN)/python -m pip install --no-deps --no-build-isolation -C wheel.cmake=false -C editable.mode=inplace -e .
	@touch $@

.venv/demo.stamp: requirements/demo.txt .venv/requirements.stamp
	$(BIN)/python -m pip install --no-deps -r $<
	@touch $@

clean:
	rm -rf build src/heedful/_engine src/heedful/include
