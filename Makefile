# make demo   set up, then all seven steps on a small sample
# make test   set up, then the tests
# Needs Python 3.11 or newer and a package index; everything is installed into .venv/.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: setup demo test clean

setup: .venv/ready

demo: .venv/ready
	$(BIN)/python tests/demo.py

test: .venv/ready-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations=10 tests

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@

.venv/ready-for-tests: .venv/ready tests/requirements.txt
	$(BIN)/python -m pip install -q -r tests/requirements.txt
	$(BIN)/python -m pip install -q --no-deps mmaction2==1.2.0
	touch $@

clean:
	rm -rf .venv demo
