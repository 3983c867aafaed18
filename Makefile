# Every target does all of its own set-up: a virtual environment for each interpreter
# (.venv-3.13; with sanitizers .venv-3.13-asan), the tools it needs, the build. What has
# been done is remembered by stamps in there, so a second run goes straight to work.

PYTHON ?= python3
BIND ?= :8000
FUZZ_SECONDS ?= 60
JOBS ?= $(shell nproc)
WERROR ?= OFF
PYTEST_ARGS ?=
BENCH_ARGS ?=
AUTOBAHN_CASES ?= *
AUTOBAHN_ARGS ?=
CLANG ?= $(shell for c in clang clang-21 clang-20 clang-19 clang-18 clang-17 clang-16 \
         clang-15 clang-14; do command -v $$c && break; done)

# One that runs: the shims of pyenv have the name, whatever is behind them.
PYTHON27 ?= $(shell pyenv=$${PYENV_ROOT:-$$(pyenv root 2>/dev/null)}; \
            for p in python2.7 "$$pyenv"/versions/2.7*/bin/python2.7; do \
            "$$p" -c '' 2>/dev/null && command -v "$$p" && break; done)

TAG := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' \
       2>/dev/null)
VENV := .venv-$(TAG)
ASAN := $(VENV)-asan
BIN := $(VENV)/bin
VENVS := $(VENV) $(ASAN)

# The directories are listed too: theirs is the time of the last file added or removed.
SOURCES := CMakeLists.txt pyproject.toml LICENSE $(wildcard README.md) \
           $(shell find csrc src -name __pycache__ -prune -o -print)
# prefork.h is laid out by hand, as a manual page is.
C_FILES := $(shell find csrc tests/c tests/fuzz benchmarks -name '*.[ch]' \
           ! -name prefork.h 2>/dev/null)

export PATH := $(CURDIR)/$(BIN):$(PATH)
export CMAKE_BUILD_PARALLEL_LEVEL := $(JOBS)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

MAKEFLAGS += --no-print-directory

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help serve test units pytest autobahn lint format bench fuzz asan tsan wheel \
        clean compiler

help: ## list the targets
	@echo 'usage: make TARGET [PYTHON=python3.13] ...'
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  \1|\2/p' Makefile | column -t -s '|'

serve: $(VENV)/.package ## serve examples/hello.py on BIND (:8000), a worker per CPU
	@exec env PYTHONPATH=examples $(BIN)/prefork hello:app --bind $(BIND)

# ---- Tests ---------------------------------------------------------------------------

test: units pytest ## run the C units and the Python tests (PYTEST_ARGS=...)

units: build/debug/Makefile
	@cmake --build --preset debug
	@ctest --preset debug

pytest: $(VENV)/.package $(VENV)/.group-test
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

autobahn: $(VENV)/.package build/autobahn/.wstest ## run the Autobahn test suite (AUTOBAHN_CASES='1.*,12.*')
	@$(BIN)/python tests/autobahn/run.py --cases '$(AUTOBAHN_CASES)' $(AUTOBAHN_ARGS)

# A worker's report must not be lost when its master replaces it: reports go to files.
REPORTS := $(CURDIR)/build/asan/reports
asan: build/asan/Makefile $(ASAN)/.package $(ASAN)/.group-test ## run both under ASan and UBSan
	@cmake --build --preset asan
	@ctest --preset asan
	@rm -rf $(REPORTS) && mkdir -p $(REPORTS)
	@preload=$$(ldd $(ASAN)/lib/python*/site-packages/prefork/_core.*.so \
	    | awk '/libasan/ { print $$3 }'); \
	LD_PRELOAD="$$preload" PYTHONMALLOC=malloc \
	ASAN_OPTIONS="detect_leaks=0:log_path=$(REPORTS)/asan" \
	UBSAN_OPTIONS="print_stacktrace=1:log_path=$(REPORTS)/ubsan" \
	$(ASAN)/bin/python -m pytest -o timeout=300 $(PYTEST_ARGS); status=$$?; \
	if [ -n "$$(ls $(REPORTS))" ]; then cat $(REPORTS)/*; exit 1; fi; \
	exit $$status

tsan: build/tsan/Makefile ## run the C units under ThreadSanitizer
	@cmake --build --preset tsan
	@ctest --preset tsan

fuzz: build/fuzz/Makefile ## run each fuzzer for FUZZ_SECONDS (60)
	@cmake --build --preset fuzz
	@for source in tests/fuzz/fuzz_*.c; do \
	    name=$$(basename $$source .c); \
	    seeds=tests/fuzz/corpus/$$name; \
	    mkdir -p build/fuzz/corpus/$$name build/fuzz/crashes; \
	    echo "$$name for $(FUZZ_SECONDS) s"; \
	    ASAN_OPTIONS=quarantine_size_mb=16 \
	    build/fuzz/tests/fuzz/$$name -max_total_time=$(FUZZ_SECONDS) -timeout=10 \
	        -print_final_stats=1 -verbosity=0 \
	        -artifact_prefix=build/fuzz/crashes/$$name- \
	        build/fuzz/corpus/$$name $$(ls -d $$seeds 2>/dev/null) || exit 1; \
	done

lint: $(VENV)/.group-dev ## ruff, mypy, cython-lint, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/cython-lint src
	$(BIN)/clang-format --dry-run -Werror $(C_FILES)

format: $(VENV)/.group-dev ## format Python and C in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(C_FILES)

bench: $(VENV)/.package $(VENV)/.group-test build/release/Makefile ## run the benchmarks (BENCH_ARGS=...)
	@cmake --build --preset release
	$(BIN)/python benchmarks/run.py $(BENCH_ARGS)
	$(BIN)/python -m pytest benchmarks --benchmark-only

wheel: $(BIN)/python compiler ## build a wheel into dist/
	$(BIN)/python -m pip wheel -q --no-deps -w dist .

clean: ## remove all that make has made
	rm -rf build dist .venv-* .benchmarks .hypothesis .mypy_cache .pytest_cache \
	    .ruff_cache
	find src tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +

# ---- Set-up --------------------------------------------------------------------------

compiler:
	@command -v $${CC:-cc} >/dev/null || command -v gcc >/dev/null \
	    || command -v clang >/dev/null || { echo 'prefork: no C compiler found:' \
	    'apt install gcc, or dnf install gcc' >&2; exit 1; }

$(VENVS:%=%/bin/python): %/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	    echo 'prefork: $(PYTHON) is not a Python 3.10 or newer: apt install python3,' \
	    'dnf install python3, or make PYTHON=...' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo 'prefork: $(PYTHON) has no venv module: apt install python3-venv,' \
	    'or dnf install python3-pip' >&2; exit 1; }
	@rm -rf $*
	$(PYTHON) -m venv $*
	@$*/bin/python -m pip install -q --upgrade 'pip>=25.1' || { rm -rf $*; exit 1; }

# A dependency group of pyproject.toml.
$(VENVS:%=%/.group-test): %/.group-test: pyproject.toml | %/bin/python
	$*/bin/python -m pip install -q --group test
	@touch $@

$(VENVS:%=%/.group-dev): %/.group-dev: pyproject.toml | %/bin/python
	$*/bin/python -m pip install -q --group dev
	@touch $@

# CMake comes from the system if that is new enough, else from PyPI.
$(VENVS:%=%/.group-build): %/.group-build: pyproject.toml | %/bin/python
	$*/bin/python -m pip install -q --group build
	@cmake --version 2>/dev/null | awk '{ split($$3, v, "."); n = v[1] * 1000 + v[2] } \
	    NR == 1 { exit } END { exit n < 3020 }' || \
	    $*/bin/python -m pip install -q 'cmake>=3.20'
	@touch $@

$(VENV)/.package: SETTINGS :=
$(ASAN)/.package: SETTINGS := -Ccmake.build-type=Debug \
    -Ccmake.define.PREFORK_SANITIZE=address,undefined
$(VENVS:%=%/.package): %/.package: $(SOURCES) | %/.group-build compiler
	@$*/bin/python -c 'import os, sys, sysconfig; \
	    sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || { \
	    echo 'prefork: $(PYTHON) has no Python.h: apt install python3-dev,' \
	    'or dnf install python3-devel' >&2; exit 1; }
	$*/bin/python -m pip install -q --no-build-isolation --check-build-dependencies \
	    -Cbuild-dir=build/$(*:.venv-%=python-%) $(SETTINGS) .
	@touch $@

# The Autobahn suite is for Python 2.7, and this virtualenv the last that knows that one.
WSTEST := build/autobahn/wstest
VIRTUALENV := build/autobahn/virtualenv
build/autobahn/.wstest: | $(BIN)/python compiler
	@[ -n '$(PYTHON27)' ] && $(PYTHON27) -c '' 2>/dev/null || { \
	    echo 'prefork: the Autobahn suite needs a Python 2.7, and none was found:' \
	    'pyenv install 2.7.18, or make autobahn PYTHON27=...' >&2; exit 1; }
	@rm -rf $(WSTEST) $(VIRTUALENV)
	$(BIN)/python -m pip install -q --target $(VIRTUALENV) virtualenv==20.15.1
	PYTHONPATH=$(VIRTUALENV) $(BIN)/python -m virtualenv -q -p $(PYTHON27) $(WSTEST)
	$(WSTEST)/bin/python -m pip install -q --no-python-version-warning \
	    autobahntestsuite==25.10.1
	@touch $@

# The C programs: build/<preset>/Makefile stands for a configured build.
CONFIGURE = cmake --preset $(@:build/%/Makefile=%) -DPREFORK_WERROR=$(WERROR)
build/%/Makefile: CMakeLists.txt CMakePresets.json | $(VENV)/.group-build compiler
	@$(CONFIGURE)
	@touch $@

build/fuzz/Makefile: CMakeLists.txt CMakePresets.json | $(VENV)/.group-build
	@[ -n '$(CLANG)' ] || { echo 'prefork: no clang found: apt install clang' \
	    'libclang-rt-dev, or dnf install clang compiler-rt' >&2; exit 1; }
	@$(CONFIGURE) -DCMAKE_C_COMPILER=$(CLANG)
	@touch $@
