# make demo   set up, then all seven steps on a small sample
# make test   set up, then the tests
# Needs Python 3.11 or newer, a C++ compiler and a package index; everything is installed into .venv/.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: setup demo test clean

setup: .venv/ready

demo: .venv/ready
	$(BIN)/python tests/demo.py

test: .venv/ready-for-tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope tests

# torch must be there before mmcv, since mmcv's operators are compiled against it, on all CPUs and without debug
# symbols: they double the time
.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q "setuptools<81" wheel ninja $(shell grep -o '^torch==[^ ]*' requirements.txt)
	grep -v '^mmcv' requirements.txt | $(BIN)/python -m pip install -q -r /dev/stdin
	@echo "Building mmcv's operators: once, 5 to 20 minutes; a line each minute shows that it goes on."
	MMCV_WITH_OPS=1 CFLAGS="-g0 -O2" MAX_JOBS=$$(nproc) PATH="$(CURDIR)/$(BIN):$$PATH" \
		$(BIN)/python -m pip install --no-build-isolation $(shell grep -o '^mmcv==[^ ]*' requirements.txt)
	touch $@

.venv/ready-for-tests: .venv/ready tests/requirements.txt
	$(BIN)/python -m pip install -q -r tests/requirements.txt
	$(BIN)/python -m pip install -q --no-deps mmaction2==1.2.0
	touch $@

clean:
	rm -rf .venv demo
