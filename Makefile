# make quickstart   set up, then compare SFTMix with next-token prediction: generated data, 6 seeds
# make test         set up with the tools of development, then run all tests
# make test-oldest  the quick tests with the oldest versions that setup.py allows, make test-newest
#   with the newest
# make torture      the long form of tests: more kills, more launchers, more shapes
# make check        lint, formatting and types
# make docs         the pages of docs/ as a site, in site/; ends at a link that leads nowhere
# make bench        speed of everything, 15 minutes on 2 cores, nothing else may run: OUT=bench.json
SHELL := /bin/bash
VENV := .venv
# A pyenv shim is there for versions that are not: each is tried, silently.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
# Without a GPU the CPU build of torch is enough, and gigabytes smaller; constraints-cpu.txt pins
# one that the registry has as such.
CONSTRAINTS := $(shell command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1 \
  || echo -c constraints-cpu.txt)
TORCH := $(if $(CONSTRAINTS),$(shell grep '^torch==' constraints-cpu.txt))
QUICK := not recipe and not distributed and not torture

.PHONY: setup setup-dev quickstart test test-oldest test-newest torture bench docs check format
.PHONY: clean
OUT ?= bench.json

setup: $(VENV)/.ready
setup-dev: $(VENV)/.ready-dev

# $(call install,FOLDER,ARGUMENTS): into the environment in FOLDER, made where it is missing. What
# pip says goes to a file, and to the screen where it fails. pip would compile on one core, for as
# long as the rest of the installation takes.
define install
@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; set PYTHON=/path/python3"; exit 1; }
@test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
@echo "pip install $(2)  (into $(1), minutes the first time; what pip says: $(1)/pip.log)"
@$(1)/bin/pip install --no-compile $(2) >$(1)/pip.log 2>&1 || { cat $(1)/pip.log; exit 1; }
endef

# Some files of packages are templates and no Python.
compile = @$(1)/bin/python -m compileall -qq -j 0 $(1)/lib || true

$(VENV)/.ready: setup.py constraints-cpu.txt
	$(if $(TORCH),$(call install,$(VENV),"$(TORCH)"))
	$(call install,$(VENV),$(CONSTRAINTS) -e .)
	$(call compile,$(VENV))
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(call install,$(VENV),$(CONSTRAINTS) -e '.[dev]')
	$(call compile,$(VENV))
	@touch $@

quickstart: setup
	$(VENV)/bin/sftmix study configs/studies/quickstart.yaml --jobs 2

# Two files at a time, each in order, the longest first (tests/conftest.py): tests of several
# processes wait so much that one at a time leaves half of two cores idle.
TWO_AT_A_TIME := -n 2 --dist loadfile --no-loadscope-reorder
test: setup-dev $(VENV)/triton-3.6
	$(VENV)/bin/python -m pytest -q $(TWO_AT_A_TIME)
# Tests start hundreds of processes: what one has compiled, the others need not.
test torture: export PYTHONDONTWRITEBYTECODE :=

# The triton of GPU images with torch 2.11, for the tests that compile the kernels for GPUs.
$(VENV)/triton-3.6: $(VENV)/.ready-dev
	@$(VENV)/bin/pip install --no-compile --no-deps --target $@ triton==3.6.0 \
	  >$(VENV)/triton.log 2>&1 \
	  || { rm -rf $@; echo "no triton 3.6: tests with it are skipped ($(VENV)/triton.log)"; }

docs: setup-dev
	$(VENV)/bin/mkdocs build --strict

bench: setup-dev
	$(VENV)/bin/python benchmarks/suite.py --out $(OUT)

# Where torch is pinned, both ends have that one.
.venv-oldest/.ready: setup.py constraints-cpu.txt constraints-oldest.txt
	$(if $(TORCH),$(call install,.venv-oldest,"$(TORCH)"))
	@sed $(if $(TORCH),-e '/^torch==/d') constraints-oldest.txt >.venv-oldest/constraints.txt
	$(call install,.venv-oldest,$(CONSTRAINTS) -c .venv-oldest/constraints.txt -e '.[dev]')
	$(call compile,.venv-oldest)
	@touch $@

.venv-newest/.ready: setup.py constraints-cpu.txt
	$(if $(TORCH),$(call install,.venv-newest,"$(TORCH)"))
	$(call install,.venv-newest,--upgrade --upgrade-strategy eager $(CONSTRAINTS) -e '.[dev]')
	$(call compile,.venv-newest)
	@touch $@

test-oldest test-newest: test-%: .venv-%/.ready
	@.venv-$*/bin/python -c 'from sftmix.doctor.checks.versions import installed; print(installed())'
	.venv-$*/bin/python -m pytest -q $(TWO_AT_A_TIME) -m "$(QUICK)"

torture: setup-dev
	$(VENV)/bin/python -m pytest -q -m torture

check: setup-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: setup-dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
