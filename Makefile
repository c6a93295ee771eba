# The two commands of a newcomer, `make demo` and `make test`, need Python >= 3.11 and make; the rest they bring.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
PROJECTS := $(wildcard pyproject.toml checker/pyproject.toml)
ARGS ?=
# Most tests wait for a server or a child process, so three at a time keep two cores busy.
SIDE_BY_SIDE := --numprocesses=3 --dist=worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test oldest hazards bench queue batch events bulkhead soak lint format types chromium clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

demo: $(READY) ## Run the demo: upload a CSV of orders, watch it being processed
	$(PY) examples/orders/main.py $(ARGS)

test: $(READY) chromium ## Run all tests (ARGS="-k name" for some)
	$(PY) -m pytest $(SIDE_BY_SIDE) $(ARGS)

oldest: pyproject.toml ## Run the tests on the oldest versions that are supported
	@$(MAKE) --no-print-directory VENV=$(VENV)-oldest chromium $(VENV)-oldest/.lowered
	$(VENV)-oldest/bin/python -m pytest $(SIDE_BY_SIDE) --ignore=tests/typing --ignore=checker $(ARGS)

hazards: $(READY) ## Show what people write today, and the same with aftercommit
	$(PY) -m hazards $(ARGS)

bench: $(READY) ## Measure what a request with one task costs, beside the hand-written one
	$(PY) -m benchmarks.overhead $(ARGS)

queue: $(VENV)/.bench ## Measure durable tasks beside hand-written ones and other queues (ARGS="--quick")
	$(PY) -m benchmarks.queue $(ARGS)

batch: $(READY) ## Measure batches beside the loop that people write and one UPDATE (ARGS="--rows 10000")
	$(PY) -m benchmarks.batch $(ARGS)

events: $(VENV)/.bench ## Measure events and ways to count, beside an outbox by hand and faststream-outbox
	$(PY) -m benchmarks.events $(ARGS)

bulkhead: $(READY) ## Measure whether busy tasks slow the requests, beside the hand-written ones
	$(PY) -m benchmarks.bulkhead $(ARGS)

soak: $(READY) ## Faults of every kind at random, and books that must balance (ARGS="--seconds 600 --seed 7")
	$(PY) -m benchmarks.soak $(ARGS)

lint: $(READY) ## Check style and layout
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(READY) ## Put the layout right
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

types: $(READY) ## Check types, with mypy and pyright
	$(VENV)/bin/mypy --strict src
	$(VENV)/bin/pyright src

chromium: $(READY)
	@$(PY) -m tests.support.chromium

clean: ## Remove the virtual environment and all caches
	rm -rf $(VENV) $(VENV)-oldest .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Debian's python3 leaves venv to a package of its own.
define VENV_FROM_DEBIAN
{ test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -q && \
	apt-get install -q --yes python3-venv && $(PYTHON) -m venv --clear $(VENV); }
endef

# Every extra and every group but the one of other queues, so that no test is left out. Groups need pip 25.1, hence its upgrade.
# The stamp comes last: a set-up that was interrupted is done again.
$(READY): $(PROJECTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "aftercommit needs Python 3.11 or later; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12")'
	@echo 'Setting up $(VENV). This is done once, and again when pyproject.toml changes.'
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV) || $(VENV_FROM_DEBIAN) || { rm -rf $(VENV); \
		echo 'This Python came without venv. On Debian and Ubuntu: apt-get install python3-venv' >&2; exit 1; }
	@$(PY) -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	@$(PY) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb")); \
		print("--editable\n.[" + ",".join(p["project"]["optional-dependencies"]) + "]"); \
		[print("--group\n" + g) for g in p["dependency-groups"] if g != "bench"]' > $(VENV)/.wanted
	@xargs $(PY) -m pip install --quiet < $(VENV)/.wanted
	@for checker in $(filter checker/%,$(PROJECTS)); do $(PY) -m pip install --quiet --editable $${checker%/*}; done
	@touch $@

# The other queues, for `make queue`. Redis is no Python package: its contestant is left out, and named, without one.
$(VENV)/.bench: $(READY)
	@$(PY) -m pip install --quiet --disable-pip-version-check --group bench
	@touch $@

# What users install, as old as pyproject.toml allows; the groups, which are ours alone, stay new.
$(VENV)/.lowered: $(READY)
	@$(PY) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
		print("\n".join(r.replace(">=", "==") for r in sum(p["optional-dependencies"].values(), p["dependencies"])))' \
		> $(VENV)/.lowest
	@$(PY) -m pip install --quiet --disable-pip-version-check --requirement $(VENV)/.lowest
	@touch $@
