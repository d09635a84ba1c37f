# The developer's commands; `make help` lists them.
#
# Everything lives in .venv and build/. Test and check tools come at the exact versions of
# constraints.txt; torch above all, or pip would take the newest build with gigabytes of CUDA.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -qq
JOBS   ?= $(shell nproc 2>/dev/null || echo 2)
PROMPT ?= The list

SOURCES := CMakeLists.txt pyproject.toml $(shell find native src -type f \
             -not -name '*.pyc' -not -name '*.so' 2>/dev/null)

# The native tests need no Python.
CMAKE_NATIVE := cmake -S . -DBITLLM_BUILD_TESTS=ON -DBITLLM_DEVELOPER=ON -DCMAKE_DISABLE_FIND_PACKAGE_Python=ON
COMMA        := ,
CTEST        := ctest --output-on-failure --no-tests=error

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo install test native-test coverage-native test-slow sanitize emulate aarch64 \
        fuzz mac-check verify-large check format docs bench clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# --- environment -----------------------------------------------------------------------------

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "bitllm needs Python 3.11 or newer: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { echo "hint: apt-get install python3-venv" >&2; rm -rf $(VENV); exit 1; }

# The tools of a developer, once for each change of the two files that name them.
$(VENV)/.develop: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install 'pip>=25.1'
	$(PIP) install -c constraints.txt --group build --group test --group check
	@touch $@

install: $(VENV)/.develop  ## developer's environment in .venv, bitllm editable; again after native changes
	$(PIP) install -c constraints.txt --no-build-isolation -e .

# --- the two commands of the README ------------------------------------------------------------

demo: $(VENV)/.installed  ## install bitllm into .venv, then write text with the embedded model
	$(BIN)/bitllm run "$(PROMPT)"

# A plain install, as a user has it; a developer's environment stays editable.
$(VENV)/.installed: $(SOURCES) | $(BIN)/python
	@if [ -e $(VENV)/.develop ]; then $(MAKE) --no-print-directory install; \
	 else echo "installing bitllm into $(VENV) ..." && $(PIP) install .; fi
	@touch $@

test: install native-test  ## all tests but slow and large ones; COVERAGE=1 with the gate
	$(BIN)/python -m pytest $(if $(COVERAGE),--cov --cov-report=term --cov-fail-under=90)

# --- native tests ------------------------------------------------------------------------------

# $(call native,DIRECTORY,CMAKE OPTIONS): configure, build and run the native tests there.
define native
@$(CMAKE_NATIVE) -B build/$(1) $(2) >/dev/null
@cmake --build build/$(1) -j $(JOBS)
$(CTEST) --test-dir build/$(1)
endef

# $(call needs,FILE OR COMMAND,DEBIAN PACKAGES,STAGE,RECIPE): run a recipe whose tools may be absent. CI must not
# lack them; a developer is told that the stage was not run.
define needs
@if command -v $(1) >/dev/null 2>&1 || test -e $(1); then $(MAKE) --no-print-directory $(4); \
 elif [ -n "$$CI" ]; then echo "$(3): $(1) is missing; apt-get install $(2)" >&2; exit 1; \
 else echo "NOT RUN: $(3) (apt-get install $(2))" >&2; fi
endef

native-test:
	$(call native,native,-DCMAKE_BUILD_TYPE=Release)

sanitize:  ## native tests under AddressSanitizer + UBSan, then ThreadSanitizer
	$(call native,asan,-DCMAKE_BUILD_TYPE=RelWithDebInfo -DBITLLM_SANITIZE=address$(COMMA)undefined)
	$(call native,tsan,-DCMAKE_BUILD_TYPE=RelWithDebInfo -DBITLLM_SANITIZE=thread)

emulate:  ## native tests with the AVX-512 kernels emulated by SIMDe
	$(call native,emulate,-DCMAKE_BUILD_TYPE=Release -DBITLLM_EMULATE_AVX512=ON)

aarch64:  ## native tests built for aarch64, run by qemu
	$(call native,aarch64,-DCMAKE_BUILD_TYPE=Release \
	  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
	  "-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64;-L;/usr/aarch64-linux-gnu")

# Instrumented build: the native tests, then the Python tests that drive the native module. Counters in
# loops give the compiler false alarms, so warnings are no errors here; `make test` holds them to that.
NATIVE_PYTESTS = $(wildcard tests/test_cpu_*.py tests/test_ops.py tests/test_decoder_agreement.py)

coverage-native: $(VENV)/.develop  ## line coverage of native/ with its gate of 90 %
	$(call native,coverage,-DCMAKE_BUILD_TYPE=RelWithDebInfo -DBITLLM_COVERAGE=ON -DBITLLM_DEVELOPER=OFF \
	  $(if $(wildcard /usr/include/simde),-DBITLLM_EMULATE_AVX512=ON))
	$(PIP) install --no-deps --no-build-isolation -e . -C build-dir=build/coverage-module \
	  -C cmake.build-type=RelWithDebInfo -C cmake.define.BITLLM_COVERAGE=ON
	$(BIN)/python -m pytest -q $(NATIVE_PYTESTS); status=$$?; \
	  $(PIP) install --no-deps --no-build-isolation -e . && exit $$status
	$(BIN)/gcovr --root . --filter native/ --exclude native/tests/ --exclude-throw-branches \
	  --gcov-ignore-parse-errors=suspicious_hits.warn_once_per_file --txt --fail-under-line 90 build

# --- the longer tiers --------------------------------------------------------------------------

test-slow: install sanitize  ## sanitizers, emulated AVX-512, aarch64, slow pytest
	$(call needs,/usr/include/simde/simde-common.h,libsimde-dev,AVX-512 kernels under SIMDe,emulate)
	$(call needs,aarch64-linux-gnu-g++,g++-aarch64-linux-gnu qemu-user,aarch64 build under qemu,aarch64)
	$(BIN)/python -m pytest -m "slow and not large"

FUZZ_SECONDS ?= 300

fuzz: install  ## fuzz the readers of file headers; FUZZ_SECONDS=N for each, inputs kept in build/fuzz
	$(BIN)/python tests/fuzz/run.py safetensors --seconds $(FUZZ_SECONDS) --corpus build/fuzz/safetensors
	$(BIN)/python tests/fuzz/run.py gguf --seconds $(FUZZ_SECONDS) --corpus build/fuzz/gguf
	$(BIN)/python tests/fuzz/run.py config --seconds $(FUZZ_SECONDS) --corpus build/fuzz/config

mac-check: install  ## on a Mac: tests, self-tests and speed of the mlx device, to paste
	$(BIN)/python benchmarks/mac.py

verify-large: install  ## evidence at 2B size: several GB of disk and memory, figures to stdout
	$(BIN)/python benchmarks/make_checkpoint.py --shape 2b build/models/2b
	$(BIN)/bitllm bench -m build/models/2b --profile --plot build/models/2b.png
	$(BIN)/python -m pytest -m large

bench: install  ## footprint, and the speed of a 10M-parameter model
	$(BIN)/python benchmarks/footprint.py
	$(BIN)/python benchmarks/make_checkpoint.py --shape 10m build/models/10m
	$(BIN)/bitllm bench -m build/models/10m --profile

# --- checks --------------------------------------------------------------------------------------

NATIVE_SOURCES = $(shell git ls-files 'native/*.cpp' 'native/*.h')

check: install  ## formatting, lint, types, import contracts, generated docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(NATIVE_SOURCES)
	$(BIN)/python docs/generate_cli.py --check
	$(BIN)/python docs/generate_tree.py --check
	$(BIN)/python docs/generate_formats.py --check

format:  ## rewrite all sources in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(NATIVE_SOURCES)

docs: install  ## regenerate the pages that are made from the code
	$(BIN)/python docs/generate_cli.py
	$(BIN)/python docs/generate_tree.py
	$(BIN)/python docs/generate_formats.py
	$(BIN)/python -m nanobind.stubgen -q -m bitllm._native -o src/bitllm/_native.pyi

clean:  ## remove what was built and cached, .venv excepted
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .coverage*
