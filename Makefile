# make demo        set up, tune the small demo model on the example data, show what changed
# make test        set up and run the tests (within 12 minutes on 2 cores)
# make test-slow   the long ones: kill matrix, load, other servers, browser soak
# make check       lint, types, shell and documents

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
BASE_PYTHON ?= $(firstword $(foreach p,python3.11 python3,$(shell command -v $(p))))
BIN := .venv/bin
DEMO_DIR ?= finetune/io_file/output_data/demo

.PHONY: help demo test test-slow check format clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

$(BIN)/python:
	$(BASE_PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"Python 3.11 or newer is needed, this is {v.major}.{v.minor}; run: make BASE_PYTHON=/path/to/python3.11 ...")'
	$(BASE_PYTHON) -m venv .venv

.venv/run: requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt .venv/run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: .venv/run
	$(BIN)/python -m qwen_chat.demo_model
	@bash finetune/demo.sh $(DEMO_DIR)

# What measures time runs by itself; collecting the files that have none of it would take ten seconds.
test: .venv/dev
ifdef ARGS
	$(BIN)/python -m pytest -m "not slow" $(ARGS)
else
	$(BIN)/python -m pytest -m "not slow and not alone" -n 2 --dist worksteal
	$(BIN)/python -m pytest -m "not slow and alone" $$(grep -rl --include='test_*.py' 'mark\.alone' tests)
endif

test-slow: .venv/dev
	$(BIN)/python -m pytest -m slow --timeout 3600 $(ARGS)

check: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/shellcheck finetune/*.sh .ci/run
	$(BIN)/python docs/check.py
	$(BIN)/python docs/measure.py

format: .venv/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
