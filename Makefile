# make quickstart   set up, then run the whole recipe on generated data
# make test         set up, then run all tests
# make torture      the long tests of what survives kills
# make check        lint, formatting and types
SHELL := /bin/bash
VENV := .venv
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' && echo $$p && break; done)
# Without a GPU the CPU build of torch is enough, and gigabytes smaller; constraints-cpu.txt pins one that the registry has as such.
CONSTRAINTS := $(shell command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1 || echo -c constraints-cpu.txt)
TORCH := $(if $(CONSTRAINTS),$(shell grep '^torch==' constraints-cpu.txt))

.PHONY: setup quickstart test torture check format clean

setup: $(VENV)/.ready

$(VENV)/.ready: setup.py constraints-cpu.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3"; exit 1; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH),$(VENV)/bin/pip install --quiet "$(TORCH)")
	$(VENV)/bin/pip install --quiet $(CONSTRAINTS) -e '.[dev]'
	touch $@

quickstart: setup
	$(VENV)/bin/sftmix run configs/quickstart.yaml

# Two files at a time, each in order: tests of several processes wait so much that one at a time leaves half of two cores idle.
test: setup
	$(VENV)/bin/python -m pytest -q -n 2 --dist loadfile

torture: setup
	$(VENV)/bin/python -m pytest -q -m torture

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
