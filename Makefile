# What one can do with a checkout. `make adapt` and `make test` need nothing but Python 3.11 and make.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
SHELL := /bin/bash

.PHONY: help setup system browser adapt sweep dashboard table pretrain prepare test test-cluster bench check style clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: $(VENV)/.ready  ## a virtual environment with everything (3 minutes, 6 GB)

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with make PYTHON=python3.11"; exit 1; }
	@echo "setting up $(VENV): torch and Ray are large, this takes about 3 minutes and 6 GB"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
		-c constraints.txt -e '.[dev]'
	@# pip would compile on one core; some packages hold files for other Pythons, which fail to.
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $@
	@echo "$(VENV) is ready"

adapt: setup  ## the main job on the embedded data and weights
	@if [ -f runs/furniture/config.yaml ]; then \
		echo "the run 'furniture' exists: going on with it (rm -r runs/furniture starts anew)"; \
		$(BIN)/python jobs/adapt.py configs/adapt/furniture.yaml --resume; \
	else \
		$(BIN)/python jobs/adapt.py configs/adapt/furniture.yaml; \
	fi
	$(BIN)/python jobs/dashboard.py runs/furniture --report runs/furniture/report.html

sweep: setup  ## the smallest sweep: three thresholds, chosen among without a label
	@if [ -f runs/sweep-smallest/sweep.yaml ]; then resume=--resume; fi; \
	$(BIN)/python jobs/sweep.py configs/sweep/smallest.yaml $$resume

dashboard: setup  ## a page over everything in runs/, on this machine only
	@mkdir -p runs
	$(BIN)/python jobs/dashboard.py runs

table: setup  ## the whole result table of README: both directions, three seeds, two modes
	$(BIN)/python jobs/reproduce.py configs/adapt/furniture.yaml

pretrain: setup  ## the embedded starting weights anew
	$(BIN)/python jobs/pretrain.py configs/pretrain/furniture.yaml

prepare: setup system  ## the embedded shards anew, from Debian's sweethome3d packages
	$(BIN)/python jobs/prepare.py configs/prepare/furniture.yaml

# Rendering goes through EGL to Mesa, in software, without a display.
GL_PACKAGES := libegl1 libgl1-mesa-dri
# The tests look at the dashboard in a real browser.
BROWSER_PACKAGES := chromium chromium-driver fonts-dejavu-core

system: PACKAGES := $(GL_PACKAGES)
browser: PACKAGES := $(BROWSER_PACKAGES)
system browser:
	@dpkg -s $(PACKAGES) >/dev/null 2>&1 || { \
		echo "installing Debian's $(PACKAGES)"; \
		if [ "$$(id -u)" = 0 ]; then run=; else run=sudo; fi; \
		$$run apt-get update -qq && $$run apt-get install -qq -y --no-install-recommends \
			$(PACKAGES) >/dev/null; } || \
		{ echo "could not install them; run: apt-get install $(PACKAGES)"; exit 1; }

# Two processes. A file stays in one of them; they take files in the order of tests/conftest.py, the
# longest first, where xdist would begin with those of the most tests.
test: setup system browser  ## all tests
	CROSSMOST_NEEDS_BROWSER=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Each starts a cluster of its own: one after the other.
test-cluster: setup  ## nodes that come and go, jobs that are submitted
	$(BIN)/python -m pytest -m cluster

# Ratios measured side by side, appended to benchmarks/results and compared with what stands there.
bench: setup  ## the short benchmarks (10 minutes), and what has become slower
	$(BIN)/python benchmarks/point_ops.py
	$(BIN)/python benchmarks/step.py --quick
	$(BIN)/python benchmarks/input.py --quick
	$(BIN)/python benchmarks/startup.py --quick
	$(BIN)/python benchmarks/growth.py --quick
	$(BIN)/python benchmarks/compare.py

style: setup  ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	@# By itself: jobs and benchmarks have a prepare.py each.
	$(BIN)/mypy benchmarks
	$(BIN)/lint-imports

check: style test  ## what the project's own check runs

clean:  ## the environment and the caches; runs stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache *.egg-info
