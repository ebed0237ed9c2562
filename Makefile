# Every target sets up .venv first, once, and again when pyproject.toml or constraints.txt have changed.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
RESULTS := benchmarks/results
TRACE ?= $(firstword $(wildcard ../shared/traces/conversation_trace.jsonl benchmarks/traces/*.jsonl))

.PHONY: help venv demo test lint format bench docs clean
.DEFAULT_GOAL := help

help: ## show this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /|/' | awk -F'|' '{printf "  make %-8s %s\n", $$1, $$2}'

venv: $(READY) ## make .venv with everything that development and the demo need

# Debian leaves ensurepip out of python3 (it is in python3-venv); then the system's pip fills the environment.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "cairn needs Python 3.11 or newer; name one with: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
		echo "setting up .venv"; \
		$(PYTHON) -m venv --clear .venv >/dev/null 2>&1 || { \
			$(PYTHON) -m venv --clear --without-pip .venv && $(PYTHON) -m pip -qq --python $(BIN)/python install pip; \
		}; \
	}
	@echo "installing the packages that constraints.txt pins (a few minutes the first time)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY) ## ask a real model about a real text: cold, from DRAM, and from disk after a restart
	@$(BIN)/cairn demo

test: $(READY) ## run the whole test suite
	@$(BIN)/python -m pytest

lint: $(READY) ## check style, types and the direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

format: $(READY) ## bring the code into shape
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

bench: $(READY) ## measure this machine; results go to benchmarks/results/
	@mkdir -p $(RESULTS)
	@set -e; for bench in engine disk index "policy $(TRACE)"; do \
		echo "cairn bench $$bench"; \
		$(BIN)/cairn bench $$bench --json > $(RESULTS)/new; \
		mv $(RESULTS)/new $(RESULTS)/$${bench%% *}.json; \
	done

docs: $(READY) ## renew docs/configuration.md from the schema
	@$(BIN)/cairn config docs > docs/configuration.md

clean: ## remove .venv and everything else that was made here
	@rm -rf .venv .cache build dist demo-out .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
