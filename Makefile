# make demo | test | test-fast | lint | format | venv | clean
# A fresh machine needs Linux, Python 3.11+ and make. Everything else goes into .venv (and uv into .uv).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FAST := not ray and not slow and not gpu
DEMO ?=

.PHONY: demo test test-fast lint format venv clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       captioned pictures in, pictures out, on this machine (DEMO='--fresh' passes flags on)"
	@echo "make test       all tests        make test-fast  those without Ray"
	@echo "make lint       ruff and mypy    make format     let ruff rewrite"
	@echo "make venv       set-up alone     make clean      remove .venv and caches"

venv: $(VENV)/.ready

# The stamp is newer than what it was made from, or the set-up runs again.
$(VENV)/.ready: pyproject.toml constraints.txt .ci/setup.sh
	PYTHON="$(PYTHON)" bash .ci/setup.sh
	@touch $@

demo: venv
	$(BIN)/instella-ray demo $(DEMO)

test: venv
	$(BIN)/python -m pytest

test-fast: venv
	$(BIN)/python -m pytest -m "$(FAST)"

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .uv .pytest_cache .mypy_cache .ruff_cache .hypothesis
