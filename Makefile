# Each target makes .venv and installs by itself: a clone, python >= 3.11 with pip, and make are all it needs.
#   make demo       trains DINO on the bundled images, evaluates, draws, exports (minutes on two cores)
#   make test       the fast tests          make test-all   everything: the slow ones, the demo, the fault table
#   make check      ruff, mypy, the import rules            make bench      side by side with peers
#   make slurm-up   a Slurm of two nodes on this machine    make slurm-down stops it (Debian's slurm-wlm and munge, root)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all check bench install slurm-up slurm-down

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
CONSTRAINTS := tests/constraints.txt
TYPES := build/types/selfsup
OUT ?= runs/demo
JOBS ?= 2

# One thread a test process: two that spin for the same cores are many times slower than either alone.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 GOMP_SPINCOUNT=5000 HF_HUB_OFFLINE=1
PYTEST := $(TEST_ENV) $(PY) -m pytest -n $(JOBS) --dist worksteal --durations=15

help:
	@sed -n '2,5s/^# *//p' Makefile

install: $(STAMP)

$(STAMP): pyproject.toml $(CONSTRAINTS) tests/make_venv.sh
	bash tests/make_venv.sh $(VENV)
	$(PY) -m pip install --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev]' torch torchvision
	@touch $@

demo: $(STAMP)
	$(VENV)/bin/selfsup demo --out $(OUT)

test: $(STAMP)
	$(PYTEST) -m "not slow and not demo and not faults and not slurm" tests

test-all: $(STAMP)
	$(PYTEST) tests

check: $(STAMP)
	$(VENV)/bin/ruff check .
	rm -rf $(TYPES) && mkdir -p $(TYPES)
	ln -s $(addprefix ../../../,$(wildcard selfsup/*) eval launch) $(TYPES)/
	MYPYPATH=build/types $(VENV)/bin/mypy -p selfsup -p benchmarks
	$(TEST_ENV) $(PY) -m pytest -q tests/test_imports.py

# BENCH="--peer dino=PATH" adds what is measured against dino; BENCH="--only knn --quick" looks at one row.
bench: $(STAMP)
	$(PY) benchmarks/run.py --json build/bench/results.json $(BENCH)

slurm-up: $(STAMP)
	$(PY) -m tests.slurm.cluster up

slurm-down: $(STAMP)
	$(PY) -m tests.slurm.cluster down
