# `make` lists the targets. Each of them sets up .venv first; only the first time takes long.
SHELL := bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

BIN := .venv/bin
STAMP := .venv/.backfuse-installed
# A single thread per test process: the tests run side by side. Set OMP_NUM_THREADS to change it.
OMP_NUM_THREADS ?= 1

# The first interpreter that runs and is new enough; PYTHON=... chooses another.
SUPPORTED := import sys; raise SystemExit(not (3, 10) <= sys.version_info < (3, 15))
CANDIDATES := python3 python python3.14 python3.13 python3.12 python3.11 python3.10
PYTHON ?= $(shell for p in $(CANDIDATES); do \
	$$p -c '$(SUPPORTED)' >/dev/null 2>&1 && echo $$p && break; done)

# The stamp holds the place it was made for: a moved or copied .venv still points at the old one.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif

.PHONY: help setup demo test lint clean

help:
	@echo 'make demo    train a small language model under every policy: table, plot, sample'
	@echo 'make test    run the tests'
	@echo 'make lint    ruff, and mypy on the package as it is built'
	@echo 'make setup   only install into .venv (the others do it when needed)'
	@echo 'make clean   remove .venv, builds and caches'
	@echo
	@echo 'ARGS goes to the tool: make demo ARGS="--steps 10"; make test ARGS="-k norm -n 0"'
	@echo 'PYTHON chooses the interpreter (3.10 to 3.14), PIP_ARGS goes to pip.'

setup: $(STAMP)
	@echo 'Ready: .venv'

$(STAMP): pyproject.toml constraints.txt
	@python="$(PYTHON)"; "$${python:-false}" -c '$(SUPPORTED)' || { \
		echo "make: no usable Python 3.10 to 3.14 here (PYTHON='$$python'); install one" \
			"or say where it is: make PYTHON=/path/to/python3" >&2; exit 1; }
	@if [ "$$(cat $@ 2>/dev/null)" != "$(CURDIR)" ] || ! $(BIN)/python -m pip -V >/dev/null 2>&1; \
	then \
		rm -rf .venv; echo "Setting up .venv with $$($(PYTHON) -V)"; \
		"$(PYTHON)" -m venv .venv || { rm -rf .venv; \
			echo "make: $(PYTHON) cannot make a virtual environment (above is why;" \
				"on Debian and Ubuntu the package python3-venv is missing)" >&2; exit 1; }; \
	fi
	$(BIN)/python -m pip install -q -c constraints.txt $(PIP_ARGS) --upgrade setuptools
	$(BIN)/python -m pip install -c constraints.txt $(PIP_ARGS) --no-build-isolation -e '.[all]'
	@echo "$(CURDIR)" > $@

demo: $(STAMP)
	@$(BIN)/backfuse demo $(ARGS)

test: $(STAMP)
	OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(BIN)/pytest -n auto --maxprocesses 8 $(ARGS)

# mypy cannot see through the folder mapping of an editable install, so it reads what a wheel would
# hold; its messages are turned to name the files in the checkout.
lint: $(STAMP)
	@rm -rf .venv/built
	@$(BIN)/python -c 'import setuptools; setuptools.setup()' -q build_py --build-lib .venv/built
	@set -o pipefail; failed=0; \
	echo ruff check; $(BIN)/ruff check . || failed=1; \
	echo mypy; MYPYPATH=.venv/built $(BIN)/mypy $(ARGS) | sed -E \
		-e 's#^\.venv/built/backfuse/(kernels|blocks|bench)/#\1/#' \
		-e 's#^\.venv/built/#src/#' || failed=1; \
	exit $$failed

clean:
	rm -rf .venv build dist backfuse.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
