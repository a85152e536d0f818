# Two commands on a fresh machine: `make bench` and `make test`. Each sets up what it needs in .venv: the versions of
# requirements/ for this torch; for a torch without a lock there (TORCH=torch: the newest) the newest of everything.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
GPU_VENV ?= .venv-gpu
GPU_TORCH ?= torch==2.14.1
NEON_VENV ?= .venv-neon
NEON_TORCH ?= torch==2.10.0
LOCKED_TORCH ?= 2.11.0 2.13.0 2.14.1
BENCH_ARGS ?=
MINUTES ?= 1
SEED ?= 0
GPU_PYTHON ?= $(PYTHON)
GPU_ARGS ?=

bin := $(VENV)/bin
# requirements/torch-2.13.txt of torch==2.13.0
lock_of = $(wildcard requirements/torch-$(subst $() ,.,$(wordlist 1,2,$(subst ., ,$(subst torch==,,$(1))))).txt)
csrc := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help bench bench-all bench-vs bench-extreme bench-explain bench-train report test test-all test-newest fuzz test-wheel test-neon test-gpu-build lock hub lint format sanitize gpu-check clean

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

# BENCH_ARGS="--file picture.npy --pixels 46080 --dim 256": a picture that memory need not hold, made if it is not there.
bench-extreme: $(VENV)/built ## a whole model on one picture of 9216 x 9216 pixels: 331,776 tokens; or on that of --file
	$(bin)/python -m bench --level model --only linear_infsa --sizes 9216 --depth 4 --phase fwd --minutes 30 --limit 1800 $(BENCH_ARGS)

bench-explain: $(VENV)/built ## what small models look at: trained, measured and beside the paper; kept in bench/out/explain
	$(bin)/python -m bench.explain

bench-train: $(VENV)/built ## small models trained with each kind of attention, in an hour; goes on where the last run ended
	$(bin)/python -m bench.train $(BENCH_ARGS)

# To stay below 8 minutes on 2 cores; TEST_ARGS are pytest's. `--random-order --random-order-seed=1` shuffles.
test: $(VENV)/built ## the tests
	$(bin)/python tests/run.py $(TEST_ARGS)

# What is too long for `make test`: every case of what that tries some of.
test-all: $(VENV)/built ## the complete sweeps, which `make test` leaves out
	RUN_BY="make test-all" $(bin)/python tests/run.py -m sweep $(TEST_ARGS)

# Adapters and models beside the newest releases of the libraries they fit, and beside the oldest that pyproject.toml allows.
# Both use the torch and the extension of VENV. kernels, with what it brings, is nowhere else; the oldest transformers takes 0.16.
hosts := accelerate captum grad-cam kernels peft quantus timm torchao torchvision transformers
host_tests := $(addprefix tests/nn/test_,convert.py convert_families.py timm.py transformers.py vit.py vit_timm.py)
host_tests += tests/compat tests/explain/test_explain_adapters.py tests/package/test_docs.py tests/package/test_hub.py
either_host := $(subst $() ,|,$(hosts))
test-newest: $(VENV)/built ## adapters beside the newest and the oldest releases of their libraries
	tail -n 1 $(VENV)/constraints.txt > $(VENV)/torch.txt
	$(PYTHON) -m venv $(VENV)-newest $(VENV)-oldest
	for bin in $(VENV)-newest/bin $(VENV)-oldest/bin; do \
	  $$bin/pip install -q $(TORCH) "setuptools>=77" || exit 1; \
	  INFSA_NO_EXT=1 $$bin/pip install -q -c $(VENV)/torch.txt --upgrade --upgrade-strategy eager --no-build-isolation \
	    -e ".[attribution,test]" kernels || exit 1; \
	done
	$(VENV)-oldest/bin/pip install -q -c $(VENV)/torch.txt $$(grep -oE '"($(either_host))>=[0-9.]+' pyproject.toml | sed 's/"//; s/>/=/') \
	  "kernels<0.17"
	code=0; for bin in $(VENV)-newest/bin $(VENV)-oldest/bin; do \
	  echo "== $$bin =="; $$bin/pip list | grep -E "^(torch|$(either_host)) "; \
	  RUN_BY="make test-newest" $$bin/python tests/run.py $(host_tests) $(TEST_ARGS) || code=1; \
	done; exit $$code

# requirements/torch-*.txt anew, from what is newest today. uv resolves for every Python and platform at once, from metadata.
lock: ## requirements/torch-*.txt anew
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/pip install -q uv
	for torch in $(LOCKED_TORCH); do \
	  lock=requirements/torch-$${torch%.*}.txt; \
	  echo "# What \`make test\`, \`make bench\` and CI install beside torch $$torch: written by \`make lock\`." > $$lock; \
	  printf "%s\n" torch==$$torch ninja "setuptools>=77" | $(VENV)-lock/bin/uv pip compile -q - pyproject.toml --all-extras \
	    --config-file requirements/uv.toml --no-header --no-annotate --universal --python-version 3.10 >> $$lock || exit 1; \
	done

# Random calls against float64 for MINUTES, drawn from SEED; each failure with the command that repeats it.
fuzz: $(VENV)/built ## random calls against float64, for MINUTES from SEED
	$(bin)/python tests/fuzz.py --minutes $(MINUTES) --seed $(SEED)

# One wheel beside every torch of LOCKED_TORCH: each operator there beside its plain code, in random calls, right and wrong.
test-wheel: $(VENV)/built ## one wheel beside several versions of torch
	rm -rf build/wheel
	$(bin)/python -m build -q --no-isolation --wheel -o build/wheel .
	code=0; for torch in $(LOCKED_TORCH); do \
	  venv=$(VENV)-wheel-$$torch; $(PYTHON) -m venv $$venv; \
	  $$venv/bin/pip install -q torch==$$torch numpy pytest || { echo "== torch $$torch is not to be had here =="; continue; }; \
	  $$venv/bin/pip install -q --force-reinstall --no-deps build/wheel/*.whl || exit 1; \
	  echo "== torch $$torch =="; cd $$venv; bin/python -m infsa_kernels.info | sed -n "s/^extension *//p"; \
	  bin/python ../tests/ops/test_invariants.py 0 > calls.txt && tail -n 1 calls.txt || { code=1; tail -n 3 calls.txt; }; cd ..; \
	done; exit $$code

# The CPU kernels as AArch64 machine code: setup.py's own build beside torch's wheel for AArch64, held to the rule, in an emulator.
# The second line says which kernels these are, and fails where they do not load. Torch 2.13's wheel asks for CUDA.
neon_tests := tests/ops/test_pooled_linear.py tests/ops/test_operators.py
neon_tests += -k "cpu-cpu and (head_dims or kinds_of_rho or mixed_layouts or statistics or test_rule)"
# Once more on a core with BF16 instructions. Without SVE, whose vectors torch would not expect as long as this core's.
neon_bf16 := max,sve=off
neon_bf16_tests := tests/ops/test_operators.py tests/ops/test_numerics.py
neon_bf16_tests += -k "cpu-cpu and pure and bfloat16 and (layouts or kinds_of_rho or statistics or rounds_once)"
test-neon: $(NEON_VENV)/torch $(VENV)/torch ## the CPU kernels on AArch64, by an emulator
	PATH="$(CURDIR)/$(bin):$$PATH" $(NEON_VENV)/bin/python setup.py -q build --build-base build/neon --build-lib build/neon/lib
	PYTHONPATH=build/neon/lib $(NEON_VENV)/bin/python -P -m infsa_kernels.info | grep "^extension .*CPU kernels for portable"
	PYTHONPATH=build/neon/lib $(NEON_VENV)/bin/python -P -m pytest -p no:cacheprovider $(neon_tests) $(TEST_ARGS)
	PYTHONPATH=build/neon/lib NEON_CPU=$(neon_bf16) $(NEON_VENV)/bin/python -P -m infsa_kernels.info | grep "^extension .*CPU kernels for neon_bf16"
	PYTHONPATH=build/neon/lib NEON_CPU=$(neon_bf16) $(NEON_VENV)/bin/python -P -m pytest -p no:cacheprovider $(neon_bf16_tests) $(TEST_ARGS)

# The GPU extension, built, imported and taken apart on a machine that has nvcc and needs no GPU.
test-gpu-build: $(GPU_VENV)/built ## the GPU extension, built and taken apart where there is nvcc
	cd $(GPU_VENV) && bin/python -m pytest -c ../pyproject.toml ../tests/gpu/test_gpu_build.py ../tests/package/test_build.py

# The package as `kernels` and `kernel-builder upload` take it, with the library that was built here (docs/hub.md).
hub: $(VENV)/built ## a kernel of the Hugging Face hub in build/infsa-kernels
	$(bin)/python -m hub.layout

lint: $(VENV)/built ## what style asks for
	$(bin)/ruff check . && $(bin)/ruff format --check .
	$(bin)/clang-format --dry-run --Werror $(csrc) $(wildcard tests/gpu/simt/*) tests/helpers/cpu_tasks.cpp

format: $(VENV)/built ## applies it
	$(bin)/ruff check --fix . && $(bin)/ruff format .
	$(bin)/clang-format -i $(csrc) $(wildcard tests/gpu/simt/*) tests/helpers/cpu_tasks.cpp

# The CPU kernels under AddressSanitizer and UBSan, in a build of their own, driven by the tests that reach every kernel path.
sanitize := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
sanitize: $(VENV)/built ## the CPU kernels under AddressSanitizer and UBSan
	CFLAGS="$(sanitize) -g1" LDFLAGS="-fsanitize=address,undefined" \
	  $(bin)/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib
	for isa in avx512_bf16 avx512 avx2 portable; do \
	  INFSA_CPU_ISA=$$isa PYTHONPATH=build/sanitize/lib ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$($${CC:-cc} -print-file-name=libasan.so) $$($${CC:-cc} -print-file-name=libubsan.so)" \
	  $(bin)/pytest tests/ops/test_operators.py tests/ops/test_fuzz.py tests/ops/test_pooled_linear.py -k "cpu-cpu or random_calls" -x || exit 1; \
	done

# On a machine with a GPU, in its own Python (torch with CUDA, triton, numpy, psutil, pytest, matplotlib, ninja) and without a network.
gpu-check: ## proves and measures everything on a GPU
	$(GPU_PYTHON) setup.py -q build_ext --inplace
	$(GPU_PYTHON) -m bench.gpu_check $(GPU_ARGS)

clean: ## removes what was built
	rm -rf build dist *.egg-info $(VENV) $(VENV)-newest $(VENV)-oldest $(VENV)-lock $(VENV)-wheel-* $(GPU_VENV) $(NEON_VENV) infsa_kernels/*.so

# torchvision asks for one version of torch: the constraint makes pip look for the torchvision of the torch that is here. A CUDA
# build of torch brings a Triton of its own choice, which stays.
$(VENV)/torch: $(call lock_of,$(TORCH))
	$(PYTHON) -m venv $(VENV)
	cat $^ /dev/null | sed "/^triton==/d" > $(VENV)/constraints.txt
	$(bin)/pip install -q -c $(VENV)/constraints.txt $(TORCH) "setuptools>=77" ninja
	$(bin)/python -c "import triton" 2> /dev/null || cat $^ /dev/null > $(VENV)/constraints.txt
	$(bin)/python -c "from importlib.metadata import version as v; print('torch==' + v('torch'))" >> $(VENV)/constraints.txt
	touch $@

$(NEON_VENV)/torch: tests/aarch64_venv.sh
	tests/aarch64_venv.sh $(NEON_VENV) $(NEON_TORCH) $(PYTHON)
	touch $@

$(GPU_VENV)/built: pyproject.toml setup.py $(csrc) $(shell find infsa_kernels -name '*.py')
	$(PYTHON) -m venv $(GPU_VENV)
	cat $(call lock_of,$(GPU_TORCH)) /dev/null | sed "/^triton==/d" > $(GPU_VENV)/constraints.txt
	$(GPU_VENV)/bin/pip install -q -c $(GPU_VENV)/constraints.txt $(GPU_TORCH) "setuptools>=77" build ninja numpy pytest
	FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="8.0;9.0a;10.0;12.0" $(GPU_VENV)/bin/pip install -q --no-build-isolation --no-deps --force-reinstall .
	touch $@

$(VENV)/built: $(VENV)/torch pyproject.toml setup.py $(csrc)
	$(bin)/pip install -q --no-build-isolation -c $(VENV)/constraints.txt -e ".[bench,lint,test]"
	touch $@
