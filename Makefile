# `make serve` and `make test` are all that a new machine needs; `make install` only sets up .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?=
PORT ?= 8000
# torch alone first, at the exact version: a resolver that meets it installed picks no other.
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint .ci/constraints.txt
# Builds of torch for CUDA name the one triton that fits them.
BRINGS_TRITON := $(BIN)/python -c \
  'import sys; from importlib import metadata; sys.exit("triton" not in " ".join(metadata.requires("torch")))'

.PHONY: install serve test lint fuzz soak bench clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "octavo needs Python 3.11 or newer: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable .
	@echo 'building the C kernels for this processor, once: half a minute'
	$(BIN)/python -c 'from octavo.kernels import cpu_build; cpu_build.library()'
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed .ci/constraints-test.txt
	$(PIP) $$($(BRINGS_TRITON) || echo --constraint .ci/constraints-test.txt) --editable '.[test]'
	touch $@

serve: install
	$(BIN)/octavo serve $(MODEL) --port $(PORT)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p .view && ln -sfn .. .view/octavo
	$(BIN)/mypy -p octavo

# Processes are killed and cut off here beside other tests, on few cores: what fails is asked once more, alone, and that
# answer stands. The first failures stay in the output: a test that is named there is unsteady, which is a defect.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -q --cache-clear || { \
	  echo 'once more, alone: what failed'; \
	  OMP_NUM_THREADS=1 $(BIN)/pytest -q --last-failed --last-failed-no-failures none; }

# Run by .ci/run after `test`: eight to ten minutes on two cores.
fuzz: install
	$(BIN)/octavo sim fuzz --seeds 100000 --jobs 2

# Likewise: four minutes of clients, faults and disconnects, after which nothing may be held that was not before. What the
# faults log is shown only if it fails.
soak: install
	OMP_NUM_THREADS=1 $(BIN)/python -m octavo.gateway.soak --for 3m --warm-up 1m 2>.soak.log || { \
	  tail -n 20 .soak.log | cut -c 1-2000; exit 1; }

bench: install
	$(BIN)/octavo bench offline

clean:
	rm -rf $(VENV) .view .soak.log build *.egg-info
