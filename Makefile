# make demo | paper-tiny | test | test-fast | test-all | bench | bench-gpu | lint | format | docs | wheel | chart | venv | constraints | clean
# A fresh machine needs Linux, Python 3.11+ (with pip or ensurepip) and make. Everything else goes into .venv, uv into .uv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO ?=
PAPER ?=
TESTS ?=
BENCH ?=
# Seen to work together; the other versions follow from pyproject.toml. UPGRADE=--upgrade lifts those to the newest.
FIXED := torch==2.13.0 torchvision==0.28.0 ray==2.60.0 transformers==5.23.0 deepspeed==0.19.8
UPGRADE ?=

.PHONY: demo paper-tiny test test-fast test-all bench bench-gpu lint format docs wheel chart venv constraints clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       captioned images in, images out, on this machine (DEMO='--fresh' passes flags on)"
	@echo "make paper-tiny  every recipe of the paper with small models, ending with its tables (PAPER='--fresh' passes flags on)"
	@echo "make test       what a change must pass; make test-fast: those tests without Ray; make test-all: every test"
	@echo "make bench      what serving costs and gains, in numbers (BENCH='--set suites=[caching]' passes flags on)"
	@echo "make bench-gpu  what one GPU gives, in at most 8 minutes (BENCH=--tiny rehearses it, also without a GPU)"
	@echo "make lint       ruff and mypy    make format     let ruff rewrite"
	@echo "make docs       build the documentation into site/    make wheel     build a wheel into dist/"
	@echo "make chart      write the Helm chart of cluster/helm anew from cluster/kuberay"
	@echo "make venv       set-up alone     make clean      remove .venv and caches"
	@echo "make constraints   write constraints.txt anew from pyproject.toml (UPGRADE=--upgrade for newer versions)"

venv: $(VENV)/.ready

# The stamp is newer than what it was made from, or the set-up runs again.
$(VENV)/.ready: pyproject.toml constraints.txt .ci/setup.sh
	PYTHON="$(PYTHON)" bash .ci/setup.sh
	@touch $@

demo: venv
	$(BIN)/instella-ray demo $(DEMO)

paper-tiny: venv
	$(BIN)/python -m instella_ray.demo.paper $(PAPER)

# The tiers are tests/tiers.py's: without Ray; with it; and what is left for the night. TESTS='-k curate' passes flags on.
test: venv
	$(BIN)/python -m tests.tiers default $(TESTS)

test-fast: venv
	$(BIN)/python -m tests.tiers fast $(TESTS)

test-all: venv
	$(BIN)/python -m tests.tiers all $(TESTS)

bench: venv
	$(BIN)/python jobs/bench.py --config configs/bench/full.yaml $(BENCH)

bench-gpu: venv
	$(BIN)/python jobs/bench_gpu.py --config configs/bench/gpu.yaml $(BENCH)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The packages of the extra 'docs' are needed here only: the usual set-up leaves them out.
docs: venv
	EXTRAS=docs PYTHON="$(PYTHON)" bash .ci/setup.sh
	$(BIN)/mkdocs build --strict

wheel: .uv/bin/uv
	.uv/bin/uv build --wheel --out-dir dist

chart: venv
	$(BIN)/python cluster/helm/generate.py

.uv/bin/uv:
	PYTHON="$(PYTHON)" bash .ci/setup.sh --uv

# Versions already in the file stay unless upgraded; the header is the file's own first comment lines.
constraints: .uv/bin/uv
	@grep '^#' constraints.txt > .uv/header.txt
	@grep -v '^#' constraints.txt > .uv/resolved.txt
	@printf '%s\n' $(FIXED) > .uv/fixed.txt
	.uv/bin/uv pip compile --quiet pyproject.toml --all-extras --constraint .uv/fixed.txt $(UPGRADE) --no-header \
		--no-annotate --python-version 3.11 --python-platform x86_64-manylinux_2_28 --output-file .uv/resolved.txt
	@cat .uv/header.txt .uv/resolved.txt > constraints.txt

clean:
	rm -rf $(VENV) .uv .tools site .pytest_cache .mypy_cache .ruff_cache .hypothesis
