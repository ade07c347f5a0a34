# One command each; `make` alone lists them. Everything but gpu-check runs in .venv, which is made on first use.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
GPU_PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
# Written last, removed first: an install that was interrupted leaves no stamp and starts afresh.
STAMP := $(VENV)/.installed

.PHONY: help venv demo test test-quick lint types check layers modules bench bench-peers bench-parts conformance gpu-check clean dist distclean docs

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14
	@echo 'ARGS="..." is passed on by demo, test, bench, bench-peers, bench-parts and gpu-check; PYTHON=python3.12 chooses the interpreter.'

# Torch's wheel on PyPI is built for CUDA 13. Where the driver is of CUDA 12, its own index has one for that; without
# that index pip takes the one of PyPI, and `fastdp devices` names the mismatch.
TORCH_OF_CUDA12 ?= https://download.pytorch.org/whl/cu126

venv: $(STAMP)  ## make .venv with the pinned versions, and CuPy where there is a GPU

$(STAMP): setup.py pyproject.toml constraints.txt
	@if [ ! -e $@ ]; then $(PYTHON) -m venv --clear $(VENV); fi
	@rm -f $@
	@extras=keras,demo,dev; index=; \
	if ! $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
	    echo 'Python 3.10: Keras 3.15 needs 3.11, so .venv is made without Keras and torch'; extras=demo,dev; \
	fi; \
	if smi=$$(nvidia-smi 2>&1); then \
	    cuda=$$(sed -nE 's/.*CUDA[A-Za-z ]* Version *: *([0-9]+).*/\1/p' <<<"$$smi" | head -n 1); \
	    case "$$cuda" in \
	        12|13) extras=$$extras,cuda$$cuda; echo "CUDA $$cuda driver: with CuPy, NVRTC and NCCL"; \
	            if [ "$$cuda" = 12 ]; then index='--extra-index-url $(TORCH_OF_CUDA12)'; fi;; \
	        *) echo "no CuPy: nvidia-smi names CUDA version '$$cuda', and CuPy 14 needs 12 or 13";; \
	    esac; \
	else echo 'no CuPy: nvidia-smi finds no GPU here'; fi; \
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt $$index -e ".[$$extras]"
	@touch $@

demo: $(STAMP)  ## train on virtual devices or GPUs and show what happens
	$(BIN)/python -m fastdp demo $(ARGS)

# Two processes: a test uses little more than one core. All tests of a file run in one of them, in the order that
# tests/conftest.py gives them: the longest files first. ARGS="-n 0" is one process.
# Python keeps the code that it has compiled, whatever the shell says: tests start some hundred processes.
PYTEST := env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest
test: $(STAMP)  ## run the tests
	$(PYTEST) -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-quick: $(STAMP)  ## run a few tests of each package, in about a minute
	$(PYTEST) -n 2 --dist loadfile --no-loadscope-reorder $(ARGS) $$($(BIN)/python tests/shared/quick.py)

lint: $(STAMP)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## mypy on fastdp/
	$(BIN)/mypy fastdp

check: lint types  ## lint and types

# MkDocs is needed for this alone, and fetched when it is. A broken link or a name that is not there ends the build, and so
# does what site_check.py finds on the pages.
docs: $(STAMP)  ## the pages of docs/ as a site in build/site, which needs no network to be read
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt mkdocs-material 'mkdocstrings[python]'
	PATH="$(CURDIR)/$(BIN):$$PATH" NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	$(BIN)/python tests/shared/site_check.py build/site

# SOURCE_DATE_EPOCH, the time of the latest commit, makes two builds of a commit the same to the last byte.
dist: $(STAMP)  ## build wheel and sdist into dist/, and try the wheel in an empty environment
	rm -rf dist build/lib build/bdist.*
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct 2>/dev/null || echo 1700000000) \
	    $(BIN)/python tests/shared/build_package.py dist
	$(BIN)/python tests/shared/try_wheel.py dist/*.whl

layers: $(STAMP)  ## write docs/layers.md from tests/shared/layer_cases.py
	$(BIN)/python tests/shared/layer_cases.py

modules: $(STAMP)  ## write the lists of packages in CONTRIBUTING.md, docs/design.md and docs/modules.md
	$(BIN)/python tests/shared/packages.py

# Keras's tests import more than Keras does: that lies in an environment of its own, on top of .venv.
conformance: $(STAMP)  ## run Keras's own trainer, callback and model tests on fastdp; writes docs/conformance.md
	@if [ ! -e .venv-conformance/.installed ]; then \
	    $(BIN)/python -m venv --clear .venv-conformance; \
	    $(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	        > "$$(.venv-conformance/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/venv.pth"; \
	    .venv-conformance/bin/python -m pip install --disable-pip-version-check --quiet \
	        -r bench/keras_conformance_requirements.txt; \
	    touch .venv-conformance/.installed; \
	fi
	.venv-conformance/bin/python bench/keras_conformance.py --write docs/conformance.md $(ARGS)

# The project's own questions, one script each; `fastdp bench` measures models.
QUESTIONS ?= virtual_devices first_step driver_overhead all_reduce hdf5

bench: $(STAMP)  ## the project's own benchmarks: QUESTIONS="first_step" runs some, ARGS=--save keeps the results
	for question in $(QUESTIONS); do $(BIN)/python bench/$$question.py $(ARGS); done

# JAX and TensorFlow lie in an environment of their own. The pins are those of .venv, but for h5py's.
PEERS := .venv-peers
PEERS_STAMP := $(PEERS)/.installed

bench-peers: $(PEERS_STAMP)  ## compare with Keras on torch, JAX and TensorFlow, and with torch's DDP; about 15 minutes
	$(PEERS)/bin/python bench/frameworks/compare.py $(ARGS)

$(PEERS_STAMP): setup.py pyproject.toml constraints.txt bench/frameworks/requirements.txt
	@if [ ! -e $@ ]; then $(PYTHON) -m venv --clear $(PEERS); fi
	@rm -f $@
	@grep -v '^h5py==' constraints.txt > $(PEERS)/constraints.txt
	$(PEERS)/bin/python -m pip install --disable-pip-version-check --quiet -c $(PEERS)/constraints.txt \
	    -r bench/frameworks/requirements.txt -e '.[keras,demo]'
	@touch $@

bench-parts: $(STAMP)  ## time scatter, merge, all-reduce, update and the engine's own cost by pytest-benchmark
	$(BIN)/python bench/run_parts.py $(ARGS)

# For a GPU machine that has its libraries already: no .venv, no network. WHEELS=folder adds Keras from there;
# STAGE="kernels engine" runs some of its stages.
gpu-check:  ## prove fastdp on the GPUs of this machine with $(GPU_PYTHON): tests, sanitizers, speed
	$(GPU_PYTHON) bench/gpu/check.py $(if $(STAGE),--stage $(STAGE)) $(if $(WHEELS),--wheels $(WHEELS)) $(ARGS)

clean:  ## remove builds and caches
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find fastdp tests bench setup.py -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean  ## remove .venv and .venv-peers as well
	rm -rf $(VENV) .venv-conformance $(PEERS)
