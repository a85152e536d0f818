# Two commands on a fresh machine: `make bench` and `make test`. Each sets up what it needs in .venv.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
GPU_VENV ?= .venv-gpu
GPU_TORCH ?= torch==2.14.1
BENCH_ARGS ?=
MINUTES ?= 1
SEED ?= 0
GPU_PYTHON ?= $(PYTHON)
GPU_ARGS ?=

bin := $(VENV)/bin
csrc := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: bench bench-operator bench-layer bench-model bench-field bench-vs bench-extreme report test fuzz test-gpu-build lint format sanitize gpu-check clean

bench: $(VENV)/built
	$(bin)/python -m bench.run $(BENCH_ARGS)

# InfSA among the mechanisms of the field, on three levels; a run goes on where the last one ended.
bench-operator bench-layer bench-model: bench-%: $(VENV)/built
	$(bin)/python -m bench.field $* $(BENCH_ARGS)

bench-field: $(VENV)/built
	for level in operator layer model; do $(bin)/python -m bench.field $$level $(BENCH_ARGS) || exit 1; done

# All results in bench/out as PNGs and one HTML page.
report: $(VENV)/built
	$(bin)/python -m bench.page

# This working tree beside revision REV, measured in turn.
bench-vs: $(VENV)/built
	$(bin)/python -m bench.versus $(REV) $(BENCH_ARGS)

# A whole model on one picture of 9216 x 9216 pixels: 331,776 tokens.
bench-extreme: $(VENV)/built
	$(bin)/python -m bench.extreme $(BENCH_ARGS)

test: $(VENV)/built
	$(bin)/python -m pytest $(TEST_ARGS)

# Random calls against float64 for MINUTES, drawn from SEED; each failure with the command that repeats it.
fuzz: $(VENV)/built
	$(bin)/python tests/fuzz.py --minutes $(MINUTES) --seed $(SEED)

# The GPU extension, built, imported and taken apart on a machine that has nvcc and needs no GPU.
test-gpu-build: $(GPU_VENV)/built
	cd $(GPU_VENV) && bin/python -m pytest -c ../pyproject.toml ../tests/test_gpu_build.py ../tests/test_build.py

lint: $(VENV)/built
	$(bin)/ruff check . && $(bin)/ruff format --check .
	$(bin)/clang-format --dry-run --Werror $(csrc) $(wildcard tests/simt/*)

format: $(VENV)/built
	$(bin)/ruff check --fix . && $(bin)/ruff format .
	$(bin)/clang-format -i $(csrc) $(wildcard tests/simt/*)

# The CPU kernels under AddressSanitizer and UBSan, in a build of their own, driven by the tests that reach every kernel path.
sanitize := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
sanitize: $(VENV)/built
	CFLAGS="$(sanitize) -g1" LDFLAGS="-fsanitize=address,undefined" \
	  $(bin)/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib
	for isa in avx512 avx2 portable; do \
	  INFSA_CPU_ISA=$$isa PYTHONPATH=build/sanitize/lib ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$($${CC:-cc} -print-file-name=libasan.so) $$($${CC:-cc} -print-file-name=libubsan.so)" \
	  $(bin)/pytest tests/test_operators.py tests/test_fuzz.py tests/test_linear_layer.py -k "cpu-cpu or random_calls" -x || exit 1; \
	done

# On a machine with a GPU, in its own Python (torch with CUDA, triton, numpy, pytest, matplotlib, ninja) and without a network.
gpu-check:
	$(GPU_PYTHON) setup.py -q build_ext --inplace
	$(GPU_PYTHON) -m bench.gpu_check $(GPU_ARGS)

clean:
	rm -rf build dist *.egg-info $(VENV) $(GPU_VENV) infsa_kernels/_C*.so

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(bin)/pip install -q $(TORCH) "setuptools>=77" ninja
	touch $@

$(GPU_VENV)/built: pyproject.toml setup.py $(csrc) $(shell find infsa_kernels -name '*.py')
	$(PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/pip install -q $(GPU_TORCH) "setuptools>=77" ninja numpy pytest
	FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="8.0;9.0a;10.0" $(GPU_VENV)/bin/pip install -q --no-build-isolation --no-deps --force-reinstall .
	touch $@

# torchvision asks for one version of torch: the constraint makes pip look for the torchvision of the torch that is here.
$(VENV)/built: $(VENV)/torch pyproject.toml setup.py $(csrc)
	$(bin)/python -c "from importlib.metadata import version as v; print('torch==' + v('torch'))" > $(VENV)/constraints.txt
	$(bin)/pip install -q --no-build-isolation -c $(VENV)/constraints.txt -e ".[bench,lint,test]"
	touch $@
