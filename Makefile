# make pi     install into .venv and run the example
# make test   lint, types and tests; needs nothing done before it. As root on Debian it installs what tests of machines
#             elsewhere need (tests/hosts/), and leaves them out with a reason where there is none of it
# make bench  measure against the floor (benchmarks/README.md); make bench-pack measures packing,
# make bench-boot machines elsewhere, make bench-inside what it costs to be looked at
# make wheel, make cli, make platforms   what releases are made of (packaging/README.md)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.NOTPARALLEL:
.PHONY: pi test lint bench bench-pack bench-boot bench-inside wheel cli platforms clean

pi: $(VENV)/run.stamp
	@$(BIN)/python examples/bigpi.py -n 20000000 -nmach 5

test: lint
	@PYTHONPATH=tests $(BIN)/python -m hosts
	$(BIN)/python -m pytest -n 2 $(PYTESTFLAGS)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/dev.stamp
	PYTHON=$(CURDIR)/$(BIN)/python benchmarks/run.sh

bench-pack: $(VENV)/run.stamp
	$(BIN)/python benchmarks/bench_pack.py

bench-boot: $(VENV)/dev.stamp
	$(BIN)/python benchmarks/bench_boot.py

bench-inside: $(VENV)/run.stamp
	$(BIN)/python benchmarks/bench_inside.py

wheel: $(VENV)/run.stamp
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

cli: $(VENV)/run.stamp
	$(BIN)/python packaging/cli.py

platforms: $(VENV)/run.stamp
	$(BIN)/python packaging/platforms.py

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build dist *.egg-info
	find bigmachine examples tests benchmarks packaging -name __pycache__ -prune -exec rm -rf {} +

# The stamps are newer than pyproject.toml exactly when what it asks for is installed.
$(VENV)/run.stamp: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/dev.stamp: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $(VENV)/run.stamp $@

$(BIN)/python:
	@for candidate in $(PYTHON) python3.11 python3.12 python3.13 python3.14; do \
	  if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$candidate; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "bigmachine needs Python 3.11 or later; $(PYTHON) is: $$($(PYTHON) --version 2>&1). Name another: make PYTHON=/path/to/python3.11" >&2; \
	  exit 1; \
	fi; \
	echo "creating $(VENV) with $$($$found --version)"; \
	$$found -m venv --clear $(VENV) && exit 0; \
	rm -rf $(VENV); \
	echo "$$found cannot create a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; \
	exit 1
