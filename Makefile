# What people and CI call; everything runs in a virtual environment of the project's own.

VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= python3


.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-vm test-kill newcomer soak lint types wheel bench docs clean

help: ## Tell what the targets do
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Install what is needed: Debian packages (as root or with sudo), then Python packages
	tools/setup.sh $(VENV)

$(BIN)/vfsmap:
	@echo "vfsmap is not installed yet; run: make setup" >&2; exit 1

demo: $(BIN)/vfsmap ## Format, mount, copy, map, kill and compare: the main job in under a minute
	$(BIN)/vfsmap demo

test: $(BIN)/vfsmap ## Run the tests
	tools/test.sh $(VENV) "not slow and not vm"

test-slow: $(BIN)/vfsmap ## Run the long tests as well
	tools/test.sh $(VENV) "not vm"

soak: $(BIN)/vfsmap ## Crash and damage pools for an hour: the figures of docs/reliability.md
	$(BIN)/python -m vfsmap.testing.crash --seed 1 --minutes 15
	$(BIN)/python -m vfsmap.testing.crash --seed 1 --only pairs --minutes 40
	$(BIN)/pytest -q -m slow tests/property/test_check_damage.py tests/crash/test_crash_mending.py

test-vm: $(BIN)/vfsmap ## Boot real kernels on files of a mounted pool
	VFSMAP_FORCE_FUSE=1 $(BIN)/pytest -q -m vm -n auto

test-kill: $(BIN)/vfsmap ## Kill a mount's server under eight writers, and the writers of a crash log
	for medium in tmpfs hugetlbfs ext4; do \
	    $(BIN)/python -m vfsmap.testing.killing --medium $$medium --rounds 200 || exit; \
	done
	$(BIN)/pytest -q -m slow tests/crash/test_pstore_kill.py

newcomer: $(BIN)/vfsmap ## Follow README and tutorial on fresh machines, and time it: as root, with debootstrap
	$(BIN)/python -m vfsmap.testing.newcomer --rounds 2

lint: $(BIN)/vfsmap ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(BIN)/vfsmap ## Check types
	$(BIN)/mypy

wheel: $(BIN)/vfsmap ## Build the wheel and check what it holds
	rm -rf dist
	$(BIN)/python -m build --wheel --installer pip
	$(BIN)/check-wheel-contents dist/*.whl

bench: $(BIN)/vfsmap ## Measure against peers in the same run
	$(BIN)/vfsmap bench

docs: $(BIN)/vfsmap ## Build the documentation's site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean: ## Remove what was built
	rm -rf build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
