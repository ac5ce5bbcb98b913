# Needs Python 3.11 and nothing else; every target sets up what it uses.
#
#   make demo     train, resume, export and report a small model (about five minutes on two cores)
#   make demo-video   make clips, train a video model on them, sample from it (five and a half minutes)
#   make test     the test suite on the CPU
#   make slurm    install slurm-wlm (Debian, root), for the tests that start a cluster of their own
#   make dali     install NVIDIA DALI (424 MB), for the tests that decode with it on the CPU
#   make test-slurm   these tests alone
#   make reference   write docs/recipe.md and docs/metrics.md anew
#   make check    lint, types and the shape of the repository
#   make bench    the measurements behind docs/
#   make clean    remove the environment and caches; runs and data stay
#
# torch comes from wherever pip is set up to look. To ask for the CPU build by name:
#   make venv TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3.11
TORCH_INDEX ?=
BENCH_FOLDER ?= /tmp/megatron_curr_bench
PYTEST_ARGS ?= -n 2 --dist loadfile
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP_INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help venv demo demo-video test slurm dali test-slurm reference check format bench clean

help:
	@sed -n 's/^#   make/make/p' Makefile

venv: $(STAMP)

$(STAMP): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) setuptools
	$(PIP_INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP_INSTALL) --no-build-isolation --editable ".[dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/megatron-curr demo

demo-video: $(STAMP)
	$(BIN)/megatron-curr demo --video

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS) --ignore=tests/slurm tests
	$(BIN)/python -m pytest tests/slurm  # by itself: it waits for a cluster's real time-outs

slurm:
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	  slurmctld slurmd slurm-client munge iproute2

dali: $(STAMP)
	$(PIP_INSTALL) --no-build-isolation --editable ".[dali]"

test-slurm: $(STAMP)
	$(BIN)/python -m pytest -q --durations=10 tests/slurm

reference: $(STAMP)
	$(BIN)/megatron-curr reference recipe > docs/recipe.md
	$(BIN)/megatron-curr reference metrics > docs/metrics.md

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_repo_shape.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python -m benchmarks.data_engine
	$(BIN)/python -m benchmarks.step_overhead
	$(BIN)/python -m benchmarks.context_attention
	$(BIN)/python -m benchmarks.video_balance
	$(BIN)/python -m benchmarks.published_plans
	$(BIN)/python -m benchmarks.checkpoint
	$(BIN)/python -m benchmarks.convert --folder $(BENCH_FOLDER)
	$(BIN)/python -m benchmarks.preprocess --folder $(BENCH_FOLDER) --corpus-mb 2000

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
