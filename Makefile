# A fresh clone needs Python 3.10 or newer and make:
#   make demo    train on the embedded language, four to seven minutes on two cores
#   make test    every test but the slow ones, which are make test-slow
# Both create .venv with the versions of constraints.txt the first time, and again only after
# pyproject.toml or constraints.txt changed. Another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
WORK := benchmarks/.work
BASELINES := $(WORK)/joeynmt/.installed $(WORK)/eole/.installed

.PHONY: demo test test-random test-slow lint format install clean benchmark

demo: $(INSTALLED)
	$(BIN)/tx-lightning fit --config experiments/quickstart/translation.yaml

# Two worker processes with one thread each: threads of torch in small tests only get in each
# other's way.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup --quiet

# The same in random order. It prints how to repeat the order: make test-random SEED=1234
test-random: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup --quiet -p randomly \
		$(SEED:%=--randomly-seed=%)

# Most of an hour: runs that are killed at random, two hosts, ten million pairs. One after the other,
# so that the kills come when they should.
test-slow: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow --quiet

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "tx_lightning needs Python 3.10 or newer, $(PYTHON) is older: make PYTHON=/path/to/python3" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV), a few minutes the first time"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

# Minutes on a machine with nothing else to do; see benchmarks/README.md.
benchmark: $(INSTALLED) $(BASELINES)
	$(BIN)/python benchmarks/fit_overhead.py
	$(BIN)/python benchmarks/throughput.py \
		--python joeynmt=$(WORK)/joeynmt/bin/python --python eole=$(WORK)/eole/bin/python

$(WORK)/%/.installed: benchmarks/baselines/%.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --requirement $<
	@touch $@

# Keeps runs/, which holds results.
clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis benchmarks/.work
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
