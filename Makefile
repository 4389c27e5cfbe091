# `make serve` and `make test` work on a fresh clone with Python 3.11 or newer: they create the virtual environment.
PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
# torch's CPU build; TORCH=torch installs the newest CUDA build
TORCH ?= torch==2.13.0
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export HF_HUB_OFFLINE := 1

.PHONY: setup serve test lint test-schema test-browser test-players test-gpu bench-gpu bench-serve bench-fanout bench-latency churn soak evaluate picture docs clean
.DEFAULT_GOAL := serve

setup: $(STAMP)

$(STAMP): pyproject.toml clients/python/pyproject.toml
	@echo "Setting up $(VENV) (once)"
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Livereel needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet --editable '.[dev]' --editable ./clients/python
	@touch $@

serve: setup
	@$(BIN)/python -m server --host $(HOST) --port $(PORT) $(ARGS)

lint: setup
	$(BIN)/ruff check clients/python docs examples engine server tests
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest

test-schema: setup
	$(BIN)/python -m pip install --quiet --editable '.[schema]'
	$(BIN)/python -m pytest -m schema tests/server

test-browser: setup
	$(BIN)/python -m pip install --quiet --editable '.[browser]'
	npx --yes --package typescript@5 tsc --project clients
	$(BIN)/python -m pytest -m browser tests/e2e

test-players: setup
	$(BIN)/python -m pip install --quiet --editable '.[browser]'
	$(BIN)/python -m pytest -m players -s tests/players

test-gpu: setup
	$(BIN)/python -m pytest -m gpu tests

bench-gpu: setup
	$(BIN)/python -m engine.bench.attention
	$(BIN)/python -m engine.bench.linear
	$(BIN)/python -m engine.bench.rollout self-forcing-1.3b --window 12 --sink 3 $(ARGS)

bench-serve: setup
	$(BIN)/python -m engine.bench.serve $(ARGS)

bench-fanout: setup
	$(BIN)/python -m server.bench.fanout $(ARGS)

bench-latency: setup
	$(BIN)/python -m pip install --quiet --editable '.[browser]'
	$(BIN)/python -m server.bench.latency $(ARGS)

churn: setup
	$(BIN)/python -m server.bench.churn $(ARGS)

soak: setup
	$(BIN)/python -m server.bench.soak $(ARGS)

evaluate: setup
	$(BIN)/python -m engine.recipes.evaluate --served $(ARGS)

# write docs/options.md from the options that the programs declare
docs: setup
	$(BIN)/python -m docs.options

picture: setup
	$(BIN)/python -m engine.bench.picture $(ARGS)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
