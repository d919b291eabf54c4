# Bare `make` prints help. CI and the README call only these targets.

PYTHON ?= python3
SIMULATE ?= 8xH100
# Seeds of each kind that the hunt for a cycle of preemptions goes through in test-all; 1,000 take ten minutes.
HUNT_RUNS ?= 250
# Seeds of the fault simulation in test-all.
FAULT_SEEDS ?= 200
SEED ?= 0

VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
COMPILED := $(VENV)/.compiled
# The fast tests have passed on all that is here.
TESTED := $(VENV)/.tested

PROTO_FILES := $(wildcard proto/scheduler/v1/*.proto)
# Processes that tests run in: most of them wait for daemons more than they compute.
TEST_PROCESSES ?= 3
PARALLEL := -n $(TEST_PROCESSES) --dist worksteal
# Fast: no GPU, no root, no network but loopback.
FAST_TESTS := $(wildcard tests/unit tests/properties tests/integration tests/test_tidy.py \
  tests/simulation/test_fault_seeds.py tests/simulation/test_planted_bugs.py tests/simulation/test_scenarios.py)
# Slow: fault simulation, published data, and the properties among the fast ones on more worlds.
LONG_TESTS := $(wildcard tests/simulation tests/properties)
# These want root, Prometheus, systemd or a GPU with CuPy, say so when they skip, and have the machine to themselves.
LONE_TESTS := $(wildcard tests/e2e tests/gpu)
PYTHON_SOURCES := $(wildcard scheduler proto tools tests)
TESTED_FILES := $(shell find $(PYTHON_SOURCES) docs deploy README.md CHANGELOG.md pyproject.toml \
  -type f -not -path '*/__pycache__/*' -not -path 'scheduler/v1/*')
RULE_TESTS := $(wildcard deploy/prometheus/*test*.yml)
RULES := $(filter-out $(RULE_TESTS),$(wildcard deploy/prometheus/*rules*.yml))
UNITS := $(wildcard deploy/*.service deploy/*.socket)

IDENTIFY := import sys; print(sys.base_prefix, sys.version)
same_python = $(filter $(call identity,$(PYTHON)),$(call identity,$(PY)))
# One word, so that two identities can be compared.
identity = $(shell $(1) -c '$(IDENTIFY)' 2>/dev/null | tr -c '[:alnum:]/.\n' _)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo run test test-all hunt sim lint fmt proto bench install clean

help: ## Print this help
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup: $(COMPILED) ## Make .venv with everything that development needs (PYTHON=python3.12 chooses the interpreter)

demo: $(COMPILED) ## Show it working: the daemon on simulated GPUs with real processes
	$(PY) tools/demo.py

run: $(COMPILED) ## Serve on simulated GPUs (SIMULATE=8xH100)
	$(VENV)/bin/wattshift serve --simulate $(SIMULATE)

test: $(COMPILED) ## Fast tests: no GPU, no root, no network but loopback
	$(PY) -m pytest $(PARALLEL) $(FAST_TESTS)
	@touch $(TESTED)

test-all: $(TESTED) ## All tests: also real Prometheus, real systemd, fault simulation
	HYPOTHESIS_PROFILE=long HUNT_RUNS=$(HUNT_RUNS) FAULT_SEEDS=$(FAULT_SEEDS) \
	  $(PY) -m pytest $(PARALLEL) $(LONG_TESTS)
	$(PY) -m pytest $(LONE_TESTS)

hunt: $(COMPILED) ## Look for a world that breaks a property: 3,000 of each kind, others each time (half an hour)
	HYPOTHESIS_PROFILE=thorough HUNT_RUNS=$(HUNT_RUNS) $(PY) -m pytest $(PARALLEL) --timeout 3600 tests/properties

# As any make does it: fast tests that passed are not repeated until a file has changed since.
$(TESTED): $(COMPILED) $(TESTED_FILES)
	@$(MAKE) --no-print-directory test

sim: $(COMPILED) ## Print the story of one seed of the fault simulation (SEED=7); where it fails, the shortest that does
	$(PY) -m tests.simulation $(SEED)

lint: $(COMPILED) ## Check style, types, the floors, protos, alert rules and units
	$(VENV)/bin/ruff check $(PYTHON_SOURCES)
	$(VENV)/bin/ruff format --check $(PYTHON_SOURCES)
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(if $(PROTO_FILES),$(VENV)/bin/buf lint proto)
	@if [ -z "$(RULES)" ]; then :; \
	elif command -v promtool >/dev/null; then \
	  promtool check rules $(RULES) && promtool check config deploy/prometheus/prometheus.yml && $(if $(RULE_TESTS),promtool test rules $(RULE_TESTS),:); \
	else echo "lint: no promtool here (apt-get install prometheus): rules not checked"; fi
# systemd-analyze exits 0 on keys it does not know: any output is a failure. It wants to see the commands, which
# are not installed here, so that the copies that it gets say /bin/true.
	@if [ -z "$(UNITS)" ]; then :; \
	elif command -v systemd-analyze >/dev/null; then \
	  copies=$$(mktemp -d) && trap 'rm -rf "$$copies"' EXIT && cp $(UNITS) "$$copies" && \
	  sed -i -E 's#^(Exec[A-Za-z]+=[-+@:!]*)/opt/wattshift/[^ ]+#\1/bin/true#' "$$copies"/* && \
	  out=$$(systemd-analyze verify --recursive-errors=yes "$$copies"/* 2>&1) || { echo "$$out"; exit 1; }; \
	  [ -z "$$out" ] || { echo "$$out"; exit 1; }; \
	else echo "lint: no systemd-analyze here: units not checked"; fi

fmt: $(COMPILED) ## Format the code and sort its imports
	$(VENV)/bin/ruff check --fix-only --quiet $(PYTHON_SOURCES)
	$(VENV)/bin/ruff format $(PYTHON_SOURCES)

proto: $(INSTALLED) ## Compile proto/ into scheduler/v1
	$(PY) proto/build_hook.py
	@touch $(COMPILED)

bench: $(COMPILED) ## Print benchmark figures as JSON
	$(PY) tests/benchmarks/bench.py

install: ## Install on this machine as a systemd service (needs root)
	./deploy/install.sh

clean: ## Remove .venv, caches and everything generated
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	rm -f scheduler/v1/*_pb2.py scheduler/v1/*_pb2.pyi scheduler/v1/*_pb2_grpc.py
	find scheduler proto $(wildcard tests tools) -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml proto/build_hook.py
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "setup: $(PYTHON) is missing or not 3.11 to 3.13; try: make setup PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "setup: $(PYTHON) has no venv module; as root: apt-get install python3-venv" >&2; exit 1; }
	@# Two interpreters in one environment break it in odd ways (no ssl module): start over for another one.
	$(PYTHON) -m venv $(if $(call same_python),,--clear) $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

# The directory is a prerequisite too, so that a removed proto takes its generated code with it.
$(COMPILED): $(INSTALLED) $(PROTO_FILES) $(wildcard proto/scheduler/v1)
	$(PY) proto/build_hook.py
# Where PYTHONDONTWRITEBYTECODE is set every start would compile everything again: 0.1 s a command.
	$(PY) -m compileall -q scheduler
	@touch $@
