# Every target depends on the environment in .venv, which is rebuilt when requirements.lock or pyproject.toml changes.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
TEST_PROCESSES ?= 2
INSTALLED := $(VENV)/.installed

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.SUFFIXES:
.PHONY: help install demo test test-guard test-all check lint format migration docs study-smoke bench bench-api bench-serve chaos lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Create .venv with the locked dependencies and the project itself

# pip resolves nothing for the project itself: the lock names every dependency.
$(INSTALLED): requirements.lock pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --requirement requirements.lock
	@$(BIN)/pip install --quiet --no-deps --editable .
	@touch $@

demo: install ## Train, update and serve a small model on this machine
	@$(BIN)/pathswitch demo

# Each process runs whole files; one process runs all tests that need Ray (tests/conftest.py).
test: install ## Run all tests except the slow ones
	@$(BIN)/pytest --numprocesses $(TEST_PROCESSES) --dist loadgroup

test-guard: install ## Run the slow tests that nothing else covers, one after another (about 9 minutes)
	@$(BIN)/pytest -m "guard and not (slow_on_postgres and postgres)"

test-all: test ## Run every test; the slow ones one after another, because some of them measure time
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

# Alembic compares the tables with a scratch database built by the existing migrations, never with a real one.
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

study-smoke: install ## Compare all paradigms on the demo's text within minutes; writes build/study-smoke
	@rm -rf build/study-smoke
	@$(BIN)/python -m deploy.demo.corpus build/study-smoke/data
	@$(BIN)/pathswitch study deploy/study/smoke.json build/study-smoke/data --out build/study-smoke --home build/study-smoke/home

bench: install ## Run the benchmarks
	@$(BIN)/python -m tests.bench

bench-serve: install ## Compare serving with transformers' generate, then release, kill and overload it (over half an hour)
	@$(BIN)/python -m tests.bench.serve

bench-api: install ## Load the control plane on SQLite and on PostgreSQL and check its targets
	@$(BIN)/python -m tests.bench.load

chaos: install ## Kill, stop and disconnect orchestrators and databases (MINUTES=240 runs for hours)
	@$(BIN)/python -m tests.chaos $(if $(MINUTES),--minutes $(MINUTES))

# Existing pins stay unless they must change; `make lock UPGRADE=1` updates all of them. The lock pins torch without its
# local version and without the CUDA packages, so that it serves CPU and GPU wheels. It has no hashes for the same reason.
lock: install ## Pin every dependency in requirements.lock (UPGRADE=1 for the newest versions)
	@CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/pip-compile --quiet $(if $(UPGRADE),--upgrade) --extra dev \
		--strip-extras --no-allow-unsafe --no-emit-options --no-emit-index-url --no-emit-find-links \
		--no-emit-trusted-host --output-file requirements.lock pyproject.toml
	@sed -i -E 's/^(torch==[0-9.]+)\+[a-z0-9.]+$$/\1/' requirements.lock
	@! grep -nE '^(nvidia|cuda|triton)' requirements.lock || { echo 'lock: run make lock in an environment with a CPU build of torch'; exit 1; }

clean: ## Remove .venv, caches and builds
	@rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
