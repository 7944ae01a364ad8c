# make demo, make test, make bench, make lint, make docs, make sanitize, make fuzz, make test-arm, make bench-tiles: each
# sets up what it needs in .venv first.
#   PYTHON       the Python (3.11 or newer) that .venv is made with
#   TEST_WORKERS how many tests run at once, 2 if left out
#   TORCH_INDEX  the index to take torch from, as in https://download.pytorch.org/whl/cpu; empty: pip's own
PYTHON ?= python3
CXX ?= g++
TORCH_INDEX ?=
# What make test-arm compiles with and runs under, and how long make fuzz looks.
ARM_CXX ?= aarch64-linux-gnu-g++
ARM_RUN ?= qemu-aarch64-static
FUZZ ?= --seconds 60
# Tests that run at once.
TEST_WORKERS ?= 2

BIN := .venv/bin
BUILD := build/native
# Slow code in short runs: a few calls of each test, compiled quickly.
SANITIZED := -DCMAKE_CXX_FLAGS_RELEASE=-O1 -DHEEDFUL_TEST_ROUNDS=30
comma := ,
# Threads that spin while they wait keep the other tests from the cores.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal
SOURCES := $(shell find engine bridge benchmarks -name '*.cpp' -o -name '*.h')

# $(call configure,folder,options): a build folder, made once.
configure = test -f $(1)/build.ninja || $(BIN)/cmake -S . -B $(1) -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja $(2)

.PHONY: demo test disassembly test-arm sanitize fuzz bench bench-tiles docs docs-serve lint format build compiler clean

demo: build .venv/demo.stamp
	$(BIN)/heedful demo

test: build disassembly .venv/demo.stamp
	$(BIN)/ctest --test-dir $(BUILD) --output-on-failure --no-tests=ignore
	$(PYTEST)

# The inner loops of the tile kernels keep their sums in registers.
disassembly: build
	$(BIN)/python engine/tests/check_disassembly.py $(BUILD)

# The engine and its tests for aarch64, emulated.
test-arm: .venv/requirements.stamp
	@command -v $(ARM_CXX) >/dev/null && command -v $(ARM_RUN) >/dev/null || { echo "make test-arm needs $(ARM_CXX) and $(ARM_RUN) (apt install g++-aarch64-linux-gnu qemu-user-static)"; exit 1; }
	@$(call configure,build/arm,-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$(ARM_CXX) -DCMAKE_EXE_LINKER_FLAGS=-static -DCMAKE_CROSSCOMPILING_EMULATOR=$(ARM_RUN) -DHEEDFUL_TEST_ROUNDS=40)
	$(BIN)/cmake --build build/arm --target engine_tests
	$(BIN)/ctest --test-dir build/arm --output-on-failure
	$(BIN)/python engine/tests/check_disassembly.py build/arm --objdump $(ARM_CXX:g++=objdump)

# The engine's own tests under AddressSanitizer with UndefinedBehaviorSanitizer, then under ThreadSanitizer.
sanitize: compiler .venv/requirements.stamp
	@$(call configure,build/asan,-DCMAKE_CXX_COMPILER=$(CXX) $(SANITIZED) -DHEEDFUL_SANITIZE=address$(comma)undefined)
	@$(call configure,build/tsan,-DCMAKE_CXX_COMPILER=$(CXX) $(SANITIZED) -DHEEDFUL_SANITIZE=thread)
	$(BIN)/cmake --build build/asan --target engine_tests
	$(BIN)/ctest --test-dir build/asan --output-on-failure
	$(BIN)/cmake --build build/tsan --target engine_tests
	$(BIN)/ctest --test-dir build/tsan --output-on-failure

# FUZZ="--seed N" runs one input again, FUZZ="--count N" a number of them.
fuzz: compiler .venv/requirements.stamp
	@$(call configure,build/asan,-DCMAKE_CXX_COMPILER=$(CXX) $(SANITIZED) -DHEEDFUL_SANITIZE=address$(comma)undefined)
	$(BIN)/cmake --build build/asan --target attention_fuzz operations_fuzz
	build/asan/attention_fuzz $(FUZZ)
	build/asan/operations_fuzz $(FUZZ)
	HEEDFUL_ISA=portable build/asan/operations_fuzz $(FUZZ)

# What each tile kernel reaches of the multiply-add rate, by tier.
bench-tiles: compiler .venv/requirements.stamp
	@$(call configure,build/bench,-DCMAKE_CXX_COMPILER=$(CXX) -DHEEDFUL_BENCHMARKS=ON)
	$(BIN)/cmake --build build/bench
	@for program in build/bench/tiles_*; do $$program || exit 1; done

bench: build
	$(BIN)/heedful bench

# The documentation as a site, into build/site; a link that leads nowhere is an error.
docs: build .venv/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: build .venv/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

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
	@$(call configure,$(BUILD),-DCMAKE_CXX_COMPILER=$(CXX))
	@$(BIN)/cmake --build $(BUILD)
	@$(BIN)/cmake --install $(BUILD) --prefix src >/dev/null

compiler:
	@command -v $(CXX) >/dev/null || { echo "heedful needs a C++17 compiler: no $(CXX) on PATH (apt install g++, or make CXX=…)"; exit 1; }

.venv/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"heedful needs Python 3.11 or newer: $(PYTHON) is {v[0]}.{v[1]} (choose one with make PYTHON=…)")'
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo "heedful needs Python's venv module (apt install python3-venv)"; exit 1; }

.venv/requirements.stamp: requirements/dev.txt requirements/triton.txt requirements/constraints.txt | .venv/bin/python
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install --no-deps --index-url $(TORCH_INDEX) $$(grep '^torch==' requirements/dev.txt))
	$(BIN)/python -m pip install -r requirements/dev.txt -c requirements/constraints.txt
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --no-deps -r requirements/triton.txt || echo "no Triton for this machine: its tests are skipped"
	@touch $@

.venv/package.stamp: pyproject.toml .venv/requirements.stamp
	$(BIN)/python -m pip install --no-deps --no-build-isolation -C wheel.cmake=false -C editable.mode=inplace -e .
	@touch $@

.venv/docs.stamp: requirements/docs.txt requirements/constraints.txt .venv/requirements.stamp
	$(BIN)/python -m pip install -r requirements/docs.txt -c requirements/constraints.txt
	@touch $@

.venv/demo.stamp: requirements/demo.txt .venv/requirements.stamp
	$(BIN)/python -m pip install --no-deps -r $<
	@touch $@

clean:
	rm -rf build src/heedful/_engine src/heedful/include
