# Two commands on a fresh machine: `make bench` and `make test`. Each sets up what it needs in .venv.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
GPU_VENV ?= .venv-gpu
GPU_TORCH ?= torch==2.14.1
BENCH_ARGS ?=
GPU_PYTHON ?= $(PYTHON)
GPU_ARGS ?=

bin := $(VENV)/bin
csrc := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help bench bench-all bench-vs bench-extreme report test test-gpu-build lint format sanitize gpu-check clean

help: ## every target in a line
	@sed -n 's/^\([a-z][a-z-]*\):[^#]*## \(.*\)/  \1|\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{ printf "%-18s%s\n", $$1, $$2 }'

bench: $(VENV)/built ## the main figures, in 3 minutes of measuring: table, plots, what limits what
	$(bin)/python -m bench $(BENCH_ARGS)

bench-all: $(VENV)/built ## everything, in half an hour on a CPU; goes on where the last run ended
	$(bin)/python -m bench --all $(BENCH_ARGS)

report: $(VENV)/built ## everything measured, as plots and one page: bench/out/report.html
	$(bin)/python -m bench --report $(BENCH_ARGS)

bench-vs: $(VENV)/built ## this working tree beside revision REV, in turn
	$(bin)/python -m bench --versus $(REV) $(BENCH_ARGS)

bench-extreme: $(VENV)/built ## a whole model on one picture of 9216 x 9216 pixels: 331,776 tokens
	$(bin)/python -m bench --level model --only linear_infsa --sizes 9216 --depth 4 --phase fwd --minutes 30 --limit 1800 $(BENCH_ARGS)

test: $(VENV)/built ## all tests
	$(bin)/python -m pytest $(TEST_ARGS)

# The GPU extension, built, imported and taken apart on a machine that has nvcc and needs no GPU.
test-gpu-build: $(GPU_VENV)/built ## the GPU extension, built and taken apart where there is nvcc
	cd $(GPU_VENV) && bin/python -m pytest -c ../pyproject.toml ../tests/test_gpu_build.py ../tests/test_build.py

lint: $(VENV)/built ## what style asks for
	$(bin)/ruff check . && $(bin)/ruff format --check .
	$(bin)/clang-format --dry-run --Werror $(csrc) $(wildcard tests/simt/*)

format: $(VENV)/built ## applies it
	$(bin)/ruff check --fix . && $(bin)/ruff format .
	$(bin)/clang-format -i $(csrc) $(wildcard tests/simt/*)

# The CPU kernels under AddressSanitizer and UBSan, in a build of their own, driven by the tests that reach every kernel path.
sanitize := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
sanitize: $(VENV)/built ## the CPU kernels under AddressSanitizer and UBSan
	CFLAGS="$(sanitize) -g1" LDFLAGS="-fsanitize=address,undefined" \
	  $(bin)/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib
	for isa in avx512 avx2 portable; do \
	  INFSA_CPU_ISA=$$isa PYTHONPATH=build/sanitize/lib ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$($${CC:-cc} -print-file-name=libasan.so) $$($${CC:-cc} -print-file-name=libubsan.so)" \
	  $(bin)/pytest tests/test_operators.py tests/test_fuzz.py tests/test_linear_layer.py -k "cpu-cpu or random_calls" -x || exit 1; \
	done

# On a machine with a GPU, in its own Python (torch with CUDA, triton, numpy, pytest, matplotlib, ninja) and without a network.
gpu-check: ## proves and measures everything on a GPU
	$(GPU_PYTHON) setup.py -q build_ext --inplace
	$(GPU_PYTHON) -m bench.gpu_check $(GPU_ARGS)

clean: ## removes what was built
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
