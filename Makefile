# Every target works on a bare machine with Python >= 3.11 and its headers, make and a C++ compiler.
#
#   make setup        the virtual environment, and the package built in place
#   make demo         train a small Flax Transformer, compare with jax.nn
#   make demo-float8  the same model with attention's forward pass in bfloat16 and in float8
#   make demo-mesh    the same model on a mesh: eight simulated devices, or this machine's GPUs
#   make demo-generate  train the same model for a while and generate text from a paged cache
#   make test         the test suite; needs no GPU
#   make fuzz         random calls against the oracle for SECONDS, on whatever this machine has
#   make kernels      compile every kernel, on any machine, and check what came out
#   make gpu-test     the suite on the kernels, on a Hopper machine; writes tests/gpu/RECORD.json
#   make gpu-mesh-test  the same over 2 or 4 GPUs of this machine; writes tests/gpu/MESH_RECORD.json
#   make campaign     many random checks on a Hopper machine (docs/reliability.md)
#   make bench        the benchmarks; bench-quick: a part of them, in minutes
#   make bench-variety  grouped heads, windows, odd sizes, deterministic, sustained
#   make bench-packed  packed documents, beside upstream's varlen kernels and cuDNN
#   make bench-bias   biases and boolean masks, beside cuDNN, XLA and tokamax
#   make bench-scores  sinks, largest logits, caps and slopes, beside the call without
#   make bench-flex   score and mask functions, beside the kernels without, XLA and torch
#   make bench-decode  caches: decode steps, pages, ragged batches, beside cuDNN and XLA
#   make bench-float8  the forward pass in float8, in bfloat16 and in cuDNN's float8
#   make bench-ablation  the forward kernel without one of its parts at a time; builds them first
#   make bench-accuracy   errors on inputs with outliers, on any machine
#   make bench-mesh   scaling over the GPUs of this machine
#   make bench-train  a training step of a 1B-class decoder; needs flax and optax
#   make wheels       source distribution and wheels with all kernels, checked, into dist/
#   make inplace      build the module into jax_fa3/ for PYTHON
#   make docs       the documentation site, in build/docs
#   make lint, make format, make clean
#
# Variables:
#   CUDA        ON or OFF: with or without kernels. Default: ON where a GPU is visible
#   VENV, PINS  the virtual environment, with requirements/dev.txt as it is or (PINS=newest) unpinned
#   PYTHON      what the module is built for and run with; default: VENV's
#   GPU_PYTHON  the same for gpu-*test and bench*, which build only if the kernels do not import
#   HEAD_DIMS, DTYPES   the kernels to compile, comma-separated; default: all
#   WITHOUT     parts that the forward kernels leave out (benchmarks/ablation_kernels); default: none
#   PARTS, BUDGET   of make campaign: parts, and seconds after which no task starts; default: all
#   SECONDS, SEED   of make fuzz; default: 60, and a random seed
#   SHORT       1: the demos with small batches and few steps, as a check
#   WHEEL_PYTHONS   what wheels are built and tried with; names or paths; default: python3.11 python3.12
#   JOBS        parallel compile jobs

HAS_GPU := $(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)
CUDA ?= $(if $(HAS_GPU),ON,OFF)
PINS ?= pinned
VENV ?= .venv
PYTHON ?= $(VENV)/bin/python
GPU_PYTHON ?= $(PYTHON)
HEAD_DIMS ?= 32,64,96,128,192,256
DTYPES ?= bf16,fp16,e4m3
JOBS ?= $(shell nproc)
SHORT_FLAG = $(if $(SHORT),--short)

# The pinned environment also holds the build tools and headers, whatever PYTHON is.
TOOLS := .venv
TAG = $(shell $(PYTHON) -c 'import sys; print(sys.implementation.cache_tag)')
BUILD = build/$(TAG)-$(if $(filter ON,$(CUDA)),cuda,host)

# Lets the compiler cache serve any checkout and any build folder.
export CCACHE_BASEDIR := $(CURDIR)
export CCACHE_NOHASHDIR := 1

# The first Python that is new enough and can make environments and extension modules.
BASE_PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.13; do \
	$$python -c 'import ensurepip, os, sys, sysconfig; \
	sys.exit(sys.version_info < (3, 11) or not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' \
	2>/dev/null && echo $$python && break; done)

.PHONY: setup demo demo-float8 demo-mesh demo-generate test fuzz kernels gpu-test gpu-mesh-test campaign bench bench-quick bench-variety bench-packed bench-bias bench-scores bench-flex bench-decode bench-float8 ablation-builds bench-ablation bench-accuracy bench-mesh bench-train wheels inplace module gpu-module docs lint format clean

setup: inplace

demo: inplace
	PYTHONPATH=. $(PYTHON) examples/train_decoder.py $(SHORT_FLAG)

demo-float8: inplace
	PYTHONPATH=. $(PYTHON) examples/train_float8.py $(SHORT_FLAG)

# Interrupted and taken up again; the flag does nothing to GPUs.
demo-mesh: export XLA_FLAGS += --xla_force_host_platform_device_count=8
demo-mesh: inplace
	PYTHONPATH=. $(PYTHON) examples/train_mesh.py $(SHORT_FLAG) --steps $(if $(SHORT),12,60)
	PYTHONPATH=. $(PYTHON) examples/train_mesh.py $(SHORT_FLAG) --steps $(if $(SHORT),20,100) --resume

demo-generate: inplace
	PYTHONPATH=. $(PYTHON) examples/generate.py $(if $(SHORT),--short --tokens 8)

test: inplace
	$(PYTHON) -m pytest $(or $(PYTEST_ARGS),-q -n 2)

fuzz: inplace
	PYTHONPATH=. $(PYTHON) tests/fuzz.py --seconds $(or $(SECONDS),60) $(if $(SEED),--seed $(SEED))

kernels: CUDA := ON
kernels: module
	@command -v cuobjdump >/dev/null || $(TOOLS)/bin/pip install -q -r requirements/sass.txt
	$(TOOLS)/bin/python tools/check_kernels.py $(BUILD)

# A worker for each core, where there is pytest-xdist.
gpu-test: gpu-module
	JAX_FA3_REQUIRE_GPU=1 $(GPU_PYTHON) -m pytest tests/gpu $(or $(PYTEST_ARGS),$(shell $(GPU_PYTHON) -c \
		'import os, xdist; print("-n", max(1, os.cpu_count() - 1), "--dist loadgroup")' 2>/dev/null))

gpu-mesh-test: gpu-module
	JAX_FA3_REQUIRE_GPU=1 $(GPU_PYTHON) -m pytest tests/gpu/test_mesh.py $(PYTEST_ARGS)

campaign: gpu-module
	$(GPU_PYTHON) tests/gpu/campaign.py $(PARTS) $(if $(BUDGET),--budget-s $(BUDGET))

bench: gpu-module
	$(GPU_PYTHON) -m benchmarks.attention
	$(GPU_PYTHON) -m benchmarks.accuracy
	$(GPU_PYTHON) -m benchmarks.dispatch

bench-quick: gpu-module
	$(GPU_PYTHON) -m benchmarks.attention --quick

bench-variety: gpu-module
	$(GPU_PYTHON) -m benchmarks.variety

bench-packed: gpu-module
	$(GPU_PYTHON) -m benchmarks.packed

bench-bias: gpu-module
	$(GPU_PYTHON) -m benchmarks.bias

bench-scores: gpu-module
	$(GPU_PYTHON) -m benchmarks.scores

bench-flex: gpu-module
	$(GPU_PYTHON) -m benchmarks.flex

bench-decode: gpu-module
	$(GPU_PYTHON) -m benchmarks.decode

bench-float8: gpu-module
	$(GPU_PYTHON) -m benchmarks.float8

# The forward kernel of head dim 128 with parts left out, each variant a build of its own.
ABLATIONS := none rescale ping-pong overlap 192-rows 192-rows,overlap 192-rows,specialisation

ablation-builds:
	@for without in $(ABLATIONS); do \
		$(MAKE) --no-print-directory module CUDA=ON PYTHON=$(GPU_PYTHON) HEAD_DIMS=128 DTYPES=bf16 \
			BUILD=build/ablation/$$without WITHOUT=$$without || exit; \
	done

bench-ablation: ablation-builds
	$(GPU_PYTHON) -m benchmarks.ablation build/ablation

bench-accuracy: inplace
	$(PYTHON) -m benchmarks.accuracy

bench-mesh: gpu-module
	$(GPU_PYTHON) -m benchmarks.mesh

bench-train: gpu-module
	$(GPU_PYTHON) -m benchmarks.train_step

# ---- building

inplace: module
	@$(TOOLS)/bin/cmake --install $(BUILD) --component python --prefix . >/dev/null

module: $(VENV)/.ready $(TOOLS)/.ready
	@$(if $(filter OFF,$(CUDA)),echo "Building without kernels (CUDA=OFF): calls run through XLA.",$(MAKE) --no-print-directory $(TOOLS)/.kernels-ready)
	$(TOOLS)/bin/cmake -S . -B $(BUILD) -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(TOOLS)/bin/ninja \
		-DPython_EXECUTABLE=$(abspath $(shell command -v $(PYTHON))) \
		-DJAX_FA3_TOOLS_PYTHON=$(CURDIR)/$(TOOLS)/bin/python \
		-DJAX_FA3_CUDA=$(CUDA) -DJAX_FA3_HEAD_DIMS=$(HEAD_DIMS) -DJAX_FA3_DTYPES=$(DTYPES) \
		-DJAX_FA3_WITHOUT=$(WITHOUT) -DJAX_FA3_WERROR=ON --log-level=NOTICE
	$(TOOLS)/bin/cmake --build $(BUILD) -j $(JOBS)

# The kernels, unless they are there and import.
gpu-module:
	@$(GPU_PYTHON) -c 'from jax_fa3 import _C; assert _C.cuda_enabled' 2>/dev/null || \
		$(MAKE) inplace CUDA=ON PYTHON=$(GPU_PYTHON)

# ---- wheels

# One build folder for all Pythons: kernels do not depend on them and are compiled once.
WHEEL_PYTHONS ?= python3.11 python3.12
WHEEL_ENVIRONMENTS = $(addprefix build/wheels/,$(notdir $(WHEEL_PYTHONS)))
WHEEL_SETTINGS = -C build-dir=build/wheels/$(CUDA) -C cmake.define.JAX_FA3_CUDA=$(CUDA) \
	-C cmake.define.JAX_FA3_TOOLS_PYTHON=$(CURDIR)/$(TOOLS)/bin/python \
	-C cmake.define.JAX_FA3_HEAD_DIMS=$(HEAD_DIMS) -C cmake.define.JAX_FA3_DTYPES=$(DTYPES) \
	-C cmake.define.CMAKE_MAKE_PROGRAM=$(CURDIR)/$(TOOLS)/bin/ninja
WHEEL_KERNELS = $(if $(filter OFF,$(CUDA)),NONE,$(if $(filter-out file,$(origin HEAD_DIMS) $(origin DTYPES)),SOME,ALL))

build/wheels/%/.ready: requirements/wheels.txt requirements/dev.txt
	$(filter $* %/$*,$(WHEEL_PYTHONS)) -m venv $(@D)
	grep -E '^(scikit-build-core|nanobind|cmake|ninja)==' requirements/dev.txt | \
		$(@D)/bin/pip install -q --disable-pip-version-check -r requirements/wheels.txt -r /dev/stdin
	@touch $@

wheels: CUDA := ON
wheels: $(TOOLS)/.ready $(WHEEL_ENVIRONMENTS:%=%/.ready)
	@for python in $(WHEEL_PYTHONS); do $$python -c "" || exit; done  # not after all is compiled
	$(if $(filter ON,$(CUDA)),$(MAKE) --no-print-directory $(TOOLS)/.kernels-ready)
	rm -rf dist build/wheels/unrepaired
	$(firstword $(WHEEL_ENVIRONMENTS))/bin/python -m build --sdist --no-isolation --outdir dist
	@for environment in $(WHEEL_ENVIRONMENTS); do \
		CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $$environment/bin/python -m build --wheel --no-isolation --skip-dependency-check \
			--outdir build/wheels/unrepaired $(WHEEL_SETTINGS) || exit; \
	done
	PATH=$(CURDIR)/$(firstword $(WHEEL_ENVIRONMENTS))/bin:$$PATH \
		auditwheel repair --wheel-dir dist build/wheels/unrepaired/*.whl
	$(TOOLS)/bin/python tools/check_wheel.py dist --kernels $(WHEEL_KERNELS) \
		--pythons $(WHEEL_PYTHONS)

# ---- environments

# On an older Python pip would take an older JAX for the newest.
TAKES_NEWEST = $*/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 12))' || \
	{ echo "PINS=newest needs Python >= 3.12, as the newest JAX does; set BASE_PYTHON."; exit 1; }

# JAX's CUDA plugin without CUDA, beside the environment's packages: tests/conftest.py finds it there
# for programs that are compiled for GPUs and not run.
define COMPILER_FOR_GPUS
$*/bin/pip install -q --disable-pip-version-check --no-deps --upgrade --target $*/cuda \
	$$($*/bin/python -c 'from jax import __version__ as x; \
	print(f"jax-cuda13-plugin=={x} jax-cuda13-pjrt=={x}")') \
	|| echo "No CUDA plugin for this machine: tests of programs compiled for GPUs are left out."
endef

%/.ready: requirements/dev.txt
	@test -x $*/bin/python || test -n "$(BASE_PYTHON)" || \
		{ echo "No Python >= 3.11 with its headers (python3-dev) and venv found; set BASE_PYTHON."; exit 1; }
	test -x $*/bin/python || $(BASE_PYTHON) -m venv $*
	@$(if $(filter newest,$(PINS)),$(TAKES_NEWEST))
	@echo "Installing $< into $*; the first time takes minutes."
	$(if $(filter newest,$(PINS)),sed 's/==.*//',cat) $< $(if $(HAS_GPU),| sed 's/^jax\b/jax[cuda13]/') \
		| $*/bin/pip install -q --disable-pip-version-check --upgrade -r /dev/stdin
	$(if $(HAS_GPU),,$(COMPILER_FOR_GPUS))
	@touch $@

ifneq ($(VENV),$(TOOLS))
$(TOOLS)/.ready: requirements/dev.txt
	$(MAKE) VENV=$(TOOLS) PINS=pinned $@
endif

$(TOOLS)/.kernels-ready: requirements/headers.txt requirements/cuda.txt $(TOOLS)/.ready
	$(TOOLS)/bin/pip install -q --disable-pip-version-check --no-deps -r requirements/headers.txt
	@command -v nvcc >/dev/null || test -n "$$CUDACXX$$CUDA_HOME" || \
		$(TOOLS)/bin/pip install -q --disable-pip-version-check -r requirements/cuda.txt
	@touch $@

# ---- documentation

docs: $(VENV)/.docs-ready
	PYTHONPATH=. $(VENV)/bin/sphinx-build -q -W --keep-going -c docs . build/docs
	@echo "The site is build/docs/docs/index.html."

$(VENV)/.docs-ready: requirements/docs.txt $(VENV)/.ready
	$(VENV)/bin/pip install -q --disable-pip-version-check -r $<
	@touch $@

# ---- style

CPP_SOURCES = $(shell find src tests/cpp benchmarks -name '*.h' -o -name '*.cc' -o -name '*.cuh' -o -name '*.cu')

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP_SOURCES)
	$(VENV)/bin/mypy

format: $(VENV)/.ready
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CPP_SOURCES)

clean:
	rm -rf build dist jax_fa3/_C*.so jax_fa3/flex/kernels
