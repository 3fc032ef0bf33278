# Every target depends on the environment in .venv, which follows requirements.lock and pyproject.toml.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
TEST_PROCESSES ?= 2
INSTALLED := $(VENV)/.installed

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.SUFFIXES:
.PHONY: help install demo test test-all check lint format migration docs study-smoke bench bench-api bench-serve chaos lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Create .venv with the locked dependencies and the project itself

# The project goes in without resolving anything: what it needs is in the lock.
$(INSTALLED): requirements.lock pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --requirement requirements.lock
	@$(BIN)/pip install --quiet --no-deps --editable .
	@touch $@

demo: install ## Train, update and serve a small model on this machine
	@$(BIN)/pathswitch demo

# Whole files to each process, and all that needs Ray to one of them: tests/conftest.py.
test: install ## Run the tests (all but the slow ones)
	@$(BIN)/pytest --numprocesses $(TEST_PROCESSES) --dist loadgroup

test-all: test ## Run every test; the slow ones one after another, for some of them measure
	@$(BIN)/pytest -m slow

check: lint ## Lint, check types, import contracts and licences
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/pytest -q tests/test_licences.py

lint: install ## Check style and format
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

format: install ## Apply the style: import order, safe fixes, format
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

# Against a scratch database that the existing migrations have built, so that nobody's own database matters.
define WRITE_MIGRATION
import pathlib, sys, tempfile
from alembic import command
from service.store.migrate import alembic_config, upgrade

number = 1 + max(int(path.name[:4]) for path in pathlib.Path("migrations/versions").glob("[0-9]*.py"))
with tempfile.TemporaryDirectory() as folder:
    url = f"sqlite:///{folder}/scratch.db"
    upgrade(url)
    command.revision(alembic_config(url), sys.argv[1], autogenerate=True, rev_id=f"{number:04d}")
endef
export WRITE_MIGRATION

migration: install ## Write a migration from the tables: make migration m="add a column"
	@test -n "$(m)" || { echo 'usage: make migration m="what changes"'; exit 2; }
	@$(BIN)/python -c "$$WRITE_MIGRATION" "$(m)"

docs: install ## Write what is generated in docs/: the architecture's file list, the reports of studies
	@PYTHONPATH=. $(BIN)/python docs/architecture.py
	@PYTHONPATH=. $(BIN)/python docs/study/publish.py docs/study/*/

study-smoke: install ## Compare every paradigm on the demo's text, in minutes; the report is in build/study-smoke
	@rm -rf build/study-smoke
	@$(BIN)/python -m deploy.demo.corpus build/study-smoke/data
	@$(BIN)/pathswitch study deploy/study/smoke.json build/study-smoke/data --out build/study-smoke --home build/study-smoke/home

bench: install ## Run the benchmarks
	@$(BIN)/python -m tests.bench

bench-serve: install ## Hold serving against transformers' generate, then release, kill and overload it (half an hour and more)
	@$(BIN)/python -m tests.bench.serve

bench-api: install ## Put load on the control plane, on SQLite and on PostgreSQL, and hold it to its targets
	@$(BIN)/python -m tests.bench.load

chaos: install ## Kill, stop and cut off orchestrators and databases (MINUTES=240 for hours instead of minutes)
	@$(BIN)/python -m tests.chaos $(if $(MINUTES),--minutes $(MINUTES))

# Pins already in the lock stay unless they must move: `make lock UPGRADE=1` moves them all. torch is pinned without
# its local version and without the CUDA packages, so that one lock serves CPU and GPU wheels; the same file has no
# hashes for that reason.
lock: install ## Pin every dependency in requirements.lock (UPGRADE=1 for the newest)
	@CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/pip-compile --quiet $(if $(UPGRADE),--upgrade) --extra dev \
		--strip-extras --no-allow-unsafe --no-emit-options --no-emit-index-url --no-emit-find-links \
		--no-emit-trusted-host --output-file requirements.lock pyproject.toml
	@sed -i -E 's/^(torch==[0-9.]+)\+[a-z0-9.]+$$/\1/' requirements.lock
	@! grep -nE '^(nvidia|cuda|triton)' requirements.lock || { echo 'lock: lock beside a CPU build of torch'; exit 1; }

clean: ## Remove .venv, caches and builds
	@rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
